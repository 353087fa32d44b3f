"""Make the README's pictures from phantoms that the demo's network has not seen.

make demo && .venv/bin/python assets/make.py
"""

import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from metrics import dsc  # noqa: E402
from phantom import make_volume  # noqa: E402
from segmentation import Segmenter  # noqa: E402
from utils import outline, save_dsc_figure, save_gif, to_grey  # noqa: E402

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


if __name__ == "__main__":
    main()
