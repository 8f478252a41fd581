"""The networks: input and output shapes, the rule for patch sizes, and what a config refuses."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch

import models.resenc
from models import ARCHITECTURES, PRESENCE_ARCHITECTURES, NetworkConfig, build_network, networks, patch_divisor
from models.networks import Architecture

architectures = pytest.mark.parametrize("architecture", sorted(ARCHITECTURES.keys() - {*PRESENCE_ARCHITECTURES}))
first_strides = pytest.mark.parametrize("first_stride", [1, 2])
levels = pytest.mark.parametrize("channels", [(8, 8), (8, 8, 16), (8, 8, 8, 8)], ids=len)


def config(architecture: Architecture, **settings: Any) -> NetworkConfig:
    return NetworkConfig(**{"architecture": architecture, "channels": (8, 8, 16), **settings})


def logits(network_config: NetworkConfig, sides: tuple[int, int, int], count: int = 1) -> torch.Tensor:
    network = build_network(network_config, in_channels=4, out_channels=3).eval()
    with torch.no_grad():
        return network(torch.randn(count, 4, *sides, generator=torch.Generator().manual_seed(0)))  # type: ignore[no-any-return]


@architectures
@first_strides
@levels
def test_patches_divisible_by_the_divisor_give_logits_of_the_same_shape(
    architecture: Architecture, first_stride: int, channels: tuple[int, ...]
) -> None:
    network_config = config(architecture, first_stride=first_stride, channels=channels)
    divisor = patch_divisor(network_config)
    for sides in ((2 * divisor,) * 3, (2 * divisor, 3 * divisor, 2 * divisor)):
        assert logits(network_config, sides, count=2).shape == (2, 3, *sides)


@architectures
@first_strides
def test_a_patch_that_exceeds_a_multiple_by_half_the_divisor_does_not_fit(
    architecture: Architecture, first_stride: int
) -> None:
    network_config = config(architecture, first_stride=first_stride)
    divisor = patch_divisor(network_config)
    side = 2 * divisor + divisor // 2
    with pytest.raises(RuntimeError, match="size"):
        logits(network_config, (side, 2 * divisor, 2 * divisor))


@architectures
@first_strides
def test_the_smallest_patch_can_be_trained_on(architecture: Architecture, first_stride: int) -> None:
    network_config = config(architecture, first_stride=first_stride, dropout=0.2)
    network = build_network(network_config, in_channels=4, out_channels=3).train()
    network(torch.ones(1, 4, *(2 * patch_divisor(network_config),) * 3)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


@architectures
def test_the_same_seed_gives_the_same_network(architecture: Architecture) -> None:
    with torch.random.fork_rng():
        weights = []
        for _ in range(2):
            torch.manual_seed(3)
            weights.append(build_network(config(architecture), in_channels=4, out_channels=3).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@architectures
def test_a_network_predicts_each_case_of_a_batch_independently(architecture: Architecture) -> None:
    network = build_network(config(architecture), in_channels=4, out_channels=3).eval()
    batch = torch.randn(
        2, 4, *(2 * patch_divisor(config(architecture)),) * 3, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        torch.testing.assert_close(network(batch)[:1], network(batch[:1]), rtol=1e-4, atol=1e-5)


def test_the_two_unets_differ_only_in_their_residual_units() -> None:
    plain, residual = (
        dict(build_network(config(a), in_channels=4, out_channels=3).named_parameters()) for a in ("unet", "resunet")
    )
    assert not any("residual" in name for name in plain)
    assert any("residual" in name for name in residual)


@architectures
def test_any_number_of_input_and_output_channels_is_accepted(architecture: Architecture) -> None:
    network = build_network(config(architecture), in_channels=2, out_channels=5).eval()
    side = 2 * patch_divisor(config(architecture))
    with torch.no_grad():
        assert network(torch.ones(1, 2, side, side, side)).shape == (1, 5, side, side, side)


@architectures
def test_an_untrained_network_labels_few_voxels_as_tumour(architecture: Architecture) -> None:
    assert float((logits(config(architecture), (16, 16, 16)) > 0).float().mean()) < 0.1


@architectures
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_only_dropout_makes_two_outputs_in_training_mode_differ(architecture: Architecture, dropout: float) -> None:
    network = build_network(config(architecture, dropout=dropout), in_channels=4, out_channels=3).train()
    patch = torch.randn(
        1, 4, *(2 * patch_divisor(config(architecture)),) * 3, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        assert torch.equal(network(patch), network(patch)) == (dropout == 0)


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("network.channels", {"channels": (32,)}),
        ("network.channels", {"channels": (8, 0)}),
        ("network.channels", {"channels": (8, 5000)}),
        ("network.channels", {"channels": (8,) * 9}),
        ("network.channels", {"architecture": "segresnet", "channels": (12, 24)}),
        ("network.residual_units", {"residual_units": 0}),
        ("network.residual_units", {"residual_units": 9}),
        ("network.backward_normalization", {"backward_normalization": ("auto", "")}),
        ("network.blocks", {"blocks": (1,) * 5}),
        ("network.blocks", {"architecture": "resenc", "blocks": (1, 2)}),
        ("network.blocks", {"architecture": "resenc", "blocks": (1, 2, 3, 4, 0)}),
        ("network.blocks", {"architecture": "resenc", "blocks": (1, 2, 3, 4, 33)}),
        ("network.deep_supervision", {"architecture": "resunet", "deep_supervision": True}),
        ("network.deep_supervision", {"architecture": "segresnet", "deep_supervision": True}),
        (
            "network.deep_supervision",
            {"architecture": "resenc", "deep_supervision": True, "channels": (8, 8), "first_stride": 1},
        ),
        ("network.dropout", {"dropout": 1.0}),
        ("network.dropout", {"dropout": -0.1}),
        ("network.dropout", {"dropout": float("nan")}),
    ],
)
def test_a_bad_config_is_refused_naming_the_key(key: str, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{key}: .*"):
        NetworkConfig(**bad)


def test_an_unknown_architecture_is_refused_with_the_valid_names() -> None:
    with pytest.raises(
        ValueError, match=r"network.architecture: 'vnet' is not one of unet, resunet, segresnet, resenc"
    ):
        build_network(NetworkConfig(architecture="vnet"), in_channels=4, out_channels=3)  # type: ignore[arg-type]


# The deep residual encoder


def resenc(**settings: Any) -> torch.nn.Module:
    return build_network(config("resenc", **settings), in_channels=4, out_channels=3)


def test_the_encoder_has_the_configured_blocks() -> None:
    encoder = resenc(channels=(8, 8, 16), blocks=(2, 1, 3)).get_submodule("encoder")
    assert [len(stage) for stage in encoder.children()] == [2, 1, 3]  # type: ignore[arg-type]


@pytest.mark.parametrize(("levels", "blocks"), [(2, (1, 3)), (6, (1, 3, 4, 6, 6, 6)), (8, (1, 3, 4, 6, 6, 6, 6, 6))])
def test_deeper_levels_have_more_blocks_by_default(levels: int, blocks: tuple[int, ...]) -> None:
    assert config("resenc", channels=(8,) * levels).blocks_by_level == blocks


@first_strides
def test_deep_supervision_adds_only_heads_to_the_weights(first_stride: int) -> None:
    plain, deep = (resenc(first_stride=first_stride, deep_supervision=d).state_dict() for d in (False, True))
    more = {name: tensor for name, tensor in deep.items() if name not in plain}
    assert [name for name in plain if name not in deep] == []
    assert more
    assert all(name.startswith("heads.") for name in more)


@first_strides
def test_deep_supervision_outputs_halving_resolutions_only_in_training_mode(first_stride: int) -> None:
    network = resenc(first_stride=first_stride, deep_supervision=True).train()
    side = 2 * patch_divisor(config("resenc", first_stride=first_stride))
    patch = torch.randn(1, 4, side, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answers, finest = network(patch), network.eval()(patch)
    assert [answer.shape[2:] for answer in answers] == [(side // 2**i,) * 3 for i in range(1 + first_stride)]
    # Training multiplies matrices where prediction convolves, so sums of up to 32 products round differently.
    torch.testing.assert_close(answers[0], finest, rtol=1e-4, atol=1e-5)


def test_upsampling_by_a_matrix_product_has_the_gradients_of_the_transposed_convolution() -> None:
    torch.manual_seed(0)
    up, head = models.resenc._Up(6, 5).double(), torch.nn.Conv3d(5, 3, kernel_size=1).double()
    features, weights = torch.randn(2, 6, 3, 4, 5).double().requires_grad_(), [*up.parameters(), *head.parameters()]
    for given in ((), (head,)):
        fast, slow = (up.train(mode)(features, *given) for mode in (True, False))
        seed = torch.randn_like(slow)
        takes = [features, *(weights if given else weights[:1])]
        torch.testing.assert_close(fast, slow)
        torch.testing.assert_close(
            torch.autograd.grad(fast, takes, seed), torch.autograd.grad(slow, takes, seed), rtol=1e-10, atol=1e-10
        )


def test_each_head_initially_predicts_background() -> None:
    with torch.no_grad():
        answers = resenc(deep_supervision=True).train()(torch.zeros(1, 4, 16, 16, 16))
    assert all(float((answer > 0).float().mean()) < 0.1 for answer in answers)


def test_the_heads_together_are_the_output_block() -> None:
    assert list(dict(resenc(deep_supervision=True).named_children()))[-1] == "heads"


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(networks).failed == 0
    assert doctest.testmod(models.resenc).failed == 0
