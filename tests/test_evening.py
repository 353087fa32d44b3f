"""A newcomer's evening: four own cases in three layouts, by the commands of the README.

They are fine-tuned on for two epochs, segmented, compared with the weights before, and reported.
"""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_main
from test_layouts import DECATHLON, write
from test_scan import write_series

import evaluate
import inference
import train
from brainseg.io.opening import find_case
from brainseg.phantom import make_volume, write_data_set

START = "weights/unet-folds/unet-a5f30600.pt"
NAMES = ("anna", "ben", "cleo", "dora")
COMMANDS = (  # in the README, up to further options
    "train.py --images ./mine --init-weights " + START,
    "inference.py --images ./mine --weights weights/unet.pt --report report.html",
    f"evaluate.py --images ./mine --weights old={START} new=weights/unet.pt",
)


def volumes() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return four small heads, by name: volume (S, H, W, C) and lesion (S, H, W)."""
    return {name: make_volume(k, slices=8, size=48) for k, name in enumerate(NAMES)}


def slices(root: Path) -> None:
    write_data_set(root, cases=4, slices=8, size=48, seed=0)


def decathlon(root: Path) -> None:
    for case, (volume, mask) in volumes().items():
        write(root / "imagesTr" / f"{case}.nii.gz", volume[..., [1, 0, 2, 1]])
        write(root / "labelsTr" / f"{case}.nii.gz", mask.astype(np.uint8))
    (root / "dataset.json").write_text(json.dumps(DECATHLON))


def zipped_dicom(root: Path) -> None:
    """Write a study of FLAIR alone for each case, and all of them as root.zip."""
    for k, (case, (volume, mask)) in enumerate(volumes().items()):
        tags = {"StudyInstanceUID": f"1.2.{k}", "PatientID": case, "SeriesDescription": "AX FLAIR"}
        folder = write_series(root / case, volume[..., 1], f"1.2.{k}.3", **tags)
        find_case(folder).write_map(root / f"{case}_mask.nii.gz", mask)
    shutil.make_archive(str(root), "zip", root)
    shutil.rmtree(root)


@pytest.mark.parametrize(
    ("make", "images"),
    [(slices, "mine"), (decathlon, "mine"), (zipped_dicom, "mine.zip")],
)
def test_an_evening_with_four_cases(
    make: Callable[[Path], None], images: str, tmp_path, monkeypatch, capsys
):
    make(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/unet-folds").symlink_to(ROOT / "weights/unet-folds")
    readme = re.sub(r"  +#.*", "", (ROOT / "README.md").read_text())
    small = "--image-size", "32", "--device", "cpu", "--workers", "1"
    options = {
        train.main: ("--epochs", "2", "--batch-size", "8", "--cache", "cache", *small),
        inference.main: ("--no-pictures", *small),
        evaluate.main: (*small, "--report", "comparison.html"),
    }
    for command, (main, further) in zip(COMMANDS, options.items(), strict=True):
        assert f"python3 {command}\n" in readme, "a command of the README"
        words = command.replace("./mine", f"./{images}").split()[1:]
        assert run_main(main, *words, *further) == 0, capsys.readouterr()
    said, told = capsys.readouterr()
    assert "validation has 1 patient: its DSC says little" in told
    counts = next(line for line in said.splitlines() if line.startswith("train "))
    assert ("set aside by a hash" in told) == ("test 0 cases" not in counts)
    assert "train 2 cases of 2 patients" in said or "train 3 cases of 3 patients" in said
    assert "4 of 4 cases segmented" in said and "new" in said
    with open("predictions/volumes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and all(row["lesion_voxels"] for row in rows)
    assert not any("stands in" in row["warning"] for row in rows)
    assert sum("trained on this patient" in row["notes"] for row in rows) in (2, 3)
    assert Path("report.html").read_text().count("true DSC") == 4
    assert Path("comparison.html").is_file()
    record = json.loads(Path("predictions/run.json").read_text())
    assert record["exit_status"] == 0
    assert str(tmp_path / "report.html") in record["files"]
