"""Losses on logits (N, K, H, W) against masks of the same shape, 0 or 1.

Each is computed in float32 whatever the network's precision, and is finite for empty masks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dice_loss(logits: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """One minus the soft Dice coefficient of the whole batch, averaged over output channels.

    Milletari, Navab and Ahmadi 2016 (https://arxiv.org/abs/1606.04797), without the squares and
    with a `smooth` voxel in both terms, so that an empty batch predicted empty has loss 0.
    """
    probabilities, target = torch.sigmoid(logits.float()), target.float()
    overlap = (probabilities * target).sum(dim=(0, 2, 3))  # (K,)
    size = probabilities.sum(dim=(0, 2, 3)) + target.sum(dim=(0, 2, 3))
    return (1 - (2 * overlap + smooth) / (size + smooth)).mean()


def bce_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy plus Dice loss: even gradients early on, the score itself later."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits.float(), target.float())
    return cross_entropy + dice_loss(logits, target)


LOSSES = {"dice": dice_loss, "bce-dice": bce_dice_loss}
