"""Mirrored images, probabilities, uncertainty: what must hold for any network."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from app.config.inference import PredictOptions
from app.inference.backends.executors import TorchEngine
from app.inference.confidence import bit_steps, entropy_bits, measure_confidence, nested, probability_steps
from app.inference.model import Model, load_model
from app.inference.probabilities import FLIPS, predict_answer
from app.system.device import RuntimeConfig, choose_runtime
from data.datasets.layouts import find_cases
from data.labels import REGIONS
from data.nifti import SHARE_STEPS
from data.preprocess import Prepared, prepare

Call = Callable[..., Any]

CASE = "BraTS2021_00000"
RUNTIME = choose_runtime(RuntimeConfig(device="cpu", precision="float32"))
CENTRED = hnp.arrays(
    np.float32, (3, 2, 2, 2), elements=st.floats(-0.5, 0.5, width=32, allow_nan=False, allow_subnormal=False)
)


class Pointwise(nn.Module):
    """Logits of a voxel computed only from that voxel."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.stack([image[:, 0] - 0.5, image[:, 1], image[:, 2] + image[:, 3]], dim=1)


def pointwise_model(model: Model) -> Model:
    """A model whose network is that one."""
    assert isinstance(model.engine, TorchEngine)
    engine = copy.copy(model.engine)
    engine.network = cast(Any, Pointwise().eval())
    return replace(model, engine=engine)


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> Model:
    return load_model(tiny_run, RUNTIME)


@pytest.fixture(scope="module")
def prepared(phantoms: Path, model: Model) -> Prepared:
    return prepare(find_cases(phantoms)[0], spacing_mm=model.spacing_mm)


