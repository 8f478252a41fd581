"""Networks as graphs, and the backends that compute them (torch, OpenVINO): which is chosen, and what each imports."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from app.errors import DeviceError, RunError
from app.inference.backends import choose
from app.inference.backends.choose import choose_backend, may_have_gpu
from app.inference.backends.graph import (
    Graph,
    Operation,
    divisor,
    graph_from_json,
    live_values,
)
from app.inference.backends.openvino_backend import CompiledNetwork
from app.inference.backends.torch_backend import GraphNetwork, norm_channels_last
from app.inference.backends.trace import trace
from app.system.device import RuntimeConfig, limit_below_avx512
from models import GivenPresence, NetworkConfig, build_network, patch_divisor

Call = Callable[..., Any]
SMALL: dict[str, Any] = {"channels": (8, 16, 32)}
CONFIGS = {
    "unet": NetworkConfig(architecture="unet", dropout=0.1, **SMALL),
    "resunet": NetworkConfig(architecture="resunet", **SMALL),
    "resunet at full resolution": NetworkConfig(architecture="resunet", first_stride=1, **SMALL),
    "segresnet": NetworkConfig(architecture="segresnet", dropout=0.2, **SMALL),
    "resenc": NetworkConfig(architecture="resenc", first_stride=1, blocks=(1, 1, 2), **SMALL),
    "resenc, deep supervision": NetworkConfig(architecture="resenc", deep_supervision=True, dropout=0.1, **SMALL),
}
with_openvino = pytest.mark.usefixtures("openvino_computes")
each_network = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def a_network(config: NetworkConfig, in_channels: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return build_network(config, in_channels=in_channels, out_channels=3).eval()


def an_image(in_channels: int = 4) -> torch.Tensor:
    return torch.randn(1, in_channels, 16, 24, 16, generator=torch.Generator().manual_seed(1))


def arrays_of(network: nn.Module) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


@each_network
@torch.inference_mode()
def test_a_graph_run_by_torch_equals_the_network_it_was_traced_from(config: NetworkConfig) -> None:
    network, image = a_network(config), an_image()
    twin = GraphNetwork(trace(network, in_channels=4), network.state_dict()).eval()
    assert torch.equal(twin(image), network(image))


@each_network
def test_a_graph_keeps_the_state_dict_of_its_network(config: NetworkConfig) -> None:
    network = a_network(config)
    twin = GraphNetwork(trace(network, in_channels=4), network.state_dict())
    assert list(twin.state_dict()) == list(network.state_dict())
    assert all(torch.equal(twin.state_dict()[name], tensor) for name, tensor in network.state_dict().items())


@with_openvino
@each_network
@torch.inference_mode()
def test_openvino_in_float32_gives_the_same_logits_as_torch(config: NetworkConfig) -> None:
    network, image = a_network(config), an_image()
    expected = network(image).numpy()
    compiled = CompiledNetwork(
        trace(network, in_channels=4), arrays_of(network), (1, 4, 16, 24, 16), bfloat16=False, threads=1
    )
    assert np.abs(compiled(image.numpy()) - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.skipif(limit_below_avx512() is not None, reason="OpenVINO needs AVX-512 for bfloat16")
@torch.inference_mode()
def test_openvino_in_bfloat16_changes_the_region_of_few_voxels() -> None:
    network, image = a_network(CONFIGS["segresnet"]), an_image()
    graph, shape = trace(network, in_channels=4), (1, 4, 16, 24, 16)
    full, half = (
        CompiledNetwork(graph, arrays_of(network), shape, bfloat16=low, threads=1)(image.numpy()).copy()
        for low in (False, True)
    )
    # Random logits have no gap: cut in the middle, they are as close to the bound as can be.
    assert np.mean((full > np.median(full)) != (half > np.median(full))) < 0.02


@each_network
def test_a_graph_survives_the_round_trip_through_json(config: NetworkConfig) -> None:
    graph = trace(a_network(config), in_channels=4)
    assert graph_from_json(json.loads(json.dumps(graph.to_json()))) == graph


@each_network
def test_a_graph_knows_the_valid_patch_sizes_of_its_network(config: NetworkConfig) -> None:
    assert divisor(trace(a_network(config), in_channels=4)) == patch_divisor(config)


def test_tracing_leaves_a_network_in_training_mode() -> None:
    network = a_network(CONFIGS["resenc, deep supervision"]).train()
    trace(network, in_channels=4)
    assert network.training
    assert len(network(an_image())) > 1


def test_a_network_with_an_unknown_operation_has_no_graph() -> None:
    with pytest.raises(ValueError, match="no operation for Softplus"):
        trace(nn.Sequential(nn.Conv3d(4, 3, 1), nn.Softplus()), in_channels=4)


def test_live_values_are_counted_as_they_come_and_go() -> None:
    graph = trace(nn.Sequential(nn.Conv3d(4, 16, 3, padding=1), nn.Conv3d(16, 3, 1)), in_channels=4)
    shapes = {"0.weight": (16, 4, 3, 3, 3), "1.weight": (3, 16, 1, 1, 1)}
    assert live_values(graph, shapes) == 20


def spoiled(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    content = copy.deepcopy(trace(a_network(CONFIGS["unet"]), in_channels=4).to_json())
    change(content)
    return content


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(version=2),
        lambda content: content.update(operations=[]),
        lambda content: content["operations"][0].update(kind="exec"),
        lambda content: content["operations"][0].update(inputs=[7]),
        lambda content: content["operations"][0].update(weights={}),
        lambda content: content["operations"][0]["settings"].update(strides=[2, 2]),
        lambda content: content["operations"][0]["settings"].update(epsilon=1),
    ],
)
def test_an_invalid_graph_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises((ValueError, KeyError)):
        graph_from_json(spoiled(change))


def test_missing_weights_are_named() -> None:
    graph = Graph(
        in_channels=4,
        operations=(Operation(kind="prelu", inputs=(0,), weights={"weight": "act.weight"}, settings={}),),
    )
    with pytest.raises(ValueError, match=r"act\.weight"):
        graph.require_weights(["other"])


@with_openvino
def test_on_a_cpu_auto_uses_openvino_and_says_why(tmp_path: Path) -> None:
    runtime = choose_backend("auto", RuntimeConfig(), devices=tmp_path)
    assert runtime.backend == "openvino"
    assert runtime.reasons[0] == "backend openvino: on a CPU it is faster than torch"


def test_without_openvino_auto_uses_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_is_installed", lambda: False)
    runtime = choose_backend("auto", RuntimeConfig(device="cpu"))
    assert runtime.backend == "torch"
    assert "not installed" in runtime.reasons[0]


def test_openvino_on_a_gpu_is_refused() -> None:
    with pytest.raises(DeviceError, match="OpenVINO only on the CPU"):
        choose_backend("openvino", RuntimeConfig(device="cuda"))


@pytest.mark.parametrize("limit", ["SSE41", "avx"])
def test_without_avx2_auto_uses_torch_and_openvino_is_refused(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    runtime = choose_backend("auto", RuntimeConfig(device="cpu"))
    assert (runtime.backend, runtime.precision_name) == ("torch", "float32")
    assert f"needs AVX2, and ONEDNN_MAX_CPU_ISA={limit} disables it" in runtime.reasons[0]
    with pytest.raises(DeviceError, match=r"backend openvino: OpenVINO needs AVX2.* Use --backend torch"):
        choose_backend("openvino", RuntimeConfig(device="cpu"))


@pytest.mark.parametrize(("flags", "backend"), [({"avx"}, "torch"), ({"avx2"}, "openvino"), (set(), "openvino")])
def test_openvino_is_used_on_cpus_with_avx2_or_unknown_flags(
    flags: set[str], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr("app.system.device.cpu_flags", lambda: flags)
    assert choose_backend("auto", RuntimeConfig(device="cpu")).backend == backend


@pytest.mark.parametrize("limit", ["AVX2", "avx2_vnni"])
def test_bfloat16_is_refused_where_onednn_may_not_use_avx512(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    with pytest.raises(DeviceError, match=f"ONEDNN_MAX_CPU_ISA={limit} disables that"):
        choose_backend("openvino", RuntimeConfig(device="cpu", precision="bfloat16"))


def test_a_gpu_is_only_looked_for_if_its_driver_is_visible(tmp_path: Path) -> None:
    assert not may_have_gpu(tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert may_have_gpu(tmp_path)


@pytest.fixture(scope="module")
def a_run_without_graph(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run, as an older version would have left it."""
    from app.runs.checkpoints import load_newest, save

    run = tmp_path_factory.mktemp("old") / "run"
    best = load_newest(tiny_run / "checkpoints", "best")
    assert best is not None
    details = {key: value for key, value in best.details.items() if key not in ("graph", "kind", "step", "sha256")}
    save(run / "checkpoints", "best", best.step, best.tensors, details)
    return run


