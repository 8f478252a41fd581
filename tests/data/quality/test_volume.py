"""One contrast: how a skull, thick slices and a cut field of view are detected, and that a plain brain passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from data.labels import CONTRASTS, Contrast
from data.nifti import Volume
from data.phantoms import Phantom, make_phantom
from data.preprocess import smallest_box, zscore_nonzero
from data.quality.digest import Digest, digest, strides
from data.quality.volume import judge_volume, thick_slices

#: Brightness of fluid, skull and scalp as multiples of the brain's median.
SHELL = {"t1": (0.4, 0.15, 1.6), "t1c": (0.4, 0.2, 1.7), "t2": (2.0, 0.15, 1.3), "flair": (0.3, 0.2, 1.4)}


def seen(voxels: npt.NDArray[np.generic], affine: npt.NDArray[np.float64]) -> Digest:
    return digest(Volume(voxels=np.asfortranarray(voxels, dtype=np.float32), affine=affine, path=Path("a.nii.gz")))


def kinds(voxels: npt.NDArray[np.generic], affine: npt.NDArray[np.float64]) -> list[str]:
    return [finding.kind for finding in judge_volume(seen(voxels, affine), "t1")]


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return make_phantom(1, spacing_mm=3.0)


def with_skull(phantom: Phantom, contrast: Contrast, scalp_mm: float = 14.0) -> npt.NDArray[np.float32]:
    """The brain in a shell of fluid, dark bone and bright scalp."""
    voxels = phantom.images[contrast].astype(np.float32)
    away_mm = ndimage.distance_transform_edt(voxels == 0, sampling=3.0)
    unit = np.median(voxels[voxels != 0])
    for (low, high), level in zip([(0, 3), (3, 9), (9, scalp_mm)], SHELL[contrast], strict=True):
        layer = (away_mm > low) & (away_mm <= high)
        texture = np.random.default_rng(0).uniform(0.7, 1.3, layer.sum())
        voxels[layer] = level * unit * texture
    return voxels


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_a_skull_stripped_brain_has_no_findings(contrast: Contrast, phantom: Phantom) -> None:
    assert kinds(phantom.images[contrast], phantom.affine) == []


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_a_zscored_brain_has_no_findings_and_a_zscored_head_has_its_skull_found(
    contrast: Contrast, phantom: Phantom
) -> None:
    assert kinds(zscore_nonzero(phantom.images[contrast].astype(np.float32)), phantom.affine) == []
    assert "skull" in kinds(zscore_nonzero(with_skull(phantom, contrast)), phantom.affine)


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_a_skull_on_a_background_of_0_is_found(contrast: Contrast, phantom: Phantom) -> None:
    assert "skull" in kinds(with_skull(phantom, contrast), phantom.affine)


def test_the_skull_of_a_small_head_is_found_by_the_dark_band(phantom: Phantom) -> None:
    affine = phantom.affine @ np.diag([0.75, 0.75, 0.75, 1])
    voxels = with_skull(phantom, "t1")
    assert np.count_nonzero(voxels) * abs(np.linalg.det(affine)) / 1e6 < 2.0
    assert "skull" in kinds(voxels, affine)


def test_a_head_in_noisy_air_is_found(phantom: Phantom) -> None:
    voxels = with_skull(phantom, "t2")
    noise = 1 + np.random.default_rng(0).rayleigh(5, voxels.shape)
    (finding, *_) = judge_volume(seen(np.where(voxels == 0, noise, voxels), phantom.affine), "t2")
    assert (finding.kind, finding.severity) == ("background", "problem")


def test_a_spacing_that_makes_the_brain_too_large_is_a_problem(phantom: Phantom) -> None:
    affine = phantom.affine @ np.diag([1.5, 1.5, 1.5, 1])
    (finding,) = judge_volume(seen(phantom.images["t1"], affine), "t1")
    assert finding.kind == "skull"
    assert "or the spacing is wrong" in finding.message


@pytest.mark.parametrize(("axis", "name"), [(0, "left-right"), (1, "anterior-posterior"), (2, "inferior-superior")])
def test_a_brain_cut_off_at_the_border_is_a_note_naming_the_axis(axis: int, name: str, phantom: Phantom) -> None:
    voxels = np.moveaxis(phantom.images["t1"], axis, 0)
    half = np.moveaxis(voxels[: voxels.shape[0] // 2], 0, axis)
    (finding,) = judge_volume(seen(half, phantom.affine), "t1")
    assert (finding.kind, finding.severity) == ("cut field of view", "note")
    assert name in finding.message


def test_a_brain_cut_off_within_the_volume_is_also_found(phantom: Phantom) -> None:
    voxels = phantom.images["t1"].copy()
    voxels[:, :, 32:] = 0
    assert kinds(voxels, phantom.affine) == ["cut field of view"]


def test_a_tightly_cropped_volume_does_not_count_as_cut_off(phantom: Phantom) -> None:
    voxels = phantom.images["t1"]
    assert kinds(voxels[smallest_box(voxels != 0)], phantom.affine) == []


@pytest.mark.parametrize(
    ("spacing_mm", "thick"),
    [
        ((1.0, 1.0, 1.0), False),
        ((4.0, 4.0, 4.0), False),
        ((1.0, 1.0, 2.9), False),
        ((0.9, 0.9, 3.0), True),
        ((5.0, 0.5, 0.5), True),
        ((0.5, 0.5, 1.5), True),
    ],
)
def test_slices_count_as_thick_from_3_mm_or_three_times_the_finest_spacing(
    spacing_mm: tuple[float, float, float], thick: bool
) -> None:
    finding = thick_slices(spacing_mm, "t2")
    assert (finding is not None) == thick
    assert finding is None or finding.severity == "note"


@pytest.mark.parametrize(("value", "kind"), [(0, "empty"), (3, "constant")])
def test_a_constant_image_is_a_problem(value: int, kind: str, phantom: Phantom) -> None:
    assert kinds((phantom.images["t1"] != 0) * value, phantom.affine) == [kind]


def test_an_image_is_not_constant_if_one_voxel_anywhere_differs() -> None:
    voxels = np.zeros((80, 80, 80))
    voxels[10:20, 10:20, 10:20] = 1
    voxels[11, 13, 15] = 2
    assert strides(voxels.shape, (1.0, 1.0, 1.0)) == (2, 2, 2)
    assert seen(voxels, np.eye(4)).is_image
