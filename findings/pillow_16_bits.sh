#!/usr/bin/env bash
# Pillow opens 16-bit images with colours, or with opacity, in 8 bits, without a warning.
#
# Of each 16-bit number it keeps the upper half: a TIFF of three sequences from 0 to 4095 comes out
# as 0 to 15, and a PNG mask with opacity whose lesion is 1 comes out empty. 16 bits of grey alone
# are kept, so a test on those misses it. imageio and scikit-image read PNG with Pillow and do the
# same. SimpleITK reads the PNG as it was written if it has colours, and refuses grey with opacity;
# tifffile reads the TIFF as it was written. It hurts whoever keeps scans or masks as 16-bit images:
# the dim tissue, and labels below 256, are gone. Remedy: tifffile for TIFF, SimpleITK for PNG, and
# no opacity in masks. Seen with Pillow 11.3.0 and 12.0.0, imageio 2.37.0, SimpleITK 2.5.2, tifffile
# 2025.5.10.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  numpy==2.2.6 imageio==2.37.0 SimpleITK==2.5.2 tifffile==2025.5.10 pypng==0.20220715.0
cat >"$folder/look.py" <<'PYTHON'
import sys

import imageio.v3 as iio
import numpy as np
import png
import SimpleITK
import tifffile
from PIL import Image

folder = sys.argv[1]
scan = np.linspace(0, 4095, 300).astype(np.uint16).reshape(10, 10, 3)
tifffile.imwrite(f"{folder}/scan.tif", scan)
png.from_array(scan.reshape(10, 30), "RGB;16").save(f"{folder}/scan.png")
mask = np.zeros((10, 10, 2), np.uint16)
mask[2:6, 2:6, 0] = 1
mask[..., 1] = 65535  # opaque
png.from_array(mask.reshape(10, 20), "LA;16").save(f"{folder}/mask.png")

seen = {
    "scan.tif by Pillow": int(np.asarray(Image.open(f"{folder}/scan.tif")).max()),
    "scan.tif by tifffile": int(tifffile.imread(f"{folder}/scan.tif").max()),
    "scan.png by Pillow": int(np.asarray(Image.open(f"{folder}/scan.png")).max()),
    "scan.png by imageio": int(iio.imread(f"{folder}/scan.png").max()),
    "mask.png by Pillow": int(np.asarray(Image.open(f"{folder}/mask.png"))[..., 0].max()),
    "mask.png by imageio": int(iio.imread(f"{folder}/mask.png")[..., 0].max()),
}
image = SimpleITK.ReadImage(f"{folder}/scan.png")
seen["scan.png by SimpleITK"] = int(SimpleITK.GetArrayFromImage(image).max())
try:
    SimpleITK.ReadImage(f"{folder}/mask.png")
    seen["mask.png by SimpleITK"] = "read"
except RuntimeError:
    seen["mask.png by SimpleITK"] = "refused"
print(seen)
expected = [15, 4095, 15, 15, 0, 0, 4095, "refused"]
sys.exit(list(seen.values()) != expected)
PYTHON
for version in 11.3.0 12.0.0; do
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "pillow==$version"
  echo "Pillow $version: largest numbers, 4095 in the scan and 1 in the mask"
  "$folder/venv/bin/python" "$folder/look.py" "$folder"
done
