"""Unpack an upload into a folder, as a case that the readers find, in the process of uploads.py."""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from brainseg.io.archives import DAMAGED, is_hidden, open_archive
from brainseg.io.files import disk_is_full
from brainseg.io.formats import SUFFIXES, is_scan, scan_name
from brainseg.io.opening import SeveralStudies, find_case, find_sequences
from brainseg.io.slices import SLICE_NAME, Case
from brainseg.io.studies import Study, find_studies, mr_series

MIB = 2**20
MOST_FOLDERS = 8  # that are kept of the path of a DICOM file
HDF5 = b"\x89HDF\r\n\x1a\n"  # at byte 0, 512, 1024, 2048 ...; its data may be in other files


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


def unpack(parts: dict[str, list[Sent]], folder: Path, limits: Limits) -> Case | list[Study]:
    """Arrange the files of an upload as a case in an empty folder, and return the case.

    `parts` holds `images` (a volume file, slices, the files of a DICOM series, or a zip archive of
    one of these), or one volume file each of `flair`, `pre` and `post`; perhaps also `mask`. If
    they hold several DICOM studies, return these, each moved as by `separate`. Raises ValueError,
    naming the file.
    """
    images, masks = parts.get("images", []), parts.get("mask", [])
    sequences = {name: parts[name] for name in ("flair", "pre", "post") if name in parts}
    placed: dict[str, Path] = {}
    names: dict[str, str] = {}
    if sequences and images:
        raise ValueError("images was sent along with flair, pre or post; send one or the other")
    if sequences:
        placed = _place_sequences(sequences, folder)
        place = placed["flair"]
    elif not images:
        raise ValueError("no scan was sent; send a volume file, slices, or a zip archive of either")
    elif len(images) == 1 and _is_volume(images[0].name):
        place = images[0].path.rename(folder / plain(images[0].name))
    else:
        place, names = _place_slices(images, folder, limits)
    if masks:
        _place_mask(masks, place, limits)
    for path in folder.rglob("*"):
        if path.is_file():
            check_alone(path)
    if not sequences:
        try:
            return find_case(place)
        except SeveralStudies:
            return separate(place, names, folder.parent)
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
        placed[name] = files[0].path.rename(folder / name / plain(files[0].name))
    return placed


def separate(place: Path, names: Mapping[str, str], folder: Path) -> list[Study]:
    """Move the k-th DICOM study of an upload to `folder`/<k>/received/<its name>; return them.

    The files lie side by side in `place`, and have `names` as sent. Studies are named as
    inference.py names them in folders; other files stay, and so do studies without MR beside MR.
    """
    tree = folder / "tree" / place.name
    common = _common_folder(names.values())
    for file, name in names.items():
        parts = PurePosixPath(name).relative_to(common).parts[:-1]
        # Readers pass over folders with a name such as _a or .a.
        above = [plain(part).lstrip("_") or "folder" for part in parts[:MOST_FOLDERS]]
        tree.joinpath(*above).mkdir(parents=True, exist_ok=True)
        (place / file).rename(tree.joinpath(*above, file))
    studies = find_studies(tree)
    with_mr = [study for study in studies if study.damaged or mr_series(study)]
    separated = []
    for k, study in enumerate(with_mr or studies):
        study = replace(study, name=plain(study.name))
        paths = list(study.damaged)
        for series in study.series:
            paths += series.files
        for path in paths:
            target = folder / str(k) / "received" / study.name / path.relative_to(tree)
            if path.exists():  # a damaged file may count for several studies
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
        separated.append(study)
    return separated


def _place_slices(
    files: Sequence[Sent], folder: Path, limits: Limits
) -> tuple[Path, dict[str, str]]:
    """Put slices, DICOM files or the members of an archive into a folder; return it, and `names`.

    `names` are those that the files were sent with, by those that they have there.
    """
    case = folder / "upload"
    case.mkdir()
    names = _write_all(files, case, limits)
    return case.rename(folder / plain(_case_name(case, names.values(), files[0].name))), names


def _case_name(case: Path, names: Collection[str], first: str) -> str:
    """Name a case after its slices, the folder that all of its files are in, or its first file."""
    for path in sorted(case.iterdir()):
        match = SLICE_NAME.match(path.name)
        if match:
            return match["stem"]
    common = _common_folder(names)
    if common:
        return PurePosixPath(common).name
    if _is_volume(first):
        return scan_name(Path(plain(first)))
    return Path(plain(first)).stem


