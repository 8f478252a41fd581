"""Exports: other programs load the files and get the run's logits; an export that differs is not kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.errors import RunError
from app.exporting import export as exporting
from app.exporting.export import export_run
from app.exporting.parity import LARGEST_DIFFERENCE, Parity, compare_outputs
from app.exporting.places import export_folder_when_complete
from app.inference.model import load_model
from app.runs.model_card import verify
from app.system.device import without_avx2

FORMATS = ("openvino", "onnx", "monai-bundle")

Call = Callable[..., Any]
with_openvino = pytest.mark.usefixtures("openvino_computes")


@pytest.fixture(scope="session")
def exports(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny run in every format that this CPU can compare; tests read them and leave them as they are."""
    folder = tmp_path_factory.mktemp("exports")
    formats = [name for name in FORMATS if name != "openvino" or not without_avx2()]
    for name in formats:
        export_run(tiny_run, folder / name, file_format=name)
    return _Exports({name: folder / name for name in formats})


class _Exports(dict[str, Path]):
    """Folders by format; a test of one that is not there is skipped."""

    def __missing__(self, name: str) -> Path:
        pytest.skip(f"{name} cannot be computed on this CPU")


@pytest.fixture
def windows() -> Any:
    """Two windows of the tiny run's size."""
    return np.random.default_rng(0).normal(size=(2, 4, 16, 16, 16)).astype(np.float32)


def logits_of(run: Path, windows: Any) -> Any:
    with torch.inference_mode():
        return load_model(run, exporting._RUNTIME).network(torch.from_numpy(windows)).numpy()


