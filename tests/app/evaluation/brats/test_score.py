"""Scores by the rules of the challenges: equal to those of their own scripts, and invariants for any label maps."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from lesion_pairs import lesion_pair
from scipy import ndimage

from app.evaluation.brats import score
from app.evaluation.brats.evaluate import evaluate_officially
from app.evaluation.brats.lesions import components, counted, dilated, joined_by, joined_components, touching
from app.evaluation.brats.rules import rules_for
from app.evaluation.brats.score import OfficialScores, border_dice, official_scores
from data.datasets.source import DataSource
from data.errors import DataError
from data.labels import BRATS2024, BRATS2024_PED, CAVITY, decode_tissues

FOLDER = Path(__file__).parents[3] / "golden"
GOLDEN = json.loads((FOLDER / "official_scores.json").read_text(encoding="utf-8"))
NSD = json.loads((FOLDER / "official_nsd.json").read_text(encoding="utf-8"))
TABLE = json.loads((FOLDER / "official_table.json").read_text(encoding="utf-8"))
MM = (1.0, 1.0, 1.0)
SPACINGS = (MM, MM, MM, (0.75, 1.5, 2.0))
LABELS = {"PED": (1, 2, 3, 4), "MEN-RT": (1,)}


def scores_of(row: Mapping[str, Any], golden: Mapping[str, Any], spacing_mm: tuple[float, float, float]) -> Any:
    """Region by region, the number of every column of the golden file."""
    year, task = row["rules"], row["task"]
    of_2024 = (1, 2, 3, 4) if task == "GLI" or year == "brats2024-f1131e3" else LABELS.get(task, (1, 2, 3))
    labels = (1, 2, 3) if year == "brats2023" else of_2024
    convention = BRATS2024_PED if (year, task) == ("brats2024", "PED") else BRATS2024
    pair = lesion_pair(row["seed"], tuple(golden["shape"]), labels, golden["size"])
    prediction, reference = (decode_tissues(side, convention) for side in pair)
    scores = official_scores(prediction, reference, spacing_mm, rules_for(year, task))
    columns = golden["columns"][f"{year} {task}"]
    return {region: [getattr(found, column) for column in columns] for region, found in scores.items()}


def require_equal(row: Mapping[str, Any], golden: Mapping[str, Any], within: float = 1e-9) -> None:
    found = scores_of(row, golden, SPACINGS[row["seed"] % 4])
    assert list(found) == list(row["regions"])
    for region, expected in row["regions"].items():
        assert found[region] == pytest.approx(expected, abs=within), (row["rules"], row["task"], row["seed"], region)


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 8))])
def test_200_random_pairs_match_the_official_scripts(part: int) -> None:
    rows = GOLDEN["pairs"][part::8]
    assert len(rows) == 25
    for row in rows:
        require_equal(row, GOLDEN)


@pytest.mark.parametrize("rules", NSD["columns"])
def test_100_more_pairs_match_the_scripts_or_our_reading_of_them(rules: str) -> None:
    rows = [row for row in NSD["pairs"] if f"{row['rules']} {row['task']}" == rules]
    assert len(rows) == 100
    for row in rows:
        require_equal(row, NSD, within=1e-6)  # written with nine decimals


@pytest.mark.parametrize("year", ["brats2023", "brats2024"])
@pytest.mark.parametrize("row", TABLE["rows"], ids=lambda row: row["case"])
def test_the_golden_table_matches_in_every_column(row: dict[str, Any], year: str) -> None:
    shape, expected = TABLE["shapes"][year], row[year]

    def boxes(corners: list[list[int]]) -> npt.NDArray[np.uint8]:
        codes = np.zeros(shape, dtype=np.uint8)
        for x, y, z, size in corners:
            codes[x : x + size, y : y + size, z : z + size] = 3
        return codes

    found = official_scores(boxes(row["prediction"]), boxes(row["reference"]), MM, rules_for(year, "GLI"))["ET"]
    given = [found.lesion_dice, found.lesion_hd95_mm, found.dice, found.hd95_mm]
    assert given == pytest.approx(expected, abs=5e-5)  # recorded with four decimals


def test_the_sensitivity_of_2024_counts_lesion_numbers() -> None:
    codes = np.zeros((40, 20, 20), dtype=np.uint8)
    codes[2:8, 5:11, 5:11] = codes[28:34, 5:11, 5:11] = 3
    both = official_scores(codes, codes, MM, rules_for("brats2024", "GLI"))["ET"]
    assert both.sensitivity == pytest.approx(1 / 3)
    assert official_scores(codes, codes, MM, rules_for("brats2023", "GLI"))["ET"].sensitivity == pytest.approx(1.0)


def test_more_background_changes_only_specificity() -> None:
    pair = [decode_tissues(side, BRATS2024) for side in lesion_pair(1003, labels=(1, 2, 3, 4))]
    rules = rules_for("brats2024", "GLI")
    small, large = (official_scores(one, other, MM, rules) for one, other in (pair, [np.pad(side, 9) for side in pair]))
    for region in small:
        kept = [{**vars(scores[region]), "specificity": 0} for scores in (small, large)]
        assert kept[0] == kept[1]


def test_a_label_map_scored_against_itself_is_perfect_by_all_rules_of_2023() -> None:
    codes = decode_tissues(lesion_pair(5)[0], BRATS2024)
    for found in official_scores(codes, codes, MM, rules_for("brats2023", "MET")).values():
        assert (found.lesion_dice, found.lesion_hd95_mm, found.dice, found.hd95_mm) == (1, 0, 1, 0)
        assert found.false_positives == found.false_negatives == 0


def test_nearby_lesions_are_one_after_dilation() -> None:
    mask = np.zeros((30, 9, 9), dtype=bool)
    mask[4, 4, 4] = mask[10, 4, 4] = mask[24, 4, 4] = True
    assert [joined_components(mask, steps).most for steps in (1, 2, 3)] == [3, 3, 2]


def test_lesions_that_touch_the_same_lesion_are_merged() -> None:
    own, other = np.zeros((2, 20, 5, 5), dtype=bool)
    own[2:4, 2, 2] = own[7:9, 2, 2] = own[15, 2, 2] = True
    other[4:7, 2, 2] = True
    joined = joined_by(components(own), components(other))
    assert [len(np.unique(counted(found).numbers)) - 1 for found in (components(own), joined)] == [3, 2]


def test_a_single_touching_pair_merges_nothing() -> None:
    own, other = np.zeros((2, 20, 5, 5), dtype=bool)
    own[2:4, 2, 2] = other[4:7, 2, 2] = own[15, 2, 2] = True
    lesions = components(own)
    assert touching(lesions.numbers, components(other).numbers) == [(1, 1)]
    assert joined_by(lesions, components(other)) is lesions


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        official_scores(np.zeros((3, 3, 3), np.uint8), np.zeros((3, 3, 4), np.uint8), MM, rules_for("brats2023", "GLI"))


def test_a_task_that_the_year_does_not_have_is_refused_with_the_valid_tasks() -> None:
    with pytest.raises(DataError, match=r"brats2023 has no such task; choose from GLI, PED, SSA, MEN, MET\."):
        rules_for("brats2023", "MEN-RT")


def test_a_year_without_rules_is_refused() -> None:
    with pytest.raises(DataError, match="brats2023, brats2024, brats2024-f1131e3 and brats2026"):
        rules_for("brats2019", "GLI")


def test_the_later_script_of_met_scores_the_cavity_and_penalises_by_the_diagonal() -> None:
    reference, prediction = np.zeros((2, 30, 40, 50), dtype=np.uint8)
    reference[5:9, 5:9, 5:9], prediction[5:9, 5:9, 5:9], reference[20:24, 20:24, 20:24] = 3, 3, CAVITY
    later = official_scores(prediction, reference, MM, rules_for("brats2024-f1131e3", "MET"))
    assert list(later) == ["WT", "TC", "ET", "RC"]
    assert (later["RC"].lesion_hd95_mm, later["RC"].hd95_mm) == pytest.approx((5000**0.5, 5000**0.5))
    assert "RC" not in official_scores(prediction, reference, MM, rules_for("brats2024", "MET"))


def test_met_is_scored_as_in_the_challenge_unless_the_later_script_is_requested() -> None:
    assert rules_for("brats2024", "MET").penalty_mm == 374.0
    with pytest.raises(DataError, match=r"brats2024-f1131e3 has no such task; choose from MET\."):
        rules_for("brats2024-f1131e3", "GLI")


def test_every_task_of_2024_has_surface_dice_and_no_task_of_2023_does() -> None:
    codes = decode_tissues(lesion_pair(5, labels=(1,))[1], BRATS2024)
    for year, task, has in (("brats2024", "MEN-RT", True), ("brats2024", "SSA", True), ("brats2023", "SSA", False)):
        for found in official_scores(codes, codes, MM, rules_for(year, task)).values():
            assert (found.nsd_10 is not None) == (found.lesion_nsd_05 is not None) == has


def test_a_surface_half_a_millimetre_off_agrees_at_that_tolerance() -> None:
    reference, prediction = np.zeros((2, 20, 20, 20), dtype=np.bool_)
    reference[5:10, 5:10, 5:10] = prediction[6:11, 5:10, 5:10] = True
    half, whole = border_dice(prediction, reference, (0.5, 2.0, 2.0), (0.5, 1.0))
    assert half == pytest.approx(whole) == pytest.approx(1)  # all lie within the one step of 0.5 mm
    assert border_dice(prediction, reference, (1.5, 2.0, 2.0), (0.5, 1.0))[1] < 1


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of two cases each, predictions with 3 and references with 4 for enhancing tumour."""
    for seed, case in enumerate(("BraTS2021_00001", "BraTS2021_00002")):
        for side, labels, voxels in zip(("p", "r"), ((1, 2, 3), (1, 2, 4)), lesion_pair(seed + 5), strict=True):
            table = np.array([0, *labels], dtype=np.uint8)
            (tmp_path / side).mkdir(exist_ok=True)
            image = nib.nifti1.Nifti1Image(table[voxels], np.diag([-1.0, -1.0, 1.0, 1.0]))
            nib.loadsave.save(image, tmp_path / side / f"{case}.nii.gz")
    return tmp_path / "p", tmp_path / "r"


