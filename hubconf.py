"""torch.hub entry points: the bare networks, and `segmenter`, raw volume in, mask out.

The weights are those of this checkout; Python can hold only one of them (see below).
"""

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

dependencies = ["torch"]


def unet(in_channels=3, out_channels=1, init_features=32, pretrained=False):
    """U-Net with batch norm for FLAIR-abnormality segmentation, in evaluation mode if pretrained.

    Takes slices (N, in_channels, H, W) that were preprocessed as a volume, returns probabilities
    (N, out_channels, H, W). For raw volumes use the entry `segmenter`, which preprocesses them.
    in_channels, out_channels, init_features: the pretrained network has 3, 1 and 32.
    pretrained: load the weights shipped with the repository, trained on slices of 192 x 192; their
    hash is checked.
    """
    from brainseg.weights import build_model, load_pretrained

    build = load_pretrained if pretrained else build_model
    return build(
        "unet", in_channels=in_channels, out_channels=out_channels, init_features=init_features
    )


def resnext_unet(in_channels=3, out_channels=1, pretrained=False):
    """U-Net on a ResNeXt-50 32x4d encoder; slices and probabilities as in `unet`.

    pretrained: True downloads an encoder trained on ImageNet, a path reads it from a file.
    """
    from brainseg.weights import build_model

    return build_model(
        "resnext_unet", in_channels=in_channels, out_channels=out_channels, pretrained=pretrained
    )


def segmenter(network="unet", device=None, **options):
    """Pretrained: raw volume in, boolean mask (slices, H, W) out.

    A volume is (slices, H, W, 3) with the channels pre-contrast, FLAIR, post-contrast, or FLAIR
    alone, (slices, H, W) or (slices, H, W, 1), of any numeric type; needs numpy and scikit-image.
    network: "unet", the network that inference.py uses by default, or "unet-folds", the average of
    five.
    device: by default an accelerator if available.
    options: threshold=None, largest_component=None, min_volume=None, tta=None (None: as in the
    cards), batch_size=16, amp=None.

        segment = torch.hub.load(repository, "segmenter")
        mask = segment(volume)
        result = segment.assess(volume, spacing=(5, 0.9, 0.9))
        rows = segment.growth([("2020-03-02", first, (5, 1, 1)), ("2021-04-12", later, (5, 1, 1))])

    `assess` takes the mm from slice to slice, row to row and column to column, and returns
    mask: (slices, H, W), bool; with square pixels, that of `segment(volume)`.
    probabilities: of lesion, (slices, H, W), float32.
    ml: the volume of the mask; None without a spacing.
    expected_dsc, expected_dsc_low, expected_dsc_high: the DSC to expect and its 80 % interval; None
    for an empty mask and for options that the fit in the cards is not for.
    warnings: a list of sentences; empty if nothing calls for a second look.

    `growth` takes a date, a volume and its spacing for each of several scans of one patient, and
    returns the rows of growth.csv: a dict per scan, with volume, diameters, changes and mm a year.
    """
    from brainseg.notebook import NotebookSegmenter  # needs more than torch
    from brainseg.weights import shipped_weights

    return NotebookSegmenter.from_weights(shipped_weights(network), device=device, **options)
