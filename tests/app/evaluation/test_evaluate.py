"""Scoring folders: matching of cases, label conventions and grids, the effect of a bad file, and the output."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from app.evaluation.evaluate import Evaluation, evaluate
from app.evaluation.folders import LabelMapsOnce
from app.evaluation.metrics import RegionScores
from data.datasets.source import DataSource
from data.errors import DataError

#: x grows to the patient's left, y to posterior: the voxel order of BraTS files.
AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])
#: All ways to store three axes, each forwards or backwards.
ORDERS = [np.column_stack([axes, signs]) for axes in permutations(range(3)) for signs in product((1, -1), repeat=3)]


def tumour(enhancing: int) -> npt.NDArray[np.uint8]:
    """Oedema around a necrotic core, with enhancing tumour written as ``enhancing``."""
    labels = np.zeros((12, 10, 8), dtype=np.uint8)
    labels[2:9, 2:8, 1:7] = 2
    labels[3:6, 3:6, 2:5] = 1
    labels[6:8, 3:6, 2:5] = enhancing
    return labels


def save(path: Path, labels: npt.NDArray[Any], affine: npt.NDArray[np.float64] = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(labels, affine), path)
    return path


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    """A folder for predictions and one for references, each with the cases a and b, without any error."""
    for case in ("a", "b"):
        save(tmp_path / "predicted" / f"{case}.nii.gz", tumour(4))
        save(tmp_path / "expected" / f"{case}.nii.gz", tumour(4))
    return tmp_path / "predicted", tmp_path / "expected"


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("room_bytes", [0, 1 << 20])
def test_a_label_map_read_once_is_returned_as_stored(tmp_path: Path, order: Any, room_bytes: int) -> None:
    path = save(tmp_path / "a.nii.gz", np.asarray(tumour(4), order=order))
    maps = LabelMapsOnce(frozenset({path}), room_bytes=room_bytes)
    assert maps.values(path) == {0, 1, 2, 4}
    for _ in range(2):
        np.testing.assert_array_equal(maps.give(path).voxels, tumour(4))


def test_a_kept_label_map_is_not_read_again_and_is_then_released(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", tumour(4))
    maps = LabelMapsOnce(frozenset({path}))
    maps.values(path)
    path.unlink()
    assert maps.give(path).voxels.sum() == tumour(4).sum()
    with pytest.raises(DataError, match="no such file"):
        maps.give(path)


@pytest.mark.parametrize(("labels", "values"), [(np.zeros((3, 3, 3)), {0}), (np.full((3, 3, 3), 2), {2})])
def test_the_values_of_an_empty_and_of_a_full_label_map_are_reported(tmp_path: Path, labels: Any, values: Any) -> None:
    path = save(tmp_path / "a.nii.gz", labels.astype(np.uint8))
    maps = LabelMapsOnce(frozenset({path}))
    assert maps.values(path) == values
    np.testing.assert_array_equal(maps.give(path).voxels, labels)


def dice_of(evaluation: Evaluation) -> list[list[float]]:
    return [[scores.regions[region].dice for region in ("WT", "TC", "ET")] for scores in evaluation.cases]


@pytest.mark.parametrize(("prediction", "reference"), [(3, 4), (4, 3), (4, 4), (3, 3)])
def test_either_side_may_use_either_label_convention(tmp_path: Path, prediction: int, reference: int) -> None:
    save(tmp_path / "predicted" / "BraTS-SSA-00001-000.nii.gz", tumour(prediction))
    save(tmp_path / "expected" / "BraTS-SSA-00001-000.nii.gz", tumour(reference))
    evaluation = evaluate(DataSource(tmp_path / "predicted"), DataSource(tmp_path / "expected"))
    assert dice_of(evaluation) == [[1, 1, 1]]
    assert evaluation.folders.reference_convention.name == {3: "brats2023", 4: "brats2021"}[reference]


def test_a_case_without_enhancing_tumour_uses_the_convention_of_its_folder(sides: tuple[Path, Path]) -> None:
    save(sides[0] / "a.nii.gz", tumour(2))
    evaluation = evaluate(*map(DataSource, sides))
    assert evaluation.folders.prediction_convention.name == "brats2021"
    assert evaluation.cases[0].regions["ET"].dice == 0


def test_label_maps_of_unknown_convention_are_refused_with_the_flag(sides: tuple[Path, Path]) -> None:
    save(sides[1] / "a.nii.gz", tumour(3))
    save(sides[1] / "b.nii.gz", tumour(3))
    with pytest.raises(DataError, match=r"expected: label values 0, 1, 2, 3 .* --labels: brats2023 .* msd .*3 in a"):
        evaluate(*map(DataSource, sides))
    predictions, references = map(DataSource, sides)
    assert dice_of(evaluate(predictions, replace(references, labels="brats2023"))) == [[1, 1, 1], [1, 1, 1]]
    assert dice_of(evaluate(predictions, replace(references, labels="msd")))[0] != [1, 1, 1]


def test_the_json_next_to_a_prediction_states_its_label_numbers(sides: tuple[Path, Path]) -> None:
    for case in ("a", "b"):
        save(sides[0] / f"{case}.nii.gz", tumour(3))
        (sides[0] / f"{case}.json").write_text(json.dumps({"labels": {"convention": "brats2023"}}))
    assert evaluate(*map(DataSource, sides)).folders.prediction_convention.name == "brats2023"


def test_two_storage_orders_of_one_grid_score_1(sides: tuple[Path, Path]) -> None:
    stored = nib.Nifti1Image(tumour(4), AFFINE).as_reoriented(np.array([[1, -1], [2, 1], [0, -1]]))
    nib.save(stored, sides[0] / "a.nii.gz")
    evaluation = evaluate(*map(DataSource, sides))
    assert dice_of(evaluation) == [[1, 1, 1], [1, 1, 1]]
    assert evaluation.cases[0].regions["WT"].hd95_mm == 0


def rotation(degrees: float, axis: int) -> npt.NDArray[np.float64]:
    turn, (i, j) = np.eye(4), [k for k in range(3) if k != axis]
    turn[i, i] = turn[j, j] = np.cos(np.deg2rad(degrees))
    turn[i, j], turn[j, i] = -np.sin(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return turn


@pytest.mark.parametrize("resample", [False, True])
@pytest.mark.parametrize("degrees", [0, 20, 45])
def test_all_storage_orders_of_one_grid_score_1(tmp_path: Path, degrees: float, resample: bool) -> None:
    """At 45 degrees rounding decides which of two axes is nearest to one of the world's."""
    for number, order in enumerate(ORDERS):
        image = nib.Nifti1Image(tumour(4), rotation(degrees, number % 3) @ AFFINE)
        save(tmp_path / "expected" / f"{number}.nii", tumour(4), image.affine)
        stored = image.as_reoriented(order)
        save(tmp_path / "predicted" / f"{number}.nii", np.asarray(stored.dataobj), stored.affine)
    evaluation = evaluate(DataSource(tmp_path / "predicted"), DataSource(tmp_path / "expected"), resample=resample)
    assert (evaluation.failures, evaluation.resampled) == ({}, ())
    assert dice_of(evaluation) == [[1, 1, 1]] * 48


