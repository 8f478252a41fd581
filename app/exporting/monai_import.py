"""Import MONAI's bundle ``brats_mri_segmentation`` as a folder that ``predict`` accepts like a run.

The import reorders the bundle's channels once, in the weights: those of the input in the first convolution, those of
the output in the last. The result is an ordinary network of this program with its own config.

Source: the bundle's configs/inference.json, configs/metadata.json (MONAI model zoo); Myronenko 2018, arXiv 1810.11654.
"""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from app.config.inference import InferenceConfig
from app.config.load import RunConfig, to_plain, to_yaml
from app.config.training import TrainingConfig
from app.errors import RunError
from app.exporting.places import export_folder_when_complete, require_empty_export
from app.runs import checkpoints
from app.runs.folder import read_json, write_durably
from app.runs.model_card import seal
from app.runs.published import PublishedModel
from app.system.device import versions
from data.files import file_sha256
from data.labels import BRATS2021, CONTRASTS, REGIONS
from models import NetworkConfig, build_network

#: The supported bundle, for messages.
UNDERSTOOD: Final = (
    "The supported bundle is MONAI's brats_mri_segmentation: a SegResNet (init_filters 16, blocks_down 1, 2, 2, 4, "
    "blocks_up 1, 1, 1) from the channels T1c, T1, T2, FLAIR to tumour core, whole tumour, enhancing tumour"
)
#: The bundle's channels in its own order, with this program's names.
BUNDLE_CONTRASTS: Final = ("t1c", "t1", "t2", "flair")
BUNDLE_REGIONS: Final = ("TC", "WT", "ET")
#: Names that the bundle's metadata may use for them.
_CONTRAST_NAMES: Final = {"t1c": "t1c", "t1ce": "t1c", "t1gd": "t1c", "t1": "t1", "t2": "t2", "flair": "flair"}
_REGION_NAMES: Final = {
    "tumor core": "TC",
    "whole tumor": "WT",
    "enhancing tumor": "ET",
    "tc": "TC",
    "wt": "WT",
    "et": "ET",
}
#: Weights of MONAI's SegResNet that depend on the order of channels.
_FIRST: Final = "convInit.conv.weight"
_LAST: Final = ("conv_final.2.conv.weight", "conv_final.2.conv.bias")
_NETWORK: Final[dict[str, Any]] = {
    "_target_": "SegResNet",
    "blocks_down": [1, 2, 2, 4],
    "blocks_up": [1, 1, 1],
    "init_filters": 16,
    "in_channels": 4,
    "out_channels": 3,
}
#: Keys of the network that do not affect predictions, or that state MONAI's defaults.
_HARMLESS: Final = {"dropout_prob": None, "spatial_dims": 3}
#: Keys under which a checkpoint may hold the weights.
_WRAPPINGS: Final = ("model", "state_dict", "network")


@dataclass(frozen=True, kw_only=True)
class Imported:
    """Result of an import."""

    folder: Path
    bundle: str
    """Name in the bundle's metadata."""
    sha256: str
    """SHA-256 of the weights in the folder."""
    config: RunConfig

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return {
            "model": str(self.folder),
            "bundle": self.bundle,
            "weights_sha256": self.sha256,
            "window_voxels": list(self.config.training.patch_voxels),
            "overlap": self.config.inference.overlap,
        }


def import_bundle(bundle: Path, out: Path) -> Imported:
    """Create a model folder from a bundle.

    Args:
        bundle: folder with ``configs/metadata.json``, ``configs/inference.json`` and ``models/model.pt``.
        out: folder to create; it must be empty or not exist.

    Raises:
        RunError: ``out`` is not empty or cannot be a folder; ``bundle`` is not a bundle or not the supported one; its
            weights are missing, damaged, not finite, or would have to be unpickled.
        OSError: ``out`` cannot be written to.
    """
    require_empty_export(out)
    metadata, inference = (_json(bundle, f"configs/{name}.json") for name in ("metadata", "inference"))
    config = _config(bundle, metadata, inference)
    source = bundle / "models" / "model.pt"
    name = str(metadata.get("name") or metadata.get("task") or bundle.resolve().name)
    weights = _weights(source)
    statements = _provenance(bundle, name, metadata, source)
    return _import(source, weights, config, statements, out, licences=_licences(bundle))


