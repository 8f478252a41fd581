"""Telling a network which of its contrasts are there: one channel more for each, 1 in the brain where it is there.

A missing contrast is all 0, and so is the background of one that is there, and so is its average brain (z-scored). The
channels tell these apart. They are 0 outside the brain, as the contrasts are: what is constant over a whole patch, the
instance norm after the first convolution takes away again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def with_presence(image: Tensor, present: Tensor) -> Tensor:
    """Append a channel for each contrast: 1 in the brain where the contrast is there, else 0.

    Args:
        image: shape (N, contrasts, X, Y, Z); the brain is where any contrast is not 0.
        present: 0 and 1, or bool, shape (N, contrasts), or (1, contrasts) for all alike.

    Returns:
        shape (N, 2 * contrasts, X, Y, Z), device and type as of ``image``: the contrasts, then their presence.
    """
    brain = (image != 0).any(dim=1, keepdim=True).to(image)
    return torch.cat([image, brain * present.to(image)[:, :, None, None, None]], dim=1)


class GivenPresence(nn.Module):
    """A network of ``2 * contrasts`` input channels as one of ``contrasts``, for input of which all lacks the same."""

    def __init__(self, network: nn.Module, present: Sequence[bool]) -> None:
        """Take the network as it is; ``present`` has one truth value a contrast."""
        super().__init__()
        self.network = network
        self.present = tuple(present)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of an image of shape (N, contrasts, X, Y, Z)."""
        present = torch.tensor([self.present], device=image.device)
        logits: Tensor = self.network(with_presence(image, present))
        return logits
