"""Export a run's network for other programs, with what is needed to apply it and proof that it matches the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from app.errors import DeviceError, RunError
from app.exporting import formats, monai_export
from app.exporting.parity import WINDOWS, Answer, Floats, Parity, compare_outputs, image_of, labels_of, windows_of
from app.exporting.places import export_folder_when_complete, require_empty_export
from app.inference.ensemble import CROSSVAL_FILE, ENSEMBLE_FILE
from app.inference.model import Model, load_model
from app.inference.sliding_window.grid import SIGMA
from app.inference.tumour_presence.answers import seen_parts
from app.inference.tumour_presence.model import PresenceModel, is_presence_model, load_presence
from app.progress import OnProgress, Progress, silent
from app.runs.folder import read_json, write_json
from app.runs.model_card import SUMS_FILE, describe_model, seal
from app.system.device import Runtime, versions, without_avx2
from data.contrasts import presence_mask
from data.labels import CONTRASTS, REGIONS, region_codes
from data.patches.sampler import cut_patch
from models import GivenPresence, build_network

PARITY_FILE: Final = "parity.json"
PREPROCESSING_FILE: Final = "preprocessing.json"

_NORMALISATION: Final = "each contrast: mean 0, population standard deviation 1 over its voxels other than 0"
#: Parity is measured in float32.
_RUNTIME: Final = Runtime(
    device_name="cpu", precision_name="float32", channels_last=False, reasons=("cpu, float32: for an export",)
)


@dataclass(frozen=True, kw_only=True)
class ExportedNetwork:
    """Result of an export."""

    folder: Path
    file_format: str
    files: tuple[str, ...]
    parity: Parity

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return {
            "folder": str(self.folder),
            "format": self.file_format,
            "files": list(self.files),
            "parity": self.parity.to_json(),
        }


def export_run(
    run: Path, out: Path, *, file_format: str, case: Path | None = None, on_progress: OnProgress = silent
) -> ExportedNetwork:
    """Write a network in another format, compare it with the original, and keep the export only if they agree.

    Args:
        run: folder of a run, an import, or one network of an ensemble.
        out: folder to create; it must be empty or not exist.
        file_format: ``openvino``, ``onnx`` or ``monai-bundle``.
        case: folder of a case whose windows are used for the comparison; None uses a phantom.
        on_progress: called with the step in progress.

    Raises:
        ConfigError: an optional dependency is not installed.
        DataError: the case cannot be used.
        DeviceError: OpenVINO, which runs the export for the comparison, does not support this CPU.
        RunError: ``run`` has no weights, is an ensemble, or has a network that the format does not support; ``out`` is
            not empty; the exported network differs.
        OSError: ``out`` cannot be written to.
    """

    def report(share: float, detail: str) -> None:
        on_progress(Progress(job="exporting", share=share, detail=detail))

    require_empty_export(out)
    if file_format == "openvino" and (why := without_avx2()):
        raise DeviceError(f"--format openvino: the comparison runs OpenVINO, which needs AVX2, and {why}.")
    if file_format == "onnx":
        formats.require_onnx()
    _require_one_network(run)
    report(0.1, "choosing windows for the comparison")
    source = _presence_source(run, case) if is_presence_model(run) else _segmentation_source(run, case)
    if file_format == "monai-bundle":
        monai_export.require_monai(source.model, run)
    description = describe_model(run)
    network, windows = source.network, source.windows
    report(0.4, f"writing the network as {file_format} and comparing it on {source.words}")
    with export_folder_when_complete(out) as partial:
        writers: Mapping[str, Callable[[], Answer]] = {
            "openvino": lambda: formats.write_openvino(network, windows[0], partial),
            "onnx": lambda: formats.write_onnx(network, windows[0], partial),
            "monai-bundle": lambda: monai_export.write_bundle(_label_maps(source.model), description, partial),
        }
        parity = compare_outputs(network, writers[file_format](), windows, source.words, decide=source.decide)
        parity.require(f"{run} as {file_format}")
        write_json(partial / PARITY_FILE, {"format": file_format, **parity.to_json(), "versions": versions()})
        write_json(partial / PREPROCESSING_FILE, source.preprocessing)
        exported = {"format": file_format, "parity on": source.words, "largest difference": parity.largest_difference}
        seal(partial, {**description, "kind": "export", "export": exported}, everything=True)
        files = tuple(sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file()))
    report(1.0, f"{len(files)} files")
    return ExportedNetwork(folder=out, file_format=file_format, files=files, parity=parity)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A network to export, and inputs on which the export is compared with it."""

    model: Model | PresenceModel
    network: nn.Module
    windows: Sequence[Tensor]
    words: str
    """Where the windows come from."""
    preprocessing: Mapping[str, Any]
    decide: Callable[[Floats], npt.NDArray[Any]]


def _segmentation_source(run: Path, case: Path | None) -> _Source:
    model = load_model(run, _RUNTIME)
    windows, words = windows_of(model, case)
    return _Source(
        model=model,
        network=_network_of(model),
        windows=windows,
        words=words,
        preprocessing=preprocessing(model),
        decide=labels_of,
    )


