"""What only a GPU can show. ``make bench-gpu`` runs these; ``make test`` does not.

``ZNORMSEG_GPU_TESTS=cpu python -m pytest -m gpu`` runs them on a CPU, to test the tests themselves.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from app.config.inference import PredictOptions
from app.config.load import load_config
from app.inference.backends.executors import TorchEngine
from app.inference.backends.torch_backend import norm_channels_last
from app.inference.model import Model, load_model
from app.inference.probabilities import fallback_for, predict_answer, predict_masks
from app.runs.checkpoints import load_newest
from app.runs.folder import read_metrics
from app.system.device import Runtime, RuntimeConfig, choose_runtime
from app.training.run import resume, start
from app.training.validation import scored, scored_on_device
from data.datasets.layouts import find_cases
from data.datasets.source import DataSource
from data.preprocess import Prepared, prepare
from models import build_network
from znorm import EPS, zscore_
from znorm.self_check import zscore_reference

DEVICE = os.environ.get("ZNORMSEG_GPU_TESTS", "cuda:0")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE != "cpu" and not torch.cuda.is_available(), reason="there is no GPU"),
]
#: Overrides that switch off every augmentation.
WITHOUT_AUGMENTATION = [
    f"augment.{name}=0" for name in vars(load_config("resunet-znorm").augment) if name.endswith("_probability")
]
real = pytest.mark.skipif(DEVICE == "cpu", reason="needs the memory of a GPU")


def runtime_of(device: str, precision: Any = "float32") -> Runtime:
    return choose_runtime(RuntimeConfig(device=device, precision=precision))


@pytest.fixture(scope="module")
def on_cpu(tiny_run: Path) -> Model:
    return load_model(tiny_run, runtime_of("cpu"))


@pytest.fixture
def on_gpu(tiny_run: Path) -> Model:
    return load_model(tiny_run, runtime_of(DEVICE))


@pytest.fixture(scope="module")
def prepared(phantoms: Path, on_cpu: Model) -> Prepared:
    return prepare(find_cases(phantoms)[0], spacing_mm=on_cpu.spacing_mm)


# Prediction


@pytest.mark.parametrize("options", [PredictOptions(), PredictOptions(tta=True, uncertainty=True)], ids=["one", "tta"])
@pytest.mark.parametrize("crop", [True, False])
def test_a_gpu_predicts_the_same_as_a_cpu(
    options: PredictOptions, crop: bool, on_cpu: Model, on_gpu: Model, prepared: Prepared
) -> None:
    models = [(replace(on_cpu, crop=crop), runtime_of("cpu")), (replace(on_gpu, crop=crop), runtime_of(DEVICE))]
    one, other = (predict_answer(model, prepared, runtime, options=options) for model, runtime in models)
    np.testing.assert_allclose(one.centred, other.centred, atol=5e-3)  # convolutions round to TF32
    masks = [predict_masks(on_cpu, prepared, answer.centred) for answer in (one, other)]
    assert (masks[0] == masks[1]).mean() > 0.999


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_changes_few_voxels(precision: str, tiny_run: Path, on_cpu: Model, prepared: Prepared) -> None:
    if DEVICE == "cpu" and precision == "float16":
        pytest.skip("a CPU is not used in float16")
    runtime = runtime_of(DEVICE, precision)
    lower = predict_answer(load_model(tiny_run, runtime), prepared, runtime)
    full = predict_answer(on_cpu, prepared, runtime_of("cpu"))
    masks = [predict_masks(on_cpu, prepared, answer.centred) for answer in (lower, full)]
    assert (masks[0] == masks[1]).mean() > 0.99


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("affine", [True, False])
def test_the_channels_last_norm_equals_the_instance_norm(samples: int, dtype: torch.dtype, affine: bool) -> None:
    x = torch.randn(samples, 8, 6, 10, 12, device=DEVICE).mul_(3).add_(2)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last_3d)
    weight, bias = (torch.randn(8, device=DEVICE) if affine else None for _ in range(2))
    found = norm_channels_last(x, weight=weight, bias=bias, eps=1e-5)
    expected = functional.instance_norm(x.float(), weight=weight, bias=bias, eps=1e-5)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=1e-5 if dtype is torch.float32 else 3e-2)


def test_validation_scores_on_a_gpu_equal_those_of_numpy() -> None:
    logits = torch.randn(3, 40, 50, 30, device=DEVICE)
    expected = np.random.default_rng(0).integers(0, 4, (40, 50, 30)).astype(np.uint8)
    (codes, scores), (codes_of_gpu, scores_of_gpu) = (
        scored(logits.clone(), expected),
        scored_on_device(logits, expected),
    )
    assert np.array_equal(codes, codes_of_gpu)
    assert scores == scores_of_gpu


@real
@pytest.mark.parametrize("megabytes", [0, 64, 512])
def test_a_gpu_without_free_memory_falls_back_to_a_plan_that_fits(
    megabytes: int, on_cpu: Model, on_gpu: Model, prepared: Prepared
) -> None:
    """All but so much of the memory is taken, with torch's own allocations."""
    runtime, fallback = runtime_of(DEVICE), fallback_for(PredictOptions())
    expected = predict_answer(on_gpu, prepared, runtime)
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(0)[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(0) + megabytes * 2**20) / total, 0)
    try:
        options = PredictOptions(window=(512, 512, 512))
        found = predict_answer(on_gpu, prepared, runtime, options=options, fallback=fallback)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    assert fallback.sentences
    masks = [predict_masks(on_cpu, prepared, answer.centred) for answer in (found, expected)]
    assert (masks[0] == masks[1]).mean() > 0.95


