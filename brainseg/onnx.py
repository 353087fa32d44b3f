"""Networks in ONNX files that export.py wrote, run by ONNX Runtime.

Such a file contains its card and needs nothing else. Its name contains the first eight digits of
its SHA-256, which is checked whenever it is opened. Other ONNX files are refused: how to prepare
images for them is not known.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .devices import to_device
from .io.files import default_cache
from .optional import import_optional
from .unet import check_input
from .weights import contradicts_name, read_card

PROVIDERS = {  # of ONNX Runtime, the fastest first
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
DEVICES = {"tensorrt": "cuda", "cuda": "cuda", "cpu": "cpu"}
INPUT, OUTPUT = "slices", "probabilities"
REMEDY = "fetch it again, or make one with export.py --format onnx"
CARD = "brainseg.card"  # key of the metadata that holds the card, JSON


class OnnxNetwork:
    """A network that is called like one of PyTorch and returns probabilities.

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
        self._runtime = import_optional("onnxruntime", path)
        self.card = _card(self._runtime, self._content, path)
        self.settings, self.stride = self.card["settings"], self.card["stride"]
        kind, _, gpu = str(device or "").partition(":")
        available = self._runtime.get_available_providers()
        try:
            chosen = pick_providers(providers, kind, available)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self._providers = []
        for name in chosen:
            options = {}
            if name != "cpu":
                options["device_id"] = gpu or "0"
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
                    "or leave out --providers to use the best one that does"
                )
        self.provider = next(name for name in PROVIDERS if PROVIDERS[name] in started)
        self.device = torch.device("cpu")
        if self.provider != "cpu" and torch.cuda.is_available():
            self.device = torch.device(f"cuda:{gpu or 0}")

    def __call__(self, x: Tensor) -> Tensor:
        """Run the network: slices (N, in, H, W) in, probabilities (see `average`), float32, out."""
        import numpy as np  # not for torch.hub's bare networks

        check_input(x, self.settings["in_channels"], self.stride)
        images, session = to_device(x.float(), self.device).contiguous(), self._session()
        count, _, height, width = images.shape
        shape = (count, session.get_outputs()[0].shape[1], height, width)
        probabilities = torch.empty(shape, device=self.device)
        binding = session.io_binding()  # reads and writes the tensors in place
        place, index = self.device.type, self.device.index or 0
        binding.bind_input(INPUT, place, index, np.float32, images.shape, images.data_ptr())
        binding.bind_output(OUTPUT, place, index, np.float32, shape, probabilities.data_ptr())
        try:
            if images.is_cuda:
                torch.cuda.current_stream(self.device).synchronize()
            session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{self.path}: ONNX Runtime failed on {len(images)} slices ({reason}); try a "
                "smaller --batch-size"
            ) from error
        return probabilities.to(x.device)

    def _session(self) -> Any:
        """Return a session with as many threads as PyTorch would use in the calling thread."""
        threads = torch.get_num_threads()
        with self._lock:
            if threads not in self._sessions:
                self._sessions[threads] = _open(
                    self._runtime, self._content, self.path, self._providers, threads
                )
            return self._sessions[threads]

    def _tensorrt_options(self, batch_size: int, size: int) -> dict[str, str]:
        """Ask for one engine for all batches, kept on disk because it takes minutes to build."""
        # Engines are named after the layers, not the weights: each file needs a separate folder.
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


def card_of(path: Path) -> dict:
    """Read the card inside an ONNX file, or beside other weights (`read_card`).

    Raises FileNotFoundError or ValueError if it cannot be used.
    """
    if path.suffix != ".onnx":
        return read_card(path)
    content = _read(path)
    return _card(import_optional("onnxruntime", path), content, path)


def pick_providers(
    names: Sequence[str] | None, kind: str, available: Sequence[str]
) -> Sequence[str]:
    """Choose `available` PROVIDERS for a device (cpu, cuda, "": any); ValueError for none."""
    here = [name for name in PROVIDERS if PROVIDERS[name] in available]
    fitting = [name for name in here if kind in ("", DEVICES[name])]
    there = f"available: {', '.join(here)}"
    remedy = "for a GPU, install onnxruntime-gpu in place of onnxruntime, or leave out"
    for name in names or ():
        if name not in here:
            raise ValueError(f"provider {name!r} is not installed ({there}); {remedy} --providers")
        if name not in fitting:
            raise ValueError(
                f"provider {name!r} does not run on the device {kind!r}; leave out --device"
            )
    if not fitting:
        raise ValueError(
            f"device {kind!r}: ONNX Runtime has no provider for it ({there}); {remedy} --device"
        )
    return names or fitting


def _read(path: Path | str) -> bytes:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such ONNX file; check its name")
    content = Path(path).read_bytes()
    if contradicts_name(path, content):
        raise ValueError(f"{path}: is damaged: its SHA-256 is not the one in its name; {REMEDY}")
    return content


def _card(runtime: Any, content: bytes, path: Path | str) -> dict:
    """Read the card in an ONNX file. Raises ValueError without one."""
    session = _open(runtime, content, path, [(PROVIDERS["cpu"], {})], optimise=False)
    try:
        return json.loads(session.get_modelmeta().custom_metadata_map[CARD])
    except KeyError as error:
        raise ValueError(
            f"{path}: is not an ONNX file that export.py wrote, so nothing says how to prepare "
            f"images for it; {REMEDY}"
        ) from error


def _open(
    runtime: Any,
    content: bytes,
    path: Path | str,
    providers: list,
    threads: int = 1,
    optimise: bool = True,
) -> Any:
    """Open a session; ValueError, naming the file, if ONNX Runtime refuses it."""
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors are reported below, in a sentence
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimise:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return runtime.InferenceSession(content, options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        if type(error).__name__ in ("InvalidProtobuf", "InvalidArgument"):
            raise ValueError(f"{path}: is damaged, or not an ONNX file; {REMEDY}") from error
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: ONNX Runtime {runtime.__version__} cannot run it ({reason}); "
            "try another version, or leave out --providers"
        ) from error
