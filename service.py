"""Segmentation as a service: uploads one after another, and what each gets back."""

from __future__ import annotations

import base64
import io
import json
import math
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import imageio.v3 as iio
import numpy as np

import upload
from metrics import score
from phantom import write_data_set
from predictions import mask_files, write_case
from segmentation import Segmenter, to_mask
from upload import Limits, Loaded, Named
from utils import montage, outline, sentence, to_grey

SHOWN = 384  # pixels, the longest side of a slice in the viewer


class Busy(Exception):
    """As many uploads wait as may."""


@dataclass
class Answer:
    """What became of one upload."""

    summary: dict  # numbers and text
    files: dict[str, bytes]  # by name: the masks, montage.png, <case>.gif
    masks: list[str]  # which of the files are the mask, in the geometry of the source
    slices: list[dict[str, str]]  # the pictures of each slice, as data URLs
    numbers: tuple[int, ...]  # of the slices
    first: int  # the slice to look at first, where most of the lesion is

    def archive(self, names: Sequence[str] | None = None) -> bytes:
        """A zip archive of some files, or of all of them and summary.json."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names or self.files:
                archive.writestr(name, self.files[name])
            if names is None:
                archive.writestr("summary.json", json.dumps(self.summary, indent=2) + "\n")
        return buffer.getvalue()

    def shown(self) -> dict:
        """What the page draws; all of it travels to the browser, and nothing stays here."""
        case, (mask, *others) = self.summary["case"], self.masks
        downloads = {mask: _data_url(self.files[mask], "application/octet-stream")}
        if others:
            zipped = self.archive(self.masks)
            downloads = {f"{case}_masks.zip": _data_url(zipped, "application/zip")}
        montage = _data_url(self.files["montage.png"], "image/png")
        film = _data_url(self.files[f"{case}.gif"], "image/gif")
        return {
            "summary": self.summary,
            "slices": self.slices,
            "numbers": self.numbers,
            "first": self.first,
            "downloads": downloads | {f"{case}_montage.png": montage, f"{case}.gif": film},
            "montage": montage,
            "film": film,
        }


@dataclass
class Job:
    """An upload on its way."""

    number: int
    done: float = 0.0  # share of its slices that are segmented
    future: Future[Answer] = field(default_factory=Future)


class Service:
    """Segments uploads one at a time, in the order they came; bounded in number, size and time.

    Nothing of an upload is left on disk once its answer is made.
    """

    def __init__(self, segmenter: Segmenter, limits: Limits, waiting: int = 64):
        self.segmenter, self.limits = segmenter, limits
        self.places = threading.BoundedSemaphore(waiting)
        self.waiting = waiting
        self.worker = ThreadPoolExecutor(1)
        self.numbers, self.finished = 0, 0

    def enter(self) -> Callable[[], None]:
        """Take a place in the queue, and get what gives it back; raises Busy."""
        if not self.places.acquire(blocking=False):
            raise Busy(f"{self.waiting} uploads are waiting already; try again in a minute")
        return self.places.release

    def submit(
        self, parts: dict[str, Sequence[Named]] | None, leave: Callable[[], None] = lambda: None
    ) -> Job:
        """Segment an upload (see upload.store), or without one the phantom, when its turn comes.

        The job's future raises ValueError for an upload that cannot be used. Done or cancelled, it
        calls `leave`.
        """

        def count(_: Future[Answer]) -> None:
            self.finished += 1
            leave()

        job = Job(self.numbers)
        self.numbers += 1
        job.future = self.worker.submit(self._run, parts, job)
        job.future.add_done_callback(count)
        return job

    def ahead(self, job: Job) -> int:
        """How many uploads come before a job."""
        return max(0, job.number - self.finished)

    def _run(self, parts: dict[str, Sequence[Named]] | None, job: Job) -> Answer:
        with tempfile.TemporaryDirectory(prefix="brainseg-") as name:
            folder = Path(name).resolve()
            try:
                return self._segment(parts, folder, job)
            except (ValueError, OSError) as error:
                raise ValueError(_without(folder, sentence(error))) from None

    def _segment(self, parts: dict[str, Sequence[Named]] | None, folder: Path, job: Job) -> Answer:
        received, scratch, out = (folder / name for name in ("received", "scratch", "out"))
        for each in (received, scratch, out):
            each.mkdir()
        if parts is None:
            write_data_set(received, cases=1, slices=24, size=192)
            place = received / "phantom_000"
        else:
            place = upload.store(parts, received, self.limits)
        loaded = upload.read(place, scratch, self.limits)
        start = time.monotonic()

        def progress(done: int, of: int) -> None:
            job.done = done / of
            if time.monotonic() - start > self.limits.seconds:
                raise ValueError(
                    f"{loaded.case.name}: segmenting it took more than "
                    f"{self.limits.seconds:.0f} s; crop it, or run inference.py"
                )

        try:
            images, frame = self.segmenter.preprocess(loaded.volume)
        except ValueError as error:
            raise ValueError(f"{loaded.case.name}: {error}") from error
        probabilities = self.segmenter.restored(images, frame, progress)
        mask = to_mask(probabilities, self.segmenter.threshold, self.segmenter.largest_component)
        return make_answer(loaded, probabilities.cpu().numpy(), mask, out)


def make_answer(loaded: Loaded, probabilities: np.ndarray, mask: np.ndarray, out: Path) -> Answer:
    """Numbers, files and pictures of a case; probabilities and mask are (S, H, W)."""
    case, volume, truth = loaded.case, loaded.volume, loaded.truth
    write_case(out, case, volume, mask, truth)
    masks = {path.name: (out / path).read_bytes() for path in mask_files(case)}
    grey = to_grey(volume)
    files = masks | {
        "montage.png": _encoded(montage(outline(grey, mask, truth)), ".png"),
        f"{case.name}.gif": (out / f"{case.name}.gif").read_bytes(),
    }
    touched = mask.any(axis=(1, 2))
    summary = {
        "case": case.name,
        "shape": list(mask.shape),
        "lesion_voxels": int(mask.sum()),
        "lesion_ml": mask.sum() * math.prod(case.spacing) / 1000 if case.spacing else None,
        "slices_touched": [case.numbers[k] for k in np.flatnonzero(touched)],
        "notes": case.notes,
        "scores": None,
    }
    if truth is not None:
        scores = score(mask, truth, case.spacing)
        summary["scores"] = {k: None if math.isnan(v) else round(v, 4) for k, v in scores.items()}
    slices = _slices(volume, probabilities, mask, truth)
    area = mask.sum(axis=(1, 2))
    first = int(area.argmax()) if area.any() else len(area) // 2
    return Answer(summary, files, list(masks), slices, case.numbers, first)


def _slices(
    volume: np.ndarray, probabilities: np.ndarray, mask: np.ndarray, truth: np.ndarray | None
) -> list[dict[str, str]]:
    """For each slice a picture of each sequence, and one whose red is the probability, whose
    green is the mask and whose blue is the true one."""
    step = -(-max(mask.shape[1:]) // SHOWN)
    small = np.s_[:, ::step, ::step]
    names = ("pre", "flair", "post") if volume.shape[3] == 3 else ("flair",)
    grey = {name: to_grey(volume[..., [k]])[small] for k, name in enumerate(names)}
    overlay = np.zeros((*mask[small].shape, 3), np.uint8)
    overlay[..., 0] = np.rint(255 * probabilities[small].clip(0, 1))
    overlay[..., 1] = 255 * mask[small]
    if truth is not None:
        overlay[..., 2] = 255 * truth[small]
    pictures = []
    for k in range(len(mask)):
        slices = {
            n: _data_url(_encoded(array[k], ".jpg"), "image/jpeg") for n, array in grey.items()
        }
        pictures.append(slices | {"overlay": _data_url(_encoded(overlay[k], ".png"), "image/png")})
    return pictures


def _data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _encoded(picture: np.ndarray, suffix: str) -> bytes:
    return iio.imwrite("<bytes>", picture, extension=suffix)


def _without(folder: Path, message: str) -> str:
    """A message in which no path of this machine is left."""
    for path in (folder / "received", folder / "scratch", folder / "out", folder):
        message = message.replace(f"{path}/", "").replace(str(path), "the upload")
    return message
