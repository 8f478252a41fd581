"""The sliding window: every voxel is covered, windows that agree give their answer, and MONAI gives the same."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.utils import compute_importance_map
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from app.inference.sliding_window.grid import Padding, place_windows, window_places, window_starts
from app.inference.sliding_window.torch_blend import gaussian_weights, sliding_logits, window_logits
from app.system.device import Runtime, RuntimeConfig, choose_runtime

SIZES = st.integers(1, 120)
SIDES = st.integers(1, 64)
OVERLAPS = st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.625, 0.75, 0.9])


class FirstThree(nn.Module):
    """Answers each voxel with its first three contrasts; remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, batch: Tensor) -> Tensor:
        self.seen.append(batch)
        return batch[:, :3]


def cpu() -> Runtime:
    return choose_runtime(RuntimeConfig(device="cpu", precision="float32"))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def logits_of(network: nn.Module, image: Tensor, *, side: int = 16, overlap: float = 0.5) -> Tensor:
    return sliding_logits(network, image.numpy(), window=(side, side, side), overlap=overlap, runtime=cpu())


@given(SIZES, SIDES, OVERLAPS)
@settings(max_examples=300, derandomize=True, deadline=None)
def test_windows_cover_an_axis_from_border_to_border(size: int, side: int, overlap: float) -> None:
    starts = window_starts(size, side, overlap)
    assert starts[0] == 0
    assert starts[-1] + side == max(size, side)
    assert all(0 < after - before <= side for before, after in itertools.pairwise(starts))


@given(SIZES, SIDES, OVERLAPS)
@settings(max_examples=300, derandomize=True, deadline=None)
def test_neighbours_overlap_by_the_requested_fraction_in_whole_voxels(size: int, side: int, overlap: float) -> None:
    starts = window_starts(size, side, overlap)
    # A share that is no whole number of voxels is rounded down, and windows one voxel apart cannot move closer.
    wanted = min(math.floor(side * overlap + 1e-9), side - 1)
    assert all(side - (after - before) >= wanted for before, after in itertools.pairwise(starts))


@given(SIZES, SIDES, OVERLAPS)
@settings(max_examples=300, derandomize=True, deadline=None)
def test_no_more_windows_than_necessary_are_used(size: int, side: int, overlap: float) -> None:
    needed = 1 + math.ceil(max(0, size - side) / max(1, side * (1 - overlap)) - 1e-9)
    assert needed <= len(window_starts(size, side, overlap)) <= needed + 1


@given(st.tuples(SIZES, SIZES, SIZES), st.tuples(SIDES, SIDES, SIDES))
@settings(max_examples=30, derandomize=True, deadline=None)
def test_windows_cover_every_voxel_and_stay_inside(shape: tuple[int, int, int], window: tuple[int, int, int]) -> None:
    x, y, z = (max(size, side) for size, side in zip(shape, window, strict=True))
    covered = torch.zeros(x, y, z, dtype=torch.bool)
    for place in window_places((x, y, z), window, 0.0):
        assert covered[place].shape == window
        covered[place] = True
    assert covered.all()


def test_weights_are_symmetric_positive_and_largest_in_the_middle() -> None:
    weights = gaussian_weights((8, 9, 16))
    assert weights.shape == (8, 9, 16)
    assert weights.max() == weights[4, 4, 8] == 1
    assert weights.min() >= 1e-3
    torch.testing.assert_close(weights, weights.flip(0, 1, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 33, 17), (16, 16, 16), (50, 16, 5)])
def test_an_identity_network_returns_the_volume(shape: tuple[int, int, int]) -> None:
    image = noise(4, *shape)
    torch.testing.assert_close(logits_of(FirstThree(), image), image[:3], rtol=0, atol=1e-5)


@given(st.tuples(*[st.integers(1, 24)] * 3), st.sampled_from([8, 12, 16]), OVERLAPS.filter(lambda x: x <= 0.5))
@settings(max_examples=25, derandomize=True, deadline=None)
def test_the_result_has_the_shape_of_the_volume_for_any_sizes(
    shape: tuple[int, int, int], side: int, overlap: float
) -> None:
    image = noise(4, *shape)
    answer = logits_of(FirstThree(), image, side=side, overlap=overlap)
    torch.testing.assert_close(answer, image[:3], rtol=0, atol=1e-5)


