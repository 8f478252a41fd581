"""Prediction: label maps on exactly the input's grid, in any voxel order, and how bad input is handled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import torch

Call = Callable[..., Any]

CASE = "BraTS2021_00000"


def load(path: Path) -> Any:
    return nib.load(path)


def voxels(path: Path) -> npt.NDArray[np.uint8]:
    return np.asarray(load(path).dataobj)


def restored(source: Path, folder: Path, case: str, change: Callable[[Any], Any], ending: str = ".nii.gz") -> Path:
    """Store a changed copy of each image of a case under another case id."""
    place = folder / case
    place.mkdir(parents=True)
    for path in source.glob("*.nii.gz"):
        kind = path.name.removesuffix(".nii.gz").rpartition("_")[2]
        nib.save(change(load(path)), place / f"{case}_{kind}{ending}")
    return place


def assert_same_grid(label_map: Path, image: Path) -> None:
    one, other = load(label_map), load(image)
    assert one.shape == other.shape
    assert np.array_equal(one.affine, other.affine)
    for form in ("get_qform", "get_sform"):
        (affine, code), (expected, expected_code) = (getattr(i, form)(coded=True) for i in (one, other))
        assert code == expected_code
        assert (affine is None) == (expected is None)
        assert affine is None or np.array_equal(affine, expected)
    assert one.header.get_xyzt_units() == other.header.get_xyzt_units()
    assert one.header.get_zooms() == other.header.get_zooms()
    assert np.array_equal(one.header["pixdim"], other.header["pixdim"])


@pytest.fixture(scope="session")
def label_maps(tiny_run: Path, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tiny run predicts for all phantoms."""
    from app.inference.backends.choose import choose_backend
    from app.inference.batch.predict import predict
    from app.inference.model import load_model
    from app.system.device import RuntimeConfig
    from data.datasets.layouts import find_cases

    runtime, folder = choose_backend("auto", RuntimeConfig(device="cpu")), tmp_path_factory.mktemp("label_maps")
    predict(load_model(tiny_run, runtime), find_cases(phantoms), folder, runtime=runtime)
    return folder


@pytest.fixture
def two_cases(phantoms: Path, tmp_path: Path) -> Path:
    """A data set of two cases that a test may spoil."""
    for case in sorted(phantoms.iterdir())[:2]:
        shutil.copytree(case, tmp_path / "two" / case.name)
    return tmp_path / "two"


def files_of(case: Path) -> list[str | Path]:
    """A case's images as the options of ``predict``."""
    endings = {"--t1": "t1", "--t1c": "t1ce", "--t2": "t2", "--flair": "flair"}
    return [word for option, end in endings.items() for word in (option, case / f"{case.name}_{end}.nii.gz")]


# The grid


def test_a_label_map_is_on_the_grid_of_its_case(label_maps: Path, phantoms: Path) -> None:
    for case in sorted(phantoms.iterdir()):
        assert_same_grid(label_maps / f"{case.name}.nii.gz", case / f"{case.name}_t1ce.nii.gz")


def test_a_label_map_is_uint8_and_contains_every_tissue(label_maps: Path) -> None:
    maps = [load(path) for path in sorted(label_maps.glob("*.nii.gz"))]
    assert {image.get_data_dtype() for image in maps} == {np.dtype(np.uint8)}
    assert set(np.unique([np.asarray(image.dataobj) for image in maps])) == {0, 1, 2, 4}


def test_everything_outside_the_brain_is_background(label_maps: Path, phantoms: Path) -> None:
    for case in sorted(phantoms.iterdir()):
        images = [voxels(path) for path in case.glob("*.nii.gz") if "_seg" not in path.name]
        outside = ~np.any([image != 0 for image in images], axis=0)
        assert not voxels(label_maps / f"{case.name}.nii.gz")[outside].any()


def other_units(image: Any) -> Any:
    image.header.set_xyzt_units("micron", "msec")
    return image


def trailing_axis(image: Any) -> Any:
    return nib.Nifti1Image(np.asarray(image.dataobj)[..., None], image.affine)


