"""Backward gradient normalization: the identity forward, a gradient of fixed size backward, in any kind of training."""

from __future__ import annotations

import copy
import doctest
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import znorm
from models import ARCHITECTURES, PRESENCE_ARCHITECTURES, NetworkConfig, build_network
from models.networks import Architecture
from znorm import attach_backward_norm, backward, backward_norm, find_places
from znorm.backward import rescale_gradient

properties = settings(derandomize=True, deadline=None, max_examples=60)
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple)
seeds = st.integers(0, 10_000)
architectures = pytest.mark.parametrize("architecture", sorted(ARCHITECTURES.keys() - {*PRESENCE_ARCHITECTURES}))


def backward_norm_reference(gradient: Tensor, factor: float = 1.0) -> Tensor:
    """Rescale the gradient of an activation, sample by sample: (factor / N) * sqrt(n) * g / ||g|| for n values.

    Args:
        gradient: shape (N, ...).
        factor: what the loss was multiplied by.

    Returns:
        float64 tensor of the same shape; zeros for a sample whose gradient is zero everywhere.

    Source: Cabana and Lago-Fernandez, arXiv 2106.09475; the division by N is ours.
    """
    samples = []
    for sample in gradient.to(torch.float64):
        norm = sum(value**2 for value in sample.reshape(-1).tolist()) ** 0.5
        length = factor / len(gradient) * sample.numel() ** 0.5
        samples.append(length * sample / norm if norm > 0 else torch.zeros_like(sample))
    return torch.stack(samples)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layers(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Convolutions, each followed by an in-place activation."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = [(2, 6), (6, 6), (6, 6)]
        pairs = [(nn.Conv2d(a, b, 3, padding=1), nn.ReLU(inplace=True)) for a, b in sizes]
        return nn.Sequential(*[module for pair in pairs for module in pair], nn.Conv2d(6, 1, 1)).to(dtype)


def network(architecture: Architecture = "resunet", **kind: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = NetworkConfig(architecture=architecture, channels=(8, 16), **kind)
        return build_network(config, in_channels=4, out_channels=3)


def loss_of(logits: Tensor) -> Tensor:
    """Mean over the batch of a loss of each sample."""
    return logits.square().flatten(1).mean(dim=1).mean()


def gradients(model: nn.Module, images: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    model.zero_grad()
    loss_of((forward or model)(images)).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


# The rule


@properties
@given(shapes, st.integers(-30, 30), st.floats(0.01, 100), seeds)
def test_the_fast_rule_equals_the_slow_reference(
    shape: tuple[int, ...], exponent: int, factor: float, seed: int
) -> None:
    gradient = normal(*shape, seed=seed) * 10.0**exponent
    expected = backward_norm_reference(gradient, factor)
    torch.testing.assert_close(rescale_gradient(gradient, factor), expected, rtol=1e-12, atol=1e-12)


@properties
@given(st.integers(1, 4), st.integers(1, 50), st.sampled_from([1e-30, 1.0, 1e30]), seeds)
def test_each_sample_gets_the_same_norm_regardless_of_its_original_norm(
    samples: int, values: int, scale: float, seed: int
) -> None:
    gradient = normal(samples, values, seed=seed, dtype=torch.float32) * scale
    norms = rescale_gradient(gradient, 0.5).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((samples,), 0.5 * math.sqrt(values) / samples))


def test_the_direction_of_each_sample_is_kept() -> None:
    gradient = normal(3, 4, 5)
    result = rescale_gradient(gradient)
    cosines = torch.cosine_similarity(result.flatten(1), gradient.flatten(1))
    torch.testing.assert_close(cosines, torch.ones_like(cosines))


def test_batch_scope_keeps_the_relative_norms_of_the_samples() -> None:
    gradient = normal(3, 4, 5)
    result = rescale_gradient(gradient, share="batch")
    torch.testing.assert_close(result / result.norm(), gradient / gradient.norm())
    assert float(result.square().mean().sqrt()) == pytest.approx(1 / 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_vanishes(dtype: torch.dtype) -> None:
    for scale in (1e-6, 1.0, 6e4):
        gradient = (scale * torch.linspace(0.1, 1, 4000)).to(dtype).reshape(2, -1)
        result = rescale_gradient(gradient)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), backward_norm_reference(gradient), rtol=0.01, atol=0.01)


def test_a_gradient_of_zero_stays_zero() -> None:
    gradient = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert rescale_gradient(gradient)[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_non_finite_value_is_not_hidden(bad: float) -> None:
    assert bool(torch.isnan(rescale_gradient(torch.tensor([[bad, 1.0], [1.0, 1.0]]))).any())


def test_a_scalar_or_empty_gradient_is_allowed() -> None:
    assert float(rescale_gradient(torch.tensor(-7.0))) == -1.0
    assert rescale_gradient(torch.zeros(0, 3)).shape == (0, 3)


# In a network


@architectures
def test_the_forward_pass_is_bit_for_bit_the_same(architecture: Architecture) -> None:
    model, images = network(architecture), normal(2, 4, 8, 8, 8, dtype=torch.float32)
    plain = model(images)
    names = set(model.state_dict())
    assert attach_backward_norm(model).places
    assert torch.equal(model(images), plain)
    assert set(model.state_dict()) == names


@architectures
def test_every_place_returns_a_gradient_of_the_intended_size(architecture: Architecture) -> None:
    model, images = network(architecture), normal(2, 4, 8, 8, 8, dtype=torch.float32)
    handle = attach_backward_norm(model)
    seen: dict[str, float] = {}

    def watch(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            output.register_hook(lambda gradient: seen.update({name: float(gradient.square().mean().sqrt())}))

        module.register_forward_hook(hook, prepend=True)

    for name in handle.places:
        watch(name, model.get_submodule(name))
    loss_of(model(images)).backward()
    assert set(seen) == set(handle.places)
    assert list(seen.values()) == pytest.approx([0.5] * len(seen), rel=1e-4)


def test_gradients_in_front_of_a_place_do_not_depend_on_the_scale_of_the_loss() -> None:
    model, images = layers(), normal(4, 2, 8, 8)
    attach_backward_norm(model)
    small, large = gradients(model, images), gradients(model, images, lambda x: 1000 * model(x))
    torch.testing.assert_close(large[:-2], small[:-2])
    torch.testing.assert_close(large[-2:], [1e6 * gradient for gradient in small[-2:]])


def test_a_deep_network_without_norm_layers_keeps_the_size_of_its_gradients() -> None:
    def first_and_last(*, normalised: bool) -> float:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(60)], nn.Linear(32, 1))
        if normalised:
            attach_backward_norm(model)
        found = gradients(model.double(), normal(8, 32))
        return float(found[0].norm() / found[-4].norm())

    assert first_and_last(normalised=False) < 1e-9
    assert 0.01 < first_and_last(normalised=True) < 100


def test_nothing_happens_in_evaluation_mode_or_without_gradients() -> None:
    model, images = layers(), normal(4, 2, 8, 8)
    plain = gradients(model.eval(), images)
    handle = attach_backward_norm(model)
    torch.testing.assert_close(gradients(model, images), plain, rtol=0, atol=0)
    with torch.no_grad():
        assert model.train()(images).grad_fn is None
    handle.remove()
    handle.remove()
    torch.testing.assert_close(gradients(model, images), plain, rtol=0, atol=0)


def test_an_in_place_activation_may_follow_a_place() -> None:
    model = layers()
    attach_backward_norm(model, ["0"])
    assert gradients(model, normal(4, 2, 8, 8))


def test_each_output_in_a_list_is_normalised_separately() -> None:
    model = network("resenc", deep_supervision=True)
    before = [logits.detach() for logits in model(normal(1, 4, 8, 8, 8, dtype=torch.float32))]
    attach_backward_norm(model, ["*"])
    after = model(normal(1, 4, 8, 8, 8, dtype=torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    sum(logits.sum() for logits in after).backward()


def test_a_copied_model_keeps_the_places() -> None:
    model, images = layers(), normal(4, 2, 8, 8)
    attach_backward_norm(model)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(gradients(twin, images), gradients(model, images), rtol=0, atol=0)


# Places


@pytest.mark.parametrize(
    ("architecture", "places"),
    [
        ("unet", ("model.1",)),
        ("resunet", ("model.0", "model.1", "model.1.submodule")),
        ("segresnet", ("down_layers.0.1", "down_layers.1.1", "up_layers.0", "up_layers.0.0")),
        ("resenc", ("stem.adn.A", "encoder.0.0.lrelu", "encoder.1.0.lrelu", "decoder.0.adn.A")),
    ],
)
def test_places_are_chosen_automatically(architecture: Architecture, places: tuple[str, ...]) -> None:
    found = find_places(network(architecture))
    assert set(places) <= set(found), found


@architectures
def test_the_output_block_has_no_place(architecture: Architecture) -> None:
    model = network(architecture)
    block = znorm.select(model).output_block
    assert not [name for name in find_places(model) if name == block or name.startswith(f"{block}.")]


def test_places_can_be_named_by_patterns() -> None:
    assert attach_backward_norm(layers(), ["[02]", "5"]).places == ("0", "2", "5")
    assert attach_backward_norm(layers(), ["auto", "0"]).places == ("0", "1", "3", "5")


def test_a_pattern_that_matches_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match="the model has no module named 'block'; its first level has 0, 1"):
        attach_backward_norm(layers(), ["1", "block"])


def test_a_model_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="the model has no residual unit, skip or activation"):
        attach_backward_norm(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


# In training


def test_gradients_have_the_right_size_under_autocast() -> None:
    model, images = layers(torch.float32), normal(4, 2, 8, 8, dtype=torch.float32)
    attach_backward_norm(model)
    full = gradients(model, images)

    def autocast(inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = model(inputs).float()
            return logits

    for found, expected in zip(gradients(model, images, autocast), full, strict=True):
        assert float((found - expected).norm()) < 0.1 * float(expected.norm())


def test_a_scaled_loss_gives_the_same_gradients_once_they_are_unscaled() -> None:
    model, images = layers(), normal(4, 2, 8, 8)
    handle = attach_backward_norm(model)
    plain = gradients(model, images)
    handle.factor = 1024.0
    model.zero_grad()
    (1024 * loss_of(model(images))).backward()
    unscaled = [parameter.grad / 1024 for parameter in model.parameters() if parameter.grad is not None]
    torch.testing.assert_close(unscaled, plain)


def test_micro_batches_add_up_to_the_combined_batch() -> None:
    model, images = layers(), normal(4, 2, 8, 8)
    handle = attach_backward_norm(model)
    joined = gradients(model, images)
    model.zero_grad()
    handle.factor = 1 / 2
    for half in images.split(2):
        (loss_of(model(half)) / 2).backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], joined)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch compiles by doing so
def test_a_compiled_model_has_the_same_gradients_as_an_eager_one() -> None:
    model, images = layers(), normal(4, 2, 8, 8)
    attach_backward_norm(model)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(model, images, compiled), gradients(model, images))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_have_the_same_gradients_as_plain_ones(reentrant: bool) -> None:
    model, images = layers(), normal(4, 2, 8, 8)
    attach_backward_norm(model)
    plain = gradients(model, images)

    def checkpointed(inputs: Tensor) -> Tensor:
        x = model[:2](inputs)
        x = checkpoint(model[2:4], x, use_reentrant=reentrant)
        logits: Tensor = model[6](checkpoint(model[4:6], x, use_reentrant=reentrant))
        return logits

    torch.testing.assert_close(gradients(model, images, checkpointed), plain)


