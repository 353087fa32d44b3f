"""Weights on disk: which network they belong to, whether they are safe, and what they mean.

Weights are a bare state dict, opened with ``weights_only=True``. Their card, a JSON file of the
same name, says what they were trained on and how, and names their SHA-256, which is checked
whenever it is read. The names of shipped weights contain its first eight digits.
"""

import hashlib
import inspect
import io
import json
import math
import pickle
import re
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .io.files import atomic_write, write_json
from .resnext_unet import ResNeXtUNet
from .unet import UNet

Network = UNet | ResNeXtUNet
MODELS: dict[str, type[UNet] | type[ResNeXtUNet]] = {"unet": UNet, "resnext_unet": ResNeXtUNet}
OTHERS = {  # made from weights, but not weights
    ".onnx": "is an ONNX file, for inference.py and evaluate.py; give the weights it was made from",
    ".pt2": "is an exported program, refused because opening it could run code; give the weights "
    "it was made from, or an ONNX file (export.py --format onnx)",
}
CHECKPOINT = {"args", "model", "ema", "optimizer", "cases", "epoch", "step", "loss_sum", "best"}
CARD_DEFAULTS = {"preprocessing": 1, "image_size": 256, "neighbours": 0}  # without a card
FIT_TYPES = {  # of what is used of the fit of the expected DSC in a card
    "features": list, "mean": list, "deviation": list, "weights": list, "interval": list,
    "intercept": float, "threshold": float, "min_volume": int, "largest_component": bool,
    "tta": bool,
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]
# What comes with the project: the network of the 2019 paper's shape, for `unet` of torch.hub; the
# default, a network that has seen every patient; and an ensemble, one network per fold.
PUBLISHED = {"unet": ROOT / "weights" / "unet-2019" / "unet-9485c275.pt"}
SHIPPED = {
    "unet": ROOT / "weights" / "unet-student",
    "unet-folds": ROOT / "weights" / "unet-folds",
}
# Eight digits at the end of a name; without a letter, they are a date or a job's number.
HASH = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8})$")


def build_model(name: str, **settings) -> Network:
    """Build a network by name. Raises ValueError, listing the choices, if it is unknown."""
    if name not in MODELS:
        raise ValueError(f"no model is called {name!r}; known: {', '.join(MODELS)}")
    possible = inspect.signature(MODELS[name]).parameters
    for setting in settings:
        if setting not in possible:
            raise ValueError(f"{name} has no setting {setting!r}; it has: {', '.join(possible)}")
    return MODELS[name](**settings)


def load_state(path: Path | str) -> dict[str, Tensor]:
    """Load the state dict in a file to the CPU.

    Raises FileNotFoundError or ValueError, naming the file, if it is missing, damaged, not bare
    weights (which could run code and are never opened), or shipped weights that have changed.
    """
    path = Path(path)
    state = load_tensors(path)
    if "model" in state and "optimizer" in state:
        raise ValueError(
            f"{path}: is a training checkpoint, for --resume; give the weights beside it (.pt)"
        )
    if not state or not all(map(_is_plain, state.values())):
        raise ValueError(f"{path}: does not contain a bare state dict; save model.state_dict()")
    if not all_finite(state):
        raise ValueError(f"{path}: contains weights that are NaN or infinite; train it again")
    return state


def all_finite(state: dict[str, Tensor]) -> bool:
    """Return whether no weight is NaN or infinite."""
    return all(bool(torch.isfinite(value).all()) for value in state.values())


def _is_plain(value: object) -> bool:
    """Return whether `value` is a dense tensor of ordinary numbers."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return value.device.type == "cpu" and not value.is_quantized


def load_tensors(path: Path | str) -> dict:
    """Load what `torch.save` wrote to a file, if it is a dict of tensors and plain values."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; name a weights file (.pt)")
    if path.suffix in OTHERS:
        raise ValueError(f"{path}: {OTHERS[path.suffix]}")
    shipped = [file.name for file in shipped_files()]
    if path.name in shipped and contradicts_name(path, path.read_bytes()):
        raise ValueError(f"{path}: its SHA-256 is not the one in its name; fetch it again")
    try:
        with warnings.catch_warnings():  # about a pickle that is refused just below
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: is not a weights file, or is damaged; refused because opening it could run "
            "code: fetch it again, or leave out --weights to use the shipped ones"
        ) from error
    except PermissionError:
        raise
    except Exception as error:  # torch.load may raise nearly anything on a damaged file
        raise ValueError(f"{path}: is not a weights file, or is damaged; fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: does not contain a state dict; save model.state_dict()")
    return content


