"""Files written whole or not at all, the folder of the cache, and errors that name their file."""

from __future__ import annotations

import csv
import errno
import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary file beside `path`; rename it to `path` when the block has succeeded.

    If the block fails or the disk is full, a file that was at `path` is left untouched.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: is not a file that can be replaced; name another")
    with name_in_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stem, *_ = path.name.partition(".")
        # Keep the suffix, such as .nii.gz, which writers need; respect the umask, unlike mkstemp.
        temporary = path.with_name(f".{stem}-{secrets.token_hex(8)}{path.name[len(stem) :]}")
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_table(path: Path, rows: Sequence[dict]) -> None:
    """Write dicts as the rows of a CSV file, atomically; a key that a row lacks is left empty.

    A list is written as its items, separated by spaces.
    """

    def text(value: object) -> object:
        if isinstance(value, list):
            return " ".join(map(str, value))
        return f"{value:.6g}" if isinstance(value, float) else value

    options = {"newline": "", "encoding": "utf-8"}
    with atomic_write(path) as temporary, open(temporary, "w", **options) as file:
        table = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row))
        table.writeheader()
        table.writerows({key: text(value) for key, value in row.items()} for row in rows)


def read_table(path: Path) -> dict[str, dict[str, str]]:
    """Read the rows of a CSV file by case; empty if it is missing or not such a table."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, restval=""))
        return {row["case"]: row for row in rows if None not in row}
    except (OSError, ValueError, KeyError, csv.Error):
        return {}


def update_table(path: Path, rows: dict[str, dict | None], keep: bool) -> None:
    """Write rows by case as a CSV file; with `keep`, its rows of other cases stay.

    A case whose row is None loses its row. If no row is left, no file is.
    """
    rows = (read_table(path) if keep else {}) | rows
    if lines := [row for row in rows.values() if row]:
        write_table(path, lines)
    else:
        path.unlink(missing_ok=True)


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


def check_writable(folder: Path) -> None:
    """Create `folder` if needed; raises OSError, naming it, if no file can be written in it."""
    with name_in_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def default_cache() -> Path:
    """Return the default folder for preprocessed volumes."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "brainseg"
    try:
        return Path.home() / ".cache" / "brainseg"
    except RuntimeError:  # a user without a home, as in a container
        return Path(tempfile.gettempdir()) / "brainseg"


def sentence(error: BaseException | str) -> str:
    """Return an error's message as one sentence that names its file."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror.lower()}"
    return str(error)


def by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
