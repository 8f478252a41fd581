"""Resume a run with a changed config: which keys may change, which need ``--allow``, and which cannot change."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from app.config.load import RunConfig, config_differences, differing_keys, flat, to_yaml
from app.errors import ConfigError
from app.progress import LOG
from app.runs import checkpoints
from app.runs.folder import read_json, write_durably, write_json
from app.training.schedule import learning_rate, spent_share
from app.training.state import State, to_checkpoint

#: Keys, and sections ending in a dot, that may change without ``--allow``. They affect how long a run trains, when it
#: validates, saves or gives up, what telemetry records and which hardware computes (other hardware rounds
#: differently), but not what is learned.
HARMLESS: Final = (
    "training.steps",
    "training.hours",
    "training.validations",
    "training.checkpoint_minutes",
    "training.max_rollbacks",
    "training.telemetry_steps",
    "runtime.",
)
#: Keys and sections that can never change, with the reason.
FIXED: Final = {
    "task.": "what the run learns was fixed when it started",
    "network.": "the saved weights would not fit another network",
    "training.optimizer": "the saved state belongs to a different optimiser",
    "training.ema_decay": "the average of the weights started with the run",
    "data.spacing_mm": "the run's spacing was fixed when it started",
}


def require_allowed(run: Path, own: RunConfig, requested: RunConfig, allowed: Collection[str]) -> list[str]:
    """Check that a resumed run may adopt the requested config; return the changes, each as ``key: old -> new``.

    Args:
        run: the run's folder, for the message.
        own: the run's config.
        requested: the requested config.
        allowed: keys that may change although they affect what is learned.

    Raises:
        ConfigError: a key cannot change, or needs ``--allow`` (the message lists every difference); or ``allowed``
            contains an unknown key.
    """
    for key in allowed:
        if key not in flat(own):
            close = difflib.get_close_matches(key, flat(own), n=1)
            raise ConfigError(f"--allow {key}: unknown key{f'; did you mean {close[0]}?' if close else ''}")
    changes = dict(zip(differing_keys(own, requested), config_differences(own, requested), strict=True))
    fixed = {key: reason for key in changes if (reason := _why_fixed(key, own, requested))}
    lacking = [key for key in changes if key not in fixed and key not in allowed and not _among(key, HARMLESS)]
    if not fixed and not lacking:
        return list(changes.values())
    shown = [
        f"  {change}{f' (cannot change: {fixed[key]})' if key in fixed else ''}"
        f"{f' (needs --allow {key})' if key in lacking else ''}"
        for key, change in changes.items()
    ]
    advice = []
    if fixed:
        advice.append("Revert what cannot change, or start a new run.")
    if lacking:
        advice.append(f"To change what is learned anyway: {' '.join(f'--allow {key}' for key in lacking)}")
    raise ConfigError("\n".join([f"{run} was started with a different config:", *shown, *advice]))


def apply_changes(run: Path, own: RunConfig, requested: RunConfig, changes: Sequence[str], state: State) -> None:
    """Adopt a changed config: log it, update run.json and config.yaml, and spread validations over the new budget."""
    if not changes:
        return
    settings = requested.training
    before, now = (
        spent_share(
            config.training, step=state.step, seconds=state.seconds, validation_seconds=state.validation_seconds
        )
        for config in (own, requested)
    )
    for change in changes:
        LOG.info("config changed at step %d: %s", state.step, change)
    old_rate, new_rate = learning_rate(own.training, before), learning_rate(settings, now)
    if before != now or old_rate != new_rate:
        LOG.info(
            "step %d is %.0f %% of the budget (before: %.0f %%); the learning rate continues at %.3g (before: %.3g)",
            *(state.step, 100 * min(now, 1), 100 * min(before, 1), new_rate, old_rate),
        )
    if before != now or own.training.validations != settings.validations:
        since_best = state.validations - state.best_validation
        state.validations = int(min(now, 1) * settings.validations)
        state.best_validation = state.validations - since_best  # preserves the count of training.patience
        # Saved before the config, so that after an interruption in between the next resume repeats the change.
        checkpoints.save(run / "checkpoints", "last", state.step, *to_checkpoint(state))
    facts = read_json(run / "run.json")
    record = {"step": state.step, "changes": list(changes)}
    if facts.get("config_changes", [])[-1:] != [record]:  # else already recorded before an interruption
        write_json(run / "run.json", {**facts, "config_changes": [*facts.get("config_changes", []), record]})
    write_durably(run / "config.yaml", to_yaml(requested).encode())


def _why_fixed(key: str, own: RunConfig, requested: RunConfig) -> str | None:
    if key == "augment.contrast_dropout" and own.input_channels != requested.input_channels:
        return "the network has different input channels"
    return next((reason for fixed, reason in FIXED.items() if _among(key, [fixed])), None)


def _among(key: str, names: Collection[str]) -> bool:
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)
