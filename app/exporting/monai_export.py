"""A network as a MONAI bundle: configs, weights and README; MONAI runs it with its own transforms, without znormseg.

The bundle's preprocessing and postprocessing repeat the steps of ``predict``. MONAI places windows at one interval and
shifts the last one back, whereas ``predict`` spreads them evenly; so for each volume the bundle computes the overlap at
which the two agree, except that MONAI rounds the interval to voxels. One difference remains: where images are resampled
to a coarser spacing, MONAI smooths with zeros beyond the border.

Source: MONAI's bundle specification (docs.monai.io, mb_specification).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata as packages
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from app import NOTICE
from app.errors import RunError
from app.exporting.parity import Answer, Floats
from app.inference.model import Model
from app.runs.folder import write_durably, write_json
from data.labels import CONTRASTS, REGIONS
from data.preprocess import SPACING_TOLERANCE
from models import NetworkConfig

#: Version of the bundle's format, not of the network.
_VERSION: Final = "0.1.0"
_SCHEMA: Final = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)
_MONAI_NETWORKS: Final = ("unet", "resunet", "segresnet")
#: Accepted endings of file names by contrast, before ``.nii`` or ``.nii.gz``.
_ENDINGS: Final = {"t1": ["t1", "t1n"], "t1c": ["t1c", "t1ce", "t1gd"], "t2": ["t2", "t2w"], "flair": ["flair", "t2f"]}


def require_monai(model: Model, run: Path) -> None:
    """Check that MONAI can run a network.

    Raises:
        RunError: MONAI lacks the architecture, or its transforms cannot make the input channels.
    """
    if model.config.network.architecture not in _MONAI_NETWORKS:
        raise RunError(
            f"{run}: its network is a {model.config.network.architecture}, which MONAI does not have; a bundle holds "
            f"{', '.join(_MONAI_NETWORKS)}. --format openvino and onnx take it."
        )
    if model.takes_missing_contrasts:
        raise RunError(
            f"{run}: trained with augment.contrast_dropout, so its network takes channels that MONAI's transforms do "
            "not make. --format openvino and onnx take it, for cases with all four contrasts."
        )


def write_bundle(model: Model, description: Mapping[str, Any], folder: Path) -> Answer:
    """Write a bundle, and build its network from the files that were written.

    Args:
        model: one that :func:`require_monai` accepts.
        description: of the model, as returned by :func:`app.runs.model_card.describe_model`.
        folder: to write to.

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
    """A network in the notation of MONAI's configs; :mod:`models.networks` builds the same one."""
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
    necrosis, oedema, enhancing = convention.values
    low, high = 1 - SPACING_TOLERANCE, 1 + SPACING_TOLERANCE
    return {
        "imports": ["$import glob", "$import math"],
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/eval'",
        "dataset_dir": "$@bundle_root + '/case'",
        "endings": _ENDINGS,
        "files_of": "$lambda contrast: sorted(path for ending in @endings[contrast] for path in "
        "glob.glob(@dataset_dir + '/**/*[-_]' + ending + '.nii*', recursive=True))",
        "data": f"$[{{'image': list(paths)}} for paths in zip(*[@files_of(c) for c in {CONTRASTS!r}], strict=True)]",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "spacing_mm": list(model.spacing_mm),
        "network_def": network_def(config.network),
        "network": "$@network_def.to(@device)",
        "shape_at_spacing": "$lambda x: [n if all("
        f"{low!r} * w <= float(o) <= {high!r} * w for o, w in zip(x.pixdim, @spacing_mm)) "
        "else max(1, round(n * float(own) / wanted)) "
        "for n, own, wanted in zip(x.shape[1:], x.pixdim, @spacing_mm)]",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True},
                {
                    "_target_": "Orientationd",
                    "keys": "image",
                    "axcodes": "LPS",
                    "labels": [["L", "R"], ["P", "A"], ["I", "S"]],
                },
                {"_target_": "CopyItemsd", "keys": "image", "names": "brain"},
                {
                    "_target_": "Lambdad",
                    "keys": "brain",
                    "func": "$lambda x: (x != 0).any(dim=0, keepdim=True).float()",
                },
                *(
                    [
                        {
                            "_target_": "CropForegroundd",
                            "keys": ["image", "brain"],
                            "source_key": "brain",
                            "allow_smaller": True,
                        }
                    ]
                    if config.inference.crop
                    else []
                ),
                {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True, "channel_wise": True},
                {
                    "_target_": "Lambdad",
                    "keys": "image",
                    "func": "$lambda x: x if list(x.shape[1:]) == @shape_at_spacing(x) else monai.transforms.Resize("
                    "@shape_at_spacing(x), mode='trilinear', anti_aliasing=True)(x)",
                },
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "@data", "transform": "@preprocessing"},
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": 1,
            "shuffle": False,
            "num_workers": 0,
        },
        "window_voxels": list(config.training.patch_voxels),
        "overlap": config.inference.overlap,
        # MONAI takes int(side * (1 - overlap)) as the interval; half a voxel more keeps it from being one too small.
        "overlaps": "$lambda shape: [1 - (max(1, math.ceil((size - side) / math.ceil((size - side) / "
        "(side * (1 - @overlap))))) + 0.5) / side if size > side else 0.0 "
        "for size, side in zip(shape, @window_voxels)]",
        "inferer": "$lambda image, network, *args, **kwargs: monai.inferers.SlidingWindowInferer(@window_voxels, "
        "sw_batch_size=1, overlap=@overlaps(image.shape[2:]), mode='gaussian', sigma_scale=0.125)"
        "(image, network, *args, **kwargs)",
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": "Lambda",
                    "func": "$lambda d: d if d['pred'].shape[1:] == d['brain'].shape[1:] else {**d, 'pred': "
                    "monai.transforms.Resize(list(d['brain'].shape[1:]), mode='trilinear')(d['pred'])}",
                },
                {"_target_": "Lambdad", "keys": "pred", "func": "$lambda x: (x > 0).float()"},
                {"_target_": "MaskIntensityd", "keys": "pred", "mask_key": "brain"},
                {
                    "_target_": "Lambdad",
                    "keys": "pred",
                    "func": "$lambda x: torch.where(x[[0]] * x[[1]] * x[[2]] > 0, "
                    f"{enhancing}, torch.where(x[[0]] * x[[1]] > 0, {necrosis}, torch.where(x[[0]] > 0, {oedema}, 0)))",
                },
                {
                    "_target_": "Invertd",
                    "keys": "pred",
                    "transform": "@preprocessing",
                    "orig_keys": "brain",
                    "nearest_interp": True,
                    "to_tensor": True,
                },
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_postfix": "seg",
                    "output_dtype": "$numpy.uint8",
                    "resample": False,
                    "separate_folder": False,
                    "squeeze_end_dims": True,
                },
            ],
        },
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
                "map_location": "@device",
            }
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "amp": False,
        },
        "run": ["$@evaluator.run()"],
    }


