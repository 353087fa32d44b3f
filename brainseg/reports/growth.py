"""Show the growth of one patient's lesion: the curve with its errors, and the scans side by side.

Classes and thresholds are drawn as lines to read against, not as a result: the speeds by which
Pallud 2013 (PMC3635513) divides grade 2 gliomas, and those of RANO-LGG (PMC10584081) on the
product of the diameters. Colours of Okabe and Ito, which colour-blind readers tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..growth import DOUBTFUL, WITHIN, YEAR
from ..io.pictures import new_figure
from ..patients import counted
from ..visits import Patient, View
from .page import Table
from .volumes import PRINTED

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SPEEDS = (4, 8, 12)  # mm a year, between the four classes
SHADES = {4: "#f7f7f7", 8: "#e8e8e8", 12: "#d9d9d9", 1000: "#cacaca"}  # of slower ones
THRESHOLDS = (25, -25, -50)  # % of the product
BLUE, ORANGE, YELLOW, SKY = "#0072B2", "#E69F00", "#F0E442", "#56B4E9"
GAINED, LOST = (230, 159, 0, 170), (0, 114, 178, 170)  # orange and blue, two thirds opaque
LEAST_WINDOW = 0.12  # of the slice, shown on each side of the lesion
MOST_VIEWS = 6  # beside each other; of more, the first and the last ones


def growth_figure(patient: Patient) -> Figure:
    """Draw the curve, the product of the diameters, and the scans at the same place."""
    views = patient.views
    if len(views) > MOST_VIEWS:
        views = views[:1] + views[1 - MOST_VIEWS :]
    rows = 1
    if len(views) > 1:
        rows = 2
    figure = new_figure(figsize=(10, 3.3 * rows))
    parts = figure.subfigures(rows, 1, squeeze=False)[:, 0]
    curve, product = parts[0].subplots(1, 2, width_ratios=(2, 1))
    _draw_curve(curve, patient)
    _draw_product(product, patient)
    if rows == 2:
        panels = parts[1].subplots(1, len(views), squeeze=False)[0]
        window = _window(views)
        for axes, view in zip(panels, views, strict=True):
            _draw_view(axes, view, patient.aspect)
            axes.set(xlim=window[1], ylim=window[0][::-1])
            axes.set_title(view.label, fontsize=8, parse_math=False)
        _draw_legend(parts[1])
    return figure


def growth_picture(patient: Patient) -> bytes:
    """Draw the figure of a patient as a PNG."""
    content = io.BytesIO()
    growth_figure(patient).savefig(content, dpi=110, format="png")
    return content.getvalue()


def rate_text(patient: Patient) -> str:
    """Say how fast the diameter grows."""
    rate = patient.rate
    if np.isnan(rate.value):
        if any(visit.spacing is None for visit in patient.visits):
            return "no rate: the pixel size is not known; give it with --spacing"
        return "no rate: it needs two dates 90 days apart, and a lesion on both"
    text = f"{rate.value:+.1f} mm a year"
    if not np.isnan(rate.low):
        text += f" (80 % interval {rate.low:+.1f} to {rate.high:+.1f})"
    if is_doubtful(patient):
        text += ", from scans that are hard to compare"
    return text


def is_doubtful(patient: Patient) -> bool:
    """Tell whether growth.csv calls any of the scans hard to compare with an earlier one."""
    return any(row["comparable"] == "no" for row in patient.rows)


def growth_table(patients: Sequence[Patient], path: Path) -> Table:
    """Make the short table that a run prints; `path` holds all of it."""
    rows = []
    for patient in patients[:PRINTED]:
        first, last = patient.visits[0], patient.visits[-1]
        since = f"{first.date or first.case} to {last.date or last.case}"
        change = _change_text(patient.rows[-1], "first")
        rows.append([patient.name, str(len(patient.visits)), since, change, rate_text(patient)])
    notes = []
    if len(patients) > PRINTED:
        notes.append(f"... and {len(patients) - PRINTED} more in {path}")
    doubtful = [patient.name for patient in patients if is_doubtful(patient)]
    if doubtful:
        which = ", ".join(doubtful[:PRINTED])
        notes.append(f"Scans that are hard to compare: of {which} (why_not in {path}).")
    title = f"Growth: {counted(len(patients), 'patient')}"
    header = ["patient", "scans", "from", "volume since the first", "mean tumour diameter"]
    return Table(title, header, rows, "\n".join(notes), left=(0, 2, 3, 4))


def growth_section(patient: Patient) -> dict:
    """Make what a page shows of a patient: name, rate, picture (PNG) and lines of a table."""
    lines = []
    for row in patient.rows:
        line = [row["case"], str(row["date"] or "")]
        line += [_range_text(row, "lesion_ml", "ml"), _range_text(row, "diameter_mm", "mm")]
        line += [_change_text(row, "previous"), _change_text(row, "first"), row["why_not"]]
        lines.append(line)
    picture = growth_picture(patient)
    return {"name": patient.name, "rate": rate_text(patient), "picture": picture, "lines": lines}


def _range_text(row: dict, name: str, unit: str) -> str:
    if row[name] is None:
        return "-"
    if row[f"{name}_low"] is None:
        return f"{row[name]:.1f} {unit}"
    return f"{row[name]:.1f} {unit} ({row[f'{name}_low']:.1f} to {row[f'{name}_high']:.1f})"


def _change_text(row: dict, name: str) -> str:
    """Write a change since an earlier scan, in % with its interval."""
    column = f"percent_since_{name}"
    if row[column] is None:
        return "-"
    text = f"{row[column]:+.0f} %"
    if row[f"{column}_low"] is not None:
        text += f" ({row[f'{column}_low']:+.0f} to {row[f'{column}_high']:+.0f})"
    if row[f"since_{name}"] in (WITHIN, DOUBTFUL):
        text += f", {row[f'since_{name}']}"
    return text


def _places(patient: Patient) -> np.ndarray:
    """Return years since the first scan, or numbers of the scans if they have no dates."""
    days = [visit.date.toordinal() for visit in patient.visits if visit.date]
    if len(days) < len(patient.visits):
        return np.arange(len(patient.visits), dtype=float)
    return (np.array(days) - days[0]) / YEAR


def _draw_curve(axes: Axes, patient: Patient) -> None:
    places = _places(patient)
    values, lows, highs = np.array([visit.diameter for visit in patient.visits]).T
    if np.isnan(values).all():
        axes.set_axis_off()
        axes.set_title(rate_text(patient), fontsize=9)
        return
    rate = patient.rate
    top = np.nanmax(np.fmax(values, highs))
    bottom = np.nanmin(np.fmin(values, lows))
    if not np.isnan(rate.value):
        drawn = values > 0
        widths = (highs - lows)[drawn]
        weights = None
        if np.isfinite(widths).all():
            weights = 1 / widths**2  # as the rate has them
        centre = np.average(places[drawn], weights=weights)
        start = np.average(values[drawn], weights=weights) - rate.value * centre
        top = max(top, start + (max(rate.value, 0) + 5) * places[-1])
        _draw_classes(axes, start, places[-1], top)
        axes.plot(places, start + rate.value * places, color=ORANGE, lw=2)
    errors = np.nan_to_num(np.stack((values - lows, highs - values)))
    axes.errorbar(places, values, errors, fmt="o", color=BLUE, ecolor=BLUE, capsize=4)
    pad = 0.06 * max(top - bottom, 1.0)
    axes.set_ylim(bottom - pad, top + pad)
    axes.set_xlim(-0.04 * max(places[-1], 0.1), 1.2 * places[-1])
    labels = [str(visit.date or visit.case) for visit in patient.visits]
    axes.set_xticks(places, labels, fontsize=7, rotation=20, parse_math=False)
    axes.set_ylabel("mean tumour diameter, mm")
    axes.set_title(rate_text(patient), fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_classes(axes: Axes, start: float, end: float, top: float) -> None:
    """Shade where a lesion of the first size would be at the speeds of each class."""
    far = 1.2 * end
    for fast, shade in SHADES.items():
        axes.fill_between((0, far), start, (start, start + fast * far), color=shade, zorder=-fast)
    for speed in SPEEDS:
        axes.plot((0, far), (start, start + speed * far), color="white", lw=1, zorder=-speed)
        leaves = min(far, (top - start) / speed)  # where the line leaves the picture
        axes.annotate(
            f"{speed} mm a year", (leaves, start + speed * leaves), xytext=(-4, -3),
            textcoords="offset points", ha="right", va="top", fontsize=7, color="0.3",
        )  # fmt: skip


def _draw_product(axes: Axes, patient: Patient) -> None:
    """Draw the change of the product of the diameters, with the thresholds of RANO-LGG."""
    column = "bidimensional_percent_since_first"
    changes = np.array([row[column] for row in patient.rows], float)  # None becomes NaN
    changes[0] = 0.0
    axes.plot(_places(patient), changes, "o-", color=BLUE)
    for threshold in THRESHOLDS:
        axes.axhline(threshold, color="0.4", lw=1, ls="--")
        axes.annotate(
            f"RANO-LGG {threshold:+d} %", (0.02, threshold), xycoords=("axes fraction", "data"),
            va="bottom", fontsize=7, color="0.3",
        )  # fmt: skip
    unit = "scan"
    if patient.visits[0].date:
        unit = "years"
    axes.set_xlabel(unit, fontsize=8)
    axes.set_ylabel("product of diameters,\n% since the first", fontsize=8)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def _window(views: Sequence[View]) -> list[tuple[float, float]]:
    """Return the rows and columns to show: those of all masks, and as much again on each side."""
    union = np.logical_or.reduce([view.mask | view.first for view in views])
    limits = []
    for axis in (0, 1):
        length = union.shape[axis]
        places = np.flatnonzero(union.any(axis=1 - axis))
        if not len(places):
            limits.append((-0.5, length - 0.5))
            continue
        margin = max(np.ptp(places) + 1, LEAST_WINDOW * length)
        start = max(places[0] - margin, 0) - 0.5
        limits.append((start, min(places[-1] + 1 + margin, length) - 0.5))
    return limits


def _draw_view(axes: Axes, view: View, aspect: float) -> None:
    axes.imshow(view.grey, cmap="gray", aspect=aspect, vmin=0, vmax=255)
    height, width = view.mask.shape
    layer = np.zeros((height, width, 4), np.uint8)
    layer[view.mask & ~view.first] = GAINED
    layer[view.first & ~view.mask] = LOST
    axes.imshow(layer, aspect=aspect, interpolation="nearest")
    for mask, colour in ((view.first, SKY), (view.mask, YELLOW)):
        if mask.any():
            axes.contour(mask, levels=[0.5], colors=colour, linewidths=1)
    axes.axis("off")


def _draw_legend(part) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Line2D([], [], color=SKY, label="outline on the first scan"),
        Line2D([], [], color=YELLOW, label="outline on this scan"),
        Patch(color=ORANGE, label="gained"),
        Patch(color=BLUE, label="lost"),
    ]
    part.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
