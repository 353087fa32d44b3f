"""Process cases from their files to masks, tables and pictures; threads read and write."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .devices import in_groups, in_order
from .io.dicom_seg import series_of, write_dicom_seg
from .io.files import RUN, check_ours, sentence
from .io.layouts import Source
from .io.pictures import thumbnail
from .io.predictions import (
    find_masks,
    map_files,
    outputs_of,
    seg_file,
    write_case,
)
from .io.scans import registered
from .io.slices import Case, errors_name
from .preprocess import Frame
from .reports.scores import table_row
from .reports.volumes import scan_hash, unread_row, volume_row
from .segmenter import Segmenter
from .splits import patient_of

GROUP = 4  # batches; a GPU is given cases of this many slices at once


@dataclass
class Work:
    """A case between its files and its mask."""

    case: Case
    volume: np.ndarray  # (S, H, W, C)
    truth: np.ndarray | None  # (S, H, W) bool
    mask: np.ndarray | None = None  # (S, H, W) bool, if kept from an earlier run
    images: Tensor | None = None  # the network's input
    frame: Frame | None = None
    probabilities: Tensor | None = None  # the network's output (S, K, N, N)


@dataclass
class Result:
    """The result of a case."""

    state: str  # segmented, kept or unread
    volumes: dict  # its row of volumes.csv
    scores: dict | None = None  # its row of metrics.csv, if it has a truth
    thumbnail: bytes | None = None  # a JPEG for the report
    error: str = ""  # why it could not be read, or what could not be written


@dataclass(frozen=True)
class Outputs:
    """The files to write for each case beside its mask and pictures, and the masks to keep."""

    folder: Path
    keep: bool  # masks of an earlier run with the same settings
    earlier: dict[str, dict]  # its rows of volumes.csv, by case
    trained_on: set[str]  # patients
    probabilities: bool
    thumbnails: bool
    algorithm: tuple[str, str] | None  # its name and version in DICOM; None: no Segmentation

    def extra_files(self, case: Case) -> list[Path]:
        """List the files written for a case beside its masks, relative to `folder`."""
        files = map_files(case, "probability") if self.probabilities else []
        if self.algorithm and series_of(case):
            files.append(seg_file(case))
        return files


def segment_all(
    sources: Sequence[Source | Case],
    segmenter: Segmenter,
    outputs: Outputs,
    workers: int | None,
    register: bool = False,
) -> Iterator[Result]:
    """Segment cases and write their masks and pictures; yield the result of each, in order.

    Threads read ahead and write behind while the network runs on batches that continue from one
    case to the next; or, on a CPU, each thread processes whole cases.
    """

    loaded = functools.partial(load, segmenter=segmenter, outputs=outputs, register=register)
    finished = functools.partial(finish, segmenter=segmenter, outputs=outputs)

    def segmented(group: list[Work | Result]) -> list[Work | Result]:
        items = [item for item in group if slices_of(item)]
        for item, part in zip(items, probabilities_in_memory(segmenter, items), strict=True):
            # Threads may use CUDA at once, but not every other accelerator.
            item.images, item.probabilities = None, part if part.is_cuda else part.cpu()
        return group

    def segment_alone(source: Source | Case) -> Result:
        work = loaded(source)
        if isinstance(work, Work):
            try:
                with errors_name(work.case.folder):  # above all, memory that runs out
                    segmented([work])
            except ValueError as error:
                work = Result("unread", unread_row(work.case, error), error=sentence(error))
        return finished(work)

    if segmenter.on_cpu and len(sources) > 1:
        # Several cases at once with a core each: none waits for a thread that another one holds.
        return in_order(segment_alone, sources, workers)
    ahead = in_order(loaded, sources, workers)
    groups = in_groups(ahead, lambda item: slices_of(item) or 1, GROUP * segmenter.batch_size)
    return in_order(finished, chain.from_iterable(map(segmented, groups)), workers)


def slices_of(item: Work | Result) -> int:
    """Count the slices that the network has to process."""
    return len(item.images) if isinstance(item, Work) and item.mask is None else 0


def probabilities_in_memory(segmenter: Segmenter, items: list[Work]) -> Sequence[Tensor]:
    """Compute each case's probabilities; if memory runs out, in smaller batches from then on."""
    lengths = list(map(slices_of, items))
    while items:
        try:
            place = items[0].images.device
            images = torch.cat([item.images.to(place) for item in items])
            return segmenter.probabilities(images, lengths=lengths).split(lengths)
        except torch.OutOfMemoryError as error:
            if segmenter.batch_size == 1:
                raise ValueError(
                    f"{segmenter.device}: not even one slice fits into it; use --device cpu"
                ) from error
        size = segmenter.batch_size
        segmenter.batch_size = size // 2
        say(
            f"{segmenter.device} is out of memory at --batch-size {size}; continuing with "
            f"{segmenter.batch_size}"
        )
        for item in items:
            item.images = item.images.cpu()
    return []


