"""Phantom data for every test; real cases where ../shared/lgg or $LGG is there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

SIZE = 32  # of preprocessed slices
Items = list[tuple[torch.Tensor, torch.Tensor]]  # of a data set: images and masks
SHARED = Path(os.environ.get("LGG", ROOT.parent / "shared" / "lgg"))


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """Keep preprocessed volumes of the tests away from the user's own."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)  # tiny networks: several threads would mostly wait for each other


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """A folder of 12 small phantom cases in the published layout. Copy it before changing it."""
    from phantom import write_data_set

    folder = tmp_path_factory.mktemp("phantoms") / "images"
    write_data_set(folder, cases=12, slices=8, size=64, seed=0)
    return folder


@pytest.fixture(scope="session")
def lgg(tmp_path_factory) -> Path:
    """Three real cases in the published layout, data.csv and README.md lying about in the root."""
    if not (SHARED / "unpack.py").is_file():
        pytest.skip(f"no real cases in {SHARED}")
    folder = tmp_path_factory.mktemp("lgg") / "kaggle_3m"
    cases = ["TCGA_CS_4944_20010208", "TCGA_HT_7692_19960724", "TCGA_CS_4942_19970222"]
    command = [sys.executable, str(SHARED / "unpack.py"), str(folder), *cases]
    subprocess.run(command, check=True, capture_output=True)
    for name in ("data.csv", "README.md"):
        shutil.copy(SHARED / name, folder)
    return folder


@pytest.fixture
def two(phantoms, tmp_path) -> Path:
    """A copy of two phantom cases that may be changed."""
    for name in ("phantom_001", "phantom_002"):
        shutil.copytree(phantoms / name, tmp_path / "two" / name)
    return tmp_path / "two"


def open_all(two: Path, image_size: int = SIZE, **options) -> Items:
    """Every item of the two cases, as tensors."""
    from dataset import BrainSegmentationDataset

    options = {"cache": two.parent / "cache", "workers": 1, **options}
    return [*BrainSegmentationDataset(two, "all", image_size, **options)]


def same(one: Items, other: Items) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )
