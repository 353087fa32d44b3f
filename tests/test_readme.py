"""Run what the README tells a newcomer to type, exactly as written there."""

import re

import numpy as np
import pytest
from conftest import ROOT

import app
import evaluate
import export
import inference
import train
from brainseg.io.layouts import find_cases
from brainseg.metrics import dsc
from brainseg.phantom import make_volume

README = (ROOT / "README.md").read_text()


def notebook_example(volume: np.ndarray) -> np.ndarray:
    """Run the Python block of the README on a volume, from the root of the repository."""
    marked = r"<!-- run by tests/test_readme.py -->\n```python\n(.*?)```"
    (code,) = re.findall(marked, README, re.S)
    names = {"volume": volume}
    exec(code, names)
    return names["mask"]


def test_notebook_example_gives_a_mask_of_the_volume(monkeypatch):
    monkeypatch.chdir(ROOT)
    volume, _ = make_volume(seed=0, slices=6, size=64)
    mask = notebook_example(volume)
    assert mask.dtype == bool and mask.shape == volume.shape[:3]


def test_notebook_example_is_right_on_a_real_case(lgg, monkeypatch):
    """The front-page example of earlier implementations once gave a wrong mask."""
    monkeypatch.chdir(ROOT)
    volume, truth = find_cases(lgg, ["TCGA_CS_4944_20010208"])[0].read_pair()
    assert dsc(notebook_example(volume), truth) > 0.7


@pytest.mark.parametrize(
    "script", [train, inference, evaluate, export, app], ids=lambda script: script.__name__
)
def test_every_option_that_the_readme_names_exists(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert not stop.value.code
    shown = capsys.readouterr().out
    calls = re.findall(rf"{script.__name__}.py ((?:[^\n`]|\\\n)*)", README)
    for option in {o for call in calls for o in re.findall(r"(?<!\S)--[a-z-]+", call)}:
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", shown), option


def test_files_that_the_readme_links_to_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_torch_of_constraints_is_that_of_the_image():
    (pin,) = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert f"pytorch/pytorch:{pin}-cuda" in (ROOT / "Dockerfile").read_text()
