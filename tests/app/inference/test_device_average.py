"""Answers averaged on a device: what numpy computes, here with tensors in CPU memory in place of a GPU's."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.config.inference import PredictOptions
from app.inference import device_average, probabilities
from app.inference.answer_mean import ArrayMean, MeanAnswer
from app.inference.device_average import DeviceVolume, TensorMean, fetch_tensors, tensor_answer
from app.inference.model import Model, load_model
from app.inference.probabilities import MeanPrediction, fallback_for, predict_answer, predict_masks
from app.inference.sliding_window.numpy_blend import resized
from app.system.device import RuntimeConfig, choose_runtime
from data.datasets.layouts import find_cases
from data.preprocess import Prepared, prepare

RUNTIME = choose_runtime(RuntimeConfig(device="cpu", precision="float32"))
THRESHOLDS = (0.5, 0.4, 0.6)


def answers(count: int) -> list[Any]:
    random = np.random.default_rng(0)
    return [random.uniform(-0.5, 0.5, (3, 6, 5, 4)).astype(np.float32) for _ in range(count)]


BRAIN = np.random.default_rng(1).random((6, 5, 4)) > 0.3


def same(one: MeanAnswer, other: MeanAnswer) -> None:
    assert one.volumes_voxels == other.volumes_voxels
    np.testing.assert_allclose(one.centred, other.centred, atol=1e-6)
    assert one.centred.dtype == other.centred.dtype
    assert (one.disagreement is None) == (other.disagreement is None)
    if one.disagreement is not None and other.disagreement is not None:
        np.testing.assert_allclose(one.disagreement, other.disagreement, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("uncertainty", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_tensors_are_averaged_like_arrays(count: int, uncertainty: bool, dtype: Any) -> None:
    arrays = ArrayMean(BRAIN, THRESHOLDS, uncertainty=uncertainty)
    tensors = TensorMean(BRAIN, THRESHOLDS, uncertainty=uncertainty)
    for answer in answers(count):
        arrays.add(answer.astype(dtype))
        tensors.add(torch.from_numpy(answer.astype(dtype)))
    if dtype is np.float32:
        same(tensors.result(), arrays.result())
    else:
        np.testing.assert_allclose(tensors.result().centred, arrays.result().centred, atol=2e-3)


def test_the_mean_of_equal_predictions_is_their_value() -> None:
    tensors = TensorMean(np.ones_like(BRAIN), THRESHOLDS, uncertainty=False)
    (answer,) = answers(1)
    for _ in range(5):
        tensors.add(torch.from_numpy(answer.copy()))
    assert np.array_equal(tensors.result().centred, answer)


@pytest.mark.parametrize("uncertainty", [False, True])
def test_a_mean_moved_off_the_device_continues_in_numpy(uncertainty: bool) -> None:
    arrays = ArrayMean(BRAIN, THRESHOLDS, uncertainty=uncertainty)
    tensors = TensorMean(BRAIN, THRESHOLDS, uncertainty=uncertainty)
    for answer in answers(3):
        arrays.add(answer.copy())
        tensors.add(torch.from_numpy(answer.copy()))
    moved, more = tensors.on_cpu(), answers(4)[3]
    moved.add(more.copy())
    arrays.add(more.copy())
    same(moved.result(), arrays.result())


def test_tensors_are_downloaded_in_one_piece_with_their_dtypes() -> None:
    tensors = [torch.arange(6).reshape(2, 3), torch.rand(4, 2).T, torch.tensor([1, 255], dtype=torch.uint8)]
    for tensor, array in zip(tensors, fetch_tensors(tensors), strict=True):
        assert np.array_equal(array, tensor.numpy())
        assert array.dtype == tensor.numpy().dtype


def test_a_volume_is_uploaded_once_and_mirrored_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[Any] = []
    monkeypatch.setattr(device_average, "upload", lambda tensor, device: uploads.append(1) or tensor.to(device))
    image = np.random.default_rng(0).random((4, 3, 2, 5)).astype(np.float32)
    volume = DeviceVolume(image)
    for axes in probabilities.FLIPS:
        assert np.array_equal(volume.mirrored(axes, torch.device("cpu")).numpy(), np.flip(image, axes))
    assert len(uploads) == 1


def test_logits_become_the_same_prediction_as_with_numpy() -> None:
    logits = np.random.default_rng(0).normal(0, 4, (3, 4, 5, 6)).astype(np.float32)
    found = tensor_answer(torch.from_numpy(logits.copy()), (7, 5, 6), (1, 3)).numpy()
    at_full_size = resized(logits, (7, 5, 6))
    np.testing.assert_allclose(found, np.flip(np.tanh(at_full_size / 2) / 2, (1, 3)), atol=1e-5)


# A whole case, with every answer handled as if it were on a GPU


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> Model:
    return load_model(tiny_run, RUNTIME)


@pytest.fixture(scope="module")
def prepared(phantoms: Path, model: Model) -> Prepared:
    return prepare(find_cases(phantoms)[0], spacing_mm=model.spacing_mm)


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probabilities, "stays_on_cpu", lambda _: False)


def like(answer: MeanPrediction, other: MeanPrediction, model: Model, prepared: Prepared) -> None:
    same(answer, other)
    assert (answer.networks, answer.flips) == (other.networks, other.flips)
    first, second = (predict_masks(model, prepared, one.centred) for one in (answer, other))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("options", [PredictOptions(), PredictOptions(tta=True, uncertainty=True)], ids=["one", "tta"])
@pytest.mark.parametrize("crop", [True, False])
def test_a_case_has_the_same_label_map(
    options: PredictOptions, crop: bool, model: Model, prepared: Prepared, request: pytest.FixtureRequest
) -> None:
    chosen = replace(model, crop=crop)
    expected = predict_answer(chosen, prepared, RUNTIME, options=options)
    request.getfixturevalue("on_a_device")
    like(predict_answer(chosen, prepared, RUNTIME, options=options), expected, model, prepared)


def test_a_case_at_another_spacing_has_the_same_label_map(
    model: Model, phantoms: Path, request: pytest.FixtureRequest
) -> None:
    coarse = replace(model, crop=False, spacing_mm=(5.0, 4.5, 6.0))
    prepared = prepare(find_cases(phantoms)[0], spacing_mm=coarse.spacing_mm)
    expected = predict_answer(coarse, prepared, RUNTIME, options=PredictOptions(tta=True))
    request.getfixturevalue("on_a_device")
    like(predict_answer(coarse, prepared, RUNTIME, options=PredictOptions(tta=True)), expected, coarse, prepared)


def test_running_out_of_memory_between_predictions_moves_the_mean_to_the_cpu(
    model: Model, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = predict_answer(model, prepared, RUNTIME, options=PredictOptions(tta=True))
    on_device = iter([False] * 3)
    monkeypatch.setattr(probabilities, "stays_on_cpu", lambda _: next(on_device, True))
    like(predict_answer(model, prepared, RUNTIME, options=PredictOptions(tta=True)), expected, model, prepared)


@pytest.mark.parametrize("failing", [1, 3, 9], ids=["first answer", "third answer", "result"])
def test_running_out_of_memory_while_averaging_moves_the_mean_to_the_cpu(
    failing: int, model: Model, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = PredictOptions(tta=True, uncertainty=True)
    entropy, calls = device_average._entropy_bits, itertools.count(1)
    expected = predict_answer(model, prepared, RUNTIME, options=options)

    def short(centred: torch.Tensor) -> torch.Tensor:
        if next(calls) == failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return entropy(centred)

    monkeypatch.setattr(probabilities, "stays_on_cpu", lambda _: False)
    monkeypatch.setattr(device_average, "_entropy_bits", short)
    fallback = fallback_for(options)
    found = predict_answer(model, prepared, RUNTIME, options=options, fallback=fallback)
    like(found, expected, model, prepared)
    assert fallback.sentences == ["out of memory on the GPU while answers were averaged; continued on the CPU"]
