"""Contrast presence: one more input channel per contrast, 1 inside the brain if the contrast is present.

A missing contrast is all 0, but so are the background of a present contrast and, after z-scoring, its average brain
tissue. The presence channels distinguish them. They are 0 outside the brain, as the contrasts are, because the instance
norm after the first convolution would remove a value that is constant over a whole patch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def with_presence(image: Tensor, present: Tensor) -> Tensor:
    """Append a channel for each contrast: 1 inside the brain if the contrast is present, else 0.

    Args:
        image: shape (N, contrasts, X, Y, Z); the brain is where any contrast is not 0.
        present: 0 and 1, or bool, shape (N, contrasts), or (1, contrasts) for the whole batch.

    Returns:
        shape (N, 2 * contrasts, X, Y, Z), device and dtype of ``image``: the contrasts, then their presence.
    """
    return torch.cat([image, _brain_of(image) * present.to(image)[:, :, None, None, None]], dim=1)


def _brain_of(image: Tensor) -> Tensor:
    """Return 1 where any contrast is not 0, else 0, shape (N, 1, X, Y, Z)."""
    return (image != 0).any(dim=1, keepdim=True).to(image)


class GivenPresence(nn.Module):
    """Wraps a network with presence channels so that it takes only contrasts; every input must lack the same ones."""

    def __init__(self, network: nn.Module, present: Sequence[bool]) -> None:
        """Wrap a network of ``2 * contrasts`` input channels; ``present`` has one truth value per contrast."""
        super().__init__()
        self.network = network
        self.present = tuple(present)

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits of an image of shape (N, contrasts, X, Y, Z)."""
        brain = _brain_of(image)
        nowhere = torch.zeros_like(brain)
        # Unlike a tensor of the truth values, these channels need no upload to a GPU.
        presence = [brain if given else nowhere for given in self.present]
        logits: Tensor = self.network(torch.cat([image, *presence], dim=1))
        return logits
