"""Augmentation of a batch, on whatever device the batch is on.

Draws come from a generator on the CPU, so that they are the same on every device. They are for
the `whole` batch, of which a process that shares it with others has a part, so that they are the
same for any number of processes. No function modifies what it is given.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from brainseg.devices import to_device
from brainseg.distributed import share_of_batch


def augment(
    images: Tensor,
    masks: Tensor,
    generator: torch.Generator,
    scale: float = 0.05,
    angle: float = 15.0,
    flip: float = 0.5,
    whole: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale, rotate and flip each slice of a batch at random, in one interpolation.

    `images` (N, C, H, W) and `masks` (N, 1, H, W), float; the factor is uniform in 1 ± `scale`,
    the rotation in ± `angle` degrees, a horizontal flip has probability `flip`. What comes in
    from outside is background: the least value of each slice and channel, not 0, which after
    normalisation is tissue.
    """
    n, _, height, width = images.shape
    draws = _own(torch.rand(whole or n, 3, generator=generator), whole)
    zoom = 1 + scale * (2 * draws[:, 0] - 1)
    theta = torch.deg2rad(angle * (2 * draws[:, 1] - 1))
    mirror = torch.where(draws[:, 2] < flip, -1.0, 1.0)

    # Output to input coordinates, both in -1..1: columns first, as affine_grid has them.
    cos, sin, aspect = theta.cos() / zoom, theta.sin() / zoom, height / width
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0], affine[:, 0, 1] = mirror * cos, -sin * aspect
    affine[:, 1, 0], affine[:, 1, 1] = mirror * sin / aspect, cos
    affine = to_device(affine, images.device)
    grid = F.affine_grid(affine, [n, 1, height, width], align_corners=False)  # (N, H, W, 2)

    background = images.amin(dim=(2, 3), keepdim=True)
    images = F.grid_sample(images - background, grid, mode="bilinear", align_corners=False)
    masks = F.grid_sample(masks, grid, mode="nearest", align_corners=False)
    return images + background, masks


def vary_intensity(
    images: Tensor,
    generator: torch.Generator,
    strength: float,
    sequences: int,
    whole: int | None = None,
) -> Tensor:
    """Scale and shift each of the `sequences` of each slice (N, C, H, W), as other scanners would.

    The factor is uniform in 1 ± `strength`, the shift in ± `strength` standard deviations. Channels
    are slices of so many sequences each, and vary alike.
    """
    draws = torch.rand(2, whole or len(images), sequences, 1, 1, generator=generator)
    draws = strength * (2 * draws - 1).repeat(1, 1, images.shape[1] // sequences, 1, 1)
    factor, shift = (to_device(_own(part, whole), images.device) for part in draws)
    return images * (1 + factor) + shift


def drop_sequences(
    images: Tensor, generator: torch.Generator, probability: float, whole: int | None = None
) -> Tensor:
    """Put FLAIR (channel 1) in the place of post-contrast (2), half the time of pre-contrast too.

    That is how the LGG data set fills in for a missing sequence. Of slices (N, C, H, W), a share
    of `probability` is changed; channels are slices of three sequences each.
    """
    draws = _own(torch.rand(whole or len(images), 2, generator=generator), whole)
    draws = to_device(draws, images.device)
    post = draws[:, 0] < probability
    pre = post & (draws[:, 1] < 0.5)
    keep = torch.zeros_like(post)
    missing = torch.stack((pre, keep, post), dim=1)[:, None, :, None, None]  # (N, 1, 3, 1, 1)
    slices = images.unflatten(1, (-1, 3))  # (N, slices, 3, H, W)
    return torch.where(missing, slices[:, :, 1:2], slices).flatten(1, 2)


def _own(draws: Tensor, whole: int | None) -> Tensor:
    """Those of the draws (whole, ...) that are for this process's part of the batch."""
    return draws if whole is None else share_of_batch(draws)
