"""Presence channels: 1 in the brain, appended after the contrasts, with the image's dtype."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from models import GivenPresence, NetworkConfig, build_network, with_presence

IMAGE = torch.arange(2 * 4 * 24, dtype=torch.float32).reshape(2, 4, 2, 3, 4)
PRESENT = torch.tensor([[True, False, True, True], [False, False, False, True]])


def test_the_contrasts_come_first_and_are_unchanged() -> None:
    assert torch.equal(with_presence(IMAGE, PRESENT)[:, :4], IMAGE)


def test_the_presence_of_each_contrast_is_encoded_only_inside_the_brain() -> None:
    image = IMAGE.clone()
    image[:, :, :, 0] = 0
    image[:, 1:, :, 1] = 0  # one contrast is enough to be brain
    channels = with_presence(image, PRESENT)[:, 4:]
    assert channels.shape == IMAGE.shape
    assert not channels[:, :, :, 0].any()
    assert torch.equal(channels[:, :, :, 1:].amin((2, 3, 4)), PRESENT.float())
    assert torch.equal(channels[:, :, :, 1:].amax((2, 3, 4)), PRESENT.float())


@pytest.mark.parametrize("architecture", ["unet", "resunet", "segresnet"])
def test_the_norm_after_the_first_convolution_does_not_wipe_it_out(architecture: Literal["unet", "resunet"]) -> None:
    torch.manual_seed(0)
    network = build_network(NetworkConfig(architecture=architecture, channels=(8, 16)), in_channels=8, out_channels=3)
    image = torch.randn(1, 4, 32, 32, 32)
    image[..., :12], image[:, 3] = 0, 0
    some, all_there = (GivenPresence(network.eval(), (True, True, True, last))(image) for last in (False, True))
    inner = (slice(None), slice(None), slice(8, 24), slice(8, 24), slice(16, 24))  # far from the padding of the patch
    assert float((some - all_there)[inner].detach().abs().mean()) > 0.02 * float(all_there[inner].detach().std())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_output_has_the_dtype_of_the_image(dtype: torch.dtype) -> None:
    assert with_presence(IMAGE.to(dtype), PRESENT).dtype == dtype


def test_adding_presence_inside_the_network_equals_passing_the_channels() -> None:
    torch.manual_seed(0)
    network = build_network(NetworkConfig(channels=(4, 8)), in_channels=8, out_channels=3).eval()
    image, present = torch.randn(2, 4, 8, 8, 8), (True, True, True, False)
    expected = network(with_presence(image, torch.tensor([present, present])))
    assert torch.equal(GivenPresence(network, present)(image), expected)
    assert not torch.equal(GivenPresence(network, (True, False, True, True))(image), expected)


def test_training_and_evaluation_mode_are_passed_through() -> None:
    network = nn.Dropout()
    GivenPresence(network, [True]).eval()
    assert not network.training
