"""Checkpoints load bit for bit as they were saved; a damaged one is named, and the one before it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from app.errors import RunError
from app.runs.checkpoints import (
    Checkpoint,
    load_newest,
    load_newest_arrays,
    optimizer_tensors,
    restore_optimizer,
    restore_rng,
    rng_tensors,
    save,
    weight_tensors,
)
from data.files import partial_prefix

Maker = Callable[[nn.Module], Optimizer]

OPTIMIZERS: dict[str, Maker] = {
    "adamw": lambda network: torch.optim.AdamW(network.parameters(), lr=0.1, fused=True),
    "adamw, not fused": lambda network: torch.optim.AdamW(network.parameters(), lr=0.1),
    "sgd": lambda network: torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "sgd, no momentum": lambda network: torch.optim.SGD(network.parameters(), lr=0.1),
    "two groups": lambda network: torch.optim.AdamW(
        [{"params": [p]} for p in network.parameters()], lr=0.1, amsgrad=True
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one checkpoint of three numbers."""
    save(tmp_path, "last", 5, {"weights.a": torch.tensor([1.0, 2.0, 3.0])}, {"note": "five"})
    return tmp_path


@pytest.fixture
def two(folder: Path) -> Path:
    """The same with a newer one."""
    save(folder, "last", 9, {"weights.a": torch.tensor([4.0, 5.0, 6.0])}, {"note": "nine"})
    return folder


def newest(folder: Path) -> Checkpoint:
    found = load_newest(folder, "last")
    assert found is not None
    return found


def a_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(2, 3, 3), nn.PReLU(), nn.Conv3d(3, 1, 1))


def train_(network: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        network(torch.randn(2, 2, 5, 5, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in ((one[k], other[k]) for k in one)
    )


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([-0.0, 1e-45, 3e38, float("inf")]),
        torch.arange(6, dtype=torch.int64).reshape(2, 3).T,
        torch.tensor(3.5),
        torch.zeros(0, 4),
        torch.randn(2, 3, 4, 4, 4).to(memory_format=torch.channels_last_3d),
        torch.arange(3, dtype=torch.uint8),
        torch.ones(3, dtype=torch.bfloat16),
    ],
    ids=["extremes", "transposed", "scalar", "empty", "channels last", "uint8", "bfloat16"],
)
def test_tensors_are_restored_bit_for_bit(tensor: Tensor, tmp_path: Path) -> None:
    save(tmp_path, "best", 1, {"weights.x": tensor}, {})
    found = load_newest(tmp_path, "best")
    assert found is not None
    assert same(found.tensors, {"weights.x": tensor})


def test_float16_weights_become_float32_and_other_tensors_keep_their_dtype(tmp_path: Path) -> None:
    half = torch.tensor([0.1, 65504.0], dtype=torch.float16)
    save(tmp_path, "best", 1, {"weights.x": half, "weights.count": torch.tensor(3), "rng.x": half.clone()}, {})
    tensors, arrays = load_newest(tmp_path, "best"), load_newest_arrays(tmp_path, "best")
    assert tensors is not None
    assert arrays is not None
    assert same(tensors.weights, {"x": half.float(), "count": torch.tensor(3)})
    assert {name: array.dtype.name for name, array in arrays.weights.items()} == {"x": "float32", "count": "int64"}
    assert arrays.weights["x"].tolist() == half.tolist()
    assert tensors.tensors["rng.x"].dtype == torch.float16


def test_step_and_details_are_restored(folder: Path) -> None:
    assert newest(folder).step == 5
    assert newest(folder).details["note"] == "five"


def test_weights_are_a_state_dict_of_the_network(tmp_path: Path) -> None:
    network = a_network()
    save(tmp_path, "last", 1, {**weight_tensors(network), "rng.cpu": torch.zeros(1)}, {})
    assert same(newest(tmp_path).weights, network.state_dict())


def test_saving_keeps_the_previous_pair_and_removes_older_ones(folder: Path) -> None:
    for step in (12, 20):
        save(folder, "last", step, {"weights.a": torch.zeros(1)}, {})
    assert sorted(path.name for path in folder.iterdir()) == [
        f"last-{step:09d}.{ending}" for step in (12, 20) for ending in ("json", "safetensors")
    ]


def test_saving_removes_abandoned_pairs_of_later_steps(two: Path) -> None:
    save(two, "last", 7, {"weights.a": torch.zeros(1)}, {})
    assert sorted(path.name for path in two.glob("*.json")) == ["last-000000005.json", "last-000000007.json"]


def test_saving_one_kind_keeps_the_older_pair_of_the_other(folder: Path) -> None:
    save(folder, "best", 12, {"weights.a": torch.zeros(1)}, {})
    assert newest(folder).step == 5


