"""``znormseg predict``."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from app.cli import terminal

if TYPE_CHECKING:
    from app.inference.batch.cohort import CaseExecutor
    from app.inference.batch.job import PredictJob
    from data.datasets.layouts import Case
    from data.labels import Contrast

EXAMPLES = """\
znormseg predict RUN NEW_CASES PREDICTIONS
znormseg predict RUN PREDICTIONS --t1 a.nii.gz --t1c b.nii.gz --t2 c.nii.gz --flair d.nii.gz
znormseg predict RUN SCANS PREDICTIONS --prepare --space flair
znormseg predict --challenge"""

#: Headings of the help, with the options below each.
PANELS = {
    "Input": ("t1", "t1c", "t2", "flair", "nan_to_zero", "follow_links"),
    "Unprepared scans": ("prepare", "space", "mask", "n4"),
    "Prediction": ("tta", "no_postprocess", "window", "overlap", "max_memory_gb"),
    "Hardware": ("device", "backend", "precision", "engine", "devices", "workers"),
    "Output": ("labels", "save_probabilities", "uncertainty", "overwrite", "challenge", "as_json"),
}

_LABELS_HELP = (
    "Label convention of the output: brats2021 (ET 4), brats2023 (ET 3), brats2024, brats2024-ped, brats2015 or msd; "
    "default: the one implied by the input's file names, or else that of the training data."
)
_CONTRAST_HELP = "Image of this contrast, instead of INPUT."


def predict_command(
    *,
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="Folder of a trained run, or of an ensemble from crossval.")
    ] = None,
    places: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[INPUT] OUTPUT", help="Case folder or folder of cases; then the output folder."),
    ] = None,
    t1: Annotated[Path | None, typer.Option("--t1", help=_CONTRAST_HELP)] = None,
    t1c: Annotated[Path | None, typer.Option("--t1c", "--t1ce", help=_CONTRAST_HELP)] = None,
    t2: Annotated[Path | None, typer.Option("--t2", help=_CONTRAST_HELP)] = None,
    flair: Annotated[Path | None, typer.Option("--flair", help=_CONTRAST_HELP)] = None,
    labels: Annotated[
        str | None,
        typer.Option("--labels", metavar="NAME", help=_LABELS_HELP),
    ] = None,
    nan_to_zero: Annotated[
        bool,
        typer.Option("--nan-to-zero", help="Replace NaN and infinite voxels with 0 instead of rejecting the case."),
    ] = False,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Accept symbolic links that point outside INPUT.")
    ] = False,
    prepare: Annotated[
        bool,
        typer.Option(
            "--prepare", help="First register and resample the contrasts and remove the skull, as data prepare does."
        ),
    ] = False,
    space: Annotated[
        str | None,
        typer.Option("--space", help="With --prepare: contrast whose grid the label map gets; default: t1c."),
    ] = None,
    mask: Annotated[
        str | None, typer.Option("--mask", help="With --prepare: brain mask, as in data prepare; default: auto.")
    ] = None,
    n4: Annotated[bool, typer.Option("--n4", help="With --prepare: correct the bias field with N4.")] = False,
    tta: Annotated[
        bool,
        typer.Option("--tta", help="Average over all eight mirrored versions of the image; eight times slower."),
    ] = False,
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="Write OUTPUT/<case>_probabilities.nii.gz: WT, TC, ET, 0 to 1.")
    ] = False,
    uncertainty: Annotated[
        bool,
        typer.Option(
            "--uncertainty",
            help="Write OUTPUT/<case>_uncertainty.nii.gz: WT, TC, ET; with an ensemble or --tta also the disagreement.",
        ),
    ] = False,
    no_postprocess: Annotated[
        bool,
        typer.Option("--no-postprocess", help="For an ensemble: only threshold the mean probabilities at one half."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Predict finished cases again instead of keeping them.")
    ] = False,
    engine: Annotated[
        str, typer.Option("--engine", metavar="NAME", help="local, or ray for the hosts of a Ray cluster.")
    ] = "local",
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices",
            help="GPUs to use in parallel, one process each: auto (all), a number, or names such as cuda:0,cuda:1.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", help="Number of parallel processes on --device; with ray, on the CPU of each host."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    backend: Annotated[
        str, typer.Option("--backend", help="auto, torch or openvino; auto uses OpenVINO on a CPU, torch on a GPU.")
    ] = "auto",
    precision: Annotated[
        str, typer.Option("--precision", help="auto, float32, bfloat16 or float16; auto uses the fastest.")
    ] = "auto",
    window: Annotated[
        str,
        typer.Option("--window", help="Window size: trained, brain (one window around the brain) or X,Y,Z in voxels."),
    ] = "trained",
    overlap: Annotated[
        float | None,
        typer.Option(
            "--overlap", min=0, max=0.9, help="Overlap of windows as a fraction of their side; default: the run's."
        ),
    ] = None,
    max_memory_gb: Annotated[
        float | None,
        typer.Option(
            "--max-memory-gb", min=0.1, help="Plan for a peak memory of at most this many GB; default: no limit."
        ),
    ] = None,
    challenge: Annotated[
        bool,
        typer.Option(
            "--challenge",
            help="Follow the BraTS convention for containers: RUN, INPUT and OUTPUT default to /model, /input and "
            "/output, and only <case>.nii.gz is written.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Segment cases: write a label map, volumes and flags for each.

    Writes OUTPUT/<case>.nii.gz and OUTPUT/<case>.json. Give INPUT, or the four files of one case: znormseg predict RUN
    OUTPUT --t1 A --t1c B --t2 C --flair D. With --prepare the contrasts may come straight from the scanner: on
    different grids, with the skull. A run trained with augment.contrast_dropout above 0 accepts cases with missing
    contrasts. Finished cases - same weights, options and files, by SHA-256 - are kept; if interrupted, run the same
    command to resume.
    """
    given: dict[Contrast, Path | None] = {"t1": t1, "t1c": t1c, "t2": t2, "flair": flair}
    files = {contrast: path for contrast, path in given.items() if path is not None}
    run, source, wanted = _places(run, places or [], files=bool(files), challenge=challenge)
    refused = {
        "--challenge writes label maps alone: no --save-probabilities, no --uncertainty": challenge
        and (save_probabilities or uncertainty),
        "--challenge goes without --engine ray: a container is one host": challenge and engine == "ray",
        "--max-memory-gb is a number of gigabytes; for no bound leave it out": max_memory_gb == math.inf,
        "--space, --mask and --n4 go with --prepare": not prepare and (space is not None or mask is not None or n4),
        f"--engine takes local or ray, got {engine!r}": engine not in ("local", "ray"),
        "--devices goes without --workers, --device and --engine ray": devices is not None
        and (workers is not None or engine == "ray" or device != "auto"),
    }
    for sentence, applies in refused.items():
        if applies:
            raise typer.BadParameter(sentence)
    from app.config.inference import PredictOptions
    from app.errors import ConfigError
    from app.inference.batch.challenge import Delivery
    from app.inference.batch.cohort import predict_each
    from app.inference.batch.job import PredictJob
    from app.inference.batch.native import Native
    from app.inference.batch.output_folder import require_place_of_its_own
    from app.system.device import RuntimeConfig
    from data.labels import CONTRASTS, CONVENTIONS

    answer_on: Contrast | None = "t1c" if space is None else next((c for c in CONTRASTS if c == space), None)
    if answer_on is None:
        raise typer.BadParameter(f"--space takes {', '.join(CONTRASTS)}, got {space!r}")
    if labels is not None and labels not in CONVENTIONS:
        raise typer.BadParameter(f"--labels takes {' or '.join(CONVENTIONS)}, got {labels!r}")
    try:
        RuntimeConfig(device=device)
    except ValueError as error:
        raise ConfigError(f"--device: {error}") from error
    native = None
    if prepare:
        from data.native_space.config import PrepareConfig

        native = Native(config=PrepareConfig(n4=n4, mask=mask or "auto"), space=answer_on)
    held = tempfile.TemporaryDirectory(prefix="znormseg-") if challenge else nullcontext(str(wanted))
    with held as output:
        job = PredictJob(
            run=run,
            output=Path(output),
            device=device,
            backend=_backend(backend),
            precision=_precision(precision),
            options=PredictOptions(
                labels=None if labels is None else CONVENTIONS[labels],
                nan_to_zero=nan_to_zero,
                tta=tta,
                save_probabilities=save_probabilities,
                uncertainty=uncertainty,
                window=_window(window),
                overlap=overlap,
                max_memory_gb=max_memory_gb,
            ),
            postprocess=not no_postprocess,
            native=native,
        )
        elsewhere = _elsewhere(job, engine, devices, workers)
        cases = _cases(files, source, follow_links=follow_links)
        if not files:
            require_place_of_its_own(wanted, run=run, source=source, cases=cases)
        with terminal.watched() as on_progress:
            # Workers load the network themselves; here it only provides the settings.
            model, runtime = (job if elsewhere is None else replace(job, device="cpu", backend="auto")).load()
            settings, at_work = job.settings(model), elsewhere or job.engine(model, runtime)
            del model
            outcome = predict_each(
                cases,
                job.output,
                at_work,
                run=run,
                settings=settings,
                overwrite=overwrite,
                delivery=Delivery(output=wanted) if challenge else None,
                on_progress=on_progress,
            )
    if challenge:
        outcome = outcome.copied_to(wanted)
    if as_json:
        terminal.json_result(outcome.to_json())
    elif outcome.cases:
        _show(outcome.cases, wanted, alone=challenge)
    _exit(len(outcome.cases), outcome.failures)


