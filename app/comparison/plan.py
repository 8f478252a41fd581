"""What a comparison will do: which runs, and what is the same in all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast, get_args, get_type_hints

from app.config import RunConfig, load_config, to_plain
from app.errors import ConfigError
from app.training.gradient import GradientConfig
from app.training.settings import TrainingConfig

#: What ``gradient.transform`` and ``training.optimizer`` may be.
ARMS: Final[tuple[str, ...]] = get_args(get_type_hints(GradientConfig)["transform"])
OPTIMIZERS: Final[tuple[str, ...]] = get_args(get_type_hints(TrainingConfig)["optimizer"])
DEFAULT_ARMS: Final = ("none", "clip", "centralize", "znorm")
#: Peak learning rates tried where none are given; decades for SGD, whose best rate the arms move the most.
DEFAULT_RATES: Final[Mapping[str, tuple[float, ...]]] = {
    "adamw": (1e-3, 3e-3, 1e-2, 3e-2),
    "sgd": (1e-3, 1e-2, 1e-1, 1.0),
}
_USUAL_BASELINE: Final = "clip"
#: Keys that a comparison sets itself, and the option that does it.
_TAKEN: Final = {
    "gradient.transform": "--arms",
    "training.optimizer": "--optimizers",
    "training.seed": "--seeds",
    "training.steps": "--steps",
    "training.hours": "--steps",
    "training.learning_rate": "--learning-rates",
}


@dataclass(frozen=True, kw_only=True, order=True)
class RunKey:
    """One run of a comparison."""

    optimizer: str
    arm: str
    rate: float
    """Peak learning rate."""
    seed: int
    """Initial weights and patches; the same in every arm."""

    @property
    def name(self) -> str:
        """Folder of the run, e.g. ``adamw-znorm-lr0.003-seed0``."""
        return f"{self.optimizer}-{self.arm}-lr{self.rate!r}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which runs are made; :func:`make_plan` checks it."""

    config: RunConfig
    """What all runs share."""
    arms: tuple[str, ...]
    optimizers: tuple[str, ...]
    seeds: int
    """Seeds 0 to ``seeds`` - 1; seed 0 chooses the learning rate."""
    rates: Mapping[str, tuple[float, ...]]
    """Peak learning rates by optimizer, rising; every arm gets all of them."""
    baseline: str
    """The arm the others are compared with."""
    target_dice: float | None = None
    """For the steps to reach it; None takes 90 % of the best final mean on validation."""

    def sweep(self) -> list[RunKey]:
        """Runs that choose the learning rate: seed 0, every rate; the arms take turns."""
        return [
            RunKey(optimizer=optimizer, arm=arm, rate=rate, seed=0)
            for optimizer in self.optimizers
            for rate in self.rates[optimizer]
            for arm in self.arms
        ]

    def finals(self, chosen: Mapping[tuple[str, str], float]) -> list[RunKey]:
        """Runs that are scored: every seed at the rate chosen for (optimizer, arm); seed 0 is in the sweep too."""
        return [
            RunKey(optimizer=optimizer, arm=arm, rate=chosen[optimizer, arm], seed=seed)
            for optimizer in self.optimizers
            for seed in range(self.seeds)
            for arm in self.arms
        ]

    def count(self) -> int:
        """How many runs there are."""
        return sum(len(self.arms) * (len(self.rates[optimizer]) + self.seeds - 1) for optimizer in self.optimizers)

    def config_of(self, key: RunKey) -> RunConfig:
        """The complete configuration of one run."""
        changes = cast("dict[str, Any]", {"optimizer": key.optimizer, "learning_rate": key.rate, "seed": key.seed})
        return replace(
            self.config,
            training=replace(self.config.training, **changes),
            gradient=replace(self.config.gradient, **cast("dict[str, Any]", {"transform": key.arm})),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data; two plans are the same where this is."""
        return {
            "arms": list(self.arms),
            "optimizers": list(self.optimizers),
            "seeds": self.seeds,
            "learning_rates": {name: list(rates) for name, rates in self.rates.items()},
            "baseline": self.baseline,
            "target_dice": self.target_dice,
            "config": shared_settings(self.config),
        }


def make_plan(
    *,
    config: str = "laptop",
    overrides: Sequence[str] = (),
    arms: Sequence[str] = DEFAULT_ARMS,
    optimizers: Sequence[str] = ("adamw",),
    seeds: int = 3,
    steps: int = 500,
    rates: Sequence[str] = (),
    baseline: str | None = None,
    target_dice: float | None = None,
) -> Plan:
    """Check what was asked for and make a plan of it.

    Args:
        config: name or path, as ``--config`` of ``train`` takes it.
        overrides: ``section.key=value``; not the keys that the comparison sets itself.
        arms: names of ``gradient.transform``, at least two.
        optimizers: names of ``training.optimizer``.
        seeds: how many, 1 or more.
        steps: optimiser steps of every run.
        rates: texts such as ``1e-3,3e-3`` for every optimiser or ``sgd=1e-2,1e-1`` for one; default
            :data:`DEFAULT_RATES`.
        baseline: the arm the others are compared with; default ``clip`` where it is among them, else the first.
        target_dice: above 0 and below 1, for the steps to reach it.

    Raises:
        ConfigError: any of these is not so, or the config cannot be used.
    """
    _require_known("--arms", arms, ARMS)
    _require_known("--optimizers", optimizers, OPTIMIZERS)
    if len(arms) < 2:
        raise ConfigError(f"--arms {arms[0]}: a comparison needs at least two of {', '.join(ARMS)}")
    if not 1 <= seeds <= 1000:
        raise ConfigError(f"--seeds: from 1 to 1000, got {seeds}")
    if target_dice is not None and not 0 < target_dice < 1:
        raise ConfigError(f"--target-dice: above 0 and below 1, got {target_dice:g}")
    if baseline is None:
        baseline = _USUAL_BASELINE if _USUAL_BASELINE in arms else arms[0]
    elif baseline not in arms:
        raise ConfigError(f"--baseline {baseline}: not among the arms {', '.join(arms)}")
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in _TAKEN:
            raise ConfigError(f"--set {override}: the comparison sets {key} itself; use {_TAKEN[key]}")
    plan = Plan(
        config=load_config(config, [*overrides, f"training.steps={steps}"]),
        arms=tuple(arms),
        optimizers=tuple(optimizers),
        seeds=seeds,
        rates=_rates(rates, optimizers),
        baseline=baseline,
        target_dice=target_dice,
    )
    for run in plan.sweep():
        try:
            plan.config_of(run)
        except ValueError as error:
            raise ConfigError(f"--learning-rates: {error}") from error
    return plan


def shared_settings(config: RunConfig) -> dict[str, Any]:
    """Plain data of a config, without the keys that differ between the runs of a comparison."""
    plain = to_plain(config)
    for key in _TAKEN:
        section, _, name = key.partition(".")
        if name != "steps":
            del plain[section][name]
    return plain


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two plans in plain data differ, each as ``key: old -> new``."""
    found = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before} -> {after}")
    return found


