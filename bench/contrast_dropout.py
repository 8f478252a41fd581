"""Measure the cost of contrast dropout with complete input, and its benefit when a contrast is missing.

    python bench/contrast_dropout.py [--seeds 3] [--steps 1500] [--probability 0.5] [--folder DIR]

The cases are phantoms at 2 mm; the laptop network is trained on batches of 2 x 48^3. For each seed there is one run
without dropout and one with it, on the same cases and patches. The score is the mean Dice on held-out test cases, which
no decision used. Runs without dropout get zeros for missing contrasts; ``predict`` would refuse such input, because the
network has never seen it.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from app.config.load import load_config
from app.inference.model import load_model
from app.inference.scoring import case_dice
from app.runs.folder import write_json
from app.system.device import RuntimeConfig, choose_runtime, machine
from app.training.run import start
from data.datasets.layouts import Case, find_cases
from data.datasets.source import DataSource
from data.labels import CONTRASTS, REGIONS, Contrast
from data.phantoms import write_phantoms

#: Missing contrasts: none, each one, all but T1c.
MISSING: tuple[tuple[Contrast, ...], ...] = ((), ("flair",), ("t1c",), ("t2",), ("t1",), ("t1", "t2", "flair"))
ROWS = ("mean", *REGIONS)
#: Mean Dice over cases by missing contrasts, then by region; ``mean`` is the mean over the regions.
Table = dict[tuple[Contrast, ...], dict[str, float]]


def main() -> None:
    """Train the pairs of runs, and print a table row by row and then the differences."""
    options = _options()
    print(f"{machine()}; {options.train} cases train, {options.test} test, {options.steps} steps")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        cases = phantoms(Path(folder) / "data", options.train, options.test)
        test = cases[options.train :]
        print("\n| seed | dropout | region |", " | ".join(f"without {'+'.join(m) or 'none'}" for m in MISSING), "|")
        print("|---|---|---|" + "---|" * len(MISSING))
        found: dict[float, list[Table]] = {0.0: [], options.probability: []}
        for seed in range(options.seeds):
            for probability, tables in found.items():
                run = Path(folder) / f"run-{seed}-{probability:g}"
                train(Path(folder), run, seed=seed, probability=probability, steps=options.steps)
                tables.append(score(run, test))
                show(str(seed), probability, tables[-1])
        means = {probability: average(tables) for probability, tables in found.items()}
        for probability, table in means.items():
            show("mean", probability, table)
        for what, missing in (("complete input", ()), ("FLAIR missing", ("flair",))):
            gains = {row: means[options.probability][missing][row] - means[0.0][missing][row] for row in ROWS}
            print(f"\n{what}, with dropout against without:", ", ".join(f"{row} {gains[row]:+.3f}" for row in ROWS))


def phantoms(folder: Path, training: int, testing: int) -> tuple[Case, ...]:
    """Write the data set and, next to it, its split."""
    write_phantoms(folder, training + testing, seed=0, spacing_mm=2.0)
    cases = find_cases(folder)
    ids = [case.id for case in cases]
    # One of the training cases is used for validation, so that the run reports a Dice; it only selects the weights.
    write_json(folder.parent / "split.json", {"train": ids[1:training], "validation": ids[:1]})
    return cases


def train(folder: Path, run: Path, *, seed: int, probability: float, steps: int) -> None:
    """Train the laptop network once, with one validation at the end."""
    settings = {
        "augment.contrast_dropout": probability,
        "training.steps": steps,
        "training.patch_voxels": [48, 48, 48],
        "training.batch_size": 2,
        "training.validations": 1,
        "training.seed": seed,
    }
    config = load_config("laptop", [f"{key}={value}" for key, value in settings.items()])
    start(DataSource(folder / "data"), run, config, split_file=folder / "split.json")


def score(run: Path, cases: tuple[Case, ...]) -> Table:
    """Return the Dice of a run for each set of missing contrasts."""
    runtime = choose_runtime(RuntimeConfig())
    model = load_model(run, runtime)
    table: Table = {}
    for missing in MISSING:
        given = [c for c in CONTRASTS if c not in missing]
        subset = [replace(case, contrasts={c: case.contrasts[c] for c in given}) for case in cases]
        dice = [case_dice(model, case, runtime) for case in subset]
        by_region: dict[str, float] = {region: fmean(of_case[region] for of_case in dice) for region in REGIONS}
        table[missing] = {"mean": fmean(by_region.values()), **by_region}
    return table


def average(tables: list[Table]) -> Table:
    """Return the mean over seeds."""
    return {missing: {row: fmean(t[missing][row] for t in tables) for row in ROWS} for missing in MISSING}


def show(seed: str, probability: float, table: Table) -> None:
    """Print four lines of the table."""
    for row in ROWS:
        numbers = " | ".join(f"{table[missing][row]:.3f}" for missing in MISSING)
        print(f"| {seed} | {probability:g} | {row} | {numbers} |", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--probability", type=float, default=0.5)
    parser.add_argument("--train", type=int, default=20)
    parser.add_argument("--test", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="folder for temporary runs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