def _places(run: Path | None, places: list[Path], *, files: bool, challenge: bool) -> tuple[Path, Path, Path]:
    """Return RUN, INPUT and OUTPUT; INPUT is meaningless if the files of one case are given instead."""
    if challenge:
        from app.inference.batch.challenge import INPUT, MODEL, OUTPUT

        if files or len(places) not in (0, 2):
            raise typer.BadParameter("with --challenge give nothing, RUN, or RUN, INPUT and OUTPUT")
        source, output = places or (INPUT, OUTPUT)
        return run or MODEL, source, output
    if run is None or len(places) != (1 if files else 2):
        raise typer.BadParameter(
            "with --t1, --t1c, --t2 and --flair give RUN and OUTPUT alone" if files else "give RUN, INPUT and OUTPUT"
        )
    return run, places[0], places[-1]


def _window(text: str) -> Literal["trained", "brain"] | tuple[int, int, int]:
    if text in ("trained", "brain"):
        return "trained" if text == "trained" else "brain"
    sides = text.split(",")
    if len(sides) != 3 or not all(side.strip().isdecimal() and 1 <= int(side) <= 1024 for side in sides):
        raise typer.BadParameter(f"--window takes trained, brain, or three numbers as in 128,128,128, got {text!r}")
    x, y, z = (int(side) for side in sides)
    return (x, y, z)


