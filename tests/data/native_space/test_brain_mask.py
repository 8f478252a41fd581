"""Brain masks: from an image's own background, a file, installed tools, the template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk  # noqa: N813
from scipy import ndimage

from data.errors import DataError
from data.native_space.brain_mask import find_brain, is_stripped
from data.native_space.itk import to_itk, voxels_of
from data.nifti import Volume, read_volume

#: A stand-in for an installed tool: copies a fixed file to the path given by an option.
TOOL = """#!/usr/bin/env python3
import sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
import shutil
shutil.copy({made!r}, arguments[{option!r}])
"""


def mask_of(found: Any) -> Any:
    """The brain that was found, as a boolean array."""
    return voxels_of(found.mask) > 0


@pytest.fixture(scope="module")
def t1c(phantoms: Path) -> Volume:
    return read_volume(next(phantoms.glob("*00000/*_t1ce.nii.gz")))


@pytest.fixture(scope="module")
def head(t1c: Volume) -> Volume:
    """The brain surrounded by fluid, skull, scalp and air noise."""
    brain = t1c.voxels > 0
    bright = float(np.median(t1c.voxels[brain]))
    away_mm = ndimage.distance_transform_edt(~brain, sampling=4.0)
    around = np.select([away_mm <= 4, away_mm <= 9, away_mm <= 16], [0.3 * bright, 0.1 * bright, 1.4 * bright], 0)
    noise = np.random.default_rng(0).rayleigh(0.03 * bright, brain.shape)
    voxels = np.where(brain, t1c.voxels, around) + noise
    return Volume(voxels=voxels.astype(np.float32), affine=t1c.affine, path=t1c.path)


def image_of(volume: Volume) -> sitk.Image:
    return to_itk(volume.voxels, volume.affine)


def installed(folder: Path, command: str, made: Path, option: str) -> None:
    """Install a command in a folder that copies ``made`` to the path given by its option."""
    folder.mkdir(exist_ok=True)
    (folder / command).write_text(TOOL.format(made=str(made), option=option))
    (folder / command).chmod(0o755)


def mask_file(path: Path, volume: Volume) -> Path:
    nib.save(nib.Nifti1Image((volume.voxels > 0).astype(np.uint8), volume.affine), path)
    return path


def dice(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> float:
    return float(2 * (first & second).sum() / (first.sum() + second.sum()))


def test_a_brain_on_zeros_counts_as_stripped_and_a_head_does_not(t1c: Volume, head: Volume) -> None:
    assert is_stripped(image_of(t1c))
    assert not is_stripped(image_of(head))


def test_a_head_on_a_zero_background_is_not_mistaken_for_a_brain(head: Volume) -> None:
    cleaned = Volume(voxels=np.where(head.voxels > 10, head.voxels, 0), affine=head.affine, path=head.path)
    assert (cleaned.voxels == 0).any()
    assert not is_stripped(image_of(cleaned))


def test_a_stripped_image_keeps_its_own_mask(t1c: Volume) -> None:
    image = image_of(t1c)
    found = find_brain(image, image, "auto", name="a")
    assert found.source == "own"
    assert dice(mask_of(found), t1c.voxels > 0) > 0.999


def test_nothing_is_masked_with_none(t1c: Volume) -> None:
    assert find_brain(image_of(t1c), image_of(t1c), "none", name="a").mask is None


def test_a_given_mask_may_be_on_any_grid(t1c: Volume, head: Volume, tmp_path: Path) -> None:
    turned = Volume(voxels=t1c.voxels[::-1], affine=t1c.affine @ flip(t1c.voxels.shape[0]), path=t1c.path)
    path = mask_file(tmp_path / "mask.nii.gz", turned)
    found = find_brain(image_of(head), image_of(head), str(path), name="a")
    assert (found.source, found.detail) == ("file", str(path))
    assert np.array_equal(mask_of(found), t1c.voxels > 0)


def flip(count: int) -> npt.NDArray[np.float64]:
    matrix = np.diag([-1.0, 1.0, 1.0, 1.0])
    matrix[0, 3] = count - 1
    return matrix


def test_a_mask_that_does_not_overlap_the_image_is_refused(t1c: Volume, tmp_path: Path) -> None:
    far = t1c.affine.copy()
    far[:3, 3] += 1000
    path = mask_file(tmp_path / "mask.nii.gz", Volume(voxels=t1c.voxels, affine=far, path=t1c.path))
    with pytest.raises(DataError, match="marks no voxel of t1c"):
        find_brain(image_of(t1c), image_of(t1c), str(path), name="a")


def test_a_missing_mask_is_named(t1c: Volume, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.nii\.gz: no such file"):
        find_brain(image_of(t1c), image_of(t1c), str(tmp_path / "nowhere.nii.gz"), name="a")


@pytest.mark.parametrize(("tool", "command"), [("hd-bet", "hd-bet"), ("synthstrip", "mri_synthstrip")])
def test_a_tool_that_is_not_installed_is_named(
    tool: str, command: str, t1c: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=f"--mask {tool}: no command {command} on the PATH"):
        find_brain(image_of(t1c), image_of(t1c), tool, name="a")


@pytest.mark.parametrize(
    ("tool", "command", "option"), [("hd-bet", "hd-bet", "-o"), ("synthstrip", "mri_synthstrip", "-m")]
)
def test_an_installed_tool_is_found_and_its_mask_used(
    *, tool: str, command: str, option: str, t1c: Volume, head: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path / "bin", command, mask_file(tmp_path / "made.nii.gz", t1c), option)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    found = find_brain(image_of(head), image_of(head), "auto", name="a")
    assert (found.source, found.coarse) == (tool, False)
    assert np.array_equal(mask_of(found), t1c.voxels > 0)


def test_the_output_of_a_failing_tool_is_quoted(t1c: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hd-bet").write_text("#!/bin/sh\necho 'no weights to be had' >&2\nexit 3\n")
    (tmp_path / "hd-bet").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(DataError, match=r"hd-bet failed \(exit code 3\): no weights to be had"):
        find_brain(image_of(t1c), image_of(t1c), "hd-bet", name="a")


@pytest.mark.slow
def test_the_template_finds_the_brain_in_a_head_and_warns_that_it_is_coarse(t1c: Volume, head: Volume) -> None:
    found = find_brain(image_of(head), image_of(head), "atlas", name="a")
    assert (found.source, found.coarse) == ("atlas", True)
    assert "coarse" in found.warnings[0]
    assert dice(mask_of(found), t1c.voxels > 0) > 0.9