TWO_PROCESSES = """
import sys
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
import znorm

rank, rendezvous, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)


def train():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.GELU(), nn.Conv2d(6, 6, 3), nn.GELU(), nn.Conv2d(6, 1, 1)).double()
    znorm.attach_backward_norm(model)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-3, momentum=0.9)
    for batch in torch.randn((5, 4, 2, 8, 8), dtype=torch.float64, generator=torch.Generator().manual_seed(1)):
        wrapped(batch[2 * rank : 2 * rank + 2]).square().mean(dim=(1, 2, 3)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        torch.save(model.state_dict(), out)


train()  # Its network, which holds the process group, is gone before the group: gloo's threads end before Python.
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_match_one_with_the_combined_batch(tmp_path: Path) -> None:
    words = [sys.executable, "-c", TWO_PROCESSES]
    started = [subprocess.Popen([*words, str(rank), tmp_path / "meet", tmp_path / "weights.pt"]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.GELU(), nn.Conv2d(6, 6, 3), nn.GELU(), nn.Conv2d(6, 1, 1)).double()
    attach_backward_norm(model)
    optimizer = SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for batch in torch.randn((5, 4, 2, 8, 8), dtype=torch.float64, generator=torch.Generator().manual_seed(1)):
        loss_of(model(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(torch.load(tmp_path / "weights.pt"), model.state_dict(), rtol=0, atol=1e-9)


def test_backward_normalization_works_together_with_znorm() -> None:
    model, images = layers(), normal(4, 2, 8, 8)
    attach_backward_norm(model)
    optimizer = SGD(model.parameters(), lr=1.0)
    znorm.attach(optimizer, model)
    weight = dict(model.named_parameters())["2.weight"]
    before = weight.detach().clone()
    loss_of(model(images)).backward()
    optimizer.step()
    step = before - weight.detach()
    assert float(step.mean()) == pytest.approx(0, abs=1e-9)
    assert float(step.std(correction=0)) == pytest.approx(1, rel=1e-4)


def test_a_step_with_a_non_finite_gradient_is_skipped() -> None:
    model, images = layers(), normal(4, 2, 8, 8)
    attach_backward_norm(model)
    optimizer = SGD(model.parameters(), lr=1.0)
    handle = znorm.attach(optimizer, model)
    (math.inf * loss_of(model(images))).backward()
    optimizer.step()
    assert handle.skipped_steps == 1


def test_the_overlap_at_a_place_is_measured_on_one_side_only() -> None:
    model = network("resunet", residual_units=1)
    attach_backward_norm(model)
    with znorm.watch_overlap(model) as watch:
        loss_of(model(normal(2, 4, 8, 8, 8, dtype=torch.float32))).backward()
    measured = watch.read()["model.1"]
    # The skip's half of the concatenated output: 8 of 16 channels of 2 x 4^3 values, each about 1/2 in size.
    assert measured.norm_skip < 0.5 * math.sqrt(2 * 16 * 4**3)
    assert measured.norm_skip > 0.05 * math.sqrt(2 * 16 * 4**3)


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(backward).failed == 0


def test_the_function_normalises_a_single_activation() -> None:
    x = normal(3, 7).requires_grad_()
    (5 * backward_norm(x, factor=2.0)).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.norm(dim=1), torch.full((3,), 2 * math.sqrt(7) / 3, dtype=torch.float64))
