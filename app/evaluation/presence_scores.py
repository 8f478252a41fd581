"""Score a folder of presence predictions against label maps or a CSV file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from app import NOTICE
from app.evaluation.folders import first_ids
from app.evaluation.presence import PRESENCE_MEASURES, FloatArray, Interval, with_intervals
from app.evaluation.tables import write_csv
from data.datasets.label_stats import read_label_maps, region_volumes_ml
from data.datasets.patients import patient_of
from data.datasets.presence_table import read_presence_table
from data.datasets.source import DataSource
from data.errors import DataError
from data.filesystem import why
from data.labels import REGIONS


@dataclass(frozen=True, kw_only=True)
class PresencePredictions:
    """What the files ``<case>.json`` of a folder say."""

    outputs: tuple[str, ...]
    probability: Mapping[str, tuple[float, ...]]
    """By case id, in the order of ``outputs``."""
    thresholds: tuple[float, ...]
    """An output counts as present from this probability on."""
    threshold_ml: tuple[float, ...] | None
    """Volume from which a region counts as present; None if the labels were those of a CSV file."""


@dataclass(frozen=True, kw_only=True)
class PresenceScores:
    """Scores of presence predictions."""

    outputs: tuple[str, ...]
    specificity: float
    thresholds: tuple[float, ...]
    truth: Mapping[str, tuple[int, ...]]
    """By case id."""
    probability: Mapping[str, tuple[float, ...]]
    """By case id."""
    measures: Mapping[str, Mapping[str, Interval]]
    """By output and measure."""
    missing_predictions: tuple[str, ...]
    missing_references: tuple[str, ...]
    fitted_here: bool = False
    """Whether calibration and thresholds were fitted on these same cases."""

    def of_output(self, name: str) -> tuple[FloatArray, FloatArray]:
        """Return truth and probability of an output, each of shape (cases,)."""
        place = self.outputs.index(name)
        truth = np.array([values[place] for values in self.truth.values()], dtype=np.float64)
        return truth, np.array([self.probability[case_id][place] for case_id in self.truth], dtype=np.float64)

    def notes(self) -> list[str]:
        """Return notes about cases without a prediction or a reference, one sentence each."""
        missing = {"prediction": self.missing_predictions, "reference": self.missing_references}
        return [f"no {side} for {len(ids)} cases: {first_ids(ids)}" for side, ids in missing.items() if ids]

    def rows(self) -> list[list[str]]:
        """Return the table for the terminal: a row for each measure, a column for each output."""
        table = [["measure", *self.outputs]]
        for measure, (heading, _) in PRESENCE_MEASURES.items():
            cells = [interval_in_words(self.measures[name][measure]) for name in self.outputs]
            table.append([heading.format(self.specificity), *cells])
        return table

    def remarks(self) -> list[str]:
        """Return explanations of the table, one sentence each."""
        counts = []
        for place, name in enumerate(self.outputs):
            present = sum(values[place] for values in self.truth.values())
            counts.append(
                f"{name}: present in {present} of {len(self.truth)} cases; counts as present from probability "
                f"{self.thresholds[place]:.3g} on"
            )
        fitted = (
            "calibration and thresholds were fitted on these same cases, so accuracy, F1, Brier score and ECE are "
            "somewhat too good"
        )
        return [*counts, *([fitted] if self.fitted_here else []), "in brackets: 95 % bootstrap interval over patients"]

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return {
            "outputs": list(self.outputs),
            "specificity": self.specificity,
            "thresholds": dict(zip(self.outputs, self.thresholds, strict=True)),
            "measures": {
                name: {measure: asdict(one) for measure, one in of_output.items()}
                for name, of_output in self.measures.items()
            },
            "definitions": {measure: definition for measure, (_, definition) in PRESENCE_MEASURES.items()},
            "fitted_here": self.fitted_here,
            "cases": [
                {
                    "case": case_id,
                    "present": dict(zip(self.outputs, values, strict=True)),
                    "probability": dict(zip(self.outputs, self.probability[case_id], strict=True)),
                }
                for case_id, values in self.truth.items()
            ],
            "missing_predictions": list(self.missing_predictions),
            "missing_references": list(self.missing_references),
            "notice": NOTICE,
        }

    def write_table(self, path: Path) -> None:
        """Write the measures as CSV: output, measure, value, low, high; empty where a measure is not defined."""
        rows: list[list[object]] = [["output", "measure", "value", "low", "high"]]
        for name, of_output in self.measures.items():
            for measure, one in of_output.items():
                numbers = ("" if number is None else number for number in (one.value, one.low, one.high))
                rows.append([name, measure, *numbers])
        write_csv(path, rows)


def interval_in_words(one: Interval) -> str:
    """Return a measure and its interval with three decimals.

    Example:
        >>> interval_in_words(Interval(value=0.5, low=0.25, high=1.0))
        '0.500 [0.250, 1.000]'
    """
    if one.value is None:
        return "not defined"
    return f"{one.value:.3f}" + ("" if one.low is None else f" [{one.low:.3f}, {one.high:.3f}]")


def read_presence_predictions(folder: Path) -> PresencePredictions:
    """Read the files ``<case>.json`` of a folder.

    Raises:
        DataError: there are none, or one is damaged or comes from another model.
    """
    found: dict[str, tuple[float, ...]] = {}
    first: dict[str, Any] | None = None
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if "probability" not in content:
                continue
            first = content if first is None else first
            outputs = tuple(first["decisions"])
            if any(content[key] != first[key] for key in ("decisions", "threshold_ml", "weights_sha256")):
                raise DataError(
                    f"{path}: from another model than {first['case']}. Predict all cases with one model, in one folder."
                )
            found[str(content["case"])] = tuple(float(content["probability"][name]) for name in outputs)
        except DataError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: cannot be read as a prediction of presence ({why(error)})") from error
    if first is None:
        raise DataError(f"{folder}: contains no <case>.json of a presence network. Run znormseg predict again.")
    volumes = first["threshold_ml"]
    return PresencePredictions(
        outputs=tuple(first["decisions"]),
        probability=found,
        thresholds=tuple(float(one["threshold"]) for one in first["decisions"].values()),
        threshold_ml=None if volumes is None else tuple(float(volumes[name]) for name in first["decisions"]),
    )


def score_presence(folder: Path, references: DataSource, *, specificity: float) -> PresenceScores:
    """Score presence predictions.

    Args:
        folder: output folder of ``predict``.
        references: label maps, or a CSV file with a column ``case`` and a column of 0 and 1 for each output.
        specificity: at which the sensitivity is stated.

    Raises:
        DataError: predictions or references cannot be read, or have no case in common.
    """
    predicted = read_presence_predictions(folder)
    truth, patients = _references(predicted, references)
    common = [case_id for case_id in predicted.probability if case_id in truth]
    if not common:
        raise DataError(
            f"{folder} and {references.root} have no case in common: {first_ids(list(predicted.probability))} against "
            f"{first_ids(list(truth))}"
        )
    scores = PresenceScores(
        outputs=predicted.outputs,
        specificity=specificity,
        thresholds=predicted.thresholds,
        truth={case_id: truth[case_id] for case_id in common},
        probability={case_id: predicted.probability[case_id] for case_id in common},
        measures={},
        missing_predictions=tuple(case_id for case_id in truth if case_id not in predicted.probability),
        missing_references=tuple(case_id for case_id in predicted.probability if case_id not in truth),
    )
    of_patients = [patients[case_id] for case_id in common]
    measures = {
        name: with_intervals(*scores.of_output(name), of_patients, threshold=threshold, specificity=specificity)
        for name, threshold in zip(predicted.outputs, predicted.thresholds, strict=True)
    }
    return replace(scores, measures=measures)


def _references(
    predicted: PresencePredictions, references: DataSource
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return 0 or 1 for each output, and the patient, by case id."""
    if references.root.is_file():
        truth = read_presence_table(references.root, predicted.outputs)
        return truth, {case_id: patient_of(case_id) for case_id in truth}
    if predicted.threshold_ml is None:
        raise DataError(
            f"{references.root}: the network learned the labels of a CSV file ({', '.join(predicted.outputs)}). Give "
            "such a file, with a column case, as REFERENCES."
        )
    cases = references.find_label_cases()
    label_maps = read_label_maps(cases.values())
    convention = references.decide_convention(cases, label_maps)
    truth = {}
    for case_id, label_map in label_maps.items():
        volumes = region_volumes_ml(label_map, convention)
        ml = [volumes[region] for name in predicted.outputs for region in REGIONS if region == name]
        truth[case_id] = tuple(int(one >= least) for one, least in zip(ml, predicted.threshold_ml, strict=True))
    return truth, {case_id: cases[case_id].patient for case_id in truth}
