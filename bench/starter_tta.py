"""Measure what ``--tta`` changes for the starter network: out-of-fold Dice and HD95 with and without mirrored images.

    python bench/starter_tta.py CASES [--processes 2]

CASES has the sixteen cases named in models/starter/MODEL_CARD.md. Each is predicted by the one network of the ensemble
that was not trained on it, and post-processed by the ensemble's rules.
"""

from __future__ import annotations

import argparse
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch

from app.config.inference import PredictOptions
from app.evaluation.metrics import dice, hausdorff95_mm, volume_ml
from app.inference.ensemble import load_ensemble
from app.inference.probabilities import predict_answer
from app.runs.folder import read_json
from app.system.device import RuntimeConfig, choose_runtime, machine
from data.datasets.layouts import find_cases
from data.labels import decode, to_regions
from data.nifti import canonical_spacing, read_label_map, reorient
from data.preprocess import prepare

STARTER = Path(__file__).parents[1] / "models" / "starter"
#: Least enhancing tumour of a case whose ET Dice counts, as on the model card.
LEAST_ET_ML = 0.5
#: Dice of WT, TC and ET, HD95 of WT in mm, and the reference's enhancing tumour in ml.
Row = tuple[float, ...]


def main() -> None:
    """Print each case, then the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    folds = read_json(STARTER / "ensemble.json")["case_ids_by_fold"]
    tasks = [(fold, case) for fold, ids in enumerate(folds) for case in ids]
    print(f"{machine()}; {choose_runtime(RuntimeConfig(device='cpu')).record()}")
    found: dict[bool, list[Row]] = {False: [], True: []}
    with get_context("spawn").Pool(options.processes) as pool:
        for case, rows in pool.imap(partial(scores_of, options.cases), tasks):
            for tta, row in rows.items():
                found[tta].append(row)
                print(f"{case} tta={tta!s:5} WT {row[0]:.3f} TC {row[1]:.3f} ET {row[2]:.3f} HD95 {row[3]:.1f}")
    for tta, rows in found.items():
        wt, tc, _, hd95, _ = zip(*rows, strict=True)
        et = [row[2] for row in rows if row[4] >= LEAST_ET_ML]
        print(
            f"tta={tta!s:5} {len(rows)} cases: WT {fmean(wt):.3f} TC {fmean(tc):.3f} ET {fmean(et):.3f} "
            f"({len(et)} cases); WT HD95 mean {fmean(hd95):.1f} median {median(hd95):.1f} mm"
        )


def scores_of(cases: Path, task: tuple[int, str]) -> tuple[str, dict[bool, Row]]:
    """Score one case without and with mirrored images; ``task`` has its fold and id."""
    torch.set_num_threads(1)
    fold, name = task
    runtime = choose_runtime(RuntimeConfig(device="cpu"))
    ensemble = load_ensemble(STARTER, runtime)
    member = list(ensemble.members())[fold]
    (case,) = (case for case in find_cases(cases) if case.id == name)
    assert case.label is not None
    prepared = prepare(case, spacing_mm=member.spacing_mm)
    spacing_mm = canonical_spacing(prepared.native_affine)
    reference = to_regions(decode(reorient(read_label_map(case.label)).voxels, ensemble.convention))
    rows = {}
    for tta in (False, True):
        centred = predict_answer(member, prepared, runtime, options=PredictOptions(tta=tta)).centred
        masks = np.zeros_like(reference)
        masks[:, *prepared.box] = ensemble.postprocess.clean(ensemble.postprocess.cut(centred), spacing_mm)
        dices = [dice(one, other) for one, other in zip(masks, reference, strict=True)]
        hd95 = hausdorff95_mm(masks[0], reference[0], spacing_mm)
        rows[tta] = (*dices, hd95, volume_ml(reference[2], spacing_mm))
    return name, rows


if __name__ == "__main__":
    main()
