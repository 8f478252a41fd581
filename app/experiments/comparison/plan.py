"""The plan of a comparison: its runs, and the settings that all of them share."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, get_args, get_type_hints

from app.config.gradient import AUTO, GradientConfig
from app.config.load import RunConfig, load_config, to_plain
from app.config.load import config_differences as changed_keys
from app.config.training import TrainingConfig
from app.errors import ConfigError

#: Arms that normalise gradients inside the network (``network.backward_normalization: [auto]``), and the rule that each
#: adds to it.
BACKWARD_ARMS: Final[Mapping[str, str]] = {"bgn": "none", "bgn-znorm": "znorm"}
#: Values of ``gradient.transform`` (except its automatic choice) and :data:`BACKWARD_ARMS`.
ARMS: Final[tuple[str, ...]] = (
    *(name for name in get_args(get_type_hints(GradientConfig)["transform"]) if name != AUTO),
    *BACKWARD_ARMS,
)
#: Values of ``training.optimizer``.
OPTIMIZERS: Final[tuple[str, ...]] = get_args(get_type_hints(TrainingConfig)["optimizer"])
DEFAULT_ARMS: Final = ("none", "clip", "centralize", "znorm")
#: Default peak learning rates; a decade apart for SGD, whose best rate varies the most between arms.
DEFAULT_RATES: Final[Mapping[str, tuple[float, ...]]] = {
    "adamw": (1e-3, 3e-3, 1e-2, 3e-2),
    "sgd": (1e-3, 1e-2, 1e-1, 1.0),
}
_USUAL_BASELINE: Final = "clip"
#: Keys that a comparison sets itself, but a variant may change.
_VARIABLE: Final = ("gradient.transform", "network.backward_normalization")
#: The rule that a variant starts from, unless it sets another.
_VARIED: Final = "znorm"
_VARIANT_NAME: Final = re.compile("[a-z0-9][a-z0-9-]{0,39}")
#: Keys that a comparison sets itself, and the option that controls each.
_TAKEN: Final = {
    "gradient.transform": "--arms",
    "network.backward_normalization": "--arms bgn, or --variant for other places",
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
    """Seed of the initial weights and patches; every arm uses the same seeds."""

    @property
    def name(self) -> str:
        """Name of the run's folder, e.g. ``adamw-znorm-lr0.003-seed0``."""
        return f"{self.optimizer}-{self.arm}-lr{self.rate!r}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class ComparisonPlan:
    """The runs of a comparison; :func:`plan_comparison` validates them."""

    config: RunConfig
    """Settings that all runs share."""
    arms: tuple[str, ...]
    optimizers: tuple[str, ...]
    seeds: int
    """Number of seeds; the first one chooses the learning rate."""
    rates: Mapping[str, tuple[float, ...]]
    """Peak learning rates by optimiser, ascending; every arm is trained with all of them."""
    baseline: str
    """The arm that the others are compared with."""
    target_dice: float | None = None
    """Dice for which the steps to reach it are counted; None uses 90 % of the best final mean on validation."""
    variants: Mapping[str, RunConfig] = field(default_factory=dict)
    """Configs of the arms that are variants instead of rules, by name."""
    first_seed: int = 0
    """The first seed; the others follow it."""

    def sweep(self) -> list[RunKey]:
        """Return the runs for choosing the learning rate: first seed, every rate, with alternating arms."""
        return [
            RunKey(optimizer=optimizer, arm=arm, rate=rate, seed=self.first_seed)
            for optimizer in self.optimizers
            for rate in self.rates[optimizer]
            for arm in self.arms
        ]

    def finals(self, chosen: Mapping[tuple[str, str], float]) -> list[RunKey]:
        """Return the runs to score: every seed at the rate chosen for (optimizer, arm); the sweep has the first."""
        return [
            RunKey(optimizer=optimizer, arm=arm, rate=chosen[optimizer, arm], seed=seed)
            for optimizer in self.optimizers
            for seed in range(self.first_seed, self.first_seed + self.seeds)
            for arm in self.arms
        ]

    def count(self) -> int:
        """Return the number of runs."""
        return sum(len(self.arms) * (len(self.rates[optimizer]) + self.seeds - 1) for optimizer in self.optimizers)

    def config_of(self, key: RunKey) -> RunConfig:
        """Return the complete configuration of one run."""
        changes: dict[str, Any] = {"optimizer": key.optimizer, "learning_rate": key.rate, "seed": key.seed}
        config = self.variants.get(key.arm) or self._with_rule(key.arm)
        return replace(config, training=replace(config.training, **changes))

    def _with_rule(self, arm: str) -> RunConfig:
        rule: dict[str, Any] = {"transform": BACKWARD_ARMS.get(arm, arm)}
        places = (AUTO,) if arm in BACKWARD_ARMS else ()
        return replace(
            self.config,
            gradient=replace(self.config.gradient, **rule),
            network=replace(self.config.network, backward_normalization=places),
        )

    def settings_of(self, variant: str) -> list[str]:
        """List how a variant differs from the shared config, each as ``section.key: shared -> variant``."""
        return changed_keys(self.config, self.variants[variant])

    def to_json(self) -> dict[str, Any]:
        """Return plain data; two plans are the same if their data are equal."""
        return {
            "arms": list(self.arms),
            "optimizers": list(self.optimizers),
            "seeds": self.seeds,
            "first_seed": self.first_seed,
            "learning_rates": {name: list(rates) for name, rates in self.rates.items()},
            "baseline": self.baseline,
            "target_dice": self.target_dice,
            "variants": {name: self.settings_of(name) for name in self.variants},
            "config": shared_settings(self.config),
        }


