"""Networks in ONNX files that export.py wrote, run by ONNX Runtime.

Such a file holds its card, so that nothing else is needed to use it, and ends with a SHA-256 of all
that comes before, so that damage is noticed. Other ONNX files are refused: how to prepare images
for them is not known.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .io.files import default_cache
from .unet import check_input

PROVIDERS = {  # of ONNX Runtime, the fastest first
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
INPUT, OUTPUT = "slices", "probabilities"
PRODUCER = "brainseg"
CARD = "brainseg.card"  # key of the metadata that holds the card, JSON
# A file is an ONNX ModelProto and, as protocol buffers that follow each other are merged, one more
# entry of its metadata (field 14): the key "sha256" and a value of 64 characters.
SEAL = b"\x72\x4a\x0a\x06sha256\x12\x40"


class OnnxNetwork:
    """A network that is called as those of PyTorch are, and gives probabilities.

    `providers` are names of `PROVIDERS` in order of preference (None: all that are installed).
    `device` (cpu, cuda, cuda:1) says which of them may be used, and which GPU. TensorRT prepares
    for up to `batch_size` slices of `image_size` (None: that of the card).
    Raises FileNotFoundError or ValueError if the file or a provider cannot be used.
    """

    def __init__(
        self,
        path: Path | str,
        providers: Sequence[str] | None = None,
        device: torch.device | str | None = None,
        batch_size: int = 16,
        image_size: int | None = None,
    ):
        self.path, self._content = path, _read(path)
        self.card = _card(self._content, path)
        self.settings, self.stride = self.card["settings"], self.card["stride"]
        kind, _, gpu = str(device or "").partition(":")
        available = needed("onnxruntime", path).get_available_providers()
        try:
            chosen = pick_providers(providers, kind, available)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self._providers = []  # names and options, as ONNX Runtime takes them
        for name in chosen:
            options = {} if name == "cpu" else {"device_id": gpu or "0"}
            if name == "tensorrt":
                size = image_size or self.card["image_size"]
                options |= self._tensorrt_options(batch_size, size)
            self._providers.append((PROVIDERS[name], options))
        self._sessions: dict[int, Any] = {}
        self._lock = Lock()
        started = self._session().get_providers()
        for name in providers or ():
            if PROVIDERS[name] not in started:
                raise ValueError(
                    f"{path}: provider {name!r} does not start; install the libraries it needs, "
                    "or leave --providers out for the best that does"
                )
        self.provider = next(name for name in PROVIDERS if PROVIDERS[name] in started)

    def __call__(self, x: Tensor) -> Tensor:
        """Probabilities (N, out, H, W), float32, of slices (N, in, H, W), all on the CPU.

        Raises ValueError for a channel count or an image size that does not fit the network.
        """
        check_input(x, self.settings["in_channels"], self.stride)
        images = x.float().contiguous().numpy()
        try:
            (probabilities,) = self._session().run([OUTPUT], {INPUT: images})
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{self.path}: ONNX Runtime fails on {len(images)} slices ({reason}); try a "
                "smaller --batch-size"
            ) from error
        return torch.from_numpy(probabilities)

    def _session(self) -> Any:
        """An InferenceSession with as many threads as PyTorch would use where this is called."""
        threads = torch.get_num_threads()
        with self._lock:
            if threads not in self._sessions:
                self._sessions[threads] = _open(self._content, self.path, self._providers, threads)
            return self._sessions[threads]

    def _tensorrt_options(self, batch_size: int, size: int) -> dict[str, str]:
        """One engine for all batches, kept, as it takes minutes to build."""
        # Engines are named after the layers, not the weights: each file needs a folder of its own.
        engines = default_cache() / "tensorrt" / hashlib.sha256(self._content).hexdigest()[:16]
        engines.mkdir(parents=True, exist_ok=True)
        shape = f"x{self.settings['in_channels']}x{size}x{size}"
        return {
            "trt_fp16_enable": str(self.card["precision"] == "float16"),
            "trt_profile_min_shapes": f"{INPUT}:1{shape}",
            "trt_profile_opt_shapes": f"{INPUT}:{batch_size}{shape}",
            "trt_profile_max_shapes": f"{INPUT}:{batch_size}{shape}",
            "trt_engine_cache_enable": "True",
            "trt_engine_cache_path": str(engines),
        }


def read_onnx_card(path: Path | str) -> dict:
    """The card inside an ONNX file; FileNotFoundError or ValueError if the file cannot be used."""
    return _card(_read(path), path)


def sealed(model: bytes) -> bytes:
    """A serialised ModelProto with its SHA-256 as one more entry of its metadata."""
    return model + SEAL + hashlib.sha256(model).hexdigest().encode()


def needed(package: str, purpose: Path | str) -> ModuleType:
    """An optional package; ValueError, saying how to install it, if it is not there."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime is to tell nobody of its use
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"{purpose}: needs {package}, which is not installed; "
            "pip install -r requirements-onnx.txt"
        ) from error


def pick_providers(
    names: Sequence[str] | None, kind: str, available: Sequence[str]
) -> Sequence[str]:
    """Which of `PROVIDERS` to use of those `available`, on a kind of device (cpu, cuda, "": any).

    Raises ValueError, saying what there is, if one of `names` cannot be used or none is left.
    """
    here = [name for name in PROVIDERS if PROVIDERS[name] in available]
    fitting = [name for name in here if not kind or kind == ("cpu" if name == "cpu" else "cuda")]
    remedy = "for a GPU install onnxruntime-gpu in place of onnxruntime"
    for name in names or ():
        if name not in here:
            raise ValueError(
                f"provider {name!r} is not installed (there is {', '.join(here)}); {remedy}, "
                "or leave --providers out"
            )
        if name not in fitting:
            raise ValueError(
                f"provider {name!r} does not run on the device {kind!r}; leave --device out"
            )
    if not fitting:
        raise ValueError(
            f"device {kind!r}: ONNX Runtime has no provider for it (there is {', '.join(here)}); "
            f"{remedy}, or leave --device out"
        )
    return names or fitting


def _read(path: Path | str) -> bytes:
    """The content of a sealed file; ValueError if it is none, or was changed since."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such ONNX file")
    content = path.read_bytes()
    if content == sealed(content[: -len(sealed(b""))]):
        return content
    if PRODUCER.encode() in content[:64]:
        raise ValueError(
            f"{path}: is damaged or cut short, or was changed since export.py wrote it; "
            "fetch it again, or export it again"
        )
    raise ValueError(
        f"{path}: is no ONNX file that export.py wrote, so how it wants its images is not known; "
        "make one of the weights with export.py --format onnx"
    )


def _card(content: bytes, path: Path | str) -> dict:
    session = _open(content, path, [(PROVIDERS["cpu"], {})], optimise=False)
    return json.loads(session.get_modelmeta().custom_metadata_map[CARD])


def _open(
    content: bytes, path: Path | str, providers: list, threads: int = 1, optimise: bool = True
) -> Any:
    """An InferenceSession; ValueError, naming the file, if ONNX Runtime refuses it."""
    runtime = needed("onnxruntime", path)
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is said here, in a sentence
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimise:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return runtime.InferenceSession(content, options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions have no base of their own
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: ONNX Runtime {runtime.__version__} cannot run it ({reason}); "
            "try another version, or leave --providers out"
        ) from error
