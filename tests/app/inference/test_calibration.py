"""Temperatures, calibration errors, volume intervals: known distortions, values by hand, coverage on simulated data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.evaluation.metrics import RegionScores
from app.evaluation.reliability import box_around, case_reliability, reliability
from app.experiments.crossval.calibrate import calibrate
from app.experiments.crossval.logits import (
    count_logits,
    fit_temperature,
    negative_log_likelihood,
    no_counts,
    under_temperature,
)
from app.experiments.crossval.summary import Summary
from app.inference.calibration import (
    NOT_CALIBRATED,
    Calibration,
    VolumeErrors,
    calibration_from_json,
    conformal_quantile,
    fewest_cases,
    log_ratio,
)
from app.inference.postprocess import Postprocess
from data.labels import REGIONS, from_regions, to_regions

Call = Callable[..., Any]
Float = npt.NDArray[np.float32]


def drawn(sharpened: float, *, seed: int = 0, count: int = 60_000) -> tuple[Float, npt.NDArray[np.bool_]]:
    """Probabilities minus one half that are right once their logits are divided by ``sharpened``, and what is right."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(-0.5, 1.2, (3, count, 1, 1))
    right = draw.random(logits.shape) < 1 / (1 + np.exp(-logits))
    return (np.tanh(logits * sharpened / 2) / 2).astype(np.float32), right


# Temperatures


@pytest.mark.parametrize("sharpened", [0.5, 1.0, 2.0, 4.0])
def test_a_temperature_undoes_a_known_distortion(sharpened: float) -> None:
    for counts in count_logits(*drawn(sharpened)):
        assert fit_temperature(counts) == pytest.approx(sharpened, rel=0.04)


@settings(max_examples=20, deadline=None)
@given(temperature=st.floats(0.2, 5), seed=st.integers(0, 1000))
def test_the_likelihood_of_the_counts_equals_that_of_the_voxels(temperature: float, seed: int) -> None:
    centred, right = drawn(2.0, seed=seed, count=2000)
    logits = 2 * np.arctanh(2 * centred[0].astype(np.float64)) / temperature
    voxels = np.where(right[0], np.logaddexp(0, -logits), np.logaddexp(0, logits)).mean()
    assert negative_log_likelihood(count_logits(centred, right)[0], temperature) == pytest.approx(voxels, rel=2e-3)


def test_the_fitted_temperature_minimises_the_negative_log_likelihood() -> None:
    counts = count_logits(*drawn(2.0))[0]
    least = negative_log_likelihood(counts, fit_temperature(counts))
    assert all(least <= negative_log_likelihood(counts, t) for t in np.linspace(0.1, 10, 200))


def test_an_empty_region_has_a_temperature_of_1() -> None:
    centred, right = drawn(3.0, count=100)
    assert fit_temperature(count_logits(centred, np.zeros_like(right))[0]) == 1.0
    assert fit_temperature(no_counts()[0]) == 1.0


def test_temperatures_of_1_return_the_same_array() -> None:
    centred = drawn(1.0, count=10)[0]
    assert Calibration(temperature=(1.0, 1.0, 1.0)).apply(centred) is centred
    assert NOT_CALIBRATED.apply(centred) is centred


@settings(max_examples=50, deadline=None)
@given(temperature=st.floats(0.1, 10), values=st.lists(st.floats(-0.5, 0.5, width=32), min_size=3, max_size=30))
def test_a_temperature_keeps_decisions_order_and_certainty(temperature: float, values: list[float]) -> None:
    given_ = np.array([0.0, -0.5, 0.5, *sorted(values)], dtype=np.float32)
    centred = np.stack([given_] * 3).reshape(3, -1, 1, 1)
    found = Calibration(temperature=(temperature,) * 3).apply(centred)[0].ravel()
    assert found[:3].tolist() == [0.0, -0.5, 0.5]
    assert (np.diff(found[3:]) >= -1e-6).all()
    assert (found * given_ >= 0).all()


def test_a_temperature_divides_the_logit() -> None:
    centred = np.full((3, 1, 1, 1), 0.4, dtype=np.float32)  # 0.9, of logit log 9
    found = Calibration(temperature=(2.0, 1.0, 0.5)).apply(centred).ravel()
    assert found == pytest.approx([0.75 - 0.5, 0.4, 81 / 82 - 0.5], abs=1e-6)
    assert (centred == np.float32(0.4)).all()


# ECE and Brier score


def test_the_calibration_error_equals_a_hand_computed_one() -> None:
    # Bins of 1/15: 0.10 and 0.12 share one (no hit), 0.90 and 0.92 another (one hit of two).
    found = reliability(np.array([0.10, 0.12, 0.90, 0.92]), np.array([False, False, True, False]))
    assert found.ece == pytest.approx((abs(0.22 - 0) + abs(1.82 - 1)) / 4)
    assert found.brier == pytest.approx((0.01 + 0.0144 + 0.01 + 0.8464) / 4)


