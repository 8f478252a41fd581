"""Out of memory: plans that avoid it, the fallbacks when it happens, and windows stitched in numpy."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from app.config.inference import PredictOptions
from app.errors import is_out_of_memory
from app.inference.backends.choose import choose_backend
from app.inference.backends.executors import OpenvinoEngine, TorchEngine, needed_bytes
from app.inference.model import Model, Predictor, load_model
from app.inference.probabilities import fallback_for, predict_answer
from app.inference.sliding_window.grid import place_windows, rounded_up, smaller
from app.inference.sliding_window.memory_fallback import GB, ComputePlan, MemoryFallback, next_plan
from app.inference.sliding_window.numpy_blend import resized, stitched_logits
from app.inference.sliding_window.torch_blend import sliding_logits, window_logits
from app.system.device import Runtime, RuntimeConfig, choose_runtime
from app.system.resources import Memory
from data.datasets.layouts import find_cases
from data.errors import DataError
from data.preprocess import Prepared, prepare

Call = Callable[..., Any]
OPENVINO = Runtime(device_name="cpu", precision_name="float32", channels_last=False, reasons=(), backend="openvino")
FIRST = ComputePlan(window=(64, 64, 64), batch=2, device="cuda:0", stitch_on="cuda:0")


class MockOfMemory:
    """A mock: computes only with ways that a machine of little memory has room for, and notes the others."""

    def __init__(self, enough: Callable[[ComputePlan], bool], error: Exception) -> None:
        self.enough, self.error, self.tried = enough, error, 0

    def __call__(self, plan: ComputePlan) -> ComputePlan:
        self.tried += 1
        if not self.enough(plan):
            raise self.error
        return plan


def down(mock: MockOfMemory, fallback: MemoryFallback | None = None) -> ComputePlan:
    return (fallback or MemoryFallback()).run(mock, FIRST, divisor=16, needed_bytes=lambda _: 0)


@pytest.mark.parametrize(
    ("enough", "expected"),
    [
        (lambda plan: plan.batch == 1, ComputePlan(window=(64, 64, 64), device="cuda:0", stitch_on="cuda:0")),
        (lambda plan: plan.stitch_on == "cpu", ComputePlan(window=(64, 64, 64), device="cuda:0")),
        (lambda plan: plan.window[0] < 64, ComputePlan(window=(32, 64, 64), device="cuda:0")),
        (lambda plan: plan.device == "cpu", ComputePlan(window=(64, 64, 64))),
        (lambda plan: plan.device == "cpu" and max(plan.window) < 64, ComputePlan(window=(32, 32, 32))),
    ],
    ids=["fewer at once", "stitched on the CPU", "smaller windows", "on the CPU", "smaller windows on the CPU"],
)
def test_each_fallback_gives_a_result(enough: Callable[[ComputePlan], bool], expected: ComputePlan) -> None:
    assert down(MockOfMemory(enough, MemoryError("no room"))) == expected


def test_every_fallback_is_reported_in_a_sentence() -> None:
    fallback = MemoryFallback()
    down(MockOfMemory(lambda plan: plan.stitch_on == "cpu", torch.OutOfMemoryError("CUDA out of memory")), fallback)
    assert len(fallback.sentences) == 2
    assert fallback.sentences[0] == (
        "out of memory with windows of 64x64x64 voxels, 2 at once, on cuda:0 (CUDA out of memory); "
        "continued with windows of 64x64x64 voxels, 1 at once, on cuda:0"
    )


def test_the_next_network_of_a_case_starts_with_the_plan_that_worked() -> None:
    fallback, mock = MemoryFallback(), MockOfMemory(lambda plan: plan.device == "cpu", MemoryError())
    down(mock, fallback)
    tried = mock.tried
    down(mock, fallback)
    assert mock.tried == tried + 1


def test_torch_releases_cached_gpu_memory_before_the_next_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(1))
    error = RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
    down(MockOfMemory(lambda plan: plan.stitch_on == "cpu", error))
    assert len(given_back) == 2


def test_without_a_remaining_fallback_the_case_is_refused() -> None:
    with pytest.raises(DataError, match="not enough memory, not even for windows of 32x32x32"):
        down(MockOfMemory(lambda _: False, MemoryError()))


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create: std::bad_alloc"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("cuDNN Frontend error: [cudnn_frontend] Error: No valid execution plans built."), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"), False),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_only_explicit_out_of_memory_errors_count_as_such(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


def test_other_errors_are_not_mistaken_for_out_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        down(MockOfMemory(lambda _: False, RuntimeError("shapes do not fit")))


def test_the_plan_halves_logits_before_it_shrinks_windows() -> None:
    fallback = MemoryFallback(1000 * GB)
    found = fallback.run(
        lambda plan: plan,
        ComputePlan(window=(64, 64, 64)),
        divisor=16,
        needed_bytes=lambda plan: 500 * GB if plan.half else 2000 * GB,
    )
    assert found == ComputePlan(window=(64, 64, 64), half=True)
    assert fallback.sentences[0].startswith("planned for --max-memory-gb 1000")


def test_a_generous_limit_changes_nothing() -> None:
    fallback = MemoryFallback(1000 * GB)
    assert fallback.run(lambda plan: plan, FIRST, divisor=16, needed_bytes=lambda _: GB) == FIRST
    assert fallback.sentences == []


def test_a_limit_that_no_plan_fits_is_an_error_that_names_it() -> None:
    with pytest.raises(DataError, match=r"--max-memory-gb 1 is too little"):
        MemoryFallback(GB).run(lambda plan: plan, FIRST, divisor=16, needed_bytes=lambda _: 2 * GB)


def test_windows_shrink_down_to_twice_the_divisor() -> None:
    window: tuple[int, int, int] | None = (48, 64, 48)
    seen = []
    while window is not None:
        seen.append(window)
        window = smaller(window, 16)
    assert seen == [(48, 64, 48), (48, 32, 48), (32, 32, 48), (32, 32, 32)]
    assert next_plan(ComputePlan(window=(32, 32, 32)), FIRST, 16) is None


def test_a_window_around_the_brain_is_the_smallest_the_network_accepts() -> None:
    assert rounded_up((141, 170, 9), 8) == (144, 176, 16)


class Blur(torch.nn.Module):
    """Three regions of an image, each a blurred contrast: what a window sees depends on its borders."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return functional.avg_pool3d(image[:, :3], 3, stride=1, padding=1)


