#!/usr/bin/env bash
# One NIfTI header means two heads: what ITK and nibabel make of values that the format leaves open.
#
# SimpleITK 2.5.7 (ITK 5.4) and nibabel 5.4.2 on the same small file, with a qform alone:
# 1. pixdim[1] below 0: ITK mirrors the head left to right, without a word; nibabel takes the absolute
#    value, and logs it. Both say 2 mm.
# 2. vox_offset 0: ITK reads the voxels from byte 348, shifted by two voxels of 16 bits; nibabel
#    reads the header itself as voxels: the first is 348.
# 3. scl_slope 0, which means no scaling, with scl_inter 10: ITK adds 10; nibabel does not.
# It hurts whoever reads a file with one and draws or measures with the other. What helps: refuse
# spacings that are not above 0, and voxels that would start inside the header.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet SimpleITK==2.5.7 nibabel==5.4.2 numpy
"$folder/venv/bin/python" - "$folder/a.nii" <<'PYTHON'
import sys

import nibabel
import numpy as np
import SimpleITK as sitk

affine = np.diag([2.0, 2.0, 6.0, 1.0])  # to the right, to the front and up
image = nibabel.Nifti1Image(np.arange(120, dtype=np.int16).reshape(4, 5, 6), affine)
image.set_qform(affine, 1)
image.set_sform(None, 0)
content = image.to_bytes()


def first(**fields):
    """Return, by ITK and by nibabel, along which axis x runs (1: right), and the first voxels."""
    header = nibabel.Nifti1Header(content[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    with open(sys.argv[1], "wb") as file:
        file.write(header.binaryblock + content[348:])
    itk, other = sitk.ReadImage(sys.argv[1]), nibabel.load(sys.argv[1])
    voxels = sitk.GetArrayFromImage(itk).ravel()[:3], np.asarray(other.dataobj).ravel("F")[:3]
    right = -itk.GetDirection()[0], float(np.sign(other.affine[0, 0]))
    print(fields, "ITK:", right[0], voxels[0], "nibabel:", right[1], voxels[1])
    return right, voxels[0].tolist(), voxels[1].tolist()


same = first() == ((1, 1), [0, 30, 60], [0, 30, 60])
mirrored = first(pixdim=[1, -2, 2, 6, 1, 1, 1, 1])[0] == (-1, 1)
offset = first(vox_offset=0)[1:] == ([0, 0, 0], [348, 0, 0])
inter = first(scl_slope=0, scl_inter=10)[1:] == ([10, 40, 70], [0, 30, 60])
sys.exit(0 if same and mirrored and offset and inter else 1)
PYTHON
