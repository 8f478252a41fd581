"""Export a network as a MONAI bundle (configs, weights, README), which MONAI runs without znormseg.

The bundle's preprocessing and postprocessing repeat the steps of ``predict``. MONAI places windows at a fixed interval
and shifts the last one back, whereas ``predict`` spreads them evenly. For each volume, the bundle therefore computes
the overlap at which the two agree, except that MONAI rounds the interval to voxels. One other difference remains: where
images are resampled to a coarser spacing, MONAI smooths with zeros beyond the border.

Source: MONAI's bundle specification (docs.monai.io, mb_specification).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata as packages
from importlib import resources
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import yaml

from app import NOTICE
from app.errors import RunError
from app.exporting.parity import Answer, Floats
from app.inference.model import Model
from app.inference.tumour_presence.model import PresenceModel
from app.runs.folder import write_durably, write_json
from data.labels import CONTRASTS, REGIONS
from data.preprocess import SPACING_TOLERANCE
from models import NetworkConfig

_MONAI_NETWORKS: Final = ("unet", "resunet", "segresnet")
#: Accepted endings of file names by contrast, before ``.nii`` or ``.nii.gz``.
_ENDINGS: Final = {"t1": ["t1", "t1n"], "t1c": ["t1c", "t1ce", "t1gd"], "t2": ["t2", "t2w"], "flair": ["flair", "t2f"]}


def require_monai(model: Model | PresenceModel, run: Path) -> None:
    """Check that MONAI can run a network.

    Raises:
        RunError: MONAI lacks the architecture, or its transforms cannot create the input channels.
    """
    if isinstance(model, PresenceModel):
        raise RunError(f"{run}: a presence network; bundles hold segmentations. Use --format openvino or onnx.")
    if model.config.network.architecture not in _MONAI_NETWORKS:
        raise RunError(
            f"{run}: its network is a {model.config.network.architecture}, which MONAI does not have; bundles support "
            f"{', '.join(_MONAI_NETWORKS)}. Use --format openvino or onnx."
        )
    if model.takes_missing_contrasts:
        raise RunError(
            f"{run}: trained with augment.contrast_dropout, so its network needs input channels that MONAI's "
            "transforms do not create. Use --format openvino or onnx, for cases with all four contrasts."
        )


def write_bundle(model: Model, description: Mapping[str, Any], folder: Path) -> Answer:
    """Write a bundle, and build its network from the files that were written.

    Args:
        model: one that :func:`require_monai` accepts.
        description: description of the model, as returned by :func:`app.runs.model_card.describe_model`.
        folder: folder to write to.

    Returns:
        the network as MONAI builds it from the bundle's config and weights.
    """
    for name in ("configs", "models", "docs"):
        (folder / name).mkdir()
    write_json(folder / "configs" / "metadata.json", _metadata(model, description))
    write_json(folder / "configs" / "inference.json", _inference(model))
    state = {name: tensor.contiguous() for name, tensor in model.network.state_dict().items()}
    torch.save(state, folder / "models" / "model.pt")
    write_durably(folder / "docs" / "README.md", _readme(model, description).encode())
    write_durably(folder / "LICENSE", _licence(description).encode())
    return _as_monai_reads_it(folder)


def network_def(config: NetworkConfig) -> dict[str, Any]:
    """Return a network in the notation of MONAI's configs; :mod:`models.networks` builds the same network."""
    common = {"spatial_dims": 3, "in_channels": len(CONTRASTS), "out_channels": len(REGIONS)}
    levels = len(config.channels)
    if config.architecture == "segresnet":
        return {
            "_target_": "SegResNet",
            **common,
            "init_filters": config.channels[0],
            "blocks_down": [1, *(2,) * (levels - 2), 4],
            "blocks_up": [1] * (levels - 1),
            **({"dropout_prob": config.dropout} if config.dropout else {}),
        }
    return {
        "_target_": "UNet",
        **common,
        "channels": list(config.channels),
        "strides": [config.first_stride, *(2,) * (levels - 2)],
        "num_res_units": config.residual_units if config.architecture == "resunet" else 0,
        "norm": ["INSTANCE", {"affine": False}],
        "dropout": config.dropout,
    }