def test_label_numbers_are_decoded_before_the_rules_apply(sides: tuple[Path, Path]) -> None:
    rules = rules_for("brats2023", "GLI")
    predictions, references = DataSource(sides[0], labels="brats2023"), DataSource(sides[1])
    cases = evaluate_officially(predictions, references, rules).cases
    one, other = (decode_tissues(side, BRATS2024) for side in lesion_pair(5))
    expected = official_scores(one, other, MM, rules)
    assert cases[0].regions == expected


def test_the_command_writes_every_number_of_the_script(
    sides: tuple[Path, Path], tmp_path: Path, znormseg: Callable[..., Any]
) -> None:
    out = tmp_path / "scores.csv"
    common = ("--rules", "brats2024", "--task", "MEN", "--labels", "brats2023,brats2021")
    done = znormseg("evaluate", *sides, *common, "--out", out, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    with out.open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["case"] for row in table] == ["BraTS2021_00001", "BraTS2021_00002", "mean", "median"]
    assert {f"ET_{name}" for name in OfficialScores.__dataclass_fields__} <= set(table[0])
    assert float(table[2]["ET_lesion_nsd_10"]) == told["regions"]["ET"]["lesion_nsd_10"]
    assert (told["rules"], told["task"]) == ("brats2024", "MEN")


