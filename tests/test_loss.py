"""Test losses on values worked out by hand, and that they are finite without a lesion."""

import math

import pytest
import torch

from loss import LOSSES, bce_dice_loss, dice_loss, tversky_loss

focal_tversky_loss = LOSSES["focal-tversky"]


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def masks(*rows: list[float]) -> torch.Tensor:
    """Make one slice (1, 1, rows, columns)."""
    return torch.tensor(rows)[None, None]


def test_dice_by_hand():
    logits = masks([logit(0.5), logit(0.8)], [logit(0.1), logit(0.2)])
    target = masks([1.0, 1.0], [0.0, 0.0])
    overlap, size = 0.5 + 0.8, (0.5 + 0.8 + 0.1 + 0.2) + 2
    expected = 1 - (2 * overlap + 1) / (size + 1)
    assert dice_loss(logits, target).item() == pytest.approx(expected, abs=1e-6)


def test_dice_is_of_the_whole_batch_not_of_each_slice():
    logits = torch.cat([masks([logit(0.9)]), masks([logit(0.3)])])
    target = torch.cat([masks([1.0]), masks([0.0])])
    expected = 1 - (2 * 0.9 + 1) / (0.9 + 0.3 + 1 + 1)
    assert dice_loss(logits, target).item() == pytest.approx(expected, abs=1e-6)


def test_dice_averages_over_channels():
    """Once, only channel 0 was trained."""
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    target = (torch.rand(2, 3, 8, 8) > 0.7).float()
    loss = dice_loss(logits, target)
    single = [dice_loss(logits[:, k : k + 1], target[:, k : k + 1]) for k in range(3)]
    assert loss.item() == pytest.approx(torch.stack(single).mean().item(), abs=1e-6)
    loss.backward()
    assert (logits.grad.abs().sum(dim=(0, 2, 3)) > 0).all()


def test_bce_dice_by_hand():
    logits = masks([logit(0.5), logit(0.8)], [logit(0.1), logit(0.2)])
    target = masks([1.0, 1.0], [0.0, 0.0])
    entropy = -sum(map(math.log, (0.5, 0.8, 0.9, 0.8))) / 4
    expected = entropy + dice_loss(logits, target).item()
    assert bce_dice_loss(logits, target).item() == pytest.approx(expected, abs=1e-6)


def test_tversky_by_hand():
    logits = masks([logit(0.5), logit(0.8)], [logit(0.1), logit(0.2)])
    target = masks([1.0, 1.0], [0.0, 0.0])
    overlap, false_positives, false_negatives = 0.5 + 0.8, 0.1 + 0.2, 0.5 + 0.2
    for alpha, beta in ((0.3, 0.7), (0.9, 0.2)):
        errors = alpha * false_positives + beta * false_negatives
        expected = 1 - (overlap + 1) / (overlap + errors + 1)
        result = tversky_loss(logits, target, alpha, beta)
        assert result.item() == pytest.approx(expected, abs=1e-6)
        result = focal_tversky_loss(logits, target, alpha, beta)
        assert result.item() == pytest.approx(expected**0.75, abs=1e-6)
        result = focal_tversky_loss(logits, target, alpha, beta, gamma=2)
        assert result.item() == pytest.approx(expected**0.5, abs=1e-6)


@pytest.mark.parametrize("loss", [tversky_loss, focal_tversky_loss])
def test_tversky_punishes_a_miss_more_than_a_false_alarm(loss):
    target = masks([1.0, 1.0, 0.0, 0.0])
    missed, invented = masks([40.0, -40.0, -40.0, -40.0]), masks([40.0, 40.0, 40.0, -40.0])
    assert loss(missed, target) > loss(invented, target)
    assert loss(missed, target, alpha=0.7, beta=0.3) < loss(invented, target, alpha=0.7, beta=0.3)


def test_tversky_of_two_halves_is_dice():
    logits, target = torch.randn(2, 3, 8, 8), (torch.rand(2, 3, 8, 8) > 0.7).float()
    halves = tversky_loss(logits, target, alpha=0.5, beta=0.5)
    assert halves.item() == pytest.approx(dice_loss(logits, target, smooth=2).item(), abs=1e-6)


