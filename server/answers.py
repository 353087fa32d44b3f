"""Make the answer to an upload: its numbers, files and pictures."""

import base64
import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brainseg.alignment import Measured
from brainseg.io.files import RUN, write_json, write_table
from brainseg.io.pictures import montage, outline_in_palette, save_gif, save_png, to_grey
from brainseg.io.predictions import map_files, mark_of, seg_file, write_case
from brainseg.io.scans import Scan
from brainseg.io.slices import Case
from brainseg.metrics import score
from brainseg.patients import patient_of, patients_of_card
from brainseg.reports.growth import growth_section
from brainseg.reports.volumes import volume_row
from brainseg.segmenter import Segmentation, Segmenter
from brainseg.visits import follow, in_order_of_time

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
    """The result of an upload."""

    summary: dict  # numbers and text, as in summary.json
    files: dict[str, bytes]  # of the archive, by name: see `make_answer` and `answer_growth`
    downloads: dict[str, list[str]]  # of the page, by name: the files in each
    more: dict  # that the page shows: the files of its viewer, or the lines of its table

    def shown(self) -> str:
        """Return all that the page shows as JSON, with the files in base64."""
        downloads = {}
        for name, members in self.downloads.items():
            downloads[name] = self.files[members[0]]
            if len(members) > 1:
                downloads[name] = zipped({member: self.files[member] for member in members})
        shown = {"summary": self.summary, "downloads": downloads} | self.more
        return json.dumps(shown, default=lambda content: base64.b64encode(content).decode())