def test_saving_the_same_step_again_replaces_it(folder: Path) -> None:
    save(folder, "last", 5, {"weights.a": torch.tensor([9.0])}, {"note": "again"})
    assert newest(folder).tensors["weights.a"].item() == 9
    assert len(list(folder.iterdir())) == 2


def test_the_newest_of_two_pairs_is_loaded(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "other", "last", 40, {"weights.a": torch.zeros(1)}, {})
    for path in (tmp_path / "other").iterdir():
        path.rename(folder / path.name)
    assert newest(folder).step == 40


@pytest.mark.parametrize("content", [{}, {"best": 1}])
def test_without_a_checkpoint_of_the_kind_none_is_loaded(content: dict[str, int], tmp_path: Path) -> None:
    for kind, step in content.items():
        save(tmp_path, kind, step, {"weights.a": torch.zeros(1)}, {})  # type: ignore[arg-type]
    assert load_newest(tmp_path, "last") is None
    assert load_newest(tmp_path / "nowhere", "last") is None


def test_tensors_without_their_json_are_ignored(folder: Path) -> None:
    save_file({"weights.a": torch.zeros(1)}, folder / "last-000000009.safetensors")
    assert newest(folder).step == 5


@pytest.mark.parametrize(
    "name",
    [".partial-1-last-000000009.safetensors", ".partial-1-last-000000009.json", "last-9.json", "last-x.json", "note"],
)
def test_a_stray_file_is_ignored(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"half")
    assert newest(folder).step == 5


def test_a_json_file_without_its_tensors_is_refused_and_named(folder: Path) -> None:
    (folder / "last-000000005.safetensors").unlink()
    with pytest.raises(RunError, match=r"last-000000005\.safetensors: cannot be read"):
        load_newest(folder, "last")


def test_a_truncated_file_is_refused_and_named(folder: Path) -> None:
    path = folder / "last-000000005.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"last-000000005\.safetensors: its SHA-256 is not the one"):
        load_newest(folder, "last")


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=30, derandomize=True, deadline=None)
def test_any_changed_byte_of_the_tensors_is_detected(
    tmp_path_factory: pytest.TempPathFactory, place: int, change: int
) -> None:
    folder = tmp_path_factory.mktemp("changed")
    save(folder, "last", 1, {"weights.a": torch.arange(3.0)}, {})
    path = folder / "last-000000001.safetensors"
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= change
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"last-000000001\.safetensors"):
        load_newest(folder, "last")


@pytest.mark.parametrize("content", ["", "{", "{}", '{"sha256": null}', '{"sha256": "0"}', "[]", "5", "\x00"])
def test_a_damaged_json_file_is_refused_and_named(folder: Path, content: str) -> None:
    (folder / "last-000000005.json").write_text(content)
    with pytest.raises(RunError, match="last-000000005"):
        load_newest(folder, "last")


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


#: What may have become of the newest pair, and the words of the warning.
DAMAGES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "truncated": (lambda t, j: t.write_bytes(t.read_bytes()[:-5]), "its SHA-256 is not the one"),
    "empty": (lambda t, j: t.write_bytes(b""), "its SHA-256 is not the one"),
    "a bit of the tensors": (lambda t, j: flip(t, 8 * t.stat().st_size - 3), "its SHA-256 is not the one"),
    "half a JSON": (lambda t, j: j.write_bytes(j.read_bytes()[:20]), "cannot be read"),
    "a changed number in the JSON": (
        lambda t, j: j.write_text(j.read_text().replace('"nine"', '"mine"')),
        "its own SHA-256 does not match",
    ),
    "no tensors": (lambda t, j: t.unlink(), "cannot be read"),
    "no JSON": (lambda t, j: j.unlink(), "its JSON is missing"),
}


