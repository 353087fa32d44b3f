"""Several dated scans of one patient, sent to the server: their growth, by API and page."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
import SimpleITK as sitk
from conftest import make_weights
from test_app import launch, opened, plain_tab, post, start, stop, unpacked  # noqa: F401
from test_scan import edit as edit_file
from test_scan import write_series
from test_visits import COARSE

import inference
from brainseg import phantom

VISITS = ("earlier", "later")  # folders of studies

pytest.importorskip("starlette", reason="pip install -r requirements-app.txt")


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> list[Path]:
    """Return two scans of a phantom patient, beside the weights and what inference.py made."""
    folder = tmp_path_factory.mktemp("growth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom, "DETAIL", COARSE)
        phantom.write_patients(folder / "images", 1, 2, 4, size=48)
    for mask in (folder / "images").glob("*_mask.nii.gz"):
        mask.unlink()
    weights = make_weights(folder / "unet.pt")
    argv = ["--images", folder / "images", "--weights", weights, "--device", "cpu"]
    argv += ["--predictions", folder / "out", "--figure", folder / "dsc.png"]
    inference.main([*map(str, argv)])
    return sorted((folder / "images").glob("*.nii.gz"))


@pytest.fixture(scope="module")
def server(scans, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    process, url = start(folder, scans[0].parents[1] / "unet.pt")
    yield url
    stop(process)
    assert [path.name for path in folder.iterdir()] == ["server.log"], "all is gone"
    assert "Traceback" not in (folder / "server.log").read_text()


def send(url: str, paths: list[Path], names: list[str] | None = None):
    names = names or [path.name for path in paths]
    sent = [("images", (name, path.read_bytes())) for name, path in zip(names, paths, strict=True)]
    return post(url, files=sent)


def test_growth_is_that_of_inference(server, scans):
    files = unpacked(send(server, scans[::-1]))  # in any order
    made = scans[0].parents[1] / "out"
    for path in scans:
        name = path.name.replace(".nii.gz", "_mask.nii.gz")
        assert files[name] == (made / name).read_bytes()
    assert files["growth.csv"] == (made / "growth.csv").read_bytes()
    assert files["growth.png"][:4] == b"\x89PNG"
    summary = json.loads(files["summary.json"])
    assert "no expected DSC, and so no intervals: this network has no fit" in summary["notes"][-1]
    rows = list(csv.DictReader(io.StringIO(files["growth.csv"].decode())))
    assert summary["case"] == "phantom_000" and "mm a year" in summary["rate"]
    assert [row["case"] for row in summary["growth"]] == [row["case"] for row in rows]


@pytest.fixture(scope="module")
def studies(scans, tmp_path_factory) -> Path:
    """Return a folder with a folder for each scan: a DICOM study of FLAIR and T1."""
    folder = tmp_path_factory.mktemp("studies") / "in"
    for k, (name, path) in enumerate(zip(VISITS, scans, strict=True)):
        voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        for words, channel in (("FLAIR", 1), ("T1 post gd", 2)):
            study = f"1.2.{k + 1}"
            tags = {"PatientID": "p1", "StudyDate": f"{2014 + k}0302", "StudyInstanceUID": study}
            tags |= {"SeriesDescription": words, "SeriesNumber": channel}
            series = f"{study}.{channel}"
            write_series(folder / name / words, voxels[..., channel], series, **tags)
    return folder


def edit(folder: Path, **tags: str | int) -> None:
    """Change fields of the DICOM files in a folder and below it."""
    for path in sorted(folder.rglob("IM*")):
        edit_file(path, **tags)


def send_zipped(url: str, folder: Path):
    archive = Path(shutil.make_archive(str(folder), "zip", folder))
    return post(url, files={"images": (archive.name, archive.read_bytes())})


@pytest.mark.parametrize("kind", ("zip", "folder"))
def test_growth_of_two_studies_is_that_of_inference(server, scans, studies, tmp_path, kind):
    made, weights = tmp_path / "out", scans[0].parents[1] / "unet.pt"
    argv = ["--images", studies, "--weights", weights, "--device", "cpu"]
    argv += ["--predictions", made, "--figure", tmp_path / "dsc.png"]
    inference.main([*map(str, argv)])
    if kind == "zip":
        files = unpacked(send_zipped(server, studies))
    else:
        paths = sorted(studies.rglob("IM*"))
        names = [str(path.relative_to(studies.parent)) for path in paths]
        files = unpacked(send(server, paths, names))
    masks = sorted(path.name for path in made.glob("*_mask.nii.gz"))
    assert masks == ["earlier_mask.nii.gz", "later_mask.nii.gz"]
    assert sorted(files) == sorted([*masks, "growth.csv", "growth.png", "summary.json"])
    for name in masks:
        assert files[name] == (made / name).read_bytes()
    assert files["growth.csv"] == (made / "growth.csv").read_bytes()
    summary = json.loads(files["summary.json"])
    assert summary["case"] == "p1" and "mm a year" in summary["rate"]
    assert [row["date"] for row in summary["growth"]] == ["2014-03-02", "2015-03-02"]


def test_two_studies_side_by_side(server, studies, tmp_path):
    """Name studies after patient and date if no folder tells them apart."""
    (tmp_path / "in").mkdir()
    for k, path in enumerate(sorted(studies.rglob("IM*"))):
        shutil.copy(path, tmp_path / "in" / f"IM{k}")
    files = unpacked(send_zipped(server, tmp_path / "in"))
    rows = list(csv.DictReader(io.StringIO(files["growth.csv"].decode())))
    assert [row["case"] for row in rows] == ["p1_20140302", "p1_20150302"]


@pytest.mark.parametrize(
    ("tags", "said"),
    (
        (
            {"PatientID": "p2"},
            "these are scans of the patients p1 and p2 by their PatientID; send the DICOM studies "
            "of one patient at once",
        ),
        ({"PatientID": ""}, "each in a folder named after the patient and the date, such as p1_2"),
        ({"StudyDate": ""}, "nothing tells the order of these scans; name each file, or the "),
        ({"StudyDate": "20990101"}, "name each file, or the folder of each DICOM study, after its"),
        ({"SeriesDescription": "T1"}, "later: no FLAIR series; send the files of the right one"),
    ),
)
def test_studies_that_cannot_be_followed(server, studies, tmp_path, tags, said):
    shutil.copytree(studies, tmp_path / "in")
    edit(tmp_path / "in" / "later", **tags)
    answer = send_zipped(server, tmp_path / "in")
    error = answer.json()["error"]
    assert answer.status_code == 400 and said in error, error
    assert "--" not in error and "/tmp" not in error


def test_studies_without_a_patient_in_named_folders(server, studies, tmp_path):
    for name, year in zip(VISITS, (2014, 2015), strict=True):
        shutil.copytree(studies / name, tmp_path / "in" / f"anna_{year}-03-02")
    edit(tmp_path / "in", PatientID="anonymous", StudyDate="")
    summary = json.loads(unpacked(send_zipped(server, tmp_path / "in"))["summary.json"])
    assert summary["case"] == "anna" and "mm a year" in summary["rate"]


def test_studies_and_another_field(server, studies):
    paths = sorted(studies.rglob("IM*"))
    sent = [("images", (str(path.relative_to(studies)), path.read_bytes())) for path in paths]
    answer = post(server, files=[*sent, ("register", (None, "1"))])
    assert answer.status_code == 400
    assert "send them without any other field" in answer.json()["error"]


@pytest.mark.parametrize(
    ("names", "said"),
    (
        (["a_2014-03-02.nii.gz", "b_2015-03-02.nii.gz"], "of the patients a and b"),
        (["x_2014-03-02.nii.gz", "x_2199.nii.gz"], "of the patients x and x_2199"),
        (["a_week-1_x.nii.gz", "a_week-1_y.nii.gz"], "nothing tells the order"),
    ),
)
def test_scans_that_cannot_be_followed(server, scans, names, said):
    answer = send(server, scans, names)
    assert answer.status_code == 400 and said in answer.json()["error"]


def test_growth_on_the_page(server, scans, plain_tab):  # noqa: F811
    plain_tab.set_viewport_size({"width": 1300, "height": 900})
    with opened(plain_tab, server) as page:
        page.locator("#files").set_input_files([str(path) for path in scans])
        page.get_by_role("button", name="Segment").click()
        page.locator("#growth:not([hidden])").wait_for()
        assert "phantom_000: " in page.locator("#growth h3").inner_text()
        assert page.locator("#growth tbody tr").count() == 2
        assert page.locator("#growth img").evaluate("image => image.naturalWidth") > 500
        assert page.locator("#growth a").count() == 5


def test_growth_of_a_folder_of_studies_on_the_page(server, studies, plain_tab):  # noqa: F811
    with opened(plain_tab, server) as page:
        page.locator("#folder").set_input_files(str(studies))
        page.get_by_role("button", name="Segment").click()
        page.locator("#growth:not([hidden])").wait_for()
        assert "p1: " in page.locator("#growth h3").inner_text()
        assert page.locator("#growth tbody tr").count() == 2
