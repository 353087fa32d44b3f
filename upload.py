"""Files from strangers: unpacked where they can do no harm, and read by a process of its own."""

from __future__ import annotations

import multiprocessing
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from cases import SLICE_NAME, find_case, find_sequences
from scan import SUFFIXES, Scan, is_scan, scan_name
from utils import sentence
from volume import Case

MIB = 2**20
SEQUENCES = ("flair", "pre", "post")


@dataclass(frozen=True)
class Limits:
    """What one upload may take of the machine."""

    upload: int = 256 * MIB  # bytes sent
    unpacked: int = 1024 * MIB  # bytes of the files in an archive
    files: int = 2048
    voxels: int = 2**26  # of a volume, each sequence: 512 x 512 x 256
    memory: int = 4096 * MIB  # bytes of the process that reads
    seconds: float = 300.0  # for reading, and again for segmenting


@dataclass(frozen=True)
class Named:
    """A file as it was sent: the name it came with and its content."""

    name: str
    content: BinaryIO


def store(parts: dict[str, Sequence[Named]], folder: Path, limits: Limits) -> Path | Scan:
    """Put an upload into an empty folder; gives the case's place, for `read`.

    `parts` has the files of `images` (a volume file, or slices, or the files of a DICOM series, or
    a zip archive of one of these), or one volume file each of `flair`, `pre` and `post`; and maybe
    of `mask` (a volume file, or the masks of the slices). Raises ValueError, naming the file.
    """
    images, masks = parts.get("images", ()), parts.get("mask", ())
    sequences = {name: parts[name] for name in SEQUENCES if parts.get(name)}
    if sequences:
        scan = _store_sequences(sequences, images, folder)
    elif not images:
        raise ValueError("no file came; send a volume file, slices, or a zip archive of either")
    elif len(images) == 1 and _is_volume(images[0].name):
        scan = _write(images[0].content, folder / _plain(images[0].name))
    else:
        scan = _store_slices(images, folder, limits)
    if masks:
        _store_mask(masks, scan, limits)
    for path in folder.rglob("*"):
        _check_alone(path)
    if not sequences:
        return scan
    return find_sequences(*(next((folder / name).iterdir(), None) for name in SEQUENCES))


def _store_sequences(
    sequences: dict[str, Sequence[Named]], images: Sequence[Named], folder: Path
) -> Path:
    """Write each sequence to a folder of its own; gives the file of FLAIR."""
    if images:
        raise ValueError("images came beside flair, pre or post; send the one or the others")
    if "flair" not in sequences:
        raise ValueError("flair is missing; it is the sequence that the lesion is seen on")
    for name in SEQUENCES:
        (folder / name).mkdir()
    for name, files in sequences.items():
        if len(files) > 1 or not _is_volume(files[0].name):
            raise ValueError(f"{name}: send one volume file ({', '.join(SUFFIXES)})")
        _write(files[0].content, folder / name / _plain(files[0].name))
    return next((folder / "flair").iterdir())


def _store_slices(files: Sequence[Named], folder: Path, limits: Limits) -> Path:
    """Write slices, the files of a series, or what is in an archive, to a folder of the case."""
    case = folder / "upload"
    case.mkdir()
    names = _write_all(files, case, limits)
    parents = {PurePosixPath(name).parent.name for name in names}
    slices = filter(None, (SLICE_NAME.match(path.name) for path in sorted(case.iterdir())))
    stem = next((match["stem"] for match in slices), "")
    name = stem or (parents.pop() if len(parents) == 1 else "") or Path(_plain(files[0].name)).stem
    return case.rename(folder / _plain(name)) if name != case.name else case


def _store_mask(masks: Sequence[Named], scan: Path, limits: Limits) -> None:
    """Put a true mask where the reader of the case looks for it."""
    inside = [scan] if scan.is_file() else [path for path in scan.iterdir() if is_scan(path)]
    if len(masks) == 1 and _is_volume(masks[0].name):
        if len(inside) != 1:
            raise ValueError(f"{masks[0].name}: is a volume file, but the images are not")
        plain = _plain(masks[0].name)
        suffix = plain[len(scan_name(Path(plain))) :]
        path = inside[0].with_name(f"{scan_name(inside[0])}_mask{suffix}")
        path.unlink(missing_ok=True)
        _write(masks[0].content, path)
    elif inside:
        raise ValueError(f"{masks[0].name}: send the mask as one volume file on the scan's grid")
    else:
        _write_all(masks, scan, limits)


def _write_all(files: Sequence[Named], folder: Path, limits: Limits) -> list[str]:
    """Write files, or the members of an archive, side by side; their names as they were sent."""
    names, size = [], 0
    for file in files:
        try:
            for name, content in _members(file, limits):
                if len(names) == limits.files:
                    raise ValueError(f"{file.name}: more than {limits.files} files; send one case")
                path = folder / _plain(name)
                if path.exists():
                    raise ValueError(f"{file.name}: {path.name} is there twice; send one case")
                _write(content, path, limits.unpacked - size)
                size += path.stat().st_size
                names.append(name)
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as e:
            raise ValueError(
                f"{file.name}: is damaged, encrypted or of an odd kind; zip it again"
            ) from e
    if not names:
        raise ValueError(f"{files[0].name}: holds no file")
    return names


