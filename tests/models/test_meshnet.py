"""MeshNet against its slow twin, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from models.meshnet import MeshNet, read_meshnet

#: Name, kernel size, in and out channels, dilation: two normalized convolutions with GELU, and an output with bias.
LAYERS = [("first_gn", 3, 1, 4, 2), ("second_gn", 3, 4, 4, 1), ("output", 1, 4, 2, 1)]


def write(folder: Path, layers: list[tuple[str, int, int, int, int]] = LAYERS, **changed: Any) -> tuple[Path, Path]:
    """Write random weights as TensorFlow.js files."""
    generator = np.random.default_rng(0)
    described: list[dict[str, Any]] = [{"class_name": "InputLayer", "config": {"name": "input"}}]
    weights: list[dict[str, Any]] = []
    raw = b""
    for name, size, inputs, outputs, dilation in layers:
        config = {
            "name": name,
            "kernel_size": [size] * 3,
            "strides": [1, 1, 1],
            "dilation_rate": [dilation] * 3,
            "padding": "same",
            "activation": "linear",
            **changed,
        }
        described.append({"class_name": "Conv3D", "config": config})
        arrays = {"kernel": generator.normal(size=(size, size, size, inputs, outputs))}
        if name.endswith("_gn"):
            described.append({"class_name": "Activation", "config": {"name": f"{name}_a", "activation": "gelu"}})
        else:
            arrays["bias"] = generator.normal(size=outputs)
        for role, array in arrays.items():
            weights.append({"name": f"{name}/{role}", "shape": list(array.shape), "dtype": "float32"})
            raw += array.astype("<f4").tobytes()
    content = {
        "modelTopology": {"model_config": {"config": {"layers": described}}},
        "weightsManifest": [{"weights": weights}],
    }
    (folder / "model.json").write_text(json.dumps(content))
    (folder / "model.bin").write_bytes(raw)
    return folder / "model.json", folder / "model.bin"


def volume(side: int = 20) -> torch.Tensor:
    """A random box in the middle of a volume of zeros."""
    values = torch.zeros(side, side, side)
    middle = slice(side // 2 - 4, side // 2 + 4)
    values[middle, middle, middle] = torch.rand(8, 8, 8, generator=torch.Generator().manual_seed(0))
    return values


def test_a_box_gives_what_the_whole_volume_gives_where_nothing_is_padded(tmp_path: Path) -> None:
    layers = [(name, 1, inputs, outputs, 1) for name, _, inputs, outputs, _ in LAYERS]
    network = read_meshnet(*write(tmp_path, layers))
    whole = network.whole(volume())[:, 5:15, 4:16, 5:15]
    box = network.boxed(volume()[5:15, 4:16, 5:15], volume_voxels=20**3)
    torch.testing.assert_close(box, whole, rtol=1e-4, atol=1e-4)  # sums in another order


def test_a_larger_box_gives_the_same(tmp_path: Path) -> None:
    network = read_meshnet(*write(tmp_path))
    reach = network.reach
    inside = slice(2 + reach, 18 - reach)
    small = network.boxed(volume()[2:18, 2:18, 2:18], volume_voxels=10**6)
    large = network.boxed(functional.pad(volume(), [6] * 6), volume_voxels=10**6)[:, 8:24, 8:24, 8:24]
    cut = slice(inside.start - 2, inside.stop - 2)
    torch.testing.assert_close(small[:, cut, cut, cut], large[:, cut, cut, cut], rtol=1e-3, atol=1e-3)


def test_far_from_the_border_a_box_gives_what_the_whole_volume_gives(tmp_path: Path) -> None:
    network = read_meshnet(*write(tmp_path))
    whole, box = network.whole(volume(64)), network.boxed(volume(64)[20:44, 20:44, 20:44], volume_voxels=64**3)
    # The whole volume's border has the sides' share of statistics; the masks still agree.
    agreement = ((whole[1] > whole[0])[20:44, 20:44, 20:44] == (box[1] > box[0])).float().mean()
    assert agreement > 0.97


def test_reach_adds_up_over_the_convolutions(tmp_path: Path) -> None:
    assert read_meshnet(*write(tmp_path)).reach == 3


@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"strides": [2, 2, 2]}, "strides"), ({"activation": "relu"}, "GELU"), ({"padding": "valid"}, "padding")],
)
def test_another_kind_of_network_is_refused(tmp_path: Path, changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_meshnet(*write(tmp_path, **changed))


@pytest.mark.parametrize("count", [-4, 4])
def test_weights_of_another_size_are_refused(tmp_path: Path, count: int) -> None:
    description, weights = write(tmp_path)
    raw = weights.read_bytes()
    weights.write_bytes(raw + b"0000" if count > 0 else raw[:count])
    with pytest.raises(ValueError, match="bytes of weights"):
        read_meshnet(description, weights)


@pytest.mark.parametrize("content", ["{}", "[]", '{"weightsManifest": 3}', "no JSON"])
def test_a_description_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    description, weights = write(tmp_path)
    description.write_text(content)
    with pytest.raises(ValueError, match=r"description|Expecting|convolutions"):
        read_meshnet(description, weights)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    description, weights = write(tmp_path)
    weights.write_bytes(np.array([np.nan], "<f4").tobytes() + weights.read_bytes()[4:])
    with pytest.raises(ValueError, match="NaN"):
        read_meshnet(description, weights)


def test_the_network_is_immutable(tmp_path: Path) -> None:
    network = read_meshnet(*write(tmp_path))
    assert isinstance(network, MeshNet)
    with pytest.raises(AttributeError):
        network.convolutions = ()  # type: ignore[misc]
