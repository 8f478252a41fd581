"""Rankings of several sets of predictions: ranks, significance tests, score tables as input, refused input."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from lesion_pairs import lesion_pair

from app.evaluation.ranking.rank import permutation_p, rank, ranks
from app.evaluation.ranking.scores import Scored, load
from app.reports.ranking import render_ranking
from data.datasets.source import DataSource
from data.errors import DataError


def scored(name: str, dice: list[float], hd95_mm: list[float] | None = None) -> Scored:
    hd95_mm = hd95_mm or [5.0] * len(dice)
    cases = {
        f"case{n}": {("WT", "dice"): d, ("WT", "hd95_mm"): h}
        for n, (d, h) in enumerate(zip(dice, hd95_mm, strict=True))
    }
    return Scored(name=name, cases=cases)


def test_high_dice_and_low_hd95_have_the_first_rank() -> None:
    values = np.array([[[[0.9, 2.0]]], [[[0.5, 9.0]]]])
    assert ranks(values, ("dice", "hd95_mm")).tolist() == [[[[1, 1]]], [[[2, 2]]]]


@pytest.mark.parametrize("metric", ["ece", "brier"])
def test_low_errors_of_probabilities_have_the_first_rank(metric: str) -> None:
    sure, wrong = (Scored(name=name, cases={"x": {("WT", metric): value}}) for name, value in (("a", 0.1), ("b", 0.4)))
    assert rank([wrong, sure], (metric,)).order == [1, 0]


def test_equal_sets_share_their_ranks_and_show_no_difference() -> None:
    ranking = rank([scored("a", [0.5, 0.7]), scored("b", [0.5, 0.7])])
    assert ranking.mean_ranks.tolist() == [1.5, 1.5]
    assert (ranking.tests[0].p, ranking.differences[0].p, ranking.differences[0].mean) == (1.0, None, 0.0)


def test_mean_ranks_add_up_to_the_sum_of_all_places() -> None:
    rng = np.random.default_rng(1)
    ranking = rank([scored(name, rng.random(9).tolist(), rng.random(9).tolist()) for name in "abcd"])
    assert ranking.mean_ranks.sum() == pytest.approx(1 + 2 + 3 + 4)


def test_a_set_that_is_better_in_every_case_is_distinguished() -> None:
    low = np.linspace(0.3, 0.6, 12)
    ranking = rank([scored("low", low.tolist()), scored("high", (low + 0.2).tolist())])
    assert [ranking.names[place] for place in ranking.order] == ["high", "low"]
    difference = ranking.differences[0]
    assert difference.p_holm is not None
    assert max(ranking.tests[0].p, difference.p_holm) < 0.01
    assert difference.low == pytest.approx(-0.2) == difference.high


def test_swapping_two_sets_flips_the_signs_of_their_differences() -> None:
    one, other = scored("a", [0.1, 0.9, 0.4]), scored("b", [0.2, 0.5, 0.6])
    forth, back = (rank(pair).differences[0] for pair in ([one, other], [other, one]))
    assert (forth.mean, forth.low, forth.high) == pytest.approx((-back.mean, -back.high, -back.low), abs=0.02)


def test_with_equal_signs_the_permutation_p_value_is_two_in_two_to_the_n() -> None:
    assert permutation_p(np.ones(4)) == pytest.approx(2 / 16, abs=0.01)


def test_cases_missing_from_some_sets_are_left_out_and_counted() -> None:
    ranking = rank([scored("a", [0.5, 0.7, 0.8]), scored("b", [0.5, 0.7])])
    assert (ranking.cases, ranking.left_out) == (("case0", "case1"), ("case2",))


def test_sets_without_a_common_case_are_refused_with_example_ids_of_each() -> None:
    other = Scored(name="b", cases={"x": {("WT", "dice"): 1.0}})
    with pytest.raises(DataError, match="a has case0; b has x"):
        rank([scored("a", [0.5]), other])


def test_a_missing_metric_is_refused_with_the_available_ones() -> None:
    with pytest.raises(DataError, match=r"metric lesion_dice: .* dice, hd95_mm"):
        rank([scored("a", [0.5]), scored("b", [0.5])], ("lesion_dice",))


def test_untrusted_names_are_escaped_on_the_page_and_nothing_is_fetched() -> None:
    page = render_ranking(rank([scored("<b>", [0.5, 0.6]), scored("b", [0.7, 0.2])]))
    assert "<b>" not in page
    assert not re.search(r"(?:src|href)=|url\(", page)
    assert "case0" in page


def test_metrics_and_regions_from_a_table_are_escaped_on_the_page() -> None:
    measure = ("<i>r", "<i>m")
    sets = [
        Scored(name=name, cases={"x": {measure: value}, "y": {measure: value}})
        for name, value in (("a", 1.0), ("b", 2.0))
    ]
    page = render_ranking(rank(sets, ("<i>m",)))
    assert "<i>" not in page
    assert "&lt;i&gt;m" in page


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """References and two sets of predictions of three cases, the first one of them perfect."""
    for seed in range(3):
        prediction, reference = lesion_pair(seed + 3, (32, 32, 24))
        for name, voxels in (("refs", reference), ("best", reference), ("other", prediction)):
            (tmp_path / name).mkdir(exist_ok=True)
            image = nib.nifti1.Nifti1Image(voxels, np.diag([-1.0, -1.0, 1.0, 1.0]))
            nib.loadsave.save(image, tmp_path / name / f"BraTS-GLI-0000{seed}-000.nii.gz")
    return {name: tmp_path / name for name in ("refs", "best", "other")}


def test_the_command_ranks_folders_and_writes_csv_and_page(
    folders: dict[str, Path], tmp_path: Path, znormseg: Callable[..., Any]
) -> None:
    out, page = tmp_path / "rank.csv", tmp_path / "rank.html"
    files = ("--out", out, "--page", page, "--json")
    done = znormseg(
        "rank", folders["other"], folders["best"], "--references", folders["refs"], "--rules", "brats2023", *files
    )
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert [row["name"] for row in told["ranking"]] == ["best", "other"]
    assert told["metrics"] == ["lesion_dice", "lesion_hd95_mm"]
    with out.open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 6
    assert "Worst cases" in page.read_text(encoding="utf-8")


def test_tables_of_evaluate_rank_like_their_folders(
    folders: dict[str, Path], tmp_path: Path, znormseg: Callable[..., Any]
) -> None:
    tables = []
    for name in ("other", "best"):
        tables.append(tmp_path / f"{name}.csv")
        assert znormseg("evaluate", folders[name], folders["refs"], "--out", tables[-1]).code == 0
    (tmp_path / "best.json").write_text(
        znormseg("evaluate", folders["best"], folders["refs"], "--json").out, encoding="utf-8"
    )
    direct = rank(load([DataSource(folders["other"]), DataSource(folders["best"])], DataSource(folders["refs"]), None))
    for pair in (tables, [tables[0], tmp_path / "best.json"]):
        read = rank(load(list(map(DataSource, pair)), None, None))
        assert (read.values == direct.values).all()
        assert read.names == ("other", "best")


def test_a_spreadsheet_table_is_read_and_empty_cells_are_missing_scores(tmp_path: Path) -> None:
    for name in ("a", "b"):
        text = "case,WT_dice,WT_hd95_mm,WT_ece\nx,0.9,2,0.1\ny,0.8,3,\n"
        (tmp_path / f"{name}.csv").write_text(text, encoding="utf-8-sig")
    tables = load([DataSource(tmp_path / "a.csv"), DataSource(tmp_path / "b.csv")], None, None)
    assert rank(tables).cases == ("x", "y")
    with pytest.raises(DataError, match="metric ece: not every set has it"):
        rank(tables, ("ece",))


def spoil(label_map: Path) -> None:
    """Move a label map by 5 mm: it is on a different grid than its reference."""
    image: Any = nib.loadsave.load(label_map)
    moved = image.affine.copy()
    moved[0, 3] += 5
    nib.loadsave.save(nib.nifti1.Nifti1Image(np.asarray(image.dataobj), moved), label_map)


@pytest.mark.parametrize("spoilt", [("best",), ("best", "other")])
def test_a_case_that_cannot_be_scored_is_named_counted_and_sets_the_exit_code(
    spoilt: tuple[str, ...], folders: dict[str, Path], znormseg: Callable[..., Any]
) -> None:
    for name in spoilt:
        spoil(folders[name] / "BraTS-GLI-00002-000.nii.gz")
    (folders["other"] / "BraTS-GLI-00001-000.nii.gz").unlink()
    done = znormseg("rank", folders["best"], folders["other"], "--references", folders["refs"], "--json")
    assert done.code == 6
    told = json.loads(done.out)
    assert told["cases_left_out"] == 2
    assert told["left_out"] == ["BraTS-GLI-00001-000", "BraTS-GLI-00002-000"]
    assert set(told["failures"]) == set(spoilt)
    assert all(f"znormseg: {name}: BraTS-GLI-00002-000: " in done.err for name in spoilt)
    assert (
        "2 cases left out, as not every set has scores for them: BraTS-GLI-00001-000, BraTS-GLI-00002-000" in done.err
    )


def test_a_json_table_lists_the_failed_cases(folders: dict[str, Path], znormseg: Callable[..., Any]) -> None:
    spoil(folders["best"] / "BraTS-GLI-00002-000.nii.gz")
    table = folders["best"] / "best.json"
    table.write_text(znormseg("evaluate", folders["best"], folders["refs"], "--json").out, encoding="utf-8")
    ranking = rank(load([DataSource(table), DataSource(folders["other"])], DataSource(folders["refs"]), None))
    assert (ranking.left_out, set(ranking.failures)) == (("BraTS-GLI-00002-000",), {"best"})


def test_ambiguous_label_numbers_can_be_specified_for_sets_and_references(
    folders: dict[str, Path], znormseg: Callable[..., Any]
) -> None:
    for folder in folders.values():
        for number, label_map in enumerate(sorted(folder.glob("*.nii.gz"))):
            label_map.rename(folder / f"patient{number}_seg.nii.gz")
    asked = ("rank", folders["best"], folders["other"], "--references", folders["refs"], "--json")
    assert "--labels" in znormseg(*asked).err
    done = znormseg(*asked, "--labels", "brats2023")
    assert (done.code, json.loads(done.out)["ranking"][0]["name"]) == (0, "best"), done.err
    assert json.loads(znormseg(*asked, "--labels", "brats2023,msd").out)["ranking"][0]["dice"] < 1


def json_tables(folder: Path, *told: dict[str, str]) -> list[Scored]:
    """A table in CSV, which does not record how it was scored, and one in JSON for each of ``told``."""
    (folder / "a.csv").write_text("case,WT_dice,WT_hd95_mm,WT_nsd\nx,1,0,1\n", encoding="utf-8")
    files = [folder / "a.csv"]
    for name, content in zip("bcd", told, strict=False):
        cases = [{"case": "x", "WT": {"dice": 1.0, "hd95_mm": 0.0, "nsd": 1.0}}]
        files.append(folder / f"{name}.json")
        files[-1].write_text(json.dumps({"cases": cases, **content}), encoding="utf-8")
    return load(list(map(DataSource, files)), None, None)


@pytest.mark.parametrize("other", [{}, {"rules": "brats2023", "task": "GLI"}, {"rules": "brats2024", "task": "PED"}])
def test_scores_by_different_rules_are_refused_naming_both(other: dict[str, str], tmp_path: Path) -> None:
    first = {"rules": "brats2024", "task": "GLI"}
    rank(json_tables(tmp_path, first, first))
    shown = " ".join(other.values()) or "no rules"
    with pytest.raises(DataError, match=rf"^b and c were scored .*: brats2024 GLI; {shown}\. .* --rules and --task"):
        rank(json_tables(tmp_path, first, other))


def test_surface_dice_at_two_tolerances_is_not_ranked(tmp_path: Path) -> None:
    tables = json_tables(tmp_path, {"nsd_definition": "at 1 mm"}, {"nsd_definition": "at 2 mm"})
    assert rank(tables).metrics == ("dice", "hd95_mm")
    with pytest.raises(DataError, match=r"at 1 mm; at 2 mm\. .* --nsd-mm"):
        rank(tables, ("dice", "nsd"))


def test_a_folder_without_references_is_refused(folders: dict[str, Path], znormseg: Callable[..., Any]) -> None:
    done = znormseg("rank", folders["best"], folders["other"])
    assert done.code == 3
    assert "--references" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "case,WT_dice\nx,nan\n", "case,WT_dice\nx,\n"])
def test_a_file_that_is_not_a_table_is_refused(tmp_path: Path, text: str) -> None:
    good, bad = tmp_path / "good.csv", tmp_path / "bad.csv"
    good.write_text("case,WT_dice\nx,1\n", encoding="utf-8")
    bad.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.csv"):
        load([DataSource(good), DataSource(bad)], None, None)


def test_a_set_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="given twice"):
        load([DataSource(tmp_path), DataSource(tmp_path)], None, None)