def test_calibrated_probabilities_have_no_calibration_error() -> None:
    shares = np.repeat([0.1, 0.5, 0.9], 10)
    right = np.concatenate([np.arange(10) < hits for hits in (1, 5, 9)])
    assert reliability(shares, right).ece == pytest.approx(0, abs=1e-12)


def test_probabilities_of_exactly_0_and_1_are_counted() -> None:
    found = reliability(np.array([0.0, 1.0, 1.0]), np.array([False, True, False]))
    assert found.voxels.tolist() == [1, *[0] * 13, 2]
    assert found.ece == pytest.approx(1 / 3)


def test_logit_counts_give_the_errors_of_the_voxels() -> None:
    centred, right = drawn(2.0)
    centred[0, :500] = -0.5
    found = under_temperature(count_logits(centred, right)[0], 1.0)
    voxels = reliability(centred[0] + 0.5, right[0])
    assert found.voxels.sum() == voxels.voxels.sum()
    assert found.ece == pytest.approx(voxels.ece, abs=1e-3)
    assert found.brier == pytest.approx(voxels.brier, abs=1e-4)


def test_errors_of_two_merged_sets_equal_those_of_the_union() -> None:
    centred, right = drawn(1.5, count=400)
    shares = centred[0] + 0.5
    both = reliability(shares[:100], right[0][:100]) + reliability(shares[100:], right[0][100:])
    assert both.ece == pytest.approx(reliability(shares, right[0]).ece)
    assert both.brier == pytest.approx(reliability(shares, right[0]).brier)


def test_the_box_extends_10_mm_beyond_the_tumour_but_not_beyond_the_grid() -> None:
    marked = np.zeros((40, 40, 8), dtype=bool)
    marked[20:22, 3, 4] = True
    box = box_around(marked, (1.0, 2.0, 4.0))
    assert box is not None
    assert marked[box].shape == (22, 9, 7)
    assert box_around(np.zeros((2, 2, 2), dtype=bool), (1.0, 1.0, 1.0)) is None


# Intervals


def test_intervals_have_their_stated_coverage_for_exchangeable_cases() -> None:
    draw = np.random.default_rng(0)
    covered = []
    for _ in range(2000):
        errors = draw.lognormal(0, 1, 21)
        bound = conformal_quantile(errors[:20].tolist(), 0.9)
        assert bound is not None
        covered.append(errors[20] <= bound)
    assert 0.89 <= np.mean(covered) <= 0.93  # 19 / 21 are expected


def test_fewer_than_nine_cases_give_no_90_percent_interval() -> None:
    assert fewest_cases(0.9) == 9
    assert conformal_quantile([1.0] * 8, 0.9) is None
    assert conformal_quantile([1.0] * 8 + [3.0], 0.9) == 3.0
    assert conformal_quantile([], 0.9) is None


@given(volume=st.floats(0, 500), truth=st.floats(0, 500))
def test_an_interval_contains_the_volume_and_every_truth_within_its_error(volume: float, truth: float) -> None:
    bound = log_ratio(truth, volume)
    low, high = VolumeErrors(level=0.9, offset_ml=1.0, log_ratio=(bound, 0.0, 0.0)).interval_ml(0, volume)
    assert 0 <= low <= volume + 1e-9
    assert volume <= high + 1e-9
    assert low - 1e-9 <= truth <= high + 1e-9


def test_an_empty_region_also_has_an_interval() -> None:
    low, high = VolumeErrors(level=0.9, offset_ml=1.0, log_ratio=(math.log(3), 0.0, 0.0)).interval_ml(0, 0.0)
    assert (low, high) == (0, pytest.approx(2))


def test_an_incomplete_case_has_no_interval_and_the_reason_is_reported() -> None:
    known = Calibration(
        temperature=(1.0, 1.0, 1.0), volume=VolumeErrors(level=0.9, offset_ml=1.0, log_ratio=(1.0, 1.0, 1.0))
    )
    assert known.record([1.0, 1.0, 1.0], complete=True)["volume_interval_note"] is None
    told = known.record([1.0, 1.0, 1.0], complete=False)
    assert (told["volume_interval_ml"], told["volume_interval_level"]) == (None, None)
    assert "contrasts are missing" in told["volume_interval_note"]


# A cross-validation