def zipped(files: Mapping[str, bytes]) -> bytes:
    """Pack files, by name, in a zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def files_in(folder: Path) -> dict[str, bytes]:
    """Read the files in a folder, and in those in it, by their names."""
    paths = sorted(folder.rglob("*"))
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def make_answer(
    loaded: Loaded, segmentation: Segmentation, out: Path, segmenter: Segmenter
) -> Answer:
    """Make the numbers, files and pictures of a case in `out`.

    The files are masks and probabilities, rounded to 0.001, in the source's geometry; montage.png,
    <case>.gif, summary.json and .csv; and <case>_seg.dcm if there is a seg.dcm beside `out`.
    """
    case, volume, truth, mask = loaded.case, loaded.volume, loaded.truth, segmentation.mask
    probability = np.round(segmentation.probabilities, 3)  # whole zeros make the file small
    maps = {"probability": probability}
    write_case(out, case, volume, mask, truth, maps, segmenter.run, with_pictures=False)
    segmentation_file = out.parent / "seg.dcm"  # made by `Reader.write_seg`, if it is possible
    if segmentation_file.exists():
        segmentation_file.rename(out / seg_file(case))
    grey = to_grey(volume)
    save_png(out / "montage.png", montage(outline_in_palette(grey, mask, truth)))
    save_gif(out / f"{case.name}.gif", outline_in_palette(grey, mask, truth, side=256))
    summary = summary_of(loaded, segmentation, segmenter)
    write_json(out / "summary.json", summary)
    row = summary | (summary["scores"] or {}) | {"notes": "; ".join(summary["notes"])}
    del row["scores"]
    write_table(out / "summary.csv", [row])
    files, downloads = files_in(out), {}
    for kind, kinds in (("mask", "masks"), ("probability", "probabilities")):
        names = [path.name for path in map_files(case, kind)]
        download = names[0]
        if len(names) > 1:
            download = f"{case.name}_{kinds}.zip"
        downloads[download] = names
    seg = seg_file(case).name
    if seg in files:
        downloads[seg] = [seg]
    for name in ("summary.json", "summary.csv", "montage.png"):
        downloads[f"{case.name}_{name}"] = [name]
    downloads[f"{case.name}.gif"] = [f"{case.name}.gif"]
    viewer = viewer_files(case, volume, grey, segmentation, truth)
    return Answer(summary, files, downloads, {"viewer": viewer})


def summary_of(loaded: Loaded, segmentation: Segmentation, segmenter: Segmenter) -> dict:
    """Return the row of volumes.csv of a case, its scores if there is a truth, and its notes.

    If the network was trained on its patient, the scores do not count.
    """
    case, truth, mask = loaded.case, loaded.truth, segmentation.mask
    summary = row_of(loaded, segmentation, segmenter.run)
    notes = loaded.notes + list(segmentation.notes)
    further = summary["notes"].removeprefix("; ".join(notes)).removeprefix("; ")
    if further:
        notes.append(further)
    summary["warning"] = in_page_words(summary["warning"])
    summary |= {
        "shape": list(mask.shape),
        "spacing": case.spacing and list(case.spacing),
        "notes": list(map(in_page_words, notes)),
        "no_expected_dsc": in_page_words(segmentation.no_expected_dsc),
        "trained_on": patient_of(case) in patients_of_card(segmenter.card, "train", cases=[case]),
        "scores": None,
    }
    if truth is not None:
        summary["scores"] = {}
        for name, value in score(mask, truth, case.spacing).items():
            summary["scores"][name] = None if math.isnan(value) else round(value, 4)
    return summary


def row_of(loaded: Loaded, segmentation: Segmentation, run: str) -> dict:
    """Return the row of volumes.csv of a case."""
    case, mask, expected = loaded.case, segmentation.mask, segmentation.expected
    warnings = list(case.doubts) + segmentation.warnings
    replaced = loaded.replaced + list(segmentation.replaced)
    notes = loaded.notes + list(segmentation.notes)
    return volume_row(case, loaded.volume, mask, expected, warnings, run, replaced, notes)


def measured(loaded: Loaded, segmentation: Segmentation, run: str) -> Measured:
    """Keep what the growth needs of a scan."""
    flair = loaded.volume[..., loaded.volume.shape[3] // 2].copy()
    return Measured(loaded.case, segmentation.mask, row_of(loaded, segmentation, run), flair)


def answer_growth(
    scans: Sequence[Measured], out: Path, segmenter: Segmenter, no_expected_dsc: str
) -> Answer:
    """Measure the growth over one patient's scans; `no_expected_dsc` says why it has no intervals.

    The files, made in `out`, are the masks, growth.csv, growth.png and summary.json. Raises
    ValueError if nothing tells the order of the scans.
    """
    name = patient_of(scans[0].case)
    ordered, notes = in_order_of_time({name: [scan.case for scan in scans]}, {})
    if not ordered:
        raise ValueError(
            "nothing tells the order of these scans; name each file, or the folder of each DICOM "
            f"study, after its patient and date, such as p1_2014-03-02 ({'; '.join(notes)})"
        )
    by_case = {scan.case.name: scan for scan in scans}
    in_order = [(by_case[case.name], day) for case, day in ordered[name]]
    patient, said = follow(in_order, (segmenter.expected_dsc_fit or {}).get("volume_errors"))
    if no_expected_dsc:
        said.append(f"no expected DSC, and so no intervals: {no_expected_dsc}")
    section = growth_section(patient)
    names = []
    for scan, _ in in_order:
        assert isinstance(scan.case, Scan)
        (file,) = map_files(scan.case, "mask")
        scan.case.write_map(out / file, scan.mask, mark_of(segmenter.run))
        names.append(file.name)
    rows = [row | {RUN: segmenter.run} for row in patient.rows]
    write_table(out / "growth.csv", rows)
    (out / "growth.png").write_bytes(section["picture"])
    for row in rows:
        if row["date"]:
            row["date"] = str(row["date"])
    notes = list(map(in_page_words, notes + said))
    summary = {"case": name, "rate": section["rate"], "notes": notes, "growth": rows}
    write_json(out / "summary.json", summary)
    names += ["growth.csv", "growth.png", "summary.json"]
    downloads = {name: [name] for name in names}
    return Answer(summary, files_in(out), downloads, {"lines": section["lines"]})