def test_label_maps_with_several_tissues_are_refused_for_men_rt(sides: tuple[Path, Path]) -> None:
    image = nib.nifti1.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.diag([-1.0, -1.0, 1.0, 1.0]))
    for side in sides:
        nib.loadsave.save(image, side / "BraTS2021_00002.nii.gz")
    predictions, references = map(DataSource, sides)
    evaluation = evaluate_officially(predictions, references, rules_for("brats2024", "MEN-RT"))
    assert [case.case for case in evaluation.cases] == ["BraTS2021_00002"]
    assert "other than 0 and 1, the only ones of MEN-RT" in evaluation.failures["BraTS2021_00001"]


def with_pixdim(sides: tuple[Path, Path], edge_mm: float, which: int) -> None:
    """Give a label map of one side a header that says another voxel size than its affine."""
    path = sides[which] / "BraTS2021_00001.nii.gz"
    image = nib.nifti1.Nifti1Image.from_filename(path)
    image.set_sform(image.affine, code=1)
    image.set_qform(None, code=0)
    image.header["pixdim"][3] = edge_mm
    nib.loadsave.save(image, path)
    assert nib.nifti1.Nifti1Image.from_filename(path).header.get_zooms()[2] == edge_mm


@pytest.mark.parametrize("side", [0, 1])
def test_a_pixdim_that_contradicts_the_affine_is_ignored_with_a_warning(
    sides: tuple[Path, Path], znormseg: Callable[..., Any], side: int
) -> None:
    common = ("evaluate", *sides, "--rules", "brats2023", "--labels", "brats2023,brats2021", "--json")
    before = json.loads(znormseg(*common).out)
    with_pixdim(sides, 3.0, side)
    done = znormseg(*common)
    after = json.loads(done.out)
    assert after["cases"] == before["cases"]
    assert after["pixdim_not_followed_mm"] == {"BraTS2021_00001": [1.0, 1.0, 3.0]}
    assert "BraTS2021_00001, pixdim is 1 x 1 x 3 mm. The affine is used" in done.err


