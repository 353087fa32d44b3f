"""Test that two processes do what one does: the same gradients, epochs, files and messages.

They are forked, communicate through gloo, and train narrow networks on the CPU. Batch norm over
several processes needs CUDA, so networks whose gradients are compared do not have it.
"""

import itertools
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import contents, in_processes
from test_train import flags, same, scalars
from torch import nn

import train
from brainseg import distributed, training, weights
from brainseg.devices import rank_device
from brainseg.distributed import (
    gather,
    local_rank_zero_first,
    process_group,
    shard,
    shard_of_batch,
)
from brainseg.training import TrainState
from brainseg.weights import build_network, load_state, load_tensors, read_card
from dataset import BrainSegmentationDataset
from loss import LOSSES
from transform import Augmentation


@pytest.fixture(scope="module", autouse=True)
def dynamo():
    """Import what DistributedDataParallel needs here, not in every process."""
    import torch._dynamo  # noqa: F401


BATCHES = [[3, 17, 40, 41, 60], [3]]  # one that does not divide evenly, and one slice


def in_group(work):
    def joined():
        with process_group():
            return work()

    return joined


@pytest.fixture
def no_batch_norm(monkeypatch):
    build = weights.build_model

    def built(*arguments, **settings):
        model = build(*arguments, **settings)
        torch.manual_seed(0)
        for module in list(model.modules()):
            if isinstance(module, nn.Conv2d):  # otherwise the signal fades without the norm
                nn.init.kaiming_normal_(module.weight)
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.Identity())
        return model

    monkeypatch.setattr(weights, "build_model", built)


# The pieces


def test_gathering_shards_restores_the_order():
    def work():
        return [shard(list(range(n))) for n in range(6)], [
            gather(shard(list(range(n)))) for n in range(6)
        ]

    (own, whole), (others, also) = in_processes(2, in_group(work))
    assert whole == also == [list(range(n)) for n in range(6)]
    assert all(
        sorted(a + b) == list(range(n)) for n, (a, b) in enumerate(zip(own, others, strict=True))
    )
    assert shard([1, 2]) == gather([1, 2]) == [1, 2], "one process has all"


def test_a_process_without_a_slice_gets_the_first_as_a_stand_in():
    assert in_processes(2, in_group(lambda: shard_of_batch([7]))) == [[7], [7]]
    assert in_processes(2, in_group(lambda: shard_of_batch([7, 8, 9]))) == [[7, 9], [8]]


@pytest.mark.parametrize("number", [0, 1])
def test_an_error_of_one_rank_ends_all_and_is_reported_once(number, capfd):
    def work():
        with local_rank_zero_first():
            if distributed.rank() == number:
                raise FileNotFoundError(2, "No such file or directory", "x.pt")
        return gather([1])

    assert in_processes(2, in_group(work)) == ["ended", "ended"]
    assert capfd.readouterr().err == "error: x.pt: no such file or directory\n"


