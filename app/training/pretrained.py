"""Start from the weights of another run: compatibility checks, and config values that the new run inherits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from app.config.load import RunConfig, config_differences, from_plain, load_config, to_plain
from app.errors import ConfigError, RunError
from app.inference.ensemble import ENSEMBLE_FILE
from app.inference.model import Model, load_model
from app.progress import LOG
from app.runs.folder import read_json
from app.runs.model_card import newest_best
from app.system.device import Runtime
from app.training.state import State
from data.nifti import Spacing

#: Keys of the network that do not change which weights fit.
_FREE: Final = ("network.dropout:", "network.backward_normalization:")


def sections_of(run: Path) -> dict[str, dict[str, Any]]:
    """Return the part of a run's config that belongs to its weights: the network and the patch size.

    Raises:
        RunError: ``run`` is not the folder of one network: a run, an import or a network of an ensemble.
        ConfigError: its config cannot be read.
    """
    _require_one_network(run)
    best = newest_best(run)
    if best is not None and not (run / "config.yaml").exists():
        config = from_plain(read_json(best).get("config", {}), str(best))
    else:
        config = load_config(str(run / "config.yaml"))
    plain = to_plain(config)
    return {"network": plain["network"], "training": {"patch_voxels": plain["training"]["patch_voxels"]}}


def pretrained_model(run: Path, config: RunConfig, runtime: Runtime) -> Model:
    """Load the weights that ``predict`` would use from a run, for a new run with another config.

    Args:
        run: folder to start from: a run, an import or a network of an ensemble.
        config: config of the new run.
        runtime: device that the weights are loaded to.

    Raises:
        RunError: ``run`` is not the folder of one network, or its weights cannot be used.
        ConfigError: the new run's network differs in more than its dropout and its backward normalization.
    """
    _require_one_network(run)
    if config.task.name == "presence":
        raise ConfigError("--init-from: presence runs start from random weights; leave it out")
    model = load_model(run, runtime)
    if model.takes_missing_contrasts != config.takes_missing_contrasts:
        was, now = model.config.augment.contrast_dropout, config.augment.contrast_dropout
        raise ConfigError(
            f"augment.contrast_dropout: {run} was trained with {was:g}, this run has {now:g}: its network takes "
            f"{model.config.input_channels} channels, but this network takes {config.input_channels}. "
            f"Set augment.contrast_dropout={was or 0:g}"
        )
    others = [
        change
        for change in config_differences(model.config, config)
        if change.startswith("network.") and not change.startswith(_FREE)
    ]
    if others:
        raise ConfigError(
            f"{run} has a different network; leave out --config and all network settings, or use that run's. "
            f"Different (there -> here): {'; '.join(others)}"
        )
    return model


def start_from(model: Model, state: State, spacing_mm: Spacing) -> None:
    """Load the weights of another run into a new state, and log their origin.

    Args:
        model: the other run's model.
        state: the new run's state, before its first step.
        spacing_mm: spacing at which the new run works.
    """
    state.start_from(model.network.state_dict())
    LOG.info("starting from the weights of %s, step %d, SHA-256 %s", model.origin, model.step, model.sha256)
    if any(abs(here - there) > 0.05 * there for here, there in zip(spacing_mm, model.spacing_mm, strict=True)):
        there, here = ("x".join(f"{mm:g}" for mm in spacing) for spacing in (model.spacing_mm, spacing_mm))
        LOG.warning(
            "the weights were trained at %s mm, but this run works at %s mm; set data.spacing_mm to match", there, here
        )


def origin_of(model: Model) -> dict[str, Any]:
    """Return the origin of initial weights as plain data for ``run.json``."""
    run = str(Path(model.origin).resolve())
    return {"run": run, "sha256": model.sha256, "step": model.step, "spacing_mm": list(model.spacing_mm)}


def _require_one_network(run: Path) -> None:
    if (run / ENSEMBLE_FILE).is_file():
        names = sorted(path.parent.parent.name for path in run.glob("*/checkpoints/best-*.json"))
        raise RunError(
            f"{run}: an ensemble of {len(names)} networks, but --init-from takes one. Give one of them: "
            + ", ".join(str(run / name) for name in names)
        )
    if not (run / "run.json").is_file() and newest_best(run) is None:
        raise RunError(
            f"{run}: not the folder of a run, as it has no run.json. --init-from takes the folder of one run of train, "
            "of an imported model or of one network of an ensemble, not a file of weights."
        )