@pytest.mark.parametrize("mode", ["default", "cuda graph"])
def test_a_compiled_network_equals_an_eager_one(mode: str, on_gpu: Model) -> None:
    assert isinstance(on_gpu.engine, TorchEngine)
    network, image = on_gpu.network, torch.randn(1, 4, 16, 16, 16, device=DEVICE)
    with torch.inference_mode():
        eager = network(image)
        if mode == "default":
            found = torch.compile(network, fullgraph=True)(image)
        elif DEVICE == "cpu":
            pytest.skip("a CPU has no CUDA graphs")
        else:
            found = _replayed(network, image)
    torch.testing.assert_close(found, eager, rtol=1e-2, atol=1e-2)


def _replayed(network: torch.nn.Module, image: Tensor) -> Tensor:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        network(image)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer: Tensor = network(image)
    graph.replay()
    return answer


# Training


def settings(device: str, *more: str) -> list[str]:
    return [
        "network.channels=[4, 8]",
        "network.residual_units=1",
        "training.patch_voxels=[16, 16, 16]",
        "training.batch_size=2",
        "training.steps=6",
        "training.validations=2",
        f"runtime.device={device}",
        *more,
    ]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run) if record["kind"] == "train"]


def weights(run: Path) -> dict[str, Tensor]:
    found = load_newest(run / "checkpoints", "last")
    assert found is not None
    return dict(found.weights)


def trained(phantoms: Path, run: Path, *more: str, device: str = DEVICE) -> Path:
    start(DataSource(phantoms), run, load_config("resunet-znorm", settings(device, *more)))
    return run


@pytest.mark.parametrize("rule", ["none", "clip", "znorm"])
def test_a_gpu_takes_the_same_steps_as_a_cpu(rule: str, phantoms: Path, tmp_path: Path) -> None:
    """With the same patches; augmentation draws on the device, so it is off."""
    more = [f"gradient.transform={rule}", "runtime.precision=float32", *WITHOUT_AUGMENTATION]
    one, other = (trained(phantoms, tmp_path / device, *more, device=device) for device in ("cpu", DEVICE))
    assert losses(one) == pytest.approx(losses(other), rel=2e-2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_two_deterministic_runs_are_equal(precision: str, phantoms: Path, tmp_path: Path) -> None:
    if DEVICE == "cpu" and precision == "float16":
        pytest.skip("a CPU is not used in float16")
    more = ["runtime.deterministic=true", f"runtime.precision={precision}"]
    try:
        one, other = (weights(trained(phantoms, tmp_path / name, *more)) for name in ("one", "other"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_takes_the_same_steps_as_an_uninterrupted_one(phantoms: Path, tmp_path: Path) -> None:
    more = ["runtime.deterministic=true", "training.schedule=constant", "training.warmup=0"]
    try:
        whole = trained(phantoms, tmp_path / "whole", *more)
        part = trained(phantoms, tmp_path / "part", *more, "training.steps=3")
        config = load_config("resunet-znorm", settings(DEVICE, *more))
        resume(DataSource(phantoms), part, config, allow=["training.steps"])
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses(part) == losses(whole)


# Kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_zscore_kernels_agree_with_the_reference(dtype: torch.dtype) -> None:
    config = load_config("resunet-znorm")
    network = build_network(config.network, in_channels=4, out_channels=3)
    gradients = [torch.randn_like(one).mul_(1e-4).to(DEVICE, dtype) for one in network.parameters() if one.dim() > 1]
    expected = [zscore_reference(one.cpu(), EPS) for one in gradients]
    zscore_(gradients)
    for found, other in zip(gradients, expected, strict=True):
        tolerance = 1e-4 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(found.double().cpu(), other, rtol=tolerance, atol=tolerance)