def say(text: str) -> None:
    """Print a line on stderr, above the progress bar."""
    tqdm.write(text, file=sys.stderr)


def load(
    source: Source | Case, segmenter: Segmenter, outputs: Outputs, register: bool
) -> Work | Result:
    """Read a case and prepare it for the network; if that fails, return a result that says why."""
    try:
        with errors_name(source.folder):
            work = read(source, segmenter, outputs, register)
            if work.mask is None:
                prepare(work, segmenter)
        return work
    except (ValueError, OSError) as error:
        return Result("unread", unread_row(source, error), error=sentence(error))


def read(source: Source | Case, segmenter: Segmenter, outputs: Outputs, register: bool) -> Work:
    """Read a case, and its mask if it is kept; raises OSError or ValueError, naming the file."""
    case = source.open() if isinstance(source, Source) else source
    check_not_overwritten(case, outputs)
    if register:
        case = registered(case)
    for note in case.notes:
        say(f"{case.name}: {note}")
    if case.masks:
        volume, truth = case.read_pair()
    else:
        volume, truth = case.read(), None
    work = Work(case, volume, truth)
    earlier = outputs.earlier.get(case.name, {})
    same_scan = earlier.get("scan_hash") == scan_hash(volume)
    if outputs.keep and same_scan and earlier.get(RUN) == segmenter.run:
        mask = find_masks(outputs.folder, case, segmenter.run, outputs.extra_files(case))
        if mask is not None and mask.shape == volume.shape[:3]:
            work.mask = mask
    return work


def check_not_overwritten(case: Case, outputs: Outputs) -> None:
    """Raise ValueError if a file of the case or of somebody else would be replaced or removed."""
    sources = {path.resolve() for path in case.files}
    for file in outputs_of(case):
        path = outputs.folder / file
        if path.resolve() in sources:
            raise ValueError(f"{path}: is a source; name another folder with --predictions")
        check_ours(path)


def prepare(work: Work, segmenter: Segmenter) -> None:
    """Preprocess a case and report its oddities; raises ValueError, naming its folder."""
    folder = work.case.folder
    try:
        work.images, work.frame = segmenter.preprocess(work.volume, work.case.aspect)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    for note in work.frame.notes:
        say(f"{folder}: {note}")
    if work.frame.blank:
        say(f"{folder}: every voxel is 0, and so is its mask")


def finish(work: Work | Result, segmenter: Segmenter, outputs: Outputs) -> Result:
    """Make the mask of a case unless it was kept or not read, and write what `outputs` asks for."""
    if isinstance(work, Result):
        return work
    try:
        with errors_name(work.case.folder):
            return write(work, segmenter, outputs)
    except ValueError as error:
        return Result("unread", unread_row(work.case, error), error=sentence(error))


def write(work: Work, segmenter: Segmenter, outputs: Outputs) -> Result:
    """Make the mask of a case unless it was kept, and write what `outputs` asks for."""
    case, volume, mask = work.case, work.volume, work.mask
    kept = mask is not None
    expected, error = None, ""
    warnings, replaced = list(case.notes), list(case.replaced)
    if not kept:
        found = segmenter.assess(work.probabilities, work.frame)
        mask, expected = found.mask, found.expected
        warnings += found.warnings
        replaced += found.replaced
        maps = {}
        if outputs.probabilities:
            maps["probability"] = found.probabilities
            if found.deviation is not None:
                maps["disagreement"] = found.deviation
        work.probabilities = None
        write_case(outputs.folder, case, volume, mask, work.truth, maps, segmenter.run)
        if outputs.algorithm and series_of(case):
            error = write_seg(outputs.folder / seg_file(case), case, mask, outputs.algorithm)
    row = volume_row(case, volume, mask, expected, warnings, segmenter.run, replaced)
    earlier = outputs.earlier.get(case.name)
    if kept and earlier and earlier["lesion_voxels"] == row["lesion_voxels"]:
        row = earlier | {"patient": row["patient"]}  # with values from the probabilities
    result = Result("kept" if kept else "segmented", row, error=error)
    if work.truth is not None:
        patient = patient_of(case)
        result.scores = table_row(case, mask, work.truth) | {
            "patient": patient,
            "trained_on": int(patient in outputs.trained_on),
            RUN: segmenter.run,
        }
    if outputs.thumbnails:
        result.thumbnail = thumbnail(volume, mask)
    return result


def write_seg(path: Path, case: Case, mask: np.ndarray, algorithm: tuple[str, str]) -> str:
    """Write a DICOM Segmentation; return why it is impossible, or an empty string."""
    try:
        whole = write_dicom_seg(path, case, mask, *algorithm)
    except ValueError as error:
        return str(error)
    if not whole:
        say(
            f"{path}: OHIF 3.13 shows only part of it, because its rows x columns are not a "
            "multiple of 8; use another viewer"
        )
    return ""
