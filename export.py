"""Turn trained weights into weights to share, or into a file that runs without this project.

    python3 export.py --weights weights/unet.pt                      weights/unet-<hash>.pt, card
    python3 inference.py --weights weights/unet-<hash>.pt --subset validation
    python3 export.py --weights weights/unet-<hash>.pt --metrics predictions/metrics.csv
    python3 export.py --weights weights/unet.pt --format onnx        weights/unet-<hash>.onnx
    python3 export.py --weights weights/unet-folds --format onnx     an ensemble as one file
    python3 inference.py --weights weights/unet-<hash>.onnx --images ./scans
    python3 export.py --weights weights/unet.pt --format torch-export   weights/unet-<hash>.pt2

The name contains the first eight digits of the file's SHA-256; the card has all of them, and they
are checked whenever it is read. Weights are stored with their convolution kernels in half
precision; several files, or a folder, are exported one by one. The third command adds scores to the
card, counting only cases that the weights were not trained on.

The other formats contain the card, which says how to preprocess, and the network, batch norm
folded: preprocessed slices (N, C, H, W) in, probabilities (N, K, H, W) out, both float32, for any N
and any H and W divisible by 16. Several weights files, or a folder, become one ensemble: it
averages the probabilities and adds a last channel, their standard deviation. The results are
compared with PyTorch's before the file is written. A .pt2 is for your own programs
(torch.export.load): nothing here opens one, because that could run code in it.
"""

import argparse
import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from brainseg import exporting
from brainseg.ensemble import load_ensemble, weights_files
from brainseg.io.files import atomic_write, check_ours, clear_leftovers
from brainseg.onnx import OnnxNetwork
from brainseg.optional import import_optional
from brainseg.patients import SUBSETS
from brainseg.weights import (
    CARD_DEFAULTS,
    HASH,
    file_hash,
    is_card,
    load_state,
    model_from_state,
    pack,
    read_card,
    save_weights,
)
from cli import errors_in_one_sentence, make_parser

FORMATS = {"onnx": (".onnx", exporting.to_onnx), "torch-export": (".pt2", exporting.to_pt2)}
TOLERANCES = {"float32": 1e-4, "float16": 5e-2}  # of a probability


# fmt: off
def get_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.group("what")
    add = parser.add
    add("--weights", type=Path, nargs="+",
        help="file written by train.py, several, or a folder of them")
    add("--format", choices=["weights"] + list(FORMATS), default="weights",
        help="weights, onnx or torch-export")
    add("--metrics", type=Path, help="metrics.csv that inference.py wrote with these weights")
    add("--subset", choices=SUBSETS + ("all",),
        help="with --metrics: which of its cases to count (validation)")
    add("--out", type=Path, help="folder to write to (that of --weights)")
    parser.group("onnx and torch-export")
    add("--precision", choices=TOLERANCES,
        help="precision of the network: float32 or float16 (float32)")
    add("--images", type=Path,
        help="cases; the first is used to compare (./kaggle_3m, or a synthetic case if missing)")
    return parser


# fmt: on
def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    if not args.weights:
        parser.error("--weights is missing: give what to export")
    if args.format == "weights" and (args.precision or args.images):
        parser.error("--precision and --images go with --format onnx or torch-export")
    if args.subset and not args.metrics:
        parser.error("--subset goes with --metrics")
    if args.format != "weights" and args.metrics:
        parser.error("--metrics goes with --format weights; export those, then their ONNX file")
    with errors_in_one_sentence("stopped; no incomplete file was left"):
        files = weights_files(args.weights)
        if args.metrics and len(files) > 1:
            raise ValueError(f"{args.metrics}: --metrics goes with one weights file; name one")
        for path in files:
            clear_leftovers(args.out or path.parent)
        if args.format != "weights":
            precision = args.precision or "float32"
            write_network(files, args.weights, args.format, precision, args.images, args.out)
            return
        for path in files:
            out = args.out or path.parent
            write_weights(path, out, args.metrics, args.subset or "validation")


def named_by_hash(folder: Path, stem: str, suffix: str, content: bytes | memoryview) -> Path:
    """Name a file after the first eight digits of the SHA-256 of its content."""
    return folder / f"{stem}-{hashlib.sha256(content).hexdigest()[:8]}{suffix}"


def write_weights(weights: Path, out: Path, metrics: Path | None, subset: str) -> None:
    """Write weights in half precision, named by their hash, and their card with any scores."""
    state = load_state(weights)
    name, model = model_from_state(state, weights)
    card = exporting.with_licence(read_card(weights) | {"model": name, "settings": model.settings})
    if metrics:
        card.setdefault("scores", {})[subset] = exporting.scores_of_unseen(metrics, weights, subset)
    state = exporting.halve(state)
    content = pack(state)
    path = named_by_hash(out, name, ".pt", content)
    exported = partial(is_card, parts=("model", "settings"))  # else it is in the way
    check_ours(path.with_suffix(".json"), exported)
    if path.exists():  # the same weights: their scores on other subsets stay
        scores = read_card(path).get("scores", {}) | card.get("scores", {})
        if scores:
            card["scores"] = scores
    save_weights(path, state, card)
    print(f"{path}, {len(content) / 2**20:.1f} MiB, and its card {path.with_suffix('.json').name}")


def write_network(
    files: Sequence[Path],
    given: Sequence[Path],
    form: str,
    precision: str,
    images: Path | None,
    out: Path | None,
) -> None:
    """Write networks as an ONNX file or a program; ValueError if results differ from PyTorch's."""
    if form == "onnx":
        for package in ("onnxscript", "onnxruntime"):
            import_optional(package, "--format onnx")
    model, card = load_ensemble(files)
    card = CARD_DEFAULTS | exporting.with_licence(card)
    card |= {"stride": model.stride, "precision": precision}
    card["weights"] = [{"file": path.name, "sha256": file_hash(path)} for path in files]
    if len(files) == 1:
        card["weights"] = card["weights"][0]
    card.pop("sha256", None)  # of the weights
    case, slices = exporting.slices_to_compare(images, model, card)
    suffix, convert = FORMATS[form]
    content = convert(exporting.trace(model, precision), card)
    stem = HASH.sub("", given[0].stem) if len(given) == 1 else "ensemble"
    if precision == "float16":
        stem += "-float16"
    path = named_by_hash(out or given[0].parent, stem, suffix, content)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
        if form == "onnx":
            network = OnnxNetwork(temporary, ["cpu"])
        else:
            network = torch.export.load(temporary).module()
        difference = exporting.largest_difference(network, model, slices)
        if not difference <= TOLERANCES[precision]:
            raise ValueError(
                f"{path}: not written, as its probabilities differ by up to {difference:.2g} from "
                f"those of {given[0]} on {case}; export it in float32, or with another version of "
                "PyTorch"
            )
    size = f"{len(content) / 2**20:.1f} MiB"
    if len(files) > 1:
        size += f", {len(files)} networks"
    print(
        f"{path}, {size}; on {len(slices)} slices of {case} its probabilities are within "
        f"{difference:.1e} of those of PyTorch ({TOLERANCES[precision]:g} is allowed)"
    )


if __name__ == "__main__":
    main()
