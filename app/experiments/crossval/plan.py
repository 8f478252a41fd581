"""The folds of a cross-validation, and what must be unchanged when it is resumed.

The folder of a cross-validation contains::

    folds.json      config, case ids by fold, hash of the label maps
    splits/         training and validation cases of each fold
    fold-0/, ...    one run folder per fold, as ``train`` makes them
    results/        one JSON file per trained fold
    out-of-fold/    one file per case: the prediction of the network that was not trained on it
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
from typing import Any, Final

from app.config.load import RunConfig, from_plain, to_plain
from app.errors import ConfigError, RunError
from app.experiments.runs import differences, json_object, require_unchanged
from app.inference.ensemble import CROSSVAL_FILE, ENSEMBLE_FILE
from app.runs.folder import read_json, write_json
from app.training.cases import (
    case_spacing,
    deal_fold,
    describing,
    median_by_axis,
    report_misnamed_files,
    report_same_label_maps,
    report_visits,
    require_labels,
    require_real,
    split_on_record,
    unlabelled_conventions,
    without_synthetic,
)
from app.training.data_sets import (
    conventions_on_record,
    data_sets_on_record,
    require_same_data_sets,
    require_use,
    require_weights,
)
from app.training.tasks import labels_of_task, record_of_task
from data.datasets.label_stats import hash_of, read_label_maps
from data.datasets.layouts import Case, patients_of
from data.datasets.naming import composed
from data.datasets.source import DataSource
from data.datasets.splits import FOLDS, Split, with_synthetic
from data.errors import DataError
from data.labels import LabelConvention
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
    """All cases by id, including synthetic ones, which are used only for training."""
    config: RunConfig
    conventions: tuple[LabelConvention, ...]
    """Label convention of each data set."""
    splits: tuple[Split, ...]
    """Split of each fold."""
    label_maps_sha256: str
    """Hash over all label maps."""
    init_from: Path | None = None
    """Ensemble of an earlier cross-validation with the same folds; its networks supply the initial weights."""
    init_weights: tuple[str, ...] | None = None
    """SHA-256 of the initial weights of each fold; None without ``init_from``."""

    @property
    def is_presence(self) -> bool:
        """Whether the networks answer whether something is present."""
        return self.config.task.name == "presence"

    def run(self, fold: int) -> Path:
        """Return the run folder of a fold."""
        return self.out / f"fold-{fold}"

    def initial_network(self, fold: int) -> Path | None:
        """Return the folder of the network that a fold starts from, which never saw the fold's validation cases."""
        return None if self.init_from is None else self.init_from / self.run(fold).name

    def split_file(self, fold: int) -> Path:
        """Return the file with the split of a fold's run."""
        return self.out / SPLITS / f"fold-{fold}.json"

    def result_file(self, fold: int) -> Path:
        """Return the file with a fold's result; it exists once the fold is trained."""
        return self.out / "results" / f"fold-{fold}.json"

    def prediction_file(self, case_id: str) -> Path:
        """Return the file with the out-of-fold answer for a case: probabilities of voxels, or logits of presence."""
        return self.out / "out-of-fold" / f"{case_id}.{'json' if self.is_presence else 'npz'}"

    def fold_of(self) -> dict[str, int]:
        """Map each case id, in sorted order, to the fold that validates on it."""
        of = {case_id: fold for fold, split in enumerate(self.splits) for case_id in split.validation}
        return dict(sorted(of.items()))

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``folds.json``."""
        data_sets = data_sets_on_record(self.cases.values(), self.conventions)
        return {
            "version": _VERSION,
            "folds": [list(split.validation) for split in self.splits],
            "labels": self.conventions[0].name,
            "label_maps_sha256": self.label_maps_sha256,
            "config": to_plain(self.config),
            **({"data_sets": data_sets} if data_sets else {}),
            **({"init_from": list(self.init_weights)} if self.init_weights is not None else {}),
        }


def deal(
    data: DataSource, out: Path, config: RunConfig, *, folds: int | None = None, init_from: Path | None = None
) -> Folds:
    """Deal the cases of a data set into folds by patient, with similar tumours in each; keep recorded folds.

    Synthetic cases are in no fold: all splits train on them, except those that validate on their patient.

    Args:
        data: the data set, or several.
        out: folder of the cross-validation.
        config: config of every fold's run.
        folds: number of folds; None for that of ``init_from``, or else :data:`data.datasets.splits.FOLDS`.
        init_from: ensemble of an earlier cross-validation; its folds are kept.

    Raises:
        DataError: the data cannot be used, has fewer patients than folds, or has other cases than ``init_from``.
        RunError: ``folds.json`` is damaged; ``init_from`` is not an ensemble, or its description is damaged.
        ConfigError: too many or too few folds; ``data.spacing_mm`` is null and the folds would work at different
            spacings; ``data.weights`` does not fit the number of data sets.
    """
    earlier = None if init_from is None else _earlier(init_from)
    if folds is None:
        folds = FOLDS if earlier is None else len(earlier.folds)
    if not LEAST_FOLDS <= folds <= MOST_FOLDS:
        raise ConfigError(f"--folds takes {LEAST_FOLDS} to {MOST_FOLDS}, got {folds}")
    require_weights(config, data)
    cases = data.find_cases()
    real = require_real(data, cases, advice="Add a data set of real cases.")
    patients = patients_of(cases.values())
    count = len({patients[case_id] for case_id in real})
    recorded = _on_record(out)
    if recorded is None and earlier is not None:
        earlier.require_fit(real, data, folds)
        recorded = {"folds": earlier.folds}
    # If the cases differ, require_same reports that.
    kept = recorded is not None and sorted(case_id for fold in recorded["folds"] for case_id in fold) == sorted(real)
    if not kept and count < folds:
        raise DataError(
            f"{data.name}: {count} {'patient' if count == 1 else 'patients'} for {folds} folds; every fold needs at "
            "least one. Reduce --folds, or add cases."
        )
    usable = [case.require() for case in cases.values()]
    if config.task.labels_csv is None:
        require_labels(usable, advice="Add them, or remove the cases.")
    label_maps = read_label_maps(cases.values())
    conventions = data.decide_conventions(cases, label_maps) if label_maps else unlabelled_conventions(data)
    labels = labels_of_task(config, cases, cases, label_maps, conventions)
    if recorded is not None and kept and len(recorded["folds"]) == folds:
        # The folds are kept, but synthetic cases are assigned anew: a later version may recognise more patients.
        synthetic = cases.keys() - real.keys()
        splits = tuple(with_synthetic(split, patients, synthetic) for split in _splits(recorded["folds"]))
    else:
        splits = tuple(
            deal_fold(cases, label_maps, conventions, fold, folds=folds, classes=labels) for fold in range(folds)
        )
    for split in splits:
        require_use(split, cases, data, config)
        record_of_task(config, labels, split.train)  # refuses folds that cannot be trained
    report_visits(cases.values(), [split.validation for split in splits])
    report_same_label_maps(label_maps, splits)
    report_misnamed_files(real.values())
    if config.data.spacing_mm is None:
        _require_one_spacing(cases, splits)
    return Folds(
        out=out,
        cases=cases,
        config=config,
        conventions=conventions,
        splits=splits,
        label_maps_sha256=hash_of(label_maps),
        init_from=init_from,
        init_weights=None if earlier is None else earlier.weights,
    )


def read_folds(out: Path, data: DataSource | None = None) -> Folds:
    """Load the cross-validation that was started in a folder.

    Args:
        out: folder of the cross-validation.
        data: its data set; without one, the cases have ids but no files.

    Raises:
        DataError: the data cannot be read.
        RunError: a file of the cross-validation is missing or damaged.
    """
    path = out / CROSSVAL_FILE
    recorded = _on_record(out)
    if recorded is None:
        raise RunError(f"{path}: missing. Is {out} the folder of a cross-validation?")
    splits = _splits(recorded["folds"])
    if data is not None:
        splits = tuple(split_on_record(out / SPLITS / f"fold-{fold}.json") for fold in range(len(splits)))
        cases = data.find_cases()
    else:
        cases = {case_id: Case(id=case_id, folder=out) for fold in recorded["folds"] for case_id in fold}
    try:
        return Folds(
            out=out,
            cases=cases,
            config=from_plain(recorded["config"], str(path)),
            conventions=conventions_on_record(recorded),
            splits=splits,
            label_maps_sha256=str(recorded["label_maps_sha256"]),
            init_weights=tuple(map(str, recorded["init_from"])) if "init_from" in recorded else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path}: damaged ({error}).") from error


def require_same(folds: Folds) -> None:
    """Record a new cross-validation, or require that it matches the one that was started in the folder.

    Raises:
        ConfigError: the config or the number of folds differs.
        DataError: the data sets, cases or label maps differ.
        RunError: ``folds.json`` is damaged.
    """
    path, plan, recorded = folds.out / CROSSVAL_FILE, folds.to_json(), _on_record(folds.out)
    if recorded is None:
        for fold, split in enumerate(folds.splits):
            folds.split_file(fold).parent.mkdir(parents=True, exist_ok=True)
            write_json(folds.split_file(fold), split.to_json())
        write_json(path, plan)
        return
    # Keys that later versions added get their defaults.
    recorded["config"] = to_plain(from_plain(recorded.get("config", {}), str(path)))
    settings = ("version", "config", "labels")
    changed = differences({key: recorded.get(key) for key in settings}, {key: plan.get(key) for key in settings})
    counts = len(recorded["folds"]), len(folds.splits)
    if counts[0] != counts[1]:
        changed.append(f"folds: {counts[0]} -> {counts[1]}")
    if recorded.get("init_from") != plan.get("init_from"):
        changed.append(f"--init-from: {_change_of_ensemble(recorded.get('init_from'), plan.get('init_from'))}")
    require_unchanged(folds.out, "cross-validation", changed)
    before = {case_id for fold in recorded["folds"] for case_id in fold}
    now = set(without_synthetic(folds.cases))
    if before != now:
        raise DataError(
            f"{folds.out} was started with other cases: {_some(before - now)} missing, {_some(now - before)} new. "
            "Give the data set it was started with, or another folder."
        )
    require_same_data_sets(folds.out, recorded, folds.cases.values(), len(folds.conventions))
    if recorded["folds"] != plan["folds"] or recorded.get("label_maps_sha256") != plan["label_maps_sha256"]:
        raise DataError(f"label maps have changed since {folds.out} was started. Restore them, or give another folder.")


def _on_record(out: Path) -> dict[str, Any] | None:
    """Return the content of ``folds.json``, with normalised and sorted case ids; None if there is no such file."""
    path = out / CROSSVAL_FILE
    if not path.exists():
        return None
    content = json_object(read_json(path), path)
    try:
        return {**content, "folds": [sorted(map(composed, fold)) for fold in content["folds"]]}
    except (KeyError, TypeError) as error:
        raise RunError(f"{path}: damaged, it does not contain the folds ({error}). Restore it from a copy.") from error


def require_ensemble(folder: Path) -> None:
    """Require the folder of an ensemble to start from.

    Raises:
        RunError: it is something else.
    """
    if not (folder / ENSEMBLE_FILE).is_file():
        raise RunError(
            f"{folder}: not the ensemble of a cross-validation, as it has no {ENSEMBLE_FILE}. For crossval, "
            "--init-from takes the folder ensemble of an earlier cross-validation of the same cases."
        )


@dataclass(frozen=True, kw_only=True)
class _Earlier:
    """The cross-validation that made an ensemble to start from."""

    ensemble: Path
    folds: list[list[str]]
    """Sorted case ids of each fold."""
    weights: tuple[str, ...]
    """SHA-256 of the weights of each fold's network."""

    def require_fit(self, cases: Mapping[str, Case], data: DataSource, folds: int) -> None:
        """Require the same cases and number of folds.

        With other folds, a network would start from weights that were trained on the cases it is scored on.
        """
        before, now = {case_id for fold in self.folds for case_id in fold}, set(cases)
        if before != now:
            raise DataError(
                f"{data.name}: not the cases of {self.ensemble}: missing {_some(before - now)}, new "
                f"{_some(now - before)}. --init-from needs the cases that the ensemble was cross-validated on."
            )
        if len(self.folds) != folds:
            raise ConfigError(
                f"--init-from {self.ensemble} has {len(self.folds)} folds, not {folds}. Leave out --folds, or set it "
                f"to {len(self.folds)}."
            )