def test_distances_and_volumes_use_the_spacing_of_the_file(sides: tuple[Path, Path]) -> None:
    save(sides[0] / "a.nii.gz", np.roll(tumour(4), 1, axis=2))
    scores = evaluate(*map(DataSource, sides)).cases[0].regions["WT"]
    assert scores.hd95_mm == 2.0
    assert scores.reference_volume_ml == pytest.approx(7 * 6 * 6 * 2 / 1000)


def test_different_grids_are_a_failure_naming_the_axis_and_the_distance(sides: tuple[Path, Path]) -> None:
    shifted = AFFINE.copy()
    shifted[1, 3] = 3.0
    path = save(sides[0] / "a.nii.gz", tumour(4), shifted)
    failure = evaluate(*map(DataSource, sides)).failures["a"]
    assert "3.00 mm on axis y" in failure
    assert failure.startswith("case a: ")
    assert str(path) in failure
    assert str(sides[1] / "a.nii.gz") in failure


def test_different_shapes_are_a_failure_naming_both(sides: tuple[Path, Path]) -> None:
    save(sides[0] / "a.nii.gz", tumour(4)[:-1])
    assert "11x10x8 against 12x10x8" in evaluate(*map(DataSource, sides)).failures["a"]


def test_different_grids_are_a_failure_naming_the_flag_that_resamples(sides: tuple[Path, Path]) -> None:
    save(sides[0] / "a.nii.gz", tumour(4)[:-1])
    evaluation = evaluate(*map(DataSource, sides))
    assert "Use --resample to resample the prediction to the grid of the reference." in evaluation.failures["a"]
    assert evaluation.resampled == ()


# Resampling


def save_shifted(path: Path) -> Path:
    """The tumour in its place, the field of view whole voxels further, stored in another order, with 4 for 3."""
    shifted = AFFINE @ np.array([[1, 0, 0, 2], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1]])
    image = nib.Nifti1Image(np.pad(tumour(4), 3)[5:, 4:, 4:-2], shifted).as_reoriented(ORDERS[29])
    return save(path, np.asarray(image.dataobj), image.affine)