def convolution(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv3d(4, 3, width, padding="same").eval().requires_grad_(requires_grad=False)


@pytest.mark.parametrize("width", [1, 3, 5])
def test_monai_gives_the_same_result_with_our_weights_and_the_same_windows(width: int) -> None:
    network, image, weights = convolution(width), noise(4, 48, 48, 48), gaussian_weights((32, 32, 32))
    theirs = sliding_window_inference(image[None], (32, 32, 32), 1, network, overlap=0.5, roi_weight_map=weights)[0]
    torch.testing.assert_close(logits_of(network, image, side=32), theirs, rtol=0, atol=1e-5)


def test_our_weights_above_the_floor_are_proportional_to_those_of_monai() -> None:
    theirs = compute_importance_map((32, 24, 16), "gaussian", sigma_scale=0.125)
    ours = gaussian_weights((32, 24, 16))
    high = ours > 2e-3
    torch.testing.assert_close(ours[high], (theirs / theirs.max())[high], rtol=1e-4, atol=0)


def test_monai_gives_nearly_the_same_result_with_its_own_weights() -> None:
    network, image = convolution(3), noise(4, 48, 48, 48)
    theirs = sliding_window_inference(
        image[None], (32, 32, 32), 1, network, overlap=0.5, mode="gaussian", sigma_scale=0.125
    )[0]
    gap = (logits_of(network, image, side=32) - theirs).abs()
    # Both put a floor of 1e-3 under the weights, we after scaling the largest to 1, MONAI before: 2 % apart. It shows
    # where windows disagree and the floor is in play: at a window's edge, which sees padding instead of neighbours.
    assert gap.quantile(0.9) < 1e-4
    assert gap.max() < 0.02


def test_windows_without_brain_are_skipped_and_are_certain_background() -> None:
    image, network = torch.zeros(4, 64, 16, 16), FirstThree()
    image[:, 50:60] = 1.0
    answer = logits_of(network, image)
    assert len(network.seen) == 2
    assert all(patch.any() for patch in network.seen)
    assert (answer[:, :32] == -30).all()
    assert (answer[:, 50:60] == 1).all()


def test_a_window_with_only_one_contrast_is_still_computed() -> None:
    image = torch.zeros(4, 16, 16, 16)
    image[3, 8, 8, 8] = 1.0
    assert (logits_of(FirstThree(), image) == 0).all()


def test_a_volume_that_is_zero_everywhere_is_refused() -> None:
    with pytest.raises(ValueError, match="zero everywhere"):
        logits_of(FirstThree(), torch.zeros(4, 16, 16, 16))


def test_padding_is_zero_and_symmetric() -> None:
    network = FirstThree()
    logits_of(network, torch.ones(4, 10, 16, 16))
    along = network.seen[0][0, 0, :, 0, 0]
    assert along.tolist() == [0] * 3 + [1] * 10 + [0] * 3


def test_a_callback_between_windows_may_stop_it() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sliding_logits(
            FirstThree(),
            noise(4, 16, 16, 16).numpy(),
            window=(16, 16, 16),
            overlap=0.5,
            runtime=cpu(),
            between_windows=stop,
        )


def test_bfloat16_gives_float32_logits_close_to_those_of_float32() -> None:
    torch.manual_seed(0)
    network, image = nn.Conv3d(4, 3, 3, padding="same").eval(), noise(4, 24, 24, 24)
    half = choose_runtime(RuntimeConfig(device="cpu", precision="bfloat16"))
    answer = sliding_logits(network, image.numpy(), window=(16, 16, 16), overlap=0.5, runtime=half)
    assert answer.dtype is torch.float32
    torch.testing.assert_close(answer, logits_of(network, image), rtol=0, atol=0.05)


def test_logits_blended_in_float16_equal_those_in_float32_up_to_rounding() -> None:
    image = noise(4, 40, 36, 20)
    image[:, :24, :24] = 0
    whole = logits_of(FirstThree(), image)
    windows = place_windows(image.numpy(), (16, 16, 16), 0.5)
    half = window_logits(FirstThree(), image, windows, runtime=cpu(), half=True)
    assert half.dtype is torch.float16
    assert torch.equal(half == -30, whole == -30)
    torch.testing.assert_close(half.float(), whole, rtol=5e-3, atol=5e-3)


def test_no_gradient_is_kept() -> None:
    assert not logits_of(nn.Conv3d(4, 3, 1).eval(), noise(4, 16, 16, 16)).requires_grad


def test_an_image_in_float16_is_computed_in_float32() -> None:
    image, network = noise(4, 20, 16, 24).half(), FirstThree()
    answer = logits_of(network, image)
    assert {patch.dtype for patch in network.seen} == {torch.float32}
    assert torch.equal(answer, logits_of(FirstThree(), image.float()))


@pytest.mark.parametrize("shape", [(40, 36, 20), (10, 40, 16)])
@pytest.mark.parametrize("around", [((3, 9), (0, 0), (1, 2)), ((0, 5), (2, 0), (20, 0))])
def test_zeros_around_an_image_need_no_memory(shape: tuple[int, int, int], around: Padding) -> None:
    image, torch_network, other = noise(4, *shape), FirstThree(), FirstThree()
    windows = place_windows(image.numpy(), (16, 16, 16), 0.5, around=around)
    found = window_logits(torch_network, image, windows, runtime=cpu())
    whole = functional.pad(image, [gap for gaps in reversed(around) for gap in gaps])
    expected = logits_of(other, whole)
    inner = [slice(before, before + side) for side, (before, _) in zip(shape, around, strict=True)]
    assert torch.equal(found, expected[:, *inner])
    assert len(torch_network.seen) == len(other.seen)


def test_windows_on_a_mirrored_view_equal_those_on_a_mirrored_copy() -> None:
    image = noise(4, 40, 36, 20)
    image[:, :24, :24] = 0
    view = image.numpy()[:, ::-1, :, ::-1]
    assert place_windows(view, (16, 16, 16), 0.5) == place_windows(view.copy(), (16, 16, 16), 0.5)


class Casts(TorchDispatchMode):
    """Counts the conversions of tensors of a certain shape to bfloat16."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # In inference mode, `to` is not split into its parts.
        if str(func).startswith(("aten.to.", "aten._to_copy.")) and args[0].shape == self.shape:
            self.count += out.dtype is torch.bfloat16 and args[0].dtype is torch.float32
        return out


@pytest.mark.parametrize("frozen", [True, False])
def test_weights_are_cast_once_for_all_windows_and_stay_as_trainable_as_before(frozen: bool) -> None:
    network = nn.Conv3d(4, 3, 3, padding="same").eval().requires_grad_(not frozen)
    half = choose_runtime(RuntimeConfig(device="cpu", precision="bfloat16"))
    with Casts((3, 4, 3, 3, 3)) as casts:
        sliding_logits(network, noise(4, 32, 24, 24).numpy(), window=(16, 16, 16), overlap=0.5, runtime=half)
    assert casts.count == 1
    assert network.weight.requires_grad is not frozen


def test_casting_weights_once_equals_casting_them_for_each_window() -> None:
    network = nn.Conv3d(4, 3, 3, padding="same").eval()
    half = choose_runtime(RuntimeConfig(device="cpu", precision="bfloat16"))
    image = noise(4, 16, 16, 16)
    with torch.inference_mode(), half.autocast():
        expected = network(image[None].contiguous(memory_format=half.memory_format))[0].float()
    found = sliding_logits(network, image.numpy(), window=(16, 16, 16), overlap=0.5, runtime=half)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_network_may_have_integer_weights() -> None:
    network, image = FirstThree(), noise(4, 16, 16, 16)
    network.register_parameter("count", nn.Parameter(torch.ones(1, dtype=torch.int64), requires_grad=False))
    torch.testing.assert_close(logits_of(network, image), image[:3])
