"""Test what inference.py writes beside masks: volumes.csv, maps, DICOM, the report."""

import gzip
import hashlib
import html
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
import tifffile
from conftest import contents, make_weights, read_rows
from test_inference import infer, subset_copy, write_case
from test_scan import edit, write, write_series

from brainseg.io.dicom import series_at
from brainseg.io.dicom_seg import read_references, write_dicom_seg
from brainseg.io.files import MARK, write_table
from brainseg.io.layouts import find_case
from brainseg.io.slices import Case
from brainseg.phantom import make_volume
from brainseg.reports.cohort import save_cohort
from brainseg.reports.volumes import (
    by_need,
    component_sizes,
    end_warnings,
    read_volumes,
    unread_row,
    volume_row,
    warn_of_unlike,
)
from brainseg.run_files import Run, recorded

EXPECTED = {
    "features": ["confidence"], "mean": [0.8], "deviation": [0.1], "weights": [0.05],
    "intercept": 0.8, "interval": [-0.4, 0.3],
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Write weights whose card has a fit of the expected DSC."""
    path = make_weights(tmp_path_factory.mktemp("weights") / "narrow.pt")
    card = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(card | {"expected_dsc": EXPECTED}))
    return path


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    volume, truth = make_volume(3, 7, 60)
    return volume[:, :, 4:56], truth[:, :, 4:56]


@pytest.fixture
def series(pair, tmp_path) -> Path:
    tags = {"FrameOfReferenceUID": "1.2.9", "PatientID": "P7"}
    return write_series(tmp_path / "series", pair[0][..., 1], **tags)


def table(out: Path) -> list[dict]:
    return read_rows(out / "predictions" / "volumes.csv")


# volumes.csv


def test_volumes_are_those_of_the_mask(pair, weights, tmp_path, capsys):
    write(tmp_path / "a.nii.gz", pair[0])
    assert infer(tmp_path / "a.nii.gz", tmp_path, weights) == 0
    (row,) = table(tmp_path)
    mask = np.asarray(nibabel.load(tmp_path / "predictions" / "a_mask.nii.gz").dataobj)
    assert int(row["lesion_voxels"]) == mask.sum() > 0 and row["components"] == "1"
    assert float(row["lesion_ml"]) == pytest.approx(mask.sum() * 0.9 * 0.9 * 5 / 1000, rel=1e-4)
    assert row["component_1_ml"] == row["lesion_ml"] and row["component_2_ml"] == ""
    touched = np.flatnonzero(mask.any(axis=(0, 1))) + 1
    assert row["slices_touched"] == " ".join(map(str, touched))
    assert row["case"] == row["patient"] == "a" and row["slices"] == "7"
    assert row["sequences"] == "pre-contrast, FLAIR, post-contrast" and row["replaced"] == ""
    low, value, high = (float(row[f"expected_dsc{end}"]) for end in ("_low", "", "_high"))
    assert 0 <= low < value < high <= 1
    assert f"{value:.2f} ({low:.2f} to {high:.2f})" in capsys.readouterr().out


def test_other_options_than_the_fits_give_no_expected_dsc(pair, weights, tmp_path, capsys):
    write(tmp_path / "a.nii.gz", pair[0])
    card = json.loads(weights.with_suffix(".json").read_text())
    fit = {"threshold": 0.5, "largest_component": False, "min_volume": 2, "tta": False}
    other = shutil.copy(weights, tmp_path / "fitted.pt")
    card["expected_dsc"] |= fit
    Path(other).with_suffix(".json").write_text(json.dumps(card))
    for options, said in [
        ((), ""),
        (("--min-volume", 0, "--tta"), "the card's fit is for min volume 2, tta"),
        (("--largest-component",), "the card's fit is for largest component"),
    ]:
        assert infer(tmp_path / "a.nii.gz", tmp_path, other, *options) == 0
        assert (table(tmp_path)[0]["expected_dsc"] == "") == bool(said)
        printed = capsys.readouterr()
        assert said in printed.err and ("No expected DSC: the card's fit" in printed.out) == bool(
            said
        )


def test_without_masks_spacing_or_fit_there_is_a_table(pair, tmp_path, capsys):
    bare = make_weights(tmp_path / "bare.pt")
    for name in ("p1", "p2"):
        write_case(tmp_path / "images" / name, pair[0])
    assert infer(tmp_path / "images", tmp_path, bare) == 0
    rows = table(tmp_path)
    assert [row["case"] for row in rows] == ["p1", "p2"]
    assert all(row["lesion_ml"] == row["expected_dsc"] == "" for row in rows)
    said = "No expected DSC: this network has no fit; evaluate.py --fit-expected-dsc makes one."
    assert capsys.readouterr().out.count(said) == 1


def test_cases_that_need_a_look_come_first(pair, weights, tmp_path, capsys):
    flair = np.repeat(pair[0][..., 1:2], 3, axis=3)
    inner = pair[0].copy()
    inner[[0, -1]] = 0  # no lesion reaches an end of the scan
    write_case(tmp_path / "images" / "a", inner)
    write_case(tmp_path / "images" / "b", flair)
    write_case(tmp_path / "images" / "c", np.zeros_like(pair[0]))
    for name in "def":
        write_case(tmp_path / "images" / name, inner)
    assert infer(tmp_path / "images", tmp_path, weights) == 0
    a, b, c, *_ = table(tmp_path)
    assert b["replaced"] == "pre-contrast, post-contrast" and "stands in" in b["notes"]
    unlike = "unlike most cases of this run: it has no pre-contrast and it has no post-contrast"
    assert b["warning"] == unlike and not a["warning"]
    assert "the mask is empty" in c["warning"] and c["lesion_voxels"] == "0"
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    assert printed.index("b") < printed.index("a") and printed.index("c") < printed.index("a")


def test_a_constant_sequence_is_among_the_replaced(pair, weights, tmp_path):
    volume = pair[0].copy()
    volume[..., 0], volume[..., 2] = 7, volume[..., 1]
    write(tmp_path / "a.nii.gz", volume)
    assert infer(tmp_path / "a.nii.gz", tmp_path, weights) == 0
    (row,) = table(tmp_path)
    assert row["replaced"] == "pre-contrast, post-contrast" and row["sequences"] == "FLAIR"
    assert "FLAIR stands in for pre-contrast, which is constant" in row["notes"]
    assert "FLAIR stands in for post-contrast" in row["notes"] and not row["warning"]


def test_components_are_counted_largest_first():
    mask = np.zeros((6, 20, 20), bool)
    mask[0, 0, 0], mask[2:4, 5:9, 5:9], mask[5, 15:17, 15] = True, True, True
    assert component_sizes(mask) == [32, 2, 1]
    row = volume_row(Case("x", tuple(range(6)), (), ()), np.zeros((6, 20, 20, 3)), mask)
    assert [row[f"component_{k}_voxels"] for k in (1, 2, 3)] == [32, 2, 1]
    assert "reaches the first and the last slice" in row["notes"] and not row["warning"]
    said = "the mask is confined to the {} slices of the scan; look at it"
    first, last = [said.format("first")], [said.format("last")]
    for places, warnings in (([0], first), ([5], last), ([0, 1], []), ([2], [])):
        mask[:], mask[places, 3, 3] = False, True
        assert end_warnings(mask) == warnings


def spaced_rows(*spacings):
    rows, by_case = [], {}
    for k, spacing in enumerate(spacings):
        case = Case(f"c{k}", tuple(range(6)), (), ())
        rows.append(volume_row(case, np.random.rand(6, 9, 9, 3), np.zeros((6, 9, 9), bool)))
        by_case[case.name] = spacing
    warn_of_unlike(rows, by_case)
    return [row["warning"] for row in rows]


def test_spacing_unlike_that_of_most_cases_is_a_warning():
    thin, thick = (1.0, 1.0, 1.0), (5.0, 1.0, 1.0)
    *others, unlike = spaced_rows(thin, thin, thin, thin, None, thick)
    assert not any(others) and "its voxels are 5 x 1 x 1 mm, theirs 1 x 1 x 1 mm" in unlike
    assert not any(spaced_rows(thin, thick)), "none of two is typical"
    assert not any(spaced_rows(thin, thick, thin, thick, thin)), "a mixed cohort"
    assert not any(spaced_rows(thin, thick, thin, thick)), "a mixed cohort"
    assert not any(spaced_rows(thin, thin, thin, (1.4, 1.0, 1.0)))
    assert not any(spaced_rows(None, None, thin))


def test_flair_alone_in_every_case_is_no_warning(pair, weights, tmp_path, capsys):
    saturated = np.minimum(pair[0][..., 1:2], np.percentile(pair[0][..., 1], 80))
    for name in ("a", "b", "c"):
        write_case(tmp_path / "images" / name, np.repeat(pair[0][..., 1:2], 3, axis=3))
    assert infer(tmp_path / "images", tmp_path, weights) == 0
    assert not any("stands in" in row["warning"] for row in table(tmp_path))
    assert all("stands in for pre-contrast and post" in row["notes"] for row in table(tmp_path))
    assert "needs a look" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "images")
    write_case(tmp_path / "images" / "a", np.repeat(saturated, 3, axis=3))
    assert infer(tmp_path / "images" / "a", tmp_path, weights) == 0
    row = table(tmp_path)[0]
    assert row["warning"].count("unusual input") == 1 and "FLAIR is saturated" in row["warning"]


def test_rows_come_back_from_the_file(pair, tmp_path):
    case = Case("1000", tuple(range(7)), (), ())
    rows = {"1000": volume_row(case, pair[0], pair[1], (0.8, 0.7, 0.9))}
    rows["1001"] = unread_row(Case("1001", (), (), ()), ValueError("cut short"))
    assert list(rows["1000"]) == list(rows["1001"]), "the same columns"
    write_table(tmp_path / "v.csv", list(rows.values()))
    assert read_volumes(tmp_path / "v.csv") == rows
    assert read_volumes(tmp_path / "none.csv") == {}


# Maps


def test_probabilities_lie_on_the_grid_of_the_source(pair, weights, tmp_path):
    source = write(tmp_path / "a.nii.gz", pair[0], "RAS")
    flags = "--probabilities", "--no-largest-component"
    assert infer(source, tmp_path, weights, *flags) == 0
    image = nibabel.load(tmp_path / "predictions" / "a_probability.nii.gz")
    mask = np.asarray(nibabel.load(tmp_path / "predictions" / "a_mask.nii.gz").dataobj)
    np.testing.assert_allclose(image.affine, nibabel.load(source).affine, atol=1e-4)
    assert image.get_data_dtype() == np.float32
    assert np.array_equal(np.asarray(image.dataobj) >= 0.5, mask > 0)


def test_maps_and_segmentations_of_an_earlier_mask_are_removed(series, weights, tmp_path):
    other = make_weights(tmp_path / "other.pt")
    out, more = tmp_path / "predictions", ("--probabilities", "--dicom-seg")
    assert infer(series, tmp_path, weights, *more) == 0
    assert {"series_probability.nii.gz", "series_seg.dcm"} <= contents(out).keys()
    assert infer(series, tmp_path, other) == 0
    assert not {"series_probability.nii.gz", "series_seg.dcm"} & contents(out).keys()


def test_no_slice_of_another_scan_of_that_name_stays(weights, tmp_path):
    volume = make_volume(0, slices=6, size=64)[0]
    out = tmp_path / "predictions"
    for cohort, slices in (("x", 6), ("y", 4)):
        write_case(tmp_path / cohort / "case", volume[:slices])
    assert infer(tmp_path / "x", tmp_path, weights) == 0
    longer = contents(out).keys()
    for name in ("case_8_mask_corrected.tif", "case_8_mask.txt"):
        shutil.copy(out / "case" / "case_8_mask.tif", out / "case" / name)
    (out / "case" / "case_9_mask.tif").write_bytes(b"II, of another program")
    others = contents(out).keys() - longer
    assert infer(tmp_path / "y", tmp_path, weights) == 0
    gone = {f"case/case_{k}{kind}" for k in (7, 8) for kind in (".png", "_mask.tif")}
    assert contents(out).keys() == (longer - gone) | others


def test_ensemble_writes_a_tiff_per_slice_and_map(phantoms, weights, tmp_path):
    other = make_weights(tmp_path / "other.pt")
    only = "--cases", "phantom_003", "--weights", weights, other
    assert infer(phantoms, tmp_path, weights, "--probabilities", *only) == 0
    folder = tmp_path / "predictions" / "phantom_003"
    for kind in ("probability", "disagreement"):
        maps = [tifffile.imread(folder / f"phantom_003_{k}_{kind}.tif") for k in range(1, 9)]
        assert all(each.dtype == np.float32 and each.shape == (64, 64) for each in maps)
        assert 0 <= np.min(maps) and np.max(maps) <= 1


# DICOM


def by_dcmqi(path: Path, out: Path) -> np.ndarray:
    out.mkdir()
    program = Path(sys.executable).with_name("segimage2itkimage")
    words = ["--inputDICOM", path, "--outputDirectory", out, "--outputType", "nrrd"]
    subprocess.run([program, *map(str, words)], check=True, capture_output=True)
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(out / "1.nrrd"))) > 0


def test_segmentation_is_read_back_by_three_readers(series, weights, tmp_path):
    assert infer(series, tmp_path, weights, "--dicom-seg") == 0
    mask = nibabel.load(tmp_path / "predictions" / "series_mask.nii.gz")
    mask = np.asarray(mask.dataobj).transpose(2, 1, 0) > 0
    path = tmp_path / "predictions" / "series_seg.dcm"
    raw = pydicom.dcmread(path)
    assert mask.any() and np.array_equal(raw.pixel_array[::-1] > 0, mask)
    seg = highdicom.seg.segread(path)
    instances = [f"1.2.3.{k + 1}" for k in range(7)]
    planes = seg.get_pixels_by_source_instance(instances, combine_segments=True)
    assert np.array_equal(planes > 0, mask)
    assert np.array_equal(by_dcmqi(path, tmp_path / "dcmqi"), mask)
    assert raw.PatientID == "P7" and raw.FrameOfReferenceUID == "1.2.9"
    (segment,) = raw.SegmentSequence
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeValue == "52988006"
    (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
    assert algorithm.AlgorithmName == "brainseg narrow" and algorithm.AlgorithmVersion


def test_segmentation_of_a_coronal_series(pair, tmp_path):
    """The slices that the network sees are not those of the file."""
    series = write_series(tmp_path / "coronal", pair[0][..., 1])
    for path in series.iterdir():
        k = pydicom.dcmread(path).InstanceNumber - 1
        edit(path, FrameOfReferenceUID="1.2.9", ImageOrientationPatient=[1, 0, 0, 0, 0, -1],
             ImagePositionPatient=[-110, -30 + 5 * k, 120])  # fmt: skip
    case = find_case(series)
    mask = case.read()[..., 1] > np.percentile(pair[0][..., 1], 95)
    whole_bytes = write_dicom_seg(tmp_path / "seg.dcm", case, mask, "brainseg", "1")
    assert whole_bytes == (pair[0][0, ..., 1].size % 8 == 0)
    planes = highdicom.seg.segread(tmp_path / "seg.dcm").get_pixels_by_source_instance(
        [f"1.2.3.{k + 1}" for k in range(7)], combine_segments=True
    )
    assert np.array_equal(planes > 0, pair[0][..., 1] > np.percentile(pair[0][..., 1], 95))


@pytest.mark.parametrize("fault", ["no frame", "two frames", "no instance", "one instance"])
def test_series_that_cannot_be_referenced(series, weights, tmp_path, capsys, fault):
    first, second, *_ = sorted(series.iterdir())
    if fault == "no frame":
        for path in series.iterdir():
            edit(path, FrameOfReferenceUID="")
    elif fault == "two frames":
        edit(first, FrameOfReferenceUID="1.2.10")
    else:
        edit(first, SOPInstanceUID="" if fault == "no instance" else
             pydicom.dcmread(second).SOPInstanceUID)  # fmt: skip
    with pytest.raises(ValueError, match=f"{series}: .*UID; export it again"):
        read_references(series_at(series))
    if fault == "two frames":
        assert infer(series, tmp_path, weights, "--dicom-seg") == 1
        assert capsys.readouterr().err.count(f"error: {series}: ") == 1
        assert (tmp_path / "predictions" / "series_mask.nii.gz").is_file(), "nothing else is lost"
        assert len(table(tmp_path)) == 1


def test_a_segmentation_that_is_not_read_back_is_not_kept(
    series, weights, tmp_path, capsys, monkeypatch
):
    save = highdicom.seg.Segmentation.save_as

    def closer_slices(self, path):
        (measures,) = self.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
        measures.SpacingBetweenSlices = 1
        save(self, path)

    monkeypatch.setattr(highdicom.seg.Segmentation, "save_as", closer_slices)
    assert infer(series, tmp_path, weights, "--dicom-seg") == 1
    said = capsys.readouterr().err
    assert f"error: {series}: its Segmentation is not read back as it was written" in said
    assert not (tmp_path / "predictions" / "series_seg.dcm").exists() and len(table(tmp_path)) == 1


def test_a_source_without_a_series_is_one_sentence(phantoms, weights, tmp_path, monkeypatch):
    said = infer(phantoms, tmp_path, weights, "--dicom-seg")
    assert "is not a DICOM series; leave out --dicom-seg" in said
    monkeypatch.setitem(sys.modules, "highdicom", None)
    said = infer(phantoms, tmp_path, weights, "--dicom-seg")
    assert "needs highdicom" in said and "requirements-dicom.txt" in said


# The report


def test_report_holds_every_case_and_needs_no_network(phantoms, weights, tmp_path):
    images = subset_copy(phantoms, tmp_path / "images", "phantom_003", "phantom_005")
    shutil.move(images / "phantom_005", images / "p<script>&5")
    for path in images.rglob("*_mask.tif"):
        path.unlink()
    assert infer(images, tmp_path, weights, "--report", tmp_path / "r.html") == 0
    page = (tmp_path / "r.html").read_text()
    assert page.count("<img loading=lazy") == 2 and page.count("<tr id=") == 2
    assert "p&lt;script&gt;&amp;5" in page and "p<script>" not in page
    assert '"torch"' in html.unescape(page) and 'src="http' not in page and "url(" not in page


def test_report_of_500_cases_is_small(pair, tmp_path):
    case = Case("p", tuple(range(7)), (), ())
    row = volume_row(case, *pair, (0.8, 0.7, 0.9))
    rows = [row | {"case": f"p{k}", "lesion_voxels": k} for k in range(500)]
    save_cohort(tmp_path / "r.html", rows, [bytes(9000)] * 500, {"args": {}})
    assert (tmp_path / "r.html").stat().st_size < 8e6
    assert [row["case"] for row in by_need(rows)][:2] == ["p0", "p1"]


def test_full_disk_keeps_the_earlier_report(phantoms, weights, tmp_path, monkeypatch):
    write, page = Path.write_text, tmp_path / "r.html"
    page.write_text(f"earlier, {MARK}")

    def full(self, text, *more, **options):
        if "<!doctype" in text:
            raise OSError(28, "No space left on device")
        return write(self, text, *more, **options)

    monkeypatch.setattr(Path, "write_text", full)
    only = "--cases", "phantom_003", "--report", page
    said = infer(phantoms, tmp_path, weights, *only)
    assert said == f"error: {page}: no space left on device"
    assert page.read_text() == f"earlier, {MARK}" and len(table(tmp_path)) == 1
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_masks_alone_with_a_given_spacing(two, weights, tmp_path):
    assert infer(two, tmp_path, weights) == 0
    out = tmp_path / "predictions"
    assert list(out.rglob("*.png")) and list(out.glob("*.gif"))
    (tmp_path / "dsc.png").unlink()
    options = "--no-pictures", "--spacing", "6", "1", "0.5", "--skip-existing"
    assert infer(two, tmp_path, weights, *options) == 0
    assert not list(tmp_path.rglob("*.png")) and not list(out.glob("*.gif"))
    rows = table(tmp_path)
    assert [float(row["lesion_ml"]) for row in rows] == pytest.approx(
        [int(row["lesion_voxels"]) * 0.003 for row in rows], rel=1e-4
    )
    assert "hd95_mm" in (out / "metrics.csv").read_text().splitlines()[0]
    assert infer(two, tmp_path, weights, *options[1:]) == 0
    assert len(list(out.rglob("*_*.png"))) == 16, "pictures that the earlier run left out"
    assert infer(two, tmp_path, weights, "--spacing", "6", "1") == 2
    assert infer(two, tmp_path, weights, "--spacing", "inf", "1", "1") == 2
    write(tmp_path / "a.nii.gz", np.random.rand(6, 32, 32, 3))
    assert infer(tmp_path / "a.nii.gz", tmp_path, weights, "--spacing", "6", "1", "1") == 1
    assert "states its voxel spacing itself" in table(tmp_path)[0]["warning"]


def test_run_json_tells_programs_what_a_run_did(two, weights, tmp_path):
    (two / "phantom_002" / "phantom_002_4.tif").unlink()
    (tmp_path / "settings.yaml").write_text("min-volume: 3")
    options = "--config", tmp_path / "settings.yaml", "--report", tmp_path / "r.html"
    assert infer(two, tmp_path, weights, *options, "--threshold", "0.4") == 1
    out = tmp_path / "predictions"
    record = json.loads((out / "run.json").read_text())
    assert list(record["weights"].values()) == [hashlib.sha256(weights.read_bytes()).hexdigest()]
    settings = {name: each["from"] for name, each in record["settings"].items()}
    assert settings["threshold"] == "given" and "settings.yaml" in settings["min_volume"]
    assert settings["image_size"] == "card" and settings["batch_size"] == "by default"
    assert record["settings"]["image_size"]["value"] == 32
    assert record["exit_status"] == 1 and record["seconds"] > 0 and not record["error"]
    assert record["cases"] == {"phantom_001": "segmented", "phantom_002": "unread"}
    assert "slice 4 is missing" in record["failed"]["phantom_002"]
    page = (tmp_path / "r.html").read_text()
    assert "true DSC 0." in page and "(trained on)" in page and "dashed green" in page
    written = {str(out / name) for name in contents(out)}
    written.add(str(tmp_path / "r.html"))  # and no figure, as one case was scored
    assert {str(out / name) for name in record["files"]} == written
    assert "--labels 7" in str(infer(two, tmp_path, weights, "--labels", "7"))
    assert "--labels 7" in json.loads((out / "run.json").read_text())["error"], "ended by an error"


def test_run_json_of_an_earlier_run_goes_first(tmp_path):
    """A run that is killed must not leave the exit status of the one before."""
    path = tmp_path / "run.json"
    for _ in range(2):
        outputs, segmenter = Mock(folder=tmp_path), Mock(reasons={})
        with recorded(Run(outputs, segmenter, {"args": {}, "program": MARK}), {}):
            assert not path.exists()
        assert json.loads(path.read_text())["exit_status"] == 0


def test_rows_and_scores_of_other_cases_are_kept(phantoms, weights, tmp_path):
    images = subset_copy(phantoms, tmp_path / "in", "phantom_003", "phantom_004")
    scores = tmp_path / "predictions" / "metrics.csv"
    assert infer(images, tmp_path, weights) == 0
    both, rows = scores.read_text(), table(tmp_path)
    again = images, tmp_path, weights, "--skip-existing"
    assert infer(*again, "--cases", "phantom_003") == 0
    assert scores.read_text() == both and table(tmp_path) == rows and len(rows) == 2
    (images / "phantom_004" / "phantom_004_4.tif").unlink()
    assert infer(*again) == 1
    assert scores.read_text().splitlines() == both.splitlines()[:2], "it has no score any more"


@pytest.mark.parametrize("name", ["volumes.csv", "metrics.csv"])
def test_a_table_saved_by_another_program_is_not_lost(phantoms, weights, tmp_path, name):
    only = "--cases", "phantom_003"
    assert infer(phantoms, tmp_path, weights, *only) == 0
    path = tmp_path / "predictions" / name
    for changed in (path.read_bytes().replace(b",", b";"), path.read_bytes() + b"\xfc\n"):
        path.write_bytes(changed)
        said = infer(phantoms, tmp_path, weights, *only)
        assert f"{path}: was changed and cannot be read" in said
        assert path.read_bytes() == changed


def test_a_case_that_cannot_be_read_has_a_row(phantoms, weights, tmp_path, monkeypatch, capsys):
    images = subset_copy(phantoms, tmp_path / "in", "phantom_003", "phantom_004", "phantom_005")
    (images / "phantom_003" / "phantom_003_4.tif").unlink()
    read = Case.read

    def broken(self):
        if self.name == "phantom_004":
            raise RuntimeError("Exception thrown:\nITK ERROR: no memory")
        return read(self)

    monkeypatch.setattr(Case, "read", broken)
    page = tmp_path / "r.html"
    assert infer(images, tmp_path, weights, "--report", page) == 1
    said = capsys.readouterr()
    first, second, third = table(tmp_path)
    assert first["case"] == "phantom_003" and "slice 4 is missing" in first["warning"]
    fault = f"{images / 'phantom_004'}: cannot be read (ITK ERROR: no memory); export it again"
    assert second["warning"] == fault and f"error: {fault}" in said.err
    assert second["lesion_voxels"] == second["slices"] == "" and third["slices"] == "8"
    assert "3 cases, " in said.out and "1 of 3 cases segmented" in said.out
    assert page.read_text().count("<tr id=") == 3 and page.read_text().count("<img loading") == 1


def test_weights_without_a_card_are_reported(phantoms, weights, tmp_path, capsys):
    bare = tmp_path / "bare.pt"
    bare.write_bytes(weights.read_bytes())
    infer(phantoms, tmp_path, bare, "--cases", "phantom_003", "--image-size", 32)
    assert "bare.pt: has no card (.json); assuming preprocessing 1" in capsys.readouterr().err


def edit_mask(path: Path) -> bytes:
    """Change a voxel of a mask as editors do, which keep the header; return the new content."""
    image = nibabel.load(path)
    voxels = np.asarray(image.dataobj).copy()
    voxels[3, 3, 3] = 1 - voxels[3, 3, 3]
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine, image.header), path)
    return path.read_bytes()


@pytest.mark.parametrize("more", [(), ("--skip-existing",)], ids=str)
def test_a_mask_that_was_corrected_by_hand_stays(pair, weights, tmp_path, more):
    """And so do its rows: what is in growth.csv belongs to them."""
    scan = write(tmp_path / "scan.nii.gz", pair[0][..., 1])
    assert infer(scan, tmp_path, weights, "--no-pictures") == 0
    path = tmp_path / "predictions" / "scan_mask.nii.gz"
    assert infer(scan, tmp_path, weights, "--no-pictures", *more) == 0, "it was not edited"
    before, table = edit_mask(path), (tmp_path / "predictions" / "volumes.csv").read_text()
    assert infer(scan, tmp_path, weights, "--no-pictures", *more) == 1
    assert path.read_bytes() == before
    assert (tmp_path / "predictions" / "volumes.csv").read_text() == table


def test_an_edited_mask_of_another_scan_of_that_name_stays(pair, phantoms, weights, tmp_path):
    """A volume was segmented before, now a folder of slices."""
    assert infer(write(tmp_path / "phantom_000.nii.gz", pair[0][..., 1]), tmp_path, weights) == 0
    path = tmp_path / "predictions" / "phantom_000_mask.nii.gz"
    before = edit_mask(path)
    assert infer(phantoms / "phantom_000", tmp_path, weights) == 1
    assert path.read_bytes() == before


def test_a_mask_with_a_damaged_header_is_made_again(pair, weights, tmp_path):
    scan = write(tmp_path / "scan.nii.gz", pair[0][..., 1])
    assert infer(scan, tmp_path, weights, "--no-pictures") == 0
    path = tmp_path / "predictions" / "scan_mask.nii.gz"
    before = path.read_bytes()
    content = bytearray(gzip.decompress(before))
    content[70:72] = (9999).to_bytes(2, "little")  # the type of its voxels
    path.write_bytes(gzip.compress(bytes(content)))
    assert infer(scan, tmp_path, weights, "--no-pictures") == 0
    assert gzip.decompress(path.read_bytes()) == gzip.decompress(before)
