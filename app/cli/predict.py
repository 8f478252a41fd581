"""``znormseg predict``."""

from __future__ import annotations

import math
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from app.cli import options, terminal
from app.cli.presence import refuse_for_presence, show_presence

if TYPE_CHECKING:
    from app.inference.batch.cohort import CaseExecutor
    from app.inference.batch.job import PredictJob
    from app.inference.batch.prediction_json import Predictions
    from data.datasets.layouts import Case
    from data.labels import Contrast

EXAMPLES = """\
znormseg predict starter PREDICTIONS --t1 a.nii.gz --t1c b.nii.gz --t2 c.nii.gz --flair d.nii.gz
znormseg predict RUN NEW_CASES PREDICTIONS
znormseg predict RUN SCANS PREDICTIONS --prepare --space flair
znormseg predict --challenge"""

_FLAGS = "; <case>.json explains the flags"
_scans, _prediction = options.panel("Unprepared scans"), options.panel("Prediction")
_hardware, _output = options.panel("Hardware"), options.panel("Output")


def predict_command(
    *,
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN",
            help="Folder of a trained run or of an ensemble from crossval, or a published model (model list).",
        ),
    ] = None,
    places: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[INPUT] OUTPUT", help="Case folder or folder of cases; then the output folder."),
    ] = None,
    t1: options.Image = None,
    t1c: options.T1c = None,
    t2: options.Image = None,
    flair: options.Image = None,
    nan_to_zero: options.NanToZero = False,
    follow_links: options.FollowLinks = False,
    prepare: Annotated[
        bool,
        _scans(
            "--prepare", help="First register and resample the contrasts and remove the skull, as data prepare does."
        ),
    ] = False,
    space: Annotated[
        Literal["t1", "t1c", "t2", "flair"] | None,
        _scans(help="With --prepare: contrast whose grid the label map gets; default: t1c."),
    ] = None,
    mask: Annotated[str | None, _scans(help="With --prepare: brain mask, as in data prepare; default: auto.")] = None,
    n4: Annotated[bool, _scans("--n4", help="With --prepare: correct the bias field with N4.")] = False,
    tta: Annotated[
        bool,
        _prediction("--tta", help="Average over all eight mirrored versions of the image; eight times slower."),
    ] = False,
    no_postprocess: Annotated[
        bool,
        _prediction("--no-postprocess", help="For an ensemble: only threshold the mean probabilities at one half."),
    ] = False,
    window: Annotated[
        str, _prediction(help="Window size: trained, brain (one window around the brain) or X,Y,Z in voxels.")
    ] = "trained",
    overlap: Annotated[
        float | None,
        _prediction(min=0, max=0.9, help="Overlap of windows as a fraction of their side; default: the run's."),
    ] = None,
    max_memory_gb: Annotated[
        float | None,
        _prediction(min=0.1, help="Plan for a peak memory of at most this many GB; default: no limit."),
    ] = None,
    presence: Annotated[
        Path | None,
        _prediction(
            metavar="RUN2",
            help="Presence run, or the ensemble of its cross-validation: where it finds no ET, ET is removed.",
        ),
    ] = None,
    device: options.Device = "auto",
    backend: Annotated[
        Literal["auto", "torch", "openvino"], _hardware(help="auto uses OpenVINO on a CPU, torch on a GPU.")
    ] = "auto",
    precision: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], _hardware(help="auto uses the fastest.")
    ] = "auto",
    engine: Annotated[Literal["local", "ray"], _hardware(help="ray uses the hosts of a Ray cluster.")] = "local",
    devices: Annotated[
        str | None,
        _hardware(
            help="GPUs to use in parallel, one process each: auto (all), a number, or names such as cuda:0,cuda:1."
        ),
    ] = None,
    workers: Annotated[
        int | None, _hardware(help="Number of parallel processes on --device; with ray, on the CPU of each host.")
    ] = None,
    labels: Annotated[
        Literal["brats2021", "brats2023", "brats2024", "brats2024-ped", "brats2015", "msd"] | None,
        _output(
            metavar="NAME",
            help="Label convention of the output: brats2021 (ET 4), brats2023 (ET 3), brats2024, brats2024-ped, "
            "brats2015 or msd; default: the one implied by the input's file names, or else that of the training data.",
        ),
    ] = None,
    save_probabilities: Annotated[
        bool,
        _output("--save-probabilities", help="Write OUTPUT/<case>_probabilities.nii.gz: WT, TC, ET, 0 to 1."),
    ] = False,
    uncertainty: Annotated[
        bool,
        _output(
            "--uncertainty",
            help="Write OUTPUT/<case>_uncertainty.nii.gz: WT, TC, ET; with an ensemble or --tta also the disagreement.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, _output("--overwrite", help="Predict finished cases again instead of keeping them.")
    ] = False,
    challenge: Annotated[
        bool,
        _output(
            "--challenge",
            help="Follow the BraTS convention for containers: RUN, INPUT and OUTPUT default to /model, /input and "
            "/output, and only <case>.nii.gz is written.",
        ),
    ] = False,
) -> None:
    """Segment cases: write a label map, volumes and flags for each.

    Writes OUTPUT/<case>.nii.gz and OUTPUT/<case>.json; a presence run writes OUTPUT/predictions.csv and the JSON. RUN
    may be starter, the model that ships with the program. Give INPUT, or the four files of one case: znormseg predict
    RUN OUTPUT --t1 A --t1c B --t2 C --flair D. With --prepare the contrasts may come straight from the scanner: on
    different grids, with the skull. A run trained with augment.contrast_dropout above 0 accepts cases with missing
    contrasts. Finished cases - same weights, options and files, by SHA-256 - are kept; if interrupted, run the same
    command to resume.
    """
    files = options.given(t1=t1, t1c=t1c, t2=t2, flair=flair)
    run, source, wanted = _places(run, places or [], files=bool(files), challenge=challenge)
    options.refuse(
        challenge and (save_probabilities or uncertainty),
        "--challenge writes only label maps; leave out --save-probabilities and --uncertainty",
    )
    options.refuse(
        challenge and engine == "ray", "--challenge cannot be combined with --engine ray: a container is one host"
    )
    options.refuse(max_memory_gb == math.inf, "--max-memory-gb takes a number of gigabytes; leave it out for no limit")
    options.refuse(
        not prepare and (space is not None or mask is not None or n4), "--space, --mask and --n4 require --prepare"
    )
    options.refuse(
        devices is not None and (workers is not None or engine == "ray" or device != "auto"),
        "--devices cannot be combined with --workers, --device or --engine ray",
    )
    from app.config.inference import PredictOptions
    from app.inference.batch.challenge import Delivery
    from app.inference.batch.cohort import predict_each
    from app.inference.batch.job import PredictJob
    from app.inference.batch.native import Native
    from app.inference.batch.output_folder import require_place_of_its_own
    from app.inference.tumour_presence.model import is_presence_model
    from data.labels import CONVENTIONS

    options.runtime_config(device)
    run = options.installed_model(run)
    if is_presence_model(run):
        unused = {
            "--prepare": prepare,
            "--tta": tta,
            "--no-postprocess": no_postprocess,
            "--overlap": overlap,
            "--window": window != "trained",
            "--max-memory-gb": max_memory_gb,
            "--engine": engine == "ray",
            "--backend": backend == "openvino",
            "--devices": devices,
            "--workers": workers,
            "--labels": labels,
            "--save-probabilities": save_probabilities,
            "--uncertainty": uncertainty,
            "--challenge": challenge,
        }
        refuse_for_presence(run, {**unused, "--presence": presence})
        show_presence(
            run,
            _cases(files, source, follow_links=follow_links),
            wanted,
            source=None if files else source,
            runtime=replace(options.runtime_config(device), precision=precision),
            nan_to_zero=nan_to_zero,
            overwrite=overwrite,
        )
        return
    options.mask_installed(mask)
    native = None
    if prepare:
        from data.native_space.config import PrepareConfig

        native = Native(config=PrepareConfig(n4=n4, mask=mask or "auto"), space=space or "t1c")
    held = tempfile.TemporaryDirectory(prefix="znormseg-") if challenge else nullcontext(str(wanted))
    with held as output:
        job = PredictJob(
            run=run,
            output=Path(output),
            device=device,
            backend=backend,
            precision=precision,
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
            presence=presence,
        )
        pool = _other_processes(job, engine, devices, workers)
        cases = _cases(files, source, follow_links=follow_links)
        if not files:
            require_place_of_its_own(wanted, run=run, source=source, cases=cases)
        with terminal.watched() as on_progress:
            # Workers load the network themselves; here it only provides the settings.
            model, runtime = (job if pool is None else replace(job, device="cpu", backend="auto")).load()
            settings, at_work = job.settings(model), pool or job.engine(model, runtime)
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
    _show(outcome.copied_to(wanted) if challenge else outcome, wanted, flags="" if challenge else _FLAGS)


