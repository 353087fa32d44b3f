"""Names by content: the SHA-256 of weights files, in their names and in those of runs."""

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path

# Eight digits at the end of a name; without a letter, they are a date or a job's number.
HASH = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8})$")


def file_hash(path: Path | str) -> str:
    """Compute the SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def named_by_hash(folder: Path, stem: str, suffix: str, content: bytes | memoryview) -> Path:
    """Name a file after the first eight digits of the SHA-256 of its content."""
    return folder / f"{stem}-{hashlib.sha256(content).hexdigest()[:8]}{suffix}"


def contradicts_name(path: Path | str, content: bytes) -> bool:
    """Tell whether the name of a file ends in a hash that is not the one of its content."""
    named = HASH.search(Path(path).stem)
    return named is not None and not hashlib.sha256(content).hexdigest().startswith(named[1])


def weights_id(hashes: Collection[str]) -> str:
    """Return eight digits that name weights files with these SHA-256; of one, its first ones."""
    if len(hashes) == 1:
        return next(iter(hashes))[:8]
    return _first_digits(" ".join(hashes))


def run_name(hashes: Collection[str], settings: Sequence[object]) -> str:
    """Name weights files, by their SHA-256, and the settings that make a mask; empty for none."""
    if not hashes:
        return ""
    return f"{weights_id(hashes)}-{_first_digits(json.dumps(settings))}"


def _first_digits(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
