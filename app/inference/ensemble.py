"""Several trained networks as one: the mean of their probabilities, post-processed.

The folder of an ensemble is self-contained::

    ensemble.json   the networks and their SHA-256, post-processing, calibration, contrasts, regions, provenance
    split.json      the ids of the training cases, all under ``train``
    fold-0/checkpoints/best-*   weights with their JSON, as in a run; and so on
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from app.errors import RunError
from app.inference.calibration import Calibration, calibration_from_json
from app.inference.model import Model, ModelFacts, Predictor, config_of, facts_of, load_model
from app.inference.postprocess import Postprocess, postprocess_from_json
from app.runs.folder import read_json
from app.system.device import Runtime
from data.labels import LabelConvention
from data.nifti import Spacing
from data.preprocess import SPACING_TOLERANCE

if TYPE_CHECKING:
    from app.config.load import RunConfig

#: File that describes an ensemble, in the ensemble's folder.
ENSEMBLE_FILE: Final = "ensemble.json"
#: File that describes a cross-validation, in the cross-validation's folder.
CROSSVAL_FILE: Final = "folds.json"
#: Folder of the ensemble inside that of its cross-validation.
ENSEMBLE_FOLDER: Final = "ensemble"
VERSION: Final = 1
#: Ensembles up to this total size of weights are held in memory; larger ones read each network again for each case.
_MOST_HELD_BYTES: Final = 1 << 30
_ANEW: Final = "Put the folder back from a copy, or delete it and give the znormseg crossval command again."


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Networks that predict together."""

    folder: Path
    names: tuple[str, ...]
    """Names of the networks' folders in ``folder``."""
    steps: Mapping[str, int]
    """By name: the optimiser step of the weights."""
    weights: Mapping[str, str]
    """By name: SHA-256 of the weights file."""
    runtime: Runtime
    plain_config: Mapping[str, Any]
    """Config of the first network, as stored in its checkpoint; the others differ only in their cases."""
    takes_missing_contrasts: bool
    """Whether the networks were trained to predict without some contrasts."""
    spacing_mm: Spacing
    convention: LabelConvention
    postprocess: Postprocess
    postprocess_was_left_out: bool
    calibration: Calibration
    """Its temperatures are for probabilities before post-processing, its volumes for masks post-processed as here."""
    held: tuple[Model, ...]
    """The networks, if they are small in total; else empty."""

    @property
    def sha256(self) -> str:
        """SHA-256 over the SHA-256s of the networks' weights, in the order of the networks."""
        return hashlib.sha256(" ".join(self.weights[name] for name in self.names).encode()).hexdigest()

    @property
    def config(self) -> RunConfig:
        """Config of the first network; imports torch.

        Raises:
            RunError: the config does not fit this version.
        """
        return config_of(self.plain_config, str(self.folder))

    def members(self) -> Iterator[Model]:
        """Yield the networks; unless they are held in memory, each is read when its turn comes and not kept.

        Raises:
            RunError: as in :func:`load_ensemble`, if a file has changed since then.
        """
        if self.held:
            yield from self.held
            return
        for name in self.names:
            yield _member(self.folder, name, self.weights[name], self.runtime)

    def record(self) -> dict[str, Any]:
        """SHA-256 over all weights and of each network's, and the post-processing that was applied."""
        return {
            "weights_sha256": self.sha256,
            "ensemble": [
                {"network": name, "weights_sha256": self.weights[name], "weights_step": self.steps[name]}
                for name in self.names
            ],
            "postprocess": None if self.postprocess_was_left_out else self.postprocess.to_json(),
        }


