"""Run what the README tells a newcomer to type, exactly as written there."""

import re
from pathlib import Path

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


CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def places_of(file: str) -> list[Path]:
    """Find what CONTRIBUTING.md names, which may leave out brainseg/ or brainseg/io/."""
    folders = [ROOT, ROOT / "brainseg", ROOT / "brainseg" / "io", ROOT / "tests"]
    return [folder / file for folder in folders if (folder / file).exists()]


def test_files_and_names_of_contributing_exist():
    for file, name in re.findall(r"`([\w/]+(?:\.py|/))(?:: (\w+))?`", CONTRIBUTING):
        places = places_of(file)
        assert places, file
        if name:
            assert re.search(rf"^(def |class )?{name}\b", places[0].read_text(), re.M), name


def test_a_room_imports_only_from_the_rooms_below_it():
    """A row of the table in CONTRIBUTING.md is a room; a file counts before its folder."""
    rows = re.findall(r"^\| (`.*?) \|", CONTRIBUTING, re.M)
    rooms = [(file, k) for k, row in enumerate(rows) for file in re.findall(r"`(.*?)`", row)]
    height = {str(places_of(file)[0].relative_to(ROOT)): k for file, k in rooms}

    def room_of(path: Path) -> int | None:
        parents = [str(parent) for parent in (path, *path.parents)]
        return next((height[name] for name in parents if name in height), None)

    for path in [*ROOT.glob("*.py"), *ROOT.glob("brainseg/**/*.py"), *ROOT.glob("server/*.py")]:
        inside = path.relative_to(ROOT)
        for level, module in re.findall(r"^from (\.*)(\w[\w.]*) import", path.read_text(), re.M):
            folder = inside.parents[len(level) - 1] if level else Path()
            room = room_of((folder / module.replace(".", "/")).with_suffix(".py"))
            if room is not None and room_of(inside) is not None:
                assert room >= room_of(inside), f"{inside} imports {level}{module}"
