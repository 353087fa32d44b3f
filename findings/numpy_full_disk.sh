#!/usr/bin/env bash
# numpy.save and ndarray.tofile lose the last bytes of a file on a full disk, without an error.
#
# NumPy 2.4.6, tifffile 2026.3.3, Linux: the array goes through a buffer of the C library (fwrite);
# that the last of it could not be written shows only when the buffer is flushed, and this error is
# dropped. If more is missing, there is an OSError, but its errno is None, so code that compares it
# with ENOSPC misses it. tifffile.imwrite writes uncompressed images by tofile.
# It hurts whoever trusts that a file is whole because np.save or imwrite returned.
# What helps: write into io.BytesIO and let Python write that, or open the file with "w+b", for
# which numpy.save does not use tofile.
# The full disk is played by a limit on the size of a file (RLIMIT_FSIZE).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 tifffile==2026.3.3
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import resource
import sys
from pathlib import Path

import numpy as np
import tifffile

path = Path(sys.argv[1], "file")


def attempt(write, size):
    """Write to a disk that holds `size` bytes; tell what was said, and how much was kept."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    said = "no error"
    try:
        write()
    except OSError as error:
        said = f"{error}, errno {error.errno}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return said


def save():
    with open(path, "wb") as file:
        np.save(file, array)


def save_by_python():
    with open(path, "w+b") as file:
        np.save(file, array)


array = np.ones(100_000, np.uint8)
image = array.reshape(400, 250)
seen = []
for name, write in (
    ("numpy.save", save),
    ("tifffile.imwrite", lambda: tifffile.imwrite(path, image)),
    ("numpy.save to a file opened with w+b", save_by_python),
):
    write()
    whole = path.stat().st_size
    for missing in (1, 100, 9000):
        said = attempt(write, whole - missing)
        print(f"{name}, {missing} bytes too many: {said}")
        seen.append(said)
lost = ["no error", "no error", "100000 requested and 91000 written, errno None"]
told = ["[Errno 27] File too large, errno 27"] * 3
sys.exit(0 if seen == lost + lost + told else 1)
PYTHON
