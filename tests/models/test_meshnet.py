"""MeshNet compared with its slow reference, and the files that are read or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize("rows", [50, 10**6])
def test_the_fast_form_equals_the_slow_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr("models.meshnet._ROWS", rows)
    network = read_meshnet(*write(tmp_path))
    image = torch.rand(9, 8, 7, generator=torch.Generator().manual_seed(0))
    # Sums are taken in another order.
    torch.testing.assert_close(network.logits(image), network.reference(image), rtol=1e-4, atol=1e-4)


def test_the_logits_of_a_constant_image_are_finite(tmp_path: Path) -> None:
    assert read_meshnet(*write(tmp_path)).logits(torch.zeros(6, 6, 6)).isfinite().all()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"strides": [2, 2, 2]}, "strides"), ({"activation": "relu"}, "GELU"), ({"padding": "valid"}, "padding")],
)
def test_another_kind_of_network_is_refused(tmp_path: Path, changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_meshnet(*write(tmp_path, **changed))


@pytest.mark.parametrize("count", [-4, 4])
def test_weights_of_the_wrong_shape_are_refused(tmp_path: Path, count: int) -> None:
    description, weights = write(tmp_path)
    raw = weights.read_bytes()
    weights.write_bytes(raw + b"0000" if count > 0 else raw[:count])
    with pytest.raises(ValueError, match="bytes of weights"):
        read_meshnet(description, weights)


@pytest.mark.parametrize("content", ["{}", "[]", '{"weightsManifest": 3}', "no JSON"])
def test_a_description_of_another_architecture_is_refused(tmp_path: Path, content: str) -> None:
    description, weights = write(tmp_path)
    description.write_text(content)
    with pytest.raises(ValueError, match=r"description|Expecting|convolutions"):
        read_meshnet(description, weights)


def test_non_finite_weights_are_refused(tmp_path: Path) -> None:
    description, weights = write(tmp_path)
    weights.write_bytes(np.array([np.nan], "<f4").tobytes() + weights.read_bytes()[4:])
    with pytest.raises(ValueError, match="NaN"):
        read_meshnet(description, weights)


def test_the_network_is_immutable(tmp_path: Path) -> None:
    network = read_meshnet(*write(tmp_path))
    assert isinstance(network, MeshNet)
    with pytest.raises(AttributeError):
        network.convolutions = ()  # type: ignore[misc]
