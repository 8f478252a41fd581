"""Start from the weights of another run: compatibility checks, and config values that the new run inherits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from app.config.load import RunConfig, config_differences, load_config, to_plain
from app.errors import ConfigError, RunError
from app.inference.model import load_model
from app.system.device import Runtime
from data.nifti import Spacing


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Weights of another run, and their origin."""

    weights: dict[str, Tensor]
    """State dict of the network."""
    run: Path
    sha256: str
    """Hash of the weights file."""
    step: int
    spacing_mm: Spacing
    """Spacing at which the other run worked."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``run.json``."""
        return {
            "run": str(self.run.resolve()),
            "sha256": self.sha256,
            "step": self.step,
            "spacing_mm": list(self.spacing_mm),
        }


def sections_of(run: Path) -> dict[str, dict[str, Any]]:
    """Return the part of a run's config that belongs to its weights: the network and the patch size.

    Raises:
        RunError: ``run`` is not a run folder.
        ConfigError: its config cannot be read.
    """
    _require_one_run(run)
    plain = to_plain(load_config(str(run / "config.yaml")))
    return {"network": plain["network"], "training": {"patch_voxels": plain["training"]["patch_voxels"]}}


def initial_weights(run: Path, config: RunConfig, runtime: Runtime) -> InitialWeights:
    """Load the weights that ``predict`` would use from a run, for a new run with another config.

    Args:
        run: folder of the run to start from.
        config: config of the new run.
        runtime: device that the weights are loaded to.

    Raises:
        RunError: ``run`` is not a run folder, or its weights cannot be used.
        ConfigError: the new run's network is different, in more than its dropout.
    """
    _require_one_run(run)
    model = load_model(run, runtime)
    if model.takes_missing_contrasts != config.takes_missing_contrasts:
        was, now = model.config.augment.contrast_dropout, config.augment.contrast_dropout
        raise ConfigError(
            f"augment.contrast_dropout: {run} was trained with {was:g}, this run has {now:g}: its network takes "
            f"{model.config.input_channels} channels, this one {config.input_channels}. "
            f"Set augment.contrast_dropout={was or 0:g}"
        )
    others = [
        change
        for change in config_differences(model.config, config)
        if change.startswith("network.") and not change.startswith("network.dropout:")
    ]
    if others:
        raise ConfigError(
            f"the network of {run} is another one; leave out --config and the settings of network, or give those it "
            f"has. Different (there -> here): {'; '.join(others)}"
        )
    return InitialWeights(
        weights=model.network.state_dict(), run=run, sha256=model.sha256, step=model.step, spacing_mm=model.spacing_mm
    )


def _require_one_run(run: Path) -> None:
    if not (run / "run.json").is_file():
        raise RunError(
            f"{run}: not the folder of a run, it has no run.json. --init-from takes one run that train made, not "
            "several together and no file of weights."
        )
