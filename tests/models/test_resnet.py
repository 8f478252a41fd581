"""ResNets for presence: three sizes, 3D and slabs, no batch statistics, the head last."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import NetworkConfig, PresenceLoss, build_network
from znorm.select import find_output_block

SMALL = (4, 4, 4, 4)


@pytest.mark.parametrize("architecture", ["resnet10", "resnet18", "resnet50"])
def test_every_resnet_gives_one_logit_per_output(architecture: str) -> None:
    network = build_network(NetworkConfig(architecture=architecture, channels=SMALL), in_channels=4, out_channels=2)  # type: ignore[arg-type]
    assert network(torch.zeros(2, 4, 32, 32, 32)).shape == (2, 2)


def test_the_slices_of_a_slab_are_input_channels_of_2d_convolutions() -> None:
    config = NetworkConfig(architecture="resnet10", channels=SMALL, slices=3)
    network = build_network(config, in_channels=4, out_channels=1)
    assert network(torch.zeros(2, 4, 32, 32, 3)).shape == (2, 1)
    assert not any(isinstance(module, nn.Conv3d) for module in network.modules())


def test_no_norm_depends_on_the_rest_of_the_batch() -> None:
    network = build_network(NetworkConfig(architecture="resnet10", channels=SMALL), in_channels=4, out_channels=1)
    images = torch.randn(2, 4, 24, 24, 24)
    together = network(images)
    assert torch.allclose(together[:1], network(images[:1]), rtol=1e-3, atol=1e-4)


def test_the_head_is_the_output_block_that_znorm_leaves_out() -> None:
    network = build_network(NetworkConfig(architecture="resnet10", channels=SMALL), in_channels=4, out_channels=1)
    assert find_output_block(network) == "head"


def test_loss_weights_balance_rare_and_frequent_cases() -> None:
    loss, logits = PresenceLoss([0.5], [2.0]), torch.zeros(1, 1)
    rare, frequent = loss(logits, torch.ones(1, 1)), loss(logits, torch.zeros(1, 1))
    assert float(rare / frequent) == pytest.approx(4)
