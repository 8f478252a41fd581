"""Measure the effect of calibration on unseen cases: calibration error and coverage of volume intervals.

    python bench/calibration.py [--train 15] [--test 30] [--folds 3] [--steps 120] [--spacing 4] [--folder DIR]

All cases are phantoms. ``crossval`` trains an ensemble on the first ones, and the ensemble predicts the others. For
these the script reports the ECE and Brier score without and with the temperatures, and the share of true volumes inside
the intervals that ``predict`` writes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import fmean

import numpy as np

from app.config.load import load_config
from app.evaluation.reliability import Reliability, case_reliability, pooled
from app.experiments.crossval.run import CrossValidation, cross_validate
from app.inference.batch.predict import predict
from app.inference.ensemble import Ensemble, load_ensemble
from app.inference.probabilities import predict_centred
from app.system.device import RuntimeConfig, choose_runtime, machine
from data.datasets.layouts import Case, find_cases
from data.datasets.source import DataSource
from data.labels import REGIONS, decode, to_regions
from data.nifti import canonical_spacing, read_label_map, reorient, spacing_of
from data.phantoms import write_phantom
from data.preprocess import prepare

RUNTIME = choose_runtime(RuntimeConfig())
#: Reliability by region of the voxels around the tumours of all cases, without and with temperatures.
Pair = tuple[tuple[Reliability, ...], tuple[Reliability, ...]]


def main() -> None:
    """Make the cases, cross-validate, predict, and print the results."""
    options = _options()
    print(f"{machine()}; {vars(options)}")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for index in range(options.train + options.test):
            part = "train" if index < options.train else "test"
            write_phantom(folder / part, index, spacing_mm=options.spacing)
        outcome = cross_validate(
            DataSource(folder / "train"),
            folder / "out",
            load_config("laptop", _settings(options.steps)),
            folds=options.folds,
        )
        assert isinstance(outcome, CrossValidation)
        show_out_of_fold(outcome)
        ensemble = load_ensemble(outcome.ensemble, RUNTIME)
        cases = find_cases(folder / "test")
        show_probabilities(errors_of(ensemble, cases))
        show_volumes(ensemble, cases, folder / "predicted")


def _settings(steps: int) -> list[str]:
    return [
        "network.channels=[8, 16, 32]",
        "training.patch_voxels=[32, 32, 32]",
        "training.batch_size=2",
        f"training.steps={steps}",
        "training.validations=1",
        "runtime.device=cpu",
    ]


def show_out_of_fold(outcome: CrossValidation) -> None:
    """Print the estimates of the cross-validation itself."""
    means = outcome.raw.spread()
    print("out of fold: Dice", ", ".join(f"{region} {means[region].mean:.3f}" for region in REGIONS))
    for region, one in outcome.calibrated.regions.items():
        bound = one.log_ratio["postprocessed"]
        print(
            f"  {region}: T {one.temperature:.3f}, fitted {one.fitted:.3f} ({min(one.left_out):.3f} to "
            f"{max(one.left_out):.3f}), ECE {one.before.ece:.4f} -> {one.after.ece:.4f}, "
            f"Brier {one.before.brier:.4f} -> {one.after.brier:.4f}, "
            f"NLL {one.before.nll:.4f} -> {one.after.nll:.4f}, interval "
            + ("none" if bound is None else f"factor {np.exp(bound):.2f}, coverage {one.coverage}")
        )


def errors_of(ensemble: Ensemble, cases: tuple[Case, ...]) -> Pair:
    """Return the reliability without and with the ensemble's temperatures, in the same box around the tumour."""
    plain, calibrated = [], []
    for case in cases:
        prepared = prepare(case, spacing_mm=ensemble.spacing_mm)
        centred = np.full((len(REGIONS), *prepared.canonical_shape), -0.5, dtype=np.float32)
        centred[:, *prepared.box] = predict_centred(ensemble, prepared, RUNTIME)
        assert case.label is not None
        codes = decode(reorient(read_label_map(case.label)).voxels, ensemble.convention)
        spacing_mm = canonical_spacing(prepared.native_affine)
        for into, shares in ((plain, centred), (calibrated, ensemble.calibration.apply(centred))):
            found = case_reliability(shares + np.float32(0.5), codes, spacing_mm)
            assert found is not None
            into.append(found)
    return pooled(plain), pooled(calibrated)


def show_probabilities(pair: Pair) -> None:
    """Print ECE and Brier score by region."""
    print("held out:")
    for region, before, after in zip(REGIONS, *pair, strict=True):
        print(f"  {region}: ECE {before.ece:.4f} -> {after.ece:.4f}, Brier {before.brier:.4f} -> {after.brier:.4f}")


def show_volumes(ensemble: Ensemble, cases: tuple[Case, ...], output: Path) -> None:
    """Print how often the interval in a case's JSON contains the true volume."""
    done = predict(ensemble, cases, output, runtime=RUNTIME).cases
    for number, region in enumerate(REGIONS):
        inside, widths = [], []
        for case, prediction in zip(cases, done, strict=True):
            assert case.label is not None
            label_map = read_label_map(case.label)
            mask = to_regions(decode(label_map.voxels, ensemble.convention))[number]
            truth = float(mask.sum() * np.prod(spacing_of(label_map.affine))) / 1000
            intervals = prediction["volume_interval_ml"]
            if intervals is None:
                print(f"no interval: {prediction['volume_interval_note']}")
                return
            low, high = intervals[region]
            inside.append(low - 0.001 <= truth <= high + 0.001)
            widths.append(high - low)
        print(f"  {region}: 90 % interval holds {sum(inside)} of {len(inside)}; mean width {fmean(widths):.1f} ml")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=15)
    parser.add_argument("--test", type=int, default=30)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--spacing", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, help="folder for temporary files")
    return parser.parse_args()


if __name__ == "__main__":
    main()
