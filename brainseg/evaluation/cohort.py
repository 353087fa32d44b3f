"""A cohort without true masks on one page: what was found, and where to look first."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .page import data_url, write_page
from .volumes import by_need, is_poor, shown_count, shown_expected, shown_size

BINS = 24  # at most, of the histogram

STYLE = """
:root { --warn: #fff4e5; --warn-line: #f3c58b }
@media (prefers-color-scheme: dark) { :root { --warn: #33271a; --warn-line: #7a5a2e } }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.3rem 0 }
.tiles div { background: var(--box); border-radius: 8px; padding: .7rem 1.1rem; min-width: 8rem }
.tiles b { display: block; font-size: 1.55rem; line-height: 1.2; font-weight: 650 }
.tiles span { color: var(--soft); font-size: .82rem }
.bar { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; margin: .6rem 0 }
.bar button, .bar label { font: inherit; font-size: .85rem; color: inherit; cursor: pointer }
.bar button { background: var(--box); border: 1px solid var(--line); border-radius: 6px;
              padding: .25rem .7rem }
.bar button[aria-pressed=true] { border-color: var(--blue);
                                 box-shadow: inset 0 0 0 1px var(--blue) }
svg { width: 100%; max-width: 720px; height: auto; display: block }
svg rect { fill: var(--blue) } svg text { fill: var(--soft); font-size: 11px }
svg line { stroke: var(--line) }
#cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .8rem }
.case { background: var(--box); border: 1px solid transparent; border-radius: 8px;
        overflow: hidden; color: inherit; text-decoration: none; font-size: .78rem;
        content-visibility: auto; contain-intrinsic-size: 150px 215px }
.case img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #000 }
.case div { padding: .4rem .55rem .5rem; overflow-wrap: anywhere; line-height: 1.35 }
.case span { color: var(--soft); display: block }
.case.look { border-color: var(--warn-line) } .case .poor { color: var(--red); font-weight: 600 }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0;
            cursor: pointer }
th[aria-sort=ascending] button::after { content: " \\25B4" }
th[aria-sort=descending] button::after { content: " \\25BE" }
tr.look td { background: var(--warn) } tr:target td { box-shadow: inset 0 2px 0 var(--blue) }
td:last-child, th:last-child { text-align: left; white-space: normal; min-width: 18rem }
.only-look .rest { display: none } td.poor { color: var(--red); font-weight: 600 }
"""

SCRIPT = """
const body = document.querySelector("tbody"), cases = document.querySelector("#cases");
const heads = [...document.querySelectorAll("th[data-key]")];
const sorts = [...document.querySelectorAll(".bar button")];
function sort(key, down) {
  const order = (a, b) => {
    const x = JSON.parse(a.dataset.row)[key], y = JSON.parse(b.dataset.row)[key];
    if (x === null || y === null) return (x === null) - (y === null);
    return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
  };
  for (const place of [body, cases]) place.append(...[...place.children].sort(order));
  for (const head of heads)
    head.setAttribute("aria-sort",
      head.dataset.key !== key ? "none" : down ? "descending" : "ascending");
  for (const button of sorts)
    button.setAttribute("aria-pressed", button.dataset.key === key);
}
for (const head of heads)
  head.firstChild.onclick = () =>
    sort(head.dataset.key, head.getAttribute("aria-sort") === "ascending");
for (const button of sorts)
  button.onclick = () => sort(button.dataset.key, button.dataset.down === "1");
document.querySelector("#look").onchange = (event) =>
  document.body.classList.toggle("only-look", event.target.checked);
"""


def save_cohort(
    path: Path, rows: Sequence[dict], pictures: Sequence[bytes | None], about: dict
) -> None:
    """Write the page of a cohort: `rows` of volumes.csv, a JPEG each, and how it was made.

    A case without a picture could not be read: it stands in the table alone.
    Raises OSError, naming `path`, if it cannot be written; what was there before stays.
    """
    shown = {row["case"]: picture for row, picture in zip(rows, pictures, strict=True)}
    ordered = by_need(rows)
    keys = [_sort_keys(row, k) for k, row in enumerate(ordered)]
    cards = "".join(
        _card(row, key, shown[row["case"]])
        for row, key in zip(ordered, keys, strict=True)
        if shown[row["case"]]
    )
    read = [row for row in rows if shown[row["case"]]]
    body = (
        f"{_tiles(rows, read)}<h2>Volumes</h2>{_histogram(read)}"
        f"<h2>Every case at its largest lesion slice</h2>{_controls(rows)}<div id=cases>{cards}"
        f"</div><h2>Table</h2>{_table(ordered, keys)}<script type=module>{SCRIPT}</script>"
    )
    title = f"brainseg: {len(rows)} case{'s' * (len(rows) != 1)}"
    write_page(path, title, body, json.dumps(about, indent=2), STYLE)


def _size_of(row: dict) -> float | None:
    return row["lesion_voxels"] if row["lesion_ml"] is None else row["lesion_ml"]


def _sort_keys(row: dict, need: int) -> str:
    """Encode what a case is sorted by, for the page's script."""
    names = ("case", "slices", "components", "expected_dsc")
    keys = {name: row[name] for name in names} | {"size": _size_of(row), "need": need}
    return html.escape(json.dumps(keys), quote=True)


def _tiles(rows: Sequence[dict], read: Sequence[dict]) -> str:
    sizes = [_size_of(row) for row in read if row["lesion_voxels"]]
    median = f"{np.median(sizes):,.1f}".removesuffix(".0") if sizes else "-"
    expected = [row["expected_dsc"] for row in rows if row["expected_dsc"] is not None]
    tiles = {
        "cases": len(rows),
        "need a look": sum(bool(row["warning"]) for row in rows),
        "without a lesion": sum(not row["lesion_voxels"] for row in read),
        f"median {_unit(read)} of a lesion": median,
        "median expected DSC": f"{np.median(expected):.2f}" if expected else "-",
    }
    inner = "".join(
        f"<div><b>{value}</b><span>{name}</span></div>" for name, value in tiles.items()
    )
    return f"<div class=tiles>{inner}</div>"


def _unit(rows: Sequence[dict]) -> str:
    known = [row["lesion_ml"] is not None for row in rows]
    return "ml" if all(known) else "voxels" if not any(known) else "ml (voxels without spacing)"


def _histogram(rows: Sequence[dict]) -> str:
    """Draw how many lesions have which volume, as SVG; a case without a lesion counts as 0."""
    unit = _unit(rows)
    column = "lesion_ml" if unit.startswith("ml") else "lesion_voxels"
    sizes = np.array([row[column] for row in rows if row[column] is not None])
    if not len(sizes) or sizes.max() <= 0:
        return "<p>No lesion was found in any case.</p>"
    step = _round_step(sizes.max() / min(BINS, max(6, math.ceil(math.sqrt(4 * len(sizes))))))
    bins = max(1, math.ceil(sizes.max() / step + 1e-9))
    counts, _ = np.histogram(sizes, bins=bins, range=(0, bins * step))
    width, height, left, bottom = 720, 170, 34, 34
    wide, tall = (width - left - 10) / bins, (height - bottom - 14) / counts.max()
    parts = [f"<line x1={left} x2={width - 10} y1={height - bottom} y2={height - bottom} />"]
    every = math.ceil(bins / 10)
    for k, count in enumerate(counts.tolist()):
        x, y = left + k * wide, height - bottom - count * tall
        low, high = f"{k * step:g}", f"{(k + 1) * step:g}"
        if count:
            parts.append(
                f"<rect x={x + 1:.1f} y={y:.1f} width={max(wide - 2, 1):.1f} rx=2 "
                f"height={count * tall:.1f}><title>{count} of {low} to {high} {unit}</title></rect>"
            )
        if k % every == 0:
            parts.append(
                f"<text x={x:.1f} y={height - bottom + 15} text-anchor=middle>{low}</text>"
            )
    parts.append(f"<text x={left - 6} y=20 text-anchor=end>{counts.max()}</text>")
    parts.append(f"<text x={left - 6} y={height - bottom} text-anchor=end>0</text>")
    middle = (left + width) / 2
    parts.append(f"<text x={middle} y={height - 4} text-anchor=middle>lesion, {unit}</text>")
    return (
        f"<svg viewBox='0 0 {width} {height}' role=img aria-label='Histogram of lesion volumes'>"
        f"{''.join(parts)}</svg>"
    )


def _round_step(least: float) -> float:
    """Round up to 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * 0.999)


def _controls(rows: Sequence[dict]) -> str:
    orders = {"need": ("needs a look", 0), "size": ("largest", 1), "case": ("name", 0)}
    if any(row["expected_dsc"] is not None for row in rows):
        orders["expected_dsc"] = ("lowest expected DSC", 0)
    buttons = "".join(
        f"<button data-key={key} data-down={down} aria-pressed={str(key == 'need').lower()}>{name}"
        "</button>"
        for key, (name, down) in orders.items()
    )
    only = "<label><input type=checkbox id=look> only those that need a look</label>"
    return f"<div class=bar>{buttons}{only}</div>"


def _card(row: dict, key: str, picture: bytes) -> str:
    name = html.escape(row["case"], quote=True)
    poor = " class=poor" * is_poor(row)
    dsc = "" if row["expected_dsc"] is None else f", <b{poor}>DSC {row['expected_dsc']:.2f}</b>"
    size = shown_size(row) if row["lesion_voxels"] else "no lesion found"
    title = html.escape(row["warning"], quote=True)
    return (
        f'<a class="case {_class(row)}" data-row="{key}" href="#{name}" title="{title}">'
        f'<img loading=lazy decoding=async alt="{name}" src="{data_url(picture, "image/jpeg")}">'
        f"<div>{name}<span>{size}{dsc}</span></div></a>"
    )


def _class(row: dict) -> str:
    return "look" if row["warning"] else "rest"


def _table(rows: Sequence[dict], keys: Sequence[str]) -> str:
    columns = {
        "case": "case", "slices": "slices", "size": "lesion", "components": "parts",
        "expected_dsc": "expected DSC", "need": "needs a look because",
    }  # fmt: skip
    head = "".join(
        f"<th data-key={key} aria-sort={'ascending' if key == 'need' else 'none'}>"
        f"<button>{name}</button></th>"
        for key, name in columns.items()
    )
    lines = []
    for row, key in zip(rows, keys, strict=True):
        name, poor = html.escape(row["case"], quote=True), " class=poor" * is_poor(row)
        lines.append(
            f'<tr id="{name}" class={_class(row)} data-row="{key}"><td>{name}'
            f"<td>{shown_count(row['slices'])}<td>{shown_size(row)}<td>{shown_count(row['components'])}"
            f"<td{poor}>{shown_expected(row)}"
            f"<td>{html.escape(row['warning'])}"
        )
    return (
        f"<div class=wide><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
