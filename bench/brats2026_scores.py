"""Compare `--rules brats2026` with `brats-evaluate` called by hand, and record the command's output.

    python bench/brats2026_scores.py                     # 100 synthetic pairs in each of the six configurations
    python bench/brats2026_scores.py --pairs 5
    python bench/brats2026_scores.py --record OUT.json   # the command's output on a few pairs: tests/golden

`brats-evaluate` of the package brats-evaluation must be on the PATH. By hand, this script calls it once for all pairs
of a configuration, on the original files; `--rules brats2026` calls it for each case, on copies. All values must be
equal, bit for bit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from lesion_pairs import lesion_pair

from app.evaluation.brats.brats2026 import METRICS, TASKS, PackageRules, evaluate_by_package
from app.evaluation.brats.brats_evaluate import COMMAND, find_installed
from data.datasets.source import DataSource
from data.labels import BRATS2024, BRATS2024_PED

SHAPE = (32, 32, 24)
SPACINGS = ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (0.75, 1.5, 2.0))
#: Recorded pairs: an ordinary one, one with two empty maps, one with anisotropic voxels.
RECORDED = (0, 3, 7)


def labels_of(rules: PackageRules) -> tuple[int, ...]:
    """Return the label numbers in the files of a task."""
    return tuple(sorted(set(rules.numbers.values())))


def convention_of(rules: PackageRules) -> str:
    """Return the label convention of the files of a task."""
    return BRATS2024_PED.name if rules.task == "PED" else BRATS2024.name


def write_pairs(folder: Path, rules: PackageRules, seeds: Iterable[int]) -> None:
    """Write the label maps of each seed to ``prediction`` and ``reference``."""
    for seed in seeds:
        for side, voxels in zip(("prediction", "reference"), lesion_pair(seed, SHAPE, labels_of(rules)), strict=True):
            (folder / side).mkdir(exist_ok=True)
            x, y, z = SPACINGS[seed % 4]
            image = nib.nifti1.Nifti1Image(voxels, np.diag([-x, -y, z, 1.0]))
            nib.loadsave.save(image, folder / side / f"{seed:05d}.nii.gz")


def by_hand(folder: Path, rules: PackageRules) -> list[dict[str, Any]]:
    """Run the command on all pairs and return its metrics."""
    words = ["--config", rules.config, "--ref_path", folder / "reference", "--pred_path", folder / "prediction"]
    out = folder / "summary.json"
    subprocess.run(
        [find_installed().command, *words, "--summary_json", out], check=True, stdout=subprocess.DEVNULL, stderr=2
    )
    return list(json.loads(out.read_bytes())["metrics"])


def differing(rules: PackageRules, pairs: int) -> int:
    """Count the metrics of a configuration that differ."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder, rules, range(pairs))
        start = time.monotonic()
        entries = by_hand(folder, rules)
        middle = time.monotonic()
        convention = convention_of(rules)
        predictions, references = (DataSource(folder / side, labels=convention) for side in ("prediction", "reference"))
        found = evaluate_by_package(predictions, references, rules)
        end = time.monotonic()
    assert [f"{case.case}.nii.gz" for case in found.cases] == [entry["subject_name"] for entry in entries]
    wrong = count = 0
    for case, entry in zip(found.cases, entries, strict=True):
        for region, metric in itertools.product(rules.regions, METRICS):
            ours, theirs = case.regions[region][metric], entry[region.lower()].get(metric, math.nan)
            count += 1
            if not (ours == theirs or (math.isnan(ours) and math.isnan(theirs))):
                wrong += 1
                print(f"{rules.task} {case.case} {region} {metric}: {ours} against {theirs}")
    print(
        f"{rules.task}: {len(entries)} pairs, {count} numbers, {wrong} differ; by hand {middle - start:.0f} s, "
        f"--rules brats2026 {end - middle:.0f} s",
        flush=True,
    )
    return wrong


def record(path: Path) -> None:
    """Write the command's output on a few pairs of each configuration."""
    head = {
        "source": f"Recorded output of {COMMAND}, see bench/brats2026_scores.py",
        "versions": dict(find_installed().versions),
        "shape": SHAPE,
        "spacings_mm": SPACINGS,
    }
    lines = []
    for rules in TASKS.values():
        with tempfile.TemporaryDirectory() as name:
            write_pairs(Path(name), rules, RECORDED)
            for seed, entry in zip(RECORDED, by_hand(Path(name), rules), strict=True):
                row = {"task": rules.task, "labels": labels_of(rules), "seed": seed, "entry": entry}
                lines.append(json.dumps(row, separators=(",", ":")))
    rows = ",\n  ".join(lines)
    path.write_text(f'{json.dumps(head)[:-1]},\n "pairs": [\n  {rows}\n ]\n}}\n', encoding="utf-8")


def main() -> int:
    """Compare the scores, or record the command's output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    if given.record is not None:
        record(given.record)
        return 0
    return min(1, sum(differing(rules, given.pairs) for rules in TASKS.values()))


if __name__ == "__main__":
    sys.exit(main())
