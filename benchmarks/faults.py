"""Try what goes wrong in use at random, and count what survives: kills, damaged files, odd uploads.

    python3 -m benchmarks.faults                          every trial, about ten minutes
    python3 -m benchmarks.faults --only kill-train mutants --seed 1

Each trial starts the real commands on synthetic heads in a temporary folder, with bounded counts
and times. A trial is survived if nothing that was written before is lost or mixed, nothing half
written is left, bad input is answered in a sentence, and, where work can be resumed, the result is
the same to the byte as without the fault. The table goes to stdout; docs/faults.md has its figures.
"""

from __future__ import annotations

import argparse
import io
import random
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import SimpleITK as sitk
from tqdm import tqdm

from brainseg.devices import available_cores
from brainseg.io.files import read_table
from brainseg.phantom import make_volume, write_data_set
from utils import git_commit

from .clients import ask, pack_slices, serving
from .timing import ROOT, processor

NETWORK = ROOT / "weights" / "unet-folds" / "unet-a5f30600.pt"
LIMIT = 300  # seconds for one command
MEMORY = 12 << 30  # bytes of address space for one command
Counts = tuple[int, int]  # faults tried, survived


def words(script: str, options: Sequence[object]) -> list[str]:
    return [sys.executable, str(ROOT / script)] + list(map(str, options))


def inference(images: Path, out: Path, *more: object) -> list[str]:
    options = ["--images", images, "--predictions", out, "--figure", out / "dsc.png"]
    options += ["--weights", NETWORK, "--image-size", 64, "--device", "cpu"]
    return words("inference.py", options + list(more))


def training(images: Path, out: Path, *more: object) -> list[str]:
    fixed = "--image-size 32 --features 4 --epochs 4 --batch-size 8 --vis-freq 0 --device cpu"
    options = ["--images", images, "--weights", out, "--logs", out / "logs"]
    options += ["--cache", out.parent / "cache", "--folds", 2, "--fold", 0]
    return words("train.py", options + fixed.split() + list(more))


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with bounded time and memory."""
    return subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT, preexec_fn=memory_limit
    )


def kill_after(command: list[str], seconds: float) -> None:
    """Start a command and kill it, with no chance to clean up, after some seconds."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.kill()


