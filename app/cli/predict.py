"""``znormseg predict``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import terminal

if TYPE_CHECKING:
    from data.labels import Contrast
    from data.layouts import Case

_LABELS_HELP = (
    "Label numbers to write: brats2021 (ET 4), brats2023 (ET 3), brats2024, brats2024-ped, brats2015 or msd; "
    "default as the input's, where its names tell, else as the training data's."
)
_CONTRAST_HELP = "Image of this contrast, instead of INPUT."


def predict(
    *,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a trained run, or an ensemble of crossval.")],
    places: Annotated[
        list[Path],
        typer.Argument(metavar="[INPUT] OUTPUT", help="Case folder or folder of cases; then the folder to write to."),
    ],
    t1: Annotated[Path | None, typer.Option("--t1", help=_CONTRAST_HELP)] = None,
    t1c: Annotated[Path | None, typer.Option("--t1c", help=_CONTRAST_HELP)] = None,
    t2: Annotated[Path | None, typer.Option("--t2", help=_CONTRAST_HELP)] = None,
    flair: Annotated[Path | None, typer.Option("--flair", help=_CONTRAST_HELP)] = None,
    labels: Annotated[
        str | None,
        typer.Option("--labels", metavar="NAME", help=_LABELS_HELP),
    ] = None,
    nan_to_zero: Annotated[
        bool, typer.Option("--nan-to-zero", help="Take NaN and infinite voxels as 0 instead of refusing the case.")
    ] = False,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Accept symbolic links that lead out of INPUT.")
    ] = False,
    prepare: Annotated[
        bool,
        typer.Option(
            "--prepare", help="Register and resample the contrasts and remove the skull first, as data prepare does."
        ),
    ] = False,
    space: Annotated[
        str | None,
        typer.Option("--space", help="With --prepare: contrast on whose grid to answer; default t1c."),
    ] = None,
    mask: Annotated[
        str | None, typer.Option("--mask", help="With --prepare: brain mask, as of data prepare; default auto.")
    ] = None,
    n4: Annotated[bool, typer.Option("--n4", help="With --prepare: correct the brightness by N4.")] = False,
    tta: Annotated[
        bool,
        typer.Option("--tta", help="Average over the image mirrored in all eight ways; eight times slower."),
    ] = False,
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="Write OUTPUT/<case>_probabilities.nii.gz: WT, TC, ET, 0 to 1.")
    ] = False,
    uncertainty: Annotated[
        bool,
        typer.Option(
            "--uncertainty",
            help="Write OUTPUT/<case>_uncertainty.nii.gz: WT, TC, ET; of several answers disagreement too.",
        ),
    ] = False,
    no_postprocess: Annotated[
        bool,
        typer.Option("--no-postprocess", help="Of an ensemble: the mean probabilities cut at one half, no more."),
    ] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Write a label map for each case: OUTPUT/<case>.nii.gz, with volumes in OUTPUT/<case>.json.

    Give INPUT, or the four files of one case: znormseg predict RUN OUTPUT --t1 A --t1c B --t2 C --flair D. With
    --prepare the contrasts may come from the scanner: on different grids, with the skull on. A run trained with
    augment.contrast_dropout above 0 takes cases in which some of them are missing.
    """
    given: dict[Contrast, Path | None] = {"t1": t1, "t1c": t1c, "t2": t2, "flair": flair}
    files = {contrast: path for contrast, path in given.items() if path is not None}
    if len(places) != (1 if files else 2):
        raise typer.BadParameter(
            "with --t1, --t1c, --t2 and --flair give RUN and OUTPUT alone" if files else "give RUN, INPUT and OUTPUT"
        )
    if not prepare and (space is not None or mask is not None or n4):
        raise typer.BadParameter("--space, --mask and --n4 go with --prepare")
    from app.errors import ConfigError  # noqa: PLC0415 - slow to import, not needed for the help
    from app.inference.ensemble import load_predictor  # noqa: PLC0415
    from app.inference.known import training_record  # noqa: PLC0415
    from app.inference.native import predict_native  # noqa: PLC0415
    from app.inference.predict import predict as predict_cases  # noqa: PLC0415
    from app.inference.settings import PredictOptions  # noqa: PLC0415
    from app.runtime import RuntimeConfig, choose_runtime  # noqa: PLC0415
    from data.bring_in import BringInConfig  # noqa: PLC0415
    from data.labels import CONTRASTS, CONVENTIONS  # noqa: PLC0415

    answer_on: Contrast | None = "t1c" if space is None else next((c for c in CONTRASTS if c == space), None)
    if answer_on is None:
        raise typer.BadParameter(f"--space takes {', '.join(CONTRASTS)}, got {space!r}")
    if labels is not None and labels not in CONVENTIONS:
        raise typer.BadParameter(f"--labels takes {' or '.join(CONVENTIONS)}, got {labels!r}")
    try:
        runtime = choose_runtime(RuntimeConfig(device=device))
    except ValueError as error:
        raise ConfigError(f"--device: {error}") from error
    cases = _cases(files, places[0], follow_links=follow_links)
    with terminal.watched() as on_progress:
        model = load_predictor(run, runtime, postprocess=not no_postprocess)
        options = PredictOptions(
            labels=None if labels is None else CONVENTIONS[labels],
            nan_to_zero=nan_to_zero,
            tta=tta,
            save_probabilities=save_probabilities,
            uncertainty=uncertainty,
            training=training_record(run),
        )
        if prepare:
            outcome = predict_native(
                model,
                cases,
                places[-1],
                runtime=runtime,
                config=BringInConfig(n4=n4, mask=mask or "auto"),
                space=answer_on,
                options=options,
                on_progress=on_progress,
            )
        else:
            outcome = predict_cases(model, cases, places[-1], runtime=runtime, options=options, on_progress=on_progress)
    if as_json:
        terminal.json_result(outcome.to_json())
    elif outcome.done:
        _show(outcome.done, places[-1])
    _exit(len(outcome.done), outcome.failures)


def _cases(files: dict[Contrast, Path], source: Path, *, follow_links: bool) -> tuple[Case, ...]:
    from data.layouts import case_from_files, find_cases  # noqa: PLC0415 - slow to import

    if files:
        return (case_from_files(files, all_contrasts=False),)  # whether that is enough, the run will tell
    return find_cases(source, follow_links=follow_links)


def _show(done: tuple[object, ...], output: Path) -> None:
    from app.inference.cohort import Prediction  # noqa: PLC0415 - slow to import
    from app.notice import NOTICE  # noqa: PLC0415

    rows = [["case", "WT ml", "TC ml", "ET ml", "s", "flags"]]
    for prediction in done:
        assert isinstance(prediction, Prediction)
        volumes, seconds = prediction.content["volumes_ml"], prediction.content["seconds"]
        codes = list(dict.fromkeys(flag["code"] for flag in prediction.content["flags"]))
        shown = [f"{volumes[r]:.1f}" for r in volumes]
        rows.append([prediction.case, *shown, f"{sum(seconds.values()):.1f}", " ".join(codes) or "-"])
    terminal.result(terminal.table(rows))
    terminal.result(f"label maps in {output}; <case>.json says what each flag means. {NOTICE}")


def _exit(done: int, failures: dict[str, str]) -> None:
    from app.errors import EXIT_DATA, EXIT_SOME_FAILED  # noqa: PLC0415

    if failures:
        terminal.say(f"znormseg: {len(failures)} of {done + len(failures)} cases failed: {', '.join(failures)}")
        raise typer.Exit(EXIT_SOME_FAILED if done else EXIT_DATA)
