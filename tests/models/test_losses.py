"""The loss: values computed by hand, and invariants for any logits and masks."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from models import DeepLoss, RegionLoss, losses
from models.losses import coarser

properties = settings(derandomize=True, deadline=None, max_examples=40)
seeds = st.integers(0, 10_000)


def drawn(seed: int, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and masks of two patches."""
    random = torch.Generator().manual_seed(seed)
    shape = (2, 3, 4, 3, 5)
    return spread * torch.randn(shape, generator=random), (torch.rand(shape, generator=random) < 0.3).float()


def by_hand(logits: npt.NDArray[Any], masks: npt.NDArray[Any], smooth: float) -> float:
    logits, masks = logits.astype(np.float64), masks.astype(np.float64)
    p = 1 / (1 + np.exp(-logits))
    entropy = -(masks * np.log(p) + (1 - masks) * np.log(1 - p)).mean()
    dice = [
        (2 * (p[:, r] * masks[:, r]).sum() + smooth) / (p[:, r].sum() + masks[:, r].sum() + smooth)
        for r in range(p.shape[1])
    ]
    return float(entropy + 1 - np.mean(dice))


@properties
@given(seeds, st.sampled_from([1.0, 0.1, 50.0]))
def test_the_loss_equals_a_hand_computed_value(seed: int, smooth: float) -> None:
    logits, masks = drawn(seed)
    expected = by_hand(logits.numpy(), masks.numpy(), smooth)
    assert float(RegionLoss(smooth)(logits, masks)) == pytest.approx(expected, rel=1e-5)


@properties
@given(seeds)
def test_a_perfect_prediction_costs_nothing(seed: int) -> None:
    masks = drawn(seed)[1]
    assert float(RegionLoss()(100 * (2 * masks - 1), masks)) == pytest.approx(0, abs=1e-6)


@properties
@given(seeds)
def test_a_more_confident_correct_answer_has_a_lower_loss(seed: int) -> None:
    masks = drawn(seed)[1]
    values = [float(RegionLoss()(sureness * (2 * masks - 1), masks)) for sureness in (-5, -1, 0, 1, 5)]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == len(values)


@properties
@given(seeds)
def test_one_wrong_voxel_costs_more_than_none(seed: int) -> None:
    masks = drawn(seed)[1]
    logits = 4 * (2 * masks - 1)
    worse = logits.clone()
    worse[1, 2, 0, 0, 0] *= -1
    assert RegionLoss()(worse, masks) > RegionLoss()(logits, masks)


def test_every_region_counts_equally_regardless_of_its_size() -> None:
    masks = torch.zeros(1, 3, 4, 4, 4)
    masks[:, 0], masks[:, 1, :2], masks[:, 2, 0, 0, 0] = 1, 1, 1
    right = 100 * (2 * masks - 1)
    losses_of_missed = []
    for region in range(3):
        logits = right.clone()
        logits[:, region] = -100
        losses_of_missed.append(float(RegionLoss(1e-6)(logits, masks) - bce(logits, masks)))
    assert losses_of_missed == pytest.approx([1 / 3] * 3, abs=1e-4)


def test_dice_is_taken_over_the_whole_batch() -> None:
    logits, masks = drawn(5)
    side_by_side = [torch.cat([tensor[:1], tensor[1:]], dim=2) for tensor in (logits, masks)]
    assert float(RegionLoss()(logits, masks)) == pytest.approx(float(RegionLoss()(*side_by_side)), rel=1e-5)