@pytest.mark.parametrize(("damage", "words"), list(DAMAGES.values()), ids=list(DAMAGES))
def test_if_the_newest_pair_is_damaged_the_previous_one_is_used_with_a_warning(
    damage: Callable[[Path, Path], object], words: str, two: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(two / "last-000000009.safetensors", two / "last-000000009.json")
    with caplog.at_level("WARNING", logger="znormseg"):
        assert newest(two).details["note"] == "five"
    (line,) = caplog.messages
    assert str(two / "last-000000009.") in line
    assert words in line
    assert "Skipped; using the checkpoint of step 5." in line


@given(st.integers(0, 100_000))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_no_flipped_bit_of_the_json_changes_what_is_loaded(tmp_path_factory: pytest.TempPathFactory, bit: int) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    for step in (5, 9):
        save(folder, "last", step, {"weights.a": torch.full((3,), float(step))}, {"n": step, "list": [1.5, None]})
    flip(folder / "last-000000009.json", bit)
    found = newest(folder)
    assert found.details["n"] == found.step == found.tensors["weights.a"][0].item()
    assert found.details["list"] == [1.5, None]


def test_if_every_pair_is_damaged_the_error_names_them_all(two: Path) -> None:
    for path in two.glob("*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(RunError, match=r"last-000000009\.safetensors.*last-000000005\.safetensors.*Restore both"):
        load_newest(two, "last")


def test_a_checkpoint_of_an_older_version_without_a_json_digest_is_read(folder: Path) -> None:
    path = folder / "last-000000005.json"
    details = json.loads(path.read_text())
    del details["json_sha256"]
    path.write_text(json.dumps({**details, "note": "old"}))
    assert newest(folder).details["note"] == "old"


def test_an_intact_checkpoint_that_does_not_fit_is_skipped(two: Path) -> None:
    found = load_newest(two, "last", unfit=lambda c: "odd" if c.step == 9 else None)
    assert found is not None
    assert found.step == 5


def test_data_and_directory_entries_are_synced_before_an_older_pair_is_removed(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    done: list[str] = []
    fsync, unlink = os.fsync, Path.unlink

    def noted_fsync(number: int) -> None:
        done.append(f"sync {Path(f'/proc/self/fd/{number}').readlink().name}")
        fsync(number)

    def noted_unlink(path: Path, missing_ok: bool = False) -> None:
        if path.exists():
            done.append(f"remove {path.name}")
        unlink(path, missing_ok)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "unlink", noted_unlink)
    save(two, "last", 12, {"weights.a": torch.zeros(1)}, {})
    beside = f"{partial_prefix(os.getpid())}last-000000012"
    written = [f"sync {beside}.safetensors", f"sync {two.name}", f"sync {beside}.json", f"sync {two.name}"]
    assert done == [*written, "remove last-000000005.json", "remove last-000000005.safetensors"]


def test_saving_the_same_tensors_with_other_details_is_atomic(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from app.runs import checkpoints

    def cut_off(path: Path, content: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "write_json", cut_off)
    with pytest.raises(KeyboardInterrupt):
        save(folder, "last", 5, {"weights.a": torch.tensor([1.0, 2.0, 3.0])}, {"note": "again"})
    assert newest(folder).details["note"] == "five"


def test_a_pickle_is_refused_even_with_the_right_digest(folder: Path) -> None:
    import hashlib

    path = folder / "last-000000005.safetensors"
    torch.save({"weights.a": torch.zeros(1)}, path)
    details = {"kind": "last", "step": 5, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(details))
    with pytest.raises(RunError, match="not a safetensors file"):
        load_newest(folder, "last")


def test_an_error_while_saving_leaves_only_the_older_pair(folder: Path) -> None:
    with pytest.raises(TypeError):
        save(folder, "last", 6, {"weights.a": torch.zeros(1)}, {"no JSON": object()})
    assert sorted(path.name for path in folder.iterdir()) == ["last-000000005.json", "last-000000005.safetensors"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_resumes_as_if_the_optimizer_had_not_been_saved(
    name: str, layout: torch.memory_format, tmp_path: Path
) -> None:
    straight, network, resumed = (a_network().to(memory_format=layout) for _ in range(3))  # type: ignore[call-overload]
    optimizer = OPTIMIZERS[name](straight)
    train_(straight, optimizer, range(6))

    before = OPTIMIZERS[name](network)
    train_(network, before, range(3))
    tensors, plain = optimizer_tensors(before)
    save(tmp_path, "last", 3, {**weight_tensors(network), **tensors}, {"optimizer": plain})

    resumed.load_state_dict(newest(tmp_path).weights)
    after = OPTIMIZERS[name](resumed)
    restore_optimizer(after, newest(tmp_path))
    train_(resumed, after, range(3, 6))
    assert same(resumed.state_dict(), straight.state_dict())


def test_the_optimizer_keeps_its_own_group_settings(tmp_path: Path) -> None:
    network = a_network()
    optimizer = OPTIMIZERS["adamw"](network)
    train_(network, optimizer, range(1))
    tensors, plain = optimizer_tensors(optimizer)
    save(tmp_path, "last", 1, tensors, {"optimizer": plain})
    other = torch.optim.AdamW(network.parameters(), lr=0.007)
    restore_optimizer(other, newest(tmp_path))
    assert other.param_groups[0]["lr"] == 0.007


def test_random_numbers_continue_where_they_stopped(tmp_path: Path) -> None:
    torch.manual_seed(3)
    torch.rand(5)
    save(tmp_path, "last", 1, rng_tensors(), {})
    expected = torch.rand(4)
    restore_rng(newest(tmp_path))
    assert torch.equal(torch.rand(4), expected)


def test_checkpoints_contain_only_json_and_safetensors(tiny_run: Path) -> None:
    def read(path: Path) -> Any:
        return json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)

    files = sorted((tiny_run / "checkpoints").iterdir())
    assert {(path.name.split("-")[0], path.suffix) for path in files} == {
        (kind, ending) for kind in ("best", "last") for ending in (".json", ".safetensors")
    }
    assert all(read(path) for path in files)
