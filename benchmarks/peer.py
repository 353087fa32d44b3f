"""Prepare, train or segment with MONAI or segmentation_models_pytorch, as their users would.

peers.py starts this script, one process for each measurement. It uses nothing from brainseg. Slices
are resized as whole images and normalised one by one, as in the libraries' 2D tutorials.
"""

import argparse
import json
import os
from itertools import groupby
from math import radians
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.measure import label
from tifffile import imwrite
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def monai_data(files: list[dict], size: int, train: bool) -> Dataset:
    """Cache the deterministic transforms; augment at random on top when training."""
    from monai import transforms as t
    from monai.data import CacheDataset, set_track_meta

    keys, modes = ("image", "mask"), ("bilinear", "nearest")
    steps = [
        t.LoadImaged(keys, reader="PILReader"),
        t.EnsureChannelFirstd(keys),
        t.Resized(keys, (size, size), mode=modes),
        t.NormalizeIntensityd("image", nonzero=True, channel_wise=True),
        t.AsDiscreted("mask", threshold=0.5),
        t.EnsureTyped(keys, dtype=torch.float32, track_meta=False),
    ]
    if train:
        steps += [
            t.RandAffined(
                keys, prob=1, rotate_range=radians(15), scale_range=(0.2, 0.2), mode=modes,
                padding_mode="zeros",
            ),
            t.RandFlipd(keys, prob=0.5, spatial_axis=0),
            t.RandScaleIntensityd("image", factors=0.3, prob=1),
            t.RandShiftIntensityd("image", offsets=0.3, prob=1),
        ]  # fmt: skip
    set_track_meta(True)  # needed to load, slow in training: see MONAI's fast training guide
    dataset = CacheDataset(files, t.Compose(steps), num_workers=CORES, progress=False)
    set_track_meta(False)
    return dataset


def monai_network(features: int, encoder: str) -> tuple:
    from monai.losses import DiceCELoss
    from monai.networks.nets import BasicUNet

    widths = (features, 2 * features, 4 * features, 8 * features, 16 * features, features)
    network = BasicUNet(spatial_dims=2, in_channels=3, out_channels=1, features=widths)
    return network, DiceCELoss(sigmoid=True, batch=True), 1e-3


