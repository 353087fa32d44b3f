"""torch.hub entry points: the bare networks, and `segmenter`, raw volume in, mask out."""

from brainseg import weights

dependencies = ["torch"]


def unet(in_channels=3, out_channels=1, init_features=32, pretrained=False):
    """U-Net with batch norm for FLAIR-abnormality segmentation, in evaluation mode if pretrained.

    Takes slices (N, in_channels, H, W) that were preprocessed as a volume, gives probabilities
    (N, out_channels, H, W). For raw volumes use the entry `segmenter`, which preprocesses them.
    in_channels, out_channels, init_features: the pretrained network has 3, 1 and 32.
    pretrained: load the weights that come with the repository; their hash is checked.
    """
    build = weights.load_pretrained if pretrained else weights.build_model
    return build(
        "unet", in_channels=in_channels, out_channels=out_channels, init_features=init_features
    )


def resnext_unet(in_channels=3, out_channels=1, pretrained=False):
    """U-Net on a ResNeXt-50 32x4d encoder; slices and probabilities as those of `unet`.

    pretrained: True fetches an encoder that was trained on ImageNet, a path takes it from a file.
    """
    return weights.build_model(
        "resnext_unet", in_channels=in_channels, out_channels=out_channels, pretrained=pretrained
    )


def segmenter(network="unet", device=None, **options):
    """Raw volume (slices, H, W, 3) uint8 in, boolean mask (slices, H, W) out, pretrained.

    Channels are pre-contrast, FLAIR, post-contrast; needs numpy and scikit-image.
    network: whose weights to take, of those that come with the repository; where several networks
    come with it (weights/unet-folds), they are averaged.
    device: an accelerator if there is one, unless named here.
    options: threshold=0.5, largest_component=True, min_volume=None, tta=False, batch_size=16,
    amp=None.
    """
    from brainseg.segmenter import Segmenter  # needs more than torch

    return Segmenter.from_weights(weights.shipped_weights(network), device=device, **options)