def load_checkpoint(path: Path) -> dict:
    """Load a checkpoint. Raises FileNotFoundError or ValueError, naming it, if it is not one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: nothing to resume from; start without --resume")
    try:
        checkpoint = load_tensors(path)
    except ValueError as error:
        fault = "is not a training checkpoint, or is damaged; start without --resume"
        raise ValueError(f"{path}: {fault}") from error
    before_version_2 = "n_averaged" in (checkpoint.get("ema") or ())  # of the preprocessing
    if before_version_2 or not CHECKPOINT <= checkpoint.keys():
        raise ValueError(
            f"{path}: is not a training checkpoint of this version; start without --resume"
        )
    return checkpoint


def model_from_state(state: dict[str, Tensor], path: Path | str) -> tuple[str, Network]:
    """Build the network of a state dict, for evaluation; ValueError, naming `path`, for none."""
    for name, network in MODELS.items():
        settings = network.settings_of(state)
        if settings is None:
            continue
        model = network(**settings)  # pyright: ignore[reportArgumentType] ("pretrained" is none)
        try:
            model.load_state_dict(state, strict=True)
        except RuntimeError as error:
            reason = str(error).split("\n")[1].strip()
            raise ValueError(f"{path}: does not fit {name}: {reason}") from error
        return name, model.eval()
    raise ValueError(
        f"{path}: weights of another architecture (first key {next(iter(state))!r}); "
        f"known here: {', '.join(MODELS)}"
    )


def build_network(
    name: str,
    in_channels: int,
    features: int | None = None,
    pretrained: str | bool | None = None,
    seed: int = 0,
    init_weights: Path | None = None,
) -> Network:
    """Build a network with random weights from `seed`, or those of a file where they fit."""
    settings: dict[str, Any] = {"in_channels": in_channels}
    if features:
        settings["init_features"] = features
    if pretrained:
        settings["pretrained"] = pretrained
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(name, **settings)
    if init_weights:
        unused, random = initialise(model, init_weights)
        said = "all weights were taken over"
        if unused or random:
            said = f"not used: {', '.join(unused) or 'nothing'}; "
            said += f"left at random: {', '.join(random) or 'nothing'}"
        print(f"{init_weights}: {said}")
    return model


def initialise(model: Network, path: Path | str) -> tuple[list[str], list[str]]:
    """Copy into `model` all weights of a file that fit by name and shape.

    Returns the names in the file that were not used, and those of the model left as they were.
    Raises ValueError, naming the file, if none fits.
    """
    state, before = load_state(path), model.state_dict()
    fitting = {}
    for name, value in state.items():
        if name in before and value.shape == before[name].shape:
            fitting[name] = value
    if not any(key.endswith("weight") for key in fitting):
        raise ValueError(
            f"{path}: no weight in it fits the model; give weights of the same network and width "
            "(--model, --features)"
        )
    model.load_state_dict(fitting, strict=False)
    return sorted(state.keys() - fitting.keys()), sorted(before.keys() - fitting.keys())


def save_weights(path: Path, state: dict[str, Tensor], card: dict) -> None:
    """Write a bare state dict and its card, with its SHA-256; both whole, or OSError."""
    content = pack(state)
    card = card | {"sha256": hashlib.sha256(content).hexdigest()}
    with atomic_write(path) as weights:
        weights.write_bytes(content)
        write_json(path.with_suffix(".json"), card)


def save_tensors(path: Path, content: dict) -> None:
    """Write with `torch.save`, whole or not at all; raises OSError, naming the file."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(pack(content))


