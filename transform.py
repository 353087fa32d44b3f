"""Augmentation of a batch, on the device that holds it.

Draws come from a generator on the CPU and are for the whole batch (`global_batch_size`), of which
each rank may hold a part: they are the same on every device and for any number of ranks. No
function modifies its arguments.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from brainseg.devices import to_device
from brainseg.distributed import shard_of_batch


def augment(
    images: Tensor,
    masks: Tensor,
    generator: torch.Generator,
    scale: float = 0.05,
    angle: float = 15.0,
    flip: float = 0.5,
    global_batch_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale, rotate and flip each slice of a batch at random, in one interpolation.

    `images` (N, C, H, W) and `masks` (N, 1, H, W) are float. The factor is uniform in 1 ± `scale`,
    the rotation in ± `angle` degrees; a horizontal flip has probability `flip`. Pixels from outside
    the slice are background: the minimum of each slice and channel, not 0, which is tissue after
    normalisation.
    """
    n, _, height, width = images.shape
    draws = _own(torch.rand(global_batch_size or n, 3, generator=generator), global_batch_size)
    zoom = 1 + scale * (2 * draws[:, 0] - 1)
    theta = torch.deg2rad(angle * (2 * draws[:, 1] - 1))
    mirror = torch.where(draws[:, 2] < flip, -1.0, 1.0)

    # Output to input coordinates, both in -1..1: columns first, as in affine_grid.
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


def augment_all(
    images: Tensor,
    masks: Tensor,
    generator: torch.Generator,
    scale: float,
    angle: float,
    drop: float,
    intensity: float,
    sequences: int = 3,
    global_batch_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply `augment`, `drop_sequences` and `vary_intensity` to a training batch."""
    size = global_batch_size
    images, masks = augment(images, masks, generator, scale, angle, global_batch_size=size)
    if drop:
        images = drop_sequences(images, generator, drop, size)
    if intensity:
        images = vary_intensity(images, generator, intensity, sequences, size)
    return images, masks


def vary_intensity(
    images: Tensor,
    generator: torch.Generator,
    strength: float,
    sequences: int,
    global_batch_size: int | None = None,
) -> Tensor:
    """Scale and shift each of the `sequences` of each slice (N, C, H, W), as other scanners would.

    The factor is uniform in 1 ± `strength`, the shift in ± `strength` standard deviations. C is
    `sequences` times the number of adjacent slices, which vary alike.
    """
    draws = torch.rand(2, global_batch_size or len(images), sequences, 1, 1, generator=generator)
    draws = strength * (2 * draws - 1).repeat(1, 1, images.shape[1] // sequences, 1, 1)
    factor, shift = (to_device(_own(part, global_batch_size), images.device) for part in draws)
    return images * (1 + factor) + shift


def drop_sequences(
    images: Tensor,
    generator: torch.Generator,
    probability: float,
    global_batch_size: int | None = None,
) -> Tensor:
    """Replace post-contrast (channel 2) by FLAIR (1), and half the time pre-contrast (0) too.

    This is how the LGG data set fills in a missing sequence. Each slice of (N, C, H, W) is changed
    with `probability`; C is 3 times the number of adjacent slices, which change alike.
    """
    draws = torch.rand(global_batch_size or len(images), 2, generator=generator)
    draws = to_device(_own(draws, global_batch_size), images.device)
    post = draws[:, 0] < probability
    pre = post & (draws[:, 1] < 0.5)
    keep = torch.zeros_like(post)
    missing = torch.stack((pre, keep, post), dim=1)[:, None, :, None, None]  # (N, 1, 3, 1, 1)
    slices = images.unflatten(1, (-1, 3))  # (N, slices, 3, H, W)
    return torch.where(missing, slices[:, :, 1:2], slices).flatten(1, 2)


def _own(draws: Tensor, global_batch_size: int | None) -> Tensor:
    """Select the draws (global_batch_size, ...) of this rank's part of the batch."""
    return draws if global_batch_size is None else shard_of_batch(draws)
