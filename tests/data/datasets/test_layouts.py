"""Recognising data sets: names of both eras, missing or duplicate files, and the patient of each case."""

from __future__ import annotations

import doctest
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data.datasets import layouts
from data.datasets.label_stats import convention_of
from data.datasets.layouts import Case, case_from_files, decide_for, find_cases, find_label_cases
from data.datasets.patients import patient_of
from data.errors import DataError
from data.labels import CONTRASTS, Contrast

NAMES_2021 = ["_t1", "_t1ce", "_t2", "_flair"]
NAMES_2023 = ["-t1n", "-t1c", "-t2w", "-t2f"]


def touch(folder: Path, *names: str) -> Path:
    """Create empty files: finding a case does not open them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def make_case(folder: Path, names: list[str] = NAMES_2021, ending: str = ".nii.gz", seg: str | None = None) -> Path:
    return touch(folder, *(f"{folder.name}{name}{ending}" for name in [*names, *([seg] if seg else [])]))


def write_labels(path: Path, values: list[int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.array(values, dtype=np.uint8).reshape(-1, 1, 1), np.eye(4)), path)
    return path


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".NII.GZ"])
@pytest.mark.parametrize(
    ("names", "seg", "naming"), [(NAMES_2021, "_seg", "brats2021"), (NAMES_2023, "-seg", "brats2023")]
)
def test_a_case_in_either_naming_is_found(tmp_path: Path, names: list[str], seg: str, naming: str, ending: str) -> None:
    folder = make_case(tmp_path / "case-001", names, ending, seg)
    (case,) = find_cases(tmp_path)
    expected = {c: folder / f"{folder.name}{n}{ending}" for c, n in zip(CONTRASTS, names, strict=True)}
    assert case.require().contrasts == expected
    assert (case.id, case.naming) == (folder.name, naming)
    assert case.label == folder / f"{folder.name}{seg}{ending}"


def test_file_extensions_are_case_insensitive(tmp_path: Path) -> None:
    make_case(tmp_path / "a", ["_T1", "_T1CE", "_T2", "_Flair"], ".nii.gz", "_SEG")
    (case,) = find_cases(tmp_path)
    assert list(case.require().contrasts) == list(CONTRASTS)
    assert case.label is not None


def test_a_case_folder_is_a_data_set_of_one_case(tmp_path: Path) -> None:
    assert [case.id for case in find_cases(make_case(tmp_path / "one"))] == ["one"]


def test_cases_below_hgg_and_lgg_are_found_in_id_order(tmp_path: Path) -> None:
    for place in ("HGG/c", "LGG/a", "HGG/b"):
        make_case(tmp_path / "MICCAI" / place)
    assert [case.id for case in find_cases(tmp_path)] == ["a", "b", "c"]


def test_folders_deeper_than_three_levels_are_ignored(tmp_path: Path) -> None:
    make_case(tmp_path / "1" / "2" / "near")
    make_case(tmp_path / "1" / "2" / "3" / "far")
    assert [case.id for case in find_cases(tmp_path)] == ["near"]


def test_hidden_files_and_folders_are_ignored(tmp_path: Path) -> None:
    touch(make_case(tmp_path / "a"), "._a_t1.nii.gz", "._a_seg.nii.gz")
    make_case(tmp_path / ".trash" / "b")
    (case,) = find_cases(tmp_path)
    assert (case.id, case.problems, case.label) == ("a", (), None)


def test_other_files_next_to_a_case_are_ignored(tmp_path: Path) -> None:
    touch(make_case(tmp_path / "a"), "notes.txt", "a_mask.nii.gz", "survival.csv", "a_t1.json")
    assert find_cases(tmp_path)[0].problems == ()


def test_a_case_without_a_label_map_is_complete(tmp_path: Path) -> None:
    make_case(tmp_path / "a")
    assert find_cases(tmp_path)[0].require().label is None


@pytest.mark.parametrize("missing", CONTRASTS)
def test_a_missing_contrast_is_reported_with_its_case(tmp_path: Path, missing: Contrast) -> None:
    make_case(tmp_path / "a", [n for c, n in zip(CONTRASTS, NAMES_2021, strict=True) if c != missing])
    (case,) = find_cases(tmp_path)
    with pytest.raises(DataError, match=rf"case a: contrast {missing} is missing\. Add its file"):
        case.require()


@pytest.mark.parametrize(("extra", "what"), [("_t1.nii", "t1"), ("-t1c.nii.gz", "t1c"), ("_seg.nii", "label map")])
def test_two_files_for_the_same_thing_are_named(tmp_path: Path, extra: str, what: str) -> None:
    touch(make_case(tmp_path / "a", seg="_seg"), f"a{extra}")
    with pytest.raises(DataError, match=rf"case a: two files for {what}: .*a{extra}"):
        find_cases(tmp_path)[0].require()


def test_files_of_two_cases_in_one_folder_are_a_problem(tmp_path: Path) -> None:
    touch(make_case(tmp_path / "a", NAMES_2021[:3]), "b_flair.nii.gz")
    with pytest.raises(DataError, match=r"contains files of several cases: a, b"):
        find_cases(tmp_path)[0].require()


def test_a_case_that_mixes_both_namings_has_no_naming(tmp_path: Path) -> None:
    make_case(tmp_path / "a", ["_t1n", "_t1ce", "_t2", "_flair"])
    assert find_cases(tmp_path)[0].naming is None


def test_an_id_in_two_folders_is_refused_with_both_paths(tmp_path: Path) -> None:
    make_case(tmp_path / "HGG" / "a")
    make_case(tmp_path / "LGG" / "a")
    with pytest.raises(DataError, match=r"case a appears 2 times: .*HGG.*LGG"):
        find_cases(tmp_path)


def test_a_folder_without_a_case_is_refused_with_the_naming_rules(tmp_path: Path) -> None:
    touch(tmp_path, "brain.nii.gz")
    with pytest.raises(DataError, match=r"no case found\. A case is a folder with .*_t1ce.*-t1n"):
        find_cases(tmp_path)


@pytest.mark.parametrize("find", [find_cases, find_label_cases])
def test_a_missing_folder_is_refused(tmp_path: Path, find: object) -> None:
    with pytest.raises(DataError, match="nowhere: does not exist"):
        find(tmp_path / "nowhere")  # type: ignore[operator]  # either function


@pytest.mark.parametrize("find", [find_cases, find_label_cases])
def test_a_file_instead_of_a_folder_is_refused(tmp_path: Path, find: object) -> None:
    touch(tmp_path, "a_t1.nii.gz")
    with pytest.raises(DataError, match=r"a_t1\.nii\.gz: is a file; give the folder"):
        find(tmp_path / "a_t1.nii.gz")  # type: ignore[operator]  # either function


def test_a_folder_named_like_a_contrast_is_not_a_file_of_a_case(tmp_path: Path) -> None:
    (make_case(tmp_path / "a", NAMES_2021[:3]) / "a_flair.nii.gz").mkdir()
    assert find_cases(tmp_path)[0].problems == ("contrast flair is missing. Add its file, or leave the case out",)


@pytest.mark.parametrize(
    ("t1c", "case_id", "naming"),
    [
        ("BraTS-GLI-00012-001-t1c.nii.gz", "BraTS-GLI-00012-001", "gli"),
        ("7-t1c.nii.gz", "7", "brats2023"),
        ("a_b_T1CE.nii", "a_b", "brats2021"),
        ("contrast.nii.gz", "contrast", None),
    ],
)
def test_four_single_files_get_their_id_from_the_t1c(t1c: str, case_id: str, naming: str | None) -> None:
    files: dict[Contrast, Path] = {"flair": Path("f.nii"), "t1c": Path("in", t1c), "t1": Path("1.nii"), "t2": Path("2")}
    case = case_from_files(files)
    assert (case.id, case.naming, case.folder) == (case_id, naming, Path("in"))
    assert case.contrasts == files


def test_three_single_files_are_refused_with_the_missing_contrast() -> None:
    with pytest.raises(DataError, match="contrast t2 is missing"):
        case_from_files({"t1": Path("1.nii"), "t1c": Path("c.nii"), "flair": Path("f.nii")})


def test_fewer_single_files_are_accepted_on_request_and_named_after_the_first() -> None:
    files: dict[Contrast, Path] = {"flair": Path("in/b_flair.nii"), "t2": Path("in/a_t2.nii")}
    case = case_from_files(files, all_contrasts=False)
    assert (case.id, case.reference, case.contrasts) == ("a", "t2", files)
    with pytest.raises(DataError, match="contrasts t1, t1c are missing"):
        case.require()


def test_a_case_without_some_contrasts_is_accepted_if_not_all_are_needed(tmp_path: Path) -> None:
    make_case(tmp_path / "a", NAMES_2021[2:])
    (case,) = find_cases(tmp_path)
    assert case.require(all_contrasts=False) is case
    with pytest.raises(DataError, match="contrasts t1, t1c are missing"):
        case.require()


@pytest.mark.parametrize(
    ("case_id", "patient"),
    [
        ("BraTS-GLI-00012-001", "BraTS-GLI-00012"),
        ("BraTS-GLI-00012-000", "BraTS-GLI-00012"),
        ("BraTS-MEN-RT-0003-1", "BraTS-MEN-RT-0003"),
        ("Brats18_2013_11_1", "Brats18_2013_11"),
        ("BraTS19_TCIA10_408_2", "BraTS19_TCIA10_408"),
        ("BraTS2021_00000", "BraTS2021_00000"),
        ("BraTS20_Training_001", "BraTS20_Training_001"),
        ("patient-7", "patient-7"),
    ],
)
def test_the_patient_of_a_case_is_derived_from_its_id(case_id: str, patient: str) -> None:
    assert patient_of(case_id) == patient


@pytest.mark.parametrize("name", ["a.nii.gz", "a_seg.nii.gz", "a-seg.nii", "A_SEG.NII.GZ", "a_seg/a_seg.nii"])
def test_a_label_map_is_found_flat_or_in_a_folder(tmp_path: Path, name: str) -> None:
    touch((tmp_path / name).parent, Path(name).name)
    (found,) = find_label_cases(tmp_path).items()
    assert (found[0].lower(), found[1].label) == ("a", tmp_path / name)


def test_images_are_not_mistaken_for_label_maps(tmp_path: Path) -> None:
    folder = touch(make_case(tmp_path / "a", NAMES_2023, seg="-seg"), "a_mask.nii.gz")
    assert {name: case.label for name, case in find_label_cases(tmp_path).items()} == {"a": folder / "a-seg.nii.gz"}


def test_label_maps_are_in_id_order(tmp_path: Path) -> None:
    touch(tmp_path, "c.nii.gz", "a_seg.nii.gz", "b.nii")
    assert list(find_label_cases(tmp_path)) == ["a", "b", "c"]


def test_two_label_maps_for_one_case_are_refused_naming_both(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "a_seg.nii.gz")
    with pytest.raises(DataError, match=r"case a has two label maps: .*a\.nii\.gz and .*a_seg\.nii\.gz"):
        find_label_cases(tmp_path)


def test_a_folder_of_only_images_has_no_label_map(tmp_path: Path) -> None:
    make_case(tmp_path / "a")
    with pytest.raises(DataError, match="no label map found; expected"):
        find_label_cases(tmp_path)


@pytest.mark.parametrize(
    ("names", "values", "convention"),
    [
        (NAMES_2023, [[0, 1, 2], [0, 1, 2, 4]], "brats2021"),
        (NAMES_2021, [[0, 1, 2], [0, 3]], "brats2023"),
        (NAMES_2023, [[0, 1, 2], [0]], "brats2023"),
        (NAMES_2021, [[0, 1, 2], [0]], "brats2021"),
    ],
)
def test_the_convention_is_decided_over_the_whole_data_set(
    tmp_path: Path, names: list[str], values: list[list[int]], convention: str
) -> None:
    for case_id, its in zip("ab", values, strict=True):
        write_labels(make_case(tmp_path / case_id, names) / f"{case_id}_seg.nii.gz", its)
    assert convention_of(find_cases(tmp_path)).name == convention


def test_an_unreadable_label_map_does_not_influence_the_convention(tmp_path: Path) -> None:
    touch(make_case(tmp_path / "a"), "a_seg.nii.gz")
    write_labels(make_case(tmp_path / "b") / "b_seg.nii.gz", [0, 3])
    assert convention_of(find_cases(tmp_path)).name == "brats2023"


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        ({"a": (0, 1, 3), "b": (0, 2), "c": (0, 4)}, "Seen: 1 in a, 2 in b, 3 in a, 4 in c"),
        ({"a": (0, 1), "b": (0, 9)}, "Seen: 9 in b, 1 in a"),
    ],
)
def test_unknown_label_values_are_refused_with_a_case_for_each(values: dict[str, tuple[int, ...]], seen: str) -> None:
    with pytest.raises(DataError, match=seen):
        decide_for(values, [])


def test_cases_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for case_id, value in (("a", 3), ("b", 4)):
        write_labels(make_case(tmp_path / case_id) / f"{case_id}_seg.nii.gz", [0, value])
    with pytest.raises(DataError, match="3 and 4 occur together"):
        convention_of(find_cases(tmp_path))


# Names found in practice


@pytest.mark.parametrize(
    "names",
    [
        ["_t1", "_t1gd", "_t2", "_fla"],
        ["_t1", "_t1km", "_t2", "_t2fl"],
        ["-T1pre", "-T1post", "-T2", "-FLAIR"],
        ["_t1_native", "_t1_mprage_post", "_t2_tse", "_t2_flair"],
        ["_T1w", "_ce-gadolinium_T1w", "_T2w", "_FLAIR"],
    ],
)
@pytest.mark.parametrize("place", ["folders", "flat"])
def test_contrasts_are_found_under_their_common_names(tmp_path: Path, names: list[str], place: str) -> None:
    for case_id in ("sub-01", "sub-02"):
        touch(tmp_path / (case_id if place == "folders" else ""), *(f"{case_id}{name}.nii.gz" for name in names))
    for case in find_cases(tmp_path):
        files = [case.require().contrasts[contrast].name for contrast in CONTRASTS]
        assert files == [f"{case.id}{name}.nii.gz" for name in names]


def test_a_case_that_lacks_a_contrast_lists_its_unrecognised_files(tmp_path: Path) -> None:
    touch(make_case(tmp_path / "a", NAMES_2021[:3]), "a_dunkel.nii.gz", "a_x.nii")
    (case,) = find_cases(tmp_path)
    with pytest.raises(
        DataError, match=r"flair is missing, and these names match no contrast: a_dunkel\.nii\.gz, a_x\.nii"
    ):
        case.require()
    assert case.require(all_contrasts=False) is case


def test_in_a_flat_folder_only_files_of_the_case_are_named(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{case}{name}.nii.gz" for case in ("a", "b") for name in NAMES_2021[:3]), "a_dunkel.nii.gz")
    assert [case.unrecognised for case in find_cases(tmp_path)] == [("a_dunkel.nii.gz",), ()]


def test_if_no_file_names_a_contrast_some_files_are_listed(tmp_path: Path) -> None:
    touch(tmp_path / "a", "brain.nii.gz", "pic.nii")
    with pytest.raises(DataError, match=r"no case found.* These names match no contrast: brain\.nii\.gz, pic\.nii\."):
        find_cases(tmp_path)


def test_files_in_two_unicode_forms_belong_to_one_case(tmp_path: Path) -> None:
    touch(tmp_path / "x", *(f"Zo\u00eb{name}.nii.gz" for name in NAMES_2021[:2]))
    touch(tmp_path / "x", *(f"Zoe\u0308{name}.nii.gz" for name in [*NAMES_2021[2:], "_seg"]))
    (case,) = find_cases(tmp_path)
    assert (case.require().id, case.label is not None) == ("Zo\u00eb", True)


def test_label_maps_are_found_under_the_composed_unicode_form(tmp_path: Path) -> None:
    touch(tmp_path, "Zoe\u0308.nii.gz")
    assert list(find_label_cases(tmp_path)) == ["Zo\u00eb"]


@pytest.mark.parametrize(
    ("case_id", "words"),
    [("caf\udce9", "is not valid UTF-8"), ("x" * 249, "249 bytes"), ("\u00e4" * 125, "250 bytes")],
)
def test_an_id_that_cannot_be_a_file_name_is_refused_with_a_clear_message(case_id: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Case(id=case_id, folder=Path()).require()


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(layouts).failed == 0
