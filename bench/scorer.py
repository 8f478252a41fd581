"""Compare the CPU seconds per case of the official scores with those of the challenges' scripts, in one run.

    python bench/scorer.py SCRIPTS PYTHON

SCRIPTS is as for bench/official_scores.py, PYTHON the interpreter of the environment in which they run. Both sides read
the same files of 240 x 240 x 155 voxels; Python's start-up and imports are not timed. Every score is compared.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lesion_pairs import lesion_pair

from app.evaluation.brats.evaluate import evaluate_officially
from app.evaluation.brats.rules import rules_for
from data.datasets.source import DataSource

HERE = Path(__file__).parent


def main() -> None:
    """Print one line per pair, and the ratios."""
    spec = importlib.util.spec_from_file_location("official_scores", HERE / "official_scores.py")
    assert spec is not None
    assert spec.loader is not None
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)
    print(f"{platform.platform()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out = folder / "official.json"
        command = [sys.argv[2], str(HERE / "official_scores.py"), sys.argv[1], str(out), "--full"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        golden = json.loads(out.read_text(encoding="utf-8"))
        ratios = []
        for number, row in enumerate(golden["pairs"]):
            sides = folder / f"{number}p", folder / f"{number}r"
            labels = official.labels_of(row["rules"], row["task"])
            made = lesion_pair(row["seed"], official.FULL_SHAPE, labels, official.FULL_SIZE)
            for side, voxels in zip(sides, made, strict=True):
                side.mkdir()
                official.write(side / "case.nii.gz", voxels, (1.0, 1.0, 1.0))
            start = time.process_time()
            convention = "brats2024-ped" if row["task"] == "PED" else "brats2024"
            rules = rules_for(row["rules"], row["task"])
            sources = [DataSource(side, labels=convention) for side in sides]
            scores = evaluate_officially(*sources, rules).cases[0].values()
            seconds = time.process_time() - start
            columns = golden["columns"][f"{row['rules']} {row['task']}"]
            worst = max(
                abs(scores[region][column] - value)
                for region, values in row["regions"].items()
                for column, value in zip(columns, values, strict=True)
            )
            ratios.append(row["seconds"] / seconds)
            print(
                f"{row['rules']} {row['task']}: script {row['seconds']:.2f} s, here {seconds:.2f} s, "
                f"{ratios[-1]:.1f} x; largest difference {worst:.1e}"
            )
    print(f"least {min(ratios):.1f} x")


if __name__ == "__main__":
    main()