def _earlier(ensemble: Path) -> _Earlier:
    """Read the folds and the weights of an ensemble to start from."""
    require_ensemble(ensemble)
    path = ensemble / ENSEMBLE_FILE
    content = json_object(read_json(path), path)
    try:
        folds = [sorted(map(composed, fold)) for fold in content["case_ids_by_fold"]]
        weights = tuple(str(network["weights_sha256"]) for network in content["networks"])
        if len(weights) != len(folds):
            raise ValueError(f"{len(weights)} networks for {len(folds)} folds")
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{path}: damaged, it does not contain the folds and their networks ({error}). Restore it from a copy."
        ) from error
    return _Earlier(ensemble=ensemble, folds=folds, weights=weights)


def _change_of_ensemble(before: object, now: object) -> str:
    if before is not None and now is not None:
        return "another ensemble"
    return "an ensemble -> none" if now is None else "none -> an ensemble"


def _splits(folds: Sequence[Sequence[str]]) -> tuple[Split, ...]:
    """Return the split of each fold, which trains on all cases of the other folds."""
    ids = sorted(case_id for fold in folds for case_id in fold)
    return tuple(
        Split(train=tuple(case_id for case_id in ids if case_id not in fold), validation=tuple(fold)) for fold in folds
    )


def _some(ids: set[str]) -> str:
    shown = sorted(ids)
    return f"{len(ids)} ({', '.join(shown[:3])}{', ...' if len(shown) > 3 else ''})" if ids else "0"


def _require_one_spacing(cases: Mapping[str, Case], splits: Sequence[Split]) -> None:
    """Require one spacing for all folds: a run takes the median of its training cases, an ensemble has only one."""
    found = {case_id: case_spacing(case) for case_id, case in cases.items()}
    medians = [
        median_by_axis(found[case.id] for case in describing(cases[case_id] for case_id in split.train))
        for split in splits
    ]
    for along in zip(*medians, strict=True):
        if max(along) > min(along) * (1 + SPACING_TOLERANCE):
            raise ConfigError(
                f"the cases have different spacings: the folds' medians range from {min(along):g} to {max(along):g} "
                "mm, but the networks of an ensemble need the same one. Set it, such as with --set data.spacing_mm=1"
            )
