"""Segment uploads one at a time, in a queue."""

import errno
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
from pydicom import Dataset

from brainseg.io.dicom import Series
from brainseg.io.dicom_seg import algorithm_name, series_of
from brainseg.io.files import disk_is_full, out_of_memory, remove, scratch
from brainseg.io.grid import Grid
from brainseg.io.quiet import quiet
from brainseg.io.scans import Scan
from brainseg.io.sequences import with_copies
from brainseg.io.slices import Case
from brainseg.phantom_head import make_volume
from brainseg.segmenter import Segmentation, Segmenter

from .answers import Answer, Loaded, answer_growth, make_answer, measured
from .several_scans import Parts, SentScan, check_several, several_files
from .unpacking import Limits
from .wording import in_page_words

ROOT = Path(__file__).resolve().parents[1]
STOPPING = "the server is stopping; try again later"
TOO_LARGE = "the scan needs more memory than the server has; crop it"
# Seed of the head to try. The default network finds its lesion; for that of others it takes bright
# fat behind the eyes (MODEL_CARD.md).
PHANTOM = 6
GRACE = 2.0  # seconds for a running job to end when the server stops


class Unavailable(Exception):
    """The server cannot segment an upload now, but may later."""


@dataclass
class Job:
    """An upload in progress."""

    done: float = 0.0  # fraction of its slices that are segmented
    abandoned: bool = False  # nobody waits for the answer
    future: Future[Answer] = field(default_factory=Future)


class Service:
    """Segments uploads one at a time, in order of arrival; nothing of them stays on disk."""

    def __init__(self, segmenter: Segmenter, limits: Limits):
        self.segmenter, self.limits = segmenter, limits
        self.reader = Reader(limits)
        self.worker = ThreadPoolExecutor(1)
        self.pending: list[Job] = []  # that wait or run, in order
        self.folder = Path()  # of the running job

    def submit(self, parts: Parts | None) -> Job:
        """Queue an upload, or the phantom; its future may raise ValueError and Unavailable."""
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

    def abandon(self, job: Job) -> None:
        """End a job that nobody waits for, even while its upload is read."""
        job.abandoned = True
        self.reader.interrupt(job)

    def close(self) -> None:
        """Cancel all jobs; a network at work for more than GRACE seconds is left to `end`."""
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
                raise ValueError(in_page_words(_without(folder, str(error)))) from None
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                raise ValueError(TOO_LARGE) from None

    def _segment(self, parts: Parts | None, folder: Path, job: Job) -> Answer:
        out = folder / "out"
        out.mkdir()
        if parts is None:
            volume, truth = make_volume(PHANTOM, slices=24, size=192)
            case = Case("phantom", tuple(range(1, 25)), (), ())
            loaded = Loaded(case, [], [], volume, truth)
        else:
            scans = several_files(parts.get("images", ()))
            loaded = scans or self.reader.read(parts, folder, job)
            if isinstance(loaded, list):
                check_several(parts, loaded)
                return self._follow(loaded, folder, job)
        segmentation = self._segmentation(loaded, job, time.monotonic())
        if series_of(loaded.case) and find_spec("highdicom"):
            algorithm = algorithm_name(self.segmenter.hashes), self.segmenter.run or "unknown"
            self.reader.write_seg(loaded, segmentation.mask, folder, algorithm, job)
        return make_answer(loaded, segmentation, out, self.segmenter)

    def _follow(self, scans: Sequence[SentScan], folder: Path, job: Job) -> Answer:
        """Segment several scans of one patient, one after the other, and measure its growth."""
        start, done, voxels, no_expected_dsc = time.monotonic(), [], 0, ""
        for k, scan in enumerate(scans):
            place = folder / str(k)
            place.mkdir(exist_ok=True)  # it has the files of a study already
            loaded = self.reader.read(scan.parts, place, job)
            assert isinstance(loaded, Loaded)
            voxels += math.prod(loaded.volume.shape[:3])
            if voxels > self.limits.voxels:
                most = f"over {self.limits.voxels / 1e6:.0f} million voxels in all"
                raise ValueError(f"{scan.name}: the scans have {most}; send fewer of them")
            segmentation = self._segmentation(loaded, job, start, k, len(scans))
            no_expected_dsc = no_expected_dsc or segmentation.no_expected_dsc
            done.append(measured(loaded, segmentation, self.segmenter.run))
        return answer_growth(done, folder / "out", self.segmenter, no_expected_dsc)

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
                    f"{self.limits.seconds:.0f} s; crop it"
                )

        try:
            images, frame = self.segmenter.preprocess(loaded.volume, loaded.case.aspect)
        except ValueError as error:
            raise ValueError(f"{loaded.case.name}: {error}") from error
        probabilities = self.segmenter.probabilities(images, progress)
        return self.segmenter.segmentation_of(probabilities, frame, loaded.case.spacing)


