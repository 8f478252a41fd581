"""Predict with several trained networks as one: average their probabilities and post-process the mean.

The folder of an ensemble is self-contained::

    ensemble.json   the networks and their SHA-256, post-processing, calibration, contrasts, regions, provenance; and
                    the statement of a published model
    split.json      the ids of the training cases, all under ``train``
    fold-0/checkpoints/best-*   weights with their JSON, as in a run; and so on
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from app.errors import RunError
from app.inference.calibration import calibration_from_json
from app.inference.model import Model, Predictor, load_model, no_label_maps, statement_from_json
from app.inference.postprocess import Postprocess, postprocess_from_json
from app.runs.folder import read_json
from app.runs.model_card import STATEMENT_KEY, is_presence
from app.system.device import Runtime
from data.preprocess import SPACING_TOLERANCE

#: File that describes an ensemble, in the ensemble's folder.
ENSEMBLE_FILE: Final = "ensemble.json"
#: File that describes a cross-validation, in the cross-validation's folder.
CROSSVAL_FILE: Final = "folds.json"
#: Folder of the ensemble inside that of its cross-validation.
ENSEMBLE_FOLDER: Final = "ensemble"
VERSION: Final = 1
#: Attributes that the networks of an ensemble have in common.
_SHARED: Final = ("plain_config", "takes_missing_contrasts", "spacing_mm", "convention")
#: Ensembles up to this total size of weights are held in memory; larger ones read each network again for each case.
_MOST_HELD_BYTES: Final = 1 << 30
#: What to do about an ensemble that cannot be used.
ANEW: Final = "Restore the folder from a copy, or delete it and run the znormseg crossval command again."


@dataclass(frozen=True, kw_only=True)
class Ensemble(Predictor):
    """Networks that predict together; ``plain_config`` is that of the first, and the others differ only in their cases.

    ``sha256`` is the hash of the SHA-256s of the networks' weights, in the order of the networks. In ``calibration``,
    temperatures apply to probabilities before post-processing, and volume intervals to masks that are post-processed in
    the same way as here.
    """

    folder: Path
    networks: Mapping[str, tuple[str, int]]
    """SHA-256 of the weights file and optimiser step of each network, by the name of its folder in ``folder``."""
    runtime: Runtime
    postprocessed: bool
    """Whether the ensemble's own rules are applied; otherwise ``postprocess`` has its defaults."""
    held: tuple[Model, ...]
    """The networks, if they are small enough in total to be held in memory; else empty."""

    def members(self) -> Iterator[Model]:
        """Yield the networks; unless they are held in memory, each is read when needed and then dropped.

        Raises:
            RunError: a file has changed since :func:`load_ensemble`, which raises the same errors.
        """
        if self.held:
            yield from self.held
            return
        for name, (sha256, _) in self.networks.items():
            yield _member(self.folder, name, sha256, self.runtime)

    def record(self) -> dict[str, Any]:
        """Return the SHA-256 of all weights and of each network's, and the post-processing that was applied."""
        return {
            "weights_sha256": self.sha256,
            "ensemble": [
                {"network": name, "weights_sha256": sha256, "weights_step": step}
                for name, (sha256, step) in self.networks.items()
            ],
            "postprocess": self.postprocess.to_json() if self.postprocessed else None,
        }


def load_predictor(folder: Path, runtime: Runtime, *, postprocess: bool = True) -> Predictor:
    """Load the network of a run or the networks of an ensemble.

    Args:
        folder: folder of a run or an ensemble.
        runtime: backend, device and precision to load the networks for.
        postprocess: if False, probabilities are only cut at one half.

    Raises:
        RunError: as raised by :func:`app.inference.model.load_model` and :func:`load_ensemble`; or the folder is that
            of a cross-validation.
    """
    if (folder / ENSEMBLE_FILE).exists():
        return load_ensemble(folder, runtime, postprocess=postprocess)
    if (folder / CROSSVAL_FILE).exists():
        inner = folder / ENSEMBLE_FOLDER
        if (inner / ENSEMBLE_FILE).exists():
            raise RunError(f"{folder}: a cross-validation, not a run. Give its ensemble, {inner}, or one of its folds.")
        raise RunError(
            f"{folder}: a cross-validation that has not finished, so there is no ensemble yet. Resume it with the "
            "znormseg crossval command that started it."
        )
    return load_model(folder, runtime)