def _backend(text: str) -> Literal["auto", "torch", "openvino"]:
    if text not in ("auto", "torch", "openvino"):
        raise typer.BadParameter(f"--backend takes auto, torch or openvino, got {text!r}")
    return text  # type: ignore[return-value]  # mypy does not narrow a string by membership


def _precision(text: str) -> Literal["auto", "float32", "bfloat16", "float16"]:
    if text not in ("auto", "float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"--precision takes auto, float32, bfloat16 or float16, got {text!r}")
    return text  # type: ignore[return-value]  # mypy does not narrow a string by membership


def _elsewhere(job: PredictJob, engine: str, devices: str | None, workers: int | None) -> CaseExecutor | None:
    """Return the executor that uses other processes; None if this process does the work."""
    from app.inference.batch.process_pool import InProcesses, devices_of
    from app.system.worker_pool import default_devices

    slots = default_devices(1 if workers is None else workers, option="--workers")
    if engine == "ray":
        from app.inference.batch.ray_pool import OnRay, ray_module

        ray_module()
        return OnRay(job=job, processes=len(slots))
    if devices is not None:
        import torch

        return InProcesses(job=job, devices=devices_of(devices, torch.cuda.device_count()))
    return InProcesses(job=job, devices=slots) if len(slots) > 1 else None


def _cases(files: dict[Contrast, Path], source: Path, *, follow_links: bool) -> tuple[Case, ...]:
    from data.datasets.layouts import case_from_files, find_cases

    if files:
        return (case_from_files(files, all_contrasts=False),)  # the run decides whether a contrast may be missing
    return find_cases(source, follow_links=follow_links)


def _show(cases: Sequence[Mapping[str, Any]], output: Path, *, alone: bool) -> None:
    from app.notice import NOTICE

    rows = [["case", "WT ml", "TC ml", "ET ml", "s", "flags"]]
    for content in cases:
        volumes, seconds = content["volumes_ml"], content["seconds"]
        codes = list(dict.fromkeys(flag["code"] for flag in content["flags"]))
        shown = [f"{volumes[r]:.1f}" for r in volumes]
        rows.append([content["case"], *shown, f"{sum(seconds.values()):.1f}", " ".join(codes) or "-"])
    terminal.result(terminal.table(rows))
    said = "" if alone else "; <case>.json says what each flag means"
    terminal.result(f"label maps in {output}{said}. {NOTICE}")


def _exit(done: int, failures: Mapping[str, str]) -> None:
    from app.errors import EXIT_DATA, EXIT_SOME_FAILED

    if failures:
        terminal.say(f"znormseg: {len(failures)} of {done + len(failures)} cases failed: {', '.join(failures)}")
        raise typer.Exit(EXIT_SOME_FAILED if done else EXIT_DATA)
