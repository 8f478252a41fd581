"""Rank several sets of predictions case by case, and test all pairwise differences.

Ranking follows BraTS: the sets are ranked within each case, region and metric, with shared ranks for ties; the ranks of
a case are averaged, and the mean of these averages over cases is the score of a set. Two sets are compared by a
permutation test that swaps their ranks case by case. Source: Bakas et al., arXiv 1811.02629, section on ranking.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import stats

from app.evaluation.brats import brats2026
from app.evaluation.evaluate import CALIBRATION
from app.evaluation.folders import first_ids
from app.evaluation.ranking.scores import Scored
from app.evaluation.statistics import Difference, holm, paired_difference
from app.evaluation.tables import write_csv
from data.errors import DataError

FloatArray = npt.NDArray[np.float64]

#: Default metrics for the ranking: the first of these groups that all sets have.
_USUAL: Final = (("lesion_dice", "lesion_hd95_mm"), ("sq_dsc", "sq_hd95", "rq"), ("dice", "hd95_mm"))
#: Metrics of which a lower value is better; for all others a higher one is.
_LOWER: Final = ("hd95_mm", "lesion_hd95_mm", "false_positives", "false_negatives", *CALIBRATION, *brats2026.LOWER)
_NO_SCORE: Final = ("volume_ml", "reference_volume_ml", "volume_error_ml", "reference_volume_mm3")
PERMUTATIONS: Final = 10_000


@dataclass(frozen=True, kw_only=True)
class RankDifference(Difference):
    """Difference of two sets in one metric, averaged over regions: the first minus the second."""

    metric: str
    """Name of the metric, e.g. ``dice``."""
    first: str
    """Name of the first set."""
    second: str
    """Name of the second set."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        keys = ("metric", "first", "second", "mean", "low", "high", "p", "p_holm", "no_test")
        return {key: getattr(self, key) for key in keys}


@dataclass(frozen=True, kw_only=True)
class RankTest:
    """Test of whether two sets differ in mean rank."""

    first: str
    """Name of the first set."""
    second: str
    """Name of the second set."""
    difference: float
    """Mean rank of the first minus that of the second: negative if the first is better."""
    p: float
    """Two-sided permutation test over cases."""
    p_holm: float
    """``p`` corrected for the other pairs."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """A ranking of several sets of predictions."""

    names: tuple[str, ...]
    """Names of the sets, in the order they were given."""
    cases: tuple[str, ...]
    """Sorted case ids that all sets have."""
    regions: tuple[str, ...]
    """Regions that all sets have."""
    metrics: tuple[str, ...]
    """Metrics that the ranking is based on."""
    values: FloatArray
    """Scores, shape (sets, cases, regions, metrics)."""
    case_ranks: FloatArray
    """Mean rank of each set in each case, shape (sets, cases); 1 is best."""
    tests: tuple[RankTest, ...]
    """Tests of all pairs of sets in mean rank."""
    differences: tuple[RankDifference, ...]
    """Differences of all pairs of sets in each metric."""
    left_out: tuple[str, ...]
    """Sorted case ids that are not scored in all sets."""
    failures: Mapping[str, Mapping[str, str]]
    """Reasons why cases could not be scored, by name of the set and case id; sets without failures are left out."""

    @property
    def mean_ranks(self) -> FloatArray:
        """Mean rank of each set over cases, shape (sets,)."""
        return np.asarray(self.case_ranks.mean(axis=1))

    @property
    def order(self) -> list[int]:
        """Indices of the sets in :attr:`names`, best set first."""
        return [int(place) for place in np.argsort(self.mean_ranks, kind="stable")]

    def by_case(self, metric: str) -> FloatArray:
        """Return one metric averaged over regions, shape (sets, cases)."""
        return np.asarray(self.values[..., self.metrics.index(metric)].mean(axis=2))

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain Python values."""
        return {
            "ranking": [
                {
                    "name": self.names[place],
                    "mean_rank": float(self.mean_ranks[place]),
                    **{metric: float(self.by_case(metric)[place].mean()) for metric in self.metrics},
                }
                for place in self.order
            ],
            "regions": list(self.regions),
            "metrics": list(self.metrics),
            "rank_tests": [asdict(test) for test in self.tests],
            "differences": [difference.to_json() for difference in self.differences],
            "cases": [
                {
                    "case": case,
                    "mean_rank": dict(zip(self.names, self.case_ranks[:, place].tolist(), strict=True)),
                    **{
                        metric: dict(zip(self.names, self.by_case(metric)[:, place].tolist(), strict=True))
                        for metric in self.metrics
                    },
                }
                for place, case in enumerate(self.cases)
            ],
            "cases_left_out": len(self.left_out),
            "left_out": list(self.left_out),
            "failures": {name: dict(reasons) for name, reasons in self.failures.items()},
        }


