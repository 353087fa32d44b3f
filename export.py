"""Turn weights that were trained into weights to hand on, or into a file that runs by itself.

    python3 export.py --weights weights/unet.pt                      weights/unet-<hash>.pt, card
    python3 inference.py --weights weights/unet-<hash>.pt --subset validation
    python3 export.py --weights weights/unet-<hash>.pt --metrics predictions/metrics.csv
    python3 export.py --weights weights/unet.pt --format onnx        weights/unet.onnx
    python3 inference.py --weights weights/unet.onnx --images ./scans
    python3 export.py --weights weights/unet.pt --format torch-export          weights/unet.pt2

Weights: convolution kernels are stored in half precision; the name carries the first eight digits
of the file's SHA-256, which is checked whenever it is opened. The third command adds scores to the
card; it counts only cases that the weights were not trained on.

The other formats hold the network, batch norm folded, from preprocessed slices (N, C, H, W) to
probabilities (N, K, H, W), both float32, of any number and of any height and width that 16
divides; and the card, which says how to preprocess. They are compared with the network in PyTorch
before they take their place. A .pt2 is for programs of your own (torch.export.load): nothing here
opens one, as opening it could run code that it holds.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from brainseg.io.files import write_json, written_whole
from brainseg.io.predictions import read_scores
from brainseg.metrics import summarise
from brainseg.onnx import OnnxNetwork, needed
from brainseg.programs import (
    check_finite,
    largest_difference,
    slices_to_compare,
    to_onnx,
    to_pt2,
    trace,
)
from brainseg.splits import SUBSETS, is_lgg, patient_of, subset_of
from brainseg.weights import file_hash, load_state, model_from_state, read_card
from utils import fail, make_parser

LICENCE = (
    "Trained on MR images of TCGA-LGG (doi:10.7937/K9/TCIA.2016.L4LTD3TK) with the masks of Buda, "
    "Saha and Mazurowski 2019 (doi:10.1016/j.compbiomed.2019.05.002): use them, and these weights, "
    "non-commercially, share alike and give credit. Not a medical device."
)
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}
TOLERANCES = {"float32": 1e-4, "float16": 5e-2}  # of a probability


def get_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="file that train.py wrote")
    parser.add_argument(
        "--format",
        type=str,
        choices=("weights", *SUFFIXES),
        default="weights",
        help="weights, onnx or torch-export (%(default)s)",
    )
    parser.add_argument("--metrics", type=Path, help="metrics.csv of inference.py with the weights")
    parser.add_argument(
        "--subset",
        type=str,
        choices=(*SUBSETS, "all"),
        default="validation",
        help="which cases it scores (%(default)s)",
    )
    parser.add_argument("--out", type=Path, help="folder (that of --weights)")
    add = parser.add_argument_group("onnx and torch-export").add_argument
    add(
        "--precision",
        type=str,
        choices=TOLERANCES,
        help="float32 or float16, of the network inside (float32)",
    )
    add(
        "--images",
        type=Path,
        help="cases, to compare on the first (./kaggle_3m, or a synthetic one if that is missing)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.format == "weights" and (args.precision or args.images):
        parser.error("--precision and --images go with --format onnx or torch-export")
    args.out = args.out or args.weights.parent
    try:
        state = load_state(args.weights)
        name, model = model_from_state(state, args.weights)
        card = read_card(args.weights)
        card |= {"model": name, "settings": model.settings}
        if any(map(is_lgg, card.get("cases", {}).get("train", ()))):
            card["licence"] = LICENCE
        if args.metrics:
            card.setdefault("scores", {})[args.subset] = scores_of_unseen(
                args.metrics, args.weights, args.subset
            )
        if args.format == "weights":
            said = write_weights(args.out, state, card)
        else:
            said = write_network(args, model, card)
    except (ValueError, OSError) as error:
        fail(error)
    print(said)


def write_weights(out: Path, state: dict[str, Tensor], card: dict) -> str:
    """Write weights named by their hash, and their card; what to say of them."""
    content = serialise(halve(state))
    digest = hashlib.sha256(content).hexdigest()
    path = out / f"{card['model']}-{digest[:8]}.pt"
    with written_whole(path) as temporary:
        temporary.write_bytes(content)
    write_json(path.with_suffix(".json"), card | {"sha256": digest})
    return f"{path}, {len(content) / 2**20:.1f} MiB, and its card {path.with_suffix('.json').name}"


def halve(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Kernels in half precision; batch norm and biases, small and sensitive, as they are."""
    halved = {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in state.items()}
    check_finite(halved)
    return halved


def serialise(state: dict[str, Tensor]) -> bytes:
    """What `torch.save` writes, the same bytes for the same weights whatever the file's name."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def scores_of_unseen(path: Path, weights: Path, subset: str) -> dict:
    """DSC, and its spread, of the cases of a subset that the weights were not trained on.

    Raises ValueError if the metrics.csv at `path` is not of these weights, by args.json beside it.
    """
    scores, about = read_scores(path, ["dsc"]), path.with_name("args.json")
    try:
        made_with = json.loads(about.read_text())["weights"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        made_with = ()
    if file_hash(weights) not in made_with:
        raise ValueError(
            f"{path}: is not of {weights}, by the {about.name} beside it; run inference.py with it"
        )
    cases = {
        case: round(row["dsc"], 4)
        for case, row in scores.items()
        if not row["trained_on"] and subset in ("all", subset_of(case))
    }
    if not cases:
        raise ValueError(
            f"{path}: scores no case of subset {subset} that the weights were not trained on"
        )
    summary = summarise(list(cases.values()), [patient_of(case) for case in cases])
    return {"metric": "DSC per volume", **summary, "cases": cases}


def write_network(args: argparse.Namespace, model: nn.Module, card: dict) -> str:
    """Write an ONNX file or an exported program that agrees with `model`; what to say of it.

    Raises ValueError, and leaves what was there, if it does not agree.
    """
    if args.format == "onnx":
        for package in ("onnxscript", "onnxruntime"):
            needed(package, "--format onnx")
    precision = args.precision or "float32"
    suffix = ("-float16" if precision == "float16" else "") + SUFFIXES[args.format]
    path = args.out / f"{args.weights.stem}{suffix}"
    card = {"image_size": 256, "neighbours": 0, "preprocessing": 1} | card
    card |= {"stride": model.stride, "precision": precision}
    card["weights"] = {"file": args.weights.name, "sha256": file_hash(args.weights)}
    card.pop("sha256", None)  # of the weights
    case, slices = slices_to_compare(args.images, model, card)
    program = trace(model, precision)
    with written_whole(path) as temporary:
        if args.format == "onnx":
            temporary.write_bytes(to_onnx(program, card))
            network = OnnxNetwork(temporary, ["cpu"])
        else:
            temporary.write_bytes(to_pt2(program, card))
            network = torch.export.load(temporary).module()
        difference = largest_difference(network, model, slices)
        if not difference <= TOLERANCES[precision]:
            raise ValueError(
                f"{path}: not written, as its probabilities are up to {difference:.2g} off those "
                f"of {args.weights} on {case}; export it in float32, or with another PyTorch"
            )
        size = temporary.stat().st_size / 2**20
    return (
        f"{path}, {size:.1f} MiB; on {len(slices)} slices of {case} its probabilities are within "
        f"{difference:.1e} of those of PyTorch ({TOLERANCES[precision]:g} is allowed)"
    )


if __name__ == "__main__":
    main()
