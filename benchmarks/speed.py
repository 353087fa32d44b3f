"""Time brainseg beside a plain scikit-image, NumPy and eager PyTorch rendering of the same steps.

    python3 benchmarks/speed.py --images ./kaggle_3m                        every row
    python3 benchmarks/speed.py --images ./kaggle_3m --only preprocess step

Both are timed on the same cases in the same run, one after the other, on an otherwise idle
machine; the plain rendering is benchmarks/plain.py. Prints a Markdown table and the conditions.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import plain  # noqa: E402

import export  # noqa: E402
from cache import prepare  # noqa: E402
from cases import find_cases  # noqa: E402
from checkpoint import load_pretrained, load_state, model_from_state, shipped_weights  # noqa: E402
from dataset import BrainSegmentationDataset, select_cases  # noqa: E402
from metrics import dsc  # noqa: E402
from segmentation import Segmenter, has_bfloat16  # noqa: E402
from train import get_args  # noqa: E402
from trainer import Trainer  # noqa: E402
from transform import augment  # noqa: E402
from unet import UNet  # noqa: E402
from utils import make_generator  # noqa: E402
from volume import preprocess, preprocess_mask  # noqa: E402

SIZE, BATCH = 256, 16
PLAIN_INFERENCE = """
import sys; sys.path[:0] = {paths!r}
import plain
from checkpoint import load_state
scores = plain.infer_folder(load_state({weights!r}), {images!r}, {cases!r}, {out!r})
print(sum(scores.values()) / len(scores))
"""


def seconds(work: Callable[[], object], repeats: int = 1, warm: bool = True) -> float:
    """The median wall time of `work`, after one call that does not count."""
    if warm:
        work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def one_thread(work: Callable[[], object]) -> Callable[[], object]:
    def limited() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        work()
        torch.set_num_threads(threads)

    return limited


def row(name: str, ours: float, theirs: float | None, unit: str) -> None:
    ratio = f"{theirs / ours:.1f}" if theirs is not None else ""
    plain_time = f"{theirs:.4g}" if theirs is not None else ""
    print(f"| {name} | {plain_time} | {ours:.4g} | {unit} | {ratio} |", flush=True)


def bench_preprocess(cases: list, args: argparse.Namespace) -> None:
    """Arithmetic of a volume and its mask, one core, nothing read or cached."""
    chosen = select_cases(cases, "validation")[: args.volumes]
    pairs = [case.read_pair() for case in chosen]
    slices = sum(len(volume) for volume, _ in pairs)

    def ours() -> None:
        for volume, mask in pairs:
            _, frame = preprocess(volume, SIZE)
            preprocess_mask(mask, frame)

    def theirs() -> None:
        for volume, mask in pairs:
            plain.preprocess(volume, SIZE)
            plain.preprocess_mask(volume, mask, SIZE)

    row(
        f"preprocess {len(pairs)} volumes, {slices} slices, one core",
        seconds(one_thread(ours), 3) / slices,
        seconds(one_thread(theirs), 1, warm=False) / slices,
        "s a slice",
    )


def bench_start(cases: list, args: argparse.Namespace) -> None:
    """Read and preprocess all cases into an empty cache, then open them from it."""
    slices = sum(len(case.slices) for case in cases)
    with tempfile.TemporaryDirectory() as cache:
        cold = seconds(lambda: prepare(cases, SIZE, cache), warm=False)
        warm = seconds(lambda: prepare(cases, SIZE, cache), warm=False)
    row(f"cold start, {len(cases)} cases, {slices} slices, reading included", cold, None, "s")
    row(f"warm start, {len(cases)} cases", warm, None, "s")


def bench_augment(cases: list, args: argparse.Namespace) -> None:
    """A training batch from the stored volumes: gathered, scaled, rotated, flipped."""
    dataset = BrainSegmentationDataset(args.images, "validation", SIZE)
    indices = np.linspace(0, len(dataset) - 1, BATCH).astype(int).tolist()
    items = [dataset[index] for index in indices]
    images = np.stack([image.numpy().transpose(1, 2, 0) for image, _ in items])
    masks = np.stack([mask.numpy().transpose(1, 2, 0) for _, mask in items])

    def ours() -> None:
        batch, mask = dataset.batch(indices)
        augment(batch.float(), mask.float(), make_generator(0))

    for order, name in ((1, "linear"), (2, "quadratic")):

        def theirs(order: int = order) -> None:
            rng = np.random.default_rng(0)
            plain.augmented_batch(images, masks, range(BATCH), rng, order=order)

        row(
            f"augment a batch of {BATCH}, plain one {name}",
            seconds(ours, 10),
            seconds(theirs, 3),
            "s",
        )


def bench_step(cases: list, args: argparse.Namespace) -> None:
    """Forward, loss, backward and optimiser on a batch that is already in memory."""
    dataset = BrainSegmentationDataset(args.images, "validation", SIZE)
    items = [dataset[index] for index in range(0, len(dataset), len(dataset) // BATCH)[:BATCH]]
    images, masks = (torch.stack(part) for part in zip(*items, strict=True))
    model = UNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    theirs = seconds(lambda: plain.train_step(model, optimizer, images, masks), 3)
    precisions = ["--no-amp"] + ["--amp"] * has_bfloat16(torch.device("cpu"))
    for precision in precisions:
        options = ["--device", "cpu", "--aug-scale", "0", "--aug-angle", "0", precision]
        trainer = Trainer(get_args(options)[0], dataset)
        ours = seconds(lambda trainer=trainer: trainer.train_step(images, masks), 3)
        name = "bfloat16" if precision == "--amp" else "float32"
        row(f"training step, batch {BATCH}, {SIZE} x {SIZE}, {name}", ours, theirs, "s")


def bench_network(cases: list, args: argparse.Namespace) -> None:
    """Probabilities of 32 slices that are in memory: eager, batch 16, or through the Segmenter."""
    dataset = BrainSegmentationDataset(args.images, "validation", SIZE)
    images = torch.stack([dataset[index][0] for index in range(32)])
    model = load_pretrained("unet")

    def theirs() -> None:
        with torch.inference_mode():
            for batch in images.split(BATCH):
                model(batch)

    eager = seconds(theirs, 3) / len(images)
    for amp in [False] + [True] * has_bfloat16(torch.device("cpu")):
        segmenter = Segmenter(model, SIZE, device="cpu", amp=amp)
        ours = seconds(lambda s=segmenter: s.probabilities(images), 3) / len(images)
        row(f"network alone, {'bfloat16' if amp else 'float32'}", ours, eager, "s a slice")


def bench_onnx(cases: list, args: argparse.Namespace) -> None:
    """Probabilities of the validation cases, prepared in memory, and the DSC of their masks."""
    weights = args.weights or shipped_weights("unet")
    model = model_from_state(load_state(weights), weights)[1]
    plainly = Segmenter(model, SIZE, device="cpu", amp=False)
    prepared = []
    for case in select_cases(cases, "validation"):
        volume, truth = case.read_pair()
        prepared.append((*plainly.preprocess(volume), truth))

    def eager(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([model(batch) for batch in images.split(BATCH)])

    def measured(network: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, float]:
        """Seconds a case, and mean DSC."""
        network(prepared[0][0])
        start = time.perf_counter()
        maps = [network(images) for images, _, _ in prepared]
        spent = (time.perf_counter() - start) / len(prepared)
        masks = (plainly.finish(m, frame) for m, (_, frame, _) in zip(maps, prepared, strict=True))
        pairs = zip(masks, prepared, strict=True)
        return spent, float(np.mean([dsc(mask, truth) for mask, (_, _, truth) in pairs]))

    networks = {"the Segmenter's PyTorch, float32": plainly.probabilities}
    with tempfile.TemporaryDirectory() as out:
        for precision in ("float32", "float16"):
            words = "--weights", weights, "--images", args.images, "--out", f"{out}/{precision}"
            words += "--format", "onnx", "--precision", precision
            with redirect_stdout(sys.stderr):  # the table goes on
                export.main([str(word) for word in words])
            (path,) = Path(out, precision).glob("*.onnx")
            segmenter = Segmenter.from_weights(path, providers=["cpu"], image_size=SIZE)
            networks[f"ONNX Runtime {version('onnxruntime')}, {precision}"] = (
                segmenter.probabilities
            )
    theirs, reference = measured(eager)
    for name, network in networks.items():
        ours, score = measured(network)
        about = f"{name}; mean DSC of {len(prepared)} cases {score:.4f} (plain {reference:.4f})"
        row(about, ours, theirs, "s a case")


def bench_inference(cases: list, args: argparse.Namespace) -> None:
    """The ten validation cases, whole process: start, reading, network, pictures, figure."""
    names = [case.name for case in select_cases(cases, "validation")]
    with tempfile.TemporaryDirectory() as out:
        weights = str(args.weights or shipped_weights("unet"))
        program = PLAIN_INFERENCE.format(
            paths=[str(ROOT), str(ROOT / "benchmarks")],
            weights=weights,
            images=str(args.images),
            cases=names,
            out=f"{out}/plain",
        )
        theirs, their_memory = run([sys.executable, "-c", program])
        command = [sys.executable, str(ROOT / "inference.py"), "--images", str(args.images)]
        command += ["--weights", weights, "--subset", "validation", "--figure", f"{out}/dsc.png"]
        command += ["--image-size", str(SIZE)]  # as the plain one, whatever the weights' card says
        for precision in ["--no-amp"] + ["--amp"] * has_bfloat16(torch.device("cpu")):
            ours, our_memory = run([*command, precision, "--predictions", f"{out}/{precision[2:]}"])
            name = "bfloat16" if precision == "--amp" else "float32"
            row(f"inference.py, {len(names)} validation cases, {name}", ours, theirs, "s")
            row("its peak memory", our_memory, their_memory, "GiB")


def bench_memory(cases: list, args: argparse.Namespace) -> None:
    """Peak memory of a training start: all volumes prepared, then stopped in the first steps."""
    count = sum(len(select_cases(cases, subset)) for subset in ("train", "validation"))
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(ROOT / "train.py"), "--images", str(args.images)]
        command += ["--weights", f"{out}/w", "--logs", f"{out}/l", "--batch-size", str(BATCH)]
        for name in ("cold", "warm"):
            _, memory = run([*command, "--cache", f"{out}/cache"], stop_after=args.start_seconds)
            row(f"training start, {count} cases, {name}: peak memory", memory, None, "GiB")


def run(command: list[str], stop_after: float | None = None) -> tuple[float, float]:
    """Wall seconds and peak memory (GiB) of a command, asked to stop after `stop_after` seconds."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    if stop_after:
        time.sleep(stop_after)
        child.terminate()
    _, status, usage = os.wait4(child.pid, 0)
    stopped = bool(stop_after) and os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM
    if status and not stopped:
        raise SystemExit(f"{' '.join(command[:3])} ... failed")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


BENCHES = {
    "preprocess": bench_preprocess,
    "start": bench_start,
    "augment": bench_augment,
    "step": bench_step,
    "network": bench_network,
    "onnx": bench_onnx,
    "inference": bench_inference,
    "memory": bench_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="the real cases")
    parser.add_argument("--weights", type=Path, help="for inference.py (the shipped ones)")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--volumes", type=int, default=3, help="to preprocess (%(default)s)")
    parser.add_argument(
        "--start-seconds", type=float, default=90, help="until a training is stopped (%(default)s)"
    )
    args = parser.parse_args()
    cases = find_cases(args.images)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"bfloat16 tiles: {has_bfloat16(torch.device('cpu'))}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, NumPy {np.__version__}\n"
    )
    print("| what | plain | brainseg | unit | times faster |\n|---|---|---|---|---|")
    for name in args.only:
        BENCHES[name](cases, args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak memory of the benchmark itself: {peak:.1f} GiB")


if __name__ == "__main__":
    main()