@with_openvino
def test_a_run_of_an_older_version_is_traced_on_loading(a_run_without_graph: Path, tiny_run: Path) -> None:
    from app.inference.model import load_model

    runtime = choose_backend("openvino", RuntimeConfig())
    old, new = load_model(a_run_without_graph, runtime), load_model(tiny_run, runtime)
    assert old.engine.graph == new.engine.graph


@with_openvino
def test_weights_of_another_network_than_the_graph_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    from app.inference.model import load_model
    from app.runs.checkpoints import load_newest, save

    best = load_newest(tiny_run / "checkpoints", "best")
    assert best is not None
    some = dict(list(best.tensors.items())[1:])
    details = {key: value for key, value in best.details.items() if key not in ("kind", "step", "sha256")}
    save(tmp_path / "checkpoints", "best", best.step, some, details)
    for backend in ("torch", "openvino"):
        with pytest.raises(RunError, match="weights are missing"):
            load_model(tmp_path, choose_backend(backend, RuntimeConfig(device="cpu")))


@with_openvino
def test_predict_on_a_cpu_imports_neither_torch_nor_monai(
    tiny_run: Path, phantoms: Path, tmp_path: Path, shell: Call
) -> None:
    code = (
        "import sys; from app.cli.main import run\n"
        "try: run()\n"
        "except SystemExit as end: code = end.code\n"
        "print([code, *(name for name in ('torch', 'monai', 'SimpleITK') if name in sys.modules)])"
    )
    case = next(phantoms.iterdir())
    ended = shell([sys.executable, "-c", code, "predict", tiny_run, case, tmp_path / "out", "--device", "cpu"])
    assert ended.out.splitlines()[-1] == "[0]", ended.err