def import_published(source: Path, model: PublishedModel, out: Path) -> Imported:
    """Create a model folder from the published weights of the bundle, whose configuration is known.

    Args:
        source: the weights, verified by their hash.
        model: the published model that they belong to.
        out: folder to create; it must be empty or not exist.

    Raises:
        RunError, OSError: as raised by :func:`import_bundle`.
    """
    config = RunConfig(
        network=NetworkConfig(architecture="segresnet", channels=(16, 32, 64, 128), dropout=0.2),
        training=TrainingConfig(steps=1, patch_voxels=(240, 240, 160)),
        inference=InferenceConfig(overlap=0.5, crop=False),
    )
    statements = {
        "name": model.name,
        "description": f"{model.summary}.",
        "data": {"source": model.files[0].url, "citation": model.citation, "SHA-256 of model.pt": file_sha256(source)},
        "metrics": {"metrics": "see the bundle's own documentation"},
        "limits": list(model.limits),
        "licence": model.licence,
    }
    return _import(source, _weights(source), config, statements, out)


def _import(
    source: Path,
    weights: Mapping[str, Tensor],
    config: RunConfig,
    statements: dict[str, Any],
    out: Path,
    *,
    licences: Sequence[Path] = (),
) -> Imported:
    """Create a model folder from the weights of ``source``, their config and the statements about them."""
    weights = in_our_order(weights)
    network = build_network(config.network, in_channels=len(CONTRASTS), out_channels=len(REGIONS))
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(
            f"{source}: the weights do not belong to this network ({_first_line(error)}). {UNDERSTOOD}."
        ) from error
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
        raise RunError(f"{source}: some weights are NaN or infinite. Download them again.")
    facts = {
        "contrasts": list(CONTRASTS),
        "takes_missing_contrasts": False,
        "regions": list(REGIONS),
        "labels": BRATS2021.name,
        "spacing_mm": [1.0, 1.0, 1.0],
        "versions": versions(),
        "imported": statements,
    }
    with export_folder_when_complete(out) as partial:
        tensors = checkpoints.weight_tensors(network)
        checkpoints.save(
            partial / "checkpoints", "best", 0, tensors, {"dice": None, **facts, "config": to_plain(config)}
        )
        write_durably(partial / "config.yaml", to_yaml(config).encode())
        for licence in licences:
            shutil.copyfile(licence, partial / f"BUNDLE-{licence.name}")
        seal(partial, everything=True)
    best = checkpoints.load_newest(out / "checkpoints", "best")
    assert best is not None
    return Imported(folder=out, bundle=statements["name"], sha256=best.sha256, config=config)


