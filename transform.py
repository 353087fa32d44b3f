"""Augmentation of a batch, on the device that holds it.

Every number is drawn on the CPU and for the whole batch, of which each rank may hold a part: the
draws are the same on every device and for any number of ranks. No function modifies its arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from brainseg.devices import to_device
from brainseg.distributed import shard_of_batch

THINNEST, THICKEST = 0.04, 0.09  # scalp and skull, as a share of a slice's side
DARK = 0.1  # of a slice's maximum: darker pixels are air, unless there is head on all sides


@dataclass(frozen=True)
class Augmentation:
    """Settings of the augmentation, and the augmentation of a batch of slices."""

    scale: float  # of `move`
    angle: float
    drop: float  # probability of `drop_sequences`, if there are 3 sequences
    intensity: float  # strength of `vary_intensity`
    sequences: int
    strip: float = 0  # probability of `strip_skulls`
    flip: float = 0.5
    drop_both: float = 0.5  # share of the dropped whose pre-contrast is dropped too

    def __call__(
        self, images: Tensor, masks: Tensor, generator: Generator, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """Draw for a batch of all ranks, and apply what falls to this rank's part of it.

        `images` (N, C, H, W) and `masks` (N, 1, H, W) are float.
        """
        whole = self.draw(batch_size, generator)
        draws = {name: shard_of_batch(numbers) for name, numbers in whole.items()}
        zoom = None
        if self.strip:
            widths = widths_to_strip(draws["strip"], self.strip)
            images, masks = strip_skulls(images, masks, widths)
            zoom = 1 / (1 - 2 * widths)  # brain extraction comes before the crop to the head
        images, masks = move(images, masks, draws["move"], self.scale, self.angle, self.flip, zoom)
        if self.drop:
            images = drop_sequences(images, draws["drop"], self.drop, self.drop_both)
        if self.intensity:
            images = vary_intensity(images, draws["intensity"], self.intensity)
        return images, masks

    def draw(self, slices: int, generator: Generator) -> dict[str, Tensor]:
        """Draw numbers in 0..1, a row for each slice, for each change that is switched on."""
        draws = {"move": torch.rand(slices, 3, generator=generator)}
        if self.drop:
            draws["drop"] = torch.rand(slices, 2, generator=generator)
        if self.intensity:
            gains, shifts = torch.rand(2, slices, self.sequences, generator=generator)
            draws["intensity"] = torch.cat((gains, shifts), dim=1)
        if self.strip:
            draws["strip"] = torch.rand(slices, 2, generator=generator)
        return draws


def move(
    images: Tensor,
    masks: Tensor,
    draws: Tensor,
    scale: float = 0.05,
    angle: float = 15.0,
    flip: float = 0.5,
    zoom: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale, rotate and flip each slice by its `draws` (N, 3), in one interpolation.

    The factor is uniform in 1 ± `scale`, times `zoom` (N,) if given; the rotation in ± `angle`
    degrees; a horizontal flip has probability `flip`. Pixels from outside the slice are background:
    the minimum of each slice and channel, not 0, which is tissue after normalisation.
    """
    n, _, height, width = images.shape
    factor = 1 + scale * (2 * draws[:, 0] - 1)
    if zoom is not None:
        factor = factor * zoom
    theta = torch.deg2rad(angle * (2 * draws[:, 1] - 1))
    mirror = torch.where(draws[:, 2] < flip, -1.0, 1.0)

    # Output to input coordinates, both in -1..1: columns first, as in affine_grid.
    cos, sin, aspect = theta.cos() / factor, theta.sin() / factor, height / width
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0], affine[:, 0, 1] = mirror * cos, -sin * aspect
    affine[:, 1, 0], affine[:, 1, 1] = mirror * sin / aspect, cos
    affine = to_device(affine, images.device)
    grid = F.affine_grid(affine, [n, 1, height, width], align_corners=False)  # (N, H, W, 2)

    background = images.amin(dim=(2, 3), keepdim=True)
    images = F.grid_sample(images - background, grid, mode="bilinear", align_corners=False)
    masks = F.grid_sample(masks, grid, mode="nearest", align_corners=False)
    return images + background, masks


