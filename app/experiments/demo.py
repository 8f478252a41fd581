"""The demo: make phantoms, train on them, predict and evaluate, end to end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

from app.config.load import RunConfig, load_config
from app.errors import RunError
from app.evaluation.evaluate import Evaluation, evaluate
from app.inference.backends.choose import choose_backend
from app.inference.batch.predict import predict
from app.inference.model import load_model
from app.progress import LOG, OnProgress, Progress, silent
from app.runs.folder import write_json
from app.training.run import start
from data.datasets.layouts import Case, find_cases
from data.datasets.source import DataSource
from data.labels import LabelConvention
from data.phantoms import write_phantoms

#: Numbers of phantoms to train on, to validate on and to hold out.
TRAINING: Final = 24
VALIDATING: Final = 2
HELD_OUT: Final = 6
SPACING_MM: Final = 2.0
CONFIG: Final = "laptop"


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Results of the demo."""

    out: Path
    """Folder with ``phantoms/ run/ predictions/ scores.csv``."""
    config: RunConfig
    """Config of the run."""
    trained_on: int
    """Number of training phantoms."""
    unseen: Sequence[Case]
    """Held-out phantoms, with their label maps."""
    convention: LabelConvention
    """Label convention of the predicted label maps."""
    weights_sha256: str
    """Hash of the weights that made the predictions."""
    evaluation: Evaluation
    seconds: Mapping[str, float]
    """Duration of each stage."""

    @property
    def page(self) -> Path:
        """Path of the page that :func:`app.reports.demo.write_demo_page` writes."""
        return self.out / "index.html"

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return {
            **self.evaluation.to_json(),
            "page": str(self.page),
            "seconds": {stage: round(spent, 1) for stage, spent in self.seconds.items()},
        }


def run_demo(
    out: Path,
    *,
    overrides: Sequence[str] = (),
    counts: tuple[int, int, int] | None = None,
    on_progress: OnProgress = silent,
) -> DemoResult:
    """Run the demo in a folder.

    Args:
        out: new or empty folder; gets ``phantoms/ run/ predictions/ scores.csv``.
        overrides: changes to the ``laptop`` config, in the form of ``--set``.
        counts: numbers of phantoms to train on, to validate on and to hold out; default: 24, 2 and 6.
        on_progress: called with the progress of each stage.

    Raises:
        RunError: ``out`` is a file or not empty.
    """
    config = load_config(CONFIG, overrides)
    training, validating, held_out = counts or (TRAINING, VALIDATING, HELD_OUT)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} is {'not empty' if out.is_dir() else 'a file'}; give a new folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    data = DataSource(out / "phantoms")
    with _timed("phantoms", seconds):
        cases = _make_phantoms(data.root, training + validating + held_out, on_progress)
    with _timed("training", seconds):
        names = [case.id for case in cases]
        split = {"train": names[:training], "validation": names[training : training + validating]}
        write_json(data.root / "split.json", split)
        start(data, out / "run", config, split_file=data.root / "split.json", on_progress=on_progress)
    with _timed("prediction", seconds):
        runtime = choose_backend("auto", config.runtime)
        model = load_model(out / "run", runtime)
        unseen = cases[training + validating :]
        images_only = [Case(id=c.id, folder=c.folder, contrasts=c.contrasts, naming=c.naming) for c in unseen]
        predict(model, images_only, out / "predictions", runtime=runtime, on_progress=on_progress)
    with _timed("evaluation", seconds):
        evaluation = evaluate(DataSource(out / "predictions"), data)
        evaluation.write_table(out / "scores.csv")
    return DemoResult(
        out=out,
        config=config,
        trained_on=training,
        unseen=unseen,
        convention=model.convention,
        weights_sha256=model.sha256,
        evaluation=evaluation,
        seconds=seconds,
    )


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    """Record and log the duration of a stage."""
    began = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - began
    LOG.info("%s: %.0f s", stage, seconds[stage])


def _make_phantoms(folder: Path, number: int, on_progress: OnProgress) -> tuple[Case, ...]:
    done = count(1)

    def made(case: Path) -> None:
        on_progress(Progress(job="making phantoms", share=next(done) / number, detail=case.name))

    write_phantoms(folder, number, spacing_mm=SPACING_MM, on_case=made)
    return find_cases(folder)
