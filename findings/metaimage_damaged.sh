#!/usr/bin/env bash
# SimpleITK reads a damaged compressed MetaImage without an error.
#
# A .mha whose voxels are compressed carries zlib's own checksum. If one byte in the middle has
# changed, as by a bad disk or copy, ITK's reader does not report it: ReadImage returns an image of
# the right size with other voxels. A .nii.gz that is damaged in the same way is an error for gzip.
# Whoever segments or measures .mha files gets a wrong result without a word; unpack the voxels
# with zlib first to find out. Seen with SimpleITK 2.5.7, numpy 2.2.6, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet SimpleITK==2.5.7 numpy==2.2.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import sys
import zlib

import numpy as np
import SimpleITK as sitk

random = np.random.default_rng(0)
voxels = random.integers(0, 200, (8, 32, 32)).astype(np.uint8)
sitk.WriteImage(sitk.GetImageFromArray(voxels), "head.mha", useCompression=True)
content = bytearray(open("head.mha", "rb").read())
start = content.index(b"\n", content.index(b"ElementDataFile")) + 1
content[(start + len(content)) // 2] ^= 0xFF
open("damaged.mha", "wb").write(content)

try:
    zlib.decompress(bytes(content[start:]))
    by_zlib = "read"
except zlib.error:
    by_zlib = "error"
try:
    image = sitk.GetArrayFromImage(sitk.ReadImage("damaged.mha"))
    by_itk = "read"
    wrong = int((image != voxels).sum())
except RuntimeError:
    by_itk = "error"
    wrong = 0
print(f"zlib: {by_zlib}; SimpleITK: {by_itk}, {wrong} of {voxels.size} voxels are other ones")
sys.exit(not (by_zlib == "error" and by_itk == "read" and wrong > 0))
PY
