"""Test the page in a real browser, and growth from several dated scans, by API and page."""

# Fixtures of test_app are imported, and tests take them as arguments.
# ruff: noqa: F811

import contextlib
import csv
import io
import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import ROOT, make_weights
from test_app import files, post, server, unpacked  # noqa: F401
from test_scan import edit as edit_file
from test_scan import write_series
from test_visits import COARSE

import inference
from brainseg import phantom

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
GRAPHICS = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist")


@pytest.fixture(scope="module")
def launch():
    """Start a browser with some options; GRAPHICS gives it WebGL2, in software."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing")
    if not CHROMIUM:
        pytest.skip("no chromium on this machine; apt-get install chromium")
    with playwright.sync_playwright() as p:
        usual = ["--no-sandbox", "--disable-background-networking"]
        yield lambda *options: p.chromium.launch(executable_path=CHROMIUM, args=[*usual, *options])


@contextlib.contextmanager
def opened(page, url: str):
    """Open the page; it must not contact any other host or log an error."""
    asked, errors = [], []
    listeners = {
        "request": lambda request: asked.append(request.url),
        "pageerror": lambda error: errors.append(str(error)),
        "console": lambda m: errors.append(m.text) if m.type == "error" else None,
    }
    for event, listener in listeners.items():
        page.on(event, listener)
    page.goto(url)
    page.get_by_role("button", name="Try a phantom").wait_for()
    yield page
    for event, listener in listeners.items():
        page.remove_listener(event, listener)
    outside = [url for url in asked if not url.startswith((page.url, "data:", "blob:"))]
    assert not outside and not errors, (outside, errors)


@contextlib.contextmanager
def tab_of(browser, width: int = 1000, height: int = 600, **options):
    page = browser.new_page(viewport={"width": width, "height": height}, **options)
    page.set_default_timeout(90_000)
    yield page
    page.close()


@pytest.fixture(scope="module")
def browser(launch):
    """Start a browser that draws slices, in software, which takes seconds for each tab."""
    browser = launch(*GRAPHICS)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def plain_browser(launch):
    """Start a browser without WebGL2 for all tests that do not look at the viewer."""
    with contextlib.closing(launch("--disable-3d-apis")) as browser:
        yield browser


@pytest.fixture(scope="module")
def plain_tab(plain_browser):
    with tab_of(plain_browser) as tab:
        yield tab


@pytest.fixture
def page(plain_tab, server):
    with opened(plain_tab, server[0]):
        yield plain_tab
        plain_tab.unroute_all()


@pytest.fixture
def drawing_page(browser, server):
    with tab_of(browser) as tab, opened(tab, server[0]):
        yield tab


def drop(page, path: Path) -> None:
    page.locator("#files").set_input_files(str(path))
    page.locator("[data-chosen=images]").get_by_text(path.name).wait_for()
    page.get_by_role("button", name="Segment").click()


def wait_for_viewer(page) -> None:
    page.locator("#look[aria-busy=false]").wait_for()


@pytest.fixture(scope="module")
def viewed(browser, server, files):
    """Return the page with a scan in its viewer, which several tests share."""
    with tab_of(browser) as tab, opened(tab, server[0]) as page:
        drop(page, files / "head.nii.gz")
        wait_for_viewer(page)
        yield page


@pytest.fixture
def viewer(viewed):
    """Return the page of `viewed` with its viewer as it was at first."""
    viewed.get_by_role("button", name="Reset").click()
    viewed.wait_for_timeout(300)  # Reset is drawn in software
    return viewed


def drawn(page) -> bytes:
    page.evaluate("() => new Promise(next => requestAnimationFrame(() => setTimeout(next)))")
    return page.locator("canvas").screenshot()


def touch(page, x: int, y: int) -> None:
    """Touch the viewer for a moment; Playwright's tap is too short."""
    page.locator("canvas").evaluate("canvas => canvas.scrollIntoView()")
    canvas, device = page.locator("canvas").bounding_box(), page.context.new_cdp_session(page)
    finger = {"x": canvas["x"] + x, "y": canvas["y"] + y}
    for kind, points in (("touchStart", [finger]), ("touchEnd", [])):
        device.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        page.evaluate("() => new Promise(next => setTimeout(next, 100))")  # once it is handled


def slice_shown(page) -> str:
    return page.locator("output").inner_text().partition(",")[0]


def slice_after(page, act) -> str:
    """Wait up to 5 s for `act` to show another slice; return the slice shown."""
    before = slice_shown(page)
    act()
    for _ in range(50):
        if slice_shown(page) != before:
            break
        page.wait_for_timeout(100)
    return slice_shown(page)


