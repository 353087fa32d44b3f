"""Outlined slices, montages, GIFs, and the figure of sorted DSCs."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import skimage.util
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..fill import percentile, without_fill
from .files import MARK, atomic_write

if TYPE_CHECKING:  # slow to import
    from matplotlib.figure import Figure

GREEN, RED = (0, 255, 0), (255, 0, 0)
PALETTE = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)  # greys, and two colours:
TRUTH, PREDICTION = 254, 255
PALETTE[[TRUTH, PREDICTION]] = GREEN, RED
DASH = 6  # pixels; dashes tell the truth from the prediction where colours do not


def to_grey(volume: np.ndarray) -> np.ndarray:
    """Return FLAIR (channel 1, or the only one) of a volume (S, H, W, C) as (S, H, W) uint8."""
    flair, _ = without_fill(volume[..., min(1, volume.shape[-1] - 1)])
    if flair.dtype.kind == "f":  # of integers, the percentile is sooner there
        flair = flair.astype(np.float32)
    low, high = float(flair.min()), percentile(flair, 99.8)
    grey = flair.astype(np.float32, copy=False)
    grey -= low  # in place: copies of it would be the largest arrays of a run
    grey /= max(high - low, 1e-6)
    np.clip(grey, 0, 1, out=grey)
    grey *= 255
    return grey.astype(np.uint8)


def edge(mask: np.ndarray) -> np.ndarray:
    """Return the edge of a bool mask (S, H, W): the voxels with any of 4 neighbours outside."""
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    inner = padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1] & padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
    return mask & ~inner


def outline(
    grey: np.ndarray, prediction: np.ndarray, truth: np.ndarray | None = None, side: int = 1
) -> np.ndarray:
    """Draw slices (S, H, W) uint8 as RGB (S, H, W, 3): dashed green truth, red prediction on top.

    Small slices are enlarged by the integer that brings their longer side closest to `side`.
    """
    return PALETTE[outline_in_palette(grey, prediction, truth, side)]


def outline_in_palette(
    grey: np.ndarray, prediction: np.ndarray, truth: np.ndarray | None = None, side: int = 1
) -> np.ndarray:
    """Draw as `outline` does, but return places in PALETTE, (S, H, W) uint8: a third to write."""
    times = max(1, round(side / max(grey.shape[1:])))
    pictures = np.minimum(_enlarge(grey, times), TRUTH - 1)
    if truth is not None:
        line = edge(_enlarge(truth, times))
        _, rows, columns = np.nonzero(line)
        gaps = (rows + 2 * columns) // DASH % 2 == 1
        pictures[line] = np.where(gaps, 0, TRUTH)
    pictures[edge(_enlarge(prediction, times))] = PREDICTION
    return pictures


def _enlarge(slices: np.ndarray, times: int) -> np.ndarray:
    return slices.repeat(times, axis=1).repeat(times, axis=2)


def thumbnail(volume: np.ndarray, mask: np.ndarray, truth: np.ndarray | None = None) -> bytes:
    """Draw the FLAIR slice with the largest mask, or truth, outlined: a JPEG of at most 480²."""
    areas = mask.sum(axis=(1, 2))
    if truth is not None and not areas.any():
        areas = truth.sum(axis=(1, 2))
    k = int(areas.argmax()) if areas.any() else len(areas) // 2
    shown = slice(k, k + 1)
    if truth is not None:
        truth = truth[shown]
    picture = Image.fromarray(outline(to_grey(volume)[shown], mask[shown], truth, side=256)[0])
    picture.thumbnail((480, 480))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=80, subsampling=0)  # colours of thin lines stay
    return content.getvalue()


def montage(pictures: np.ndarray) -> np.ndarray:
    """Tile pictures (S, H, W, 3), or in PALETTE (S, H, W), into one that is about square."""
    count, height, width = pictures.shape[:3]
    columns = max(1, round(math.sqrt(count * height / width)))
    shape = math.ceil(count / columns), columns
    if pictures.ndim == 3:
        return skimage.util.montage(pictures, fill=0, grid_shape=shape)
    return skimage.util.montage(pictures, fill=(0, 0, 0), grid_shape=shape, channel_axis=-1)


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write a picture in PALETTE (H, W), with our mark."""
    text = PngInfo()
    text.add_text("Software", MARK)
    # Level 1 of zlib takes a third of the time, and files are no larger.
    with_palette(picture).save(path, compress_level=1, pnginfo=text)


def with_palette(picture: np.ndarray) -> Image.Image:
    """Return a picture (H, W) of places in PALETTE as one of Pillow."""
    image = Image.fromarray(picture)
    image.putpalette(PALETTE.tobytes())
    return image


def save_figure(path: Path | str, figure: Figure, dpi: int) -> None:
    """Write a Matplotlib figure atomically, with our mark, in the format of the suffix."""
    suffix = Path(path).suffix.lower()
    with atomic_write(path) as temporary:
        if suffix in (".jpg", ".jpeg"):
            figure.savefig(temporary, dpi=dpi, pil_kwargs={"comment": MARK.encode()})
        else:
            name = "Software" if suffix == ".png" else "Creator"
            figure.savefig(temporary, dpi=dpi, metadata={name: MARK})


def save_gif(path: Path | str, pictures: np.ndarray) -> None:
    """Write a looping GIF of outlined slices in PALETTE (S, H, W), 0.12 s each."""
    frames = list(map(with_palette, pictures))
    with atomic_write(path) as temporary:
        frames[0].save(
            temporary,
            "GIF",
            save_all=True,
            append_images=frames[1:],
            duration=120,
            loop=0,
            comment=MARK,
            optimize=False,
        )


def new_figure(**options) -> Figure:
    """Make a figure for a file, whatever MPLBACKEND a notebook has set: it may not be installed."""
    backend = os.environ.pop("MPLBACKEND", None)  # read, and refused, by the import
    try:
        from matplotlib.figure import Figure  # slow to import
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return Figure(layout="constrained", **options)


def save_dsc_figure(path: Path | str, scores: dict[str, float], marked: Sequence[str] = ()) -> None:
    """Draw sorted bars of DSCs, their mean and median; `marked` ones are pale and do not count."""
    ranked = dict(sorted(scores.items(), key=itemgetter(1)))
    counted = [score for name, score in ranked.items() if name not in marked]
    figure = new_figure(figsize=(8, 1.4 + 0.26 * len(ranked)))
    axes = figure.add_subplot()
    bars = axes.barh(list(ranked), list(ranked.values()), color="#4c78a8")
    for name, bar in zip(ranked, bars, strict=True):
        if name in marked:
            bar.set_facecolor("#b9c6d3")
    if counted:
        mean, median = float(np.mean(counted)), float(np.median(counted))
        axes.axvline(mean, color="#e4572e", label=f"mean {mean:.3f}")
        axes.axvline(median, color="#2e933c", ls="--", label=f"median {median:.3f}")
    if marked:
        axes.plot([], [], "s", color="#b9c6d3", label="trained on, not counted")
    axes.set(xlim=(0, 1), xlabel="DSC per volume", ylim=(-0.6, len(ranked) - 0.4))
    axes.tick_params(axis="y", labelsize=7, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    save_figure(path, figure, dpi=150)
