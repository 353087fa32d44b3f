"""Turn weights that were trained into weights to hand on, or into a file that runs by itself.

    python3 export.py --weights weights/unet.pt                      weights/unet-<hash>.pt, card
    python3 inference.py --weights weights/unet-<hash>.pt --subset validation
    python3 export.py --weights weights/unet-<hash>.pt --metrics predictions/metrics.csv
    python3 export.py --weights weights/unet.pt --format onnx        weights/unet-<hash>.onnx
    python3 export.py --weights weights/unet-folds --format onnx     an ensemble as one file
    python3 inference.py --weights weights/unet-<hash>.onnx --images ./scans
    python3 export.py --weights weights/unet.pt --format torch-export   weights/unet-<hash>.pt2

The name carries the first eight digits of the file's SHA-256, which is checked whenever the file is
opened. Weights: convolution kernels are stored in half precision; of several files or a folder,
each. The third command adds scores to the card; it counts only cases that the weights were not
trained on.

The other formats hold the network, batch norm folded, from preprocessed slices (N, C, H, W) to
probabilities (N, K, H, W), both float32, of any number and of any height and width that 16
divides; and the card, which says how to preprocess. Of several weights files, or a folder, they
average the probabilities; a last channel holds the standard deviation over the networks. They are
compared with the network in PyTorch before they are written. A .pt2 is for programs of your own
(torch.export.load): nothing here opens one, as opening it could run code that it holds.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from brainseg import programs
from brainseg.ensemble import load_ensemble
from brainseg.io.files import atomic_write, write_json
from brainseg.io.predictions import read_scores
from brainseg.metrics import summarise
from brainseg.onnx import OnnxNetwork, needed
from brainseg.splits import SUBSETS, is_lgg, patient_of, subset_of
from brainseg.weights import (
    CARD_DEFAULTS,
    file_hash,
    load_state,
    model_from_state,
    read_card,
    weights_files,
)
from utils import errors_in_one_sentence, make_parser

LICENCE = (
    "Trained on MR images of TCGA-LGG (doi:10.7937/K9/TCIA.2016.L4LTD3TK) with the masks of Buda, "
    "Saha and Mazurowski 2019 (doi:10.1016/j.compbiomed.2019.05.002): use them, and these weights, "
    "non-commercially, share alike and give credit. Not a medical device."
)
FORMATS = {"onnx": (".onnx", programs.to_onnx), "torch-export": (".pt2", programs.to_pt2)}
TOLERANCES = {"float32": 1e-4, "float16": 5e-2}  # of a probability


# fmt: off
def get_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add, _ = parser.group("what")
    add("--weights", type=Path, nargs="+", required=True,
        help="file that train.py wrote, several, or a folder of them")
    add("--format", type=str, choices=("weights", *FORMATS), default="weights",
        help="weights, onnx or torch-export")
    add("--metrics", type=Path, help="metrics.csv of inference.py with the weights")
    add("--subset", type=str, choices=(*SUBSETS, "all"), default="validation",
        help="which cases it scores")
    add("--out", type=Path, help="folder (that of --weights)")
    add, _ = parser.group("onnx and torch-export")
    add("--precision", type=str, choices=TOLERANCES,
        help="float32 or float16, of the network inside (float32)")
    add("--images", type=Path,
        help="cases, to compare on the first (./kaggle_3m, or a synthetic one if it is missing)")
    return parser


# fmt: on
def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.format == "weights" and (args.precision or args.images):
        parser.error("--precision and --images go with --format onnx or torch-export")
    with errors_in_one_sentence("stopped; files are complete, or not there"):
        files = weights_files(args.weights)
        if args.format != "weights":
            write_network(files, args.weights, args.format, args.precision, args.images, args.out)
        elif args.metrics and len(files) > 1:
            raise ValueError(f"{args.metrics}: --metrics goes with one weights file; name one")
        else:
            for path in files:
                write_weights(path, args.out or path.parent, args.metrics, args.subset)


def write_weights(weights: Path, out: Path, metrics: Path | None, subset: str) -> None:
    """Write weights in half precision, named by their hash, and their card with any scores."""
    state = load_state(weights)
    name, model = model_from_state(state, weights)
    card = with_licence(read_card(weights) | {"model": name, "settings": model.settings})
    if metrics:
        card.setdefault("scores", {})[subset] = scores_of_unseen(metrics, weights, subset)
    buffer = io.BytesIO()  # in a file, torch.save would write the file's name too
    torch.save(halve(state), buffer)
    content = buffer.getvalue()
    path = named_by_hash(out, name, ".pt", content)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
    write_json(path.with_suffix(".json"), card | {"sha256": file_hash(path)})
    print(f"{path}, {len(content) / 2**20:.1f} MiB, and its card {path.with_suffix('.json').name}")


def with_licence(card: dict) -> dict:
    """Add the licence of the LGG data to the card of what was trained on it."""
    of_lgg = any(map(is_lgg, card.get("cases", {}).get("train", ())))
    return card | {"licence": LICENCE} if of_lgg else card


def named_by_hash(out: Path, stem: str, suffix: str, content: bytes) -> Path:
    """Name a file after the first eight digits of the SHA-256 of its content."""
    return out / f"{stem}-{hashlib.sha256(content).hexdigest()[:8]}{suffix}"


def halve(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put kernels in half precision; keep batch norm and biases, small and sensitive."""
    halved = {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in state.items()}
    programs.check_finite(halved)
    return halved


def scores_of_unseen(path: Path, weights: Path, subset: str) -> dict:
    """Summarise the DSC of the cases of a subset that the weights were not trained on.

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


def write_network(
    files: Sequence[Path],
    given: Sequence[Path],
    form: str,
    precision: str | None,
    images: Path | None,
    out: Path | None,
) -> None:
    """Write an ONNX file or an exported program of weights, one network or an ensemble.

    It is named after the path that was `given`, or "ensemble" if several were. Raises ValueError,
    and writes nothing, if its probabilities are not those of PyTorch.
    """
    if form == "onnx":
        for package in ("onnxscript", "onnxruntime"):
            needed(package, "--format onnx")
    precision = precision or "float32"
    model, card = load_ensemble(files)
    card = CARD_DEFAULTS | with_licence(card) | {"stride": model.stride, "precision": precision}
    sources = [{"file": path.name, "sha256": file_hash(path)} for path in files]
    card["weights"] = sources[0] if len(sources) == 1 else sources
    card.pop("sha256", None)  # of the weights
    case, slices = programs.slices_to_compare(images, model, card)
    suffix, convert = FORMATS[form]
    content = convert(programs.trace(model, precision), card)
    stem = re.sub(r"-[0-9a-f]{8}$", "", given[0].stem) if len(given) == 1 else "ensemble"
    stem += "-float16" * (precision == "float16")
    path = named_by_hash(out or given[0].parent, stem, suffix, content)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
        if form == "onnx":
            network = OnnxNetwork(temporary, ["cpu"])
        else:
            network = torch.export.load(temporary).module()
        difference = programs.largest_difference(network, model, slices)
        if not difference <= TOLERANCES[precision]:
            raise ValueError(
                f"{path}: not written, as its probabilities are up to {difference:.2g} off those "
                f"of {given[0]} on {case}; export it in float32, or with another PyTorch"
            )
    networks = f", {len(files)} networks" * (len(files) > 1)
    print(
        f"{path}, {len(content) / 2**20:.1f} MiB{networks}; on {len(slices)} slices of {case} its "
        f"probabilities are within {difference:.1e} of those of PyTorch "
        f"({TOLERANCES[precision]:g} is allowed)"
    )


if __name__ == "__main__":
    main()
