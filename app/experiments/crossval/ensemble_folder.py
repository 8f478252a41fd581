"""Write the ensemble of a cross-validation as a self-contained folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from app.errors import RunError
from app.experiments.crossval.calibrate import Calibrated
from app.experiments.crossval.plan import Folds
from app.experiments.crossval.summary import Summary
from app.experiments.crossval.tune import Tuning
from app.inference.ensemble import ENSEMBLE_FILE, ENSEMBLE_FOLDER, VERSION
from app.runs import checkpoints
from app.runs.folder import read_json, write_json
from app.runs.model_card import describe_model, seal
from app.runs.training_record import INTENSITIES_FILE
from app.system.device import versions
from data.labels import CONTRASTS

#: Folder in which an ensemble is written before it gets its name.
PARTIAL: Final = f".{ENSEMBLE_FOLDER}.partial"


def write_ensemble(folds: Folds, tuning: Tuning, summary: Summary, calibrated: Calibrated) -> Path:
    """Write the ensemble to a temporary folder, then move it into place and replace an older one.

    Weights are hard links to those of the folds if the file system supports them, else copies. A run never writes into
    an existing file, so changing a fold does not change the ensemble, or vice versa.

    Args:
        folds: the cross-validation, with every fold trained.
        tuning: supplies the post-processing of the ensemble.
        summary: out-of-fold scores with that post-processing.
        calibrated: temperatures and volume intervals.

    Returns:
        the ensemble's folder.

    Raises:
        RunError: a fold has no weights, or they have been altered.
        OSError: the folder cannot be written.
    """
    return write_networks(
        folds,
        of_each=[{"out_of_fold_dice": summary.fold_means(fold)["mean"]} for fold in range(len(folds.splits))],
        of_all={
            "version": VERSION,
            "postprocess": tuning.chosen.to_json(),
            "calibration": calibrated.ensemble_json(),
            "tuning": tuning.to_json(),
        },
    )


def write_networks(folds: Folds, *, of_each: Sequence[Mapping[str, Any]], of_all: Mapping[str, Any]) -> Path:
    """Write the ensemble of all folds' networks to a temporary folder, then move it into place.

    Args:
        folds: the cross-validation, with every fold trained.
        of_each: by fold, what ``ensemble.json`` says about its network in addition to its weights.
        of_all: version of the format, and what ``ensemble.json`` says about all networks together.

    Returns:
        the ensemble's folder.

    Raises:
        RunError, OSError: see :func:`write_ensemble`.
    """
    partial, place = folds.out / PARTIAL, folds.out / ENSEMBLE_FOLDER
    networks = [{**one, **more} for one, more in zip(_link_networks(folds, partial), of_each, strict=True)]
    write_json(partial / "split.json", {"train": sorted(folds.cases), "validation": []})
    write_json(
        partial / ENSEMBLE_FILE,
        {
            **of_all,
            "networks": networks,
            "contrasts": list(CONTRASTS),
            "regions": list(folds.config.outputs),
            **{key: value for key, value in folds.to_json().items() if key not in {"version", "folds"}},
            "case_ids_by_fold": [list(split.validation) for split in folds.splits],
            "versions": versions(),
        },
    )
    seal(partial, {**describe_model(partial), "name": ENSEMBLE_FOLDER})
    if place.exists():
        shutil.rmtree(place)
    partial.rename(place)
    return place


def _link_networks(folds: Folds, partial: Path) -> list[dict[str, Any]]:
    """Put the best weights of every fold into an ensemble's folder, which is emptied before.

    Args:
        folds: the cross-validation, with every fold trained.
        partial: folder to write to.

    Returns:
        the entry of each network in ``ensemble.json``.

    Raises:
        RunError: a fold has no weights, or they have been altered.
        OSError: the folder cannot be written.
    """
    shutil.rmtree(partial, ignore_errors=True)
    networks: list[dict[str, Any]] = []
    for fold in range(len(folds.splits)):
        run = folds.run(fold)
        checkpoint = checkpoints.load_newest(run / "checkpoints", "best")
        if checkpoint is None:
            raise RunError(f"{run}: contains no weights. Delete {folds.result_file(fold)} to train the fold again.")
        target = partial / run.name / "checkpoints"
        target.mkdir(parents=True)
        for ending in ("safetensors", "json"):
            name = f"best-{checkpoint.step:09d}.{ending}"
            _link(run / "checkpoints" / name, target / name)
        if (run / INTENSITIES_FILE).exists():
            _link(run / INTENSITIES_FILE, target.parent / INTENSITIES_FILE)
        networks.append(
            {
                "network": run.name,
                "weights_sha256": checkpoint.sha256,
                "step": checkpoint.step,
                "trained_on": len(folds.splits[fold].train),
                "runtime": read_json(run / "run.json")["runtime"],
            }
        )
    return networks


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
