"""A trained network, read from its run folder: weights, and all that is needed to apply them; or several of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from app.checkpoints import load_newest
from app.config import RunConfig, from_plain
from app.errors import ConfigError, RunError
from app.inference.calibration import NOT_CALIBRATED, Calibration
from app.inference.postprocess import Postprocess
from app.runtime import Runtime
from data.labels import CONTRASTS, CONVENTIONS, REGIONS, Contrast, LabelConvention
from data.nifti import Spacing
from data.presence import presence_mask
from models import GivenPresence, build_network


class Predictor(Protocol):
    """What label maps are made with: one network, or the mean of several."""

    @property
    def config(self) -> RunConfig:
        """Of the training."""
        ...

    @property
    def spacing_mm(self) -> Spacing:
        """What the networks work at."""
        ...

    @property
    def convention(self) -> LabelConvention:
        """What the training data's label numbers mean."""
        ...

    @property
    def sha256(self) -> str:
        """Of the weights."""
        ...

    @property
    def postprocess(self) -> Postprocess:
        """What is done with the probabilities."""
        ...

    @property
    def calibration(self) -> Calibration:
        """How far probabilities and volumes can be trusted."""
        ...

    @property
    def takes_missing_contrasts(self) -> bool:
        """Whether it was trained to do without some contrasts."""
        ...

    def members(self) -> Iterator[Model]:
        """The networks, one after the other; whoever lets go of one before the next holds one at a time."""
        ...

    def record(self) -> dict[str, Any]:
        """What a result file says of the weights and of post-processing."""
        ...


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network ready to predict."""

    network: nn.Module
    """In eval mode, on the runtime's device."""
    config: RunConfig
    spacing_mm: Spacing
    convention: LabelConvention
    """What the training data's label numbers mean."""
    sha256: str
    """Of the weights' file."""
    step: int

    @property
    def postprocess(self) -> Postprocess:
        """None: probabilities are cut at one half."""
        return Postprocess()

    @property
    def calibration(self) -> Calibration:
        """None: there are no cases that it was not chosen on."""
        return NOT_CALIBRATED

    @property
    def takes_missing_contrasts(self) -> bool:
        """Whether it was trained to do without some contrasts."""
        return self.config.takes_missing_contrasts

    def members(self) -> Iterator[Model]:
        """Itself."""
        yield self

    def record(self) -> dict[str, Any]:
        """SHA-256 and step of the weights."""
        return {"weights_sha256": self.sha256, "weights_step": self.step}

    def given(self, present: Collection[Contrast]) -> nn.Module:
        """The network for images of all contrasts of which these are there, the others 0."""
        if not self.takes_missing_contrasts:
            return self.network
        return GivenPresence(self.network, presence_mask(present)).eval()


def load_model(run: Path, runtime: Runtime) -> Model:
    """Load the network of a run: the best on its validation cases, or the last where it had none.

    Args:
        run: folder that ``train`` made; training may still go on.
        runtime: where the network goes.

    Raises:
        RunError: no such folder, no weights in it, weights that were changed, or not those of this program.
    """
    if not run.is_dir():
        raise RunError(f"{run}: {'not a folder' if run.exists() else 'does not exist'}; give the folder of a run")
    checkpoint = load_newest(run / "checkpoints", "best")
    if checkpoint is None:
        raise RunError(f"{run}: no weights there yet. Train it first, or wait for its first validation.")
    details = checkpoint.details
    try:
        if details["contrasts"] != list(CONTRASTS) or details["regions"] != list(REGIONS):
            raise RunError(
                f"{run}: trained for other contrasts or regions: {details['contrasts']}, {details['regions']}"
            )
        config = from_plain(details["config"], str(run))
        if details.get("takes_missing_contrasts", False) != config.takes_missing_contrasts:
            raise ValueError("takes_missing_contrasts and augment.contrast_dropout contradict each other")
        convention = CONVENTIONS[details["labels"]]
        x, y, z = details["spacing_mm"]
        network = build_network(config.network, in_channels=config.input_channels, out_channels=len(REGIONS))
        network.load_state_dict(checkpoint.weights)
    except (KeyError, TypeError, ValueError, RuntimeError, ConfigError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{run}: the weights do not fit this version ({error}). Train again.") from error
    network.to(runtime.device, memory_format=runtime.memory_format)  # type: ignore[call-overload]  # torch's stub lacks it
    network.eval()
    return Model(
        network=network,
        config=config,
        spacing_mm=(x, y, z),
        convention=convention,
        sha256=checkpoint.sha256,
        step=checkpoint.step,
    )
