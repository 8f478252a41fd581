"""One fold: train its network, and predict the cases that it was not trained on."""

from __future__ import annotations

from app.errors import RunError
from app.experiments.crossval.out_of_fold import is_of, predict_left_out, write_prediction
from app.experiments.crossval.plan import Folds
from app.experiments.crossval.presence import answer_left_out
from app.experiments.runs import has_checkpoint, json_object, start_or_resume
from app.inference.backends.choose import choose_backend
from app.inference.ensemble import ENSEMBLE_FILE
from app.inference.model import load_model
from app.progress import OnProgress, Progress
from app.runs.folder import read_json, write_json
from app.system.device import Runtime, RuntimeConfig, choose_runtime
from app.training.pretrained import pretrained_model
from data.datasets.source import DataSource

#: Share of a fold's time that training takes, for the progress bar.
_TRAINING: float = 0.9


def require_initial_networks(folds: Folds) -> None:
    """Require that every fold that has not begun can start from its network in ``folds.init_from``.

    A network that was exchanged for that of another fold would have been trained on the cases it is scored on.

    Raises:
        ConfigError: a network differs from that of the config.
        RunError: a network is missing or damaged, or not the one that the ensemble lists.
    """
    if folds.init_weights is None:
        return
    runtime = choose_runtime(RuntimeConfig(device="cpu"))
    for fold, listed in enumerate(folds.init_weights):
        network = folds.initial_network(fold)
        if network is None or has_checkpoint(folds.run(fold)):
            continue
        if pretrained_model(network, folds.config, runtime).sha256 != listed:
            raise RunError(f"{network}: not the weights that {ENSEMBLE_FILE} lists. Restore the folder from a copy.")


def work_on_fold(data: DataSource, folds: Folds, fold: int, *, on_progress: OnProgress) -> None:
    """Train a fold's network and predict its validation cases; completed work is kept.

    Args:
        data: the data set.
        folds: the cross-validation.
        fold: number of the fold, from 0.
        on_progress: called with the progress of this fold.

    Raises:
        DataError, ConfigError, RunError, DeviceError, InterruptedRunError: as raised by :func:`app.training.run.start`.
        KeyboardInterrupt: stopped while predicting; completed cases are kept.
    """
    run, result = folds.run(fold), folds.result_file(fold)
    # Chosen as in predict, so that the scores apply to its label maps; chosen before training, because it may fail.
    runtime = choose_backend("torch" if folds.is_presence else "auto", folds.config.runtime)
    if not (result.exists() and has_checkpoint(run)):

        def report(progress: Progress) -> None:
            share = progress.share if progress.job == "training" else 0.0
            detail = f"{progress.job}  {progress.detail}"
            on_progress(Progress(job="fold", share=_TRAINING * share, detail=detail))

        labelled = data.with_labels([convention.name for convention in folds.conventions])
        outcome = start_or_resume(
            labelled,
            run,
            folds.config,
            split_file=folds.split_file(fold),
            init_from=folds.initial_network(fold),
            on_progress=report,
        )
        result.parent.mkdir(exist_ok=True)
        write_json(result, {**outcome.to_json(), "run": run.name})
    json_object(read_json(result), result)
    if folds.is_presence:
        answer_left_out(folds, fold, on_progress=on_progress, done_before=_TRAINING)
    else:
        _predict_left_out(folds, fold, runtime, on_progress)
    on_progress(Progress(job="fold", share=1.0, detail="done"))


def _predict_left_out(folds: Folds, fold: int, runtime: Runtime, on_progress: OnProgress) -> None:
    """Predict the label maps of a fold's validation cases."""
    model = load_model(folds.run(fold), runtime)
    validation = folds.splits[fold].validation
    for number, case_id in enumerate(validation):
        if is_of(folds.prediction_file(case_id), model.sha256):
            continue
        share = _TRAINING + (1 - _TRAINING) * number / len(validation)
        on_progress(Progress(job="fold", share=share, detail=f"predicting {case_id}"))
        case, nan_to_zero = folds.cases[case_id], folds.config.data.nan_to_zero
        convention = folds.conventions[case.data_set]
        prediction = predict_left_out(model, case, runtime, convention=convention, nan_to_zero=nan_to_zero)
        write_prediction(folds.prediction_file(case_id), prediction)