@pytest.mark.parametrize("masks", [torch.zeros(1, 3, 2, 2, 2), torch.ones(1, 3, 2, 2, 2)], ids=["empty", "full"])
@pytest.mark.parametrize("logit", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_loss_and_gradient_are_finite_for_empty_masks_and_extreme_logits(masks: torch.Tensor, logit: float) -> None:
    logits = torch.full(masks.shape, logit, requires_grad=True)
    loss = RegionLoss()(logits, masks)
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_an_empty_prediction_of_an_empty_mask_costs_nothing() -> None:
    masks = torch.zeros(1, 3, 2, 2, 2)
    assert float(RegionLoss()(masks - 100, masks)) == pytest.approx(0, abs=1e-6)


def test_a_confident_wrong_answer_still_has_a_gradient() -> None:
    logits = torch.full((1, 3, 2, 2, 2), -200.0, requires_grad=True)
    RegionLoss()(logits, torch.ones(1, 3, 2, 2, 2)).backward()
    assert logits.grad is not None
    assert (logits.grad < 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits, masks = (tensor.to(dtype) for tensor in drawn(1))
    loss = RegionLoss()(logits, masks)
    assert loss.dtype is torch.float32
    assert torch.equal(loss, RegionLoss()(logits.float(), masks.float()))


def test_sums_beyond_the_half_precision_range_do_not_overflow() -> None:
    logits = torch.full((1, 3, 48, 48, 48), 5.0, dtype=torch.float16)
    assert float(RegionLoss()(logits, torch.ones_like(logits))) == pytest.approx(0.01, abs=0.01)


def test_boolean_masks_are_accepted() -> None:
    logits, masks = drawn(2)
    assert torch.equal(RegionLoss()(logits, masks.bool()), RegionLoss()(logits, masks))


# Several resolutions


def pyramid(seed: int, levels: int = 3) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits of one patch, each half as fine as the one before, and masks of the finest."""
    random = torch.Generator().manual_seed(seed)
    sides = [(1, 3, 8 >> i, 16 >> i, 8 >> i) for i in range(levels)]
    return [torch.randn(s, generator=random) for s in sides], (torch.rand(sides[0], generator=random) < 0.3).float()


def test_with_one_resolution_the_loss_is_the_plain_loss() -> None:
    logits, masks = drawn(1)
    assert torch.equal(DeepLoss(RegionLoss())(logits, masks), RegionLoss()(logits, masks))
    assert torch.equal(DeepLoss(RegionLoss())([logits], masks), RegionLoss()(logits, masks))


@properties
@given(seeds)
def test_weights_halve_with_each_resolution_and_sum_to_1(seed: int) -> None:
    logits, masks = pyramid(seed)
    one, two, three = (float(RegionLoss()(each, coarser(masks, each.shape[2:]))) for each in logits)
    assert float(DeepLoss(RegionLoss())(logits, masks)) == pytest.approx((4 * one + 2 * two + three) / 7, rel=1e-5)


@properties
@given(seeds)
def test_coarser_masks_are_binary_and_nested_like_the_finer_ones(seed: int) -> None:
    inner, more = pyramid(seed)[1], pyramid(seed + 1)[1]
    small, large = coarser(inner, (4, 8, 4)), coarser(torch.maximum(inner, more), (4, 8, 4))
    assert set(small.unique().tolist()) <= {0.0, 1.0}
    assert (small <= large).all()


def test_coarser_masks_have_the_requested_shape_and_a_block_keeps_its_position() -> None:
    masks = torch.zeros(1, 1, 8, 8, 8)
    masks[..., 4:, :4, :4] = 1
    found = coarser(masks, (2, 2, 2))
    assert found.shape == (1, 1, 2, 2, 2)
    assert found.flatten().nonzero().tolist() == [[4]]


def test_every_resolution_gets_a_gradient() -> None:
    logits, masks = pyramid(0)
    for each in logits:
        each.requires_grad_(True)
    DeepLoss(RegionLoss())(logits, masks).backward()
    assert all(each.grad is not None and bool(each.grad.abs().sum() > 0) for each in logits)


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(losses).failed == 0


def test_processes_that_share_a_batch_have_the_loss_of_the_combined_batch() -> None:
    logits, masks = drawn(5)
    whole = logits.clone().requires_grad_()
    RegionLoss()(whole, masks).backward()
    halves = [logits[:1].clone().requires_grad_(), logits[1:].clone().requires_grad_()]
    sums: list[torch.Tensor] = []
    for half, mask in zip(halves, masks.split(1), strict=True):
        RegionLoss(total=lambda values: (sums.append(values), values)[1])(half, mask)
    both: Any = sum(sums)
    losses_of = [
        RegionLoss(total=lambda values: both)(half, mask) for half, mask in zip(halves, masks.split(1), strict=True)
    ]
    torch.stack(losses_of).mean().backward()
    found = [half.grad for half in halves if half.grad is not None]
    assert whole.grad is not None
    assert torch.allclose(torch.cat(found), whole.grad, atol=1e-7)


def test_float64_inputs_give_a_float64_loss() -> None:
    logits, masks = drawn(3)
    loss = RegionLoss()(logits.double(), masks.double())
    assert loss.dtype is torch.float64
    assert float(loss) == pytest.approx(by_hand(logits.numpy(), masks.numpy(), 1.0), rel=1e-12)
