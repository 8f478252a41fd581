"""Run the challenges' own scripts on the random pairs of bench/lesion_pairs.py, and write their output as JSON.

    python bench/official_scores.py SCRIPTS OUT.json          # 200 pairs of 64 x 64 x 48: tests/golden
    python bench/official_scores.py SCRIPTS OUT.json --nsd    # 500 smaller pairs, scripts with NSD: tests/golden
    python bench/official_scores.py SCRIPTS OUT.json --full   # a few of 240 x 240 x 155, with seconds: bench/scorer.py

SCRIPTS/2023/brats_metrics.py, SCRIPTS/2024/metrics_{GLI,PED,SSA,MEN,MET,MEN_RT}.py and the package surface_distance
come from rachitsaluja/BraTS-2023-Metrics and -2024-Metrics, at COMMITS. For --nsd they are those of COMMITS_NSD: SSA,
MET and SCRIPTS/2024-f1131e3/metrics_MET.py are combined from two commits, since no version with NSD was available.
None of this is part of this project. This file itself needs only numpy and nibabel, so it can run in the scripts'
environment.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path

import nibabel
import numpy as np
from lesion_pairs import lesion_pair

LABELS = {"GLI": (1, 2, 3), "PED": (1, 2, 3, 4), "SSA": (1, 2, 3), "MEN": (1, 2, 3), "MET": (1, 2, 3), "MEN-RT": (1,)}
SPACINGS = ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (0.75, 1.5, 2.0))
COMMITS = {
    "brats2023": "0c603fcc070c2c543d7b0be80d8ae3d654914b75",
    "brats2024 GLI": "9e8879a9201b9b6f2e069eb07e2acb6d4dee34b6",
    "brats2024 PED": "7fa0b9ef5a2c96a1839d55c18a73b898ad57f9e9",
    "brats2024 SSA": "f61f7de239c4a535118b10c31f8b1e75a3a593f7",
    "brats2024 MEN": "9e8879a9201b9b6f2e069eb07e2acb6d4dee34b6",
    "brats2024 MET": "b04e5a0a24b458c332713fb3a00fe27e0ca2008c",
    "brats2024 MEN-RT": "bc6308f2062c8e5dd124408cfb22a6c93eb2eaca",
}
SOURCE = "Output of the challenges' own scripts, see bench/official_scores.py; affine diag(-x, -y, z)"
SOURCE_NSD = (
    "Output of the challenges' scripts, transcribed by hand, see bench/official_scores.py; affine diag(-x, -y, z). Of "
    "brats2024 the surface Dice only. Where two commits are named there was no such script: it was assembled from "
    "both and is our interpretation, see docs/how-to/scores.md."
)
#: Commits of the scripts for --nsd.
COMMITS_NSD = {
    "brats2024 PED": "9e8879a9201b9b6f2e069eb07e2acb6d4dee34b6",
    "brats2024 MEN-RT": "9e8879a9201b9b6f2e069eb07e2acb6d4dee34b6",
    "brats2024 SSA": "f61f7de239c4a535118b10c31f8b1e75a3a593f7, with the NSD of 9e8879a",
    "brats2024 MET": "b04e5a0a24b458c332713fb3a00fe27e0ca2008c, with the NSD of 9e8879a",
    "brats2024-f1131e3 MET": "b04e5a0a24b458c332713fb3a00fe27e0ca2008c, with the NSD of 9e8879a, RC and the diagonal",
}
#: This project's name of each column, by its name in the scripts' tables.
COLUMNS = {
    "Num_TP": "true_positives",
    "Num_FP": "false_positives",
    "Num_FN": "false_negatives",
    "Sensitivity": "sensitivity",
    "Specificity": "specificity",
    "Legacy_Dice": "dice",
    "Legacy_HD95": "hd95_mm",
    "Legacy NSD @ 0.5": "nsd_05",
    "Legacy NSD @ 1.0": "nsd_10",
    "GT_Complete_Volume": "reference_volume_mm3",
    "LesionWise_Score_Dice": "lesion_dice",
    "LesionWise_Score_HD95": "lesion_hd95_mm",
    "Lesion_Wise_Score_Dice": "lesion_dice",
    "Lesion_Wise_Score_HD95": "lesion_hd95_mm",
    "LesionWise_Score_NSD @ 0.5": "lesion_nsd_05",
    "LesionWise_Score_NSD @ 1.0": "lesion_nsd_10",
}


#: Grid and size of the pairs of --full.
FULL_SHAPE, FULL_SIZE = (240, 240, 155), 3.0
#: Grid and size of the pairs of --nsd.
NSD_SHAPE, NSD_SIZE = (44, 40, 32), 0.8
FULL = (("brats2023", "GLI", 2003), ("brats2024", "GLI", 2003))


def plan() -> list[tuple[str, str, int]]:
    """Return year, task and seed of each pair: 200 in total."""
    rows: list[tuple[str, str, int]] = []
    for task, count in (("GLI", 24), ("PED", 12), ("SSA", 12), ("MEN", 16), ("MET", 24)):
        rows += [("brats2023", task, seed) for seed in range(count)]
    for task, count in (("GLI", 48), ("PED", 20), ("SSA", 14), ("MEN", 10), ("MET", 12), ("MEN-RT", 8)):
        rows += [("brats2024", task, 1000 + seed) for seed in range(count)]
    return rows


def plan_nsd() -> list[tuple[str, str, int]]:
    """Return year, task and seed of the pairs of --nsd: 100 for each script."""
    rows = []
    for year, task in (key.split() for key in COMMITS_NSD):
        rows += [(year, task, 3000 + seed) for seed in range(100)]
    return rows


def labels_of(year: str, task: str) -> tuple[int, ...]:
    """Return the label numbers in the files of a task."""
    if year == "brats2023":
        return (1, 2, 3)
    return (1, 2, 3, 4) if task == "GLI" or year == "brats2024-f1131e3" else LABELS[task]


def spacing_of(seed: int) -> tuple[float, float, float]:
    """Return the edge lengths in mm of the voxels in the pair of a seed."""
    return SPACINGS[seed % 4]


@functools.cache
def module_of(file: Path) -> object:
    """Import a module by its file: two scripts share a name, and importing their packages needs further packages."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, voxels: np.ndarray, spacing_mm: tuple[float, float, float]) -> None:
    """Write a label map in the voxel order of BraTS."""
    x, y, z = spacing_mm
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-x, -y, z, 1.0])), path)