def downloaded(page, name: str) -> bytes:
    with page.expect_download() as download:
        page.get_by_role("link", name=name).click()
    return Path(download.value.path()).read_bytes()


def test_a_scan_in_the_viewer(viewer, server, files):
    page = viewer
    assert page.locator("h2").inner_text() == "head"
    assert re.search(
        r"a lesion of [\d.]+ ml \(\d+ voxels\), on \d of 8", page.locator("#numbers").inner_text()
    )
    told = page.locator("#quality").inner_text()
    assert "not known: this network has no fit; evaluate.py makes one." in told
    assert page.locator("#plain").inner_text() == ""
    mask = downloaded(page, "head_mask.nii.gz")
    assert mask == (files / "expected/head_mask.nii.gz").read_bytes()
    left = [p for p in server[1].rglob("*") if p.is_file() and p.name != "server.log"]
    assert left == [], "the upload is deleted"

    seen = [drawn(page)]
    for plane, last in (("Axial", 8), ("Coronal", 64), ("Sagittal", 64)):
        page.get_by_text(plane, exact=True).click()
        for index in (last // 4, last // 2):
            page.get_by_label("Slice", exact=True).fill(str(index))
            assert slice_shown(page) == f"Slice {index + 1} of {last}"
            seen.append(drawn(page))
    page.get_by_text("3D", exact=True).click()
    seen.append(drawn(page))
    assert len(set(seen)) == len(seen), "each step shows something else"


def test_what_the_viewer_can_do(viewer):
    page = viewer
    page.get_by_text("Axial", exact=True).click()
    first = slice_shown(page)
    seen = [drawn(page)]
    for name in ("Fill", "Off", "Probability", "Post-contrast"):
        page.locator("#look").get_by_text(name, exact=True).click()
        seen.append(drawn(page))
    for name, value in (("Window", 60), ("Level", 30), ("Zoom", 3)):
        page.get_by_label(name, exact=True).fill(str(value))
        seen.append(drawn(page))
    assert len(set(seen)) == len(seen), "each control changes the picture"

    page.get_by_role("button", name="Reset").click()
    page.wait_for_timeout(300)  # Reset is drawn in software
    canvas = page.locator("canvas")
    assert slice_after(page, lambda: canvas.press("ArrowUp")) != first
    assert slice_after(page, lambda: canvas.press("ArrowDown")) == first
    canvas.hover()
    assert slice_after(page, lambda: page.mouse.wheel(0, 100)) != first, "the wheel turns slices"


def focused(page) -> str:
    return page.evaluate("document.activeElement.id || document.activeElement.tagName")


def test_the_keyboard_and_the_cancel_button(page, server, files):
    page.locator("#files").set_input_files(str(files / "head.nii.gz"))
    page.locator("button.first").focus()
    page.route("**/api/segment", lambda route: None)  # neither sent nor answered
    page.keyboard.press("Enter")
    page.locator("#busy:not([hidden])").wait_for()
    assert focused(page) == "cancel" and "brainseg" != page.title()
    page.keyboard.press("Enter")
    page.locator("#busy").wait_for(state="hidden")
    assert page.evaluate("document.activeElement.textContent") == "Segment"
    assert page.title() == "brainseg"
    page.unroute("**/api/segment")
    page.keyboard.press("Enter")
    page.locator("#plain").get_by_text("WebGL2 is missing").wait_for()
    assert focused(page) == "H2" and page.title() == "head – brainseg"
    page.locator("#files").set_input_files([])
    page.locator("button.first").focus()
    page.keyboard.press("Enter")
    assert focused(page) == "error" and page.title() == "error – brainseg"


def test_components_millimetres_and_the_ruler(viewer):
    page = viewer
    page.get_by_text("Axial", exact=True).click()
    first = slice_shown(page)
    page.locator("canvas").press("ArrowUp")
    component = page.locator("#components button").first
    assert re.fullmatch(r"1: [\d.]+ ml, slice \d", component.inner_text())
    assert slice_after(page, component.click) == first
    box = page.locator("canvas").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    there = page.locator("#under").inner_text()
    assert re.fullmatch(r"[LR] [\d.]+, [AP] [\d.]+, [IS] [\d.]+ mm", there)
    page.mouse.move(x + 40, y)
    assert page.locator("#under").inner_text() != there
    page.mouse.move(5, 5)
    crosshair = page.locator("#under").inner_text()
    before = drawn(page)
    page.locator("#ruler label").click()
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 60, y + 20, steps=3)
    page.mouse.up()
    page.mouse.move(5, 5)
    assert drawn(page) != before and page.locator("#under").inner_text() == crosshair


