"""torch.hub entry points: the bare networks, and `segmenter`, raw volume in, mask out."""

import pathlib

import brainseg

# Python keeps one package of a name: a second checkout would silently get the code of the first.
_loaded = pathlib.Path(brainseg.__file__ or "").resolve().parent
_here = pathlib.Path(__file__).resolve().parent
if _loaded != _here / "brainseg":
    raise ImportError(
        f"{_here} cannot be loaded: the package brainseg of {_loaded.parent} is loaded already; "
        "restart Python (in a notebook, the kernel), or load it in another process"
    )
from brainseg import weights  # noqa: E402

dependencies = ["torch"]


def unet(in_channels=3, out_channels=1, init_features=32, pretrained=False):
    """U-Net with batch norm for FLAIR-abnormality segmentation, in evaluation mode if pretrained.

    Takes slices (N, in_channels, H, W) that were preprocessed as a volume, returns probabilities
    (N, out_channels, H, W). For raw volumes use the entry `segmenter`, which preprocesses them.
    in_channels, out_channels, init_features: the pretrained network has 3, 1 and 32.
    pretrained: load the weights shipped with the repository, trained on slices of 192 x 192; their
    hash is checked.
    """
    build = weights.load_pretrained if pretrained else weights.build_model
    return build(
        "unet", in_channels=in_channels, out_channels=out_channels, init_features=init_features
    )


def resnext_unet(in_channels=3, out_channels=1, pretrained=False):
    """U-Net on a ResNeXt-50 32x4d encoder; slices and probabilities as in `unet`.

    pretrained: True downloads an encoder trained on ImageNet, a path reads it from a file.
    """
    return weights.build_model(
        "resnext_unet", in_channels=in_channels, out_channels=out_channels, pretrained=pretrained
    )


def segmenter(network="unet", device=None, **options):
    """Pretrained: raw volume (slices, H, W, 3) in, boolean mask (slices, H, W) out.

    Channels are pre-contrast, FLAIR, post-contrast, of any numeric type; needs numpy and
    scikit-image.
    network: "unet", the five networks of weights/unet-folds, which are averaged.
    device: by default an accelerator if available.
    options: threshold=None, largest_component=None, min_volume=None, tta=None (None: as in the
    cards), batch_size=16, amp=None.
    """
    from brainseg.segmenter import Segmenter  # needs more than torch

    return Segmenter.from_weights(weights.shipped_weights(network), device=device, **options)
