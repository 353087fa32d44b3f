"""Weights to share, and a network as a program that runs without this code: PyTorch or ONNX.

The program takes preprocessed slices (N, C, H, W) and returns probabilities (N, K, H, W), both
float32; an ensemble adds a channel (see `brainseg.ensemble.average`).
"""

import io
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .ensemble import Ensemble, for_inference, weights_id
from .io.files import PROGRAM, RUN
from .io.layouts import list_cases
from .metrics import summarise
from .onnx import CARD, INPUT, OUTPUT
from .patients import patients_of_card
from .phantom_head import make_volume
from .preprocess import neighbourhoods, preprocess
from .reports.scores import read_scores
from .splits import is_lgg, subset_of_patient
from .weights import Network, all_finite, file_hash

OPSET = 18  # the exporter's native one; ONNX Runtime reads it from 1.14 on


LICENCE = (
    "Trained on MR images of TCGA-LGG (doi:10.7937/K9/TCIA.2016.L4LTD3TK) with the masks of Buda, "
    "Saha and Mazurowski 2019 (doi:10.1016/j.compbiomed.2019.05.002): use them, and these weights, "
    "non-commercially, share alike and give credit. Not a medical device."
)


def with_licence(card: dict) -> dict:
    """Add the licence of the LGG data to a card if the weights were trained on it."""
    if any(map(is_lgg, patients_of_card(card, "train"))):
        return card | {"licence": LICENCE}
    return card


def halve(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert kernels to half precision; keep batch norm and biases: small but sensitive."""
    halved = dict(state)
    for name, value in state.items():
        if value.is_floating_point() and value.ndim > 1:
            halved[name] = value.half()
    check_finite(halved)
    return halved


def scores_of_unseen(path: Path, weights: Path, subset: str) -> dict:
    """Summarise the DSC of a subset's cases that the weights were not trained on.

    Raises ValueError if the metrics.csv at `path` has none, or if one was not made with these
    weights alone, at the same settings as all.
    """
    cases, patients, runs = {}, [], set()
    for case, row in read_scores(path, ["dsc"]).items():
        if row["trained_on"] or subset not in ("all", subset_of_patient(row["patient"])):
            continue
        cases[case] = round(row["dsc"], 4)
        patients.append(row["patient"])
        runs.add(row[RUN])
    if not cases:
        raise ValueError(
            f"{path}: has no case of subset {subset} that the weights were not trained on; "
            "choose another --subset"
        )
    fault = ""
    of_weights = f"{weights_id([file_hash(weights)])}-"
    if not all(run.startswith(of_weights) for run in runs):
        fault = "by other weights"
    elif len(runs) > 1:
        fault = "with several settings"
    if fault:
        raise ValueError(
            f"{path}: some of its cases were segmented {fault}; run inference.py with "
            f"--weights {weights} into an empty folder"
        )
    summary = summarise(list(cases.values()), patients)
    return {"metric": "DSC per volume"} | summary | {"cases": cases}


class Probabilities(nn.Module):
    """The exported network or ensemble: computes in `dtype`, takes and returns float32."""

    def __init__(self, network: Ensemble, dtype: torch.dtype):
        super().__init__()
        self.network, self.dtype = network.to(dtype), dtype

    def forward(self, slices: Tensor) -> Tensor:
        """Compute probabilities (N, out, H, W) of slices (N, in, H, W)."""
        return self.network(slices.to(self.dtype))


def trace(model: Network | Ensemble, precision: str) -> ExportedProgram:
    """Trace a network for any number and size of slices; ValueError if a weight overflows."""
    network = Probabilities(for_inference(model), getattr(torch, precision)).eval()
    check_finite(network.state_dict())
    stride = model.stride
    example = torch.zeros(2, model.settings["in_channels"], 4 * stride, 3 * stride)
    shape = {0: Dim("batch"), 2: stride * Dim("rows"), 3: stride * Dim("columns")}
    program = torch.export.export(network, (example,), dynamic_shapes={"slices": shape})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def check_finite(state: dict[str, Tensor]) -> None:
    """Raise ValueError if a weight has overflowed."""
    if not all_finite(state):
        raise ValueError("a weight is too large for half precision; export to ONNX in float32")


def to_onnx(program: ExportedProgram, card: dict) -> bytes:
    """Convert a program to the content of an ONNX file, with its card."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the exporter's own use of PyTorch
        exported = torch.onnx.export(
            program,
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    assert exported is not None
    proto = exported.model_proto
    proto.producer_name, proto.producer_version = PROGRAM, f"torch {torch.__version__}"
    proto.doc_string = (
        f"{INPUT} (batch, C, rows, columns) float32, preprocessed as a whole volume; {OUTPUT} "
        f"(batch, K, rows, columns) float32; rows and columns are multiples of {card['stride']}. "
        f"The metadata {CARD} holds the card, JSON."
    )
    proto.metadata_props.add(key=CARD, value=json.dumps(card))
    graph = proto.graph
    graph.ClearField("value_info")
    values = list(graph.input) + list(graph.output)
    for part in [graph] + list(graph.node) + values:
        part.ClearField("metadata_props")  # from the exporter, half a page per layer
    for value in values:
        batch, _, rows, columns = value.type.tensor_type.shape.dim
        batch.dim_param, rows.dim_param, columns.dim_param = "batch", "rows", "columns"
    return proto.SerializeToString()


def to_pt2(program: ExportedProgram, card: dict) -> bytes:
    """Convert a program to the content of a .pt2 file, with card.json in it."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"card.json": json.dumps(card)})
    return buffer.getvalue()


def slices_to_compare(
    images: Path | None, model: Network | Ensemble, card: dict
) -> tuple[str, Tensor]:
    """Choose a case; return its name and four slices (4, C, N, N) as the network takes them."""
    name, volume = "a synthetic case", make_volume(0)[0]
    if images or Path("kaggle_3m").is_dir():
        case = list_cases(images or "kaggle_3m")[0].open()
        name, volume = case.name, case.read()
    neighbours = card["neighbours"]
    channels = model.settings["in_channels"] // (2 * neighbours + 1)
    volume = volume[..., np.arange(channels) % volume.shape[-1]]
    prepared, _ = preprocess(volume, card["image_size"], card["preprocessing"])
    middle = len(prepared) // 2
    slices = neighbourhoods([len(prepared)], neighbours)[max(middle - 2, 0) : middle + 2]
    return name, prepared[slices].flatten(1, 2)


@torch.inference_mode()
def largest_difference(
    network: Callable[[Tensor], Tensor], model: Network | Ensemble, slices: Tensor
) -> float:
    """Compute how far apart probabilities of two networks are, or NaN; also for a larger slice."""
    larger = nn.functional.pad(slices[:1], (0, model.stride, 0, 2 * model.stride))
    of_slices = (network(slices) - model(slices)).abs().max()
    of_larger = (network(larger) - model(larger)).abs().max()
    return torch.maximum(of_slices, of_larger).item()  # NaN if either is
