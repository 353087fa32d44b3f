#!/usr/bin/env bash
# SimpleITK before 2.5.6 reads an NRRD in left-anterior-superior as if it were right-anterior.
#
# "space: left-anterior-superior" (LAS) is one of the three named spaces of NRRD. SimpleITK 2.5.5
# negates x as for RAS, so that left and right of the patient are swapped, without an error or a
# warning; 2.5.6 reads it right. In a viewer that shows one file nothing looks wrong. It hurts
# whoever lays such a scan over another, or reads the side of a lesion from it.
# Remedy: SimpleITK 2.5.6 or later.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat >"$folder/origin.py" <<'PYTHON'
import sys

import SimpleITK as sitk

path = f"{sys.argv[1]}/las.nrrd"
lines = (
    "NRRD0004", "type: uint8", "dimension: 3", "sizes: 4 4 4", "encoding: raw",
    "space: left-anterior-superior", "space directions: (2,0,0) (0,-2,0) (0,0,6)",
    "space origin: (-95,95,-45)",
)
with open(path, "wb") as file:
    file.write("\n".join(lines).encode() + b"\n\n" + bytes(64))
image = sitk.ReadImage(path)
print(image.GetOrigin(), image.GetDirection()[:1])  # in LPS: x to the left, as in LAS
PYTHON
seen=""
for version in 2.5.5 2.5.6; do
  "$folder/venv/bin/pip" install -q "SimpleITK==$version"
  line="SimpleITK $version: $("$folder/venv/bin/python" "$folder/origin.py" "$folder")"
  echo "$line"
  seen+="$line;"
done
test "$seen" = "SimpleITK 2.5.5: (95.0, 95.0, -45.0) (-1.0,);SimpleITK 2.5.6: \
(-95.0, -95.0, -45.0) (1.0,);"