def an_image(*shape: int) -> Any:
    image = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
    image[:, : shape[0] // 2, : shape[1] // 2] = 0
    return image


@pytest.mark.parametrize("shape", [(40, 36, 20), (10, 40, 16)], ids=["larger", "smaller along one axis"])
@pytest.mark.parametrize("batch", [1, 3])
def test_numpy_blends_windows_like_torch(shape: tuple[int, ...], batch: int) -> None:
    image, runtime = an_image(*shape), choose_runtime(RuntimeConfig(device="cpu", precision="float32"))
    expected = sliding_logits(Blur(), image, window=(16, 16, 16), overlap=0.5, runtime=runtime)
    found = stitched_logits(
        lambda patches: Blur()(torch.from_numpy(patches)).numpy(), image, window=(16, 16, 16), overlap=0.5, batch=batch
    )
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


@torch.inference_mode()
def test_torch_gives_the_same_result_with_several_windows_at_once() -> None:
    image, runtime = an_image(40, 36, 20), choose_runtime(RuntimeConfig(device="cpu", precision="float32"))
    windows = place_windows(image, (16, 16, 16), 0.5)
    one, some = (
        window_logits(Blur(), torch.from_numpy(image), windows, runtime=runtime, batch=batch) for batch in (1, 4)
    )
    torch.testing.assert_close(one, some)


def test_logits_in_float16_equal_those_in_float32_up_to_rounding() -> None:
    image = an_image(40, 36, 20)
    full, half = (
        stitched_logits(
            lambda patches: Blur()(torch.from_numpy(patches)).numpy(),
            image,
            window=(16, 16, 16),
            overlap=0.5,
            half=half,
        )
        for half in (False, True)
    )
    assert half.dtype == np.float16
    covered = full > -30
    np.testing.assert_allclose(half[covered], full[covered], atol=5e-3)


def test_falling_back_from_gpu_to_cpu_keeps_the_requested_precision(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr("app.system.device.cpu_flags", lambda: {"amx_bf16"})
    runtime = choose_runtime(RuntimeConfig(device="cpu", precision="float32"))
    engine, image, plan = load_model(tiny_run, runtime).engine, an_image(20, 16, 16), ComputePlan(window=(16, 16, 16))
    expected = engine.logits(image, None, runtime, overlap=0.5, plan=plan)
    gpu = replace(runtime, device_name="cuda:0")
    assert np.array_equal(engine.logits(image, None, gpu, overlap=0.5, plan=plan), expected)


def test_torch_also_blends_in_float16_when_logits_are_halved(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = choose_runtime(RuntimeConfig(device="cpu", precision="float32"))
    engine, made, zeros = load_model(tiny_run, runtime).engine, [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **more: made.append(zeros(*a, **more)) or made[-1])
    answer = engine.logits(
        an_image(40, 36, 20), None, runtime, overlap=0.5, plan=ComputePlan(window=(16, 16, 16), half=True)
    )
    assert answer.dtype == np.float16
    assert {tensor.dtype for tensor in made} == {torch.float16}


def test_an_image_that_must_be_padded_counts_twice(tiny_run: Path) -> None:
    runtime = choose_runtime(RuntimeConfig(device="cpu", precision="float32"))
    engine, plan = load_model(tiny_run, runtime).engine, ComputePlan(window=(16, 16, 16))
    padded, whole = (needed_bytes(engine, plan, runtime, shape, (16, 16, 16)) for shape in ((15, 16, 16), (16, 16, 16)))
    assert padded - whole == 4 * 16**3 * 4


@pytest.mark.parametrize("shape", [(10, 14, 5), (3, 4, 9)], ids=["finer", "coarser and finer"])
def test_logits_are_resized_like_in_torch(shape: tuple[int, int, int]) -> None:
    values = np.random.default_rng(0).normal(size=(3, 5, 7, 4)).astype(np.float32)
    expected = functional.interpolate(torch.from_numpy(values)[None], shape, mode="trilinear", align_corners=False)[
        0
    ].numpy()
    np.testing.assert_allclose(resized(values, shape), expected, atol=1e-5)


@pytest.mark.parametrize(("backend", "engine"), [("torch", TorchEngine), ("openvino", OpenvinoEngine)])
def test_an_out_of_memory_fallback_in_predict_is_recorded_in_the_json(
    *,
    backend: str,
    engine: Any,
    tiny_run: Path,
    phantoms: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    from app.inference.batch.predict import predict

    if backend == "openvino":
        request.getfixturevalue("openvino_computes")
    real = engine.logits

    def mock_of_memory(self: Any, *arguments: Any, plan: ComputePlan, **more: Any) -> Any:
        if max(plan.window) > 8:
            raise RuntimeError("mock: not enough memory")
        return real(self, *arguments, plan=plan, **more)

    monkeypatch.setattr(engine, "logits", mock_of_memory)
    runtime = choose_backend(backend, RuntimeConfig(device="cpu"))
    predict(load_model(tiny_run, runtime), find_cases(phantoms)[:1], tmp_path, runtime=runtime)
    content = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert [sentence.partition(" (")[0] for sentence in content["ladder"]] == [
        f"out of memory with windows of {window} voxels, 1 at once, on cpu"
        for window in ("16x16x16", "8x16x16", "8x8x16")
    ]
    assert len(list(tmp_path.glob("*.nii.gz"))) == 1


BASE = 100_000_000


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, openvino_computes: None) -> Any:
    """Compiled networks in memory; the process reports a base size plus 10 MB for each."""
    from app.inference.backends import openvino_backend

    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    class Counted(openvino_backend.CompiledNetwork):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            alive.add(self)

    def mock_of_memory() -> Memory:
        resident = BASE + 10_000_000 * len(alive)
        return Memory(resident=resident, peak=resident, own=resident, files=0)

    monkeypatch.setattr(openvino_backend, "CompiledNetwork", Counted)
    monkeypatch.setattr("app.inference.sliding_window.memory_fallback.memory_of", mock_of_memory)
    return alive


def said_of(model: Predictor, prepared: Prepared, **options: Any) -> list[str]:
    """What the fallback of a case says."""
    asked = PredictOptions(**options)
    fallback = fallback_for(asked)
    predict_answer(model, prepared, OPENVINO, options=asked, fallback=fallback)
    return fallback.sentences


def room_for(model: Model, prepared: Prepared, **more: bool) -> float:
    """GB that are just enough for the base and what a case needs."""
    x, y, z = prepared.image.shape[1:]
    plan = model.engine.first_plan(model.window, OPENVINO)
    return (BASE + needed_bytes(model.engine, plan, OPENVINO, (x, y, z), prepared.box_shape, **more)) / GB


@pytest.fixture
def model(tiny_run: Path) -> Model:
    return load_model(tiny_run, OPENVINO)


@pytest.fixture(scope="module")
def prepared(phantoms: Path, tiny_run: Path) -> Prepared:
    return prepare(find_cases(phantoms)[0], spacing_mm=load_model(tiny_run, OPENVINO).spacing_mm)


def test_equal_cases_are_planned_alike(model: Model, prepared: Prepared, compiled: Any) -> None:
    room = room_for(model, prepared)
    assert [said_of(model, prepared, max_memory_gb=room) for _ in range(3)] == [[]] * 3
    assert not compiled


def test_an_ensemble_keeps_one_compiled_network_if_memory_is_limited(
    model: Model, tiny_run: Path, prepared: Prepared, compiled: Any
) -> None:
    most, members = 0, [load_model(tiny_run, OPENVINO) for _ in range(3)]

    def each() -> Iterator[Model]:
        nonlocal most
        for member in members:
            yield member
            most = max(most, len(compiled))

    ensemble: Any = SimpleNamespace(members=each, postprocess=model.postprocess)
    room = room_for(model, prepared, several=True)
    assert [said_of(ensemble, prepared, max_memory_gb=room) for _ in range(2)] == [[]] * 2
    assert (most, len(compiled)) == (0, 0)


def test_without_a_memory_limit_a_network_is_compiled_once(model: Model, prepared: Prepared, compiled: Any) -> None:
    said_of(model, prepared)
    first = list(compiled)
    said_of(model, prepared)
    assert len(first) == 1
    assert list(compiled) == first


@pytest.mark.parametrize(
    ("option", "needs"),
    [("tta", ("several", "mirrored")), ("uncertainty", ("uncertainty",))],
    ids=["tta", "uncertainty"],
)
def test_the_memory_of_each_option_is_planned_for(
    option: str, needs: tuple[str, ...], model: Model, prepared: Prepared, compiled: Any
) -> None:
    assert not compiled
    room, little = room_for(model, prepared, **dict.fromkeys(needs, True)), 1e-6
    assert room > room_for(model, prepared) + little
    assert said_of(model, prepared, max_memory_gb=room, **{option: True}) == []
    assert said_of(model, prepared, max_memory_gb=room - little, **{option: True}) != []


def test_several_predictions_need_memory_for_their_mean_and_the_next_one(model: Model) -> None:
    plan, shape = model.engine.first_plan((32, 32, 32), OPENVINO), (32, 32, 32)
    one, some, uncertain = (
        needed_bytes(model.engine, plan, OPENVINO, shape, shape, several=several, uncertainty=uncertainty)
        for several, uncertainty in ((False, False), (True, False), (True, True))
    )
    assert (some - one, uncertain - some) == (3 * 32**3 * 4,) * 2


@pytest.fixture
def a_huge_case(tmp_path: Path) -> Path:
    """A case of 512x512x512 voxels, most of them brain, at the spacing of the tiny run; its contrasts are one file."""
    import nibabel as nib

    voxels = np.zeros((512, 512, 512), dtype=np.uint8)
    voxels[4:-4, 4:-4, 4:-4] = 1 + np.arange(504, dtype=np.uint8)[:, None] % 7
    folder = tmp_path / "BraTS2021_00512"
    folder.mkdir()
    first = folder / "BraTS2021_00512_t1.nii"
    nib.save(nib.Nifti1Image(voxels, np.diag([-4.0, -4.0, 4.0, 1.0])), first)
    for contrast in ("t1ce", "t2", "flair"):
        first.with_name(f"BraTS2021_00512_{contrast}.nii").hardlink_to(first)
    return folder


@pytest.mark.slow
def test_a_case_of_512_voxels_along_each_axis_stays_below_six_gigabytes(
    tiny_run: Path, a_huge_case: Path, tmp_path: Path, shell: Call
) -> None:
    code = (
        "from app.cli.main import run\nfrom app.system.resources import memory_of\n"
        "try: run()\nexcept SystemExit as end: print(end.code, memory_of().peak)"
    )
    more = ["--window", "128,128,128", "--overlap", "0.1", "--max-memory-gb", "6", "--device", "cpu"]
    ended = shell(["python", "-c", code, "predict", tiny_run, a_huge_case, tmp_path / "out", *more], timeout=900)
    ended_with, peak = ended.out.splitlines()[-1].split()
    assert ended_with == "0", ended.err
    assert int(peak) < 6 * GB
    assert (tmp_path / "out" / "BraTS2021_00512.nii.gz").is_file()


def test_a_case_that_does_not_fit_the_limit_is_named(
    tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Any
) -> None:
    case = sorted(phantoms.iterdir())[0]
    ended = znormseg("predict", tiny_run, case, tmp_path / "out", "--max-memory-gb", "0.1")
    assert ended.code == 3
    assert f"case {case.name}: --max-memory-gb 0.1 is too little" in ended.err
