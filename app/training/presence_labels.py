"""Labels of the presence task: 0 or 1 for each case and output, from label maps or from a CSV file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

from app.config.load import RunConfig
from app.config.task import TaskConfig
from data.datasets.label_stats import LabelMap, region_volumes_ml
from data.datasets.layouts import Case
from data.datasets.naming import real_id
from data.datasets.presence_table import read_presence_table
from data.errors import DataError
from data.labels import LabelConvention, Region
from data.nifti import read_label_map

#: Key in ``run.json`` of what the presence task learns from.
RECORD: Final = "presence"
Labels = Mapping[str, tuple[int, ...]]


def presence_labels(
    task: TaskConfig,
    cases: Mapping[str, Case],
    used: Collection[str],
    label_maps: Mapping[str, LabelMap],
    conventions: Sequence[LabelConvention],
) -> Labels:
    """Return 0 or 1 for each output of each used case.

    Args:
        task: section of the config.
        cases: all cases of the data set, by id.
        used: ids of the cases that need labels.
        label_maps: by case id.
        conventions: label convention of each data set.

    Raises:
        DataError: the CSV file cannot be used, or a label map has a number that is not in its convention.
    """
    if task.labels_csv is not None:
        known, needed = ({real_id(case_id) for case_id in ids} for ids in (cases, used))
        table = read_presence_table(Path(task.labels_csv), task.outputs, known=known, needed=needed)
        return {case_id: table[real_id(case_id)] for case_id in used}
    names = cast("tuple[Region, ...]", task.outputs)  # TaskConfig allows no others without a CSV file
    found = {}
    for case_id in used:
        case = cases[case_id]
        if case_id not in label_maps and case.label is not None:
            read_label_map(case.label)  # raises the error for which it was left out
        volumes = region_volumes_ml(label_maps[case_id], conventions[case.data_set])
        of_outputs = (volumes[name] for name in names)
        found[case_id] = tuple(int(ml >= least) for ml, least in zip(of_outputs, task.thresholds_ml, strict=True))
    return found


def require_both_classes(task: TaskConfig, labels: Labels, train: Collection[str]) -> None:
    """Require present and absent training cases of each output, or a present one if slabs of a case may be absent.

    Raises:
        DataError: an output is absent in all training cases; or, without slabs, present in all of them.
    """
    for place, name in enumerate(task.outputs):
        values = {labels[case_id][place] for case_id in train}
        if len(values) > 1 or (task.by_slab and values == {1}):
            continue
        state = "present" if values == {1} else "absent"
        where = (
            f"column {name} of {task.labels_csv}"
            if task.labels_csv is not None
            else f"{name} of at least {task.thresholds_ml[place]:g} ml in the label maps"
        )
        raise DataError(
            f"task.outputs: {name} is {state} in all {len(train)} training cases ({where}), so nothing can be learned "
            f"about it. Add cases of the other kind, leave {name} out of task.outputs"
            + ("." if task.labels_csv is not None else ", or change task.threshold_ml.")
        )


def presence_record(config: RunConfig, labels: Labels, train: Collection[str]) -> dict[str, Any]:
    """Return the entry of ``run.json``: the labels of every case, and the weight of absent and present ones.

    With ``balanced`` weights, the present and the absent training cases of an output weigh the same in total, and an
    average case weighs 1.
    """
    task, count = config.task, len(train)
    present = [sum(labels[case_id][place] for case_id in train) for place in range(len(task.outputs))]
    weigh = task.class_weights == "balanced" and not task.by_slab
    return {
        "outputs": list(task.outputs),
        "labels": {case_id: list(values) for case_id, values in sorted(labels.items())},
        "weight_absent": [count / (2 * (count - n)) if weigh else 1.0 for n in present],
        "weight_present": [count / (2 * n) if weigh else 1.0 for n in present],
    }
