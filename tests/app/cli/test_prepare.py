"""``data prepare`` and ``predict --prepare``: what they accept, write and refuse."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

Call = Callable[..., Any]

CASE = "BraTS2021_00000"
ENDINGS = {"--t1": "t1", "--t1c": "t1ce", "--t2": "t2", "--flair": "flair"}


@pytest.fixture(scope="session")
def scans(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A case folder whose T2 has only every second slice and whose FLAIR is shifted by 9 mm."""
    place = tmp_path_factory.mktemp("scans") / CASE
    shutil.copytree(phantoms / CASE, place)
    t2, flair = (nib.Nifti1Image.from_filename(place / f"{CASE}_{ending}.nii.gz") for ending in ("t2", "flair"))
    nib.save(t2.slicer[:, :, ::2], place / f"{CASE}_t2.nii.gz")
    moved = flair.affine.copy()
    moved[:3, 3] += (9, -6, 3)
    nib.save(
        nib.Nifti1Image(np.asarray(flair.dataobj)[::-1], moved @ flip(flair.shape[0])), place / f"{CASE}_flair.nii.gz"
    )
    return place


def flip(count: int) -> Any:
    matrix = np.diag([-1.0, 1.0, 1.0, 1.0])
    matrix[0, 3] = count - 1
    return matrix


def options(case: Path) -> list[str | Path]:
    """A case's images as options."""
    return [word for option, end in ENDINGS.items() for word in (option, case / f"{CASE}_{end}.nii.gz")]


def same_grid(label_map: Path, image: Path) -> bool:
    one, other = nib.Nifti1Image.from_filename(label_map), nib.Nifti1Image.from_filename(image)
    return one.shape == other.shape and np.array_equal(one.affine, other.affine)


def test_differing_grids_are_an_error_with_a_remedy(
    scans: Path, tiny_run: Path, tmp_path: Path, znormseg: Call
) -> None:
    ended = znormseg("predict", tiny_run, scans, tmp_path / "out")
    assert ended.code == 3
    assert "predict --prepare" in ended.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--space", "t2"], "require --prepare"),
        (["--n4"], "require --prepare"),
        (["--mask", "atlas"], "require --prepare"),
        (["--prepare", "--space", "t3"], "Invalid value for '--space'"),
    ],
)
def test_meaningless_options_are_a_usage_error(
    *, arguments: list[str], words: str, scans: Path, tiny_run: Path, tmp_path: Path, znormseg: Call
) -> None:
    ended = znormseg("predict", tiny_run, scans, tmp_path / "out", *arguments)
    assert ended.code == 2
    assert words in ended.err


def test_a_non_empty_folder_is_left_unchanged(scans: Path, tmp_path: Path, znormseg: Call) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    ended = znormseg("data", "prepare", scans, tmp_path)
    assert ended.code == 3
    assert f"{tmp_path} is not empty" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_instead_of_the_folder_is_refused(scans: Path, tmp_path: Path, znormseg: Call) -> None:
    (tmp_path / "out").write_text("")
    ended = znormseg("data", "prepare", scans, tmp_path / "out")
    assert ended.code == 3
    assert "is a file" in ended.err


def test_a_missing_contrast_is_named_and_nothing_is_written(scans: Path, tmp_path: Path, znormseg: Call) -> None:
    ended = znormseg("data", "prepare", tmp_path / "out", *options(scans)[:6])
    assert ended.code == 3
    assert "contrast flair is missing" in ended.err
    assert not (tmp_path / "out").exists()