@with_openvino
def test_both_backends_give_the_same_label_map_in_float32(tiny_run: Path, phantoms: Path) -> None:
    from app.inference.model import load_model
    from app.inference.probabilities import predict_codes
    from data.datasets.layouts import find_cases
    from data.preprocess import prepare

    prepared = prepare(find_cases(phantoms)[0])
    codes = [
        predict_codes(load_model(tiny_run, runtime), prepared, runtime)
        for runtime in (
            choose_backend(name, RuntimeConfig(device="cpu", precision="float32")) for name in ("torch", "openvino")
        )
    ]
    assert np.mean(codes[0] != codes[1]) < 1e-4


@with_openvino
@torch.inference_mode()
def test_openvino_gets_the_presence_of_contrasts_like_torch() -> None:
    from app.inference.backends.executors import OpenvinoEngine

    network, image = a_network(CONFIGS["unet"], in_channels=8), an_image().relu()
    engine = OpenvinoEngine(trace(network, in_channels=8), arrays_of(network))
    runtime = choose_backend("openvino", RuntimeConfig(precision="float32"))
    plan = engine.first_plan((16, 24, 16), runtime)
    given = (True, False, True, True)
    found = engine.logits(image[0].numpy(), given, runtime, overlap=0.5, plan=plan)
    expected = GivenPresence(network, given)(image)[0].numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@with_openvino
def test_openvino_uses_as_many_threads_as_openmp_would(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from app.inference.backends import openvino_backend
    from app.inference.model import load_model

    told: dict[str, Any] = {}
    monkeypatch.setattr(openvino_backend, "CompiledNetwork", lambda *_, **settings: told.update(settings))
    monkeypatch.setattr("app.system.resources.cores", lambda: 16)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    runtime = choose_backend("openvino", RuntimeConfig())
    engine = load_model(tiny_run, runtime).engine
    engine.warm_up(engine.first_plan((16, 16, 16), runtime), runtime)
    assert told["threads"] == 3


#: Compiles two networks, releases them in that order, and raises a signal.
RELEASED = """
import signal
import numpy as np
from app.inference.backends.graph import Graph, Operation
from app.inference.backends.openvino_backend import CompiledNetwork

double = Graph(in_channels=1, operations=(Operation(kind="add", inputs=(0, 0), weights={}, settings={}),))
first, second = (CompiledNetwork(double, {}, (1, 1, 4, 4, 4), bfloat16=False, threads=1) for _ in range(2))
assert first(np.ones((1, 1, 4, 4, 4), np.float32)).max() == 2
del first
del second
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
signal.raise_signal(signal.SIGTERM)
"""


@with_openvino
def test_a_signal_after_networks_were_released_reaches_its_handler() -> None:
    ended = subprocess.run([sys.executable, "-c", RELEASED], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "handled\n"), ended.stderr


@with_openvino
def test_a_smaller_window_is_recompiled(tiny_run: Path) -> None:
    from app.inference.model import load_model

    runtime = choose_backend("openvino", RuntimeConfig())
    engine = load_model(tiny_run, runtime).engine
    image = np.ones((4, 16, 16, 16), dtype=np.float32)
    plan = engine.first_plan((16, 16, 16), runtime)
    shapes = [
        engine.logits(image, None, runtime, overlap=0.5, plan=replace(plan, window=(side, side, side))).shape
        for side in (16, 8)
    ]
    assert shapes == [(3, 16, 16, 16)] * 2


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_the_gpu_norm_equals_the_instance_norm_and_keeps_channels_last(samples: int, affine: bool) -> None:
    x = torch.randn(samples, 4, 3, 5, 6).mul_(3).add_(7).contiguous(memory_format=torch.channels_last_3d)
    weight, bias = (torch.randn(4) if affine else None for _ in range(2))
    found = norm_channels_last(x, weight=weight, bias=bias, eps=1e-5)
    expected = nn.functional.instance_norm(x, weight=weight, bias=bias, eps=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_gpu_batches_windows_up_to_the_voxels_of_one_128_cube(tiny_run: Path) -> None:
    from app.inference.model import load_model

    runtime = choose_backend("torch", RuntimeConfig(device="cpu"))
    engine, gpu = load_model(tiny_run, runtime).engine, replace(runtime, device_name="cuda:0")
    batches = [engine.first_plan((side,) * 3, gpu).batch for side in (160, 128, 96, 64, 32)]
    assert batches == [1, 1, 2, 8, 8]
    assert engine.first_plan((32, 32, 32), runtime).batch == 1
