"""Segment cases, from their files to their masks: `segment_case` one, `segment_all` several."""

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .devices import in_order
from .io.dicom_seg import series_of, write_dicom_seg
from .io.files import RUN, check_ours, sentence, with_archives
from .io.layouts import Source
from .io.nifti import is_edited
from .io.pictures import thumbnail
from .io.predictions import (
    earlier_files,
    map_files,
    outputs_of,
    picture_files,
    read_mask_of_run,
    seg_file,
    write_case,
)
from .io.scans import registered
from .io.slices import Case, errors_name
from .patients import patient_of
from .preprocess import Frame
from .reports.scores import table_row
from .reports.volumes import UNLIKE, scan_hash, unread_row, volume_row
from .segmenter import Segmentation, Segmenter


@dataclass(frozen=True)
class Outputs:
    """The folder to write to, and what to write there beside masks and pictures."""

    folder: Path
    figure: Path  # of sorted DSCs
    page: Path | None  # with a picture of each case
    run: str  # names weights and settings (`Segmenter.run`)
    trained_on: set[str]  # patients
    probabilities: bool  # maps, too
    pictures: bool  # outlined slices, a GIF and the figure
    algorithm: tuple[str, str] | None  # its name and version in DICOM; None: no Segmentation
    earlier: dict[str, dict] = field(default_factory=dict)  # rows by case; their masks are kept


@dataclass(frozen=True)
class Loaded:
    """A case read from its files."""

    case: Case
    volume: np.ndarray  # (S, H, W, C)
    truth: np.ndarray | None  # (S, H, W) bool


@dataclass(frozen=True)
class Result:
    """The result of a case."""

    state: str  # segmented, kept, unread, or edited, and so left with its rows
    volumes: dict  # its row of volumes.csv
    scores: dict | None = None  # its row of metrics.csv, if it has a truth
    thumbnail: bytes | None = None  # a JPEG for the report
    spacing: tuple[float, float, float] | None = None  # mm: slices, rows, columns
    error: str = ""  # why it could not be read, or what could not be written
    files: tuple[Path, ...] = ()  # written, in the folder of the outputs


class EditedMask(ValueError):
    """A mask was edited since it was written."""


def segment_all(
    sources: Sequence[Source],
    segmenter: Segmenter,
    outputs: Outputs,
    workers: int | None,
    register: bool = False,
) -> Iterator[Result]:
    """Segment cases and write their masks and pictures; yield the result of each, in order.

    Each thread takes one case after the other all the way. On a CPU, each computes on one core, and
    none waits for another. A GPU takes one case at a time; who comes early waits for his turn (.),
    while the others read ahead and write behind:

        thread 1   read prepare NETWORK write read prepare ....... NETWORK write
        thread 2   read prepare ....... NETWORK write read prepare ....... NETWORK
    """
    turn = nullcontext() if segmenter.on_cpu else Lock()
    segment = functools.partial(
        segment_case, segmenter=segmenter, outputs=outputs, register=register, turn=turn
    )
    if len(sources) == 1:  # the network may use every core
        return map(segment, sources)
    return in_order(segment, sources, workers)


def segment_case(
    source: Source,
    segmenter: Segmenter,
    outputs: Outputs,
    register: bool,
    turn: AbstractContextManager,
) -> Result:
    """Segment one case, from its files to its mask, its pictures and its rows of the tables.

    If it cannot be read, or does not fit into memory, the result says so. If its mask is kept from
    an earlier run, the network does not see it. Raises OSError if a result cannot be written, or
    the device is too small for one slice: that is not the fault of the case.
    """
    try:
        with errors_name(source.folder):
            loaded = read(source, outputs, register)
            mask = earlier_mask(loaded, outputs)
            if mask is not None:
                return keep(loaded, mask, outputs)
            images, frame = prepare(loaded, segmenter)
            with turn:
                probabilities = predict(segmenter, images)
            del images  # of some size, and drawing takes a while
            segmentation = segmenter.segmentation_of(probabilities, frame, loaded.case.spacing)
            del probabilities
            return write(loaded, segmentation, outputs)
    except EditedMask as error:
        return Result("edited", unread_row(source, error), error=sentence(error))
    except ValueError as error:
        return Result("unread", unread_row(source, error), error=sentence(error))


def read(source: Source, outputs: Outputs, register: bool) -> Loaded:
    """Read a case; raises ValueError, naming the file, if that is impossible."""
    try:
        case = source.open()
        check_not_overwritten(case, outputs.folder)
        if register:
            case = registered(case)
        for note in case.notes:
            say(f"{case.name}: {note}")
        if not case.masks:
            return Loaded(case, case.read(), None)
        volume, truth = case.read_pair()
        return Loaded(case, volume, truth)
    except OSError as error:
        raise ValueError(sentence(error)) from error


def check_not_overwritten(case: Case, folder: Path) -> None:
    """Raise ValueError if a file of the case or of somebody else would be replaced or removed.

    It is an EditedMask if it is ours, but was edited.
    """
    sources = {path.resolve() for path in case.files}
    for file in outputs_of(case):
        path = folder / file
        if path.resolve() in sources:
            raise ValueError(f"{path}: is a source; name another folder with --predictions")
        check_ours(path)
    for path in earlier_files(folder, case):
        if is_edited(path):
            raise EditedMask(
                f"{path}: was edited since it was written; move it elsewhere, so that it is not "
                "replaced, nor taken for a mask of the network"
            )