def load_predictor(folder: Path, runtime: Runtime, *, postprocess: bool = True) -> Predictor:
    """Load the network of a run or the networks of an ensemble.

    Args:
        folder: of a run or of an ensemble.
        runtime: backend, device and precision to load the networks for.
        postprocess: False only cuts probabilities at one half.

    Raises:
        RunError: as in :func:`app.inference.model.load_model` and :func:`load_ensemble`; or the folder is that of a
            cross-validation.
    """
    if (folder / ENSEMBLE_FILE).exists():
        return load_ensemble(folder, runtime, postprocess=postprocess)
    if (folder / CROSSVAL_FILE).exists():
        inner = folder / ENSEMBLE_FOLDER
        if (inner / ENSEMBLE_FILE).exists():
            raise RunError(f"{folder}: a cross-validation, not a run. Give its ensemble, {inner}, or one of its folds.")
        raise RunError(
            f"{folder}: a cross-validation that is not done, so there is no ensemble yet. Go on with the command that "
            "began it: znormseg crossval"
        )
    return load_model(folder, runtime)


def load_ensemble(folder: Path, runtime: Runtime, *, postprocess: bool = True) -> Ensemble:
    """Read an ensemble and verify that every network is the one that was added.

    Args:
        folder: with an ``ensemble.json``.
        runtime: backend, device and precision to load the networks for.
        postprocess: False only cuts probabilities at one half.

    Raises:
        RunError: ``ensemble.json`` is damaged; weights are missing, damaged or replaced; or the networks do not fit
            together.
    """
    content = read_json(folder / ENSEMBLE_FILE)
    try:
        listed = {str(one["network"]): (str(one["weights_sha256"]), int(one["step"])) for one in content["networks"]}
        rules = postprocess_from_json(content["postprocess"])
        calibration = calibration_from_json(content.get("calibration"), postprocessed=postprocess)
        if not listed or content["version"] != VERSION or any(Path(name).name != name for name in listed):
            raise ValueError(f"version {content['version']}, networks {', '.join(listed) or 'none'}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{folder / ENSEMBLE_FILE}: damaged, or of another version ({error}). {_ANEW}") from error
    small = sum(path.stat().st_size for path in folder.glob("*/checkpoints/*.safetensors")) <= _MOST_HELD_BYTES
    held: list[Model] = []
    first: ModelFacts | None = None
    for name, (sha256, _) in listed.items():
        model = _member(folder, name, sha256, runtime)
        first = first or facts_of(model)
        require_alike(folder, first, facts_of(model))
        if small:
            held.append(model)
        del model
    assert first is not None
    return Ensemble(
        folder=folder,
        names=tuple(listed),
        steps={name: step for name, (_, step) in listed.items()},
        weights={name: sha256 for name, (sha256, _) in listed.items()},
        runtime=runtime,
        plain_config=first.plain_config,
        takes_missing_contrasts=first.takes_missing_contrasts,
        spacing_mm=first.spacing_mm,
        convention=first.convention,
        postprocess=rules if postprocess else Postprocess(),
        postprocess_was_left_out=not postprocess,
        calibration=calibration,
        held=tuple(held),
    )


def _member(folder: Path, name: str, sha256: str, runtime: Runtime) -> Model:
    """Read one network and verify that it is the one that was added.

    Raises:
        RunError: its weights are missing, damaged or replaced.
    """
    try:
        model = load_model(folder / name, runtime)
    except RunError as error:
        raise RunError(f"{folder}: network {name}: {str(error).rstrip('.')}. {_ANEW}") from error
    if model.sha256 != sha256:
        raise RunError(
            f"{folder}: the weights of {name} are not those that {ENSEMBLE_FILE} lists: their SHA-256 is another. "
            f"{_ANEW}"
        )
    return model


def require_alike(folder: Path, first: ModelFacts, model: ModelFacts) -> None:
    """Check that the probabilities of two networks may be averaged.

    Raises:
        RunError: they work at different spacings, were trained on different label numbers, or differ in the contrasts
            that they need.
    """
    pairs = zip(first.spacing_mm, model.spacing_mm, strict=True)
    if any(abs(one - other) > SPACING_TOLERANCE * other for one, other in pairs):
        what = f"spacing {first.spacing_mm} and {model.spacing_mm} mm"
    elif model.convention != first.convention:
        what = f"label conventions {first.convention.name} and {model.convention.name}"
    elif model.takes_missing_contrasts != first.takes_missing_contrasts:
        what = "augment.contrast_dropout above 0 and 0"
    else:
        return
    raise RunError(f"{folder}: networks that do not go together: {what}. {_ANEW}")
