"""Measure how well a moved post-contrast sequence is registered to FLAIR.

    python3 -m benchmarks.registration --images ./kaggle_3m --cases TCGA_CS_4942_19970222

Writes each case as three NIfTI files of 1 x 1 x 5 mm, rotates the post-contrast one by 8 degrees
about an oblique axis and shifts it by 6 mm, as if the head had moved, and compares the masks.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import SimpleITK

from brainseg.io.grid import Grid
from brainseg.io.layouts import find_cases, find_sequences
from brainseg.io.registration import foreground_points, move
from brainseg.metrics import dsc
from brainseg.segmenter import Segmenter
from brainseg.weights import shipped_weights
from cli import errors_in_one_sentence

ANGLE, DISTANCE = math.radians(8), 6.0
AXIS, DIRECTION = (0.4, 0.4, 0.82), (0.7, -0.6, 0.39)


def write_case(folder: Path, volume: np.ndarray) -> tuple[dict[str, Path], SimpleITK.Transform]:
    """Write the sequences of a volume (S, H, W, 3), and one moved; return paths and movement."""
    slices, rows, columns, _ = volume.shape
    grid = Grid((columns, rows, slices), (1.0, 1.0, 5.0), (0.0, 0.0, 0.0), np.eye(3))
    images = [grid.image(np.ascontiguousarray(volume[..., k].transpose(2, 1, 0))) for k in range(3)]
    moved = SimpleITK.VersorRigid3DTransform()
    moved.SetRotation(AXIS, ANGLE)
    moved.SetTranslation((np.array(DIRECTION) * DISTANCE / np.linalg.norm(DIRECTION)).tolist())
    moved.SetCenter([columns / 2, rows / 2, slices * 2.5])
    images.append(grid.image(move(images[2], grid, moved)))
    paths = {n: folder / f"{n}.nii.gz" for n in ("pre", "flair", "post", "moved")}
    for image, path in zip(images, paths.values(), strict=True):
        SimpleITK.WriteImage(image, str(path))
    return paths, moved


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="the real cases")
    parser.add_argument("--cases", nargs="+", help="only these")
    parser.add_argument("--weights", type=Path, default=shipped_weights("unet"))
    args = parser.parse_args()
    segmenter = Segmenter.from_weights(args.weights)
    print(f"{'case':24} DSC: untouched  moved  registered   to untouched  error mm  seconds")
    for case in find_cases(args.images, args.cases):
        volume, truth = case.read_pair()
        with tempfile.TemporaryDirectory() as name:
            paths, moved = write_case(Path(name), volume)
            scans = [
                find_sequences(paths["flair"], paths["pre"], paths[post])
                for post in ("post", "moved")
            ]
            registered = replace(scans[1], register=True)
            start = time.perf_counter()
            movement = registered.movements[paths["moved"]]
            seconds = time.perf_counter() - start
            masks = [segmenter(scan.read()) for scan in (*scans, registered)]
            head = foreground_points(SimpleITK.ReadImage(str(paths["flair"])))
        back = [moved.TransformPoint(movement.transform.TransformPoint(p)) for p in head.tolist()]
        error = np.linalg.norm(np.array(back) - head, axis=1).mean()
        scores = [dsc(mask, truth) for mask in masks]
        print(
            f"{case.name:24} {scores[0]:14.3f} {scores[1]:6.3f} {scores[2]:11.3f} "
            f"{dsc(masks[2], masks[0]):14.3f} {error:9.2f} {seconds:8.1f}"
        )
        print(f"    {movement}")


if __name__ == "__main__":
    with errors_in_one_sentence("stopped"):
        main()
