"""Read untrusted uploads, each in a separate process with bounded memory and time.

The archives are of unknown origin and the readers are large libraries in C and C++: if one crashes
here, the server keeps running. jobs.Reader starts this module and keeps it running; for each line
of JSON on its input (see `attend`) it forks, and answers with a line when the upload is read.
"""

import json
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from brainseg.io.dicom import File, text
from brainseg.io.dicom_seg import series_of, write_dicom_seg
from brainseg.io.files import by, disk_is_full, out_of_memory, save_array, sentence
from brainseg.io.formats import read_grid
from brainseg.io.opening import find_case
from brainseg.io.scans import Scan, registered
from brainseg.patients import patient_of

from .unpacking import MIB, Limits, Sent, unpack

FORK = multiprocessing.get_context("fork")
BROKEN = "the upload cannot be read, as it is damaged or too large; export it again, or crop it"


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C, the server ends this process
    for line in sys.stdin:
        print(json.dumps(attend(json.loads(line))), flush=True)


def attend(order: dict) -> dict:
    """Read one upload in a separate process; return what is known of the case, or an `error`.

    `order` holds its `folder`, `parts` ([name, file] by field), `limits` and, if the upload has
    been read before, the `algorithm` for `write_seg`.
    """
    seconds = order["limits"]["seconds"]
    names = [files[0][0] for files in order["parts"].values() if files]
    name = names[0] if names else "the upload"
    answers, sender = FORK.Pipe(duplex=False)  # not a file: the disk may be full
    child = FORK.Process(target=work, args=(order, sender))
    child.start()
    sender.close()  # the child has its own: if it crashes, the pipe ends
    try:
        if not answers.poll(seconds):
            return {"error": f"{name}: reading it took more than {seconds:.0f} s; crop it"}
        return json.loads(answers.recv_bytes())
    except (EOFError, OSError, ValueError):
        return {"error": f"{name}: {BROKEN}"}
    finally:
        child.kill()
        child.join()
        answers.close()


def work(order: dict, sender: Connection) -> None:
    """Read the upload, inside the process; write volume.npy and truth.npy, and send the answer."""
    folder, limits = Path(order["folder"]), Limits(**order["limits"])
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # libraries print too; the parent answers on its own stdout
        os.dup2(nowhere, stream)
    try:
        limit_process(limits)
        parts = {}
        for part, files in order["parts"].items():
            parts[part] = [Sent(name, Path(path)) for name, path in files]
        if "algorithm" in order:
            answer = write_seg(folder, *order["algorithm"])
        else:
            answer = read(parts, folder, limits)
    except (ValueError, OSError) as error:
        answer = {"error": sentence(error), "full": disk_is_full(error)}
    except Exception as error:  # raised by a library
        answer = {"error": BROKEN}
        if out_of_memory(error):
            limit = limits.memory // MIB
            answer = {"error": f"reading the upload needs more than {limit} MiB; crop it"}
    sender.send_bytes(json.dumps(answer, default=np.ndarray.tolist).encode())


def limit_process(limits: Limits) -> None:
    """Limit the memory and time of this process, and the size of the files it writes."""
    seconds = int(limits.seconds) + 1
    resource.setrlimit(resource.RLIMIT_DATA, (limits.memory, limits.memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.memory, limits.memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def read(parts: dict[str, list[Sent]], folder: Path, limits: Limits) -> dict:
    """Unpack and read an upload; return what the server must know of its case.

    Of several DICOM studies, it must know the names, and each can then be read in its folder.
    """
    received = folder / "received"
    if received.exists():
        case = find_case(next(received.iterdir()))
    else:
        received.mkdir()
        case = unpack(parts, received, limits)
    if isinstance(case, list):
        return {"studies": [[study.name, study.patient] for study in case]}
    if "register" in parts:
        case = registered(case)
    if isinstance(case, Scan):
        for path in dict.fromkeys(case.slices):
            check_voxels(path, read_grid(path)[0].shape, limits)
    truth = None
    if case.masks:
        volume, truth = case.read_pair()
    else:
        volume = case.read()
    check_voxels(case.folder, volume.shape[:3], limits)
    if volume.shape[3] > 4:
        raise ValueError(
            f"{case.folder}: {volume.shape[3]} channels; give pre-contrast, FLAIR, post-contrast"
        )
    is_flair_alone = volume.strides[3] == 0  # then the others are views of it
    save_array(folder / "volume.npy", volume[..., :1] if is_flair_alone else volume)
    if truth is not None:
        save_array(folder / "truth.npy", truth)
    notes = [note for note in case.notes if note not in case.doubts]
    header, series = None, series_of(case)
    if series:
        header = {name: text(series.header, name) for name in ("PatientID", "StudyDate")}
    return {
        "name": case.name,
        "patient": patient_of(case),
        "numbers": case.numbers,
        "notes": notes,
        "doubts": case.doubts,
        "replaced": case.replaced,
        "grid": asdict(case.grid) if isinstance(case, Scan) else None,
        "flair": str(case.folder),
        "truth": truth is not None,
        "header": header,
    }


def write_seg(folder: Path, algorithm: str, version: str) -> dict:
    """Write mask.npy as a DICOM Segmentation of the FLAIR series of an upload: seg.dcm."""
    case = find_case(next((folder / "received").iterdir()))
    mask = np.load(folder / "mask.npy")
    write_dicom_seg(folder / "seg.dcm", case, mask, algorithm, version)
    return {}


def check_voxels(path: File, shape: Sequence[int], limits: Limits) -> None:
    """Raise ValueError for a volume (S, H, W), or (X, Y, Z), that would take too much memory."""
    if np.prod(shape, dtype=float) > limits.voxels or max(shape) > limits.side:
        raise ValueError(
            f"{path}: {by(shape)} voxels are too many (at most {limits.side} "
            f"along an axis, {limits.voxels / 1e6:.0f} million in all); crop or resample it"
        )


if __name__ == "__main__":
    main()