def test_the_units_of_the_header_are_kept(tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    case = restored(phantoms / CASE, tmp_path, "a", other_units)
    assert znormseg("predict", tiny_run, case, tmp_path / "out").code == 0
    assert_same_grid(tmp_path / "out" / "a.nii.gz", case / "a_t1ce.nii.gz")


def test_a_trailing_axis_of_one_is_dropped(tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    case = restored(phantoms / CASE, tmp_path, "a", trailing_axis)
    assert znormseg("predict", tiny_run, case, tmp_path / "out").code == 0
    image = load(tmp_path / "out" / "a.nii.gz")
    assert image.shape == load(case / "a_t1ce.nii.gz").shape[:3]
    assert np.array_equal(image.affine, load(case / "a_t1ce.nii.gz").affine)


def test_a_case_of_another_spacing_keeps_its_grid(
    tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    case = restored(phantoms / CASE, tmp_path, "a", lambda image: image.slicer[::2, :, ::2])
    assert znormseg("predict", tiny_run, case, tmp_path / "out").code == 0
    assert_same_grid(tmp_path / "out" / "a.nii.gz", case / "a_t1ce.nii.gz")


@pytest.mark.slow
def test_the_label_map_of_every_real_case_is_on_its_grid(
    tiny_run: Path, real_cases: Path, tmp_path: Path, znormseg: Call
) -> None:
    from data.datasets.layouts import find_cases

    ended = znormseg("predict", tiny_run, real_cases, tmp_path / "out")
    assert ended.code == 0, ended.err
    for case in find_cases(real_cases):
        assert_same_grid(tmp_path / "out" / f"{case.id}.nii.gz", case.contrasts["t1c"])


def test_another_library_sees_the_label_map_where_the_image_is(label_maps: Path, phantoms: Path) -> None:
    import SimpleITK as sitk  # noqa: N813

    image = sitk.ReadImage(str(phantoms / CASE / f"{CASE}_t1ce.nii.gz"))
    label_map = sitk.ReadImage(str(label_maps / f"{CASE}.nii.gz"))
    assert label_map.GetSize() == image.GetSize()
    assert label_map.GetOrigin() == image.GetOrigin()
    assert label_map.GetDirection() == image.GetDirection()
    assert label_map.GetSpacing() == image.GetSpacing()


# Output


def test_two_predictions_are_byte_for_byte_the_same_even_from_another_process(
    tiny_run: Path, phantoms: Path, label_maps: Path, tmp_path: Path, shell: Call
) -> None:
    assert shell(["znormseg", "predict", tiny_run, phantoms / CASE, tmp_path, "--device", "cpu"]).code == 0
    assert (tmp_path / f"{CASE}.nii.gz").read_bytes() == (label_maps / f"{CASE}.nii.gz").read_bytes()


def test_the_output_folder_contains_exactly_two_files_per_case(label_maps: Path, phantoms: Path) -> None:
    expected = [case.name + ending for case in phantoms.iterdir() for ending in (".json", ".nii.gz")]
    assert sorted(path.name for path in label_maps.iterdir()) == sorted([*expected, "manifest.json"])


def test_the_json_next_to_a_label_map_describes_it_and_its_origin(
    label_maps: Path, phantoms: Path, tiny_run: Path
) -> None:
    content = json.loads((label_maps / f"{CASE}.json").read_text())
    assert content["case"] == CASE
    assert content["labels"] == {"convention": "brats2021", "necrosis": 1, "oedema": 2, "enhancing": 4}
    assert set(content["inputs"]) == {"t1", "t1c", "t2", "flair"}
    assert content["inputs"]["t1c"] == str(phantoms / CASE / f"{CASE}_t1ce.nii.gz")
    assert set(content["seconds"]) == {"read", "compute", "write"}
    assert content["versions"]["torch"] == metadata.version("torch")
    assert content["notice"] == "Research use only; not a medical device."
    best = max((tiny_run / "checkpoints").glob("best-*.json"))
    assert content["weights_sha256"] == json.loads(best.read_text())["sha256"]
    assert content["weights_step"] == json.loads(best.read_text())["step"]


def test_the_volumes_are_those_of_the_label_map(label_maps: Path) -> None:
    labels, voxel_ml = voxels(label_maps / f"{CASE}.nii.gz"), 4.0**3 / 1000
    volumes = json.loads((label_maps / f"{CASE}.json").read_text())["volumes_ml"]
    assert volumes["WT"] == pytest.approx((labels > 0).sum() * voxel_ml, abs=1e-3)
    assert volumes["TC"] == pytest.approx(((labels == 1) | (labels == 4)).sum() * voxel_ml, abs=1e-3)
    assert volumes["ET"] == pytest.approx((labels == 4).sum() * voxel_ml, abs=1e-3)


@pytest.mark.parametrize(("convention", "enhancing"), [("brats2021", 4), ("brats2023", 3)])
def test_the_label_numbers_can_be_chosen(
    *,
    convention: str,
    enhancing: int,
    tiny_run: Path,
    phantoms: Path,
    label_maps: Path,
    tmp_path: Path,
    znormseg: Call,
) -> None:
    assert znormseg("predict", tiny_run, phantoms / CASE, tmp_path, "--labels", convention).code == 0
    as_named = voxels(label_maps / f"{CASE}.nii.gz")
    expected = np.where(as_named == 4, enhancing, as_named)
    assert np.array_equal(voxels(tmp_path / f"{CASE}.nii.gz"), expected)
    assert json.loads((tmp_path / f"{CASE}.json").read_text())["labels"]["enhancing"] == enhancing


def test_a_case_named_as_in_2023_gets_the_label_numbers_of_2023(
    tiny_run: Path, phantoms: Path, label_maps: Path, tmp_path: Path, znormseg: Call
) -> None:
    names = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f"}
    (tmp_path / "in").mkdir()
    for old, new in names.items():
        shutil.copy(phantoms / CASE / f"{CASE}_{old}.nii.gz", tmp_path / "in" / f"BraTS-GLI-00000-000-{new}.nii.gz")
    assert znormseg("predict", tiny_run, tmp_path / "in", tmp_path / "out").code == 0
    labels = voxels(tmp_path / "out" / "BraTS-GLI-00000-000.nii.gz")
    assert np.array_equal(labels == 3, voxels(label_maps / f"{CASE}.nii.gz") == 4)
    assert 4 not in labels


def test_predicting_again_replaces_existing_files(
    tiny_run: Path, phantoms: Path, label_maps: Path, tmp_path: Path, znormseg: Call
) -> None:
    (tmp_path / f"{CASE}.nii.gz").write_text("old")
    assert znormseg("predict", tiny_run, phantoms / CASE, tmp_path).code == 0
    assert np.array_equal(voxels(tmp_path / f"{CASE}.nii.gz"), voxels(label_maps / f"{CASE}.nii.gz"))


# Four files


def test_four_files_give_the_same_label_map_as_their_folder(
    tiny_run: Path, phantoms: Path, label_maps: Path, tmp_path: Path, znormseg: Call
) -> None:
    assert znormseg("predict", tiny_run, tmp_path, *files_of(phantoms / CASE)).code == 0
    assert (tmp_path / f"{CASE}.nii.gz").read_bytes() == (label_maps / f"{CASE}.nii.gz").read_bytes()


def test_four_files_of_any_name_are_named_after_the_t1c(
    tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    shutil.copy(phantoms / CASE / f"{CASE}_t1ce.nii.gz", tmp_path / "visit 3.nii.gz")
    files = files_of(phantoms / CASE)
    files[3] = tmp_path / "visit 3.nii.gz"
    assert znormseg("predict", tiny_run, tmp_path / "out", *files).code == 0
    assert (tmp_path / "out" / "visit 3.nii.gz").is_file()


def test_an_input_is_never_overwritten(tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    place = tmp_path / "visit.nii.gz"
    shutil.copy(phantoms / CASE / f"{CASE}_t1ce.nii.gz", place)
    before, files = place.read_bytes(), files_of(phantoms / CASE)
    files[3] = place
    ended = znormseg("predict", tiny_run, tmp_path, *files)
    assert place.read_bytes() == before
    assert ended.code == 3


@pytest.mark.parametrize("left_out", range(4))
def test_a_file_missing_from_the_four_is_named(
    left_out: int, tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    files = files_of(phantoms / CASE)
    del files[2 * left_out : 2 * left_out + 2]
    ended = znormseg("predict", tiny_run, tmp_path / "out", *files)
    assert ended.code == 3
    assert f"contrast {['t1', 't1c', 't2', 'flair'][left_out]} is missing" in ended.err


def test_one_of_the_four_that_does_not_exist_is_named(
    tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    files = files_of(phantoms / CASE)
    files[5] = tmp_path / "nowhere.nii.gz"
    ended = znormseg("predict", tiny_run, tmp_path / "out", *files)
    assert ended.code == 3
    assert f"{tmp_path / 'nowhere.nii.gz'}: no such file" in ended.err


def test_an_input_folder_together_with_the_four_files_is_refused(
    tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    ended = znormseg("predict", tiny_run, phantoms / CASE, tmp_path, *files_of(phantoms / CASE))
    assert ended.code == 2
    assert "give only RUN and OUTPUT" in ended.err


# Bad input


def test_one_broken_case_does_not_stop_the_others(
    two_cases: Path, tiny_run: Path, tmp_path: Path, znormseg: Call
) -> None:
    broken = two_cases / CASE / f"{CASE}_t2.nii.gz"
    broken.write_bytes(broken.read_bytes()[:1000])
    ended = znormseg("predict", tiny_run, two_cases, tmp_path / "out", "--json")
    assert ended.code == 6
    assert f"1 of 2 cases failed: {CASE}" in ended.err
    result = json.loads(ended.out)
    assert [case["case"] for case in result["cases"]] == ["BraTS2021_00001"]
    assert str(broken) in result["failures"][CASE]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "BraTS2021_00001.json",
        "BraTS2021_00001.nii.gz",
        "manifest.json",
    ]


def test_a_constant_case_does_not_stop_the_others(
    two_cases: Path, tiny_run: Path, tmp_path: Path, znormseg: Call
) -> None:
    for path in (two_cases / CASE).glob("*.nii.gz"):
        image = load(path)
        nib.save(nib.Nifti1Image((np.asarray(image.dataobj) > 0).astype(np.float32), image.affine), path)
    ended = znormseg("predict", tiny_run, two_cases, tmp_path / "out")
    assert ended.code == 6, ended.err
    assert CASE in ended.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--device", "nonsense"], 4, "auto, cpu, cuda or cuda:N, got 'nonsense'"),
        (["--labels", "brats1999"], 2, "'brats1999' is not one of 'brats2021', 'brats2023'"),
        (["--label", "brats2021"], 2, "No such option"),
    ],
)
def test_an_invalid_option_value_is_refused_with_the_valid_ones(
    *, arguments: Sequence[str], code: int, words: str, tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    ended = znormseg("predict", tiny_run, phantoms / CASE, tmp_path / "out", *arguments)
    assert ended.code == code
    assert words in ended.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_on_a_machine_without_a_gpu_is_a_machine_error(
    tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    ended = znormseg("predict", tiny_run, phantoms / CASE, tmp_path / "out", "--device", "cuda")
    assert ended.code == 7
    assert "--device cpu" in ended.err


def test_an_input_folder_that_does_not_exist_is_refused(tiny_run: Path, tmp_path: Path, znormseg: Call) -> None:
    ended = znormseg("predict", tiny_run, tmp_path / "nowhere", tmp_path / "out")
    assert ended.code == 3
    assert f"{tmp_path / 'nowhere'}: does not exist" in ended.err


def test_a_missing_output_is_a_usage_error(tiny_run: Path, phantoms: Path, znormseg: Call) -> None:
    ended = znormseg("predict", tiny_run, phantoms)
    assert ended.code == 2
    assert "give RUN, INPUT and OUTPUT" in ended.err