def _show(outcome: Predictions, output: Path, *, flags: str) -> None:
    """Print a row for each case."""
    from app import NOTICE

    rows = [["case", "WT ml", "TC ml", "ET ml", "s", "flags"]]
    for case in outcome.cases:
        volumes, seconds = case["volumes_ml"], case["seconds"]
        codes = list(dict.fromkeys(flag["code"] for flag in case["flags"]))
        shown = [f"{volumes[region]:.1f}" for region in volumes]
        rows.append([case["case"], *shown, f"{sum(seconds.values()):.1f}", " ".join(codes) or "-"])
    lines = [terminal.table(rows), f"label maps in {output}{flags}. {NOTICE}"] if outcome.cases else []
    terminal.result(outcome.to_json(), *lines)
    terminal.name_failed(outcome.failures, done=len(outcome.cases))


def _places(run: Path | None, places: list[Path], *, files: bool, challenge: bool) -> tuple[Path, Path, Path]:
    """Return RUN, INPUT and OUTPUT; if the files of one case are given instead of INPUT, its value has no meaning."""
    if challenge:
        from app.inference.batch.challenge import INPUT, MODEL, OUTPUT

        wrong = files or len(places) not in (0, 2)
        options.refuse(wrong, "with --challenge, give no paths, only RUN, or RUN, INPUT and OUTPUT")
        source, output = places or (INPUT, OUTPUT)
        return run or MODEL, source, output
    if run is None or len(places) != (1 if files else 2):
        raise typer.BadParameter(
            "with --t1, --t1c, --t2 and --flair, give only RUN and OUTPUT" if files else "give RUN, INPUT and OUTPUT"
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


def _other_processes(job: PredictJob, engine: str, devices: str | None, workers: int | None) -> CaseExecutor | None:
    """Return an executor that runs other processes; None if this process does the work itself."""
    from app.inference.batch.parallel import InProcesses, devices_of
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