def _metadata(model: Model, description: Mapping[str, Any]) -> dict[str, Any]:
    window = list(model.config.training.patch_voxels)
    names = {"t1": "T1", "t1c": "T1c", "t2": "T2", "flair": "FLAIR"}
    common = {"spatial_shape": window, "dtype": "float32", "is_patch_data": True}
    return {
        "schema": _SCHEMA,
        "version": _VERSION,
        "changelog": {_VERSION: "exported by znormseg"},
        "monai_version": packages.version("monai"),
        "pytorch_version": packages.version("torch").partition("+")[0],
        "numpy_version": packages.version("numpy"),
        "required_packages_version": {
            "nibabel": packages.version("nibabel"),
            "pytorch-ignite": "0.5.2",
            "fire": "0.6.0",
        },
        "supported_apps": {},
        "name": str(description["name"]),
        "task": "Brain tumour segmentation from multi-contrast MRI",
        "description": str(description["summary"]),
        "authors": "whoever trained the network; not stated",
        "copyright": "not stated",
        "data_source": "not stated",
        "data_type": "nibabel",
        "image_classes": f"{', '.join(names[contrast] for contrast in CONTRASTS)}, skull-stripped, on one grid",
        "label_classes": f"label map of {model.convention.name}",
        "pred_classes": f"3 channels of logits, {', '.join(REGIONS)}",
        "eval_metrics": {key: value for key, value in description["metrics"].items() if isinstance(value, int | float)},
        "intended_use": NOTICE,
        "references": [],
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": "MR",
                    "num_channels": len(CONTRASTS),
                    **common,
                    "value_range": [],
                    "channel_def": {str(number): names[contrast] for number, contrast in enumerate(CONTRASTS)},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "segmentation",
                    "num_channels": len(REGIONS),
                    **common,
                    "value_range": [],
                    "channel_def": {str(number): region for number, region in enumerate(REGIONS)},
                }
            },
        },
    }


def _readme(model: Model, description: Mapping[str, Any]) -> str:
    convention = model.convention
    return f"""# {description["name"]}

{description["summary"]}

**{NOTICE}**

    pip install 'monai[nibabel,ignite,fire]'
    python -m monai.bundle run --config_file configs/inference.json --bundle_root . --dataset_dir CASE --output_dir OUT

`CASE` is a folder with one case, or with several: skull-stripped images on one grid and in one voxel order per case,
whose names end, after a `-` or `_`, in {_endings()}.
`OUT` gets a label map per case, named after its T1: {convention.necrosis} necrosis, {convention.oedema} oedema,
{convention.enhancing} enhancing tumour.

The network answers with logits of {", ".join(REGIONS)}, each cut at 0; what lies outside of a larger region is in no
smaller one, and outside of the brain there is no tumour. `parity.json` says how exactly this network is the original.
`MODEL_CARD.md` has data, metrics and limits.
"""


def _endings() -> str:
    return ", ".join(f"`{'`, `'.join(endings)}` ({contrast})" for contrast, endings in _ENDINGS.items())


def _licence(description: Mapping[str, Any]) -> str:
    return (
        "The configs of this bundle were written by znormseg and may be used under the Apache License, Version 2.0\n"
        "(https://www.apache.org/licenses/LICENSE-2.0).\n\n"
        f"The weights, models/model.pt: {description['licence']}\n"
    )
