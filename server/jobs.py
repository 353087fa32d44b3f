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
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from subprocess import PIPE, Popen

import imageio.v3 as iio
import numpy as np
from starlette.datastructures import UploadFile

from brainseg.alignment import Measured
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

from .growth import GrowthAnswer, answer_growth, check_several, check_voxels, is_several_scans
from .unpacking import Limits
from .viewer import viewer_files

ROOT = Path(__file__).resolve().parents[1]
STOPPING = "the server is stopping; try again later"
GRACE = 2.0  # seconds for a running job to end when the server stops
Parts = Mapping[str, Sequence[UploadFile]]  # by field, as `unpack` takes them


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

    def shown(self) -> str:
        """Return all that the page shows as JSON, with the files in base64."""
        case = self.summary["case"]
        downloads = {}
        if len(self.masks) == 1:
            downloads[self.masks[0]] = self.files[self.masks[0]]
        else:
            downloads[f"{case}_masks.zip"] = zipped({n: self.files[n] for n in self.masks})
        downloads[f"{case}_montage.png"] = self.files["montage.png"]
        downloads[f"{case}.gif"] = self.files[f"{case}.gif"]
        shown = {"summary": self.summary, "viewer": self.viewer, "downloads": downloads}
        return json.dumps(shown, default=lambda content: base64.b64encode(content).decode())


@dataclass
class Job:
    """An upload in progress."""

    done: float = 0.0  # fraction of its slices that are segmented
    abandoned: bool = False  # nobody waits for the answer
    future: Future[Answer | GrowthAnswer] = field(default_factory=Future)


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
        """Queue an upload (see `unpack`) to be segmented, or the phantom if it is None.

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

    def _run(self, parts: Parts | None, job: Job) -> Answer | GrowthAnswer:
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

    def _segment(self, parts: Parts | None, folder: Path, job: Job) -> Answer | GrowthAnswer:
        if parts is None:
            volume, truth = make_volume(0, slices=24, size=192)
            case = Case("phantom", tuple(range(1, 25)), (), ())
            loaded = Loaded(case, [], [], volume, truth)
        elif is_several_scans([file.filename or "" for file in parts.get("images", ())]):
            return self._follow(parts, folder, job)
        else:
            loaded = self.reader.read(parts, folder)
        segmentation = self._segmentation(loaded, job, time.monotonic())
        return make_answer(loaded, segmentation, folder / "out", self.segmenter.run)

    def _follow(self, parts: Parts, folder: Path, job: Job) -> GrowthAnswer:
        """Segment several scans of one patient, one after the other, and measure its growth."""
        files, start = parts["images"], time.monotonic()
        check_several(parts, [file.filename or "" for file in files])
        scans, voxels = [], 0
        for k, file in enumerate(files):
            place = folder / str(k)
            place.mkdir()
            loaded = self.reader.read({"images": [file]}, place)
            voxels += math.prod(loaded.volume.shape[:3])
            check_voxels(file.filename or "", voxels, self.limits)
            segmentation = self._segmentation(loaded, job, start, k, len(files))
            scans.append(measured(loaded, segmentation, self.segmenter.run))
        return answer_growth(scans, self.segmenter.expected_dsc_fit, folder, self.segmenter.run)

    def _segmentation(
        self, loaded: Loaded, job: Job, start: float, scan: int = 0, scans: int = 1
    ) -> Segmentation:
        """Segment a scan of an upload of so many, which began at `start`, and report progress."""

        def progress(done: int, of: int) -> None:
            job.done = (scan + done / of) / scans
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
        return self.segmenter.rate(self.segmenter.probabilities(images, progress), frame)


def zipped(files: Mapping[str, bytes]) -> bytes:
    """Pack files, by name, in a zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def shortage(error: Exception) -> str:
    """Say what the server lacks, if that is why a file cannot be written or opened, else ""."""
    if disk_is_full(error):
        return "the server's disk is full; try again later"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "the server has too many files open; try again later"
    return ""