def test_a_field_of_view_whole_voxels_away_scores_1_when_resampled(sides: tuple[Path, Path]) -> None:
    for case in ("a", "b"):
        save_shifted(sides[0] / f"{case}.nii.gz")
    evaluation = evaluate(*map(DataSource, sides), resample=True)
    assert dice_of(evaluation) == [[1, 1, 1], [1, 1, 1]]
    assert (evaluation.failures, evaluation.resampled) == ({}, ("a", "b"))


def test_cases_on_the_grid_of_their_reference_are_not_resampled(sides: tuple[Path, Path]) -> None:
    save_shifted(sides[0] / "b.nii.gz")
    save(sides[0] / "a.nii.gz", np.roll(tumour(4), 1, axis=0))
    evaluation = evaluate(*map(DataSource, sides), resample=True)
    assert evaluation.resampled == ("b",)
    assert evaluation.cases[0] == evaluate(*map(DataSource, sides)).cases[0]


def test_a_resampled_case_has_the_volumes_and_distances_of_its_reference(sides: tuple[Path, Path]) -> None:
    finer = AFFINE @ np.diag([1, 1, 0.5, 1])
    finer[2, 3] = -0.5
    save(sides[0] / "a.nii.gz", np.roll(tumour(4), 1, axis=2).repeat(2, axis=2), finer)
    resampled = evaluate(*map(DataSource, sides), resample=True).cases[0]
    save(sides[0] / "a.nii.gz", np.roll(tumour(4), 1, axis=2))
    assert resampled.resampled
    assert resampled.regions == evaluate(*map(DataSource, sides)).cases[0].regions


def test_a_finer_map_of_the_same_tumour_scores_1_when_resampled(sides: tuple[Path, Path]) -> None:
    finer = AFFINE @ np.diag([0.5, 0.5, 0.5, 1])
    finer[:3, 3] = (0.25, 0.25, -0.5)
    save(sides[0] / "a.nii.gz", tumour(4).repeat(2, 0).repeat(2, 1).repeat(2, 2), finer)
    evaluation = evaluate(*map(DataSource, sides), resample=True)
    assert evaluation.resampled == ("a",)
    assert dice_of(evaluation)[0] == [1, 1, 1]


