"""The label map compared with its brain: stray voxels, islands, another patient's label map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from data.nifti import Volume
from data.phantoms import Phantom, make_phantom
from data.quality.digest import digest
from data.quality.finding import Finding
from data.quality.labels import LabelDigest, digest_labels, judge_labels, lonely


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return make_phantom(0, seed=2, spacing_mm=4.0)


def of(voxels: npt.NDArray[np.uint8]) -> LabelDigest:
    return digest_labels(Volume(voxels=voxels, affine=np.diag([-4.0, -4.0, 4.0, 1.0]), path=Path("a_seg.nii.gz")))


def judged(codes: npt.NDArray[np.uint8], phantom: Phantom) -> list[Finding]:
    flair = phantom.images["flair"].astype(np.float32)
    seen = digest(Volume(voxels=flair, affine=of(codes).grid.affine, path=Path("a_flair.nii.gz")))
    return judge_labels(of(codes), [flair != 0], seen.grid, seen)


def kinds(codes: npt.NDArray[np.uint8], phantom: Phantom) -> list[tuple[str, str]]:
    return [(finding.kind, finding.severity) for finding in judged(codes, phantom)]


def without_islands(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    whole, _ = ndimage.label(codes, np.ones((3, 3, 3)))
    return np.where(np.bincount(whole.ravel())[whole] > 5, codes, 0).astype(np.uint8)


def test_a_matching_label_map_has_no_findings(phantom: Phantom) -> None:
    assert judged(without_islands(phantom.codes), phantom) == []


def test_a_stray_voxel_outside_the_brain_gives_two_notes(phantom: Phantom) -> None:
    codes = without_islands(phantom.codes)
    codes[0, 0, 0] = 1
    assert kinds(codes, phantom) == [("label outside the brain", "note"), ("one-voxel islands", "note")]
    assert judged(codes, phantom)[0].message.startswith("1 of ")


def test_a_label_map_far_off_the_brain_is_a_problem(phantom: Phantom) -> None:
    assert kinds(np.roll(phantom.codes, 40, axis=0), phantom)[0] == ("label outside the brain", "problem")


def test_a_label_map_where_flair_is_dark_is_a_note(phantom: Phantom) -> None:
    dark = (phantom.images["flair"] > 0) & (
        phantom.images["flair"] < np.median(phantom.images["flair"][phantom.codes > 0]) / 2
    )
    assert ("misplaced label", "note") in kinds(dark.astype(np.uint8), phantom)


def test_a_label_map_of_zeros_is_a_note(phantom: Phantom) -> None:
    assert kinds(np.zeros_like(phantom.codes), phantom) == [("empty label map", "note")]


def test_a_label_map_of_another_shape_is_a_problem(phantom: Phantom) -> None:
    assert kinds(phantom.codes[:-1], phantom) == [("another grid", "problem")]


@settings(derandomize=True, deadline=None)
@given(hnp.arrays(bool, st.tuples(*[st.integers(1, 5)] * 3)))
def test_islands_are_single_voxel_components(mask: npt.NDArray[np.bool_]) -> None:
    components, count = ndimage.label(mask, np.ones((3, 3, 3)))
    sizes = np.bincount(components.ravel(), minlength=count + 1)[1:]
    assert lonely(mask) == np.count_nonzero(sizes == 1)


@settings(derandomize=True, deadline=None)
@given(hnp.arrays(np.uint8, st.tuples(*[st.integers(1, 5)] * 3), elements=st.integers(0, 4)), st.sampled_from("CF"))
def test_only_values_that_occur_are_listed(voxels: npt.NDArray[np.uint8], order: Any) -> None:
    assert of(np.asarray(voxels, order=order)).values == tuple(np.unique(voxels).tolist())