def is_lower_better(metric: str) -> bool:
    """Whether a lower value of a metric is better."""
    return metric in _LOWER


def rank(sets: Sequence[Scored], metrics: Sequence[str] = ()) -> Ranking:
    """Rank sets of predictions over the cases that all of them have.

    Args:
        sets: two or more, with different names.
        metrics: metrics to rank by; default: the lesion-wise scores if all sets have them, else Dice and HD95.

    Raises:
        DataError: no case or no region is in all sets, a metric is not in all sets, or the sets' records show that they
            were scored differently.
    """
    _require_alike({scored.name: scored.scored_by for scored in sets}, "by different rules", "--rules and --task")
    cases = sorted(set.intersection(*(set(scored.cases) for scored in sets)))
    if not cases:
        held = "; ".join(f"{scored.name} has {first_ids(sorted(scored.cases))}" for scored in sets)
        raise DataError(f"no case is in all sets: {held}. Rank predictions of the same cases.")
    every = [scored.cases[case].keys() for scored in sets for case in cases]
    common = [measure for measure in every[0] if all(measure in keys for keys in every)]
    chosen = _chosen(metrics, {metric for _, metric in common})
    if "nsd" in chosen:
        _require_alike({scored.name: scored.nsd_definition for scored in sets}, "with different nsd", "--nsd-mm")
    regions = tuple(dict.fromkeys(r for r, _ in common if all((r, metric) in common for metric in chosen)))
    if not regions:
        raise DataError(f"no region has {' and '.join(chosen)} in all sets. Score all sets by the same rules.")
    values = np.array(
        [[[[s.cases[case][r, metric] for metric in chosen] for r in regions] for case in cases] for s in sets]
    )
    case_ranks = ranks(values, chosen).mean(axis=(2, 3))
    names = tuple(scored.name for scored in sets)
    return Ranking(
        names=names,
        cases=tuple(cases),
        regions=regions,
        metrics=chosen,
        values=values,
        case_ranks=case_ranks,
        tests=_rank_tests(names, case_ranks),
        differences=tuple(
            d for k, metric in enumerate(chosen) for d in _differences(names, metric, values[..., k].mean(axis=2))
        ),
        left_out=tuple(
            sorted(set().union(*(ids for s in sets for ids in (s.cases, s.failures, s.missing))) - set(cases))
        ),
        failures={scored.name: scored.failures for scored in sets if scored.failures},
    )


def ranks(values: FloatArray, metrics: Sequence[str]) -> FloatArray:
    """Rank over the first axis; 1 is best, and ties share a rank.

    Args:
        values: shape (sets, cases, regions, metrics).
        metrics: names of the metrics on the last axis; they determine whether high or low is better.

    Returns:
        ranks of the same shape.
    """
    signs = np.array([1.0 if is_lower_better(metric) else -1.0 for metric in metrics])
    return np.asarray(stats.rankdata(values * signs, axis=0), dtype=np.float64)


def permutation_p(differences: FloatArray, *, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
    """Return the p-value of a two-sided permutation test, by random signs, that paired differences have mean 0.

    Args:
        differences: one difference per case, shape (cases,).
        permutations: number of draws; the observed signs count as well, so p is never 0.
        seed: seed of the random generator.

    Example:
        >>> permutation_p(np.zeros(5))
        1.0
    """
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, size=(permutations, len(differences))) * 2.0 - 1
    drawn = np.abs(signs @ differences)
    return float((1 + np.count_nonzero(drawn >= abs(differences.sum()) - 1e-9)) / (1 + permutations))