def contrast(*colours: str) -> float:
    """Return the contrast of two colours by WCAG 2, from 1 to 21."""
    lights = []
    for colour in colours:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        channels = np.array([int(digits[k : k + 2], 16) for k in (0, 2, 4)]) / 255
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        lights.append(linear @ (0.2126, 0.7152, 0.0722) + 0.05)
    return max(lights) / min(lights)


def test_borders_and_text_stand_out():
    css = (ROOT / "web/page.css").read_text()
    colours = dict(
        (name, pair.split(", ")) for name, pair in re.findall(r"--(\w+): light-dark\((.*?)\)", css)
    )
    for k in (0, 1):
        for ground in ("paper", "card"):
            assert contrast(colours["line"][k], colours[ground][k]) >= 3
            for text in ("ink", "soft", "blue"):
                assert contrast(colours[text][k], colours[ground][k]) >= 4.5


def test_slices_on_a_phone(browser, server, files):
    phone = tab_of(browser, 390, 844, has_touch=True, is_mobile=True)
    with phone as tab, opened(tab, server[0]) as page:
        drop(page, files / "slices.zip")
        wait_for_viewer(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing sticks out"
        before = slice_shown(page)
        assert slice_after(page, lambda: touch(page, 60, 400)) != before, "the coronal plane"
        assert page.get_by_text("ruler").filter(visible=True).count() == 0, "no mm to measure"


def test_the_phantom(page):
    page.get_by_role("button", name="Try a phantom").click()
    page.locator("#scores").get_by_text("DSC").wait_for()
    page.get_by_text("All slices").click()
    assert page.locator("#montage").evaluate("image => image.naturalWidth") > 0
    assert len(downloaded(page, "phantom_masks.zip")) > 1000


def test_a_browser_without_webgl2(page, files):
    drop(page, files / "head.nii.gz")
    page.locator("#plain").get_by_text("WebGL2 is missing").wait_for()
    assert not page.locator("#look").is_visible()
    assert page.locator("#montage").is_visible()
    mask = downloaded(page, "head_mask.nii.gz")
    assert mask == (files / "expected/head_mask.nii.gz").read_bytes()


def test_expected_dsc_and_warning_on_the_page(page, server, files):
    sent = {"images": open(files / "head.nii.gz", "rb")}
    response = post(server[0], files=sent, headers={"Accept": "application/x-ndjson"})
    answer = json.loads(response.text.splitlines()[-1])
    answer["summary"] |= {"expected_dsc": 0.71, "warning": "This mask may be poor."}
    answer["summary"] |= {"expected_dsc_low": 0.5, "expected_dsc_high": 0.834}
    page.route("**/api/segment", lambda route: route.fulfill(body=json.dumps(answer)))
    drop(page, files / "head.nii.gz")
    page.locator("#warning").get_by_text("This mask may be poor.").wait_for()
    told = page.locator("#quality").inner_text()
    assert "0.71 (0.50 to 0.83 in 8 of 10 scans)" in told and "reach about 0.84" in told


def test_sequences_in_separate_files(drawing_page, files, tmp_path):
    page = drawing_page
    head = sitk.ReadImage(str(files / "head.nii.gz"))
    page.get_by_text("One file per sequence").click()
    for k, name in enumerate(("pre", "flair", "post")):
        path = tmp_path / f"{name}.nii.gz"
        sitk.WriteImage(sitk.VectorIndexSelectionCast(head, k), str(path))
        page.locator(f"input[name={name}]").set_input_files(str(path))
    page.get_by_label("move the other").check()
    page.evaluate("""() => {  // note what is sent
        const append = FormData.prototype.append;
        window.sent = [];
        FormData.prototype.append = function (name, ...more) {
            window.sent.push(name);
            append.call(this, name, ...more);
        };
    }""")
    page.get_by_role("button", name="Segment").click()
    assert page.evaluate("window.sent") == ["pre", "flair", "post", "register"]
    page.locator("#sequences").get_by_text("Pre-contrast").wait_for()
    assert len(downloaded(page, "flair_mask.nii.gz")) > 100


def test_the_vendored_viewer_matches_its_lock_file():
    vendor = ROOT / "web" / "vendor"
    lock = json.loads((vendor / "package-lock.json").read_text())
    version = lock["packages"]["node_modules/@niivue/niivue"]["version"]
    with open(vendor / "niivue.js") as bundle:
        assert bundle.readline().startswith(f"/* NiiVue {version}, ")
    assert "Copyright (c) 2021, Niivue" in (vendor / "LICENSES.txt").read_text()


def test_errors_are_shown_on_the_page(page, tmp_path):
    page.get_by_role("button", name="Segment").click()
    page.locator("#error").get_by_text("No scan yet").wait_for()
    (tmp_path / "broken.nii.gz").write_bytes(b"rubbish")
    drop(page, tmp_path / "broken.nii.gz")
    page.locator("#error").get_by_text("broken.nii.gz: not a readable volume").wait_for()


def check_masks(page, files: Path) -> None:
    """Compare the masks of phantom_000 that the page offers with those of inference.py."""
    with zipfile.ZipFile(io.BytesIO(downloaded(page, "phantom_000_masks.zip"))) as archive:
        assert archive.namelist()
        for name in archive.namelist():
            expected = files / "expected/phantom_000" / name
            assert archive.read(name) == expected.read_bytes()


def test_a_folder_in_a_browser(page, files):
    page.locator("#folder").set_input_files(str(files / "slices/phantom_000"))
    page.locator("[data-chosen=images]").get_by_text("16 files").wait_for()
    page.evaluate("""() => {  // note what is sent
        const append = FormData.prototype.append;
        window.sent = [];
        FormData.prototype.append = function (...part) {
            window.sent.push(part[2]);
            append.apply(this, part);
        };
    }""")
    page.get_by_role("button", name="Segment").click()
    assert "phantom_000/phantom_000_1.tif" in page.evaluate("window.sent"), "with its path"
    page.locator("#scores").get_by_text("DSC").wait_for()
    check_masks(page, files)


def test_an_archive_in_a_browser(page, files):
    drop(page, files / "slices.zip")
    page.locator("#scores").get_by_text("DSC").wait_for()
    check_masks(page, files)


# Growth

VISITS = ("earlier", "later")  # folders of studies


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


def send(url: str, paths: list[Path], names: list[str] | None = None):
    names = names or [path.name for path in paths]
    sent = [("images", (name, path.read_bytes())) for name, path in zip(names, paths, strict=True)]
    return post(url, files=sent)


def test_growth_is_that_of_inference(server, scans):
    files = unpacked(send(server[0], scans[::-1]))  # in any order
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
        files = unpacked(send_zipped(server[0], studies))
    else:
        paths = sorted(studies.rglob("IM*"))
        names = [str(path.relative_to(studies.parent)) for path in paths]
        files = unpacked(send(server[0], paths, names))
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
    files = unpacked(send_zipped(server[0], tmp_path / "in"))
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
    answer = send_zipped(server[0], tmp_path / "in")
    error = answer.json()["error"]
    assert answer.status_code == 400 and said in error, error
    assert "--" not in error and "/tmp" not in error


def test_studies_without_a_patient_in_named_folders(server, studies, tmp_path):
    for name, year in zip(VISITS, (2014, 2015), strict=True):
        shutil.copytree(studies / name, tmp_path / "in" / f"anna_{year}-03-02")
    edit(tmp_path / "in", PatientID="anonymous", StudyDate="")
    summary = json.loads(unpacked(send_zipped(server[0], tmp_path / "in"))["summary.json"])
    assert summary["case"] == "anna" and "mm a year" in summary["rate"]


def test_studies_and_another_field(server, studies):
    paths = sorted(studies.rglob("IM*"))
    sent = [("images", (str(path.relative_to(studies)), path.read_bytes())) for path in paths]
    answer = post(server[0], files=[*sent, ("register", (None, "1"))])
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
    answer = send(server[0], scans, names)
    assert answer.status_code == 400 and said in answer.json()["error"]


def test_growth_on_the_page(server, scans, plain_browser):
    with tab_of(plain_browser, 1300, 900) as tab, opened(tab, server[0]) as page:
        page.locator("#files").set_input_files([str(path) for path in scans])
        page.get_by_role("button", name="Segment").click()
        page.locator("#growth:not([hidden])").wait_for()
        assert "phantom_000: " in page.locator("#growth h3").inner_text()
        assert page.locator("#growth tbody tr").count() == 2
        assert page.locator("#growth img").evaluate("image => image.naturalWidth") > 500
        assert page.locator("#growth a").count() == 5


def test_growth_of_a_folder_of_studies_on_the_page(page, studies):
    page.locator("#folder").set_input_files(str(studies))
    page.get_by_role("button", name="Segment").click()
    page.locator("#growth:not([hidden])").wait_for()
    assert "p1: " in page.locator("#growth h3").inner_text()
    assert page.locator("#growth tbody tr").count() == 2
