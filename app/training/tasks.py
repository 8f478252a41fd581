"""The one place where a run's task is chosen, and where its labels come from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from app.config.load import RunConfig
from app.training.presence_labels import RECORD, Labels, presence_labels, presence_record, require_both_classes
from app.training.segmentation import Segmentation
from app.training.task import Task
from data.datasets.label_stats import LabelMap
from data.datasets.layouts import Case
from data.labels import LabelConvention


def task_of(config: RunConfig, facts: Mapping[str, Any]) -> Task:
    """Return the task that a run learns.

    Args:
        config: config of the run.
        facts: content of its ``run.json``.
    """
    if config.task.name == "presence":
        from app.training.presence import Presence  # scikit-learn takes a second to import

        return Presence(config, facts)
    return Segmentation(config)


def labels_of_task(
    config: RunConfig,
    cases: Mapping[str, Case],
    used: Collection[str],
    label_maps: Mapping[str, LabelMap],
    conventions: Sequence[LabelConvention],
) -> Labels | None:
    """Return the labels of a classification by case id; None if the task learns from the label maps themselves.

    Args:
        config: config of the run.
        cases: all cases of the data set, by id.
        used: ids of the cases that need labels.
        label_maps: by case id.
        conventions: label convention of each data set.

    Raises:
        DataError: see :func:`app.training.presence_labels.presence_labels`.
    """
    return (
        presence_labels(config.task, cases, used, label_maps, conventions) if config.task.name == "presence" else None
    )


def record_of_task(config: RunConfig, labels: Labels | None, train: Collection[str]) -> dict[str, Any]:
    """Return the task's entries of ``run.json``.

    Args:
        config: config of the run.
        labels: from :func:`labels_of_task`.
        train: ids of the training cases.

    Raises:
        DataError: see :func:`app.training.presence_labels.require_both_classes`.
    """
    if labels is None:
        return {}
    require_both_classes(config.task, labels, train)
    return {RECORD: presence_record(config, labels, train)}