def test_a_label_map_that_matches_no_scan_is_refused(phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    case = Path(shutil.copytree(phantoms / CASE, tmp_path / "in" / CASE))
    label = nib.Nifti1Image.from_filename(case / f"{CASE}_seg.nii.gz")
    nib.save(label.slicer[2:, :, :], case / f"{CASE}_seg.nii.gz")
    ended = znormseg("data", "prepare", case, tmp_path / "out")
    assert ended.code == 3
    assert "is not on the grid of any contrast" in ended.err


def test_an_unavailable_mask_is_refused_before_any_work(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, znormseg: Call
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for mask, words in (("synthstrip", "no command mri_synthstrip"), ("brain.nii", "no such file, and none of auto")):
        ended = znormseg("data", "prepare", scans, tmp_path / "out", "--mask", mask)
        assert ended.code == 3
        assert f"--mask {mask}: {words}" in ended.err


def test_a_head_with_skull_is_not_predicted(
    scans: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, znormseg: Call
) -> None:
    from data.native_space import to_brats
    from data.native_space.brain_mask import BrainMask
    from data.native_space.itk import ImageGrid
    from data.native_space.to_brats import BratsCase

    head = np.random.default_rng(0).random((20, 20, 20)).astype(np.float32)
    made = BratsCase(
        id=CASE,
        images=dict.fromkeys(("t1", "t1c", "t2", "flair"), head),
        codes=None,
        grid=ImageGrid(size=(20, 20, 20), affine=np.eye(4)),
        registrations={},
        mask=BrainMask(mask=None, source="none"),
        record={},
        warnings=(),
    )
    monkeypatch.setattr(to_brats, "prepare_native", lambda *_, **__: made)
    ended = znormseg("predict", tiny_run, scans, tmp_path / "out", "--prepare", "--mask", "none")
    assert ended.code == 3
    assert f"case {CASE}, contrast t1, prepared: the background is not 0" in ended.err


def test_whether_a_case_is_finished_depends_on_the_content_of_its_mask_not_its_path(
    tiny_run: Path, tmp_path: Path
) -> None:
    from app.config.inference import PredictOptions
    from app.inference.batch.fingerprint import settings_of
    from app.inference.batch.native import Native
    from app.inference.model import load_model
    from app.system.device import RuntimeConfig, choose_runtime
    from data.native_space.config import PrepareConfig

    model = load_model(tiny_run, choose_runtime(RuntimeConfig(device="cpu")))

    def settings(name: str, content: bytes) -> Any:
        (tmp_path / name).write_bytes(content)
        native = Native(config=PrepareConfig(mask=str(tmp_path / name)))
        return settings_of(model, PredictOptions(), **native.settings())

    assert settings("a.nii", b"one") == settings("b.nii", b"one") != settings("a.nii", b"other")


def test_predict_ignores_a_label_map_and_data_prepare_reads_it(scans: Path, tmp_path: Path) -> None:
    from app.inference.batch.native import Native
    from app.inference.batch.predict import PredictSteps
    from data.datasets.layouts import find_cases
    from data.errors import DataError
    from data.native_space.config import PrepareConfig
    from data.native_space.to_brats import NativeCase, read_native

    (case,) = find_cases(scans)
    (tmp_path / "seg.nii.gz").write_bytes(b"no label map")
    given = dataclasses.replace(case, label=tmp_path / "seg.nii.gz")
    none: Any = None  # neither network nor device is needed to read
    native = Native(config=PrepareConfig())
    steps = PredictSteps(model=none, output=tmp_path / "out", runtime=none, settings={"options": {}}, native=native)
    images = steps.read(given).images
    assert isinstance(images, NativeCase)
    assert images.codes is None
    with pytest.raises(DataError, match="seg"):
        read_native(given)


@pytest.mark.slow
def test_data_prepare_makes_a_case_from_scans(scans: Path, tmp_path: Path, znormseg: Call) -> None:
    ended = znormseg("data", "prepare", scans, tmp_path / "out", "--n4", "--json")
    assert ended.code == 0, ended.err
    record = json.loads(ended.out)["cases"][0]
    assert record == json.loads((tmp_path / "out" / CASE / "prepare.json").read_text())
    assert record["parameters"]["n4"]
    assert record["registrations"]["flair"]["shift_mm"] == pytest.approx(11.2, abs=1.0)
    checked = znormseg("data", "check", tmp_path / "out", "--json")
    assert checked.code == 0, checked.out
    assert json.loads(checked.out)["cases"][0]["shape"] == [237, 237, 153]


@pytest.mark.slow
@pytest.mark.parametrize(("space", "ending"), [(None, "t1ce"), ("t2", "t2"), ("flair", "flair")])
def test_the_prediction_is_on_the_grid_of_the_named_scan(
    *, space: str | None, ending: str, scans: Path, tiny_run: Path, tmp_path: Path, znormseg: Call
) -> None:
    chosen = [] if space is None else ["--space", space]
    asked = [*chosen, "--save-probabilities", "--uncertainty"]
    ended = znormseg("predict", tiny_run, tmp_path, *options(scans), "--prepare", *asked)
    assert ended.code == 0, ended.err
    assert same_grid(tmp_path / f"{CASE}.nii.gz", scans / f"{CASE}_{ending}.nii.gz")
    assert set(np.unique(np.asarray(nib.Nifti1Image.from_filename(tmp_path / f"{CASE}.nii.gz").dataobj))) <= {
        0,
        1,
        2,
        4,
    }
    content = json.loads((tmp_path / f"{CASE}.json").read_text())
    shares = nib.Nifti1Image.from_filename(content["files"]["probabilities"])
    assert np.array_equal(shares.affine, nib.Nifti1Image.from_filename(scans / f"{CASE}_{ending}.nii.gz").affine)
    # A share within 0.001 of one half counts as one half.
    differ = (shares.get_fdata()[..., 0] > 0.5) != (
        np.asarray(nib.Nifti1Image.from_filename(tmp_path / f"{CASE}.nii.gz").dataobj) > 0
    )
    assert np.abs(shares.get_fdata()[..., 0][differ] - 0.5).max(initial=0) < 2e-3
    assert content["space"] == (space or "t1c")
    assert content["prepare"]["mask"]["source"] == "own"


@pytest.mark.slow
def test_a_scan_that_does_not_belong_is_named_and_the_others_continue(
    scans: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    for name in (CASE, "BraTS2021_00001"):
        shutil.copytree(scans if name == CASE else phantoms / name, tmp_path / "in" / name)
    noise = np.random.default_rng(0).random((60, 60, 40)).astype(np.float32)
    nib.save(nib.Nifti1Image(noise, np.diag([4.0, 4, 4, 1])), tmp_path / "in" / CASE / f"{CASE}_t2.nii.gz")
    ended = znormseg("data", "prepare", tmp_path / "in", tmp_path / "out")
    assert ended.code == 6
    assert f"case {CASE}: t2 could not be registered to t1c" in ended.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["BraTS2021_00001"]


@pytest.mark.slow
def test_a_dicom_study_is_prepared_like_a_case(
    phantom_study: Callable[..., Path], tmp_path: Path, znormseg: Call
) -> None:
    from data.datasets.layouts import find_cases

    phantom_study(tmp_path / "study", padded="t2")
    ended = znormseg("data", "prepare", tmp_path / "study", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert ": t2: " in ended.err
    assert "of its voxels are padding" in ended.err
    (made,) = find_cases(tmp_path / "out")
    assert set(made.require().contrasts) == {"t1", "t1c", "t2", "flair"}
