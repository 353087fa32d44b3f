"""Segment uploads one at a time, and make the answer to each."""

from __future__ import annotations

import base64
import errno
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
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from starlette.datastructures import UploadFile

from brainseg.io.files import disk_is_full, out_of_memory, remove, scratch
from brainseg.io.grid import Grid
from brainseg.io.pictures import montage, outline, to_grey
from brainseg.io.predictions import map_files, write_case
from brainseg.io.scans import Scan
from brainseg.io.slices import Case
from brainseg.metrics import score
from brainseg.phantom import make_volume
from brainseg.reports.volumes import volume_row
from brainseg.segmenter import Segmentation, Segmenter

from .uploads import Limits
from .viewer import viewer_files

ROOT = Path(__file__).resolve().parents[1]
STOPPING = "the server is stopping; try again later"
GRACE = 2.0  # seconds for a running job to end when the server stops
Parts = dict[str, Sequence[UploadFile]]  # by field, as uploads.unpack takes them


class Unavailable(Exception):
    """The server cannot segment an upload now, but may later."""


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
    files: dict[str, bytes]  # by name: the masks, montage.png, <case>.gif, summary.json
    masks: list[str]  # names of the files of the mask, in the geometry of the source
    viewer: dict  # what the page's viewer shows: see viewer_files

    def archive(self, names: Sequence[str] | None = None) -> bytes:
        """Pack some files, or all of them, in a zip archive."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names or self.files:
                archive.writestr(name, self.files[name])
        return buffer.getvalue()

    def shown(self) -> str:
        """Return all that the page shows as JSON, with the files in base64."""
        case, (mask, *others) = self.summary["case"], self.masks
        if others:
            masks = {f"{case}_masks.zip": self.archive(self.masks)}
        else:
            masks = {mask: self.files[mask]}
        pictures = {f"{case}_montage.png": "montage.png", f"{case}.gif": f"{case}.gif"}
        downloads = masks | {name: self.files[file] for name, file in pictures.items()}
        shown = {"summary": self.summary, "viewer": self.viewer, "downloads": downloads}
        return json.dumps(shown, default=lambda content: base64.b64encode(content).decode())


@dataclass
class Job:
    """An upload in progress."""

    done: float = 0.0  # fraction of its slices that are segmented
    abandoned: bool = False  # nobody waits for the answer
    future: Future[Answer] = field(default_factory=Future)


class Service:
    """Segments uploads one at a time, in order of arrival, with bounded size and time.

    Nothing of an upload is left on disk once its answer is ready. `pending` are the jobs that wait
    or run, in order.
    """

    def __init__(self, segmenter: Segmenter, limits: Limits):
        self.segmenter, self.limits = segmenter, limits
        self.reader = Reader(limits)
        self.worker = ThreadPoolExecutor(1)
        self.pending: list[Job] = []
        self.folder = Path()  # of the running job

    def submit(self, parts: Parts | None) -> Job:
        """Queue an upload (see uploads.unpack) to be segmented, or the phantom if it is None.

        The job's future raises ValueError for an upload that cannot be used, and Unavailable.
        """
        job = Job()
        try:
            job.future = self.worker.submit(self._run, parts, job)
        except RuntimeError:  # closed
            raise Unavailable(STOPPING) from None
        self.pending.append(job)
        job.future.add_done_callback(lambda _: self.pending.remove(job))
        return job

    def ahead(self, job: Job) -> int:
        """Return how many uploads are ahead of a job."""
        try:
            return self.pending.index(job)
        except ValueError:  # just done
            return 0

    def close(self) -> None:
        """Cancel the waiting and the running jobs, and leave nothing behind.

        A job whose network is at work for more than GRACE seconds is left to `end`.
        """
        self.reader.close()
        self.worker.shutdown(wait=False, cancel_futures=True)
        wait([job.future for job in self.pending], GRACE)

    def end(self) -> None:
        """End the process at once if a job still runs: nothing else can end its network."""
        if self.pending:
            with suppress(OSError, ValueError):  # the job may still be writing there
                remove(self.folder)
            print("stopped", file=sys.stderr, flush=True)
            os._exit(1)

    def _run(self, parts: Parts | None, job: Job) -> Answer:
        with scratch(Path(tempfile.gettempdir()).resolve()) as folder:
            self.folder = folder
            try:
                return self._segment(parts, folder, job)
            except ValueError as error:
                raise ValueError(_without(folder, str(error))) from None
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                raise ValueError(
                    "the scan needs more memory than the server has; crop it"
                ) from None

    def _segment(self, parts: Parts | None, folder: Path, job: Job) -> Answer:
        if parts is None:
            volume, truth = make_volume(0, slices=24, size=192)
            loaded = Loaded(Case("phantom", tuple(range(1, 25)), (), ()), [], [], volume, truth)
        else:
            loaded = self.reader.read(parts, folder)
        start = time.monotonic()

        def progress(done: int, of: int) -> None:
            job.done = done / of
            if self.reader.closed:
                raise Unavailable(STOPPING)
            if job.abandoned:
                raise CancelledError
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
        return make_answer(loaded, found, folder / "out", self.segmenter.run)


def shortage(error: OSError) -> str | None:
    """Say what the server lacks, if that is why a file cannot be written or opened."""
    if disk_is_full(error):
        return "the server's disk is full; try again later"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "the server has too many files open; try again later"
    return None


def make_answer(loaded: Loaded, found: Segmentation, out: Path, run: str) -> Answer:
    """Make the numbers, files and pictures of a case and of what `run` found in it."""
    case, volume, truth, mask = loaded.case, loaded.volume, loaded.truth, found.mask
    write_case(out, case, volume, mask, truth, run=run)
    masks = {path.name: (out / path).read_bytes() for path in map_files(case, "mask")}
    picture = montage(outline(to_grey(volume), mask, truth))
    files = masks | {
        "montage.png": iio.imwrite("<bytes>", picture, extension=".png"),
        f"{case.name}.gif": (out / f"{case.name}.gif").read_bytes(),
    }
    warnings = loaded.notes + found.warnings
    replaced = [*loaded.replaced, *found.replaced]
    summary = volume_row(case, volume, mask, found.expected, warnings, run, replaced) | {
        "shape": list(mask.shape),
        "notes": loaded.notes,
        "scores": None,
    }
    if truth is not None:
        scores = score(mask, truth, case.spacing)
        summary["scores"] = {k: None if math.isnan(v) else round(v, 4) for k, v in scores.items()}
    files["summary.json"] = f"{json.dumps(summary, indent=2)}\n".encode()
    return Answer(summary, files, list(masks), viewer_files(case, volume, found, truth))


def _without(folder: Path, message: str) -> str:
    """Remove the paths of this machine from a message."""
    for path in (folder / "received", folder / "out", folder):
        message = message.replace(f"{path}/", "").replace(str(path), "the upload")
    return message


class Reader:
    """Reads uploads one at a time, by uploads.py in a process that may crash."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.closed = False
        self._lock = threading.Lock()  # of `closed` and `_process`: no process starts once closed
        self._process = self._start()

    def _start(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "server.uploads"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)

    def read(self, parts: Parts, folder: Path) -> Loaded:
        """Read the case that files make (see uploads.unpack), unpacking them into an empty folder.

        Raises ValueError, naming the file, if it cannot be used, OSError if the disk is full.
        """
        sent: dict[str, list[tuple[str, str]]] = {name: [] for name in parts}
        for name, files in parts.items():
            for k, file in enumerate(files):
                path = folder / f"{name}-{k}.sent"
                with open(path, "wb") as copy:
                    shutil.copyfileobj(file.file, copy)
                file.file.close()  # and its space on the disk is free again
                sent[name].append((file.filename, str(path)))
        limits = asdict(self.limits)
        answer = self._ask({"folder": str(folder), "parts": sent, "limits": limits})
        if answer.get("full"):
            raise OSError(errno.ENOSPC, answer["error"])
        if "error" in answer:
            raise ValueError(answer["error"])
        case = Case(answer["name"], tuple(answer["numbers"]), (), ())
        if grid := answer["grid"]:
            direction = np.array(grid.pop("direction"))
            grid = Grid(**{name: tuple(value) for name, value in grid.items()}, direction=direction)
            flair = Path(answer["flair"])  # the mask's file takes over what its header says
            case = Scan(case.name, case.numbers, (flair,), (), grid, channels=3)
        truth = np.load(folder / "truth.npy") if answer["truth"] else None
        volume = np.load(folder / "volume.npy")
        return Loaded(case, answer["notes"], answer["replaced"], volume, truth)

    def _ask(self, order: dict) -> dict:
        with self._lock:
            if self.closed:
                raise Unavailable(STOPPING)
            if self._process.poll() is not None:
                self._process = self._start()
        try:
            print(json.dumps(order), file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            with self._lock:
                self._kill()
                if self.closed:
                    raise Unavailable(STOPPING) from None
            raise Unavailable("the upload could not be read now; try again later") from None

    def close(self) -> None:
        """Kill the process, even while it is reading."""
        with self._lock:
            self.closed = True
            self._kill()

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
