"""Backgrounds that are not 0, tested on images with a known result."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from data.background import clean_background
from data.datasets.layouts import find_cases
from data.datasets.source import DataSource
from data.labels import CONTRASTS
from data.nifti import Volume, read_image, read_volume
from data.preprocess import Prepared, prepare
from data.quality.check import check
from data.quality.digest import digest

Voxels = npt.NDArray[np.float32]
Call = Callable[..., Any]


@cache
def brain() -> Voxels:
    """A ball of tissue from 200 to 1200 with dark fluid in the middle and partly on its rim, on a background of 0."""
    random = np.random.default_rng(0)
    x, y, z = np.ogrid[-24:24, -24:24, -24:24]
    radius = np.sqrt(x**2 + y**2 + z**2)
    tissue = 700 + 150 * ndimage.gaussian_filter(random.normal(size=radius.shape), 1.5) / 0.1
    values: Voxels = np.rint(np.clip(np.where(radius < 5, 60, tissue), 20, 1200)).astype(np.float32)
    values[(radius > 15) & (x > 13)] = 3  # a sulcus of FLAIR
    values[radius > 16] = 0
    values.setflags(write=False)
    return values


def rim(width: int = 5) -> npt.NDArray[np.bool_]:
    image = brain() != 0
    return np.asarray(ndimage.binary_dilation(image, iterations=width) & ~image)


def noise(scale: float) -> Voxels:
    return np.random.default_rng(1).normal(0, scale, brain().shape).astype(np.float32)


def z_scored(image: Voxels) -> Voxels:
    there = image != 0
    return np.where(there, (image - image[there].mean()) / image[there].std(), 0).astype(np.float32)


def cleaned(image: Voxels) -> Voxels:
    found = clean_background(np.asarray(image, dtype=np.float32))
    assert found is not None
    return found.voxels


FILLS = [-1024, -1, 10, 30000, 3e38, -np.finfo(np.float32).max]


@pytest.mark.parametrize("fill", FILLS)
def test_a_fill_value_is_background(fill: float) -> None:
    np.testing.assert_array_equal(cleaned(np.where(brain() == 0, np.float32(fill), brain())), brain())


RESIDUES = {
    "in a rim": lambda: noise(1e-4) * rim(),
    "everywhere": lambda: noise(1e-4) * (brain() == 0),
    "a denoiser's whole numbers": lambda: np.rint(noise(0.6)).clip(-1, 1) * rim(3),
    "one voxel wide": lambda: np.abs(noise(1e-3)) * rim(1),
    "all of one number": lambda: np.float32(1e-6) * rim(),
}


@pytest.mark.parametrize("residue", RESIDUES.values(), ids=RESIDUES)
def test_values_near_0_around_a_brain_are_background(residue: Callable[[], Voxels]) -> None:
    np.testing.assert_array_equal(cleaned(brain() + residue()), brain())


KEPT = {
    "a background of 0": brain,
    "z-scored": lambda: z_scored(brain()),
    "z-scored in whole numbers": lambda: np.rint(z_scored(brain()) * 1000),
    "from 0 to 1": lambda: brain() / brain().max(),
    "least value 1": lambda: np.where(brain() == 3, np.float32(1), brain()),
    "noise in the air": lambda: np.abs(brain() + noise(10)),
    "hot voxels": lambda: np.where(np.random.default_rng(2).random(brain().shape) < 0.02, brain() * 1000, brain()),
    "all 0": lambda: np.zeros_like(brain()),
    "all 7": lambda: np.full_like(brain(), 7),
}


@pytest.mark.parametrize("image", KEPT.values(), ids=KEPT)
def test_an_image_without_such_a_background_is_unchanged(image: Callable[[], Voxels]) -> None:
    assert clean_background(image().astype(np.float32)) is None


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(1e-30, 1e30), fill=st.sampled_from([None, -1.0, 0.02]), order=st.permutations(range(3)))
def test_the_result_does_not_depend_on_units_or_axis_order(scale: float, fill: float | None, order: list[int]) -> None:
    image = brain().astype(np.float64) / 1200
    image = image + noise(1e-4) * rim() if fill is None else np.where(image == 0, fill, image)
    moved = np.asfortranarray((image * scale).astype(np.float32).transpose(order))
    np.testing.assert_array_equal(cleaned(moved) != 0, (brain() != 0).transpose(order))


@settings(max_examples=25, deadline=None)
@given(offset=st.floats(-1000, 3000), scale=st.floats(0.1, 10))
def test_values_near_0_inside_a_brain_are_tissue(offset: float, scale: float) -> None:
    image = np.where(brain() == 0, 0, (brain() - offset) * scale).astype(np.float32)
    image += np.float32(1e-4) * scale * rim()
    found = clean_background(image)
    assert found is not None
    inside = ndimage.binary_erosion(brain() != 0, iterations=2)
    np.testing.assert_array_equal(found.voxels[inside], image[inside])


def test_voxels_of_0_inside_a_brain_on_a_fill_value_are_tissue() -> None:
    shifted = np.where(brain() == 0, -1024, brain() - 700).astype(np.float32)
    assert (shifted == 0).any()
    inside = ndimage.binary_erosion(brain() != 0)  # on the rim, an exact 0 touches the background
    assert (cleaned(shifted)[inside] != 0).all()
    assert (cleaned(shifted)[brain() == 0] == 0).all()


@pytest.mark.parametrize("fill", [0, -1024])
def test_interpolation_ringing_is_background(fill: float) -> None:
    shift = (0.4, 0.3, 0.5)
    image = ndimage.shift(np.where(brain() == 0, np.float32(fill), brain()), shift, order=3, cval=fill)
    there = cleaned(image) != 0
    true = ndimage.shift((brain() != 0).astype(np.float32), shift, order=1) >= 0.5
    # The rim may be off by one voxel; the ball's outermost layer holds 0.2 of its voxels.
    assert 2 * np.count_nonzero(there & true) / (there.sum() + true.sum()) > 0.93


def test_a_slab_outside_the_field_of_view_is_background() -> None:
    image = brain().copy()
    image[:, :, :4] = -1024
    np.testing.assert_array_equal(cleaned(image), brain())


def test_the_message_names_the_values() -> None:
    found = clean_background(np.where(brain() == 0, np.float32(-1024), brain()))
    assert found is not None
    count = np.count_nonzero(brain() == 0)
    assert found.sentence == f"the background is -1024, not 0; {count} voxels were taken as 0"


def test_a_refused_background_is_not_examined_further() -> None:
    image = np.abs(brain() + noise(10)).astype(np.float32)
    seen = digest(Volume(voxels=image, affine=np.eye(4), path=Path("a")))
    assert seen.has_background
    assert not seen.is_image


# Files


def with_background(folder: Path, target: Path, change: Callable[[Voxels], Voxels]) -> Path:
    """A copy of a case whose images have a different background."""
    (target / folder.name).mkdir(parents=True)
    for path in folder.glob("*.nii.gz"):
        image: Any = nib.load(path)
        voxels = np.asarray(image.dataobj)
        changed = voxels if "seg" in path.name else change(voxels.astype(np.float32))
        nib.save(nib.Nifti1Image(changed, image.affine), target / folder.name / path.name)
    return target


def ring(voxels: Voxels) -> Voxels:
    around = ndimage.binary_dilation(voxels != 0, iterations=6) & (voxels == 0)
    noise: Voxels = np.random.default_rng(0).normal(0, 1e-4, voxels.shape).astype(np.float32) * around
    return voxels + noise


CHANGES = {"ring": ring, "-1024": lambda v: np.where(v == 0, np.float32(-1024), v)}


@pytest.fixture(params=CHANGES.values(), ids=list(CHANGES))
def changed(request: pytest.FixtureRequest, phantoms: Path, tmp_path: Path) -> Path:
    return with_background(find_cases(phantoms)[0].folder, tmp_path / "changed", request.param)


def same(one: Prepared, other: Prepared) -> bool:
    return np.array_equal(one.image, other.image) and one.box == other.box and np.array_equal(one.brain, other.brain)


def test_a_case_is_prepared_as_if_its_background_were_0(changed: Path, phantoms: Path) -> None:
    (case,), plain = find_cases(changed), prepare(find_cases(phantoms)[0])
    prepared = prepare(case)
    assert same(prepared, plain)
    assert tuple(prepared.backgrounds) == CONTRASTS
    assert not plain.backgrounds


@pytest.mark.filterwarnings("error")
def test_data_check_notes_the_background_and_has_no_other_findings(changed: Path, phantoms: Path) -> None:
    (case,) = check(DataSource(changed)).cases
    assert [(one.kind, one.severity) for one in case.findings[:4]] == [("background", "note")] * 4
    assert case.findings[4:] == check(DataSource(phantoms)).cases[0].findings


def test_predict_flags_the_background_and_predicts_as_if_it_were_0(
    changed: Path, phantoms: Path, tiny_run: Path, tmp_path: Path, znormseg: Call
) -> None:
    name = find_cases(phantoms)[0].id
    assert znormseg("predict", tiny_run, phantoms / name, tmp_path / "plain").code == 0
    ended = znormseg("predict", tiny_run, changed, tmp_path / "out", "--json")
    assert ended.code == 0, ended.err
    (case,) = json.loads(ended.out)["cases"]
    assert [flag["code"] for flag in case["flags"]].count("background_not_zero") == 4
    assert f"case {name}, contrast t1: the background" in ended.err
    voxels = [
        np.asarray(nib.Nifti1Image.from_filename(tmp_path / part / f"{name}.nii.gz").dataobj)
        for part in ("plain", "out")
    ]
    np.testing.assert_array_equal(voxels[0], voxels[1])


def test_a_run_records_a_replaced_background(
    phantoms: Path, tiny_settings: list[str], tmp_path: Path, znormseg: Call
) -> None:
    for case in find_cases(phantoms):
        with_background(case.folder, tmp_path / "data", CHANGES["-1024"] if case.id.endswith("0") else lambda v: v)
    words = [word for one in [*tiny_settings, "training.steps=1"] for word in ("--set", one)]
    for name in ("first", "second"):  # the second takes prepared cases from the cache
        ended = znormseg("train", tmp_path / "data", tmp_path / name, "--config", "laptop", *words)
        assert ended.code == 0, ended.err
        assert "t1: the background is -1024, not 0" in ended.err
        record = json.loads((tmp_path / name / "backgrounds.json").read_text())
        assert all(set(said) == set(CONTRASTS) for said in record.values())


def test_data_export_writes_the_background_as_0(changed: Path, phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    case = find_cases(phantoms)[0]
    ended = znormseg("data", "export", changed, tmp_path / "out", "--format", "csv", "--labels", "brats2021")
    assert ended.code == 0, ended.err
    exported = read_volume(tmp_path / "out" / case.id / f"{case.id}_t1.nii.gz")
    np.testing.assert_array_equal(exported.voxels, read_volume(case.contrasts["t1"]).voxels)


def test_scans_on_their_own_grids_have_their_background_set_to_0(changed: Path, phantoms: Path) -> None:
    from data.native_space.to_brats import read_native

    native = read_native(replace(find_cases(changed)[0], label=None))
    assert len(native.backgrounds) == 4


def test_no_voxel_of_a_real_case_changes(real_cases: Path) -> None:
    for case in find_cases(real_cases)[::4]:
        for path in case.contrasts.values():
            assert read_image(path).background is None


# Label maps saved with a scale by an editor


@pytest.fixture
def scaled(phantoms: Path, tmp_path: Path) -> Path:
    """A case whose label map contains 1.0039, 1.9922 and 4."""
    case = find_cases(phantoms)[0]
    folder = with_background(case.folder, tmp_path / "scaled", lambda v: v)
    (path,) = folder.rglob("*_seg.nii.gz")
    image: Any = nib.load(path)
    labels = np.array([0, 1.003922, 1.992157, 0, 4], dtype=np.float32)[np.asarray(image.dataobj).astype(int)]
    nib.save(nib.Nifti1Image(labels, image.affine), path)
    return folder


def test_data_check_notes_rounded_labels_once(scaled: Path, znormseg: Call) -> None:
    ended = znormseg("data", "check", scaled)
    assert ended.code == 0, ended.out
    assert (ended.out + ended.err).count("label values 1.003922, 1.992157 were rounded to 1, 2") == 1


def test_evaluate_scores_rounded_labels_and_warns(scaled: Path, phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    label = find_cases(phantoms)[0].label
    assert label is not None
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / label.name).write_bytes(label.read_bytes())
    ended = znormseg("evaluate", tmp_path / "sets", scaled, "--json")
    assert ended.code == 0, ended.err
    assert [values["dice"] for values in json.loads(ended.out)["regions"].values()] == [1.0, 1.0, 1.0]
    assert "were rounded to 1, 2" in ended.err
