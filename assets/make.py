"""Make the README's pictures from phantoms that the demo's network has not seen.

make demo && .venv/bin/python -m assets.make
.venv/bin/python -m assets.make growth                              # growth.png: weights/unet-folds
python3 app.py & python3 -m assets.make http://127.0.0.1:7860       # those of the page (playwright)

folds_dsc.png and folds_expected.png are scores.png and expected_dsc.png of evaluate.py, with
--subset train validation --fit-expected-dsc and a copy of weights/unet-folds, as the fit is written
into its cards.
"""

import datetime
import shutil
import sys
import tempfile
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from brainseg.alignment import Measured
from brainseg.io.layouts import find_case
from brainseg.io.pictures import outline, save_figure, to_grey
from brainseg.phantom import make_volume, write_patients
from brainseg.reports.growth import growth_figure
from brainseg.reports.volumes import volume_row
from brainseg.segmenter import Segmenter
from brainseg.visits import follow
from brainseg.weights import shipped_weights

ROOT = Path(__file__).resolve().parents[1]

SEEDS, SHOWN = (1000, 1001), 6


def main() -> None:
    segment = Segmenter.from_weights(ROOT / "demo" / "weights" / "unet.pt")
    rows = []
    for seed in SEEDS:
        volume, truth = make_volume(seed, slices=24, size=192)
        mask = segment(volume)
        pictures = outline(to_grey(volume), mask, truth)
        largest = truth.sum(axis=(1, 2)).argsort()[-SHOWN:]
        rows.append(np.concatenate(pictures[np.sort(largest)], axis=1))
    iio.imwrite(ROOT / "assets" / "outlines.png", np.concatenate(rows))


def growth() -> None:
    """The growth of a phantom patient's lesion, by the masks of weights/unet-folds."""
    segmenter = Segmenter.from_weights(shipped_weights("unet-folds"))
    fit = segmenter.expected_dsc_fit
    assert fit is not None
    scans = []
    with tempfile.TemporaryDirectory() as folder:
        write_patients(Path(folder), patients=1, scans=4, growth=4, size=160, seed=3)
        for path in sorted(Path(folder).glob("*_mask.nii.gz")):
            case = find_case(path.with_name(path.name.replace("_mask", "")))
            volume = case.read()
            images, frame = segmenter.preprocess(volume, case.aspect)
            segmentation = segmenter.segmentation_of(
                segmenter.probabilities(images), frame, case.spacing
            )
            row = volume_row(case, volume, segmentation.mask, segmentation.expected)
            day = datetime.date.fromisoformat(case.name.rpartition("_")[2])
            scans.append((Measured(case, segmentation.mask, row), day))
        patient, _ = follow(scans, fit["volume_errors"])
    save_figure(ROOT / "assets" / "growth.png", growth_figure(patient), dpi=90)


def screenshots(url: str) -> None:
    """The page with a phantom, at laptop width in light and at phone width in dark colours."""
    from playwright.sync_api import sync_playwright

    graphics = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        scan, mask = write_phantom(Path(folder), seed=1002)
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", *graphics]
        )
        page = browser.new_page()
        page.set_default_timeout(600_000)
        page.goto(url)
        page.locator("#files").set_input_files(scan)
        page.locator("input[name=mask]").set_input_files(mask)
        page.get_by_role("button", name="Segment").click()
        page.locator("#look[aria-busy=false]").wait_for()
        for name, width, height, colours in (
            ("app", 1280, 800, "light"),
            ("app-phone", 390, 844, "dark"),
        ):
            page.emulate_media(color_scheme=colours)
            page.set_viewport_size({"width": width, "height": height})
            page.locator("#result").evaluate("result => result.scrollIntoView()")
            page.wait_for_timeout(20_000)  # it is drawn in software
            page.screenshot(path=ROOT / "assets" / f"{name}.png")
        browser.close()


def write_phantom(folder: Path, seed: int) -> tuple[Path, Path]:
    """Write a phantom of thin slices and its true mask as NIfTI files."""
    import SimpleITK

    volume, truth = make_volume(seed, slices=64, size=192)
    paths = folder / "phantom.nii.gz", folder / "phantom_mask.nii.gz"
    for path, array in zip(paths, (volume, truth.astype(np.uint8)), strict=True):
        image = SimpleITK.GetImageFromArray(array, isVector=array.ndim == 4)
        image.SetSpacing((1, 1, 2.1))
        SimpleITK.WriteImage(image, str(path))
    return paths


if __name__ == "__main__":
    if sys.argv[1:] == ["growth"]:
        growth()
    elif sys.argv[1:]:
        screenshots(sys.argv[1])
    else:
        main()
