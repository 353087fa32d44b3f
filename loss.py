"""Losses on logits (N, K, H, W) against masks of the same shape, 0 or 1.

Each is computed in float32, whatever the network's precision, and is finite for empty masks. Each
is a function of sums over the batch; if ranks share the batch, `total` adds those up
(`distributed.all_reduce_sum`), and every rank gets the loss of the whole batch.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Total = Callable[[Tensor], Tensor]
alone = torch.nn.Identity()  # the `total` of a single process


def dice_loss(logits: Tensor, target: Tensor, smooth: float = 1.0, total: Total = alone) -> Tensor:
    """Compute 1 - soft Dice of the whole batch, averaged over output channels.

    Milletari, Navab and Ahmadi 2016 (https://arxiv.org/abs/1606.04797), without the squares and
    with a `smooth` voxel in both terms: an empty batch predicted empty has loss 0.
    """
    probabilities, target = torch.sigmoid(logits.float()), target.float()
    overlap = (probabilities * target).sum(dim=(0, 2, 3))  # (K,)
    size = probabilities.sum(dim=(0, 2, 3)) + target.sum(dim=(0, 2, 3))
    overlap, size = total(torch.stack((overlap, size)))
    return (1 - (2 * overlap + smooth) / (size + smooth)).mean()


def bce_dice_loss(logits: Tensor, target: Tensor, total: Total = alone) -> Tensor:
    """Add binary cross-entropy, for even gradients early on, to the Dice loss, the score itself."""
    entropy = F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="sum")
    entropy, pixels = total(torch.stack((entropy, torch.full_like(entropy, target.numel()))))
    return entropy / pixels + dice_loss(logits, target, total=total)


def tversky_loss(
    logits: Tensor,
    target: Tensor,
    alpha: float = 0.3,
    beta: float = 0.7,
    gamma: float = 1.0,
    total: Total = alone,
) -> Tensor:
    """Average (1 - soft Tversky index) ** (1 / gamma) of the whole batch over output channels.

    Salehi, Erdogmus and Gholipour 2017 (https://arxiv.org/abs/1706.05721): `alpha` weighs false
    positives, `beta` false negatives: the defaults trade precision for recall. With both at 0.5 it
    is the Dice loss with two smooth voxels. A `gamma` above 1 makes it focal, steeper near the
    goal: Abraham and Khan 2018 (https://arxiv.org/abs/1810.07842), whose code has the exponent
    0.75, that is gamma = 4/3. Others call the exponent itself gamma and swap `alpha` and `beta`.
    """
    probabilities, target = torch.sigmoid(logits.float()), target.float()
    overlap = (probabilities * target).sum(dim=(0, 2, 3))  # (K,)
    false_positives = (probabilities * (1 - target)).sum(dim=(0, 2, 3))
    false_negatives = ((1 - probabilities) * target).sum(dim=(0, 2, 3))
    sums = torch.stack((overlap, false_positives, false_negatives))
    overlap, false_positives, false_negatives = total(sums)
    errors = alpha * false_positives + beta * false_negatives
    distance = errors / (overlap + errors + 1)  # 1 - index, as one fraction never below 0
    # A power below 1 has an infinite slope at 0, and infinity times the 0 of a saturated sigmoid
    # is NaN; below 1e-6, a straight line from 0 replaces the curve.
    return (distance * distance.clamp(min=1e-6) ** (1 / gamma - 1)).mean()


LOSSES = {
    "dice": dice_loss,
    "bce-dice": bce_dice_loss,
    "tversky": tversky_loss,
    "focal-tversky": partial(tversky_loss, gamma=4 / 3),
}
