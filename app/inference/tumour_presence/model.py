"""Load the network of a presence run, or the networks of a cross-validation's ensemble, and answer for a case."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from app.errors import ConfigError, RunError
from app.inference.ensemble import ANEW, CROSSVAL_FILE, ENSEMBLE_FILE, ENSEMBLE_FOLDER
from app.runs.checkpoints import load_newest
from app.runs.folder import read_json
from app.runs.model_card import is_presence, newest_best
from app.runs.published import MODELS
from app.system.device import Runtime
from data.contrasts import presence_mask
from data.labels import CONTRASTS, Contrast
from data.nifti import Spacing

if TYPE_CHECKING:
    from torch import nn

    from app.config.load import RunConfig

FloatArray = npt.NDArray[np.float64]

#: Version of the file that describes an ensemble of presence networks; 2 has a threshold for a gate.
VERSION: Final = 2
#: An output is present from this probability on, unless a cross-validation tuned another.
UNTUNED: Final = 0.5


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How one output's logit becomes a calibrated probability and a decision."""

    slope: float = 1.0
    """Platt scaling: the calibrated logit is slope times logit plus intercept (Platt 1999). Above 0: otherwise the slab
    with the largest logit of a case would not be the one with the largest probability."""
    intercept: float = 0.0
    threshold: float = UNTUNED
    """The output counts as present from this calibrated probability on."""
    gate_threshold: float = UNTUNED
    """A gate removes the output below this calibrated probability."""
    tuned: bool = False
    """Whether a cross-validation fitted these numbers on out-of-fold answers."""

    def __post_init__(self) -> None:
        if not self.slope > 0:
            raise ValueError(f"slope {self.slope:g} of the calibration, which must be above 0")
        if not math.isfinite(self.slope + self.intercept):
            raise ValueError(f"slope {self.slope:g}, intercept {self.intercept:g} of the calibration, not both finite")
        for threshold in (self.threshold, self.gate_threshold):
            if not 0 <= threshold <= 1:
                raise ValueError(f"threshold {threshold:g}, which must be from 0 to 1")

    def probability(self, logits: FloatArray) -> FloatArray:
        """Return calibrated probabilities.

        Example:
            >>> Decision(slope=2.0, intercept=0.0).probability(np.array([0.0])).tolist()
            [0.5]
        """
        return np.asarray(expit(self.slope * logits + self.intercept))


