"""What the reproductions share: the gradient rules, a fair choice of learning rates, and a record of finished runs."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer

import znorm

#: By optimiser and rule: the first learning rate that is tried. Rules that fix the size of gradients need smaller ones
#: under SGD.
FIRST_RATE: Final[Mapping[str, Mapping[str, float]]] = {
    "sgd": {"none": 1e-1, "clip": 1e-1, "centralize": 1e-1, "znorm": 1e-2, "bgn": 1e-3, "bgn+znorm": 1e-2},
    "adam": {"none": 3e-3, "clip": 3e-3, "centralize": 3e-3, "znorm": 3e-3, "bgn": 3e-3, "bgn+znorm": 3e-3},
}
RULES: Final = tuple(FIRST_RATE["sgd"])
#: Ratio of neighbouring learning rates: about half a decade.
FACTOR: Final = 3.0
#: Learning rates that are tried for every rule.
RATES: Final = 4
CLIP_NORM: Final = 1.0

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training; every rule trains the same network from the same weights on the same batches for each seed."""

    network: str
    optimizer: str
    """``sgd`` (momentum 0.9, weight decay 1e-4) or ``adam``."""
    rule: str
    """One of :data:`RULES`."""
    rate: float
    """Peak learning rate."""
    seed: int


def optimizer_of(run: Run, model: nn.Module, places: Sequence[str]) -> Optimizer:
    """Create the optimiser of a run and attach its rule.

    Args:
        run: names the optimiser and the rule.
        model: the network.
        places: names of the modules after which ``bgn`` normalises the gradient.
    """
    if run.optimizer == "sgd":
        optimizer: Optimizer = torch.optim.SGD(model.parameters(), lr=run.rate, momentum=0.9, weight_decay=1e-4)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=run.rate)
    if run.rule.startswith("bgn"):
        znorm.attach_backward_norm(model, places)
    if run.rule.endswith("znorm"):
        znorm.attach(optimizer, model)
    else:
        numbers: dict[str, Any] = {"limit": CLIP_NORM} if run.rule == "clip" else {}
        znorm.attach_baseline(optimizer, model, "none" if run.rule == "bgn" else run.rule, **numbers)
    return optimizer


def rate_at(step: int, steps: int, peak: float) -> float:
    """Learning rate of a step, from 0: a warm-up over the first tenth, then half a cosine down to 0."""
    warm = max(1, steps // 10)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


class Record:
    """Finished runs, one line of JSON each, so that an interrupted sweep can be resumed.

    Args:
        path: the file; a last line that an interruption cut off is ignored.
        settings: what all runs share; a file that was written with other settings is refused.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path, self._settings = path, dict(settings)
        self._results: dict[Run, Result] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            path.write_text(complete, encoding="utf-8")
        for line in complete.splitlines():
            entry = json.loads(line)
            if entry["settings"] != self._settings:
                raise SystemExit(f"{path}: its runs have other settings, {entry['settings']}; choose another folder")
            self._results[Run(**entry["run"])] = entry["result"]

    def result(self, run: Run, train: Callable[[Run], Result]) -> Result:
        """Return the result of a run, training it if it is missing."""
        if run not in self._results:
            self._results[run] = train(run)
            entry = {"run": asdict(run), "settings": self._settings, "result": self._results[run]}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        return self._results[run]

    def runs(self) -> dict[Run, Result]:
        """Return all finished runs."""
        return dict(self._results)


def tune(record: Record, train: Callable[[Run], Result], network: str, optimizer: str, rule: str) -> float:
    """Choose a learning rate by the validation score of seed 0, from the same number of rates for every rule.

    The first two are neighbours. Each further one lies beyond the best, or on its other side where both are known.
    """
    scores: dict[int, float] = {}
    first = FIRST_RATE[optimizer][rule]

    def rate_of(place: int) -> float:
        return float(f"{first * FACTOR**place:.3g}")

    for _ in range(RATES):
        best = max(scores, key=lambda place: scores[place], default=0)
        unknown = [place for place in (best, best + 1, best - 1) if place not in scores]
        place = unknown[0] if unknown else min(scores) - 1
        run = Run(network=network, optimizer=optimizer, rule=rule, rate=rate_of(place), seed=0)
        scores[place] = float(record.result(run, train)["validation"])
    return rate_of(max(scores, key=lambda place: scores[place]))


def sweep(record: Record, train: Callable[[Run], Result], options: Namespace) -> None:
    """Make every missing run: each network, rule and optimiser at its chosen rate with every seed.

    Args:
        record: where runs are kept.
        train: makes one run.
        options: has ``networks``, ``rules``, ``optimizers`` and ``seeds``.
    """
    for optimizer in options.optimizers:
        for network in options.networks:
            for rule in options.rules:
                rate = tune(record, train, network, optimizer, rule)
                for seed in range(options.seeds):
                    record.result(Run(network=network, optimizer=optimizer, rule=rule, rate=rate, seed=seed), train)


def chosen(results: Mapping[Run, Result]) -> dict[tuple[str, str, str], list[Result]]:
    """Return, by network, optimiser and rule, the results of all seeds at the rate that is best for seed 0."""
    groups: dict[tuple[str, str, str], dict[float, list[Result]]] = {}
    for run, result in sorted(results.items(), key=lambda item: item[0].seed):
        groups.setdefault((run.network, run.optimizer, run.rule), {}).setdefault(run.rate, []).append(result)
    return {
        names: max(rates.values(), key=lambda found: (found[0]["validation"], len(found)))
        for names, rates in groups.items()
    }


def table(results: Mapping[Run, Result], columns: Mapping[str, str]) -> list[str]:
    """Return a Markdown table: for every network, optimiser and rule the mean and SD over the seeds at the chosen rate.

    Args:
        results: the finished runs.
        columns: title of a column by its key in the results.
    """
    titles = ["network", "optimizer", "rule", "rate", "rates tried", "seeds", *columns.values()]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for names, found in chosen(results).items():
        rate = next(run.rate for run, result in results.items() if result is found[0])
        tried = {run.rate for run in results if (run.network, run.optimizer, run.rule) == names}
        cells = [*names, f"{rate:.2g}", str(len(tried)), str(len(found))]
        cells += [_spread([result.get(key) for result in found]) for key in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _spread(values: Sequence[float | None]) -> str:
    """Mean and SD of numbers below 2, which are scores; a list of others, which are numbers of steps."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values) or max(known) > 2:
        return ", ".join("never" if value is None else f"{value:g}" for value in values)
    return f"{fmean(known):.3f}" + (f" (SD {stdev(known):.3f})" if len(known) > 1 else "")