def _as_monai_reads_it(folder: Path) -> Answer:
    from monai.bundle.config_parser import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(folder / "configs" / "inference.json"))
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(folder / "models" / "model.pt", map_location="cpu", weights_only=True))
    network.eval()

    def answer(image: Floats) -> Floats:
        with torch.inference_mode():
            return np.asarray(network(torch.from_numpy(image)).numpy())

    return answer


def _inference(model: Model) -> dict[str, Any]:
    config, convention = model.config, model.convention
    words = {
        "contrasts": CONTRASTS,
        "low": 1 - SPACING_TOLERANCE,
        "high": 1 + SPACING_TOLERANCE,
        **convention.by_tissue,
    }
    content = _template("inference", words) | {
        "endings": _ENDINGS,
        "spacing_mm": list(model.spacing_mm),
        "network_def": network_def(config.network),
        "window_voxels": list(config.training.patch_voxels),
        "overlap": config.inference.overlap,
    }
    if not config.inference.crop:
        steps = content["preprocessing"]["transforms"]
        steps[:] = [step for step in steps if step["_target_"] != "CropForegroundd"]
    return content


def _metadata(model: Model, description: Mapping[str, Any]) -> dict[str, Any]:
    content = _template("metadata", {}) | {
        "monai_version": packages.version("monai"),
        "pytorch_version": packages.version("torch").partition("+")[0],
        "numpy_version": packages.version("numpy"),
        "name": str(description["name"]),
        "description": str(description["summary"]),
        "label_classes": f"label map of {model.convention.name}",
        "eval_metrics": {key: value for key, value in description["metrics"].items() if isinstance(value, int | float)},
        "intended_use": NOTICE,
    }
    content["required_packages_version"]["nibabel"] = packages.version("nibabel")
    formats = content["network_data_format"]
    for channels in (formats["inputs"]["image"], formats["outputs"]["pred"]):
        channels["spatial_shape"] = list(model.config.training.patch_voxels)
    return content


def _template(name: str, words: Mapping[str, object]) -> dict[str, Any]:
    """Read a template of this package, with the words in <> replaced."""
    text = resources.files("app.exporting").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    for word, value in words.items():
        text = text.replace(f"<{word}>", repr(value))
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def _readme(model: Model, description: Mapping[str, Any]) -> str:
    convention = model.convention
    return f"""# {description["name"]}

{description["summary"]}

**{NOTICE}**

    pip install 'monai[nibabel,ignite,fire]'
    python -m monai.bundle run --config_file configs/inference.json --bundle_root . --dataset_dir CASE --output_dir OUT

`CASE` is a folder with one case, or with several: skull-stripped images on one grid and in one voxel order per case,
whose names end, after a `-` or `_`, in {_endings()}.
`OUT` receives a label map per case, named after its T1: {convention.necrosis} necrosis, {convention.oedema} oedema,
{convention.enhancing} enhancing tumour.

The network returns the logits of {", ".join(REGIONS)}, each thresholded at 0; a voxel outside a larger region is in no
smaller one, and a voxel outside the brain is background. `parity.json` has the differences between this network and the
original. `MODEL_CARD.md` has data, metrics and limits.
"""


def _endings() -> str:
    return ", ".join(f"`{'`, `'.join(endings)}` ({contrast})" for contrast, endings in _ENDINGS.items())


def _licence(description: Mapping[str, Any]) -> str:
    return (
        "The configs of this bundle were written by znormseg and may be used under the Apache License, Version 2.0\n"
        "(https://www.apache.org/licenses/LICENSE-2.0).\n\n"
        f"The weights, models/model.pt: {description['licence']}\n"
    )
