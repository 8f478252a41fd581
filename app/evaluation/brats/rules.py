"""Definition of a lesion in the challenges' scripts, by year and task; data only, no computation.

Sources: rachitsaluja/BraTS-2023-Metrics, brats_metrics.py at 0c603fc; rachitsaluja/BraTS-2024-Metrics, metrics_GLI.py,
metrics_MEN.py, metrics_PED.py and metrics_MEN_RT.py at 9e8879a, which adds the surface Dice to the challenge's scripts,
metrics_SSA.py at f61f7de, and metrics_MET.py at b04e5a0. The changes of the later version f1131e3 were found by
comparing its results; docs/how-to/scores.md lists which of them are inferred.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from data.errors import DataError
from data.labels import CAVITY, CYST, ENHANCING, NECROSIS, OEDEMA

Year = Literal["brats2023", "brats2024", "brats2024-f1131e3"]
Task = Literal["GLI", "PED", "SSA", "MEN", "MET", "MEN-RT"]


@dataclass(frozen=True, kw_only=True)
class RegionRule:
    """Definition of one region and of its lesions."""

    name: str
    """Name of the region, e.g. ``ET``."""
    tissues: tuple[int, ...]
    """Codes of ``data.labels.decode_tissues`` in the region."""
    dilation: int
    """Number of 18-neighbour dilation steps; components that touch afterwards are one lesion."""
    threshold_mm3: float
    """Reference lesions of at most this volume are left out of the means."""
    joins: tuple[str, ...] = ()
    """Other regions, in order: lesions of this region that touch the same lesion of one of them are merged."""
    scored: bool = True
    """Whether the region has a row in the table; an unscored one is used only in ``joins``."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Scoring rules of one task of one year."""

    year: Year
    """``brats2023`` or ``brats2024``; a commit is added for a later version of a script whose results differ."""
    task: Task
    """Name of the task, e.g. ``GLI``."""
    regions: tuple[RegionRule, ...]
    """Regions in the order of the script's table."""
    penalty_mm: float | None = 374.0
    """HD95 of a missed or spurious lesion, default 374 mm; None: the diagonal of the grid in voxels."""
    joined_predictions: bool = True
    """Whether predicted components are joined as in the reference, and small ones dropped. If so, whole-volume HD95,
    sensitivity and specificity are computed from lesion numbers, as in the scripts of 2024."""
    least_in_mm3: bool = False
    """Whether small predicted lesions are dropped by volume in mm^3 (MEN-RT) instead of by number of voxels."""
    counts_invented: bool = True
    """Whether spurious lesions lower the lesion-wise means; MEN-RT leaves them out."""
    surface_dice: bool = True
    """Whether the script reports the normalised surface Dice at 0.5 and 1 mm, as those of 2024 do."""
    least_denominator: float = 2.2250738585072014e-308
    """Added to the denominators of sensitivity and specificity; default: the smallest normal float."""

    @property
    def scored(self) -> tuple[RegionRule, ...]:
        """The regions that have a row in the table."""
        return tuple(region for region in self.regions if region.scored)


_CORE: Final = (NECROSIS, CYST)
_WHOLE: Final = (*_CORE, OEDEMA, ENHANCING)


def _three(dilation: int, threshold_mm3: float, *, joined: bool = False) -> tuple[RegionRule, ...]:
    """Return WT, TC and ET; with ``joined``, lesions of ET that touch the same lesion of NETC are merged."""

    def rule(name: str, tissues: tuple[int, ...], joins: tuple[str, ...] = (), *, scored: bool = True) -> RegionRule:
        return RegionRule(
            name=name, tissues=tissues, dilation=dilation, threshold_mm3=threshold_mm3, joins=joins, scored=scored
        )

    whole, core = rule("WT", _WHOLE), rule("TC", (*_CORE, ENHANCING))
    if not joined:
        return whole, core, rule("ET", (ENHANCING,))
    return whole, core, rule("NETC", _CORE, scored=False), rule("ET", (ENHANCING,), ("NETC",))