def summary(volumes: dict[str, tuple[float, float]], folds: int) -> Summary:
    """Cases whose regions all have these marked and true volumes."""
    found = {}
    for case_id, (marked, true) in volumes.items():
        scores = RegionScores(
            dice=1.0,
            hd95_mm=0.0,
            sensitivity=1.0,
            specificity=1.0,
            volume_ml=marked,
            reference_volume_ml=true,
            volume_error_ml=marked - true,
            nsd=1.0,
        )
        found[case_id] = dict.fromkeys(REGIONS, scores)
    fold_of = {case_id: number % folds for number, case_id in enumerate(volumes)}
    return Summary(rules=Postprocess(), fold_of=fold_of, cases=found)


@pytest.fixture(scope="module")
def many() -> Summary:
    """Eighteen cases in three folds, the n-th marked by n % too large."""
    return summary({f"case{n:02}": (99 + n, 99.0) for n in range(18)}, 3)


def test_the_reported_error_is_estimated_without_the_fold(many: Summary) -> None:
    counts = {case: count_logits(*drawn(1.5 + (n % 3), seed=n, count=500)) for n, case in enumerate(many.cases)}
    found = calibrate(counts, many, many).regions["TC"]
    for fold, temperature in enumerate(found.left_out):
        others = [one[1] for case, one in counts.items() if many.fold_of[case] != fold]
        assert temperature == fit_temperature(np.sum(others, axis=0))
    after = [under_temperature(one[1], found.left_out[many.fold_of[case]]) for case, one in counts.items()]
    assert found.after.ece == pytest.approx(sum(after[1:], after[0]).ece)
    assert found.after.ece < found.before.ece
    assert found.temperature == found.fitted
    assert found.fitted == fit_temperature(np.sum([one[1] for one in counts.values()], axis=0))


def test_a_temperature_that_does_not_help_other_folds_is_not_kept(many: Summary) -> None:
    # Right as often as it says, except for a few confidently wrong voxels: the likelihood would raise T.
    centred, right = drawn(1.0, count=2000)
    centred[:, :4], right[:, :4] = 0.4999999, False
    found = calibrate(dict.fromkeys(many.cases, count_logits(centred, right)), many, many).regions["WT"]
    assert found.fitted > 1.02
    assert found.after.nll < found.before.nll
    assert found.after.ece > found.before.ece
    assert found.temperature == 1.0


def test_intervals_use_all_volumes_and_coverage_the_other_folds(many: Summary) -> None:
    found = calibrate(dict.fromkeys(many.cases, no_counts()), many, many).regions["WT"]
    assert found.log_ratio["plain"] == pytest.approx(math.log(1.17))  # the 18th of 18: ceil(19 x 0.9)
    assert found.coverage == 17 / 18  # the largest error is above all of the other folds'


def test_the_ensemble_reads_the_written_calibration(many: Summary) -> None:
    counts = {case: count_logits(*drawn(2.0, seed=n, count=500)) for n, case in enumerate(many.cases)}
    found = calibrate(counts, many, many)
    read = calibration_from_json(json.loads(json.dumps(found.ensemble_json())), postprocessed=True)
    assert read.temperature == tuple(found.regions[region].temperature for region in REGIONS)
    assert read.volume is not None
    assert read.volume.log_ratio == tuple(found.regions[region].log_ratio["postprocessed"] for region in REGIONS)


def test_few_cases_give_temperatures_but_no_interval() -> None:
    few = summary({f"case{n}": (10.0, 10.0) for n in range(8)}, 2)
    counts = {case: count_logits(*drawn(2.0, seed=n, count=500)) for n, case in enumerate(few.cases)}
    found = calibrate(counts, few, few)
    read = calibration_from_json(found.ensemble_json(), postprocessed=False)
    assert read.volume is None
    assert read.why_no_interval == "only 8 cases were cross-validated; an interval that covers 90% needs 9 or more"
    assert found.regions["WT"].coverage is None


def test_cases_without_any_tumour_change_nothing(many: Summary) -> None:
    found = calibrate(dict.fromkeys(many.cases, no_counts()), many, many).to_json()
    assert found["temperature"] == dict.fromkeys(REGIONS, 1.0)
    assert found["regions"]["ET"]["ece_after"] == 0.0


# evaluate


AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions and references of two cases; one of them has 8-bit probabilities next to its label map."""
    draw = np.random.default_rng(1)
    for case in ("a", "b"):
        labels = np.zeros((20, 18, 10), dtype=np.uint8)
        labels[6:12, 6:12, 3:7], labels[8:10, 8:10, 4:6] = 2, 4
        for side in ("predicted", "expected"):
            (tmp_path / side).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(labels, AFFINE), tmp_path / side / f"{case}.nii.gz")
    codes = np.where(labels == 4, 3, labels)
    shares = (0.8 * np.moveaxis(to_regions(codes), 0, -1) + draw.uniform(0, 0.2, (*labels.shape, 3))) * 255
    image = nib.Nifti1Image(shares.astype(np.uint8), AFFINE)
    image.header.set_slope_inter(1 / 255, 0)
    nib.save(image, tmp_path / "predicted" / "a_probabilities.nii.gz")
    return tmp_path / "predicted", tmp_path / "expected"


def test_evaluate_reports_calibration_errors_if_probabilities_exist(sides: tuple[Path, Path], znormseg: Call) -> None:
    out = sides[0].parent / "scores.csv"
    told = json.loads(znormseg("evaluate", *sides, "--json", "--out", out).out)
    found = told["calibration"]
    image: Any = nib.load(sides[0] / "a_probabilities.nii.gz")
    labels: Any = nib.load(sides[1] / "a.nii.gz")
    codes = np.where(np.asarray(labels.dataobj) == 4, 3, np.asarray(labels.dataobj)).astype(np.uint8)
    expected = case_reliability(np.moveaxis(image.get_fdata(), -1, 0).astype(np.float32), codes, (1.0, 1.0, 2.0))
    assert expected is not None
    assert [one["case"] for one in found["cases"]] == ["a"]
    for number, region in enumerate(REGIONS):
        errors = {"ece": pytest.approx(expected[number].ece), "brier": pytest.approx(expected[number].brier)}
        assert found["cases"][0][region] == found["regions"][region] == found["regions_pooled"][region] == errors
    assert (told["missing_references"], told["failures"]) == ([], {})
    header, first, second, *_ = out.read_text().splitlines()
    assert header.endswith("WT_ece,WT_brier,TC_ece,TC_brier,ET_ece,ET_brier")
    assert first.startswith("a,")
    assert second.endswith(",,,,,")


def test_probabilities_may_be_stored_in_another_voxel_order(sides: tuple[Path, Path], znormseg: Call) -> None:
    before = json.loads(znormseg("evaluate", *sides, "--json").out)["calibration"]
    path = sides[0] / "a_probabilities.nii.gz"
    image: Any = nib.load(path)
    turned = image.as_reoriented(np.array([[1, -1], [2, 1], [0, -1]]))
    nib.save(nib.Nifti1Image(np.asarray(turned.dataobj, dtype=np.float32), turned.affine), path)
    after = json.loads(znormseg("evaluate", *sides, "--json").out)["calibration"]
    for region in REGIONS:
        assert after["regions"][region] == pytest.approx(before["regions"][region], rel=1e-5)


def test_probabilities_of_an_earlier_label_map_are_not_scored_with_a_later_one(
    sides: tuple[Path, Path], znormseg: Call
) -> None:
    for path, counted in ((None, False), ("a_probabilities.nii.gz", True)):
        (sides[0] / "a.json").write_text(json.dumps({"files": {"probabilities": path}}))
        ended = znormseg("evaluate", *sides, "--json")
        assert ("calibration" in json.loads(ended.out)) is counted


def test_without_probabilities_evaluate_does_not_mention_them(sides: tuple[Path, Path], znormseg: Call) -> None:
    assert "WT ECE" in znormseg("evaluate", *sides).out
    (sides[0] / "a_probabilities.nii.gz").unlink()
    assert "calibration" not in json.loads(znormseg("evaluate", *sides, "--json").out)
    assert "ECE" not in znormseg("evaluate", *sides).out


@pytest.mark.parametrize(
    ("voxels", "affine", "told"),
    [
        (np.full((20, 18, 10, 3), 2.0), AFFINE, "has values from 2 to 2; probabilities are from 0 to 1"),
        (np.full((20, 18, 10, 3), 0.5), np.diag([-1.0, -1.0, 3.0, 1.0]), "on a different grid than"),
        (np.full((20, 18, 10), 0.5), AFFINE, "volume 0 (from 0) of a 4D file is needed"),
    ],
)
def test_a_file_without_valid_probabilities_fails_its_case(
    voxels: Any, affine: Any, told: str, sides: tuple[Path, Path], znormseg: Call
) -> None:
    nib.save(nib.Nifti1Image(voxels.astype(np.float32), affine), sides[0] / "a_probabilities.nii.gz")
    ended = znormseg("evaluate", *sides)
    assert ended.code == 6
    assert told in ended.err


def test_a_case_without_any_tumour_has_no_calibration_error() -> None:
    empty = np.zeros((4, 4, 4), dtype=np.uint8)
    assert case_reliability(np.full((3, 4, 4, 4), 0.4, dtype=np.float32), empty, (1.0, 1.0, 1.0)) is None
    marked = from_regions(np.ones((3, 4, 4, 4), dtype=bool))
    assert case_reliability(np.full((3, 4, 4, 4), 0.4, dtype=np.float32), marked, (1.0, 1.0, 1.0)) is not None
