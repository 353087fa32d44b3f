"""Make the README's pictures from phantoms that the demo's network has not seen.

make demo && .venv/bin/python -m assets.make
python3 app.py & python3 -m assets.make http://127.0.0.1:7860       # those of the page (playwright)
"""

import shutil
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from brainseg.io.pictures import outline, save_dsc_figure, save_gif, to_grey
from brainseg.metrics import dsc
from brainseg.phantom import make_volume
from brainseg.segmenter import Segmenter

ROOT = Path(__file__).resolve().parents[1]

SEEDS, SHOWN = range(1000, 1010), 6


def main() -> None:
    segment = Segmenter.from_weights(ROOT / "demo" / "weights" / "unet.pt")
    rows, scores = [], {}
    for seed in SEEDS:
        volume, truth = make_volume(seed, slices=24, size=192)
        mask = segment(volume)
        scores[f"phantom {seed}"] = dsc(mask, truth)
        if len(rows) < 2:
            pictures = outline(to_grey(volume), mask, truth)
            largest = truth.sum(axis=(1, 2)).argsort()[-SHOWN:]
            rows.append(np.concatenate(pictures[np.sort(largest)], axis=1))
    iio.imwrite(ROOT / "assets" / "outlines.png", np.concatenate(rows))
    save_gif(ROOT / "assets" / "phantom.gif", pictures)
    save_dsc_figure(ROOT / "assets" / "dsc.png", scores)


def screenshots(url: str) -> None:
    """The page with the phantom, at laptop and phone width."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for name, width, height in (("app", 1100, 800), ("app-phone", 390, 844)):
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(url)
            page.get_by_role("button", name="Try a phantom").click()
            page.locator("#result canvas[data-drawn]").wait_for()
            page.locator("h2").evaluate("heading => heading.scrollIntoView({block: 'nearest'})")
            page.screenshot(path=ROOT / "assets" / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    screenshots(sys.argv[1]) if sys.argv[1:] else main()
