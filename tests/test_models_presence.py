"""Presence channels: constant, after the contrasts, of the image's own type."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import GivenPresence, NetworkConfig, build_network, with_presence

IMAGE = torch.arange(2 * 4 * 24, dtype=torch.float32).reshape(2, 4, 2, 3, 4)
PRESENT = torch.tensor([[True, False, True, True], [False, False, False, True]])


def test_the_contrasts_come_first_unchanged() -> None:
    assert torch.equal(with_presence(IMAGE, PRESENT)[:, :4], IMAGE)


def test_the_presence_of_each_contrast_is_constant_over_the_patch() -> None:
    channels = with_presence(IMAGE, PRESENT)[:, 4:]
    assert channels.shape == IMAGE.shape
    assert torch.equal(channels.amin((2, 3, 4)), PRESENT.float())
    assert torch.equal(channels.amax((2, 3, 4)), PRESENT.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_type_is_that_of_the_image(dtype: torch.dtype) -> None:
    assert with_presence(IMAGE.to(dtype), PRESENT).dtype == dtype


def test_a_network_given_its_presence_is_the_network_with_the_channels() -> None:
    torch.manual_seed(0)
    network = build_network(NetworkConfig(channels=(4, 8)), in_channels=8, out_channels=3).eval()
    image, present = torch.randn(2, 4, 8, 8, 8), (True, True, True, False)
    expected = network(with_presence(image, torch.tensor([present, present])))
    assert torch.equal(GivenPresence(network, present)(image), expected)
    assert not torch.equal(GivenPresence(network, (True, False, True, True))(image), expected)


def test_modes_pass_through() -> None:
    network = nn.Dropout()
    GivenPresence(network, [True]).eval()
    assert not network.training
