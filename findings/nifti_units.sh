#!/usr/bin/env bash
# nibabel says mm and mm3, and gives numbers in whatever unit the NIfTI header names.
#
# A NIfTI header names its unit of length (xyzt_units): metre, millimetre, micron or none. For one
# cube of 10 mm, written with voxels of 1 mm, of 0.001 m or of 1000 micron, SimpleITK 2.5.7 gives
# spacings of 1 mm each time. nibabel 5.4.2 does not look at the unit: imagestats.mask_volume, whose
# result is "expressed in mm3", says 1000, 0.000001 and a million million; processing.smooth_image,
# whose width is "in mm", smooths by 2 mm, by 2 m (all of the cube is gone) and by 2 micron (nothing
# changes). No warning is given. It hurts whoever measures or smooths a file that is not in mm, as of
# a microscope. What helps: scale the affine to mm by img.header.get_xyzt_units() first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet SimpleITK==2.5.7 nibabel==5.4.2 scipy==1.15.3 numpy
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import nibabel
import numpy as np
import SimpleITK as sitk
from nibabel.imagestats import mask_volume
from nibabel.processing import smooth_image

cube = np.zeros((30, 30, 30), np.float32)
cube[10:20, 10:20, 10:20] = 1
seen = []
for unit, length in (("mm", 1.0), ("meter", 0.001), ("micron", 1000.0)):
    image = nibabel.Nifti1Image(cube, np.diag([length, length, length, 1]))
    image.header.set_xyzt_units(unit, "sec")
    path = f"{sys.argv[1]}/{unit}.nii"
    nibabel.save(image, path)
    image = nibabel.load(path)
    spacing = sitk.ReadImage(path).GetSpacing()[0]
    volume = float(mask_volume(image))
    highest = float(smooth_image(image, 2).get_fdata()[15, 15, 15])
    corner = float(smooth_image(image, 2).get_fdata()[10, 10, 10])
    seen.append((round(spacing, 3), f"{volume:.1e}", round(highest, 2), round(corner, 2)))
    print(f"{unit:6} SimpleITK: spacing {spacing:.3f} mm; nibabel: {volume:.1e} mm3;", end=" ")
    print(f"smoothed by 2: {highest:.2f} in the middle, {corner:.2f} in a corner")
expected = [(1.0, "1.0e+03", 1.0, 0.4), (1.0, "1.0e-06", 0.0, 0.0), (1.0, "1.0e+12", 1.0, 1.0)]
sys.exit(seen != expected)
PYTHON