def plan_comparison(  # noqa: PLR0913 - one argument per command-line option
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
    variants: Sequence[str] = (),
    first_seed: int = 0,
) -> ComparisonPlan:
    """Validate the requested options and turn them into a plan.

    Args:
        config: name or path, as for ``train --config``.
        overrides: ``section.key=value``, except for keys that the comparison sets itself.
        arms: names of :data:`ARMS` or of variants, at least two.
        optimizers: names of ``training.optimizer``.
        seeds: number of seeds, 1 or more.
        steps: optimiser steps of every run.
        rates: texts such as ``1e-3,3e-3`` for every optimiser or ``sgd=1e-2,1e-1`` for one; default:
            :data:`DEFAULT_RATES`.
        baseline: the arm that the others are compared with; default: ``clip`` if it is among the arms, else the first.
        target_dice: count the steps to reach this Dice; between 0 and 1, exclusive.
        variants: texts ``name:section.key=value``; each changes one key for the arm ``name``, and texts with the same
            name are combined. The arm's rule is ``znorm`` unless one of them changes it.
        first_seed: the first seed, 0 or more.

    Raises:
        ConfigError: an argument is invalid, or the config cannot be used.
    """
    changes = _variants(variants)
    _require_known("--arms", arms, (*ARMS, *changes))
    for name in changes:
        if name not in arms:
            raise ConfigError(f"--variant {name}: not among the arms; add it, --arms {','.join([*arms, name])}")
    _require_known("--optimizers", optimizers, OPTIMIZERS)
    if len(arms) < 2:
        raise ConfigError(f"--arms {arms[0]}: a comparison needs at least two of {', '.join(ARMS)}")
    if not 1 <= seeds <= 1000:
        raise ConfigError(f"--seeds: from 1 to 1000, got {seeds}")
    if not 0 <= first_seed <= 10**6:
        raise ConfigError(f"--first-seed: from 0 to 1000000, got {first_seed}")
    if target_dice is not None and not 0 < target_dice < 1:
        raise ConfigError(f"--target-dice: above 0 and below 1, got {target_dice:g}")
    if baseline is None:
        baseline = _USUAL_BASELINE if _USUAL_BASELINE in arms else arms[0]
    elif baseline not in arms:
        raise ConfigError(f"--baseline {baseline}: not among the arms ({', '.join(arms)})")
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in _TAKEN:
            raise ConfigError(f"--set {override}: the comparison sets {key} itself; use {_TAKEN[key]}")
    plan = ComparisonPlan(
        config=load_config(config, [*overrides, f"training.steps={steps}"]),
        arms=tuple(arms),
        optimizers=tuple(optimizers),
        seeds=seeds,
        rates=_rates(rates, optimizers),
        baseline=baseline,
        target_dice=target_dice,
        variants={
            name: _variant_config(
                name, config, [*overrides, f"training.steps={steps}", f"gradient.transform={_VARIED}", *texts]
            )
            for name, texts in changes.items()
        },
        first_seed=first_seed,
    )
    _require_label_maps((plan.config, *plan.variants.values()))
    for run in plan.sweep():
        try:
            plan.config_of(run)
        except ValueError as error:
            raise ConfigError(f"--learning-rates: {error}") from error
    return plan


