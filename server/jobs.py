"""Segmentation as a service: uploads one after another, and what each gets back."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import imageio.v3 as iio
import numpy as np

from brainseg.evaluation.volumes import volume_row
from brainseg.io.files import sentence
from brainseg.io.grid import Grid
from brainseg.io.pictures import montage, outline, to_grey
from brainseg.io.predictions import map_files, write_case
from brainseg.io.scans import Scan
from brainseg.io.slices import Case
from brainseg.metrics import score
from brainseg.phantom import make_volume
from brainseg.segmenter import Segmentation, Segmenter

from .uploads import BROKEN, Limits
from .viewer import viewer_files


@dataclass(frozen=True)
class Named:
    """A file as it was sent: the name it came with and its content."""

    name: str
    content: BinaryIO


@dataclass(frozen=True)
class Loaded:
    """A case of which no file is left but what is here."""

    case: Case
    notes: list[str]
    volume: np.ndarray  # (S, H, W, C)
    truth: np.ndarray | None  # (S, H, W) bool


class Busy(Exception):
    """As many uploads wait as may."""


@dataclass
class Answer:
    """What became of one upload."""

    summary: dict  # numbers and text
    files: dict[str, bytes]  # by name: the masks, montage.png, <case>.gif
    masks: list[str]  # which of the files are the mask, in the geometry of the source
    viewer: dict  # what the page's viewer shows: see viewer_files

    def archive(self, names: Sequence[str] | None = None) -> bytes:
        """A zip archive of some files, or of all of them and summary.json."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name in names or self.files:
                packed = name.endswith((".png", ".gif", ".gz"))
                method = zipfile.ZIP_STORED if packed else zipfile.ZIP_DEFLATED
                archive.writestr(name, self.files[name], method)
            if names is None:
                archive.writestr("summary.json", f"{json.dumps(self.summary, indent=2)}\n")
        return buffer.getvalue()

    def shown(self) -> dict:
        """What the page shows; all of it travels to the browser, and nothing stays here."""
        case, (mask, *others) = self.summary["case"], self.masks
        downloads = {mask: _data_url(self.files[mask], "application/octet-stream")}
        if others:
            zipped = self.archive(self.masks)
            downloads = {f"{case}_masks.zip": _data_url(zipped, "application/zip")}
        montage = _data_url(self.files["montage.png"], "image/png")
        film = _data_url(self.files[f"{case}.gif"], "image/gif")
        viewer = {k: _base64(v) if isinstance(v, bytes) else v for k, v in self.viewer.items()}
        return {
            "summary": self.summary,
            "viewer": viewer,
            "downloads": downloads | {f"{case}_montage.png": montage, f"{case}.gif": film},
            "montage": montage,
        }


@dataclass
class Job:
    """An upload on its way."""

    done: float = 0.0  # share of its slices that are segmented
    future: Future[Answer] = field(default_factory=Future)


class Service:
    """Segments uploads one at a time, in the order they came; bounded in number, size and time.

    Nothing of an upload is left on disk once its answer is made.
    """

    def __init__(self, segmenter: Segmenter, limits: Limits, waiting: int = 64):
        self.segmenter, self.limits, self.waiting = segmenter, limits, waiting
        self.places = threading.BoundedSemaphore(waiting)
        self.reader = Reader(limits)
        self.worker = ThreadPoolExecutor(1)
        self.pending: list[Job] = []
        self.closed = False

    def enter(self) -> None:
        """Take one of the places, for `leave` to give back; raises Busy."""
        if not self.places.acquire(blocking=False):
            raise Busy(f"{self.waiting} uploads are waiting already; try again in a minute")

    def leave(self) -> None:
        self.places.release()

    def submit(self, parts: dict[str, Sequence[Named]] | None) -> Job:
        """Segment an upload (see uploads.unpack), or without one the phantom, when its turn comes.

        The job's future raises ValueError for an upload that cannot be used.
        """
        job = Job()
        self.pending.append(job)
        job.future = self.worker.submit(self._run, parts, job)
        job.future.add_done_callback(lambda _: self.pending.remove(job))
        return job

    def ahead(self, job: Job) -> int:
        """How many uploads come before a job."""
        try:
            return self.pending.index(job)
        except ValueError:  # just done
            return 0

    def close(self) -> None:
        """Give up what waits and what is under way, and leave nothing behind."""
        self.closed = True
        self.reader.close()
        self.worker.shutdown(cancel_futures=True)

    def _run(self, parts: dict[str, Sequence[Named]] | None, job: Job) -> Answer:
        with tempfile.TemporaryDirectory(prefix="brainseg-") as name:
            folder = Path(name).resolve()
            try:
                return self._segment(parts, folder, job)
            except (ValueError, OSError) as error:
                raise ValueError(_without(folder, sentence(error))) from None
            except (MemoryError, RuntimeError) as error:  # RuntimeError: of PyTorch
                if isinstance(error, RuntimeError) and "memory" not in str(error):
                    raise
                raise ValueError("it needs more memory than the server has; crop it") from None

    def _segment(self, parts: dict[str, Sequence[Named]] | None, folder: Path, job: Job) -> Answer:
        if parts is None:
            volume, truth = make_volume(0, slices=24, size=192)
            loaded = Loaded(Case("phantom", tuple(range(1, 25)), (), ()), [], volume, truth)
        else:
            loaded = self.reader.read(parts, folder)
        start = time.monotonic()

        def progress(done: int, of: int) -> None:
            job.done = done / of
            if self.closed:
                raise ValueError("the server is stopping")
            if time.monotonic() - start > self.limits.seconds:
                raise ValueError(
                    f"{loaded.case.name}: segmenting it took more than "
                    f"{self.limits.seconds:.0f} s; crop it, or run inference.py"
                )

        try:
            images, frame = self.segmenter.preprocess(loaded.volume, loaded.case.aspect)
        except ValueError as error:
            raise ValueError(f"{loaded.case.name}: {error}") from error
        found = self.segmenter.assess(self.segmenter.probabilities(images, progress), frame)
        out = folder / "out"
        out.mkdir()
        return make_answer(loaded, found, out)