def earlier_mask(loaded: Loaded, outputs: Outputs) -> np.ndarray | None:
    """Read the mask that an earlier run made of the same scan in the same way, or return None.

    Also None if a map, picture or Segmentation that is wanted beside it is missing.
    """
    case, volume = loaded.case, loaded.volume
    row = outputs.earlier.get(case.name)
    if row is None or row[RUN] != outputs.run:
        return None
    if row["scan_hash"] != scan_hash(volume, case.given_spacing):
        return None
    others = map_files(case, "probability") if outputs.probabilities else []
    if outputs.pictures:
        others += picture_files(case)
    if outputs.algorithm and series_of(case):
        others.append(seg_file(case))
    mask = read_mask_of_run(outputs.folder, case, outputs.run, others)
    if mask is None or mask.shape != volume.shape[:3]:
        return None
    return mask


def keep(loaded: Loaded, mask: np.ndarray, outputs: Outputs) -> Result:
    """Return the result of a case whose mask is kept, with its earlier row if that describes it."""
    case = loaded.case
    run, notes = outputs.run, notes_of(case, outputs)
    row = volume_row(case, loaded.volume, mask, None, case.doubts, run, case.replaced, notes)
    earlier = outputs.earlier[case.name]  # with values from the probabilities
    if earlier["lesion_voxels"] == row["lesion_voxels"]:
        warning = earlier["warning"].partition(UNLIKE)[0].removesuffix("; ")
        row = earlier | {"patient": row["patient"], "warning": warning}
    return result_of("kept", loaded, mask, row, outputs)


def prepare(loaded: Loaded, segmenter: Segmenter) -> tuple[Tensor, Frame]:
    """Preprocess a case and report its oddities; raises ValueError, naming its folder."""
    folder = loaded.case.folder
    try:
        images, frame = segmenter.preprocess(loaded.volume, loaded.case.aspect)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    for note in frame.notes:
        say(f"{folder}: {note}")
    if frame.blank:
        say(f"{folder}: every voxel is 0, and so is its mask")
    return images, frame


def predict(segmenter: Segmenter, images: Tensor) -> Tensor:
    """Run the network, in smaller batches if memory runs out; OSError if no slice fits."""
    while True:
        try:
            probabilities = segmenter.probabilities(images)
            # Threads may use CUDA at once, but not every other accelerator.
            return probabilities if probabilities.is_cuda else probabilities.cpu()
        except torch.OutOfMemoryError as error:
            if segmenter.batch_size == 1:
                fault = "not even one slice fits into it; use --device cpu"
                raise OSError(f"{segmenter.device}: {fault}") from error
        size = segmenter.batch_size
        segmenter.batch_size = size // 2
        fault = f"{segmenter.device} is out of memory at --batch-size {size}"
        say(f"{fault}; continuing with {segmenter.batch_size}")


def write(loaded: Loaded, segmentation: Segmentation, outputs: Outputs) -> Result:
    """Write the mask of a case and what `outputs` asks for; return its result."""
    case, mask, error = loaded.case, segmentation.mask, ""
    maps = {}
    if outputs.probabilities:
        maps["probability"] = segmentation.probabilities
        if segmentation.deviation is not None:
            maps["disagreement"] = segmentation.deviation
    files = write_case(
        outputs.folder, case, loaded.volume, mask, loaded.truth, maps, outputs.run, outputs.pictures
    )
    if outputs.algorithm and series_of(case):
        files.append(seg_file(case))
        error = write_seg(outputs.folder / seg_file(case), case, mask, outputs.algorithm)
    warnings = list(case.doubts) + segmentation.warnings
    replaced = list(case.replaced) + list(segmentation.replaced)
    notes = notes_of(case, outputs) + list(segmentation.notes)
    expected = segmentation.expected
    row = volume_row(case, loaded.volume, mask, expected, warnings, outputs.run, replaced, notes)
    return result_of("segmented", loaded, mask, row, outputs, error, files)


def notes_of(case: Case, outputs: Outputs) -> list[str]:
    """Say how a case was read, and whether the weights were trained on its patient."""
    notes = [note for note in case.notes if note not in case.doubts]
    if patient_of(case) in outputs.trained_on:
        notes.append("the weights were trained on this patient: new scans have worse masks")
    return notes


def write_seg(path: Path, case: Case, mask: np.ndarray, algorithm: tuple[str, str]) -> str:
    """Write a DICOM Segmentation; return why it is impossible, or an empty string."""
    name, version = algorithm
    try:
        whole_bytes = write_dicom_seg(path, case, mask, name, version)
    except ValueError as error:
        return str(error)
    if not whole_bytes:
        say(
            f"{path}: OHIF 3.13 shows only part of it, because its rows x columns are not a "
            "multiple of 8; use another viewer"
        )
    return ""


def result_of(
    state: str,
    loaded: Loaded,
    mask: np.ndarray,
    row: dict,
    outputs: Outputs,
    error: str = "",
    files: Sequence[Path] = (),
) -> Result:
    """Score a mask if there is a true one, and draw it if the run asks for that."""
    scores = picture = None
    if loaded.truth is not None:
        patient = patient_of(loaded.case)
        scores = table_row(loaded.case, mask, loaded.truth)
        scores |= {"patient": patient, "trained_on": int(patient in outputs.trained_on)}
        scores[RUN] = outputs.run
    if outputs.page:
        picture = thumbnail(loaded.volume, mask, loaded.truth)
    return Result(state, row, scores, picture, loaded.case.spacing, error, tuple(files))


def say(text: str) -> None:
    """Print a line on stderr, above the progress bar."""
    tqdm.write(with_archives(text), file=sys.stderr)