def rank_rows(ranking: Ranking) -> list[list[str]]:
    """Return the table for the terminal: one row per set, best set first."""
    best = ranking.order[0]
    against = {frozenset((test.first, test.second)): test for test in ranking.tests}
    table = [["set", "mean rank", *ranking.metrics, f"p, {ranking.names[best]} first"]]
    for place in ranking.order:
        test = against.get(frozenset((ranking.names[best], ranking.names[place])))
        table.append(
            [
                ranking.names[place],
                f"{ranking.mean_ranks[place]:.2f}",
                *(f"{ranking.by_case(metric)[place].mean():.3f}" for metric in ranking.metrics),
                "-" if test is None else p_text(test.p_holm),
            ]
        )
    return table


def difference_rows(ranking: Ranking) -> list[list[str]]:
    """Return the second table for the terminal: all pairs of sets in each metric."""
    return [
        ["difference", "metric", "mean", "95 % interval", "p", "p, Holm"],
        *(
            [
                f"{d.first} - {d.second}",
                d.metric,
                f"{d.mean:+.3f}",
                f"{d.low:+.3f} to {d.high:+.3f}",
                p_text(d.p),
                p_text(d.p_holm),
            ]
            for d in ranking.differences
        ),
    ]


def write_rank_table(ranking: Ranking, path: Path) -> None:
    """Write a CSV with one row per case and set: its mean rank, and the scores it was ranked by.

    Raises:
        DataError: the folder of ``path`` does not exist, or ``path`` is a folder.
        OSError: the disk is full or the folder cannot be written.
    """
    header = ["case", "set", "mean_rank", *(f"{r}_{m}" for r in ranking.regions for m in ranking.metrics)]
    rows = (
        [case, name, ranking.case_ranks[s, c], *ranking.values[s, c].ravel().tolist()]
        for (c, case), (s, name) in itertools.product(enumerate(ranking.cases), enumerate(ranking.names))
    )
    write_csv(path, [header, *rows])


def _require_alike(stated: Mapping[str, str | None], how: str, options: str) -> None:
    """Refuse sets that state different ways of scoring; sets without a statement pass.

    Raises:
        DataError: two statements differ.
    """
    statements = [(name, text) for name, text in stated.items() if text is not None]
    for name, text in statements[1:]:
        if text != statements[0][1]:
            raise DataError(
                f"{statements[0][0]} and {name} were scored {how}: {statements[0][1]}; {text}. Score both with the "
                f"same {options}."
            )


def _chosen(metrics: Sequence[str], common: set[str]) -> tuple[str, ...]:
    rankable = sorted(common - set(_NO_SCORE))
    if metrics:
        missing = [metric for metric in metrics if metric not in rankable]
        if missing:
            raise DataError(f"metric {missing[0]}: not every set has it; choose from {', '.join(rankable) or 'none'}.")
        return tuple(metrics)
    found = next((group for group in _USUAL if set(group) <= common), None)
    if found is None:
        raise DataError(
            "some sets have lesion-wise scores and others do not, or none has Dice. Score all sets in the same way."
        )
    return found


def _rank_tests(names: Sequence[str], case_ranks: FloatArray) -> tuple[RankTest, ...]:
    pairs = list(itertools.combinations(range(len(names)), 2))
    p = [permutation_p(case_ranks[a] - case_ranks[b]) for a, b in pairs]
    return tuple(
        RankTest(
            first=names[a],
            second=names[b],
            difference=float((case_ranks[a] - case_ranks[b]).mean()),
            p=value,
            p_holm=value if corrected is None else corrected,
        )
        for (a, b), value, corrected in zip(pairs, p, holm(p), strict=True)
    )


def _differences(names: Sequence[str], metric: str, values: FloatArray) -> list[RankDifference]:
    """Compare all pairs of sets in one metric; ``values`` has the shape (sets, cases)."""
    pairs = list(itertools.combinations(range(len(names)), 2))
    found = [paired_difference(values[[a]], values[[b]]) for a, b in pairs]
    return [
        RankDifference(**{**vars(one), "metric": metric, "first": names[a], "second": names[b], "p_holm": p_holm})
        for (a, b), one, p_holm in zip(pairs, found, holm([one.p for one in found]), strict=True)
    ]


def p_text(value: float | None) -> str:
    """Format a p-value with three decimals; "< 0.001" if it is smaller, a dash if there is none."""
    return "-" if value is None else f"{value:.3f}" if value >= 0.001 else "< 0.001"