def test_a_pixdim_rounded_to_single_precision_does_not_contradict_the_affine(
    sides: tuple[Path, Path], znormseg: Callable[..., Any]
) -> None:
    with_pixdim(sides, float(np.float32(1 + 1e-6)), 0)
    done = znormseg("evaluate", *sides, "--labels", "brats2023,brats2021")
    assert done.code == 0
    assert "pixdim" not in done.err


def test_a_contradictory_pixdim_also_causes_a_warning_without_rules(
    sides: tuple[Path, Path], znormseg: Callable[..., Any]
) -> None:
    with_pixdim(sides, 0.5, 1)
    assert "1 x 1 x 0.5 mm" in znormseg("evaluate", *sides, "--labels", "brats2023,brats2021").err


@pytest.mark.parametrize("flags", [["--task", "PED"], ["--rules", "brats2023", "--resample"]])
def test_incompatible_options_are_a_usage_error(
    sides: tuple[Path, Path], znormseg: Callable[..., Any], flags: list[str]
) -> None:
    assert znormseg("evaluate", *sides, *flags).code == 2


def test_scoring_imports_neither_monai_nor_torch() -> None:
    code = (
        "import sys, numpy as np; from app.evaluation import evaluate, metrics; "
        "from app.evaluation.brats import evaluate; "
        "m = np.ones((3, 3, 3), bool); metrics.hausdorff95_mm(m, m, (1, 1, 1)); "
        "assert not {'torch', 'monai'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("steps", [0, 1, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_the_fast_dilation_equals_that_of_scipy(seed: int, steps: int) -> None:
    mask = np.random.default_rng(seed).random((11, 9, 7)) < 0.02 * (seed + 1)
    kept = mask.copy()
    neighbours = ndimage.generate_binary_structure(3, 2)
    expected = ndimage.binary_dilation(mask, neighbours, iterations=steps) if steps else mask
    np.testing.assert_array_equal(dilated(mask, steps), expected)
    np.testing.assert_array_equal(mask, kept)


def test_cropping_to_each_region_does_not_change_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = lesion_pair(5, (40, 44, 36), (1, 2, 3))
    cropped = official_scores(one, other, MM, rules_for("brats2023", "GLI"))
    monkeypatch.setattr(score, "_cropped", lambda masks, margin: masks)
    assert official_scores(one, other, MM, rules_for("brats2023", "GLI")) == cropped


def test_the_terminal_output_states_false_positive_and_missed_lesions(
    tmp_path: Path, znormseg: Callable[..., Any]
) -> None:
    for side, place in (("predicted", 4), ("expected", 24)):
        voxels = np.zeros((36, 20, 20), dtype=np.uint8)
        voxels[place : place + 6, 4:10, 4:10] = 3
        (tmp_path / side).mkdir()
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / side / "a.nii.gz")
    words = [tmp_path / "predicted", tmp_path / "expected", "--rules", "brats2023", "--labels", "brats2023"]
    shown = znormseg("evaluate", *words).out
    assert "WT lesion Dice" in shown
    assert "predicted lesions that touch no reference lesion: WT 1, TC 1, ET 1" in shown
    assert "reference lesions that were missed: WT 1, TC 1, ET 1" in shown
    assert "each of them counts with Dice 0 and an HD95 of 374 mm" in shown


@pytest.mark.parametrize(
    ("rules", "task", "said"),
    [
        ("brats2024-f1131e3", "MET", "each of them counts with Dice 0 and an HD95 of the grid's diagonal in voxels"),
        ("brats2024", "MEN-RT", "each missed one counts with Dice 0 and an HD95 of the grid's diagonal"),
    ],
)
def test_the_terminal_output_states_that_the_penalty_is_the_diagonal(
    tmp_path: Path, znormseg: Callable[..., Any], rules: str, task: str, said: str
) -> None:
    for side, place in (("predicted", 4), ("expected", 24)):
        voxels = np.zeros((36, 20, 20), dtype=np.uint8)
        voxels[place : place + 6, 4:10, 4:10] = 1
        (tmp_path / side).mkdir()
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / side / "a.nii.gz")
    words = ["evaluate", tmp_path / "predicted", tmp_path / "expected", "--rules", rules, "--task", task]
    assert said in znormseg(*words, "--labels", "brats2023").out


def test_earlier_years_are_refused_with_a_hint_to_omit_the_option() -> None:
    with pytest.raises(DataError, match="Without --rules, whole regions are scored, as in the challenges up to 2022"):
        rules_for("brats2021", "GLI")