def test_openvino_reads_the_export_and_gives_the_same_logits(
    exports: dict[str, Path], tiny_run: Path, windows: Any
) -> None:
    from app.inference.backends.openvino_backend import openvino_core

    compiled = openvino_core().compile_model(
        exports["openvino"] / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    answer = np.array(compiled(windows)["logits"])
    np.testing.assert_allclose(answer, logits_of(tiny_run, windows), atol=1e-4, rtol=1e-4)


def test_onnx_runtime_reads_the_export_and_gives_the_same_logits(
    exports: dict[str, Path], tiny_run: Path, windows: Any
) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(exports["onnx"] / "model.onnx", providers=["CPUExecutionProvider"])
    (answer,) = session.run(["logits"], {"image": windows})
    np.testing.assert_allclose(answer, logits_of(tiny_run, windows), atol=1e-4, rtol=1e-4)


def test_the_onnx_file_declares_operator_set_18_or_later(exports: dict[str, Path]) -> None:
    import onnx

    assert min(entry.version for entry in onnx.load(exports["onnx"] / "model.onnx").opset_import) >= 18


@pytest.mark.parametrize("name", FORMATS)
def test_every_file_of_an_export_is_in_its_checksums(exports: dict[str, Path], name: str) -> None:
    files = {path.relative_to(exports[name]).as_posix() for path in exports[name].rglob("*") if path.is_file()}
    assert {*verify(exports[name]), "SHA256SUMS"} == files


@pytest.mark.parametrize("name", FORMATS)
def test_no_file_of_an_export_names_a_folder_of_this_machine(
    exports: dict[str, Path], name: str, tiny_run: Path
) -> None:
    folders = (Path(exporting.__file__).parents[2], Path(torch.__file__).parents[1], tiny_run, exports[name].parent)
    named = [word.encode() for word in (*map(str, folders), "site-packages", "stack_trace")]
    for path in exports[name].rglob("*"):
        assert not path.is_file() or [one for one in named if one in path.read_bytes()] == [], path


@pytest.mark.parametrize("name", FORMATS)
def test_parity_is_recorded(exports: dict[str, Path], name: str) -> None:
    parity = json.loads((exports[name] / "parity.json").read_text())
    assert 0 <= parity["mean_difference"] <= parity["largest_difference"]
    assert parity["largest_difference"] <= LARGEST_DIFFERENCE * max(1, parity["largest_logit"])
    assert (parity["format"], parity["source"], parity["windows"]) == (name, "a phantom", 3)


@with_openvino
def test_a_changed_byte_of_an_export_is_refused(tiny_run: Path, tmp_path: Path, znormseg: Call) -> None:
    assert znormseg("export", tiny_run, tmp_path / "out", "--format", "openvino").code == 0
    weights = tmp_path / "out" / "model.bin"
    content = bytearray(weights.read_bytes())
    content[0] ^= 1
    weights.write_bytes(content)
    ended = znormseg("model", "verify", tmp_path / "out")
    assert ended.code == 5
    assert "model.bin was changed" in ended.err


@with_openvino
def test_windows_of_a_given_case_are_compared(tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    case = sorted(phantoms.iterdir())[0]
    ended = znormseg("export", tiny_run, tmp_path / "out", "--format", "openvino", "--case", case, "--json")
    assert json.loads(ended.out)["parity"]["source"] == f"case {case.name}"


@with_openvino
def test_an_export_with_different_logits_is_not_kept(
    tiny_run: Path, tmp_path: Path, znormseg: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*arguments: Any) -> Callable[[Any], Any]:
        return lambda image: np.zeros((1, 3, *image.shape[2:]), dtype=np.float32)

    monkeypatch.setattr("app.exporting.formats.write_openvino", other)
    ended = znormseg("export", tiny_run, tmp_path / "out", "--format", "openvino")
    assert ended.code == 5
    assert "differs from the original network" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_nan_logit_counts_as_a_difference() -> None:
    window = torch.ones(1, 4, 2, 2, 2)
    network = torch.nn.Conv3d(4, 3, 1)
    parity = compare_outputs(
        network, lambda image: np.full((1, 3, 2, 2, 2), np.nan, dtype=np.float32), [window], "a test"
    )
    assert not parity.holds


@pytest.mark.parametrize("bias", [np.inf, -np.inf, np.nan])
def test_an_original_with_non_finite_logits_has_no_parity(bias: float) -> None:
    network = torch.nn.Conv3d(4, 3, 1).eval()
    torch.nn.init.constant_(network.bias, bias)  # type: ignore[arg-type]

    def same(image: Any) -> Any:
        return network(torch.from_numpy(image)).detach().numpy()

    parity = compare_outputs(network, same, [torch.ones(1, 4, 2, 2, 2)], "a test")
    with pytest.raises(RunError, match="returns non-finite logits"):
        parity.require("an export")
    assert not parity.holds


def test_labels_that_differ_in_too_many_voxels_are_refused() -> None:
    parity = Parity(
        source="a test", windows=1, largest_difference=0, mean_difference=0, largest_logit=1, label_disagreement=0.01
    )
    with pytest.raises(RunError, match=r"1\.000% of the voxels"):
        parity.require("an export")


def test_without_the_onnx_extra_the_message_names_it(
    tiny_run: Path, tmp_path: Path, znormseg: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else object())
    ended = znormseg("export", tiny_run, tmp_path / "out", "--format", "onnx")
    assert ended.code == 4
    assert "pip install 'znormseg[onnx]'" in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["openvino", "onnx"])
def test_a_network_with_presence_channels_takes_any_number_of_windows(
    name: str, tmp_path: Path, windows: Any, request: pytest.FixtureRequest
) -> None:
    if name == "openvino":
        request.getfixturevalue("openvino_computes")
    from app.exporting.formats import write_onnx, write_openvino
    from models import GivenPresence, NetworkConfig, build_network

    config = NetworkConfig(channels=(4, 8), residual_units=1)
    network = GivenPresence(build_network(config, in_channels=8, out_channels=3), (True,) * 4).eval()
    write = {"openvino": write_openvino, "onnx": write_onnx}[name]
    answer = write(network, torch.from_numpy(windows[:1]), tmp_path)
    with torch.inference_mode():
        np.testing.assert_allclose(answer(windows), network(torch.from_numpy(windows)).numpy(), atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"residual_units": 1},
        pytest.param({"architecture": "resenc", "residual_units": 1}, marks=pytest.mark.slow),
    ],
)
def test_an_onnx_file_contains_no_exporter_metadata(settings: dict[str, Any], tmp_path: Path, windows: Any) -> None:
    pytest.importorskip("onnxscript")
    from app.exporting.formats import write_onnx
    from models import NetworkConfig, build_network

    network = build_network(NetworkConfig(channels=(4, 8), **settings), in_channels=4, out_channels=3).eval()
    write_onnx(network, torch.from_numpy(windows[:1]), tmp_path)
    content = (tmp_path / "model.onnx").read_bytes()
    assert [note for note in (b"pkg.torch", b"stack_trace", b"site-packages", b".py") if note in content] == []


