"""Several dated scans of one patient, sent to the server: their growth, by API and page."""

import csv
import io
import json
from pathlib import Path

import pytest
from conftest import make_weights
from test_app import browser, launch, post, start, stop, unpacked, visit  # noqa: F401
from test_visits import COARSE

import inference
from brainseg import phantom_patients

pytest.importorskip("starlette", reason="pip install -r requirements-app.txt")


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> list[Path]:
    """Return two scans of a phantom patient, beside the weights and what inference.py made."""
    folder = tmp_path_factory.mktemp("growth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom_patients, "DETAIL", COARSE)
        phantom_patients.write_patients(folder / "images", 1, 2, 4, size=48)
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


def test_growth_on_the_page(server, scans, browser):  # noqa: F811
    with visit(browser, server, 1300, 900) as page:
        page.locator("#files").set_input_files([str(path) for path in scans])
        page.get_by_role("button", name="Segment").click()
        page.locator("#growth:not([hidden])").wait_for()
        assert "phantom_000: " in page.locator("#growth h3").inner_text()
        assert page.locator("#growth tbody tr").count() == 2
        assert page.locator("#growth img").evaluate("image => image.naturalWidth") > 500
        assert page.locator("#growth a").count() == 5
