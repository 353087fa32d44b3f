#!/usr/bin/env bash
# highdicom writes a wrong slice spacing although the right one is given.
#
# Scanners and anonymisers often leave a wrong SpacingBetweenSlices in MR headers, where it is
# optional; the positions of the slices are right. A Segmentation made from a highdicom Volume,
# whose affine says 6 mm, still gets the 1 mm of the source's header: the spacing given is dropped
# for the source's if only PixelSpacing agrees. The frames have the right positions. highdicom
# 0.27.0 and 0.28.2 then read the file back as slices of 1 mm with empty ones between, and dcmqi
# 1.5.7 gives 1 mm too: a sixth of the volume. It hurts whoever measures a lesion in such a file.
# Remedy: set SpacingBetweenSlices of the source images to the real step before they are given.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q highdicom==0.28.2 pydicom==3.0.2 numpy==2.2.6 dcmqi==1.5.7
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import subprocess
import sys
from pathlib import Path

import highdicom
import numpy as np
import pydicom
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

folder = Path(sys.argv[1])
EMPTY = (
    "PatientID PatientName PatientBirthDate PatientSex StudyID StudyDate StudyTime "
    "AccessionNumber ReferringPhysicianName"
).split()


def image(k):
    """Slice k of four, 6 mm apart; its header says 1 mm."""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = MRImageStorage, f"1.2.3.{k + 1}"
    data.StudyInstanceUID, data.SeriesInstanceUID = "1.2", "1.2.3"
    data.FrameOfReferenceUID, data.Modality = "1.2.9", "MR"
    for name in EMPTY:
        setattr(data, name, "")
    data.Rows = data.Columns = 8
    data.PixelSpacing, data.SliceThickness, data.SpacingBetweenSlices = [2, 2], 6, 1
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    data.ImagePositionPatient = [0, 0, 6 * k]
    return data


affine = np.array([[0, 0, 2, 0], [0, 2, 0, 0], [6, 0, 0, 0], [0, 0, 0, 1.0]])
volume = highdicom.Volume(np.ones((4, 8, 8), np.uint8), affine, "PATIENT", "1.2.9")
segment = highdicom.seg.SegmentDescription(
    1, "lesion", codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Lesion, "MANUAL"
)
highdicom.seg.Segmentation(
    source_images=[image(k) for k in range(4)],
    pixel_array=volume,
    segmentation_type="BINARY",
    segment_descriptions=[segment],
    series_instance_uid="1.2.4",
    series_number=1,
    sop_instance_uid="1.2.4.1",
    instance_number=1,
    manufacturer="none",
    manufacturer_model_name="none",
    software_versions="1",
    device_serial_number="1",
).save_as(folder / "seg.dcm")

found = highdicom.seg.segread(folder / "seg.dcm").get_volume(combine_segments=True)
words = ["--inputDICOM", "seg.dcm", "--outputDirectory", ".", "--outputType", "nrrd"]
program = Path(sys.executable).with_name("segimage2itkimage")
subprocess.run([program, *words], cwd=folder, check=True, capture_output=True)
header = (folder / "1.nrrd").read_bytes().split(b"\n\n")[0].decode()
(directions,) = [line for line in header.splitlines() if line.startswith("space directions")]
given = float(volume.array.sum() * volume.voxel_volume)
read = float(found.array.sum() * found.voxel_volume)
print(f"given:           spacing {volume.spacing}, {given:.0f} mm3")
print(f"highdicom reads: spacing {found.spacing}, {found.shape[0]} slices, {read:.0f} mm3")
print(f"dcmqi reads:     {directions}")
sys.exit(0 if read == given / 6 and "(0,0,1)" in directions else 1)
PYTHON