def load_ensemble(folder: Path, runtime: Runtime, *, postprocess: bool = True) -> Ensemble:
    """Read an ensemble and verify that no network was replaced.

    Args:
        folder: folder with an ``ensemble.json``.
        runtime: backend, device and precision to load the networks for.
        postprocess: if False, probabilities are only cut at one half.

    Raises:
        RunError: ``ensemble.json`` is damaged; weights are missing, damaged or replaced; or the networks do not fit
            together.
    """
    content = read_json(folder / ENSEMBLE_FILE)
    if isinstance(content, Mapping) and is_presence(content.get("config", {})):
        raise no_label_maps(folder)
    try:
        listed = {str(one["network"]): (str(one["weights_sha256"]), int(one["step"])) for one in content["networks"]}
        rules = postprocess_from_json(content["postprocess"])
        calibration = calibration_from_json(content.get("calibration"), postprocessed=postprocess)
        statement = statement_from_json(content.get(STATEMENT_KEY))
        if not listed or content["version"] != VERSION or any(Path(name).name != name for name in listed):
            raise ValueError(f"version {content['version']}, networks {', '.join(listed) or 'none'}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{folder / ENSEMBLE_FILE}: damaged, or of another version ({error}). {ANEW}") from error
    small = sum(path.stat().st_size for path in folder.glob("*/checkpoints/*.safetensors")) <= _MOST_HELD_BYTES
    held: list[Model] = []
    shared: dict[str, Any] = {}
    for name, (sha256, _) in listed.items():
        model = _member(folder, name, sha256, runtime)
        facts = {key: getattr(model, key) for key in _SHARED}
        shared = shared or facts
        _require_alike(folder, shared, facts)
        if small:
            held.append(model)
        del model
    return Ensemble(
        **shared,
        origin=str(folder),
        sha256=hashlib.sha256(" ".join(sha256 for sha256, _ in listed.values()).encode()).hexdigest(),
        folder=folder,
        networks=listed,
        runtime=runtime,
        postprocess=rules if postprocess else Postprocess(),
        postprocessed=postprocess,
        calibration=calibration,
        statement=statement,
        held=tuple(held),
    )


def _member(folder: Path, name: str, sha256: str, runtime: Runtime) -> Model:
    """Read one network and verify that it was not replaced.

    Raises:
        RunError: its weights are missing, damaged or replaced.
    """
    try:
        model = load_model(folder / name, runtime)
    except RunError as error:
        raise RunError(f"{folder}: network {name}: {str(error).rstrip('.')}. {ANEW}") from error
    if model.sha256 != sha256:
        raise RunError(
            f"{folder}: the weights of {name} are not those that {ENSEMBLE_FILE} lists: their SHA-256 differs. {ANEW}"
        )
    return model


def _require_alike(folder: Path, first: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Check that the probabilities of two networks may be averaged.

    Raises:
        RunError: they work at different spacings, were trained on different label numbers, or differ in the contrasts
            that they need.
    """
    spacings = first["spacing_mm"], other["spacing_mm"]
    if any(abs(one - two) > SPACING_TOLERANCE * two for one, two in zip(*spacings, strict=True)):
        what = f"spacing {spacings[0]} and {spacings[1]} mm"
    elif other["convention"] != first["convention"]:
        what = f"label conventions {first['convention'].name} and {other['convention'].name}"
    elif other["takes_missing_contrasts"] != first["takes_missing_contrasts"]:
        what = "augment.contrast_dropout above 0 and 0"
    else:
        return
    raise RunError(f"{folder}: its networks cannot be combined: {what}. {ANEW}")
