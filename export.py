"""Turn weights that were trained into weights to hand on.

    python3 export.py --weights weights/unet.pt                      weights/unet-<hash>.pt, card
    python3 inference.py --weights weights/unet-<hash>.pt --subset validation
    python3 export.py --weights weights/unet-<hash>.pt --metrics predictions/metrics.csv

Convolution kernels are stored in half precision; the name carries the first eight digits of the
file's SHA-256, which is checked whenever it is opened. The second call adds scores to the card;
it counts only cases that the weights were not trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import SHIPPED, load_state, model_from_state, read_card
from dataset import SUBSETS, is_lgg, patient_of
from metrics import summarise
from utils import fail, make_parser, read_scores, write_json, written_whole

LICENCE = (
    "Trained on MR images of TCGA-LGG (doi:10.7937/K9/TCIA.2016.L4LTD3TK) with the masks of Buda, "
    "Saha and Mazurowski 2019 (doi:10.1016/j.compbiomed.2019.05.002): use them, and these weights, "
    "non-commercially, share alike and give credit. Not a medical device."
)


def get_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="file that train.py wrote")
    parser.add_argument("--metrics", type=Path, help="metrics.csv of inference.py with the weights")
    parser.add_argument(
        "--subset",
        type=str,
        choices=(*SUBSETS, "all"),
        default="validation",
        help="which cases it scores (%(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=SHIPPED, help="folder (weights/ of the project)"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    try:
        state = load_state(args.weights)
        name, model = model_from_state(state, args.weights)
        card = read_card(args.weights)
        card |= {"model": name, "settings": model.settings}
        if any(map(is_lgg, card.get("cases", {}).get("train", ()))):
            card["licence"] = LICENCE
        if args.metrics:
            card.setdefault("scores", {})[args.subset] = scores_of_unseen(args.metrics)
        content = serialise(halve(state))
        digest = hashlib.sha256(content).hexdigest()
        path = args.out / f"{name}-{digest[:8]}.pt"
        with written_whole(path) as temporary:
            temporary.write_bytes(content)
        write_json(path.with_suffix(".json"), card | {"sha256": digest})
    except (ValueError, OSError) as error:
        fail(error)
    print(f"{path}, {len(content) / 2**20:.1f} MiB, and its card {path.with_suffix('.json').name}")


def halve(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Kernels in half precision; batch norm and biases, small and sensitive, as they are."""
    halved = {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in state.items()}
    if not all(torch.isfinite(value).all() for value in halved.values()):
        raise ValueError("a weight is too large for half precision")
    return halved


def serialise(state: dict[str, Tensor]) -> bytes:
    """What `torch.save` writes, the same bytes for the same weights whatever the file's name."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def scores_of_unseen(path: Path) -> dict:
    """DSC of the cases in a metrics.csv that the weights were not trained on, and its spread."""
    scores = read_scores(path, ["dsc"])
    cases = {case: round(row["dsc"], 4) for case, row in scores.items() if not row["trained_on"]}
    if not cases:
        raise ValueError(f"{path}: scores no case that the weights were not trained on")
    summary = summarise(list(cases.values()), [patient_of(case) for case in cases])
    return {"metric": "DSC per volume", **summary, "cases": cases}


if __name__ == "__main__":
    main()
