"""The main job end to end on phantoms: make, train, predict, evaluate, show."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from app.config.load import load_config
from app.errors import RunError
from app.evaluation.evaluate import CaseScores, Evaluation, evaluate, write_table
from app.html.overlay import OverlayCase, overlay_caption, overlay_png
from app.inference.backends.choose import choose_backend
from app.inference.batch.predict import predict
from app.inference.model import load_model
from app.progress import LOG, OnProgress, Progress, silent
from app.reports.demo import Page, PageCase, write_page
from app.runs.folder import read_metrics, write_json
from app.system.device import machine, versions
from app.training.run import start
from data.datasets.layouts import Case, find_cases, find_label_maps
from data.labels import LabelConvention, Region, decode
from data.nifti import read_image, read_label_map, reorient
from data.phantoms import write_phantoms

#: Phantoms that train, validate and are held out.
TRAINING: Final = 24
VALIDATING: Final = 2
HELD_OUT: Final = 6
SPACING_MM: Final = 2.0
CONFIG: Final = "laptop"

COMMANDS: Final = (
    ("Look your data set over", "znormseg data check DATA"),
    ("Train on it, for an hour here or longer on a GPU", "znormseg train DATA RUN --set training.hours=1"),
    ("Segment new cases with what it learnt", "znormseg predict RUN NEW_CASES OUTPUT"),
)


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo made."""

    page: Path
    evaluation: Evaluation
    seconds: Mapping[str, float]
    """By stage."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
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
    """Run the demo into a folder.

    Args:
        out: new or empty folder; gets ``phantoms/ run/ predictions/ scores.csv index.html``.
        overrides: changes to the ``laptop`` config, as ``--set`` takes them.
        counts: phantoms that train, validate and are held out; default 24, 2 and 6.
        on_progress: told which stage is under way.

    Raises:
        RunError: ``out`` is a file or not empty.
    """
    config = load_config(CONFIG, overrides)
    training, validating, held_out = counts or (TRAINING, VALIDATING, HELD_OUT)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} is {'not empty' if out.is_dir() else 'a file'}; give a new folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    clock = _Clock()

    cases = _make_phantoms(out / "phantoms", training + validating + held_out, on_progress)
    clock.note("phantoms")
    names = [case.id for case in cases]
    split = {"train": names[:training], "validation": names[training : training + validating]}
    write_json(out / "phantoms" / "split.json", split)
    start(out / "phantoms", out / "run", config, split_file=out / "phantoms" / "split.json", on_progress=on_progress)
    clock.note("training")

    runtime = choose_backend("auto", config.runtime)
    model = load_model(out / "run", runtime)
    unseen = cases[training + validating :]
    images_only = [Case(id=c.id, folder=c.folder, contrasts=c.contrasts, naming=c.naming) for c in unseen]
    predict(model, images_only, out / "predictions", runtime=runtime, on_progress=on_progress)
    clock.note("prediction")
    evaluation = evaluate(out / "predictions", out / "phantoms")
    write_table(evaluation, out / "scores.csv")
    clock.note("evaluation")

    pages = [_page_case(case, out, evaluation, model.convention) for case in unseen]
    write_page(
        out / "index.html",
        Page(
            title="znormseg demo",
            lead=(
                f"A small residual U-Net trained with ZNorm on {training} synthetic glioma cases at {SPACING_MM:g} mm, "
                f"scored on {held_out} it has not seen. Phantoms are easier than patients: "
                "take these figures as a sign that everything works, not as a promise."
            ),
            provenance=[
                ("config", CONFIG),
                ("seed", str(config.training.seed)),
                ("machine", machine()),
                ("seconds", ", ".join(f"{stage} {spent:.0f}" for stage, spent in clock.seconds.items())),
                ("versions", ", ".join(f"{name} {version}" for name, version in versions().items())),
                ("weights", model.sha256),
            ],
            cases=pages,
            metrics=read_metrics(out / "run"),
            commands=COMMANDS,
        ),
    )
    clock.note("page")
    return DemoResult(page=out / "index.html", evaluation=evaluation, seconds=clock.seconds)


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._before = time.monotonic()

    def note(self, stage: str) -> None:
        """End a stage."""
        now = time.monotonic()
        self.seconds[stage] = now - self._before
        self._before = now
        LOG.info("%s: %.0f s", stage, self.seconds[stage])


def _make_phantoms(folder: Path, count: int, on_progress: OnProgress) -> tuple[Case, ...]:
    done: list[Path] = []

    def made(case: Path) -> None:
        done.append(case)
        on_progress(Progress(job="making phantoms", share=len(done) / count, detail=case.name))

    write_phantoms(folder, count, spacing_mm=SPACING_MM, on_case=made)
    return find_cases(folder)


def _page_case(case: Case, out: Path, evaluation: Evaluation, convention: LabelConvention) -> PageCase:
    """Scores and overlay picture of one held-out case."""
    assert case.label is not None
    background = reorient(read_image(case.contrasts["flair"], case.volumes.get("flair")))
    overlay = OverlayCase(
        case=case.id,
        background=background.voxels,
        background_name="FLAIR",
        prediction=_codes(find_label_maps(out / "predictions")[case.id], convention),
        reference=_codes(case.label, convention),
        spacing_mm=background.spacing_mm,
    )
    scores: dict[str, CaseScores] = {scored.case: scored for scored in evaluation.cases}
    by_region: dict[Region, Mapping[str, float]] = {
        region: asdict(values) for region, values in scores[case.id].regions.items()
    }
    return PageCase(
        case=case.id,
        scores=by_region,
        overlay=overlay_png(overlay, height_px=320),
        overlay_caption=overlay_caption(overlay),
    )


def _codes(path: Path, convention: LabelConvention) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return decode(reorient(read_label_map(path)).voxels, convention)