def in_our_order(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reorder the bundle's weights for input in the order of ``CONTRASTS`` and output in that of ``REGIONS``.

    Args:
        weights: state dict in the bundle's own orders; the state dict of a different network is returned unchanged.
    """
    channels = [BUNDLE_CONTRASTS.index(contrast) for contrast in CONTRASTS]
    regions = [BUNDLE_REGIONS.index(region) for region in REGIONS]
    ordered = dict(weights)
    if _FIRST in ordered and ordered[_FIRST].ndim == 5 and ordered[_FIRST].shape[1] == len(channels):
        ordered[_FIRST] = ordered[_FIRST][:, channels]
    for name in _LAST:
        if name in ordered and ordered[name].shape[:1] == (len(regions),):
            ordered[name] = ordered[name][regions]
    return ordered


def _config(bundle: Path, metadata: Mapping[str, Any], inference: Mapping[str, Any]) -> RunConfig:
    """Return a config of this program that has the same effect as the bundle's settings."""
    try:
        network = dict(inference["network_def"])
        inferer = dict(inference["inferer"])
        steps = {str(step["_target_"]): step for step in inference["preprocessing"]["transforms"]}
        formats = metadata["network_data_format"]
        inputs, outputs = formats["inputs"]["image"]["channel_def"], formats["outputs"]["pred"]["channel_def"]
        contrasts = tuple(_CONTRAST_NAMES.get(str(inputs[key]).lower()) for key in sorted(inputs))
        regions = tuple(_REGION_NAMES.get(str(outputs[key]).lower()) for key in sorted(outputs))
        normalise = steps.get("NormalizeIntensityd", {})
        x, y, z = (int(side) for side in inferer["roi_size"])
        overlap = float(inferer["overlap"])
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RunError(f"{bundle}: not the supported bundle ({error!r} in its configs). {UNDERSTOOD}.") from error
    dropout = network.get("dropout_prob") or 0.0
    differing = [
        f"network_def {key} is {network.get(key)!r}"
        for key in sorted({*_NETWORK, *network} - set(_HARMLESS))
        if network.get(key) != _NETWORK.get(key)
    ]
    if network.get("spatial_dims", 3) != 3:
        differing.append(f"network_def spatial_dims is {network['spatial_dims']!r}")
    if contrasts != BUNDLE_CONTRASTS:
        differing.append(f"the input channels are {', '.join(str(inputs[key]) for key in sorted(inputs))}")
    if regions != BUNDLE_REGIONS:
        differing.append(f"the output channels are {', '.join(str(outputs[key]) for key in sorted(outputs))}")
    if normalise.get("nonzero") is not True or normalise.get("channel_wise") is not True:
        differing.append("it does not normalise the non-zero voxels of each channel")
    if unknown := sorted(set(steps) - {"LoadImaged", "NormalizeIntensityd", "EnsureChannelFirstd", "EnsureTyped"}):
        differing.append(f"its preprocessing also has {', '.join(unknown)}")
    if inferer.get("_target_") != "SlidingWindowInferer" or inferer.get("mode", "constant") not in (
        "constant",
        "gaussian",
    ):
        differing.append(f"its inferer is {inferer.get('_target_')!r}, mode {inferer.get('mode')!r}")
    if differing:
        raise RunError(f"{bundle}: not the supported bundle: {'; '.join(differing)}. {UNDERSTOOD}.")
    try:
        return RunConfig(
            network=NetworkConfig(architecture="segresnet", channels=(16, 32, 64, 128), dropout=float(dropout)),
            training=TrainingConfig(steps=1, patch_voxels=(x, y, z)),
            inference=InferenceConfig(overlap=overlap, crop=False),
        )
    except (TypeError, ValueError) as error:
        raise RunError(f"{bundle}: its settings are invalid here: {error}. {UNDERSTOOD}.") from error


def _json(bundle: Path, name: str) -> Mapping[str, Any]:
    if not (bundle / name).is_file():
        raise RunError(f"{bundle}: contains no {name}; give the folder of a bundle. {UNDERSTOOD}.")
    content = read_json(bundle / name)
    if not isinstance(content, dict):
        raise RunError(f"{bundle / name}: contains no JSON object. {UNDERSTOOD}.")
    return content


def _weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict without unpickling anything but tensors."""
    if not path.is_file():
        raise RunError(
            f"{path}: does not exist. The weights are downloaded separately from the bundle's configs: "
            "python -m monai.bundle download_large_files --bundle_path BUNDLE"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats that torch then refuses
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RunError(
            f"{path}: damaged, or contains more than tensors. It was not read, because unpickling it could run "
            "arbitrary code. Ask its author for a file with only the state dict."
        ) from error
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
    ) as error:
        raise RunError(f"{path}: cannot be read as weights ({_first_line(error)})") from error
    for key in _WRAPPINGS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise RunError(f"{path}: contains no state dict of a network. {UNDERSTOOD}.")
    return {str(name): tensor for name, tensor in content.items()}


def _provenance(bundle: Path, name: str, metadata: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Return the bundle's statements about itself, for the model card."""
    metrics = metadata.get("eval_metrics")
    licences = [path.name for path in _licences(bundle)]
    return {
        "name": name,
        "description": str(metadata.get("description") or "the bundle does not describe itself."),
        "data": {
            "source": str(metadata.get("data_source") or "not stated in the bundle"),
            "bundle version": str(metadata.get("version") or "not stated"),
            "SHA-256 of model.pt": file_sha256(source),
        },
        "metrics": {f"{key}, as the bundle states it": value for key, value in metrics.items()}
        if isinstance(metrics, Mapping) and metrics
        else {"metrics": "none stated in the bundle"},
        "licence": f"{metadata.get('copyright') or 'no copyright stated in the bundle'}; "
        + (
            f"its terms are in {', '.join('BUNDLE-' + name for name in licences)}"
            if licences
            else "no licence file in it"
        ),
    }


def _licences(bundle: Path) -> Sequence[Path]:
    places = (bundle / "LICENSE", bundle / "docs" / "license.txt", bundle / "docs" / "data_license.txt")
    return [path for path in places if path.is_file()]


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
