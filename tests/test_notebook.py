"""The notebook runs from top to bottom, and its masks are right before and after fine-tuning."""

import json

import matplotlib.pyplot as plt
from conftest import ROOT

from brainseg.metrics import dsc


def test_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    plt.switch_backend("Agg")
    monkeypatch.setattr(plt, "show", plt.close)
    cells = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names, masks = {}, []
    for cell in code:
        exec(cell.replace('root / "demo" / "notebook"', f"Path({str(tmp_path)!r})"), names)
        if "mask" in names and not any(mask is names["mask"] for mask in masks):
            masks.append(names["mask"])
    assert len(masks) == 2, "before and after fine-tuning"
    assert all(dsc(mask, names["truth"]) > 0.8 for mask in masks)