def _require_known(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    if not names:
        raise ConfigError(f"{option}: empty; allowed are {', '.join(known)}")
    for name in names:
        if name not in known:
            raise ConfigError(f"{option}: {name!r} is unknown; allowed are {', '.join(known)}")
        if names.count(name) > 1:
            raise ConfigError(f"{option}: {name} stands there twice")


def _rates(texts: Sequence[str], optimizers: Sequence[str]) -> dict[str, tuple[float, ...]]:
    rates = {optimizer: DEFAULT_RATES[optimizer] for optimizer in optimizers}
    for text in texts:
        name, equals, listed = text.rpartition("=")
        if equals and name.strip() not in optimizers:
            raise ConfigError(f"--learning-rates {text}: {name!r} is not among the optimizers {', '.join(optimizers)}")
        for optimizer in [name.strip()] if equals else optimizers:
            rates[optimizer] = _numbers(text, listed)
    return rates


def _numbers(text: str, listed: str) -> tuple[float, ...]:
    try:
        numbers = [float(word) for word in listed.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(math.isfinite(number) and number > 0 for number in numbers):
        raise ConfigError(f"--learning-rates {text}: expected numbers above 0, such as 1e-3,3e-3,1e-2 or sgd=1e-2,1e-1")
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"--learning-rates {text}: a rate stands there twice")
    return tuple(sorted(numbers))
