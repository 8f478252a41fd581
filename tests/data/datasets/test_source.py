"""Several data sets in one value: their ids, patients and conventions, and synthetic cases of one of them."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.datasets import naming, source
from data.datasets.case import Case
from data.datasets.label_stats import LabelStats, read_label_maps
from data.datasets.layouts import patients_of
from data.datasets.source import DataSource, data_source
from data.datasets.splits import Split, stratified_split, with_synthetic
from data.errors import DataError

Call = Callable[..., Any]


def test_the_examples_in_the_docstrings_hold() -> None:
    assert [doctest.testmod(module).failed for module in (source, naming)] == [0, 0]


def test_each_case_of_several_data_sets_knows_its_data_set(render: Call, tmp_path: Path) -> None:
    early, late = render(tmp_path / "early", "2021").root, render(tmp_path / "late", "2023 GLI").root
    cases = data_source([str(late), str(early)]).find_cases()
    assert list(cases) == sorted(cases)
    assert {case_id: case.data_set for case_id, case in cases.items()} == {
        "BraTS-GLI-00001-000": 0,
        "BraTS-GLI-00002-000": 0,
        "BraTS2021_00000": 1,
        "BraTS2021_00002": 1,
    }


def test_an_id_in_two_data_sets_is_refused_with_both_paths(render: Call, tmp_path: Path) -> None:
    for place in ("one", "other"):
        render(tmp_path / place, "2021")
    with pytest.raises(DataError) as refused:
        data_source([str(tmp_path / "one"), str(tmp_path / "other")]).find_cases()
    message = str(refused.value)
    assert "case BraTS2021_00000 is in two data sets" in message
    assert all(str(tmp_path / place / "BraTS2021_00000") in message for place in ("one", "other"))
    assert "(2 such ids in all)" in message
    assert "or give them other ids in a manifest (.csv); no file has to be renamed." in message


def test_each_data_set_is_read_with_its_own_convention(render: Call, tmp_path: Path) -> None:
    data = DataSource(
        render(tmp_path / "early", "2021").root, others=(DataSource(render(tmp_path / "late", "2023 GLI").root),)
    )
    cases = data.find_cases()
    conventions = data.decide_conventions(cases, read_label_maps(cases.values()))
    assert [convention.name for convention in conventions] == ["brats2021", "brats2023"]


def test_a_data_set_with_an_ambiguous_convention_is_named(render: Call, tmp_path: Path) -> None:
    early, flat = render(tmp_path / "early", "2021").root, render(tmp_path / "flat", "flat").root
    data = data_source([str(early), str(flat)])
    cases = data.find_cases()
    maps = read_label_maps(cases.values())
    with pytest.raises(DataError, match=rf"{flat}: label values .*--labels takes one name for each"):
        data.decide_conventions(cases, maps)
    named = data.with_labels(["brats2021", "msd"]).decide_conventions(cases, maps)
    assert [convention.name for convention in named] == ["brats2021", "msd"]


def test_a_synthetic_case_has_its_own_id_and_the_patient_of_the_real_case(render: Call, tmp_path: Path) -> None:
    root = render(tmp_path, "2023 GLI").root
    cases = data_source([str(root), f"synthetic:{root}"]).find_cases()
    made = cases["synthetic-BraTS-GLI-00001-000"]
    assert (made.patient, made.synthetic, made.data_set) == ("BraTS-GLI-00001", True, 1)
    assert made.files == cases["BraTS-GLI-00001-000"].files
    assert made.require() is made


@pytest.mark.parametrize("reverse", [False, True])
def test_a_manifest_also_gives_patients_to_synthetic_cases_of_another_data_set(
    *, reverse: bool, render: Call, tmp_path: Path
) -> None:
    root = render(tmp_path / "cases", "2021").root
    columns = {"t1": "t1", "t1c": "t1ce", "t2": "t2", "flair": "flair", "seg": "seg"}
    rows = [f"case,{','.join(columns)},patient"]
    for case in ("BraTS2021_00000", "BraTS2021_00002"):
        files = [f"cases/{case}/{case}_{ending}.nii.gz" for ending in columns.values()]
        rows.append(",".join([case, *files, "P1"]))
    (tmp_path / "cases.csv").write_text("\n".join(rows))
    given = [str(tmp_path / "cases.csv"), f"synthetic:{root}"]
    cases = data_source(given[::-1] if reverse else given).find_cases()
    assert len(cases) == 4
    assert {case.patient for case in cases.values()} == {"P1"}


def test_a_synthetic_case_is_not_trained_on_if_its_real_case_is_for_validation() -> None:
    patients = {"a": "a", "b": "b", "synthetic-a": "P1", "synthetic-b": "P2"}
    split = with_synthetic(Split(train=("a",), validation=("b",)), patients, ["synthetic-a", "synthetic-b"])
    assert split.train == ("a", "synthetic-a")


def test_the_prefix_needs_a_data_set() -> None:
    with pytest.raises(DataError, match="synthetic: names no data set"):
        data_source(["A", "synthetic:", "A"])


def test_cases_without_label_map_have_no_synthetic_ones(render: Call, tmp_path: Path) -> None:
    root = render(tmp_path, "2021").root
    (root / "BraTS2021_00000" / "BraTS2021_00000_seg.nii.gz").unlink()
    assert list(data_source([f"synthetic:{root}"]).find_cases()) == ["synthetic-BraTS2021_00002"]


def test_synthetic_cases_of_a_folder_without_labels_are_refused(render: Call, tmp_path: Path) -> None:
    root = render(tmp_path, "2021").root
    for path in root.rglob("*_seg.nii.gz"):
        path.unlink()
    with pytest.raises(DataError, match=rf"synthetic:{root}: none of 2 cases has a label map .* Add them"):
        data_source([f"synthetic:{root}"]).find_cases()


def test_arguments_are_parsed_as_written() -> None:
    arguments = ("A", "synthetic:B", "/c/d.csv")
    assert data_source(arguments).arguments == arguments
    assert data_source(data_source(arguments).resolved().arguments) == data_source(arguments).resolved()


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=30), st.integers(0, 4))
def test_folds_keep_patients_together_and_never_validate_on_synthetic_cases(
    drawn: list[tuple[int, bool]], fold: int
) -> None:
    cases = {
        (case_id := f"{'synthetic-' if synthetic else ''}{number}"): Case(
            id=case_id, folder=Path(), stated_patient=f"p{patient}", synthetic=synthetic
        )
        for number, (patient, synthetic) in enumerate(drawn)
    }
    patients = patients_of(cases.values())
    real = [case_id for case_id, case in cases.items() if not case.synthetic]
    tumours = {case_id: LabelStats(volume_um3=int(case_id), enhances=True) for case_id in real}
    count = len({patients[case_id] for case_id in real})
    if count < 2:
        return
    split = stratified_split(tumours, patients, fold % min(5, count))
    joined = with_synthetic(split, patients, cases.keys() - set(real))
    assert not {patients[one] for one in joined.train} & {patients[one] for one in joined.validation}
    assert joined.validation == split.validation
    left = cases.keys() - set(joined.cases)
    assert all(cases[one].synthetic and patients[one] in {patients[v] for v in split.validation} for one in left)
