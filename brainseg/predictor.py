"""A network on its device: preprocessed slices in, probabilities out."""

from collections.abc import Callable

import torch
from torch import Tensor

from .devices import half_precision, has_bfloat16, pick_device
from .ensemble import Ensemble, for_inference
from .onnx import OnnxNetwork
from .preprocess import neighbourhoods
from .weights import Network

MIRROR_ABOVE = 0.05  # probability; a slice without any as high is not mirrored


class Predictor:
    """A network, or an `Ensemble`, on its device: preprocessed slices in, probabilities out.

    See `Segmenter` for the options. Raises ValueError for a device that is not available.
    """

    def __init__(
        self,
        model: Network | Ensemble | OnnxNetwork,
        tta: bool = False,
        batch_size: int = 16,
        device: torch.device | str | None = None,
        amp: bool | None = None,
        neighbours: int = 0,
    ):
        if isinstance(model, OnnxNetwork):
            if amp:
                raise ValueError(
                    f"{model.path}: computes in the precision it was exported in; leave out "
                    "--amp, or export it again with --precision float16"
                )
            self.model, self.amp = model, False
            self.device = torch.device("cpu")  # of its input and output
            self.on_cpu, self.runtime = model.provider == "cpu", f"ONNX Runtime ({model.provider})"
        else:
            self.device = pick_device(device)
            self.model = for_inference(model)
            self.model.to(self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            if amp is None:
                amp = has_bfloat16(self.device)
            self.amp = amp
            self.on_cpu, self.runtime = self.device.type == "cpu", f"PyTorch ({self.device})"
        self.tta, self.neighbours = tta, neighbours
        if self.on_cpu:  # small batches stay in its cache and take a fifth less time
            batch_size = min(batch_size, 4)
        self.batch_size = batch_size

    @torch.inference_mode()
    def probabilities(
        self, images: Tensor, progress: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Run the network: slices (S, C, N, N) in, probabilities (S, K, N, N), float32, out.

        An ensemble adds a channel with the standard deviation (see `average`). `progress` is called
        after each batch with the numbers of slices done and in all.
        """
        around = neighbourhoods([len(images)], self.neighbours)  # (S, 2 neighbours + 1)
        around = around.to(images.device, non_blocking=True)
        parts, done = [], 0
        for slices in around.split(self.batch_size):
            batch = images[slices].flatten(1, 2).to(self.device, torch.float32)
            part = self._network(batch)
            if self.tta:
                lesion = part[:, 0].amax((1, 2)) >= MIRROR_ABOVE  # where there may be any
                mirrored = lesion.nonzero()[:, 0]
                if len(mirrored):
                    again = self._network(batch[mirrored].flip(-1)).flip(-1)
                    part[mirrored] = (part[mirrored] + again) / 2
            parts.append(part)
            done += len(slices)
            if progress:
                progress(done, len(images))
        return torch.cat(parts)

    @property
    def channels(self) -> int:
        """Return the number of channels, or sequences, of a volume."""
        return self.model.settings["in_channels"] // (2 * self.neighbours + 1)

    def check_channels(self, channels: int) -> None:
        """Raise ValueError unless the network takes this number of channels."""
        if channels != self.channels:
            raise ValueError(
                f"{channels} channel(s), but the model was trained on {self.channels}; "
                "give the sequences it was trained on, with FLAIR in place of a missing one "
                "(--channels picks those of a file)"
            )

    def _network(self, batch: Tensor) -> Tensor:
        batch = batch.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, half_precision(self.device), enabled=self.amp):
            return self.model(batch)
