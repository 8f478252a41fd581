"""Checking a data set: problems are reported case by case, and nothing is raised."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data.datasets.source import DataSource
from data.errors import DataError
from data.quality.check import CheckedCase, check

LPS = np.diag([-1.0, -1.0, 2.0, 1.0])
NAMES = ["t1", "t1ce", "t2", "flair"]


def save(path: Path, values: Sequence[float], affine: object = LPS) -> None:
    voxels = np.array(values, dtype=np.float32).reshape(2, -1, 1)
    nib.save(nib.Nifti1Image(np.pad(voxels, 3), affine), path)


def write_case(root: Path, case: str, labels: tuple[int, ...] = (0, 1, 2, 4)) -> Path:
    folder = root / case
    folder.mkdir(parents=True)
    for name in NAMES:
        save(folder / f"{case}_{name}.nii.gz", [0, 5, 7, zlib.crc32(f"{case}{name}".encode())])
    save(folder / f"{case}_seg.nii.gz", list(labels))
    return folder


def checked(root: Path) -> dict[str, CheckedCase]:
    return {case.case: case for case in check(DataSource(root)).cases}


def test_a_clean_data_set_has_no_findings(tmp_path: Path) -> None:
    for case in ("Brats18_A_1", "Brats18_A_2", "Brats18_B_1"):
        write_case(tmp_path, case)
    found = check(DataSource(tmp_path))
    assert found.is_clean
    assert (len(found.cases), found.patients, found.convention, found.problems) == (3, 2, "brats2021", ())


def test_a_clean_case_is_described(tmp_path: Path) -> None:
    write_case(tmp_path, "a")
    assert checked(tmp_path)["a"] == CheckedCase(
        case="a",
        patient="a",
        contrasts=("t1", "t1c", "t2", "flair"),
        shape=(8, 8, 7),
        spacing_mm=(1.0, 1.0, 2.0),
        labels=(0, 1, 2, 4),
        findings=(),
    )


def test_a_data_set_without_label_maps_is_clean_and_has_no_convention(tmp_path: Path) -> None:
    (write_case(tmp_path, "a") / "a_seg.nii.gz").unlink()
    assert check(DataSource(tmp_path)).is_clean
    assert check(DataSource(tmp_path)).convention is None
    assert checked(tmp_path)["a"].labels is None


def test_a_missing_contrast_is_a_problem_only_of_its_case(tmp_path: Path) -> None:
    write_case(tmp_path, "a")
    (write_case(tmp_path, "b") / "b_t2.nii.gz").unlink()
    assert not check(DataSource(tmp_path)).is_clean
    assert {name: case.problems for name, case in checked(tmp_path).items()} == {
        "a": (),
        "b": ("contrast t2 is missing. Add its file, or leave the case out",),
    }
    assert checked(tmp_path)["b"].contrasts == ("t1", "t1c", "flair")


@pytest.mark.parametrize("names", [["t1"], ["t1", "t2"]])
@pytest.mark.parametrize("unrecognised", [[], ["b_dwi.nii.gz"]])
def test_missing_contrasts_have_their_own_kind(tmp_path: Path, names: list[str], unrecognised: list[str]) -> None:
    folder = write_case(tmp_path, "b")
    for name in names:
        (folder / f"b_{name}.nii.gz").unlink()
    for name in unrecognised:
        save(folder / name, [0, 5, 7, 9])
    assert [finding.kind for finding in checked(tmp_path)["b"].findings] == ["missing contrast"]


def test_a_contrast_on_another_grid_is_a_problem(tmp_path: Path) -> None:
    affine = LPS.copy()
    affine[2, 3] = 3
    save(write_case(tmp_path, "a") / "a_flair.nii.gz", [0, 5, 7, 9], affine)
    (problem,) = checked(tmp_path)["a"].problems
    assert problem.startswith("flair: the origin differs by 3.00 mm on axis z (inferior-superior)")


def test_a_label_map_of_another_shape_is_a_problem(tmp_path: Path) -> None:
    save(write_case(tmp_path, "a") / "a_seg.nii.gz", [0, 1, 2, 4, 4, 4])
    (problem,) = checked(tmp_path)["a"].problems
    assert problem.startswith("label map: shape 8x8x7 against 8x9x7 voxels (compared with a_t1.nii.gz). Register")


@pytest.mark.parametrize(("file", "what"), [("a_t1.nii.gz", "t1"), ("a_seg.nii.gz", "label map")])
@pytest.mark.parametrize("content", [b"", b"no image", b"\x1f\x8b\x08\x00"])
def test_a_file_that_cannot_be_read_is_a_problem_with_its_path(
    tmp_path: Path, file: str, what: str, content: bytes
) -> None:
    path = write_case(tmp_path, "a") / file
    path.write_bytes(content)
    (problem,) = checked(tmp_path)["a"].problems
    assert problem.startswith(f"{what}: {path}: ")


def test_if_no_image_can_be_read_the_shape_is_missing_but_labels_are_reported(tmp_path: Path) -> None:
    folder = write_case(tmp_path, "a")
    for name in NAMES:
        (folder / f"a_{name}.nii.gz").write_bytes(b"no image")
    found = checked(tmp_path)["a"]
    assert (found.shape, found.spacing_mm, found.labels, len(found.problems)) == (None, None, (0, 1, 2, 4), 4)


def test_a_contrast_of_zeros_is_a_problem(tmp_path: Path) -> None:
    save(write_case(tmp_path, "a") / "a_t1ce.nii.gz", [0, 0, 0, 0])
    assert checked(tmp_path)["a"].problems[0].startswith("t1c: every voxel is 0")


def test_a_label_map_with_fractional_values_is_a_problem(tmp_path: Path) -> None:
    save(write_case(tmp_path, "a") / "a_seg.nii.gz", [0, 0.5, 1, 2])
    (problem,) = checked(tmp_path)["a"].problems
    assert "label values must be whole numbers" in problem


@pytest.mark.parametrize(
    ("other", "words"),
    [((0, 0, 0, 3), "3 and 4 occur together"), ((0, 0, 0, 9), r"label values \[9\] belong to no known convention")],
)
def test_contradictory_label_values_are_a_problem_of_the_whole_data_set(
    tmp_path: Path, other: tuple[int, ...], words: str
) -> None:
    write_case(tmp_path, "a")
    write_case(tmp_path, "b", other)
    found = check(DataSource(tmp_path))
    assert (found.is_clean, found.convention, len(found.problems)) == (False, None, 1)
    with pytest.raises(DataError, match=words):
        raise DataError(found.problems[0])
    assert f"{other[-1]} in b" in found.problems[0]


def test_a_contrast_on_another_grid_is_named_even_if_it_is_the_first(tmp_path: Path) -> None:
    affine = LPS.copy()
    affine[0, 3] = 5
    save(write_case(tmp_path, "a") / "a_t1.nii.gz", [0, 5, 7, 9], affine)
    (problem,) = checked(tmp_path)["a"].problems
    assert problem.startswith("t1: the origin differs by 5.00 mm on axis x (right-left) (compared with a_t1ce.nii.gz)")


def test_non_finite_voxels_are_counted_and_the_rest_is_checked(tmp_path: Path) -> None:
    save(write_case(tmp_path, "a") / "a_t2.nii.gz", [np.nan, 7, np.inf, 7])
    assert [finding.kind for finding in checked(tmp_path)["a"].findings] == ["non-finite voxels", "constant"]
    assert checked(tmp_path)["a"].problems[0].startswith("t2: 2 voxels are NaN or infinite. Repair")


def test_two_files_for_one_contrast_are_a_problem(tmp_path: Path) -> None:
    save(write_case(tmp_path, "a") / "a_t1c.nii.gz", [0, 5, 7, 9])
    (finding,) = checked(tmp_path)["a"].findings
    assert (finding.kind, finding.severity) == ("duplicate contrast", "problem")
    assert finding.action == "Keep one of them"


def test_cases_without_a_label_map_give_one_note_for_the_data_set(tmp_path: Path) -> None:
    write_case(tmp_path, "a")
    (write_case(tmp_path, "b") / "b_seg.nii.gz").unlink()
    found = check(DataSource(tmp_path))
    assert found.is_clean
    assert [(finding.kind, finding.severity) for finding in found.findings] == [("no label map", "note")]
    assert found.findings[0].message == "1 of 2 have no label map: b"


def test_a_label_map_of_zeros_is_a_note(tmp_path: Path) -> None:
    write_case(tmp_path, "a", (0, 0, 0, 0))
    (finding,) = checked(tmp_path)["a"].findings
    assert (finding.kind, finding.severity, checked(tmp_path)["a"].labels) == ("empty label map", "note", (0,))


def test_one_image_under_two_ids_is_a_problem_of_both_cases(tmp_path: Path) -> None:
    for case in "ab":
        save(write_case(tmp_path, case) / f"{case}_t2.nii.gz", [0, 3, 7, 9])
    first, second = checked(tmp_path).values()
    assert first.problems[0].startswith("t2 has the same voxels as in case b. ")
    assert second.problems[0].startswith("t2 has the same voxels as in case a. ")


def test_a_contrast_stored_in_another_order_of_axes_is_the_same_image(tmp_path: Path) -> None:
    folder = write_case(tmp_path, "a")
    stored = nib.as_closest_canonical(nib.load(folder / "a_t1.nii.gz"))
    nib.save(stored, folder / "a_flair.nii.gz")
    (problem,) = checked(tmp_path)["a"].problems
    assert problem.startswith("flair: the same voxels as t1. ")


def test_findings_are_plain_data_and_include_a_remedy(tmp_path: Path) -> None:
    save(write_case(tmp_path, "a") / "a_t1ce.nii.gz", [0, 0, 0, 0])
    assert check(DataSource(tmp_path)).to_json()["cases"][0]["findings"] == [
        {
            "kind": "empty",
            "severity": "problem",
            "contrast": "t1c",
            "message": "every voxel is 0",
            "action": "Export the image again, or leave the case out",
        }
    ]


def test_all_problems_of_a_case_are_reported_at_once(tmp_path: Path) -> None:
    folder = write_case(tmp_path, "a")
    (folder / "a_t1.nii.gz").unlink()
    (folder / "a_t2.nii.gz").write_bytes(b"no image")
    save(folder / "a_seg.nii.gz", [0, 0.5, 1, 2])
    assert len(checked(tmp_path)["a"].problems) == 3


def test_every_case_is_announced_once(tmp_path: Path) -> None:
    for case in "abc":
        write_case(tmp_path, case)
    (tmp_path / "b" / "b_t1.nii.gz").unlink()
    seen: list[str] = []
    check(DataSource(tmp_path), on_case=seen.append)
    assert sorted(seen) == ["a", "b", "c"]


def test_the_findings_are_plain_data(tmp_path: Path) -> None:
    write_case(tmp_path, "a")
    (write_case(tmp_path, "b") / "b_t1.nii.gz").write_bytes(b"no image")
    found = check(DataSource(tmp_path))
    plain = json.loads(json.dumps(found.to_json()))
    assert (plain["root"], plain["convention"], plain["patients"]) == (str(tmp_path), "brats2021", 2)
    assert plain["cases"][0]["shape"] == [8, 8, 7]
    assert plain["cases"][1]["problems"] == list(found.cases[1].problems)


def test_a_folder_without_a_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no case found"):
        check(DataSource(tmp_path))


def test_a_case_id_that_is_not_a_valid_file_name_is_a_problem(tmp_path: Path) -> None:
    write_case(tmp_path, "up..up")
    assert "'up..up' cannot be used in file names" in checked(tmp_path)["up..up"].problems[0]


def test_visits_and_ids_that_look_like_visits_are_reported(tmp_path: Path) -> None:
    for case in ("P1_tp1", "P1_tp2", "P2_1", "P2_2"):
        write_case(tmp_path, case)
    found = check(DataSource(tmp_path))
    assert (found.patients, found.is_clean) == (3, True)
    notes = {finding.kind: finding.sentence for finding in found.findings}
    assert "P1 (P1_tp1, P1_tp2)" in notes["visits"]
    assert "P2_1, P2_2" in notes["possible visits"]


def test_a_misleading_file_name_is_a_note_and_the_file_is_read(tmp_path: Path) -> None:
    folder = write_case(tmp_path, "a")
    (folder / "a_t1.nii.gz").write_bytes(gzip.decompress((folder / "a_t1.nii.gz").read_bytes()))
    case = checked(tmp_path)["a"]
    assert (case.problems, case.contrasts) == ((), ("t1", "t1c", "t2", "flair"))
    assert any("a_t1.nii.gz is not compressed, though its name ends in .gz" in note for note in case.notes)