def shortage(error: Exception) -> str:
    """Say what the server lacks, if that is why a file cannot be written or opened, else ""."""
    if disk_is_full(error):
        return "the server's disk is full; try again later"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "the server has too many files open; try again later"
    return ""


def _without(folder: Path, message: str) -> str:
    """Remove the paths of this machine from a message."""
    place = re.escape(str(folder))
    message = re.sub(rf"{place}/(\d+/)?((received|tree|out)/)?(?=\w)", "", message)
    return re.sub(rf"{place}(/\d+)?(/received|/tree|/out)?", "the upload", message)


class Reader:
    """Reads uploads one at a time, by uploads.py in a process that may crash."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.closed = False
        self.job: Job | None = None  # whose upload is read
        self._lock = threading.Lock()  # of these and `_process`: no process starts once closed
        self._process = self._start()

    def _start(self) -> Popen[str]:
        command = [sys.executable, "-m", "server.uploads"]
        return Popen(command, stdin=PIPE, stdout=PIPE, text=True, cwd=ROOT, start_new_session=True)

    def read(self, parts: Parts, folder: Path, job: Job | None = None) -> Loaded | list[SentScan]:
        """Read the case that files make (`unpack`); ValueError, or OSError if the disk is full.

        If they are several DICOM studies, return these, each to be read in `folder`/<its number>.
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
        answer = self._ask({"folder": str(folder), "parts": sent}, job)
        if answer.get("full"):
            raise OSError(errno.ENOSPC, answer["error"])
        if "error" in answer:
            raise ValueError(answer["error"])
        if "studies" in answer:
            return [SentScan(name, patient_id, {}) for name, patient_id in answer["studies"]]
        truth = np.load(folder / "truth.npy") if answer["truth"] else None
        volume = with_copies(np.load(folder / "volume.npy"), 3)
        case, notes, replaced = case_of(answer), answer["notes"], answer["replaced"]
        return Loaded(case, notes, replaced, volume, truth)

    def write_seg(
        self, loaded: Loaded, mask: np.ndarray, folder: Path, algorithm: tuple[str, str], job: Job
    ) -> None:
        """Write a mask (S, H, W) as the DICOM Segmentation seg.dcm, or note why it cannot be."""
        np.save(folder / "mask.npy", mask)
        order = {"folder": str(folder), "parts": {}, "algorithm": algorithm}
        error = self._ask(order, job).get("error")
        if error:
            loaded.notes.append(f"no DICOM Segmentation: {_without(folder, error)}")

    def _ask(self, order: dict, job: Job | None) -> dict:
        with self._lock:
            if self.closed:
                raise Unavailable(STOPPING)
            if job and job.abandoned:
                raise CancelledError
            self.job = job
            if self._process.poll() is not None:
                self._process = self._start()
        try:
            assert self._process.stdin and self._process.stdout
            order |= {"limits": asdict(self.limits)}
            print(json.dumps(order), file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            with self._lock:
                self._kill()
                if self.closed:
                    raise Unavailable(STOPPING) from None
            raise Unavailable("the upload could not be read now; try again later") from None
        finally:
            with self._lock:
                self.job = None

    def interrupt(self, job: Job) -> None:
        """Kill the process if it is reading the upload of a job."""
        with self._lock:
            if self.job is job:
                self._kill()

    def close(self) -> None:
        """Kill the process, even while it is reading."""
        with self._lock:
            self.closed = True
            self._kill()

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@quiet  # on an odd StudyDate
def case_of(answer: dict) -> Case:
    """Rebuild a case from what uploads.read returns, as far as its results need it."""
    name, numbers, grid = answer["name"], tuple(answer["numbers"]), answer["grid"]
    read = {"patient": answer["patient"], "doubts": tuple(answer["doubts"])}
    if not grid:
        return Case(name, numbers, (), (), **read)
    for part in ("shape", "spacing", "offset", "notes"):
        grid[part] = tuple(grid[part])
    grid["direction"] = np.array(grid["direction"])
    flair = Path(answer["flair"])  # the mask's file takes over what its header says
    if answer["header"]:
        header = Dataset()
        for field_name, value in answer["header"].items():
            setattr(header, field_name, value)
        flair = Series(flair, (), header)
    return Scan(name, numbers, (flair,), (), Grid(**grid), channels=3, **read)