def _members(file: Named, limits: Limits) -> Iterator[tuple[str, BinaryIO]]:
    """The file itself, or the files in it if it is a zip archive, hidden ones left out."""
    if not file.name.lower().endswith(".zip"):
        yield file.name, file.content
        return
    with zipfile.ZipFile(file.content) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if len(members) > limits.files:
            raise ValueError(f"{file.name}: more than {limits.files} files; send one case")
        if sum(member.file_size for member in members) > limits.unpacked:
            raise ValueError(_too_large(file.name, limits.unpacked))
        for member in members:
            parts = PurePosixPath(member.filename.replace("\\", "/")).parts
            linked = stat.S_ISLNK(member.external_attr >> 16)
            if ".." in parts or parts[0] == "/" or ":" in parts[0] or linked:
                raise ValueError(f"{file.name}: holds a path that leads out of it; zip it again")
            if not any(part.startswith((".", "__MACOSX")) for part in parts):
                with archive.open(member) as content:
                    yield "/".join(parts), content


def _write(content: BinaryIO, path: Path, most: int | None = None) -> Path:
    """Copy what was sent to a file, `most` bytes of it at most."""
    with open(path, "xb") as file:
        while part := content.read(MIB):
            file.write(part)
            if most is not None and file.tell() > most:
                raise ValueError(_too_large(path.name, most))
    return path


def _too_large(name: str, most: int) -> str:
    return f"{name}: more than {most // MIB} MiB unpacked; send one case"


def _plain(name: str) -> str:
    """The last part of a name, without anything that means something to a file system."""
    name = re.sub(r"[^\w.()+ -]", "_", re.split(r"[/\\]", name)[-1]).lstrip(". ")
    if len(name.encode()) > 200:
        raise ValueError(f"{name[:40]}…: its name is too long; rename it")
    return name or "upload"


def _is_volume(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _check_alone(path: Path) -> None:
    """Raise ValueError if a file's voxels lie in another file, which could be one of the server."""
    suffix = path.suffix.lower()
    if suffix == ".mhd":
        raise ValueError(f"{path}: keeps its voxels in a file of its own; save it as .mha or .nrrd")
    if not path.is_file() or suffix not in (".mha", ".nrrd"):
        return
    with open(path, "rb") as file:
        header = file.read(MIB).lower()
    if suffix == ".nrrd":
        header = re.split(rb"\r?\n\r?\n", header)[0]
        elsewhere = re.search(rb"^\s*data ?file\s*:", header, re.M)
    else:
        places = re.findall(rb"elementdatafile\s*=\s*([^\r\n]*)", header)
        elsewhere = not places or places[0].strip() != b"local"
    if elsewhere:
        raise ValueError(f"{path}: keeps its voxels in another file; save it as one file")


@dataclass(frozen=True)
class Loaded:
    case: Case
    volume: np.ndarray  # (S, H, W, C)
    truth: np.ndarray | None  # (S, H, W) bool


def read(place: Path | Scan, scratch: Path, limits: Limits) -> Loaded:
    """Read a case in a process that has bounded memory and time, and may break down.

    The readers are large libraries in C and C++, and the files come from strangers. Raises
    ValueError, naming the file, if it cannot be used.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["__main__", "upload"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_read, args=(place, scratch, limits, sender), daemon=True)
    process.start()
    sender.close()
    name = place.name if isinstance(place, Path) else place.folder.name
    try:
        if not receiver.poll(limits.seconds):
            raise ValueError(f"{name}: reading it took more than {limits.seconds:.0f} s")
        answer = receiver.recv()
    except EOFError as error:
        raise ValueError(
            f"{name}: its reader broke down; it is damaged, or too large: export it again"
        ) from error
    finally:
        process.kill()
        process.join()
        receiver.close()
    if isinstance(answer, str):
        raise ValueError(answer)
    volume = np.load(scratch / "volume.npy")
    truth = np.load(scratch / "truth.npy") if answer.masks else None
    return Loaded(answer, volume, truth)


def _read(place: Path | Scan, scratch: Path, limits: Limits, sender: Connection) -> None:
    """In the process: send the case, its voxels saved beside, or what is wrong with its files."""
    try:
        _bound(limits)
        case = find_case(place) if isinstance(place, Path) else place
        if isinstance(case, Scan):
            _check_size(case.folder, np.prod(case.grid.shape, dtype=float), case.channels, limits)
        volume, truth = case.read_pair() if case.masks else (case.read(), None)
        _check_size(case.folder, np.prod(volume.shape[:3], dtype=float), volume.shape[3], limits)
        np.save(scratch / "volume.npy", volume)
        if truth is not None:
            np.save(scratch / "truth.npy", truth)
        sender.send(case)
    except (ValueError, OSError) as error:
        sender.send(sentence(error))
    except MemoryError:
        sender.send(f"{place}: needs more than {limits.memory // MIB} MiB to read; crop it")


def _bound(limits: Limits) -> None:
    """Bound this process in memory, time and the files it writes, where the system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, most in (
        (resource.RLIMIT_DATA, limits.memory),
        (resource.RLIMIT_CPU, int(limits.seconds) + 1),
        (resource.RLIMIT_FSIZE, limits.memory),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def _check_size(path: Path, voxels: float, channels: int, limits: Limits) -> None:
    if voxels > limits.voxels:
        raise ValueError(
            f"{path}: {voxels / 1e6:.0f} million voxels, of which {limits.voxels / 1e6:.0f} can "
            "be taken; crop or resample it"
        )
    if channels > 4:
        raise ValueError(f"{path}: {channels} channels; give pre-contrast, FLAIR, post-contrast")