def test_focal_tversky_takes_the_power_of_each_channel():
    logits, target = torch.randn(2, 3, 8, 8), (torch.rand(2, 3, 8, 8) > 0.7).float()
    logits[:, 0] = 80 * (target[:, 0] - 0.5)  # one channel is already right
    single = [tversky_loss(logits[:, k : k + 1], target[:, k : k + 1]) for k in range(3)]
    expected = (torch.stack(single) ** 0.75).mean().item()
    assert focal_tversky_loss(logits, target).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("gamma", [4 / 3, 3])
@pytest.mark.parametrize("size", [0.0, 3.0, 12.0, 40.0, 200.0])
@pytest.mark.parametrize("lesion", [0.0, 0.5, 1.0])
def test_focal_tversky_has_a_finite_gradient_up_to_perfection(gamma, size, lesion):
    """The slope of x ** (1 / gamma) at 0 is infinite; times a saturated sigmoid's 0 it is NaN."""
    target = (torch.rand(1, 2, 16, 16) < lesion).float()
    logits = (size * (2 * target - 1)).requires_grad_()
    result = focal_tversky_loss(logits, target, gamma=gamma)
    result.backward()
    assert torch.isfinite(result) and torch.isfinite(logits.grad).all()
    assert (logits.grad * (2 * target - 1) <= 0).all()  # never away from the mask
    if size <= 12:
        assert logits.grad.abs().sum() > 0


def test_focal_tversky_joins_its_straight_line_without_a_step():
    distances = []
    for size in torch.linspace(12, 24, 400):  # 1 - index crosses 1e-6 in this range
        logits, target = torch.full((1, 1, 8, 8), -size.item()), torch.zeros(1, 1, 8, 8)
        x = tversky_loss(logits, target).item()
        y = focal_tversky_loss(logits, target).item()
        assert y == pytest.approx(x**0.75 if x > 1e-6 else x * 1e-6**-0.25, rel=1e-4)
        distances.append((x, y))
    assert distances == sorted(distances, reverse=True)
    assert distances[0][0] > 1e-6 > distances[-1][0]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_every_output_channel_is_trained(loss):
    """One channel has no lesion."""
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    target = (torch.rand(2, 3, 8, 8) > 0.7).float()
    target[:, 1] = 0
    loss(logits, target).backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad.abs().sum(dim=(0, 2, 3)) > 0).all()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("value", [-40.0, 0.0, 40.0])
@pytest.mark.parametrize("lesion", [0.0, 1.0])
def test_empty_and_full_masks_are_finite(loss, value, lesion):
    """An empty mask must not give NaN."""
    logits = torch.full((2, 1, 8, 8), value, requires_grad=True)
    result = loss(logits, torch.full((2, 1, 8, 8), lesion))
    result.backward()
    assert torch.isfinite(result) and torch.isfinite(logits.grad).all()
    assert result >= 0


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_perfect_prediction_has_loss_0_its_opposite_a_large_one(loss):
    target = (torch.rand(2, 1, 8, 8) > 0.5).float()
    right = 80 * (target - 0.5)
    assert loss(right, target).item() == pytest.approx(0, abs=1e-5)
    assert loss(-right, target).item() > 0.9
    assert loss(torch.full_like(target, -40), torch.zeros_like(target)).item() < 1e-5


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_bfloat16_logits_are_summed_in_float32(loss):
    """A sum of 256 x 256 probabilities in bfloat16 would stop growing at 256."""
    logits = torch.randn(2, 1, 256, 256).bfloat16().requires_grad_()
    target = torch.rand(2, 1, 256, 256) > 0.9  # bool is accepted too
    result = loss(logits, target)
    result.backward()
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(loss(logits.float(), target.float()).item(), abs=1e-6)
    assert logits.grad.dtype == torch.bfloat16 and torch.isfinite(logits.grad).all()
    assert logits.grad.abs().sum() > 0