def shared_settings(config: RunConfig) -> dict[str, Any]:
    """Return plain data of a config, without the keys that differ between the runs of a comparison."""
    plain = to_plain(config)
    for key in _TAKEN:
        section, _, name = key.partition(".")
        if name != "steps":
            del plain[section][name]
    return plain


def _variants(texts: Sequence[str]) -> dict[str, list[str]]:
    """Group the overrides by the name of their variant."""
    changes: dict[str, list[str]] = {}
    for text in texts:
        name, colon, override = text.partition(":")
        key = override.partition("=")[0].strip()
        if not colon or "=" not in override or not _VARIANT_NAME.fullmatch(name):
            raise ConfigError(
                f"--variant {text}: expected NAME:SECTION.KEY=VALUE with a name of small letters, digits and hyphens, "
                "such as everything:gradient.znorm.output_block=none"
            )
        if name in ARMS:
            raise ConfigError(f"--variant {text}: {name} is the name of a rule; give the variant another name")
        if key in _TAKEN and key not in _VARIABLE:
            raise ConfigError(f"--variant {text}: the comparison sets {key} itself; use {_TAKEN[key]}")
        changes.setdefault(name, []).append(override)
    return changes


def _variant_config(name: str, config: str, overrides: Sequence[str]) -> RunConfig:
    try:
        return load_config(config, overrides)
    except ConfigError as error:
        raise ConfigError(f"--variant {name}: {error}") from error


def _require_known(option: str, names: Sequence[str], allowed: Sequence[str]) -> None:
    if not names:
        raise ConfigError(f"{option}: empty; allowed: {', '.join(allowed)}")
    for name in names:
        if name not in allowed:
            raise ConfigError(f"{option}: {name!r} is unknown; allowed: {', '.join(allowed)}")
        if names.count(name) > 1:
            raise ConfigError(f"{option}: {name} is given twice")


def _require_label_maps(configs: Iterable[RunConfig]) -> None:
    """Refuse labels of a table, which :func:`app.training.presence_scoring.score_presence_run` does not read."""
    for config in configs:
        if config.task.name == "presence" and config.task.labels_csv is not None:
            raise ConfigError(
                "task.labels_csv: compare scores against label maps; leave it out, and name regions in task.outputs"
            )


def _rates(texts: Sequence[str], optimizers: Sequence[str]) -> dict[str, tuple[float, ...]]:
    rates = {optimizer: DEFAULT_RATES[optimizer] for optimizer in optimizers}
    for text in texts:
        name, equals, listed = text.rpartition("=")
        if equals and name.strip() not in optimizers:
            raise ConfigError(
                f"--learning-rates {text}: {name!r} is not among the optimizers ({', '.join(optimizers)})"
            )
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
        raise ConfigError(f"--learning-rates {text}: a rate is given twice")
    return tuple(sorted(numbers))