@pytest.fixture(scope="module")
def outcome(tiny_run: Path, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``predict`` writes for one phantom with everything asked for."""
    from app.inference.batch.predict import predict

    folder = tmp_path_factory.mktemp("everything")
    options = PredictOptions(tta=True, save_probabilities=True, uncertainty=True)
    predict(load_model(tiny_run, RUNTIME), find_cases(phantoms)[:1], folder, runtime=RUNTIME, options=options)
    return folder


def read(path: Path) -> Any:
    image: Any = nib.load(path)
    return image.get_fdata(dtype=np.float32)


# Mirrored images


def test_a_volume_has_eight_mirrorings_and_the_first_is_the_identity() -> None:
    assert len(set(FLIPS)) == 8
    assert FLIPS[0] == ()


def test_a_voxelwise_network_gives_the_same_result_with_mirrored_images(model: Model, prepared: Prepared) -> None:
    pointwise = pointwise_model(model)
    once, eightfold = (
        predict_answer(pointwise, prepared, RUNTIME, options=PredictOptions(tta=tta)).centred for tta in (False, True)
    )
    assert np.allclose(once, eightfold, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_prediction_of_a_mirrored_case_is_the_mirrored_prediction(
    axis: int, model: Model, prepared: Prepared
) -> None:
    mirrored = replace(
        prepared,
        image=np.ascontiguousarray(np.flip(prepared.image, axis + 1)),
        brain=np.ascontiguousarray(np.flip(prepared.brain, axis)),
    )
    one, other = (
        predict_answer(model, case, RUNTIME, options=PredictOptions(tta=True)).centred for case in (prepared, mirrored)
    )
    assert np.allclose(np.flip(one, axis + 1), other, atol=1e-5)
    assert not np.allclose(one, other, atol=1e-2)


def test_the_prediction_is_the_mean_over_mirrored_images(model: Model, prepared: Prepared) -> None:
    answers = []
    for axes in FLIPS:
        seen = replace(
            prepared,
            image=np.flip(prepared.image, axes).copy(),
            brain=np.flip(prepared.brain, tuple(axis - 1 for axis in axes)).copy(),
        )
        answers.append(np.flip(predict_answer(model, seen, RUNTIME).centred, axes))
    eightfold = predict_answer(model, prepared, RUNTIME, options=PredictOptions(tta=True))
    assert np.allclose(np.mean(answers, axis=0), eightfold.centred, atol=1e-5)
    assert (eightfold.networks, eightfold.flips, len(eightfold.volumes_voxels)) == (1, 8, 8)


def test_disagreement_is_the_entropy_beyond_that_of_single_predictions(model: Model, prepared: Prepared) -> None:
    answer = predict_answer(model, prepared, RUNTIME, options=PredictOptions(tta=True, uncertainty=True))
    assert answer.disagreement is not None
    assert 0 < answer.disagreement.max() <= 1
    assert (answer.disagreement <= entropy_bits(answer.centred) + 1e-5).all()
    assert not answer.disagreement[:, ~prepared.brain].any()


def test_equal_predictions_do_not_disagree(model: Model, prepared: Prepared) -> None:
    even = replace(prepared, image=np.broadcast_to(prepared.brain, prepared.image.shape).astype(np.float32))
    answer = predict_answer(pointwise_model(model), even, RUNTIME, options=PredictOptions(tta=True, uncertainty=True))
    assert answer.disagreement is not None
    assert answer.disagreement.max() < 1e-5


def test_a_single_prediction_has_no_disagreement(model: Model, prepared: Prepared) -> None:
    answer = predict_answer(model, prepared, RUNTIME, options=PredictOptions(uncertainty=True))
    assert answer.disagreement is None
    assert len(answer.volumes_voxels) == 1


# Probabilities and entropy as numbers


@given(CENTRED)
def test_nested_probabilities_of_a_smaller_region_are_never_larger(centred: Any) -> None:
    shares = nested(centred)
    assert (shares[0] == centred[0]).all()
    assert (shares[:-1] >= shares[1:]).all()
    assert ((shares > 0) == np.logical_and.accumulate(centred > 0, axis=0)).all()


@given(CENTRED, st.integers(1, 255))
def test_storing_a_probability_keeps_its_side_of_every_threshold(centred: Any, threshold: int) -> None:
    stored = probability_steps(centred)
    assert np.abs(stored / SHARE_STEPS - 0.5 - centred.astype(np.float64)).max() <= 1 / SHARE_STEPS
    assert ((stored / SHARE_STEPS > threshold / 256) == (centred > np.float32(threshold / 256 - 0.5))).all()


@given(CENTRED)
def test_entropy_is_symmetric_and_between_0_and_1_bit(centred: Any) -> None:
    bits = entropy_bits(centred)
    assert (bits >= 0).all()
    assert (bits <= 1).all()
    assert np.allclose(bits, entropy_bits(-centred), atol=1e-6)


def test_entropy_is_zero_at_certainty_and_largest_at_one_half() -> None:
    assert bit_steps(entropy_bits(np.array([-0.5, 0.5, 0.0], dtype=np.float32))).tolist() == [0, 0, SHARE_STEPS]


@settings(max_examples=20)
@given(CENTRED)
def test_soft_volumes_are_nested_and_bounded_by_the_volume(centred: Any) -> None:
    shares = nested(centred)
    found = measure_confidence(
        shares > 0,
        shares,
        (1.0, 2.0, 5.0),
        answer_voxels=[(8, 4, 0)],
        answer_spacing_mm=(1.0, 1.0, 1.0),
        networks=1,
        flips=1,
    )
    soft = [found.soft_volumes_ml[region] for region in REGIONS]
    assert soft == sorted(soft, reverse=True)
    assert 0 <= soft[2] <= soft[0] <= 0.08 + 1e-6
    assert all(share is None or 0.5 <= share <= 1 for share in found.confidence.values())
    assert found.volume_range_ml is None


def test_components_and_the_range_over_predictions_are_reported() -> None:
    masks = np.zeros((3, 5, 1, 1), dtype=bool)
    masks[0, [0, 1, 2, 4]] = True
    found = measure_confidence(
        masks,
        np.where(masks, np.float32(0.25), np.float32(-0.5)),
        (10.0, 10.0, 10.0),
        answer_voxels=[(3, 0, 0), (5, 1, 0)],
        answer_spacing_mm=(10.0, 10.0, 10.0),
        networks=2,
        flips=1,
    )
    assert found.components == {"WT": 2, "TC": 0, "ET": 0}
    assert found.largest_component == 0.75
    assert found.confidence == {"WT": 0.75, "TC": None, "ET": None}
    assert found.soft_volumes_ml["WT"] == pytest.approx(3.0)
    assert found.to_json()["answers"]["volume_range_ml"]["WT"] == [3.0, 5.0]


# Files


def test_probabilities_thresholded_at_one_half_give_the_label_map(outcome: Path) -> None:
    shares, labels = read(outcome / f"{CASE}_probabilities.nii.gz"), read(outcome / f"{CASE}.nii.gz")
    assert labels.any()
    assert np.array_equal(shares[..., 0] > 0.5, labels > 0)
    assert np.array_equal(shares[..., 1] > 0.5, (labels == 1) | (labels == 4))
    assert np.array_equal(shares[..., 2] > 0.5, labels == 4)


def test_probabilities_in_a_file_are_nested_for_every_reader(outcome: Path) -> None:
    import SimpleITK as sitk  # noqa: N813

    path = outcome / f"{CASE}_probabilities.nii.gz"
    shares = read(path)
    assert (shares[..., :-1] >= shares[..., 1:]).all()
    assert 0.9 < shares.max() <= 1
    assert np.allclose(sitk.GetArrayFromImage(sitk.ReadImage(str(path))).transpose(3, 2, 1, 0), shares, atol=1e-6)


def test_uncertainty_is_the_entropy_of_the_probabilities_in_the_file(outcome: Path) -> None:
    shares, bits = (read(outcome / f"{CASE}_{name}.nii.gz") for name in ("probabilities", "uncertainty"))
    assert np.allclose(entropy_bits(shares - np.float32(0.5)), bits, atol=1e-3)


@pytest.mark.parametrize("name", ["probabilities", "uncertainty", "disagreement"])
def test_files_next_to_a_label_map_are_on_its_grid(name: str, outcome: Path, phantoms: Path) -> None:
    image: Any = nib.load(outcome / f"{CASE}_{name}.nii.gz")
    reference: Any = nib.load(phantoms / CASE / f"{CASE}_t1ce.nii.gz")
    assert image.shape == (*reference.shape, 3)
    assert np.array_equal(image.affine, reference.affine)
    for field in ("qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x", "xyzt_units"):
        assert np.array_equal(image.header[field], reference.header[field]), field
    assert image.header.get_zooms()[:3] == reference.header.get_zooms()
    assert b"not a medical device" in image.header["descrip"].item()


def test_no_partial_file_is_left(outcome: Path) -> None:
    endings = [".json", ".nii.gz", "_disagreement.nii.gz", "_probabilities.nii.gz", "_uncertainty.nii.gz"]
    wanted = [*(CASE + ending for ending in endings), "manifest.json"]
    assert sorted(path.name for path in outcome.iterdir() if not path.name.startswith(".")) == sorted(wanted)


def test_the_json_lists_files_and_predictions(outcome: Path) -> None:
    content = json.loads((outcome / f"{CASE}.json").read_text())
    assert content["files"]["disagreement"] == str(outcome / f"{CASE}_disagreement.nii.gz")
    assert (content["answers"]["networks"], content["answers"]["flips"]) == (1, 8)
    least, largest = content["answers"]["volume_range_ml"]["WT"]
    assert least < largest


def test_evaluate_reads_the_label_maps_and_not_the_files_next_to_them(
    outcome: Path, phantoms: Path, znormseg: Call
) -> None:
    ended = znormseg("evaluate", outcome, phantoms, "--json")
    assert ended.code == 0, ended.err
    assert [case["case"] for case in json.loads(ended.out)["cases"]] == [CASE]
    assert json.loads(ended.out)["missing_references"] == []


def test_uncertainty_of_one_prediction_is_its_entropy_and_reported_as_that(
    tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    ended = znormseg("predict", tiny_run, phantoms / CASE, tmp_path, "--uncertainty", "--json")
    assert ended.code == 0, ended.err
    assert "uncertainty is computed from a single prediction" in ended.err
    content = json.loads(ended.out)["cases"][0]
    assert content["files"]["uncertainty"] == str(tmp_path / f"{CASE}_uncertainty.nii.gz")
    assert content["files"]["disagreement"] is None
    assert content["answers"]["volume_range_ml"] is None


def test_an_image_at_the_path_of_the_probabilities_is_not_overwritten(
    tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    place = tmp_path / f"{CASE}_probabilities.nii.gz"
    shutil.copy(phantoms / CASE / f"{CASE}_t2.nii.gz", place)
    files = {"--t1": "t1", "--t1c": "t1ce", "--flair": "flair"}
    words = [w for option, end in files.items() for w in (option, phantoms / CASE / f"{CASE}_{end}.nii.gz")]
    ended = znormseg("predict", tiny_run, tmp_path, *words, "--t2", place, "--save-probabilities")
    assert ended.code == 3
    assert "the file of probabilities would replace its own t2" in ended.err
