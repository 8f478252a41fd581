"""One fold: train its network, and predict the cases that it has not trained on."""

from __future__ import annotations

from dataclasses import replace

from app.experiments.crossval.folds import Folds
from app.experiments.crossval.out_of_fold import answer_of, is_of, write_answer
from app.experiments.runs import has_begun, json_object, start_or_resume
from app.inference.backends.choose import choose_backend
from app.inference.model import load_model
from app.progress import OnProgress, Progress
from app.runs.folder import read_json, write_json
from data.datasets.source import DataSource

#: Share of a fold's time that training takes, for the progress bar.
_TRAINING: float = 0.9


def work_on_fold(data: DataSource, folds: Folds, fold: int, *, on_progress: OnProgress) -> None:
    """Train a fold's network and predict its validation cases; completed work is kept.

    Args:
        data: the data set.
        folds: the cross-validation.
        fold: number of the fold, from 0.
        on_progress: called with the progress of this fold.

    Raises:
        DataError, ConfigError, RunError, DeviceError, InterruptedRunError: as :func:`app.training.run.start`.
        KeyboardInterrupt: stopped while predicting; completed cases are kept.
    """
    run, result = folds.run(fold), folds.result_file(fold)
    # Chosen like predict, so that its label maps get these scores; and before hours of training, since it may fail.
    runtime = choose_backend("auto", folds.config.runtime)
    if not (result.exists() and has_begun(run)):

        def told(progress: Progress) -> None:
            share = progress.share if progress.job == "training" else 0.0
            detail = f"{progress.job}  {progress.detail}"
            on_progress(Progress(job="fold", share=_TRAINING * share, detail=detail))

        outcome = start_or_resume(
            replace(data, labels=folds.convention.name),
            run,
            folds.config,
            split_file=folds.split_file(fold),
            on_progress=told,
        )
        result.parent.mkdir(exist_ok=True)
        write_json(result, {**outcome.to_json(), "run": run.name})
    json_object(read_json(result), result)
    model = load_model(run, runtime)
    validation = folds.splits[fold].validation
    for number, case_id in enumerate(validation):
        if is_of(folds.answer_file(case_id), model.sha256):
            continue
        share = _TRAINING + (1 - _TRAINING) * number / len(validation)
        on_progress(Progress(job="fold", share=share, detail=f"predicting {case_id}"))
        answer = answer_of(
            model,
            folds.cases[case_id],
            runtime,
            convention=folds.convention,
            nan_to_zero=folds.config.data.nan_to_zero,
        )
        write_answer(folds.answer_file(case_id), answer)
    on_progress(Progress(job="fold", share=1.0, detail="done"))
