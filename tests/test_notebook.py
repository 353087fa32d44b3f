"""Test that the notebook runs through, with right masks before and after fine-tuning."""

import json
import subprocess

from conftest import ROOT

import train
from brainseg.metrics import dsc

SMALLER = {  # the same cells, in a tenth of the time
    "cases=12, slices=12, size=96": "cases=8, slices=4, size=64",
    "--epochs 4": "--epochs 1",
}


def test_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    run_process = subprocess.run

    def run(command, **options):
        if not str(command[1]).endswith("train.py"):
            return run_process(command, **options)
        return train.main(command[2:])

    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setattr(subprocess, "run", run)
    plt.switch_backend("Agg")
    monkeypatch.setattr(plt, "show", plt.close)
    cells = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for long, short in SMALLER.items():
        assert any(long in cell for cell in code), f"not in the notebook any more: {long}"
        code = [cell.replace(long, short) for cell in code]
    names, masks = {}, []
    for cell in code:
        exec(cell.replace('root / "demo" / "notebook"', f"Path({str(tmp_path)!r})"), names)
        if "mask" in names and not any(mask is names["mask"] for mask in masks):
            masks.append(names["mask"])
    before, after = (dsc(mask, names["truth"]) for mask in masks)
    assert before > 0.8 and after > 0.8, f"{before:.2f}, and {after:.2f} after a few steps"
