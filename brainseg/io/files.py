"""Files written whole or not at all, deleted only if they are ours, and errors that name them.

Two rules hold for every folder that a user names. What is written lies in a scratch folder until
it is whole, so that a killed run leaves nothing but scratch folders, which say whose they are.
And nothing is deleted or replaced unless its content says that this program wrote it.
"""

from __future__ import annotations

import csv
import errno
import json
import os
import platform
import secrets
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

if TYPE_CHECKING:  # torch.hub's bare network needs torch alone, and filelock comes with it
    import numpy as np

PROGRAM = "brainseg"
MARK = f"written by {PROGRAM}"  # in the text field that each format has for this
OWNER = "owner.json"  # in a scratch folder: the process that it belongs to
USERS = ",;\t"  # what may separate the columns of a table by a user
RUN = f"{PROGRAM}_run"  # the column of every table: the hash of the weights and settings
ENDS = 1 << 16  # bytes at either end of a file in which the mark is looked for
DAY = 86400  # seconds


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary file; move it to `path` if the block succeeds, else leave `path` alone."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: is not a file that can be replaced; name another")
    with name_in_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch(path.parent) as folder:
            temporary = folder / path.name
            yield temporary
            temporary.replace(path)


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """Make a temporary folder of this process, deleted after the block or by `clear_leftovers`."""
    folder = parent / f".{PROGRAM}-{secrets.token_hex(8)}"
    folder.mkdir(mode=0o700)
    try:
        owner = {"program": PROGRAM, "machine": _machine(), "process": os.getpid()}
        (folder / OWNER).write_text(json.dumps(owner))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clear_leftovers(parent: Path) -> None:
    """Delete the scratch folders in `parent` of dead processes; another machine's after a day."""
    for folder in parent.glob(f".{PROGRAM}-*"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            owner = json.loads((folder / OWNER).read_text())
            same_machine = owner["machine"] == _machine()
            dead = same_machine and not _is_running(int(owner["process"]))
            if dead or time.time() - (folder / OWNER).stat().st_mtime > DAY:
                remove(folder)


def _machine() -> str:
    """Name this machine and, in a container, its space of process numbers."""
    with suppress(OSError):
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    return platform.node()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


@contextmanager
def locked(folder: Path, option: str, name: str = "run") -> Iterator[None]:
    """Keep other runs out of `folder`, or out of the files called `name` in it, within the block.

    The lock ends with the process, even a killed one; other machines need a file system that passes
    it on. Raises ValueError, naming the `option` to change, if another run holds it.
    """
    path = folder / f".{PROGRAM}-{name}.lock"  # an empty file, which stays
    mode = folder.stat().st_mode & 0o666  # who may write to the folder must be kept out as well
    lock = FileLock(path, timeout=0, mode=mode)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"{folder}: another run is writing there; wait for it, or name another folder "
            f"with {option}"
        ) from error
    except PermissionError as error:
        raise OSError(
            f"{path}: belongs to another user, whose run may be writing there; name another folder "
            f"with {option}"
        ) from error
    except (OSError, NotImplementedError):  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


def has_mark(path: Path, mark: str = MARK) -> bool:
    """Tell by its content whether this program wrote a file or scratch folder, or it is empty."""
    if path.is_dir():
        try:
            return json.loads((path / OWNER).read_text())["program"] == PROGRAM
        except (OSError, ValueError, KeyError, TypeError):
            return False
    try:
        with open(path, "rb") as file:
            start = file.read(ENDS)
            file.seek(max(0, path.stat().st_size - ENDS))
            end = file.read()
        if start[:2] == b"\x1f\x8b":
            start = zlib.decompressobj(wbits=31).decompress(start, ENDS)  # also of a cut-off file
    except (OSError, zlib.error):
        return False
    if not start:
        return True
    if path.suffix == ".csv":
        return RUN.encode() in start.partition(b"\n")[0]
    return mark.encode() in start or mark.encode() in end


