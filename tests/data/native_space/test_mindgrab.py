"""MindGrab's frame, with a stand-in for its network that marks voxels brighter than one half."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk  # noqa: N813 - SimpleITK's usual alias

from data.errors import DataError
from data.native_space.brain_mask import find_brain, require_mask
from data.native_space.itk import to_itk, voxels_of
from data.native_space.mindgrab import (
    SIDE,
    largest_part,
    mask_agreement,
    mindgrab_mask,
    network_frame,
    scaled_intensities,
)

#: Voxel orders of the images: identity, and axes swapped and mirrored.
ORDERS = {"RAS": np.diag([1.0, 1, 1]), "LPI": np.diag([-1.0, -1, -1]), "ASR": np.eye(3)[[2, 0, 1]]}


def bright(values: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = values > 0.5
    return found


def head(order: str = "RAS", side: int = 48, spacing_mm: float = 2.0) -> sitk.Image:
    """A ball of 1 (the brain) in a ball of 0.3 (the head)."""
    axes = np.indices((side, side, side)) - side / 2
    distance = np.sqrt((axes**2).sum(axis=0))
    voxels = np.where(distance < 14, 1.0, np.where(distance < 20, 0.3, 0)).astype(np.float32)
    affine = np.eye(4)
    affine[:3, :3] = ORDERS[order] * spacing_mm
    affine[:3, 3] = [10, -20, 30]
    return to_itk(voxels, affine)


@pytest.mark.parametrize("order", ORDERS)
def test_the_mask_is_on_the_grid_of_the_image(order: str) -> None:
    image = head(order)
    mask = voxels_of(mindgrab_mask(image, bright, name="A"))
    brain = voxels_of(image) > 0.5
    assert 2 * (mask & brain).sum() / (mask.sum() + brain.sum()) > 0.98


def test_the_frame_is_lia_at_1_mm_centred_on_the_image() -> None:
    image = head()
    frame = network_frame(image)
    assert frame.size == (256, 256, 256)
    assert frame.affine[:3, :3].tolist() == [[-1, 0, 0], [0, 0, 1], [0, -1, 0]]
    middle = frame.affine @ [127.5, 127.5, 127.5, 1]
    size = np.array(image.GetSize())
    expected = np.array([10, -20, 30]) + (size - 1)
    assert np.abs(middle[:3] - expected).max() <= 1.5


def test_the_mask_uses_the_whole_frame_and_the_comparison_a_part() -> None:
    shapes = []

    def watched(values: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        shapes.append(values.shape)
        return bright(values)

    mask = mindgrab_mask(head(), watched, name="A")
    mask_agreement(head(), mask, watched)
    assert shapes[0] == (SIDE, SIDE, SIDE)
    assert all(80 <= side <= 100 for side in shapes[1])


def test_intensities_are_clipped_at_the_quantiles() -> None:
    values = scaled_intensities(np.arange(1000, dtype=np.float32))
    assert values.min() == 0
    assert values.max() == 1
    assert 0.018 < (values == 0).mean() < 0.022


def test_a_constant_image_is_scaled_without_a_warning() -> None:
    assert not scaled_intensities(np.full(10, 3, dtype=np.float32)).any()


def test_the_largest_component_is_kept_with_its_holes_filled() -> None:
    mask = np.zeros((12, 12, 12), dtype=bool)
    mask[1:6, 1:6, 1:6] = True
    mask[3, 3, 3] = False
    mask[9:11, 9:11, 9:11] = True
    kept = largest_part(mask)
    assert kept[3, 3, 3]
    assert not kept[9:, 9:, 9:].any()


def test_an_empty_mask_from_the_network_is_reported() -> None:
    with pytest.raises(DataError, match="case A: MindGrab found no brain"):
        mindgrab_mask(head(), lambda values: np.zeros(values.shape, dtype=bool), name="A")


def test_a_contrast_with_another_brain_is_named() -> None:
    image = head()
    shifted = sitk.Resample(image, image, sitk.TranslationTransform(3, (12, 0, 0)))
    found = find_brain(image, image, "mindgrab", name="A", network=bright, others={"t2": shifted, "flair": image})
    assert found.source == "mindgrab"
    assert [warning.partition(":")[0] for warning in found.warnings if "differs" in warning] == ["t2"]


def test_a_mask_agrees_perfectly_with_itself() -> None:
    image = head()
    assert mask_agreement(image, mindgrab_mask(image, bright, name="A"), bright) > 0.98


def test_if_mindgrab_is_not_installed_the_error_gives_the_command() -> None:
    with pytest.raises(DataError, match="znormseg model download mindgrab"):
        require_mask("mindgrab")


def test_auto_prefers_mindgrab_to_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert find_brain(head(), head(), "auto", name="A", network=bright).source == "mindgrab"