def big_ball(affine: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Shells of 24, 18 and 12 mm around the world's origin."""
    places = np.tensordot(affine[:3, :3], np.indices((64, 64, 32)), 1) + affine[:3, 3].reshape(3, 1, 1, 1)
    return np.select([np.linalg.norm(places, axis=0) < mm for mm in (12, 18, 24)], [4, 1, 2]).astype(np.uint8)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_ball_on_a_grid_rotated_by_15_degrees_scores_high_when_resampled(tmp_path: Path, axis: int) -> None:
    affine = AFFINE.copy()
    affine[:3, 3] = (32, 32, -32)
    turned = rotation(15, axis) @ affine
    save(tmp_path / "predicted" / "a.nii", big_ball(turned), turned)
    save(tmp_path / "expected" / "a.nii", big_ball(affine), affine)
    evaluation = evaluate(DataSource(tmp_path / "predicted"), DataSource(tmp_path / "expected"), resample=True)
    assert evaluation.resampled == ("a",)
    assert min(dice_of(evaluation)[0]) > 0.95


def test_disjoint_fields_of_view_are_a_failure_and_not_a_score_of_0(sides: tuple[Path, Path]) -> None:
    away = AFFINE.copy()
    away[0, 3] = 400
    path = save(sides[0] / "a.nii.gz", tumour(4), away)
    evaluation = evaluate(*map(DataSource, sides), resample=True)
    assert [scores.case for scores in evaluation.cases] == ["b"]
    assert f"case a: {path} and {sides[1] / 'a.nii.gz'}: the grids do not overlap" in evaluation.failures["a"]
    assert "400.00 mm on axis x" in evaluation.failures["a"]


def test_the_command_line_reports_which_cases_were_resampled(
    sides: tuple[Path, Path], tmp_path: Path, znormseg: Callable[..., Any]
) -> None:
    save_shifted(sides[0] / "a.nii.gz")
    save(sides[0] / "b.nii.gz", tumour(4))
    ended = znormseg("evaluate", *sides, "--resample", "--json", "--out", tmp_path / "scores.csv")
    assert ended.code == 0
    assert "predictions resampled to the grid of their reference: a\n" in ended.err
    assert json.loads(ended.out)["resampled"] == ["a"]
    assert "resampled" not in (tmp_path / "scores.csv").read_text()


def test_the_command_line_names_the_first_of_many_resampled_cases(tmp_path: Path, znormseg: Callable[..., Any]) -> None:
    for number in range(7):
        save_shifted(tmp_path / "predicted" / f"{number}.nii.gz")
        save(tmp_path / "expected" / f"{number}.nii.gz", tumour(4))
    ended = znormseg("evaluate", tmp_path / "predicted", tmp_path / "expected", "--resample")
    assert "predictions resampled to the grid of their reference: 0, 1, 2 and 4 more\n" in ended.err
    assert "resampled" not in ended.out


def test_the_command_line_refuses_other_grids_without_the_flag(
    sides: tuple[Path, Path], znormseg: Callable[..., Any]
) -> None:
    save(sides[0] / "a.nii.gz", tumour(4)[:-1])
    ended = znormseg("evaluate", *sides, "--json")
    assert ended.code == 6
    assert "Use --resample" in ended.err
    assert json.loads(ended.out)["resampled"] == []


# Bad files


@pytest.mark.parametrize("side", [0, 1])
def test_one_damaged_file_does_not_hide_the_others(sides: tuple[Path, Path], side: int) -> None:
    damaged = sides[side] / "a.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:60])
    evaluation = evaluate(*map(DataSource, sides))
    assert [scores.case for scores in evaluation.cases] == ["b"]
    assert list(evaluation.failures) == ["a"]
    assert str(damaged) in evaluation.failures["a"]


def test_one_file_with_a_foreign_label_does_not_hide_the_others(sides: tuple[Path, Path]) -> None:
    path = save(sides[0] / "a.nii.gz", tumour(7))
    evaluation = evaluate(*map(DataSource, sides))
    assert [scores.case for scores in evaluation.cases] == ["b"]
    assert f"{path}: label values [7]" in evaluation.failures["a"]


def test_a_folder_that_mixes_conventions_is_refused_with_a_file_of_each(sides: tuple[Path, Path]) -> None:
    save(sides[1] / "a.nii.gz", tumour(3))
    with pytest.raises(DataError, match=r"expected: label values 3 and 4 .*3 in a, 4 in b"):
        evaluate(*map(DataSource, sides))


def test_if_nothing_can_be_scored_the_error_has_all_reasons(sides: tuple[Path, Path]) -> None:
    for case in ("a", "b"):
        save(sides[0] / f"{case}.nii.gz", tumour(4)[:-1])
    with pytest.raises(DataError, match=r"none of the 2 cases.*case a: .*11x10x8.*case b: "):
        evaluate(*map(DataSource, sides))


def test_cases_on_one_side_only_are_reported(sides: tuple[Path, Path]) -> None:
    save(sides[0] / "only_predicted.nii.gz", tumour(4))
    save(sides[1] / "only_expected.nii.gz", tumour(4))
    evaluation = evaluate(*map(DataSource, sides))
    assert evaluation.folders.missing_predictions == ("only_expected",)
    assert evaluation.folders.missing_references == ("only_predicted",)
    assert [scores.case for scores in evaluation.cases] == ["a", "b"]


def test_without_a_common_case_the_error_shows_ids_of_both_sides_and_naming_rules(tmp_path: Path) -> None:
    for number in range(5):
        save(tmp_path / "predicted" / f"p{number}.nii.gz", tumour(4))
    save(tmp_path / "expected" / "e0-seg.nii.gz", tumour(4))
    with pytest.raises(DataError, match=r"has p0, p1, p2 and 2 more; .* has e0\. .*<case>-seg\.nii\.gz"):
        evaluate(DataSource(tmp_path / "predicted"), DataSource(tmp_path / "expected"))


def test_predictions_are_matched_to_case_folders_with_a_seg_file(tmp_path: Path) -> None:
    case = "BraTS-GLI-00001-000"
    save(tmp_path / "predicted" / f"{case}.nii.gz", tumour(3))
    save(tmp_path / "expected" / case / f"{case}-seg.nii.gz", tumour(3))
    assert [
        scores.case for scores in evaluate(DataSource(tmp_path / "predicted"), DataSource(tmp_path / "expected")).cases
    ] == [case]


def test_each_case_is_reported_once_and_in_order_with_the_progress(sides: tuple[Path, Path]) -> None:
    save(sides[0] / "a.nii.gz", tumour(4)[:-1])
    announced: list[tuple[str, float]] = []
    evaluate(*map(DataSource, sides), on_case=lambda case, share: announced.append((case, share)))
    assert announced == [("a", 0.5), ("b", 1.0)]


def test_the_summary_is_the_mean_and_the_medians_are_medians(sides: tuple[Path, Path]) -> None:
    save(sides[0] / "b.nii.gz", tumour(2))
    for side in sides:
        save(side / "c.nii.gz", tumour(4))
    evaluation = evaluate(*map(DataSource, sides))
    assert evaluation.means()["ET"]["dice"] == pytest.approx(2 / 3)
    assert evaluation.means()["ET"]["hd95_mm"] == pytest.approx(374 / 3)
    assert evaluation.medians()["ET"]["dice"] == 1


def test_the_json_begins_with_means_and_cases_in_plain_floats(sides: tuple[Path, Path]) -> None:
    result: Any = evaluate(*map(DataSource, sides)).to_json()
    assert list(result)[:2] == ["regions", "cases"]
    assert list(result["regions"]) == ["WT", "TC", "ET"]
    assert list(result["regions"]["WT"])[:4] == ["dice", "hd95_mm", "sensitivity", "specificity"]
    assert list(result["cases"][0]) == ["case", "WT", "TC", "ET"]
    assert (
        list(result["cases"][0]["WT"])
        == list(result["regions"]["WT"])
        == [field.name for field in fields(RegionScores)]
    )
    assert {type(value) for scores in (result["regions"], result["cases"][0]) for value in scores["WT"].values()} == {
        float
    }
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_the_table_holds_cases_mean_and_median_in_full_precision(sides: tuple[Path, Path], tmp_path: Path) -> None:
    save(sides[0] / "a.nii.gz", np.roll(tumour(4), 1, axis=0))
    evaluation = evaluate(*map(DataSource, sides))
    evaluation.write_table(tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [line["case"] for line in table] == ["a", "b", "mean", "median"]
    assert list(table[0])[:3] == ["case", "WT_dice", "WT_hd95_mm"]
    assert float(table[0]["WT_dice"]) == evaluation.cases[0].regions["WT"].dice
    assert float(table[2]["ET_hd95_mm"]) == evaluation.means()["ET"]["hd95_mm"]


def test_rewriting_the_table_replaces_it_and_leaves_no_other_file(sides: tuple[Path, Path], tmp_path: Path) -> None:
    evaluation = evaluate(*map(DataSource, sides))
    place = tmp_path / "result"
    place.mkdir()
    (place / "scores.csv").write_text("old")
    evaluation.write_table(place / "scores.csv")
    assert [path.name for path in place.iterdir()] == ["scores.csv"]
    assert (place / "scores.csv").read_text().startswith("case,WT_dice,")


def test_a_table_path_that_cannot_be_written_is_refused(sides: tuple[Path, Path], tmp_path: Path) -> None:
    evaluation = evaluate(*map(DataSource, sides))
    with pytest.raises(DataError, match="a folder; give the name"):
        evaluation.write_table(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        evaluation.write_table(tmp_path / "nowhere" / "scores.csv")


def test_the_terminal_table_rounds_dice_to_3_and_hd95_to_1_decimal(sides: tuple[Path, Path]) -> None:
    save(sides[0] / "a.nii.gz", np.roll(tumour(4), 1, axis=2))
    table = evaluate(*map(DataSource, sides)).rows()
    assert table[0] == ["case", "WT Dice", "WT HD95 mm", "TC Dice", "TC HD95 mm", "ET Dice", "ET HD95 mm"]
    assert [row[0] for row in table[1:]] == ["a", "b", "mean", "median"]
    assert table[1][:3] == ["a", "0.833", "2.0"]
    assert table[2][:3] == ["b", "1.000", "0.0"]


def test_references_written_by_predict_cause_a_warning(sides: tuple[Path, Path], znormseg: Callable[..., Any]) -> None:
    assert "swapped" not in znormseg("evaluate", *sides).err
    (sides[1] / "a.json").write_text('{"made_from": {}}')
    (sides[1] / "b.json").write_text('["of a scanner"]')
    ended = znormseg("evaluate", *sides)
    assert ended.code == 0
    assert "predict wrote some references: a. Are PREDICTIONS and REFERENCES swapped?" in ended.err


def test_the_penalty_of_374_mm_is_explained_only_where_it_occurs(
    sides: tuple[Path, Path], znormseg: Callable[..., Any]
) -> None:
    assert "HD95 374 mm: only one label map has the region" not in znormseg("evaluate", *sides).out
    save(sides[0] / "a.nii.gz", np.where(tumour(4) == 4, 1, tumour(4)).astype(np.uint8))
    assert "HD95 374 mm: only one label map has the region" in znormseg("evaluate", *sides).out