class SmpData(Dataset):
    """Read and resize the files of a slice when asked, as in the library's own examples."""

    def __init__(self, files: list[dict], size: int, train: bool):
        self.files, self.size, self.train = files, size, train
        statistics = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # ImageNet
        self.mean, self.std = (np.float32(statistics[name]) for name in ("mean", "std"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        image, mask = (Image.open(self.files[index][key]) for key in ("image", "mask"))
        size = (self.size, self.size)
        image = np.asarray(image.resize(size, Image.BILINEAR), np.float32) / 255
        mask = np.asarray(mask.resize(size, Image.NEAREST)) > 0
        image = (image - self.mean) / self.std
        if self.train and torch.rand(()) < 0.5:
            image, mask = image[:, ::-1], mask[:, ::-1]
        image = np.ascontiguousarray(image.transpose(2, 0, 1))
        return {"image": image, "mask": np.ascontiguousarray(mask[None], np.float32)}


def smp_network(features: int, encoder: str) -> tuple:
    import segmentation_models_pytorch as smp

    network = smp.Unet(encoder, encoder_weights=None, in_channels=3, classes=1)
    return network, smp.losses.DiceLoss(smp.losses.BINARY_MODE, from_logits=True), 2e-4


def make_loader(dataset: Dataset, args: argparse.Namespace, **options) -> DataLoader:
    """Load batches; MONAI's loader seeds each worker differently."""
    if args.library == "monai":
        from monai.data import DataLoader as Loader
    else:
        Loader = DataLoader
    return Loader(dataset, batch_size=args.batch_size, **options)


LIBRARIES = {"monai": (monai_data, monai_network), "smp": (SmpData, smp_network)}


def predict(network: torch.nn.Module, dataset: Dataset, args: argparse.Namespace) -> torch.Tensor:
    """Predict the mask of every slice: (slices, size, size)."""
    network.eval()
    masks = []
    with torch.inference_mode(), torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
        # What MONAI has cached needs no workers.
        workers = CORES if args.library == "smp" else 0
        for batch in make_loader(dataset, args, num_workers=workers):
            masks.append(network(batch["image"].to(args.device))[:, 0].cpu() > 0)
    return torch.cat(masks)


def dsc(mask: np.ndarray, truth: np.ndarray) -> float:
    return 2 * (mask & truth).sum() / max(mask.sum() + truth.sum(), 1)


def of_cases(files: list[dict]) -> list[slice]:
    """Find the slices of each case."""
    lengths = [len(list(group)) for _, group in groupby(files, lambda file: file["case"])]
    ends = np.cumsum(lengths)
    return [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]


def train(network, loss_function, lr: float, data: list[Dataset], files: list, args) -> None:
    """Train with Adam and a cosine schedule; print the mean validation DSC of each epoch."""
    optimizer = torch.optim.Adam(network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    loader = make_loader(
        data[0], args, shuffle=True, num_workers=CORES, persistent_workers=True,
        pin_memory=args.device == "cuda",
    )  # fmt: skip
    truth = np.concatenate([item["mask"] for item in data[1]]) > 0
    for epoch in range(1, args.epochs + 1):
        network.train()
        for batch in loader:
            images, masks = (batch[key].to(args.device) for key in ("image", "mask"))
            optimizer.zero_grad()
            with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
                logits = network(images)
            loss = loss_function(logits.float(), masks)
            loss.backward()
            optimizer.step()
        schedule.step()
        found = predict(network, data[1], args).numpy()
        score = np.mean([dsc(found[case], truth[case]) for case in of_cases(files[1])])
        torch.save(network.state_dict(), args.weights)
        print(f"epoch {epoch}/{args.epochs}  loss {loss.item():.4f}  DSC {score:.4f}", flush=True)


def segment(network: torch.nn.Module, dataset: Dataset, files: list[dict], args) -> None:
    """Write the largest component of each case, in the size of its files, and print its DSC."""
    found = predict(network, dataset, args)
    for case in of_cases(files):
        truth = np.stack([np.asarray(Image.open(file["mask"])) > 0 for file in files[case]])
        # MONAI's PILReader puts the columns first.
        masks = found[case].transpose(1, 2) if args.library == "monai" else found[case]
        mask = interpolate(masks[:, None].float(), truth.shape[1:])[:, 0].numpy() > 0
        labels = label(mask)
        sizes = np.bincount(labels.ravel())[1:]
        mask = labels == 1 + sizes.argmax() if len(sizes) else mask
        name = files[case][0]["case"]
        args.out.mkdir(parents=True, exist_ok=True)
        imwrite(args.out / f"{name}_mask.tif", mask.astype(np.uint8) * 255, compression="zlib")
        print(f"{name}  DSC {dsc(mask, truth):.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("prepare", "train", "segment"))
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--encoder", default="resnet34", help="for segmentation_models_pytorch")
    parser.add_argument("--files", type=Path, required=True, help="JSON: slices of both subsets")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    for name, default in (("size", 192), ("features", 16), ("batch-size", 16), ("epochs", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true")
    args = parser.parse_args()
    files = json.loads(args.files.read_text())
    make_data, make_network = LIBRARIES[args.library]
    network, loss, lr = make_network(args.features, args.encoder)
    network.to(args.device)
    if args.task == "segment":
        network.load_state_dict(torch.load(args.weights, args.device, weights_only=True))
        segment(network, make_data(files[1], args.size, False), files[1], args)
        return
    data = [make_data(part, args.size, k == 0) for k, part in enumerate(files)]
    if args.task == "train":
        train(network, loss, lr, data, files, args)


if __name__ == "__main__":
    main()