def pack(content: dict) -> memoryview:
    """Return what `torch.save` writes; into a file, it would write the file's name as well."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def read_card(path: Path | str) -> dict:
    """Read the card beside a weights file; empty if it is missing. For any file: `onnx.card_of`.

    Raises ValueError if it is not a card, or the card of other weights.
    """
    card = Path(path).with_suffix(".json")
    if not card.is_file():
        return {}
    try:
        content = json.loads(card.read_text())
        for names in content.get("cases", {}).values():
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise TypeError("cases")
        for name in CARD_DEFAULTS:
            if not isinstance(content.get(name, 0), int):
                raise TypeError(name)
        for part in ("expected_dsc", "mask_settings"):
            for name, value in (content.get(part) or {}).items():
                if not isinstance(value, FIT_TYPES.get(name, object)):
                    raise TypeError(name)
        check_fit(content.get("expected_dsc") or {})
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{card}: is not the JSON card of {Path(path).name}; remove it") from error
    if content.get("sha256") not in (None, file_hash(path)):
        raise ValueError(
            f"{path}: is not the file that {card.name} beside it belongs to, by its SHA-256; copy "
            "both again from the same place"
        )
    return content


def is_card(path: Path, parts: Collection[str] = ("model", "settings", "cases", "recipe")) -> bool:
    """Tell whether a JSON file is a card with these parts, by default that of a training."""
    try:
        return set(parts) <= json.loads(path.read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def has_card(weights: Path) -> bool:
    """Tell whether weights have a card that belongs to them."""
    try:
        return bool(read_card(weights))
    except ValueError:
        return False


def check_fit(fit: dict) -> None:
    """Raise ValueError, TypeError or KeyError if a fit of the expected DSC lacks a number."""
    if not fit.get("features"):
        return
    count = len(fit["features"])
    _check_numbers(fit["mean"], count)
    _check_numbers(fit["deviation"], count, above=0)
    _check_numbers(fit["weights"], count)
    _check_numbers(fit["interval"], 2)
    _check_numbers([fit["intercept"]], 1)
    looks = fit.get("looks")
    if looks:
        count = len(looks["names"])
        _check_numbers(looks["mean"], count)
        _check_numbers(looks["deviation"], count, above=0)
        _check_numbers([looks["usual"]], 1, above=0)


def _check_numbers(values: Sequence[float], count: int, above: float = -math.inf) -> None:
    if len(values) != count or not all(above < value < math.inf for value in values):
        raise ValueError(f"{values}: not {count} finite numbers above {above}")


def shipped_weights(name: str) -> Path:
    """Find the shipped folder of networks. Raises FileNotFoundError if it does not exist."""
    return _find(name, SHIPPED)


def _find(name: str, shipped: dict[str, Path]) -> Path:
    if name not in shipped:
        names = ", ".join(shipped)
        raise FileNotFoundError(f"no pretrained weights for {name!r}, only for {names}; train some")
    if not shipped[name].exists():
        raise FileNotFoundError(f"{shipped[name]}: is missing; fetch the project again")
    return shipped[name]


def shipped_files() -> list[Path]:
    """List the shipped weights files, each of a single network."""
    files = list(PUBLISHED.values())
    for folder in SHIPPED.values():
        files += sorted(folder.glob("*.pt"))
    return files


def load_pretrained(name: str, **settings: int) -> Network:
    """Build the network `name`, of the 2019 paper's shape, with its weights, in evaluation mode.

    Raises ValueError, before anything is loaded, if they were trained for other `settings`.
    """
    path = _find(name, PUBLISHED)
    trained = read_card(path).get("settings", {})
    for key, value in settings.items():
        if trained.get(key) != value:
            raise ValueError(
                f"the pretrained {name} has {key}={trained.get(key)}, not {value}; keep that, or "
                "ask for pretrained=False"
            )
    return model_from_state(load_state(path), path)[1]


def file_hash(path: Path | str) -> str:
    """Compute the SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def contradicts_name(path: Path | str, content: bytes) -> bool:
    """Tell whether the name of a file ends in a hash that is not the one of its content."""
    named = HASH.search(Path(path).stem)
    return named is not None and not hashlib.sha256(content).hexdigest().startswith(named[1])
