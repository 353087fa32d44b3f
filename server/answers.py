"""Make the answer to an upload: its numbers, files and pictures."""

import base64
import io
import json
import math
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brainseg.alignment import Measured
from brainseg.io.files import write_table
from brainseg.io.pictures import montage, outline, save_gif, save_png, to_grey
from brainseg.io.predictions import map_files, write_case
from brainseg.io.slices import Case
from brainseg.metrics import score
from brainseg.patients import patient_of
from brainseg.reports.volumes import volume_row
from brainseg.segmenter import Segmentation

from .viewer import viewer_files
from .wording import in_page_words


@dataclass(frozen=True)
class Loaded:
    """A case in memory; its files last as long as its job."""

    case: Case
    notes: list[str]
    replaced: list[str]  # sequences that FLAIR stands in for, by the notes
    volume: np.ndarray  # (S, H, W, C)
    truth: np.ndarray | None  # (S, H, W) bool


@dataclass
class Answer:
    """The result of one upload."""

    summary: dict  # numbers and text
    files: dict[str, bytes]  # by name: see make_answer
    maps: dict[str, list[str]]  # names of the files of mask and probability
    viewer: dict  # what the page's viewer shows: see viewer_files

    def shown(self) -> str:
        """Return all that the page shows as JSON, with the files in base64."""
        case = self.summary["case"]
        downloads = {}
        for kind, name in (("mask", "masks"), ("probability", "probabilities")):
            files = {file: self.files[file] for file in self.maps[kind]}
            if len(files) > 1:
                files = {f"{case}_{name}.zip": zipped(files)}
            downloads |= files
        segmentation = f"{case}_seg.dcm"
        if segmentation in self.files:
            downloads[segmentation] = self.files[segmentation]
        for name in ("summary.json", "summary.csv", "montage.png"):
            downloads[f"{case}_{name}"] = self.files[name]
        downloads[f"{case}.gif"] = self.files[f"{case}.gif"]
        shown = {"summary": self.summary, "viewer": self.viewer, "downloads": downloads}
        return json.dumps(shown, default=in_base64)


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def zipped(files: Mapping[str, bytes]) -> bytes:
    """Pack files, by name, in a zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def make_answer(
    loaded: Loaded, segmentation: Segmentation, out: Path, run: str, trained_on: Collection[str]
) -> Answer:
    """Make the numbers, files and pictures of a case; `run` names weights and settings.

    The files are masks and probabilities, rounded to 0.001, in the source's geometry; montage.png,
    <case>.gif, summary.json and .csv; and <case>_seg.dcm if there is a seg.dcm beside `out`. Scores
    of `trained_on` patients do not count.
    """
    case, volume, truth, mask = loaded.case, loaded.volume, loaded.truth, segmentation.mask
    probability = np.round(segmentation.probabilities, 3)  # whole zeros make the file small
    out.mkdir()
    probabilities = {"probability": probability}
    write_case(out, case, volume, mask, truth, probabilities, run, with_pictures=False)
    maps, files = {}, {}
    for kind in ("mask", "probability"):
        maps[kind] = []
        for path in map_files(case, kind):
            maps[kind].append(path.name)
            files[path.name] = (out / path).read_bytes()
    grey = to_grey(volume)
    save_png(out / "montage.png", montage(outline(grey, mask, truth)))
    save_gif(out / f"{case.name}.gif", outline(grey, mask, truth, side=256))
    for name in ("montage.png", f"{case.name}.gif"):
        files[name] = (out / name).read_bytes()
    if (out.parent / "seg.dcm").exists():
        files[f"{case.name}_seg.dcm"] = (out.parent / "seg.dcm").read_bytes()
    summary = summary_of(loaded, segmentation, run, trained_on)
    files["summary.json"] = f"{json.dumps(summary, indent=2)}\n".encode()
    row = dict(summary)
    row |= row.pop("scores") or {}
    row["notes"] = "; ".join(summary["notes"])
    write_table(out / "summary.csv", [row])
    files["summary.csv"] = (out / "summary.csv").read_bytes()
    return Answer(summary, files, maps, viewer_files(case, volume, segmentation, truth))


def summary_of(
    loaded: Loaded, segmentation: Segmentation, run: str, trained_on: Collection[str]
) -> dict:
    """Return the row of volumes.csv of a case, its scores if there is a truth, and its notes."""
    case, truth, mask = loaded.case, loaded.truth, segmentation.mask
    summary = row_of(loaded, segmentation, run)
    notes = [*loaded.notes, *segmentation.notes]
    further = summary["notes"].removeprefix("; ".join(notes)).removeprefix("; ")
    if further:
        notes.append(further)
    summary["warning"] = in_page_words(summary["warning"])
    summary |= {
        "shape": list(mask.shape),
        "spacing": list(case.spacing) if case.spacing else None,
        "notes": list(map(in_page_words, notes)),
        "no_expected_dsc": in_page_words(segmentation.no_expected_dsc),
        "trained_on": patient_of(case) in trained_on,
        "scores": None,
    }
    if truth is not None:
        summary["scores"] = {}
        for name, value in score(mask, truth, case.spacing).items():
            summary["scores"][name] = None if math.isnan(value) else round(value, 4)
    return summary


def row_of(loaded: Loaded, segmentation: Segmentation, run: str) -> dict:
    """Return the row of volumes.csv of a case."""
    case = loaded.case
    return volume_row(
        case,
        loaded.volume,
        segmentation.mask,
        segmentation.expected,
        [*case.doubts, *segmentation.warnings],
        run,
        [*loaded.replaced, *segmentation.replaced],
        [*loaded.notes, *segmentation.notes],
    )


def measured(loaded: Loaded, segmentation: Segmentation, run: str) -> Measured:
    """Keep what the growth needs of a scan."""
    flair = loaded.volume[..., loaded.volume.shape[3] // 2].copy()
    return Measured(loaded.case, segmentation.mask, row_of(loaded, segmentation, run), flair)