def remove(path: Path, is_ours: Callable[[Path], bool] = has_mark) -> None:
    """Delete a file or folder, if there is one; ValueError if it is not ours by `is_ours`."""
    if not os.path.lexists(path):
        return
    check_ours(path, is_ours)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def check_ours(path: Path, is_ours: Callable[[Path], bool] = has_mark) -> None:
    """Raise ValueError if there is a file or folder that this program did not write."""
    if os.path.lexists(path) and not is_ours(path):
        raise ValueError(
            f"{path}: is in the way, and was not written by this version of {PROGRAM}; move it "
            "elsewhere, or name another place to write to"
        )


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file. Raises OSError if the disk is full.

    `numpy.save` may not: C writes its file, and an error with the last bytes is lost. If the file
    can be read as well, Python writes it.
    """
    import numpy as np

    with open(path, "w+b") as file:
        np.save(file, array)


def write_table(path: Path, rows: Sequence[dict]) -> None:
    """Write dicts as rows of a CSV file, atomically: floats to six digits, lists with spaces."""
    columns = {}
    lines = []
    for row in rows:
        columns.update(row)
        line = dict(row)
        for key, value in row.items():
            if isinstance(value, float):
                line[key] = f"{value:.6g}"
            elif isinstance(value, list):
                line[key] = " ".join(map(str, value))
        lines.append(line)
    with atomic_write(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(columns))
            table.writeheader()
            table.writerows(lines)


def read_table(path: Path) -> dict[str, dict[str, str]]:
    """Read the rows of a CSV file by case, {} if it is missing; ValueError for another table."""
    if not path.exists():
        return {}
    rows = read_rows(path, {"case"}, f"{path}: was changed and cannot be read; move it elsewhere")
    return {row["case"]: row for row in rows}


def read_rows(
    path: Path, columns: set[str], fault: str, separators: str = ","
) -> list[dict[str, str]]:
    """Read the rows of a CSV file; ValueError with `fault` if it lacks one of these columns.

    Of the `separators`, the one that its first line has most is used: those of USERS, for a table
    that a user makes, as Excel writes semicolons in some countries.
    """
    try:
        with name_in_errors(path), open(path, newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            separator = max(separators, key=header.count)
            file.seek(0)
            reader = csv.DictReader(file, restval="", skipinitialspace=True, delimiter=separator)
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
            rows = list(reader)
    except (ValueError, csv.Error) as error:
        raise ValueError(fault) from error
    for row in rows:
        if None in row or not columns <= row.keys():  # None: more values than columns
            raise ValueError(fault)
    return rows


def replace_table(path: Path, rows: Sequence[dict]) -> None:
    """Write rows as `write_table` does; without rows, remove an earlier file."""
    if rows:
        write_table(path, rows)
    else:
        remove(path)


def update_table(path: Path, rows: dict[str, dict | None]) -> None:
    """Write rows by case (None: remove) into a CSV file, sorted; rows of other cases stay."""
    table: dict[str, dict | None] = {**read_table(path), **rows}
    replace_table(path, [row for _, row in sorted(table.items()) if row])


def write_json(path: Path, content: dict) -> None:
    """Write indented JSON, atomically; NaN, which JSON does not have, becomes null."""
    strict = json.loads(json.dumps(content), parse_constant=lambda _: None)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(strict, indent=2) + "\n")


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Make every OSError in the block name `path`, not a temporary file or no file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a sentence of ours, which names its file
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def disk_is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out: of the host (Python, PyTorch, ITK) or of a GPU."""
    # PyTorch raises a RuntimeError; importing it to know its own kind would be slow here.
    if not isinstance(error, RuntimeError):
        return isinstance(error, MemoryError)
    return "out of memory" in str(error) or "allocate memory" in str(error)


def check_writable(folder: Path) -> None:
    """Create `folder` if needed; raises OSError, naming it, if no file can be written in it."""
    with name_in_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def check_page(path: Path) -> None:
    """Raise OSError or ValueError, naming `path`, unless a page can be written there."""
    check_writable(path.parent)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give the file name of the page")
    if path.suffix.lower() not in (".html", ".htm"):  # it may be a mask or a table of this run
        raise ValueError(f"{path}: is not the name of a page; end it in .html")
    check_ours(path)
    clear_leftovers(path.parent)


def default_cache() -> Path:
    """Return the default folder for preprocessed volumes."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / PROGRAM
    try:
        return Path.home() / ".cache" / PROGRAM
    except RuntimeError:  # a user without a home, as in a container
        return Path(tempfile.gettempdir()) / PROGRAM


def sentence(error: BaseException | str) -> str:
    """Return an error's message as one sentence that names its file, without undecodable bytes."""
    message = str(error)
    if isinstance(error, BaseException) and out_of_memory(error):
        message = f"out of memory: {message.splitlines()[0]}" if message else "out of memory"
    if isinstance(error, OSError) and error.strerror and error.filename:
        message = f"{error.filename}: {error.strerror.lower()}"
    return with_archives(message).encode(errors="replace").decode()


# Archives by the temporary folder that each is unpacked into. They stay when it is deleted, as
# errors are told after that.
ARCHIVES: dict[str, str] = {}


def with_archives(text: str) -> str:
    """Replace the folders that archives are unpacked into by the archives, in a path or message."""
    for folder, archive in ARCHIVES.items():
        text = text.replace(folder, archive)
    return text


def by(shape: Iterable[object]) -> str:
    return " x ".join(map(str, shape))
