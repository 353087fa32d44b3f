"""Provide phantom data for every test, and three real cases if they are in ../shared/lgg or $LGG.

$LGG may be the published folder (kaggle_3m). PyTorch is imported late, as the process that starts
the two that test does not need it.
"""

import contextlib
import csv
import functools
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SIZE = 32  # of preprocessed slices
TRAINED_ON = ["phantom_001", "phantom_002"]
Items = list[tuple]  # images and masks of a data set, as tensors
FORK = multiprocessing.get_context("fork")
# These take longest: a worker that got one of them last would finish long after the others.
SLOW = "app inference onnx train campaign page distributed evaluate visits outputs".split()
SLOW += "hospital_files dicom_seg ensemble hub upload evening cohorts scan fill notebook".split()
SHARED = Path(os.environ.get("LGG", ROOT.parent / "shared" / "lgg"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow files first, where `--dist loadfile --no-loadscope-reorder` begins."""
    rank = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: rank.get(item.path.stem.removeprefix("test_"), len(SLOW)))


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """Keep preprocessed volumes of the tests out of the user's cache."""
    import torch

    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    torch.set_num_threads(1)  # tiny networks: several threads would mostly wait for each other


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """Return 12 small phantom cases in the published layout. Copy the folder before changing it."""
    from brainseg.phantom import write_data_set

    folder = tmp_path_factory.mktemp("phantoms") / "images"
    write_data_set(folder, cases=12, slices=8, size=64, seed=0)
    return folder


@pytest.fixture(scope="session")
def lgg(tmp_path_factory) -> Path:
    """Return three real cases in the published layout, with data.csv and README.md in the root."""
    folder = tmp_path_factory.mktemp("lgg") / "kaggle_3m"
    cases = ["TCGA_CS_4944_20010208", "TCGA_HT_7692_19960724", "TCGA_CS_4942_19970222"]
    if (SHARED / "unpack.py").is_file():
        command = [sys.executable, str(SHARED / "unpack.py"), str(folder), *cases]
        subprocess.run(command, check=True, capture_output=True)
    elif all((SHARED / case).is_dir() for case in cases):
        for case in cases:
            shutil.copytree(SHARED / case, folder / case)
    else:
        pytest.skip(f"no real cases in {SHARED}; set LGG to the folder kaggle_3m")
    for name in ("data.csv", "README.md"):
        shutil.copy(SHARED / name, folder)
    return folder


@pytest.fixture
def two(phantoms, tmp_path) -> Path:
    """Return a copy of two phantom cases that may be changed."""
    for name in ("phantom_001", "phantom_002"):
        shutil.copytree(phantoms / name, tmp_path / "two" / name)
    return tmp_path / "two"


def open_all(two: Path, image_size: int = SIZE, **options) -> Items:
    """Return every item of the two cases, as tensors."""
    from dataset import BrainSegmentationDataset

    options = {"cache": two.parent / "cache", "workers": 1, **options}
    return [*BrainSegmentationDataset(two, "all", image_size, **options)]


def same(one: Items, other: Items) -> bool:
    import torch

    return len(one) == len(other) and all(
        torch.equal(a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def make_weights(path: Path, in_channels: int = 3, trained_on=TRAINED_ON) -> Path:
    """Write a network that calls the brightest tenth of FLAIR lesion, plus noise, and its card."""
    import torch

    from brainseg.phantom import make_volume
    from brainseg.preprocess import preprocess
    from brainseg.unet import UNet

    torch.manual_seed(0)
    model = UNet(in_channels, init_features=4).eval()
    flair = min(1, in_channels - 1)
    images, _ = preprocess(make_volume(0, 8, 64)[0][..., :in_channels], 32)
    first, last = model.encoder1, model.decoder1
    with torch.no_grad():  # the first feature passes FLAIR through; the other three are random
        for layer, source in (
            (first.enc1conv1, flair), (first.enc1conv2, 0), (last.dec1conv1, 4), (last.dec1conv2, 0)
        ):  # fmt: skip
            layer.weight[0] = 0
            layer.weight[0, source, 1, 1] = 1
        model.conv.weight *= 5
        model.conv.weight[0, 0] = 4
        model.conv.bias -= model(images, logits=True).quantile(0.9)
    torch.save(model.state_dict(), path)
    card = {"image_size": 32, "preprocessing": 2, "cases": {"train": trained_on}}
    path.with_suffix(".json").write_text(json.dumps(card))
    return path


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Return weights of `make_weights`, in a folder of their own. They must not be changed."""
    return make_weights(tmp_path_factory.mktemp("weights") / "narrow.pt")


@pytest.fixture
def no_pictures(monkeypatch):
    """Let evaluate.py save no picture, which takes two thirds of a run, where none is looked at."""
    import evaluate

    for name in ("save_scores", "save_gallery"):
        monkeypatch.setattr(evaluate.report, name, lambda *_: None)


def run_main(main: Callable[[list[str]], None], *words: object) -> str | int:
    """Run a command; return its exit status, or its sentence for stderr with status 1."""
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code
    return 0


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    """Read all files below a folder, by their path there, but locks and run.json, with its time."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    files = [path for path in files if path.name != "run.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def traces() -> list:
    """Return what a run could leave changed in its process."""
    import torch

    cudnn = torch.backends.cudnn
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    umask = os.umask(0o022)
    os.umask(umask)
    return [*handlers, umask, cudnn.deterministic, cudnn.benchmark, torch.get_num_threads()]


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Let files of this process grow to `size` bytes only, as if the disk were full then."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def in_processes(
    count: int, work: Callable[[], object], seconds: float = 120, torchrun: bool = True
) -> list[object]:
    """Return the result of `work` in each of `count` processes, set up nearly as by torchrun.

    An exception, SystemExit included, replaces a result; a process that exits at once gives
    "ended". Unless `torchrun` is False, the others are then terminated too, as torchrun does.
    The processes are forked, so patches of the test apply in them too.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:

        def process(rank: int) -> None:
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
            os.environ.update({name: str(value) for name, value in places.items()})
            os.environ["LOCAL_WORLD_SIZE"] = str(count)
            # They meet in a file: a port that is free now may soon be taken by another test.
            meeting = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": count}
            join = torch.distributed.init_process_group
            torch.distributed.init_process_group = functools.partial(join, **meeting)
            try:
                result = work()
            except BaseException as error:
                result = error
            Path(folder, str(rank)).write_bytes(pickle.dumps(result))

        children = [FORK.Process(target=process, args=(rank,)) for rank in range(count)]
        for child in children:
            child.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(child.is_alive() for child in children):
            if torchrun and any(child.exitcode for child in children):
                for child in children:
                    child.terminate()
            time.sleep(0.02)
        hung = [child for child in children if child.is_alive()]
        for child in hung:
            child.kill()
        assert not hung, f"{len(hung)} of {count} processes hang"
        files = [Path(folder, str(rank)) for rank in range(count)]
        return [pickle.loads(file.read_bytes()) if file.exists() else "ended" for file in files]