def _presence_source(run: Path, case: Path | None) -> _Source:
    """Return a presence network, and what it sees of a case: the whole brain, or some slabs."""
    model = load_presence(run, _RUNTIME)
    (network,) = model.networks
    if model.takes_missing_contrasts:
        network = GivenPresence(network, presence_mask(CONTRASTS)).eval()
    image, words = image_of(model.spacing_mm, case)
    patch = model.config.training.patch_voxels
    middle = tuple(side // 2 for side in image.shape[1:])
    size = (*patch[:2], image.shape[3]) if model.config.task.by_slab else patch
    whole = cut_patch(image, middle, size)  # the export has a fixed size
    parts = [torch.from_numpy(part)[None] for part in seen_parts(whole, model.config)]
    filled = [part for part in parts if part.any()]
    chosen = np.unique(np.linspace(0, len(filled) - 1, WINDOWS).round().astype(int))
    return _Source(
        model=model,
        network=network,
        windows=[filled[number] for number in chosen],
        words=words,
        preprocessing=presence_preprocessing(model),
        decide=lambda logits: logits > 0,
    )


def presence_preprocessing(model: PresenceModel) -> dict[str, Any]:
    """Return the steps that a program must apply before and after a presence network, as plain data."""
    task, patch = model.config.task, model.config.training.patch_voxels
    return {
        "input": {"name": formats.INPUT, "contrasts": list(CONTRASTS), "layout": "NCXYZ", "dtype": "float32"},
        "voxel_order": "LPS",
        "crop": "to the smallest box with all voxels that are not 0 in some contrast",
        "normalisation": _NORMALISATION,
        "spacing_mm": list(model.spacing_mm),
        "size_voxels": list(patch),
        "padding": "with 0, evenly on both sides; a larger box has to be cut, which znormseg predict does not do",
        "slab_slices": patch[2] if task.by_slab else None,
        "output": {"name": formats.OUTPUT, "outputs": list(model.outputs), "layout": "NC", "values": "logits"},
        "decisions": {name: dict(vars(decision)) for name, decision in model.decisions.items()},
        "probability_of": "sigmoid of slope times logit plus intercept; present from the threshold on",
    }


def _label_maps(model: Model | PresenceModel) -> Model:
    assert isinstance(model, Model), "monai_export.require_monai refuses presence networks"
    return model


def preprocessing(model: Model) -> dict[str, Any]:
    """Return the steps that a program must apply before and after the network, as plain data."""
    convention = model.convention
    codes = dict(zip((1, 2, 3), convention.values, strict=True))
    return {
        "input": {"name": formats.INPUT, "contrasts": list(CONTRASTS), "layout": "NCXYZ", "dtype": "float32"},
        "voxel_order": "LPS",
        "crop": "to the smallest box with all voxels that are not 0 in some contrast"
        if model.config.inference.crop
        else None,
        "normalisation": _NORMALISATION,
        "spacing_mm": list(model.spacing_mm),
        "window_voxels": list(model.config.training.patch_voxels),
        "overlap": model.config.inference.overlap,
        "window_weights": {"kind": "gaussian", "sigma_share_of_window": SIGMA},
        "output": {"name": formats.OUTPUT, "regions": list(REGIONS), "layout": "NCXYZ", "values": "logits"},
        "thresholds": dict(zip(REGIONS, model.postprocess.thresholds, strict=True)),
        "threshold_of": "sigmoid of the logits",
        "nesting": "a voxel outside WT is background; one outside TC is oedema, regardless of ET",
        "labels": {"convention": convention.name, **convention.by_tissue},
        "region_labels": {region: sorted(codes[code] for code in region_codes(region)) for region in REGIONS},
    }


def _network_of(model: Model) -> nn.Module:
    """Return the network as built by MONAI, with the model's weights; it takes all four contrasts."""
    config = model.config
    network = build_network(config.network, in_channels=config.input_channels, out_channels=len(REGIONS))
    network.load_state_dict(model.network.state_dict())
    if not model.takes_missing_contrasts:
        return network.eval()
    return GivenPresence(network, presence_mask(CONTRASTS)).eval()


def _require_one_network(run: Path) -> None:
    """Require a folder that may hold one network.

    Raises:
        RunError: ``run`` is an ensemble, an export or a cross-validation.
    """
    if (run / ENSEMBLE_FILE).exists():
        try:
            names = [str(one["network"]) for one in read_json(run / ENSEMBLE_FILE)["networks"]]
        except (KeyError, TypeError) as error:
            raise RunError(f"{run / ENSEMBLE_FILE}: damaged ({error!r}). Restore the folder from a copy.") from error
        raise RunError(
            f"{run}: an ensemble of {len(names)} networks, but an export contains one. Export each: "
            + ", ".join(str(run / name) for name in names)
        )
    if (run / SUMS_FILE).exists() and not (run / "checkpoints").exists():
        raise RunError(f"{run}: an export, not a run. Give the folder of the run.")
    if (run / CROSSVAL_FILE).exists():
        raise RunError(f"{run}: a cross-validation, not a run. Give the folder of one of its folds.")
