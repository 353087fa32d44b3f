"""Read untrusted uploads, each in a separate process with bounded memory and time.

The archives are of unknown origin and the readers are large libraries in C and C++: if one crashes
here, the server keeps running. jobs.Reader starts this module and keeps it running; for each line
of JSON on its input (see `attend`) it forks, and answers with a line when the upload is read.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import stat
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np

from brainseg.io.dicom import File
from brainseg.io.files import by, disk_is_full, save_array, sentence
from brainseg.io.formats import SUFFIXES, is_scan, read_grid, scan_name
from brainseg.io.layouts import find_case, find_sequences
from brainseg.io.scans import Scan, registered
from brainseg.io.slices import SLICE_NAME, Case

MIB = 2**20
FORK = multiprocessing.get_context("fork")
HDF5 = b"\x89HDF\r\n\x1a\n"  # at byte 0, 512, 1024, 2048 ...; its data may be in other files
DAMAGED = "is damaged, encrypted or compressed in an unsupported way; zip it again"
BROKEN = "the upload cannot be read, as it is damaged or too large; export it again, or crop it"


@dataclass(frozen=True)
class Limits:
    """The limits of one upload."""

    upload: int = 256 * MIB  # bytes sent
    unpacked: int = 1024 * MIB  # bytes of the files in an archive
    files: int = 2048
    voxels: int = 2**26  # in each sequence of a volume: 512 x 512 x 256
    side: int = 1024  # voxels along an axis
    memory: int = 4096 * MIB  # bytes of the process that reads it
    seconds: float = 300.0  # for reading, and again for segmenting


class Sent(NamedTuple):
    """An uploaded file: the name it was sent with, and the path of its content."""

    name: str
    path: Path


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C, the server ends this process
    for line in sys.stdin:
        print(json.dumps(attend(json.loads(line))), flush=True)


def attend(order: dict) -> dict:
    """Read one upload in a separate process; return what is known of the case, or an `error`.

    `order` holds the `folder` of the upload, its `parts` ([name, file] by field) and `limits`.
    """
    seconds = order["limits"]["seconds"]
    names = (name for files in order["parts"].values() for name, _ in files)
    name = next(names, "the upload")
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
        bound(limits)
        parts = {
            field: [Sent(name, Path(file)) for name, file in files]
            for field, files in order["parts"].items()
        }
        answer = read(parts, folder, limits)
    except (ValueError, OSError) as error:
        answer = {"error": sentence(error), "full": disk_is_full(error)}
    except MemoryError:
        answer = {
            "error": f"reading the upload needs more than {limits.memory // MIB} MiB; crop it"
        }
    except Exception:  # raised by a library
        answer = {"error": BROKEN}
    sender.send_bytes(json.dumps(answer, default=np.ndarray.tolist).encode())


def bound(limits: Limits) -> None:
    """Limit the memory and time of this process, and the size of the files it writes."""
    import resource

    for kind, most in (
        (resource.RLIMIT_DATA, limits.memory),
        (resource.RLIMIT_CPU, int(limits.seconds) + 1),
        (resource.RLIMIT_FSIZE, limits.memory),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def read(parts: dict[str, list[Sent]], folder: Path, limits: Limits) -> dict:
    """Unpack and read an upload; return what the server must know of its case."""
    received = folder / "received"
    received.mkdir()
    case = unpack(parts, received, limits)
    if "register" in parts:
        case = registered(case)
    if isinstance(case, Scan):
        for path in dict.fromkeys(case.slices):
            check_size(path, read_grid(path)[0].shape, limits)
    volume, truth = case.read_pair() if case.masks else (case.read(), None)
    check_size(case.folder, volume.shape[:3], limits)
    if volume.shape[3] > 4:
        raise ValueError(
            f"{case.folder}: {volume.shape[3]} channels; give pre-contrast, FLAIR, post-contrast"
        )
    save_array(folder / "volume.npy", volume)
    if truth is not None:
        save_array(folder / "truth.npy", truth)
    return {
        "name": case.name,
        "numbers": case.numbers,
        "notes": case.notes,
        "replaced": case.replaced,
        "grid": asdict(case.grid) if isinstance(case, Scan) else None,
        "flair": str(case.folder),
        "truth": truth is not None,
    }


def check_size(path: File, shape: Sequence[int], limits: Limits) -> None:
    """Raise ValueError for a volume (S, H, W), or (X, Y, Z), that would take too much memory."""
    if np.prod(shape, dtype=float) > limits.voxels or max(shape) > limits.side:
        raise ValueError(
            f"{path}: {by(shape)} voxels are too many (at most {limits.side} "
            f"along an axis, {limits.voxels / 1e6:.0f} million in all); crop or resample it"
        )


def unpack(parts: dict[str, list[Sent]], folder: Path, limits: Limits) -> Case:
    """Arrange the files of an upload as a case in an empty folder, and return the case.

    `parts` holds the files of `images` (a volume file, slices, the files of a DICOM series, or a
    zip archive of one of these), or one volume file each of `flair`, `pre` and `post`; optionally
    also of `mask` (a volume file, or the masks of the slices). Raises ValueError, naming the file.
    """
    images, masks = parts.get("images", []), parts.get("mask", [])
    sequences = {name: parts[name] for name in ("flair", "pre", "post") if name in parts}
    placed: dict[str, Path] = {}
    if sequences and images:
        raise ValueError("images was sent along with flair, pre or post; send one or the other")
    if sequences:
        placed = _place_sequences(sequences, folder)
        place = placed["flair"]
    elif not images:
        raise ValueError("no scan was sent; send a volume file, slices, or a zip archive of either")
    elif len(images) == 1 and _is_volume(images[0].name):
        place = images[0].path.rename(folder / _plain(images[0].name))
    else:
        place = _place_slices(images, folder, limits)
    if masks:
        _place_mask(masks, place, limits)
    for path in folder.rglob("*"):
        if path.is_file():
            check_alone(path)
    if not sequences:
        return find_case(place)
    case = find_sequences(placed["flair"], placed.get("pre"), placed.get("post"))
    return replace(case, name=scan_name(placed["flair"]))


def _place_sequences(sequences: dict[str, list[Sent]], folder: Path) -> dict[str, Path]:
    """Move each sequence to a separate folder; return the paths by name."""
    if "flair" not in sequences:
        raise ValueError("flair is missing; send it, because it shows the lesion")
    placed = {}
    for name, files in sequences.items():
        if len(files) > 1 or not _is_volume(files[0].name):
            raise ValueError(f"{name}: send one volume file (.nii, .nii.gz, .nrrd or .mha)")
        (folder / name).mkdir()
        placed[name] = files[0].path.rename(folder / name / _plain(files[0].name))
    return placed


def _place_slices(files: Sequence[Sent], folder: Path, limits: Limits) -> Path:
    """Put slices, the files of a series, or the members of an archive into a folder of the case."""
    case = folder / "upload"
    case.mkdir()
    names = _write_all(files, case, limits)
    parents = {PurePosixPath(name).parent.name for name in names}
    slices = filter(None, (SLICE_NAME.match(path.name) for path in sorted(case.iterdir())))
    stem = next((match["stem"] for match in slices), "")
    name = stem or (parents.pop() if len(parents) == 1 else "") or Path(_plain(files[0].name)).stem
    return case.rename(folder / _plain(name)) if name != case.name else case


def _place_mask(masks: Sequence[Sent], scan: Path, limits: Limits) -> None:
    """Put the true mask where the reader of the case looks for it."""
    inside = [scan] if scan.is_file() else [path for path in scan.iterdir() if is_scan(path)]
    if len(masks) == 1 and _is_volume(masks[0].name):
        if len(inside) != 1:
            raise ValueError(f"{masks[0].name}: is a volume file, but the images are not")
        plain = _plain(masks[0].name)
        suffix = plain[len(scan_name(Path(plain))) :]
        masks[0].path.rename(inside[0].with_name(f"{scan_name(inside[0])}_mask{suffix}"))
    elif inside:
        raise ValueError(f"{masks[0].name}: send the mask as one volume file on the scan's grid")
    else:
        _write_all(masks, scan, limits)


def _write_all(files: Sequence[Sent], folder: Path, limits: Limits) -> list[str]:
    """Write files, or the members of an archive, side by side; return their names as sent."""
    names, left = [], limits.unpacked
    for file in files:
        try:
            for name, content in _members(file, limits):
                path = folder / _plain(name)
                if path.exists() and path.suffix.lower() in ("", ".dcm", ".ima"):
                    # The series of a study share file names; their headers tell them apart.
                    path = folder / _plain("-".join(PurePosixPath(name).parts))
                if path.exists():
                    raise ValueError(f"{file.name}: {path.name} was sent twice; send one case")
                left -= _write(content, path, left)
                names.append(name)
                if left < 0:
                    most = f"more than {limits.unpacked // MIB} MiB unpacked"
                    raise ValueError(f"{file.name}: {most}; send one case")
        except ValueError:
            raise
        except Exception as error:  # damaged archives raise nearly anything
            if disk_is_full(error):
                raise
            raise ValueError(f"{file.name}: {DAMAGED}") from error
    if not names:
        raise ValueError(f"{files[0].name}: contains no file; send a volume file or slices")
    return names


def _members(file: Sent, limits: Limits) -> Iterator[tuple[str, BinaryIO]]:
    """Yield the file itself, or the files in a zip archive, without hidden ones."""
    if not file.name.lower().endswith(".zip"):
        if not PurePosixPath(file.name).name.startswith("."):
            with open(file.path, "rb") as content:
                yield file.name, content
        return
    try:
        archive = zipfile.ZipFile(file.path)
    except ValueError as error:  # such as a negative offset in the file
        raise zipfile.BadZipFile from error
    with archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if len(members) > limits.files:
            raise ValueError(f"{file.name}: more than {limits.files} files; send one case")
        for member in members:
            parts = PurePosixPath(member.filename.replace("\\", "/")).parts
            linked = stat.S_ISLNK(member.external_attr >> 16)
            if not parts or ".." in parts or parts[0] == "/" or ":" in parts[0] or linked:
                raise ValueError(f"{file.name}: contains a path that leads out of it; zip it again")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{file.name}: {DAMAGED}")
            if not any(part.startswith((".", "__MACOSX")) for part in parts):
                with archive.open(member) as content:
                    yield "/".join(parts), content


def _write(content: BinaryIO, path: Path, most: int) -> int:
    """Copy a file, stopping soon after `most` bytes; return the bytes written."""
    with open(path, "xb") as file:
        while file.tell() <= most and (part := content.read(MIB)):
            file.write(part)
        return file.tell()


def _plain(name: str) -> str:
    """Return the last part of a name, without characters special to a file system."""
    name = re.sub(r"[^\w.()+ -]", "_", re.split(r"[/\\]", name)[-1]).lstrip(". ")
    if len(name.encode()) > 200:
        raise ValueError(f"{name[:40]}…: its name is too long; rename it")
    return name or "upload"


def _is_volume(name: str) -> bool:
    return _plain(name).lower().endswith(SUFFIXES)


def check_alone(path: Path) -> None:
    """Raise ValueError if a file may keep its voxels in another one, which could be the server's.

    Headers must follow their format to the letter, because the readers are more lenient.
    """
    size, suffix = path.stat().st_size, path.suffix.lower()
    with open(path, "rb") as file:
        header = file.read(MIB)
        for place in [0, *(512 << k for k in range(60) if 512 << k < size)]:
            file.seek(place)
            if file.read(len(HDF5)) == HDF5:
                raise ValueError(f"{path}: is an HDF5 file; save it as NIfTI")
    if suffix in (".mhd", ".nhdr"):
        raise ValueError(f"{path}: keeps its voxels in a separate file; save it as .mha or .nrrd")
    is_whole = {".mha": _is_whole_mha, ".nrrd": _is_whole_nrrd}.get(suffix)
    if is_whole and not is_whole(header):
        raise ValueError(f"{path}: keeps its voxels in another file; save it as one file")


def _is_whole_mha(header: bytes) -> bool:
    """Tell whether every line up to ElementDataFile is `name = value`, and that one says LOCAL."""
    for line in header.replace(b"\r\n", b"\n").split(b"\n"):
        field = re.fullmatch(rb"(\w+) ?= ?([ -~\x80-\xff]*)", line)
        if not field:
            return False
        if field[1].lower() == b"elementdatafile":
            return field[1] == b"ElementDataFile" and field[2].strip() == b"LOCAL"
    return False


def _is_whole_nrrd(header: bytes) -> bool:
    """Tell whether the header ends within a MiB and is lines of text that name no data file."""
    lines, end, _ = header.replace(b"\r\n", b"\n").partition(b"\n\n")
    if not end or not lines.startswith(b"NRRD") or re.search(rb"[^\n\t -~\x80-\xff]", lines):
        return False
    names = [line.partition(b":")[0].lower() for line in lines.split(b"\n")]
    return not any(re.sub(rb"[^a-z]", b"", name).endswith(b"datafile") for name in names)


if __name__ == "__main__":
    main()