def official(scripts: Path, year: str, task: str, prediction: Path, reference: Path) -> dict[str, dict[str, float]]:
    """Return the table of the script of a year and a task."""
    folder = (scripts / year.removeprefix("brats")).resolve()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if year == "brats2023":
            module = importlib.import_module("brats_metrics")
            table = module.get_lesion_wise_results(str(prediction), str(reference), f"BraTS-{task}")
        else:
            module = module_of(folder / f"metrics_{task.replace('-', '_')}.py")
            table, _ = module.get_LesionWiseResults(str(prediction), str(reference), f"BraTS-{task}")
    rows = table.to_dict("records")
    return {
        row["Labels"]: {COLUMNS[name]: float(value) for name, value in row.items() if name in COLUMNS} for row in rows
    }


def main() -> None:
    """Run the scripts and write the file."""
    scripts, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    full, nsd = "--full" in sys.argv[3:], "--nsd" in sys.argv[3:]
    shape, size = (FULL_SHAPE, FULL_SIZE) if full else (NSD_SHAPE, NSD_SIZE) if nsd else ((64, 64, 48), 1.0)
    results, columns = [], {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for number, (year, task, seed) in enumerate(FULL if full else plan_nsd() if nsd else plan()):
            files = Path(f"p{number}.nii.gz"), Path(f"r{number}.nii.gz")
            for path, voxels in zip(files, lesion_pair(seed, shape, labels_of(year, task), size), strict=True):
                write(path, voxels, (1.0, 1.0, 1.0) if full else spacing_of(seed))
            start = time.process_time()
            table = official(scripts, year, task, *files)
            seconds = time.process_time() - start
            kept = {name for row in table.values() for name in row if not nsd or year != "brats2024" or "nsd" in name}
            names = columns.setdefault(f"{year} {task}", sorted(kept))
            values = {
                region: [round(row[name], 9) if nsd else row[name] for name in names] for region, row in table.items()
            }
            row = {"rules": year, "task": task, "seed": seed, "regions": values}
            results.append({**row, "seconds": seconds} if full else row)
            print(number, year, task, seed, f"{seconds:.1f} s", flush=True)
    packages = ("numpy", "scipy", "pandas", "nibabel", "connected-components-3d", "MedPy")
    head = {
        "source": SOURCE_NSD if nsd else SOURCE,
        "shape": shape,
        "size": size,
        "commits": COMMITS_NSD if nsd else COMMITS,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        "columns": columns,
    }
    lines = ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in results)
    out.write_text(f'{json.dumps(head)[:-1]},\n "pairs": [\n  {lines}\n ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
