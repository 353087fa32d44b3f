#!/usr/bin/env bash
# SimpleITK reads a DICOM series wrongly, without a word, where its headers are unusual.
#
# SimpleITK 2.5.7 (ITK 5.4, GDCM 3), pydicom 3.0.2:
# 1. sitk.ReadImage(files) forces the pixel type of the first file on all others. RescaleSlope may
#    differ from file to file, as Philips and PET scanners write it: values then wrap around.
# 2. Axes in ImageOrientationPatient that are rounded to two decimals are not quite at right angles:
#    the image is returned as axial, and a tilt of 17 degrees is lost.
# It hurts whoever measures in a volume read so: intensities, positions and volumes are wrong.
# What helps: read each file by itself, or give a floating pixel type; check the directions.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet SimpleITK==2.5.7 pydicom==3.0.2 numpy
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage


def write(name, slopes, orientation, step):
    files = []
    for k, slope in enumerate(slopes):
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = MRImageStorage
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{k + 1}"
        data.StudyInstanceUID, data.SeriesInstanceUID, data.Modality = "1.2", "1.2.3", "MR"
        data.Rows, data.Columns, data.PixelSpacing = 8, 8, [1, 1]
        data.ImageOrientationPatient = orientation
        data.ImagePositionPatient = [round(k * length, 4) for length in step]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        data.RescaleSlope, data.RescaleIntercept = slope, 0
        data.PixelData = np.full((8, 8), 3000, np.uint16).tobytes()
        files.append(f"{sys.argv[1]}/{name}{k}.dcm")
        data.save_as(files[-1], enforce_file_format=True)
    return files


files = write("slopes", (1, 100, 100), [1, 0, 0, 0, 1, 0], (0, 0, 5))
together = [int(value) for value in sitk.GetArrayFromImage(sitk.ReadImage(files))[:, 0, 0]]
alone = [int(sitk.GetArrayFromImage(sitk.ReadImage(file))[0, 0, 0]) for file in files]
print("one voxel of each slice, read as a series:", together, "and file by file:", alone)

orientation = [0.97, 0.09, -0.21, -0.02, 0.96, 0.29]  # tilts of 17, 12 and 5 degrees
files = write("tilted", (1, 1, 1), orientation, (1.341, -1.644, 5.612))
image = sitk.ReadImage(files)
read = [float(value) for value in np.reshape(image.GetDirection(), (3, 3)).T[:2].ravel()]
print("axes", orientation, "are read as", read)
same = together == [3000, 37856, 37856] and alone == [3000, 300000, 300000]
sys.exit(0 if same and read == [1, 0, 0, 0, 1, 0] else 1)
PYTHON