def test_an_unexpected_error_keeps_its_traceback(capfd, monkeypatch):
    monkeypatch.setattr(distributed, "GRACE", 0.05)
    assert in_processes(2, in_group(lambda: 1 // distributed.rank()))[0] == "ended"
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_the_first_rank_of_a_machine_works_before_the_others(tmp_path):
    def work():
        with local_rank_zero_first(), open(tmp_path / "order", "a") as file:
            file.write(str(distributed.rank()))

    in_processes(2, in_group(work))
    assert (tmp_path / "order").read_text() == "01"
    with local_rank_zero_first():
        assert distributed.is_main_process(), "one process alone waits for nobody"


def test_one_device_cannot_be_named_for_all(capfd):
    in_processes(2, in_group(lambda: rank_device("cuda:1")))
    assert capfd.readouterr().err.startswith("error: --device cuda:1 names one device for all")
    assert rank_device("cuda:1") == "cuda:1", "one process may have any"


# Gradients


def gradients(phantoms: Path) -> list[tuple[str, float, dict[str, np.ndarray]]]:
    """Return each loss and its gradients in a training step, for each batch."""
    dataset = BrainSegmentationDataset(phantoms, "all", 32, workers=1)
    results = []
    for loss, indices in itertools.product(LOSSES, BATCHES):
        model = build_network("unet", in_channels=3, features=4, seed=42)
        state = TrainState(
            model=model,
            slices=len(dataset), batch_size=16, epochs=1, lr=1e-3, seed=42,
            loss=LOSSES[loss], augment=Augmentation(0.05, 15, 0.4, 0.3, 3),
        )  # fmt: skip
        training.wrap_network(state)
        images, masks = dataset.batch(shard_of_batch(indices))
        value = train.train_step(state, images, masks, len(indices)).item()
        results.append((loss, value, {k: p.grad.numpy() for k, p in model.named_parameters()}))
    return results


def test_two_processes_have_the_gradient_of_one(phantoms, no_batch_norm):
    """The gradient is that of the whole batch, though each loss is a ratio of sums over it."""
    expected = gradients(phantoms)
    for results in in_processes(2, in_group(lambda: gradients(phantoms))):
        for (loss, value, gradient), (_, other_value, other) in zip(expected, results, strict=True):
            assert other_value == pytest.approx(value, rel=1e-6), loss
            for name in gradient:
                error = abs(other[name] - gradient[name]).max()
                assert error <= 1e-4 * abs(gradient[name]).max(), (loss, name)


# Whole runs


def trained(phantoms: Path, out: Path, *more: object, processes: int = 2) -> list:
    """Train into `out`; return how each process ended, None if well."""
    return in_processes(processes, lambda: train.main(flags(phantoms, out, *more)))


def sentences(ends: list) -> list[object]:
    assert all(isinstance(end, SystemExit) for end in ends), ends
    return [end.code for end in ends]


@pytest.fixture(scope="module")
def pair(phantoms, tmp_path_factory) -> Path:
    """Train two epochs in two processes, with pictures drawn from the masks of both."""
    out = tmp_path_factory.mktemp("pair")
    more = "--epochs", 2, "--vis-freq", 2, "--ema", 0.9, "--folds", 3, "--fold", 0
    assert trained(phantoms, out, *more) == [None, None]
    return out


def test_one_process_writes_for_all(pair):
    assert sorted(contents(pair / "weights")) == ["unet.ckpt", "unet.json", "unet.pt"]
    card = read_card(pair / "weights" / "unet.pt")
    assert card["processes"] == 2 and card["validation_dsc"]["n"] == 4
    assert len(list((pair / "logs").glob("events*"))) == 1
    events = scalars(pair / "logs")
    assert [event.step for event in events.Scalars("dsc/validation")] == [1, 2]
    by_case = [tag for tag in events.Tags()["scalars"] if tag.startswith("dsc_by_case/")]
    assert len(by_case) == len(events.Tags()["images"]) == 4


def test_same_seed_and_number_of_processes_same_weights(phantoms, pair, tmp_path):
    more = "--epochs", 2, "--ema", 0.9, "--folds", 3, "--fold", 0
    assert trained(phantoms, tmp_path, *more) == [None, None]
    one, two = (load_tensors(x / "weights" / "unet.ckpt") for x in (pair, tmp_path))
    assert all(same(one[key], two[key]) for key in ("model", "ema", "optimizer", "best"))


def close(a: Path, b: Path) -> bool:
    one, two = (load_tensors(x / "weights" / "unet.ckpt") for x in (a, b))
    assert (one["epoch"], one["step"]) == (two["epoch"], two["step"])
    assert one["loss_sum"] == pytest.approx(two["loss_sum"], rel=1e-4)
    one, two = one["model"], two["model"]
    return all(torch.allclose(one[k], two[k], rtol=1e-3, atol=2e-5) for k in one)


def test_an_epoch_is_the_same_for_any_number_of_processes(phantoms, tmp_path, no_batch_norm):
    """With 64 slices in steps of 7, the last step has one slice for two processes."""
    more = "--no-amp", "--batch-size", 7, "--lr", 1e-4, "--epochs", 2
    train.main(flags(phantoms, tmp_path / "one", *more))
    assert trained(phantoms, tmp_path / "two", *more) == [None, None]
    assert close(tmp_path / "one", tmp_path / "two")
    losses = [scalars(tmp_path / x / "logs").Scalars("loss/train") for x in ("one", "two")]
    for one, two in zip(*losses, strict=True):
        assert one.value == pytest.approx(two.value, rel=1e-4)


def send_signal(monkeypatch, step: int, number: int, to: int) -> None:
    """Make one process send itself a signal in the middle of a step."""
    original, done = train.train_step, []

    def train_step(*batch, **options):
        done.append(1)
        if len(done) == step and distributed.rank() == to:
            os.kill(os.getpid(), number)
        return original(*batch, **options)

    monkeypatch.setattr(train, "train_step", train_step)


def test_a_run_goes_on_with_another_number_of_processes(
    phantoms, tmp_path, monkeypatch, no_batch_norm
):
    """One process gets the signal; all stop after the same step, and others resume there."""
    more = "--no-amp", "--epochs", 2, "--lr", 1e-4
    train.main(flags(phantoms, tmp_path / "whole", *more))
    for first in (1, 3):
        out = tmp_path / f"parts{first}"
        with monkeypatch.context() as patch:
            send_signal(patch, 6, signal.SIGTERM, to=first - 1)  # of 2 x 4 steps
            ends = trained(phantoms, out, *more, processes=first)
        assert sentences(ends) == [128 + signal.SIGTERM] * first
        stopped = load_tensors(out / "weights" / "unet.ckpt")
        assert (stopped["epoch"], stopped["step"]) == (1, 2)
        assert trained(phantoms, out, *more, "--resume", processes=2) == [None, None]
        assert close(tmp_path / "whole", out)


# What goes wrong


def said_once(capfd, ends: list) -> str:
    """Return the one sentence on stderr of a run that has failed on every rank."""
    assert ends[0] == "ended" and not any(isinstance(end, BaseException) for end in ends)
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


def test_a_nan_loss_stops_all_and_is_reported_once(phantoms, pair, tmp_path, monkeypatch, capfd):
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path / "weights")
    dice = LOSSES["dice"]

    def nan_in_one(logits, target, total):
        return dice(logits * (float("nan") if distributed.rank() else 1), target, total=total)

    monkeypatch.setitem(LOSSES, "dice", nan_in_one)
    line = said_once(capfd, trained(phantoms, tmp_path, "--resume", "--epochs", 3))
    assert "not finite at epoch 3, step" in line
    assert contents(tmp_path / "weights") == before


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_dies_ends_the_other_with_a_sentence(
    phantoms, pair, tmp_path, monkeypatch, capfd, lost
):
    """This holds even without torchrun to end it."""
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path / "weights")
    send_signal(monkeypatch, 2, signal.SIGKILL, to=lost)
    monkeypatch.setattr(distributed, "GRACE", 0.05)
    words = flags(phantoms, tmp_path, "--resume", "--epochs", 3)
    ends = in_processes(2, lambda: train.main(words), torchrun=False)
    assert f"error: rank {1 - lost} lost another of the 2 ranks" in said_once(capfd, ends)
    assert contents(tmp_path / "weights") == before
    load_state(tmp_path / "weights" / "unet.pt")


def test_bad_input_is_reported_once(phantoms, tmp_path, capfd):
    line = said_once(capfd, trained(tmp_path / "nowhere", tmp_path))
    assert line.startswith(f"error: {tmp_path / 'nowhere'}: no such folder")
    line = said_once(capfd, trained(phantoms, tmp_path, "--batch-size", 1))
    assert "--batch-size 1 is less than one slice for each of 2 processes" in line
    assert sentences(trained(phantoms, tmp_path, "--epochs", 0)) == [2, 2]
    assert capfd.readouterr().err.count("--epochs: must be at least 1") == 1


def test_a_full_disk_is_reported_once(phantoms, tmp_path, monkeypatch, capfd):
    def full_disk(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    assert "unet.pt: no space left on device" in said_once(capfd, trained(phantoms, tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_batch_norm_over_processes_needs_cuda(phantoms, tmp_path, capfd):
    line = said_once(capfd, trained(phantoms, tmp_path, "--sync-bn"))
    assert "--sync-bn is for CUDA devices" in line
