"""Several cases one after the other: what was written, and what could not be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import InterruptedRunError
from app.notice import NOTICE
from app.progress import LOG, OnProgress, Progress, silent
from data.errors import DataError
from data.layouts import Case


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What was written for one case."""

    case: str
    label_map: Path
    content: dict[str, Any]
    """As in ``<case>.json``."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What was written for all cases, and what could not be."""

    done: tuple[Prediction, ...]
    failures: dict[str, str]
    """Case id to message."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "cases": [prediction.content for prediction in self.done],
            "failures": self.failures,
            "notice": NOTICE,
        }


def predict_each(
    cases: Sequence[Case], output: Path, one: Callable[[Case], Prediction], *, on_progress: OnProgress = silent
) -> Predictions:
    """Call ``one`` for each case; a case that it refuses is noted and does not stop the others.

    Raises:
        DataError, OSError, InterruptedRunError: as :func:`predict`.
    """
    if output.exists() and not output.is_dir():
        raise DataError(f"{output} is a file; give a folder for the label maps")
    done: list[Prediction] = []
    failures: dict[str, str] = {}
    try:
        output.mkdir(parents=True, exist_ok=True)
        for number, case in enumerate(cases):
            on_progress(Progress(job="predicting", share=number / len(cases), detail=case.id))
            try:
                done.append(one(case))
            except DataError as error:
                failures[case.id] = str(error)
                LOG.error("%s", error)
    except KeyboardInterrupt as error:
        raise InterruptedRunError(
            f"{str(error) or 'interrupted'} while predicting; {len(done)} of {len(cases)} label maps are in {output}, "
            "whole. The same command begins again."
        ) from error
    on_progress(Progress(job="predicting", share=1.0, detail=f"{len(done)} of {len(cases)} cases"))
    return Predictions(done=tuple(done), failures=failures)