def widths_to_strip(draws: Tensor, probability: float) -> Tensor:
    """Draw how much of each slice's edge to strip, as a share of its side, by `draws` (N, 2).

    It is uniform from 4 % to 9 % with `probability`, and otherwise 0.
    """
    widths = THINNEST + (THICKEST - THINNEST) * draws[:, 1]
    return torch.where(draws[:, 0] < probability, widths, 0.0)


def strip_skulls(images: Tensor, masks: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """Make background of all within `widths` (N,), shares of the side, of the edge of each head.

    This removes scalp and skull crudely, so that stripped heads are not new to the network.
    """
    stripped = widths > 0
    if not stripped.any():
        return images, masks
    pixels = (widths[stripped] * images.shape[-1]).round()
    chosen = to_device(stripped.nonzero()[:, 0], images.device)
    some = images[chosen]
    background = some.amin(dim=(2, 3), keepdim=True)
    depth = depth_in_head((some - background).amax(dim=1, keepdim=True), int(pixels.max()))
    brain = depth >= to_device(pixels, images.device)[:, None, None, None]
    images = images.index_copy(0, chosen, torch.where(brain, some, background))
    return images, masks.index_copy(0, chosen, masks[chosen] * brain)


def depth_in_head(bright: Tensor, most: int) -> Tensor:
    """Count the pixels from each pixel to the edge of the head, up to `most`: (N, 1, H, W).

    `bright` (N, 1, H, W) is the brightest sequence less its background. What has head on all four
    sides is head: ventricles and sulci are dark.
    """
    head = (bright > DARK * bright.amax(dim=(2, 3), keepdim=True)).float()
    head = F.max_pool2d(erode(erode(head)), 5, stride=1, padding=2)  # without specks in the air
    between = torch.ones_like(head)
    for axis in (2, 3):
        before = head.cummax(dim=axis).values
        after = head.flip(axis).cummax(dim=axis).values.flip(axis)
        between = between * before * after
    depth = torch.zeros_like(head)
    for _ in range(most):
        between = erode(between)
        depth = depth + between
    return depth


def erode(head: Tensor) -> Tensor:
    """Take a pixel from the edge of a map (N, 1, H, W) of 0 and 1; outside the slice is 0."""
    return 1 - F.max_pool2d(F.pad(1 - head, (1, 1, 1, 1), value=1.0), 3, stride=1)


def drop_sequences(images: Tensor, draws: Tensor, probability: float, both: float = 0.5) -> Tensor:
    """Replace post-contrast (channel 2) by FLAIR (1), and in a share `both` pre-contrast (0) too.

    This is how the LGG data set fills in a missing sequence. Each slice of (N, C, H, W) is changed
    with `probability`, by its `draws` (N, 2); C is 3 times the number of adjacent slices, which
    change alike.
    """
    draws = to_device(draws, images.device)
    post = draws[:, 0] < probability
    pre = post & (draws[:, 1] < both)
    never = torch.zeros_like(post)
    missing = torch.stack((pre, never, post), dim=1)[:, None, :, None, None]  # (N, 1, 3, 1, 1)
    slices = images.unflatten(1, (-1, 3))  # (N, slices, 3, H, W)
    return torch.where(missing, slices[:, :, 1:2], slices).flatten(1, 2)


def vary_intensity(images: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Scale and shift each sequence of each slice (N, C, H, W), as other scanners would.

    The factor is uniform in 1 ± `strength`, the shift in ± `strength` standard deviations, by
    `draws` (N, 2 * sequences). C is the number of sequences times that of adjacent slices, which
    vary alike.
    """
    changes = to_device(strength * (2 * draws - 1), images.device)
    gains, shifts = changes[:, None, :, None, None].chunk(2, dim=2)  # (N, 1, sequences, 1, 1)
    slices = images.unflatten(1, (-1, gains.shape[2]))  # (N, slices, sequences, H, W)
    return (slices * (1 + gains) + shifts).flatten(1, 2)