def _gli_2024() -> tuple[RegionRule, ...]:
    # The script intends to dilate SNFH by 5 as well, but misspells it as "SFNH", so 3 applies.
    return (
        RegionRule(name="WT", tissues=_WHOLE, dilation=3, threshold_mm3=20),
        RegionRule(name="TC", tissues=(*_CORE, ENHANCING), dilation=3, threshold_mm3=20),
        RegionRule(name="NETC", tissues=_CORE, dilation=5, threshold_mm3=20, joins=("ET", "RC")),
        RegionRule(name="SNFH", tissues=(OEDEMA,), dilation=3, threshold_mm3=20, joins=("ET", "RC", "NETC")),
        RegionRule(name="ET", tissues=(ENHANCING,), dilation=3, threshold_mm3=10, joins=("NETC", "RC")),
        RegionRule(name="RC", tissues=(CAVITY,), dilation=5, threshold_mm3=20, joins=("ET", "NETC")),
    )


def _ped_2024() -> tuple[RegionRule, ...]:
    tissues = {
        "WT": _WHOLE,
        "TC": (*_CORE, ENHANCING),
        "ET": (ENHANCING,),
        "NETC": (NECROSIS,),
        "CC": (CYST,),
        "ED": (OEDEMA,),
    }
    return tuple(RegionRule(name=name, tissues=t, dilation=5, threshold_mm3=10) for name, t in tissues.items())


def _of_2023(task: Task, dilation: int, threshold_mm3: float) -> Rules:
    return Rules(
        year="brats2023",
        task=task,
        regions=_three(dilation, threshold_mm3),
        joined_predictions=False,
        surface_dice=False,
        least_denominator=2.220446049250313e-16,
    )


_ALL: Final = (
    _of_2023("GLI", 3, 50),
    _of_2023("PED", 3, 50),
    _of_2023("SSA", 3, 50),
    _of_2023("MEN", 1, 50),
    _of_2023("MET", 1, 2),
    Rules(year="brats2024", task="GLI", regions=_gli_2024(), penalty_mm=337.0),
    Rules(year="brats2024", task="PED", regions=_ped_2024()),
    Rules(year="brats2024", task="SSA", regions=_three(3, 50, joined=True)),
    Rules(year="brats2024", task="MEN", regions=_three(1, 50), joined_predictions=False),
    Rules(year="brats2024", task="MET", regions=_three(1, 2, joined=True)),
    Rules(
        year="brats2024",
        task="MEN-RT",
        regions=(RegionRule(name="GTV", tissues=_WHOLE, dilation=1, threshold_mm3=50),),
        penalty_mm=None,
        least_in_mm3=True,
        counts_invented=False,
    ),
    Rules(
        year="brats2024-f1131e3",
        task="MET",
        regions=(
            *_three(1, 2, joined=True),
            RegionRule(name="RC", tissues=(CAVITY,), dilation=1, threshold_mm3=2),
        ),
        penalty_mm=None,
    ),
)


def rules_for(year: str, task: str) -> Rules:
    """Return the rules of a year and a task, by their names on the command line.

    Raises:
        DataError: there is no such year, or the year does not have the task; the message lists the choices.

    Example:
        >>> [region.name for region in rules_for("brats2024", "GLI").regions]
        ['WT', 'TC', 'NETC', 'SNFH', 'ET', 'RC']
    """
    years = tuple(dict.fromkeys(rules.year for rules in _ALL))
    if year not in years:
        raise DataError(
            f"--rules {year}: choose from {', '.join(years)} and brats2026. Without --rules, whole regions are scored, "
            "as in the challenges up to 2022."
        )
    tasks = {rules.task: rules for rules in _ALL if rules.year == year}
    found = next((rules for name, rules in tasks.items() if name == task), None)
    if found is None:
        raise DataError(f"--task {task}: {year} has no such task; choose from {', '.join(tasks)}.")
    return found