def test_if_openvino_does_not_work_its_format_is_refused_before_any_work(
    tiny_run: Path, tmp_path: Path, znormseg: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    ended = znormseg("export", tiny_run, tmp_path / "out", "--format", "openvino")
    assert ended.code == 7
    assert "needs AVX2, and ONEDNN_MAX_CPU_ISA=SSE41 disables it" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_an_ensemble_is_refused_naming_its_networks(tmp_path: Path, znormseg: Call) -> None:
    (tmp_path / "ensemble.json").write_text(json.dumps({"networks": [{"network": "fold-0"}, {"network": "fold-1"}]}))
    ended = znormseg("export", tmp_path, tmp_path / "out", "--format", "onnx")
    assert ended.code == 5
    assert str(tmp_path / "fold-1") in ended.err


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"networks": 1}', '{"networks": ["fold-0"]}'])
def test_a_damaged_ensemble_is_an_error_that_names_the_folder(text: str, tmp_path: Path, znormseg: Call) -> None:
    (tmp_path / "ensemble.json").write_text(text)
    ended = znormseg("export", tmp_path, tmp_path / "out", "--format", "onnx")
    assert ended.code == 5
    assert "ensemble.json: damaged" in ended.err


def test_a_non_empty_folder_is_left_unchanged(tiny_run: Path, tmp_path: Path, znormseg: Call) -> None:
    (tmp_path / "note.txt").write_text("mine")
    ended = znormseg("export", tiny_run, tmp_path, "--format", "openvino")
    assert ended.code == 5
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def whole(folder: Path) -> bool:
    """Whether a folder holds a file and its sums, and nothing else."""
    return sorted(path.name for path in folder.iterdir()) == ["SHA256SUMS", "model.bin"]


def filled(out: Path, before_the_end: Callable[[], object] = lambda: None) -> None:
    with export_folder_when_complete(out) as partial:
        (partial / "SHA256SUMS").write_text("sums")
        (partial / "model.bin").write_text("weights")
        before_the_end()


def test_an_export_into_the_working_directory_keeps_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    filled(Path())
    assert whole(tmp_path)
    assert tmp_path.stat().st_ino == before


def test_an_export_to_a_symlinked_empty_folder_keeps_the_symlink(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    filled(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert whole(tmp_path / "folder")


def test_a_failure_leaves_an_empty_folder_empty(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        filled(tmp_path, lambda: 1 / 0)
    assert list(tmp_path.iterdir()) == []


def test_files_added_to_the_folder_in_the_meantime_are_kept(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not empty"):
        filled(tmp_path, lambda: (tmp_path / "model.bin").write_text("mine"))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("verb", ["export", "import"])
def test_a_path_where_no_folder_can_be_created_is_refused_before_any_work(
    verb: str, tmp_path: Path, znormseg: Call
) -> None:
    (tmp_path / "link").symlink_to("gone")
    (tmp_path / "file").write_text("mine")
    words = {"export": ("export", "runs/RUN"), "import": ("model", "import", "BUNDLE")}[verb]
    more = ("--format", "openvino") if verb == "export" else ()
    for name, said in (("link", "link: a symlink to gone, which does not exist"), ("file/sub/out", "file is a file")):
        ended = znormseg(*words, tmp_path / name, *more)
        assert (ended.code, said in ended.err) == (5, True), ended.err


def test_an_unknown_format_is_a_usage_error(tiny_run: Path, tmp_path: Path, znormseg: Call) -> None:
    assert znormseg("export", tiny_run, tmp_path / "out", "--format", "tensorrt").code == 2


def test_the_preprocessing_file_describes_the_input_of_the_run(exports: dict[str, Path], tiny_run: Path) -> None:
    said = json.loads((exports["onnx"] / "preprocessing.json").read_text())
    model = load_model(tiny_run, exporting._RUNTIME)
    assert said["input"]["contrasts"] == ["t1", "t1c", "t2", "flair"]
    assert said["spacing_mm"] == list(model.spacing_mm)
    assert said["window_voxels"] == [16, 16, 16]
    assert said["region_labels"] == {"WT": [1, 2, 4], "TC": [1, 4], "ET": [4]}
