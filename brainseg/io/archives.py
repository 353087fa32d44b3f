"""Zip archives: which of their files may be read, and unpacking them into a temporary folder."""

import os
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from .files import ARCHIVES, clear_leftovers, disk_is_full, scratch

DAMAGED = "is damaged, encrypted or compressed in an unsupported way; zip it again"
ENCRYPTED = 1  # of the flags of a member
GIB = 2**30


@contextmanager
def open_archive(path: Path, name: str) -> Iterator[tuple[zipfile.ZipFile, dict]]:
    """Open a zip archive; yield it and its members by their path in it, without hidden ones.

    Raises ValueError, calling it `name`, if it is damaged or holds a link, an encrypted file or a
    path that leads out of it.
    """
    try:
        archive = zipfile.ZipFile(path)
    except OSError:
        raise
    except Exception as error:  # damaged archives raise nearly anything
        raise ValueError(f"{name}: {DAMAGED}") from error
    with archive:
        members = {}
        for member in archive.infolist():
            if member.is_dir():
                continue
            parts = PurePosixPath(member.filename.replace("\\", "/")).parts
            linked = stat.S_ISLNK(member.external_attr >> 16)
            if not parts or ".." in parts or parts[0] == "/" or ":" in parts[0] or linked:
                raise ValueError(f"{name}: contains a path that leads out of it; zip it again")
            supported = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if member.flag_bits & ENCRYPTED or not supported:
                raise ValueError(f"{name}: {DAMAGED}")
            if is_hidden(parts):
                continue
            inside = "/".join(parts)
            if inside in members:
                raise ValueError(f"{name}: contains {inside} twice; zip it again")
            members[inside] = member
        yield archive, members


def is_hidden(parts: Sequence[str]) -> bool:
    """Tell whether a file, or a folder on the way to it, is hidden; `..` counts as hidden."""
    return any(part.startswith((".", "__MACOSX")) for part in parts)


@contextmanager
def unpacked(path: Path, processes: int = 1) -> Iterator[Path]:
    """Unpack a zip archive into a temporary folder, or yield any other path as it is.

    One folder that holds all is yielded itself. Files have the archive's time. Messages name the
    archive and the place in it (`with_archives`). Raises ValueError if it is damaged, unsafe or
    too large, or if several `processes` would have to share it.
    """
    if path.suffix.lower() != ".zip" or not path.is_file():
        yield path
        return
    if processes > 1:
        raise ValueError(
            f"{path}: several processes cannot share an archive; unpack it, and name its folder "
            "with --images"
        )
    parent = Path(tempfile.gettempdir()).resolve()
    clear_leftovers(parent)
    with scratch(parent) as temporary:
        folder = temporary / path.stem
        folder.mkdir()
        ARCHIVES[str(folder)] = str(path)
        _extract(path, folder)
        inside = list(folder.iterdir())
        if len(inside) == 1 and inside[0].is_dir() and not inside[0].name.startswith("sub-"):
            folder = inside[0]
        yield folder


def _extract(path: Path, folder: Path) -> None:
    with open_archive(path, str(path)) as (archive, members):
        if not members:
            raise ValueError(f"{path}: contains no file; give an archive of cases")
        needed = sum(member.file_size for member in members.values())
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise ValueError(
                f"{path}: needs {needed / GIB:.1f} GiB unpacked, but {folder.parent.parent} has "
                f"{free / GIB:.1f}; unpack it elsewhere, or name a larger disk in TMPDIR"
            )
        time = path.stat().st_mtime_ns
        try:
            for name, member in members.items():
                member.filename = name
                os.utime(archive.extract(member, folder), ns=(time, time))
        except Exception as error:  # damaged archives raise nearly anything
            if disk_is_full(error):
                raise
            raise ValueError(f"{path}: {DAMAGED}") from error