def make_answer(loaded: Loaded, found: Segmentation, out: Path) -> Answer:
    """Numbers, files and pictures of a case, and what was found in it."""
    case, volume, truth = loaded.case, loaded.volume, loaded.truth
    probabilities, mask = found.probabilities, found.mask
    write_case(out, case, volume, mask, truth)
    masks = {path.name: (out / path).read_bytes() for path in map_files(case, "mask")}
    grey = to_grey(volume)
    files = masks | {
        "montage.png": _encoded(montage(outline(grey, mask, truth)), ".png"),
        f"{case.name}.gif": (out / f"{case.name}.gif").read_bytes(),
    }
    notes = [note.removeprefix(f"{case.name}: ") for note in loaded.notes]
    summary = volume_row(case, volume, mask, found.expected, notes + found.warnings) | {
        "shape": list(mask.shape),
        "notes": loaded.notes,
        "scores": None,
    }
    if truth is not None:
        scores = score(mask, truth, case.spacing)
        summary["scores"] = {k: None if math.isnan(v) else round(v, 4) for k, v in scores.items()}
    viewer = viewer_files(case, volume, probabilities, mask, truth)
    return Answer(summary, files, list(masks), viewer)


def _data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{_base64(content)}"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _encoded(picture: np.ndarray, suffix: str) -> bytes:
    return iio.imwrite("<bytes>", picture, extension=suffix)


def _without(folder: Path, message: str) -> str:
    """A message in which no path of this machine is left."""
    for path in (folder / "received", folder / "out", folder):
        message = message.replace(f"{path}/", "").replace(str(path), "the upload")
    return message


class Reader:
    """Has uploads read by uploads.py, in a process that may break down."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.closed = False
        self._turn = threading.Lock()  # one upload at a time
        self._lock = threading.Lock()  # of `closed` and `_process`: none is started once closed
        self._process = self._start()

    def _start(self) -> subprocess.Popen:
        root = Path(__file__).resolve().parents[1]
        return subprocess.Popen(
            [sys.executable, "-m", "server.uploads"],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def read(self, parts: dict[str, Sequence[Named]], folder: Path) -> Loaded:
        """The case that files make (see uploads.unpack), in an empty folder that they may fill.

        Raises ValueError, naming the file, if it cannot be used.
        """
        sent = []
        for part, files in parts.items():
            for file in files:
                path = folder / f"{len(sent)}.sent"
                with open(path, "wb") as copy:
                    shutil.copyfileobj(file.content, copy)
                sent.append((part, file.name, str(path)))
        order = {"folder": str(folder), "parts": sent, "limits": asdict(self.limits)}
        order["register"] = "register" in parts
        answer = self._ask(order)
        if "error" in answer:
            raise ValueError(answer["error"])
        numbers, grid = tuple(answer["numbers"]), answer["grid"]
        if grid:
            shape, spacing, offset = (tuple(grid[k]) for k in ("shape", "spacing", "offset"))
            grid = Grid(shape, spacing, offset, np.array(grid["direction"]))
            case = Scan(answer["name"], numbers, (), (), grid, channels=3)
        else:
            case = Case(answer["name"], numbers, (), ())
        truth = np.load(folder / "truth.npy") if answer["truth"] else None
        return Loaded(case, answer["notes"], np.load(folder / "volume.npy"), truth)

    def _ask(self, order: dict) -> dict:
        with self._turn:
            with self._lock:
                if self.closed:
                    raise ValueError("the server is stopping")
                if self._process.poll() is not None:
                    self._process = self._start()
            try:
                self._process.stdin.write(json.dumps(order) + "\n")
                self._process.stdin.flush()
                return json.loads(self._process.stdout.readline())
            except (OSError, ValueError):
                with self._lock:
                    self._kill()
                return {"error": "the server is stopping" if self.closed else BROKEN}

    def close(self) -> None:
        """End the process, and what it reads just now."""
        with self._lock:
            self.closed = True
            self._kill()

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
