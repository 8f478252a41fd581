"""Names of files become cases and contrasts."""

from __future__ import annotations

import pytest

from app.service.recognise import recognised_cases

FOUR = ("t1", "t1ce", "t2", "flair")


def test_four_files_are_one_case() -> None:
    (case,) = recognised_cases([f"BraTS2021_00001_{ending}.nii.gz" for ending in FOUR])
    assert case.name == "BraTS2021_00001"
    assert dict(case.contrasts) == {"t1": 0, "t1c": 1, "t2": 2, "flair": 3}
    assert case.naming == "brats2021"
    assert case.problems == ()


def test_files_in_folders_are_one_case_each() -> None:
    cases = recognised_cases([f"set/p{number}/p{number}_{ending}.nii" for number in (1, 2) for ending in FOUR])
    assert [case.name for case in cases] == ["p1", "p2"]
    assert [sorted(case.contrasts.values()) for case in cases] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_several_cases_in_one_folder_are_distinguished() -> None:
    cases = recognised_cases([f"p{number}_{ending}.nii" for number in (1, 2) for ending in FOUR])
    assert [case.name for case in cases] == ["p1", "p2"]


def test_the_user_can_assign_contrasts_regardless_of_file_names() -> None:
    (case,) = recognised_cases(["scan5.nii", "scan6.nii", "notes.txt"], {0: "flair", 1: "t1"})
    assert dict(case.contrasts) == {"t1": 1, "flair": 0}
    assert case.notes == ("notes.txt: not one of the four contrasts; not used.",)


def test_a_duplicate_contrast_is_a_problem() -> None:
    (case,) = recognised_cases(["a_t1.nii", "a_t1w.nii"])
    assert case.problems == ("two files for t1: a_t1.nii, a_t1w.nii. Keep one of them.",)
    (stated,) = recognised_cases(["x.nii", "y.nii"], {0: "t1", 1: "t1"})
    assert stated.problems


def test_a_label_map_is_reported_but_not_used() -> None:
    (case,) = recognised_cases(["a_t1.nii", "a_seg.nii"])
    assert case.notes == ("a_seg.nii: not one of the four contrasts; not used.",)


def test_files_named_after_no_contrast_are_one_case_without_contrasts() -> None:
    (case,) = recognised_cases(["IM0001.nii", "IM0002.nii"])
    assert dict(case.contrasts) == {}


@pytest.mark.parametrize("names", [[], ["readme.txt"], ["../../x"]])
def test_files_without_images_give_no_case(names: list[str]) -> None:
    assert recognised_cases(names) == []
