"""The data sets of a run: their weights, their use in the split, and the record that --resume compares them with."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from app.config.load import RunConfig
from app.errors import ConfigError
from data.datasets.layouts import Case
from data.datasets.source import DataSource
from data.datasets.splits import Split
from data.errors import DataError
from data.labels import CONVENTIONS, LabelConvention


def require_weights(config: RunConfig, data: DataSource) -> None:
    """Require one weight for each data set, if there are weights.

    Raises:
        ConfigError: there are more or fewer.
    """
    weights, count = config.data.weights, len(data.data_sets)
    if weights is not None and len(weights) != count:
        raise ConfigError(
            f"data.weights: {len(weights)} {'weight' if len(weights) == 1 else 'weights'} ({list(weights)}) for "
            f"{count} {'data set' if count == 1 else 'data sets'} ({data.name}). Give one for each, in the same order."
        )


def require_use(split: Split, cases: Mapping[str, Case], data: DataSource, config: RunConfig) -> None:
    """Require that no synthetic case is used for validation and that the split uses every data set.

    Args:
        split: the split of a run.
        cases: all cases, by id.
        data: the data sets.
        config: with ``data.weights``, every data set must have a training case.

    Raises:
        DataError: either requirement is not met; the message names the case or the data set.
    """
    wrong = [case_id for case_id in split.validation if cases[case_id].synthetic]
    if wrong:
        raise DataError(
            f"synthetic cases are listed for validation ({len(wrong)}): {', '.join(wrong[:5])}. Synthetic cases only "
            "train: list the real cases instead."
        )
    weighted = config.data.weights is not None
    used = {cases[case_id].data_set for case_id in (split.train if weighted else split.cases)}
    for number, one in enumerate(data.data_sets):
        if number not in used and len(data.data_sets) > 1:
            example = next((case.id for case in cases.values() if case.data_set == number), "")
            raise DataError(
                f"{one.name}: none of its cases (such as {example}) "
                f"{'is used for training, which data.weights requires' if weighted else 'is in the split'}. Leave out "
                f"{'data.weights or ' if weighted else ''}this data set, or list some of its cases in a --split file."
            )


def data_sets_on_record(cases: Iterable[Case], conventions: Sequence[LabelConvention]) -> list[dict[str, Any]]:
    """Return the record of each data set: label convention, cases and a hash of their ids.

    Args:
        cases: the cases that are used.
        conventions: label convention of each data set.

    Returns:
        one entry for each data set; no entries if there is only one data set and it is not synthetic.
    """
    own: list[list[Case]] = [[] for _ in conventions]
    for case in cases:
        own[case.data_set].append(case)
    if len(own) == 1 and not any(case.synthetic for case in own[0]):
        return []
    return [
        {
            "labels": convention.name,
            "synthetic": any(case.synthetic for case in of_set),
            "cases": len(of_set),
            "case_ids_sha256": hashlib.sha256("\n".join(sorted(case.id for case in of_set)).encode()).hexdigest(),
        }
        for convention, of_set in zip(conventions, own, strict=True)
    ]


def conventions_on_record(content: Mapping[str, Any]) -> tuple[LabelConvention, ...]:
    """Return the label convention of each data set from a record, from its ``data_sets`` or else its ``labels``.

    Raises:
        KeyError: the record is damaged.
    """
    return tuple(CONVENTIONS[one["labels"]] for one in content.get("data_sets") or [content])


def require_same_data_sets(place: Path, content: Mapping[str, Any], cases: Collection[Case], count: int) -> None:
    """Require that a resumed job is given the same data sets in the same order.

    Args:
        place: folder of the job, for the message.
        content: the job's record, with ``data_sets`` from :func:`data_sets_on_record`.
        cases: the cases that are used.
        count: number of data sets that were given.

    Raises:
        DataError: the data sets or their order differ.
    """
    conventions = conventions_on_record(content)
    before = [one["case_ids_sha256"] for one in content.get("data_sets", [])]
    if count == len(conventions) and before == [
        one["case_ids_sha256"] for one in data_sets_on_record(cases, conventions)
    ]:
        return
    known = content.get("data", [])
    names = f" ({', '.join([known] if isinstance(known, str) else known)})" if known else ""
    if count != len(conventions):
        started = f"{len(conventions)} data {'set' if len(conventions) == 1 else 'sets'}{names}"
        difference = f"was started with {started}, but {count} {'was' if count == 1 else 'were'} given"
    else:
        difference = f"was started with these data sets in another order, or with other cases{names}"
    raise DataError(f"{place} {difference}. Give the same ones in the same order.")
