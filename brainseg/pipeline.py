"""Cases on their way from their files to masks, tables and pictures; threads read and write."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .devices import in_groups, in_order
from .distributed import is_main_process
from .evaluation.volumes import volume_row
from .io.dicom_seg import series_of, write_dicom_seg
from .io.layouts import Source
from .io.pictures import thumbnail
from .io.predictions import find_masks, map_files, seg_file, table_row, write_case
from .io.scans import Scan
from .io.slices import Case
from .preprocess import Frame
from .segmenter import Segmenter

GROUP = 4  # batches; a GPU is handed cases of so many slices at once


@dataclass
class Result:
    """A case on its way from its files to its masks and scores."""

    case: Case
    volume: np.ndarray  # (S, H, W, C)
    truth: np.ndarray | None  # (S, H, W) bool
    fresh: bool  # to be segmented now, not found as an earlier run left it
    images: Tensor | None = None  # the network's input
    frame: Frame | None = None
    probabilities: Tensor | None = None  # the network's output (S, 1, N, N)
    prediction: np.ndarray | None = None  # (S, H, W) bool
    volumes: dict | None = None  # its row of volumes.csv
    scores: dict | None = None  # its row of metrics.csv, where there is a truth
    thumbnail: bytes | None = None  # a JPEG for the report
    error: Exception | None = None  # what could not be written of it


@dataclass(frozen=True)
class Outputs:
    """What to write of each case beside its mask and pictures, and what to keep."""

    folder: Path
    since: float | None  # keep masks written since then, in seconds of the epoch; None: keep none
    earlier: dict[str, dict]  # rows of volumes.csv of an earlier run, by case
    probabilities: bool
    thumbnails: bool
    algorithm: tuple[str, str] | None  # its name and version in DICOM; None: no Segmentation

    def extra_files(self, case: Case) -> list[Path]:
        """List what is written of a case beside its masks, relative to `folder`."""
        files = map_files(case, "probability") if self.probabilities else []
        return files + [seg_file(case)] * bool(self.algorithm and series_of(case))


def segment_all(
    sources: Sequence[Source | Case],
    segmenter: Segmenter,
    outputs: Outputs,
    workers: int | None,
    register: bool = False,
) -> Iterator[Result | Exception]:
    """For each case its result, written to disk, or what is wrong with its files.

    Threads read ahead and write behind while the network runs on batches that go on from one case
    to the next; or, on a processor, each thread does all of a case.
    """

    def segmented(group: list[Result | Exception]) -> list[Result | Exception]:
        results = [item for item in group if slices_of(item)]
        for item, part in zip(results, probabilities_in_memory(segmenter, results), strict=True):
            # Threads may use CUDA at once, but not every other accelerator.
            item.images, item.probabilities = None, part if part.is_cuda else part.cpu()
        return group

    def finished(item: Result | Exception) -> Result | Exception:
        if isinstance(item, Result):
            finish(item, segmenter, outputs)
        return item

    def loaded(source: Source | Case) -> Result | Exception:
        return load(source, segmenter, outputs, register)

    bar = functools.partial(
        tqdm,
        desc="segmenting",
        total=len(sources),
        unit="case",
        disable=None if is_main_process() else True,
    )
    if segmenter.on_cpu and len(sources) > 1:
        # Several cases at once with a core each: nothing waits for a thread that another one holds.
        def whole(source: Source | Case) -> Result | Exception:
            return finished(*segmented([loaded(source)]))

        return iter(bar(in_order(whole, sources, workers)))
    ahead = bar(in_order(loaded, sources, workers))
    groups = in_groups(ahead, lambda item: slices_of(item) or 1, GROUP * segmenter.batch_size)
    return in_order(finished, chain.from_iterable(map(segmented, groups)), workers)


def slices_of(item: Result | Exception) -> int:
    """How many slices the network has to do."""
    return len(item.images) if isinstance(item, Result) and item.fresh else 0


def probabilities_in_memory(segmenter: Segmenter, items: list[Result]) -> Sequence[Tensor]:
    """Those of each case; where the memory does not do, by smaller batches from now on."""
    lengths = list(map(slices_of, items))
    while items:
        try:
            place = items[0].images.device
            images = torch.cat([item.images.to(place) for item in items])
            return segmenter.probabilities(images, lengths=lengths).split(lengths)
        except torch.OutOfMemoryError as error:
            if segmenter.batch_size == 1:
                raise ValueError(f"{segmenter.device}: not even one slice fits in it") from error
        size = segmenter.batch_size
        segmenter.batch_size = size // 2
        tqdm.write(
            f"{segmenter.device} is out of memory at --batch-size {size}; going on with "
            f"{segmenter.batch_size}",
            file=sys.stderr,
        )
        for item in items:
            item.images = item.images.cpu()
    return []


def load(
    source: Source | Case, segmenter: Segmenter, outputs: Outputs, register: bool
) -> Result | Exception:
    """Read a case and prepare it for the network; what is wrong is handed on, not raised."""
    try:
        case = source.open() if isinstance(source, Source) else source
        if register and isinstance(case, Scan):
            case = replace(case, register=True)
        for note in case.notes:
            tqdm.write(note, file=sys.stderr)
        volume, truth = case.read_pair() if case.masks else (case.read(), None)
        earlier = None
        if outputs.since is not None:
            others = outputs.extra_files(case)
            earlier = find_masks(outputs.folder, case, outputs.since, others)
        if earlier is not None and earlier.shape == volume.shape[:3]:
            return Result(case, volume, truth, fresh=False, prediction=earlier)
    except (ValueError, OSError) as error:
        return error
    except (RuntimeError, MemoryError) as error:  # of SimpleITK, which names no file
        reason = str(error).strip().splitlines()[-1:]
        fault = f"cannot be read ({' '.join(reason)})"
        return ValueError(f"{source.folder}: {fault}; export it again, or crop it")
    try:
        images, frame = segmenter.preprocess(volume, case.aspect)
    except ValueError as error:
        return ValueError(f"{case.folder}: {error}")
    for note in frame.notes:
        tqdm.write(f"{case.folder}: {note}", file=sys.stderr)
    if frame.blank:
        tqdm.write(f"{case.folder}: every voxel is 0, and so is its mask", file=sys.stderr)
    return Result(case, volume, truth, fresh=True, images=images, frame=frame)


def finish(item: Result, segmenter: Segmenter, outputs: Outputs) -> None:
    """Make the mask of a case unless it was kept, write what is wanted, and fill in its rows."""
    case, volume, expected = item.case, item.volume, None
    warnings = [note.removeprefix(f"{case.name}: ") for note in case.notes]
    if item.fresh:
        segmentation = segmenter.assess(item.probabilities, item.frame)
        item.prediction, expected = segmentation.mask, segmentation.expected
        warnings += segmentation.warnings
        maps = {}
        if outputs.probabilities:
            maps["probability"] = segmentation.probabilities
            apart = segmenter.disagreement_map(item.probabilities, item.frame)
            maps |= {} if apart is None else {"disagreement": apart}
        item.probabilities = None
        write_case(outputs.folder, case, volume, item.prediction, item.truth, maps)
        if outputs.algorithm and series_of(case):
            try:
                path = outputs.folder / seg_file(case)
                if not write_dicom_seg(path, case, item.prediction, *outputs.algorithm):
                    tqdm.write(
                        f"{path}: OHIF 3.13 shows a part of it only, as its rows x columns are no "
                        "multiple of 8; look at it in another viewer",
                        file=sys.stderr,
                    )
            except ValueError as error:
                item.error = error
    item.volumes = volume_row(case, volume, item.prediction, expected, warnings)
    earlier = outputs.earlier.get(case.name)
    if not item.fresh and earlier and earlier["lesion_voxels"] == item.volumes["lesion_voxels"]:
        item.volumes = earlier  # it knows what the probabilities said
    if item.truth is not None:
        item.scores = table_row(case, item.prediction, item.truth)
    if outputs.thumbnails:
        item.thumbnail = thumbnail(volume, item.prediction)
