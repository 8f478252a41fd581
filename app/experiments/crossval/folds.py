"""The folds of a cross-validation, and what must be unchanged when it is resumed.

The folder of a cross-validation holds::

    folds.json      config, case ids by fold, hash of the label maps
    splits/         training and validation cases of each fold
    fold-0/, ...    one run folder per fold, as ``train`` makes them
    results/        one JSON file per trained fold
    out-of-fold/    one file per case: the prediction of the network that has not trained on it
                    (app.experiments.crossval.out_of_fold)
    logs/           stderr of the worker processes, if there are any, until all folds are done
    crossval.csv    scores of every case, without and with post-processing
    crossval.json   everything in numbers and words
    crossval.html   the page
    ensemble/       the ensemble that ``predict`` uses (app.inference.ensemble)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from app.config.load import RunConfig, from_plain, to_plain
from app.errors import ConfigError, RunError
from app.experiments.runs import differences, json_object
from app.inference.ensemble import CROSSVAL_FILE
from app.runs.folder import read_json, write_json
from app.training.cases import require_labels, split_on_record, tell_of_names, tell_of_patients
from data.datasets.label_stats import hash_of, read_label_maps, tumours_of
from data.datasets.layouts import Case, patients_of
from data.datasets.naming import composed
from data.datasets.source import DataSource
from data.datasets.splits import Split, stratified_split
from data.errors import DataError
from data.labels import CONVENTIONS, LabelConvention
from data.nifti import canonical_spacing, read_grid
from data.preprocess import SPACING_TOLERANCE

LEAST_FOLDS: Final = 2
MOST_FOLDS: Final = 20
#: Folder of the splits; its files are written before ``folds.json``.
SPLITS: Final = "splits"
_VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class Folds:
    """Cases of a cross-validation, and their folds."""

    out: Path
    """Folder of the cross-validation."""
    cases: Mapping[str, Case]
    config: RunConfig
    convention: LabelConvention
    splits: tuple[Split, ...]
    """Split of each fold."""
    label_maps_sha256: str
    """Hash over all label maps."""

    def run(self, fold: int) -> Path:
        """Return the run folder of a fold."""
        return self.out / f"fold-{fold}"

    def split_file(self, fold: int) -> Path:
        """Return the file with the split of a fold's run."""
        return self.out / SPLITS / f"fold-{fold}.json"

    def result_file(self, fold: int) -> Path:
        """Return the file with a fold's result; it exists once the fold is trained."""
        return self.out / "results" / f"fold-{fold}.json"

    def answer_file(self, case_id: str) -> Path:
        """Return the file with the out-of-fold probabilities of a case."""
        return self.out / "out-of-fold" / f"{case_id}.npz"

    def fold_of(self) -> dict[str, int]:
        """Map each case id, in sorted order, to the fold that validates on it."""
        of = {case_id: fold for fold, split in enumerate(self.splits) for case_id in split.validation}
        return dict(sorted(of.items()))

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``folds.json``."""
        return {
            "version": _VERSION,
            "folds": [list(split.validation) for split in self.splits],
            "labels": self.convention.name,
            "label_maps_sha256": self.label_maps_sha256,
            "config": to_plain(self.config),
        }


def deal(data: DataSource, out: Path, config: RunConfig, *, folds: int) -> Folds:
    """Deal the cases of a data set into folds by patient, with similar tumours in each; keep recorded folds.

    Args:
        data: the data set.
        out: folder of the cross-validation.
        config: config of every fold's run.
        folds: number of folds.

    Raises:
        DataError: the data cannot be used, or has fewer patients than folds.
        RunError: ``folds.json`` is damaged.
        ConfigError: too many or too few folds; ``data.spacing_mm`` is null and the folds would work at different
            spacings.
    """
    if not LEAST_FOLDS <= folds <= MOST_FOLDS:
        raise ConfigError(f"--folds takes {LEAST_FOLDS} to {MOST_FOLDS}, got {folds}")
    cases = data.find_cases()
    patients = patients_of(cases.values())
    count = len(set(patients.values()))
    recorded = _splits_on_record(out, cases)
    if recorded is None and count < folds:
        raise DataError(
            f"{data.root}: {count} {'patient' if count == 1 else 'patients'} for {folds} folds; every fold needs one. "
            "Give fewer --folds, or more cases."
        )
    require_labels([case.require() for case in cases.values()], advice="Add them, or take the cases out.")
    held = read_label_maps(cases.values())
    convention = data.decide_convention(cases, held)
    if recorded is not None and len(recorded) == folds:
        splits = recorded
    else:
        tumours = tumours_of(cases, held, convention)
        splits = tuple(stratified_split(tumours, patients, fold, folds=folds) for fold in range(folds))
    tell_of_patients(cases.values(), [split.validation for split in splits])
    tell_of_names(cases.values())
    if config.data.spacing_mm is None:
        _require_one_spacing(cases, splits)
    return Folds(
        out=out,
        cases=cases,
        config=config,
        convention=convention,
        splits=splits,
        label_maps_sha256=hash_of(held),
    )


def begun(data: DataSource, out: Path) -> Folds:
    """Load the cross-validation that was started in a folder, with the files of its cases.

    Args:
        data: the data set.
        out: folder of the cross-validation.

    Raises:
        DataError: the data cannot be read.
        RunError: a file of the cross-validation is missing or damaged.
    """
    content = json_object(read_json(out / CROSSVAL_FILE), out / CROSSVAL_FILE)
    found = [split_on_record(out / SPLITS / f"fold-{fold}.json") for fold in range(len(content["folds"]))]
    return Folds(
        out=out,
        cases=data.find_cases(),
        config=from_plain(content["config"], str(out / CROSSVAL_FILE)),
        convention=CONVENTIONS[content["labels"]],
        splits=tuple(found),
        label_maps_sha256=content["label_maps_sha256"],
    )


def require_same(folds: Folds) -> None:
    """Record a new cross-validation, or require that it matches the one that was started in the folder.

    Raises:
        ConfigError: the config or the number of folds differs.
        DataError: the cases or label maps differ.
        RunError: ``folds.json`` is damaged.
    """
    path, plan = folds.out / CROSSVAL_FILE, folds.to_json()
    if not path.exists():
        for fold, split in enumerate(folds.splits):
            folds.split_file(fold).parent.mkdir(parents=True, exist_ok=True)
            write_json(folds.split_file(fold), split.to_json())
        write_json(path, plan)
        return
    there = json_object(read_json(path), path)
    # Keys that later versions added have their defaults.
    there["config"] = to_plain(from_plain(there.get("config", {}), str(path)))
    settings = ("version", "config", "labels")
    changed = differences({key: there.get(key) for key in settings}, {key: plan[key] for key in settings})
    counts = len(there.get("folds", ())), len(folds.splits)
    if counts[0] != counts[1]:
        changed.append(f"folds: {counts[0]} -> {counts[1]}")
    if changed:
        raise ConfigError(
            f"{folds.out} holds another cross-validation; give another folder, or the settings it was begun with. "
            f"Different: {'; '.join(changed)}"
        )
    before, now = {composed(case_id) for fold in there["folds"] for case_id in fold}, set(folds.cases)
    if before != now:
        raise DataError(
            f"{folds.out} was begun with other cases: {_some(before - now)} gone, {_some(now - before)} new. Give the "
            "data set it was begun with, or another folder."
        )
    recorded = [sorted(map(composed, fold)) for fold in there["folds"]]
    if recorded != plan["folds"] or there.get("label_maps_sha256") != plan["label_maps_sha256"]:
        raise DataError(
            f"label maps have changed since {folds.out} was begun. Put the old ones back, or give another folder."
        )


def _splits_on_record(out: Path, cases: Mapping[str, Case]) -> tuple[Split, ...] | None:
    """Return the splits a cross-validation of these cases began with; a later version may recognise more patients."""
    path = out / CROSSVAL_FILE
    if not path.exists():
        return None
    try:
        folds = [[composed(case_id) for case_id in fold] for fold in json_object(read_json(path), path)["folds"]]
    except (KeyError, TypeError) as error:
        raise RunError(f"{path}: damaged, it does not hold the folds ({error}). Restore it from a copy.") from error
    if sorted(case_id for fold in folds for case_id in fold) != sorted(cases):
        return None  # other cases; require_same reports them
    return tuple(Split(train=tuple(sorted(cases.keys() - set(fold))), validation=tuple(sorted(fold))) for fold in folds)


def _some(ids: set[str]) -> str:
    shown = sorted(ids)
    return f"{len(ids)} ({', '.join(shown[:3])}{', ...' if len(shown) > 3 else ''})" if ids else "0"


def _require_one_spacing(cases: Mapping[str, Case], splits: Sequence[Split]) -> None:
    """Require one spacing for all folds: a run takes the median of its training cases, an ensemble has only one."""
    found = {
        case.id: canonical_spacing(read_grid(case.contrasts["t1c"], case.volumes.get("t1c"))[1])
        for case in cases.values()
    }
    medians = [
        tuple(median(along) for along in zip(*(found[case_id] for case_id in split.train), strict=True))
        for split in splits
    ]
    for along in zip(*medians, strict=True):
        if max(along) > min(along) * (1 + SPACING_TOLERANCE):
            raise ConfigError(
                f"the cases have different spacings: the folds' medians go from {min(along):g} to {max(along):g} mm, "
                "and networks of an ensemble work at one. Say which: --set data.spacing_mm=1"
            )
