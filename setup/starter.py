"""Pack the ensemble of a cross-validation as the model that ships with the program; ``make starter`` calls this.

    python setup/starter.py CROSSVAL models/starter --cases CASES

The weights are stored in float16. The card states the data, the scores of the cross-validation, the limits and the
licence. Nothing is written if there were not 16 training cases, or if the folder would be too large, contains a path of
this machine, or labels too many voxels of the first case differently from the ensemble.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import numpy as np
import torch

from app.errors import RunError
from app.inference.batch.job import PredictJob
from app.inference.batch.predict import predict
from app.inference.ensemble import ENSEMBLE_FILE, ENSEMBLE_FOLDER
from app.runs import checkpoints
from app.runs.folder import read_json, write_json
from app.runs.model_card import STATEMENT_KEY, seal, verify
from app.runs.published import MODELS
from app.runs.training_record import INTENSITIES_FILE
from data.datasets.layouts import find_cases
from data.errors import DataError
from data.labels import REGIONS
from data.nifti import read_label_map

MOST_BYTES: Final = 8_000_000
#: Share of the tumour's voxels, in either label map, that the weights in float16 must label as the ensemble does.
LEAST_AGREEMENT: Final = 0.99
#: The number of training cases, which the name, the limits and the documents of the model state.
CASES: Final = 16
#: The second mean of ET leaves out cases with less enhancing tumour than this, as a few voxels decide their Dice.
LEAST_ENHANCING_ML: Final = 0.5

#: An absolute path, but not the address of a web page.
_PLACE: Final = re.compile(r"(?<![\w./-])/\w[\w./-]*")
_MODEL: Final = MODELS["starter"]
_STORED: Final = "The weights are stored in float16."
_LICENCE: Final = "https://creativecommons.org/licenses/by/4.0/"


def pack(crossval: Path, out: Path, cases: Path | None = None) -> None:
    """Write the ensemble of a cross-validation as a model folder, replacing an older one.

    Args:
        crossval: folder of a finished cross-validation.
        out: folder to write, such as ``models/starter``.
        cases: data set; both models must label its first case alike. None skips the comparison.

    Raises:
        RunError: the cross-validation is unfinished or damaged, or the result may not be shipped; ``out`` is unchanged.
    """
    source, partial = crossval / ENSEMBLE_FOLDER, out.with_name(f".{out.name}.partial")
    verify(source)
    ensemble, statement = read_json(source / ENSEMBLE_FILE), _statement(crossval)
    _require_cases(source, ensemble)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        networks = [
            _halved(source, partial, network, _of_one(statement, network["network"], CASES - len(left_out)))
            for network, left_out in zip(ensemble["networks"], ensemble["case_ids_by_fold"], strict=True)
        ]
        write_json(partial / ENSEMBLE_FILE, {**ensemble, "networks": networks, STATEMENT_KEY: statement})
        shutil.copyfile(source / "split.json", partial / "split.json")
        seal(partial)
        _require_small(partial)
        _require_no_places(partial)
        if cases is not None:
            _require_same_labels(source, partial, cases)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _halved(source: Path, out: Path, network: Mapping[str, Any], statement: Mapping[str, Any]) -> dict[str, Any]:
    """Write one network with its weights in float16, and return its entry in ``ensemble.json``."""
    name = network["network"]
    best = checkpoints.load_newest(source / name / "checkpoints", "best")
    if best is None:
        raise RunError(f"{source / name}: contains no weights")
    tensors = {f"weights.{key}": one.half() if one.is_floating_point() else one for key, one in best.weights.items()}
    if not all(bool(torch.isfinite(one).all()) for one in tensors.values()):
        raise RunError(f"{source / name}: some weights are too large for float16, or not finite")
    details = {key: value for key, value in best.details.items() if key not in ("kind", "step", "sha256")}
    checkpoints.save(out / name / "checkpoints", "best", best.step, tensors, {**details, STATEMENT_KEY: statement})
    if (source / name / INTENSITIES_FILE).exists():
        shutil.copyfile(source / name / INTENSITIES_FILE, out / name / INTENSITIES_FILE)
    written = checkpoints.load_newest(out / name / "checkpoints", "best")
    assert written is not None
    entry = {key: value for key, value in network.items() if key != "runtime"}  # names the training device
    return {**entry, "weights_sha256": written.sha256}


def _statement(crossval: Path) -> dict[str, Any]:
    """Return what the model card states: data, scores, limits and licence."""
    return {
        "name": _MODEL.name,
        "description": f"{_MODEL.summary}. {_STORED}",
        "data": {
            "training data": _training_data(CASES),
            "cite": _MODEL.citation,
            "training": "cross-validation with the config starter; ensemble.json has every setting, under config",
        },
        "metrics": _scores(crossval),
        "limits": list(_MODEL.limits),
        "licence": f"{_MODEL.licence}; {_LICENCE}. Credit the data and the papers that are named above.",
    }


def _of_one(statement: Mapping[str, Any], network: str, cases: int) -> dict[str, Any]:
    """Return what the card of one network states, without the scores of the others."""
    return {
        **statement,
        "name": f"{statement['name']}/{network}",
        "description": f"One network of {statement['name']}: trained on {cases} of its {CASES} cases. {_STORED}",
        "data": {**statement["data"], "training data": _training_data(cases)},
        "metrics": {},
        "limits": [limit.replace("sixteen", str(cases)) for limit in statement["limits"]],
    }


def _training_data(cases: int) -> str:
    return (
        f"{cases} adult gliomas of RSNA-ASNR-MICCAI BraTS 2021 (T1, T1c, T2 and FLAIR, with the label maps of experts),"
        " from The Cancer Imaging Archive, DOI 10.7937/jc8x-9874, CC BY 4.0. The weights were computed from these "
        "images and contain none of them."
    )


def _scores(crossval: Path) -> dict[str, str]:
    """Return the out-of-fold scores, in words."""
    content = read_json(crossval / "crossval.json")
    with (crossval / "crossval.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["masks"] == "tuned"]
    means, tuning = content["tuned"]["all"], content["tuning"]
    scores = {
        "scored": f"{len(rows)} cases, each by the network that was not trained on it, before the weights were rounded "
        "to float16. The mean of the networks, which predict uses, was not scored: every case trained some of them.",
    }
    for region in REGIONS:
        scores[f"Dice of {region}"] = f"{means[region]['mean']:.3f}"
        scores[f"HD95 of {region}"] = f"{means[f'{region}_hd95_mm']['mean']:.1f} mm"
    enhancing = [row for row in rows if float(row["ET_reference_volume_ml"]) >= LEAST_ENHANCING_ML]
    if enhancing:
        which = f"over the {len(enhancing)} cases with at least {LEAST_ENHANCING_ML:g} ml of it"
        scores[f"Dice of ET, {which}"] = f"{fmean(float(row['ET_dice']) for row in enhancing):.3f}"
        scores[f"HD95 of ET, {which}"] = f"{fmean(float(row['ET_hd95_mm']) for row in enhancing):.1f} mm"
    scores["Dice"], scores["HD95"] = content["dice"], content["hd95"]
    scores["post-processing"] = (
        f"chosen on the same cases, whose mean Dice it changes by {tuning['gain_on_tuning_cases']:+.3f}; on folds that "
        f"were left out of the choice, by {tuning['estimated_gain']:+.3f}"
    )
    return scores


def _require_cases(source: Path, ensemble: Mapping[str, Any]) -> None:
    """Refuse another number of real cases (synthetic ones are in no fold) than the texts of the model state."""
    found = sum(map(len, ensemble["case_ids_by_fold"]))
    if found != CASES:
        raise RunError(
            f"{source}: trained on {found} real cases, but the texts of {_MODEL.name} say {CASES}; correct them first"
        )


def _require_small(folder: Path) -> None:
    found = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if found > MOST_BYTES:
        raise RunError(
            f"the networks have {found} bytes, but at most {MOST_BYTES} are shipped; train a smaller network"
        )


def _require_no_places(folder: Path) -> None:
    """Refuse files with absolute paths, which come from the machine that trained."""
    for path in sorted(folder.rglob("*")):
        found = _PLACE.search(path.read_text(encoding="utf-8")) if path.suffix in (".json", ".md") else None
        if found is not None:
            raise RunError(f"{path.relative_to(folder)}: names {found[0]}, a place of this machine")


def _require_same_labels(one: Path, other: Path, cases: Path) -> None:
    """Refuse weights that label too many voxels of the first case differently."""
    case = find_cases(cases)[0]
    maps = []
    with tempfile.TemporaryDirectory() as folder:
        for number, model in enumerate((one, other)):
            job = PredictJob(run=model, output=Path(folder, str(number)), device="cpu", precision="float32")
            predictor, runtime = job.load()
            outcome = predict(predictor, [case], job.output, runtime=runtime)
            if outcome.failures:
                raise RunError(f"{model}: {outcome.failures[case.id]}")
            maps.append(read_label_map(Path(outcome.cases[0]["label_map"])).voxels)
    differing, tumour = np.count_nonzero(maps[0] != maps[1]), np.count_nonzero((maps[0] != 0) | (maps[1] != 0))
    compared = f"{case.id}: float16 changes {differing} of {tumour} voxels of tumour"
    sys.stderr.write(f"{compared}\n")
    if differing > (1 - LEAST_AGREEMENT) * tumour:
        raise RunError(f"{compared}; at most {1 - LEAST_AGREEMENT:.0%} may change")


def main() -> None:
    """Pack the ensemble that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crossval", type=Path, help="folder of a finished cross-validation")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--cases", type=Path, help="data set; its first case must get the same labels from both models")
    given = parser.parse_args()
    try:
        pack(given.crossval, given.out, given.cases)
    except (RunError, DataError) as error:
        sys.exit(f"starter: {error}")
    written = sum(path.stat().st_size for path in given.out.rglob("*") if path.is_file())
    sys.stderr.write(f"{given.out}: {written} bytes\n{json.dumps(_scores(given.crossval), indent=1)}\n")


if __name__ == "__main__":
    main()