def files_of(folder: Path) -> dict[str, bytes]:
    """Read what a run leaves, apart from its records of times and its empty locks."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    lasting = [path for path in paths if path.suffix != ".lock" and path.name != "args.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in lasting}


def kill_inference(folder: Path, chance: random.Random) -> Counts:
    """Kill inference.py at random moments, then continue with --skip-existing."""
    write_data_set(folder / "images", 6, 12, 96)
    start = time.monotonic()
    assert run(inference(folder / "images", folder / "whole")).returncode == 0
    seconds = time.monotonic() - start
    undisturbed = files_of(folder / "whole")
    survived = 0
    for k in range(14):
        out = folder / f"killed{k}"
        kill_after(inference(folder / "images", out), chance.uniform(0.3, 1) * seconds)
        done = run(inference(folder / "images", out, "--skip-existing"))
        survived += done.returncode == 0 and files_of(out) == undisturbed
    return 14, survived


def kill_train(folder: Path, chance: random.Random) -> Counts:
    """Kill train.py at random moments, then resume: weights and checkpoint as without."""
    write_data_set(folder / "images", 10, 8, 64)
    assert run(training(folder / "images", folder / "first")).returncode == 0  # fills the cache
    start = time.monotonic()
    assert run(training(folder / "images", folder / "whole")).returncode == 0
    seconds = time.monotonic() - start
    undisturbed = (folder / "whole" / "unet.pt").read_bytes()
    survived = 0
    for k in range(7):
        out = folder / f"killed{k}"
        kill_after(training(folder / "images", out), chance.uniform(0.5, 1) * seconds)
        command = training(folder / "images", out)
        if (out / "unet.ckpt").exists():
            command.append("--resume")
        done = run(command)
        left = [path for path in out.glob(".brainseg-*") if path.is_dir()]
        same = done.returncode == 0 and (out / "unet.pt").read_bytes() == undisturbed
        survived += same and not left
    return 7, survived


def memory_limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def mutants(folder: Path, chance: random.Random) -> Counts:
    """Damage volumes and slices at random: each is segmented, or refused by name in a sentence."""
    count = 180
    images = folder / "images"
    images.mkdir()
    originals = make_originals(folder / "originals")
    for k in range(count):
        source = originals[k % len(originals)]
        content = mutate(source.read_bytes(), chance)
        (images / f"mutant{k:03d}{''.join(source.suffixes)}").write_bytes(content)
    done = run(inference(images, folder / "out"))
    rows = read_table(folder / "out" / "volumes.csv")
    if "Traceback" in done.stderr:
        return count, 0
    answered = [row for row in rows.values() if row["lesion_voxels"] or row["warning"]]
    return count, len(answered)


def make_originals(folder: Path) -> list[Path]:
    """Write one head in each format of a volume file."""
    folder.mkdir()
    volume = make_volume(0, 8, 48)[0][..., 1]
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing((2.0, 2.0, 6.0))
    paths = []
    for suffix in (".nii.gz", ".nii", ".nrrd", ".mha"):
        path = folder / f"head{suffix}"
        sitk.WriteImage(image, str(path))
        paths.append(path)
    return paths


def mutate(content: bytes, chance: random.Random) -> bytes:
    """Change some bytes, mostly of the header, or cut, empty or repeat a part."""
    data = bytearray(content)
    kind = chance.randrange(4)
    if kind == 0:
        for _ in range(chance.randint(1, 20)):
            data[chance.randrange(min(len(data), 400))] = chance.randrange(256)
    elif kind == 1:
        del data[chance.randrange(len(data)) :]
    elif kind == 2:
        start = chance.randrange(len(data))
        data[start : start + 64] = bytes(len(data[start : start + 64]))
    else:
        start = chance.randrange(len(data))
        data[start:start] = data[start : start + chance.randint(1, 200)]
    return bytes(data)


def uploads(folder: Path, chance: random.Random) -> Counts:
    """Send the page odd uploads; it refuses each in a sentence, and goes on."""
    temporary = folder / "tmp"
    temporary.mkdir()
    write_data_set(folder / "images", 1, 8, 96)
    head = pack_slices(sorted((folder / "images" / "phantom_000").glob("*.tif")))
    options = ["--weights", NETWORK]
    sent = odd_uploads(chance)
    survived = 0
    with (
        open(folder / "log.txt", "w") as log,
        serving(ROOT, options, log, TMPDIR=str(temporary)) as (url, _),
    ):
        for name, content in sent:
            answer = httpx.post(f"{url}/segment", files={"images": (name, content)}, timeout=LIMIT)
            survived += 400 <= answer.status_code < 500 and "error" in answer.json()
        masks, _ = ask(url, head)
        survived += bool(masks)
    left = [path for path in temporary.iterdir() if "brainseg" in path.name]
    traceback = "Traceback" in (folder / "log.txt").read_text()
    survived += not left
    survived += not traceback
    return len(sent) + 3, survived


def odd_uploads(chance: random.Random) -> list[tuple[str, bytes]]:
    """Make uploads that must be refused, by the name of their file."""
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("head_1.tif", bytes(1 << 31))
    outside = io.BytesIO()
    with zipfile.ZipFile(outside, "w") as file:
        for name in ("../../outside_1.tif", "/etc/outside_1.tif", "c:\\outside_1.tif"):
            file.writestr(name, b"x")
    many = io.BytesIO()
    with zipfile.ZipFile(many, "w") as file:
        for k in range(20000):
            file.writestr(f"head_{k}.tif", b"")
    text = b"%!PS-Adobe-3.0\nshowpage\n"
    noise = bytes(chance.randrange(256) for _ in range(5000))
    return [
        ("bomb.zip", bomb.getvalue()),
        ("outside.zip", outside.getvalue()),
        ("many.zip", many.getvalue()),
        ("empty.zip", b""),
        ("half.zip", bomb.getvalue()[:1000]),
        ("empty.nii.gz", b""),
        ("noise.nii.gz", noise),
        ("noise.dcm", b"\0" * 128 + b"DICM" + noise),
        ("page.html", b"<html></html>"),
        ("postscript_1.png", text),
        ("postscript_1.tif", text),
        ("../../../etc/passwd_1.png", noise),
        ("con\0trol_1.png", noise),
        ("\N{SNOWMAN}\N{RIGHT-TO-LEFT OVERRIDE}_1.png", noise),
        ("x" * 300 + "_1.png", noise),
    ]


TRIALS: dict[str, Callable[[Path, random.Random], Counts]] = {
    "kill-inference": kill_inference,
    "kill-train": kill_train,
    "mutants": mutants,
    "uploads": uploads,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and damages")
    args = parser.parse_args()
    lines = ["| fault | tried | survived |", "|---|---|---|"]
    lost = 0
    for name in tqdm(args.only, unit="trial", disable=None):
        with tempfile.TemporaryDirectory() as folder:
            tried, survived = TRIALS[name](Path(folder), random.Random(args.seed))
        what = (TRIALS[name].__doc__ or "").partition(":")[0].rstrip(".")
        lines.append(f"| {name}: {what[0].lower()}{what[1:]} | {tried} | {survived} |")
        lost += tried - survived
    print("\n".join(lines))
    print(f"\nseed {args.seed}, commit {git_commit()}, {processor()}, {available_cores()} cores")
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()
