#!/usr/bin/env bash
# A mask that tifffile wrote from a bool array is its complement in other readers.
#
# tifffile stores True as 1 and tags the image "white is zero" (PhotometricInterpretation 0), by
# which True is black. It reads its own file back as it was, but Pillow honours the tag: of 15 true
# pixels it makes 561, all but these. SimpleITK gives four channels, with 561 in the first. It hurts
# whoever writes lesion masks as bool with tifffile and reads them with another library: lesion and
# background are swapped without a word. Remedy: write mask.astype("uint8") * 255, which is tagged
# "black is zero". Seen with tifffile 2025.5.10 and 2026.3.3, Pillow 12.0.0 and 13.0.0, SimpleITK
# 2.5.2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tifffile==2025.5.10 pillow==12.0.0 simpleitk==2.5.2 numpy==2.2.6
"$folder/venv/bin/python" - "$folder/mask.tif" <<'PYTHON'
import sys

import numpy as np
import SimpleITK
import tifffile
from PIL import Image

path = sys.argv[1]
mask = np.zeros((24, 24), bool)
mask[5:8, 5:10] = True
tifffile.imwrite(path, mask)
itk = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path))
seen = {
    "written": int(mask.sum()),
    "tifffile": int(np.count_nonzero(tifffile.imread(path))),
    "Pillow": int(np.count_nonzero(np.asarray(Image.open(path)))),
    "SimpleITK, first channel": int(np.count_nonzero(itk.reshape(24, 24, -1)[..., 0])),
    "SimpleITK, channels": itk.size // mask.size,
}
print("true pixels:", seen)
sys.exit(list(seen.values()) != [15, 15, 561, 561, 4])
PYTHON