def make_answer(loaded: Loaded, segmentation: Segmentation, out: Path, run: str) -> Answer:
    """Make the numbers, files and pictures of a case; `run` names weights and settings."""
    case, volume, truth, mask = loaded.case, loaded.volume, loaded.truth, segmentation.mask
    write_case(out, case, volume, mask, truth, run=run)
    files = {path.name: (out / path).read_bytes() for path in map_files(case, "mask")}
    masks = list(files)
    picture = montage(outline(to_grey(volume), mask, truth))
    files["montage.png"] = iio.imwrite("<bytes>", picture, extension=".png")
    files[f"{case.name}.gif"] = (out / f"{case.name}.gif").read_bytes()
    warnings = loaded.notes + segmentation.warnings
    replaced = list(loaded.replaced) + list(segmentation.replaced)
    summary = volume_row(case, volume, mask, segmentation.expected, warnings, run, replaced)
    summary |= {"shape": list(mask.shape), "notes": loaded.notes, "scores": None}
    if truth is not None:
        summary["scores"] = {}
        for name, value in score(mask, truth, case.spacing).items():
            summary["scores"][name] = None if math.isnan(value) else round(value, 4)
    files["summary.json"] = f"{json.dumps(summary, indent=2)}\n".encode()
    return Answer(summary, files, masks, viewer_files(case, volume, segmentation, truth))


def measured(loaded: Loaded, segmentation: Segmentation, run: str) -> Measured:
    """Keep what the growth needs of a scan."""
    case, volume, mask = loaded.case, loaded.volume, segmentation.mask
    warnings = [*loaded.notes, *segmentation.warnings]
    replaced = [*loaded.replaced, *segmentation.replaced]
    row = volume_row(case, volume, mask, segmentation.expected, warnings, run, replaced)
    return Measured(case, mask, row, volume[..., volume.shape[3] // 2].copy())


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

    def _start(self) -> Popen[str]:
        command = [sys.executable, "-m", "server.uploads"]
        return Popen(command, stdin=PIPE, stdout=PIPE, text=True, cwd=ROOT, start_new_session=True)

    def read(self, parts: Parts, folder: Path) -> Loaded:
        """Read the case that files make (see `unpack`), unpacking them into an empty folder.

        Raises ValueError, naming the file, if it cannot be used, OSError if the disk is full.
        """
        sent = {}
        for part, files in parts.items():
            sent[part] = []
            for k, file in enumerate(files):
                path = folder / f"{part}-{k}.sent"
                with open(path, "wb") as copy:
                    shutil.copyfileobj(file.file, copy)
                file.file.close()  # and its space on the disk is free again
                sent[part].append((file.filename, str(path)))
        order = {"folder": str(folder), "parts": sent, "limits": asdict(self.limits)}
        answer = self._ask(order)
        if answer.get("full"):
            raise OSError(errno.ENOSPC, answer["error"])
        if "error" in answer:
            raise ValueError(answer["error"])
        truth = np.load(folder / "truth.npy") if answer["truth"] else None
        volume = np.load(folder / "volume.npy")
        return Loaded(case_of(answer), answer["notes"], answer["replaced"], volume, truth)

    def _ask(self, order: dict) -> dict:
        with self._lock:
            if self.closed:
                raise Unavailable(STOPPING)
            if self._process.poll() is not None:
                self._process = self._start()
        try:
            assert self._process.stdin and self._process.stdout
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


def case_of(answer: dict) -> Case:
    """Rebuild a case from what uploads.read returns, as far as its results need it."""
    name, numbers, grid = answer["name"], tuple(answer["numbers"]), answer["grid"]
    if not grid:
        return Case(name, numbers, (), ())
    for part in ("shape", "spacing", "offset", "notes"):
        grid[part] = tuple(grid[part])
    grid["direction"] = np.array(grid["direction"])
    flair = Path(answer["flair"])  # the mask's file takes over what its header says
    return Scan(name, numbers, (flair,), (), Grid(**grid), channels=3)