def _common_folder(names: Collection[str]) -> str:
    return os.path.commonpath([PurePosixPath(name).parent for name in names])


def _place_mask(masks: Sequence[Sent], scan: Path, limits: Limits) -> None:
    """Put the true mask where the reader of the case looks for it."""
    inside = [scan]
    if scan.is_dir():
        inside = [path for path in scan.iterdir() if is_scan(path)]
    if len(masks) == 1 and _is_volume(masks[0].name):
        if len(inside) != 1:
            raise ValueError(f"{masks[0].name}: is one volume file, but the images are not")
        name = plain(masks[0].name)
        suffix = name[len(scan_name(Path(name))) :]
        masks[0].path.rename(inside[0].with_name(f"{scan_name(inside[0])}_mask{suffix}"))
    elif inside:
        raise ValueError(f"{masks[0].name}: send the mask as one volume file on the scan's grid")
    else:
        _write_all(masks, scan, limits)


def _write_all(files: Sequence[Sent], folder: Path, limits: Limits) -> dict[str, str]:
    """Write files, or the members of an archive, side by side; return their names as sent.

    Of several archives, each counts as a folder.
    """
    names: dict[str, str] = {}  # by the names of the files written
    left = limits.unpacked
    for file in files:
        try:
            for name, content in _members(file, limits):
                path = folder / plain(name)
                if path.exists() and not SLICE_NAME.match(path.name) and not _is_volume(path.name):
                    # The series of a study share file names; their headers tell them apart.
                    path = folder / f"{len(names)}-{path.name}"
                if path.exists():
                    raise ValueError(
                        f"{file.name}: {path.name} was sent twice, or for two cases; send one case"
                    )
                left -= _write(content, path, left)
                names[path.name] = name
                if len(files) > 1 and file.name.lower().endswith(".zip"):
                    names[path.name] = f"{Path(plain(file.name)).stem}/{name}"
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


def _members(file: Sent, limits: Limits) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the file itself, or the files in a zip archive, without hidden ones."""
    if not file.name.lower().endswith(".zip"):
        parts = re.split(r"[/\\]+", file.name)
        if not is_hidden(parts):
            with open(file.path, "rb") as content:
                yield "/".join(part for part in parts if part), content
        return
    with open_archive(file.path, file.name) as (archive, members):
        if len(members) > limits.files:
            raise ValueError(f"{file.name}: more than {limits.files} files; send one case")
        for name, member in members.items():
            with archive.open(member) as content:
                yield name, content


def _write(content: IO[bytes], path: Path, most: int) -> int:
    """Copy a file, stopping soon after `most` bytes; return the bytes written."""
    with open(path, "xb") as file:
        part = content.read(MIB)
        while part and file.tell() <= most:
            file.write(part)
            part = content.read(MIB)
        return file.tell()


def plain(name: str) -> str:
    """Return the last part of a name, without characters special to a file system."""
    name = re.sub(r"[^\w.()+ -]", "_", re.split(r"[/\\]", name)[-1]).lstrip(". ")
    if len(name.encode()) > 200:
        raise ValueError(f"{name[:40]}…: its name is too long; rename it")
    return name or "upload"


def _is_volume(name: str) -> bool:
    return plain(name).lower().endswith(SUFFIXES)


def check_alone(path: Path) -> None:
    """Raise ValueError if a file may keep its voxels in another one, such as the server's."""
    # Headers must follow their format to the letter, because the readers are more lenient.
    suffix = path.suffix.lower()
    with open(path, "rb") as file:
        header = file.read(MIB)
        place = 0
        while place < path.stat().st_size:
            file.seek(place)
            if file.read(len(HDF5)) == HDF5:
                raise ValueError(f"{path}: is an HDF5 file; save it as NIfTI")
            place = max(512, 2 * place)
    if suffix in (".mhd", ".nhdr"):
        raise ValueError(f"{path}: keeps its voxels in a separate file; save it as .mha or .nrrd")
    split_mha = suffix == ".mha" and not _is_whole_mha(header)
    split_nrrd = suffix == ".nrrd" and not _is_whole_nrrd(header)
    if split_mha or split_nrrd:
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