@dataclass(frozen=True, kw_only=True)
class PresenceModel:
    """One presence network or several, with the decision for each output."""

    networks: tuple[nn.Module, ...]
    config: RunConfig
    origin: str
    """Folder of the run or the ensemble."""
    spacing_mm: Spacing
    sha256: str
    """SHA-256 of the weights; for an ensemble, over those of its networks."""
    decisions: Mapping[str, Decision]
    """By output."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return self.config.outputs

    @property
    def takes_missing_contrasts(self) -> bool:
        """Whether the networks were trained to answer when contrasts are missing."""
        return self.config.takes_missing_contrasts

    def logits(self, image: npt.NDArray[Any], present: tuple[Contrast, ...], runtime: Runtime) -> FloatArray:
        """Return the mean logits of the networks, shape (parts, outputs); see :func:`case_logits`.

        Args:
            image: prepared image, shape (contrasts, X, Y, Z).
            present: the contrasts that the case has.
            runtime: the one that the model was loaded for.
        """
        from app.inference.tumour_presence.answers import case_logits
        from models import GivenPresence

        networks: Sequence[nn.Module] = self.networks
        if self.takes_missing_contrasts:
            networks = [GivenPresence(network, presence_mask(present)).eval() for network in networks]
        return case_logits(networks, image, self.config, runtime)

    def probabilities(self, logits: FloatArray) -> dict[str, FloatArray]:
        """Return calibrated probabilities by output, shape (parts,)."""
        return {name: self.decisions[name].probability(logits[:, place]) for place, name in enumerate(self.outputs)}

    def settings(self) -> dict[str, Any]:
        """Return what determines an answer besides the image, as plain data."""
        return {
            "weights_sha256": self.sha256,
            "decisions": {name: vars(decision) for name, decision in self.decisions.items()},
        }


def is_presence_model(folder: Path) -> bool:
    """Whether a folder holds a presence run or an ensemble of such runs; False for anything else."""
    try:
        best = newest_best(folder)
        path = folder / ENSEMBLE_FILE if best is None else best
        return path.is_file() and is_presence(read_json(path).get("config", {}))
    except (RunError, AttributeError):
        return False


def load_presence(folder: Path, runtime: Runtime) -> PresenceModel:
    """Load the network of a presence run, or all networks of an ensemble.

    Args:
        folder: folder of a run that ``train --config presence`` made, or the ensemble of its cross-validation.
        runtime: device and precision of the torch backend.

    Raises:
        RunError: the folder is something else, or its weights are missing, damaged or replaced.
    """
    if not folder.exists() and (published := MODELS.get(str(folder))) is not None:
        raise RunError(
            f"{folder}: a published model for {published.task}, not for presence. Give a run of znormseg train "
            "--config presence, or the ensemble of its cross-validation."
        )
    if not folder.is_dir():
        raise RunError(f"{folder}: {'not a folder' if folder.exists() else 'does not exist'}; give a presence run")
    if (folder / CROSSVAL_FILE).exists():
        raise RunError(f"{folder}: a cross-validation, not a run. Give its ensemble, {folder / ENSEMBLE_FOLDER}.")
    if not is_presence_model(folder):
        raise RunError(
            f"{folder}: not a presence model. Give a run of znormseg train --config presence, or the ensemble of its "
            "cross-validation."
        )
    if not (folder / ENSEMBLE_FILE).is_file():
        alone = _network(folder, runtime)
        return _model(folder, [alone], alone.sha256, {name: Decision() for name in alone.config.outputs})
    content = read_json(folder / ENSEMBLE_FILE)
    try:
        listed = {str(one["network"]): str(one["weights_sha256"]) for one in content["networks"]}
        decisions = {name: Decision(**one) for name, one in content["decisions"].items()}
        if not listed or content["version"] != VERSION or any(Path(name).name != name for name in listed):
            raise ValueError(f"version {content['version']}, networks {', '.join(listed) or 'none'}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{folder / ENSEMBLE_FILE}: damaged, or of another version ({error}). {ANEW}") from error
    loaded = [_network(folder / name, runtime) for name in listed]
    for (name, sha256), one in zip(listed.items(), loaded, strict=True):
        if one.sha256 != sha256:
            raise RunError(f"{folder}: the weights of {name} are not those that {ENSEMBLE_FILE} lists.")
    total = hashlib.sha256(" ".join(listed.values()).encode()).hexdigest()
    return _model(folder, loaded, total, decisions)


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """One network in eval mode."""

    network: nn.Module
    config: RunConfig
    spacing_mm: Spacing
    sha256: str


def _model(folder: Path, loaded: Sequence[_Loaded], sha256: str, decisions: Mapping[str, Decision]) -> PresenceModel:
    first = loaded[0]
    if set(decisions) != set(first.config.outputs):
        raise RunError(
            f"{folder / ENSEMBLE_FILE}: damaged: it decides on {', '.join(decisions)}, but the outputs of its networks "
            f"are {', '.join(first.config.outputs)}. Restore the folder from a copy."
        )
    return PresenceModel(
        networks=tuple(one.network for one in loaded),
        config=first.config,
        origin=str(folder),
        spacing_mm=first.spacing_mm,
        sha256=sha256,
        decisions=decisions,
    )


def _network(run: Path, runtime: Runtime) -> _Loaded:
    """Load a run's best network."""
    from app.config.load import from_plain
    from models import build_network

    checkpoint = load_newest(run / "checkpoints", "best")
    if checkpoint is None:
        raise RunError(f"{run}: no weights. Wait for the run's first validation, or restore the folder from a copy.")
    details = checkpoint.details
    try:
        if details["contrasts"] != list(CONTRASTS):
            raise ValueError(f"its contrasts are {details['contrasts']}")
        config = from_plain(dict(details["config"]), str(run))
        network = build_network(config.network, in_channels=config.input_channels, out_channels=len(config.outputs))
        network.load_state_dict(checkpoint.weights)
        x, y, z = details["spacing_mm"]
    except (KeyError, TypeError, ValueError, RuntimeError, ConfigError) as error:
        raise RunError(f"{run}: the weights do not fit this version ({error}). Train again.") from error
    network.to(runtime.device)
    if config.network.slices is None:  # other formats are for 3D convolutions
        network.to(memory_format=runtime.memory_format)  # type: ignore[call-overload]  # torch's stub lacks it
    return _Loaded(network=network.eval(), config=config, spacing_mm=(x, y, z), sha256=checkpoint.sha256)
