"""Described data sets: every layout is recognised without a flag, ambiguous ones are rejected, broken trees survive."""

from __future__ import annotations

import doctest
import json
import shutil
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.datasets import descriptions
from data.datasets import naming as names
from data.datasets.label_stats import convention_of
from data.datasets.layouts import Case, decide_for, find_cases, find_label_cases
from data.datasets.source import DataSource
from data.errors import DataError
from data.labels import CONTRASTS, decode
from data.nifti import read_label_map, read_volume
from data.preprocess import prepare
from data.quality.check import check

Render = Callable[..., Any]
LAYOUTS = [
    *("2015", "2018", "2019", "2020", "2021", "2023 GLI", "2023 SSA", "2023 MET", "2023 MEN", "2023 odd"),
    *("2024 GLI", "2024 MET", "2024 PED", "UCSF-PDGM", "flat 2021", "flat 2023", "case folders"),
    *("MSD", "nnU-Net", "nnU-Net labels", "manifest"),
]
properties = settings(derandomize=True, deadline=None, max_examples=25)


def save(path: Path, labels: Any) -> None:
    nib.save(nib.Nifti1Image(np.asarray(labels, dtype=np.uint8), np.eye(4)), path)


def describe(root: Path, **changes: Any) -> Path:
    """Change keys of a dataset.json; None removes a key."""
    path = root / "dataset.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_data_set_is_recognised_with_its_contrasts_and_regions(render: Render, tmp_path: Path, layout: str) -> None:
    given = render(tmp_path, layout)
    cases = find_cases(given.root)
    convention = convention_of(cases)
    assert [case.id for case in cases] == sorted(given.codes)
    for case in cases:
        for contrast in CONTRASTS:
            voxels = read_volume(case.contrasts[contrast], case.volumes.get(contrast)).voxels
            np.testing.assert_array_equal(voxels, given.images[case.id][contrast])
        assert case.label is not None
        np.testing.assert_array_equal(decode(read_label_map(case.label).voxels, convention), given.codes[case.id])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_check_of_every_layout_finds_nothing_wrong(render: Render, tmp_path: Path, layout: str) -> None:
    found = check(DataSource(render(tmp_path, layout).root))
    assert (found.is_clean, [case.problems for case in found.cases]) == (True, [(), ()])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_label_maps_of_every_layout_are_found_without_the_images(
    render: Render, tmp_path: Path, layout: str
) -> None:
    given = render(tmp_path, layout)
    cases = find_label_cases(given.root)
    maps = {case_id: case.label for case_id, case in cases.items()}
    assert maps == {case.id: case.label for case in find_cases(given.root)}
    values = {case_id: np.unique(read_label_map(path).voxels) for case_id, path in maps.items() if path is not None}
    assert decide_for(values, list(cases.values())) is convention_of(find_cases(given.root))


def test_one_case_prepared_from_msd_and_from_2023_is_the_same(render: Render, tmp_path: Path) -> None:
    prepared = []
    for layout in ("MSD", "2023 GLI"):
        cases = find_cases(render(tmp_path / layout, layout).root)
        prepared.append(prepare(cases[0], convention=convention_of(cases)))
    np.testing.assert_array_equal(prepared[0].image, prepared[1].image)
    np.testing.assert_array_equal(prepared[0].codes, prepared[1].codes)


def test_the_resection_cavity_of_2024_belongs_to_no_region(render: Render, tmp_path: Path) -> None:
    given = render(tmp_path, "2024 GLI")
    (case, *_) = cases = find_cases(given.root)
    assert case.label is not None
    cavity = read_label_map(case.label).voxels == 4
    assert cavity.any()
    assert not decode(read_label_map(case.label).voxels, convention_of(cases))[cavity].any()


# Ambiguous data sets


def test_a_flat_folder_with_uninformative_names_is_refused_with_the_flag(render: Render, tmp_path: Path) -> None:
    cases = find_cases(render(tmp_path, "flat").root)
    with pytest.raises(DataError, match=r"values 1, 2, 3 .*--labels: brats2023 .*msd .*Seen: 1 in a.* 3 in a"):
        convention_of(cases)
    assert convention_of(cases, labels="msd").name == "msd"


def test_a_manifest_that_does_not_describe_labels_is_refused_with_the_flag(render: Render, tmp_path: Path) -> None:
    manifest = render(tmp_path, "manifest").root
    manifest.write_text(manifest.read_text().replace(",msd,", ",,"))
    with pytest.raises(DataError, match=r"--labels: brats2023 .*msd"):
        convention_of(find_cases(manifest))


@pytest.mark.parametrize("labels", [None, {"background": 0, "a": 1, "b": 2, "c": 3}, {"tumour": 1}, [1, 2], 3])
def test_nnunet_raw_without_tissue_names_is_refused_with_the_flag(
    render: Render, tmp_path: Path, labels: object
) -> None:
    cases = find_cases(describe(render(tmp_path, "nnU-Net").root, labels=labels))
    with pytest.raises(DataError, match=r"--labels: brats2023 .*msd"):
        convention_of(cases)


@pytest.mark.parametrize(
    ("layout", "numbers", "words"),
    [
        ("2024 PED", {4: 1}, "of the PED task, without a 4 anywhere, .*--labels: brats2023 .*brats2024-ped"),
        ("2024 GLI", {3: 2}, "a 4 and no 3 under names of GLI or MET .*--labels: brats2021 .*brats2024"),
        ("2021", {1: 3}, "3 and 4 occur together.*--labels: brats2024 .*brats2024-ped .*brats2015"),
        ("MSD", {2: 4}, "are not in msd, the convention stated by the data set's description.* --labels"),
        ("nnU-Net labels", {2: 4}, "are not in brats2023, the convention stated by the data set's description"),
    ],
)
def test_values_that_do_not_determine_the_year_are_refused_with_the_flag(
    render: Render, tmp_path: Path, layout: str, numbers: dict[int, int], words: str
) -> None:
    cases = find_cases(render(tmp_path, layout).root)
    for case in cases:
        assert case.label is not None
        voxels = read_label_map(case.label).voxels
        for old, new in numbers.items():
            voxels[voxels == old] = new
        save(case.label, voxels)
    with pytest.raises(DataError, match=words):
        convention_of(cases)


def test_labels_of_two_mixed_years_are_not_mistaken_for_cavities() -> None:
    cases = [Case(id=f"BraTS-GLI-0000{n}-000", folder=Path(), naming="gli") for n in (1, 2)]
    values = {cases[0].id: (0, 1, 2, 3), cases[1].id: (0, 1, 2, 4)}
    with pytest.raises(DataError, match=r"no case has both: .*--labels brats2024\. Seen: .*4 in BraTS-GLI-00002-000"):
        decide_for(values, cases)


def test_mixed_conventions_in_one_folder_are_refused_with_a_case_of_each(render: Render, tmp_path: Path) -> None:
    render(tmp_path, "2024 GLI")
    render(tmp_path, "2024 PED")
    with pytest.raises(DataError, match=r"brats2024 for BraTS-GLI.*brats2024-ped for BraTS-PED.*--labels"):
        convention_of(find_cases(tmp_path))


def test_years_with_the_same_label_numbers_may_be_mixed() -> None:
    cases = [Case(id="a", folder=Path(), naming="brats2021"), Case(id="b", folder=Path(), naming="brats2023")]
    assert decide_for({"a": (0, 1, 2), "b": (0, 1, 2)}, cases).name == "brats2021"


def test_an_unknown_convention_is_refused_with_the_valid_names() -> None:
    with pytest.raises(DataError, match=r"named 'brats1999'. Give one of brats2021, .*msd"):
        convention_of([], labels="brats1999")


@pytest.mark.parametrize("layout", ["flat", "nnU-Net", "manifest"])
def test_an_ambiguous_data_set_without_label_maps_can_still_be_predicted(
    render: Render, tmp_path: Path, layout: str
) -> None:
    root = render(tmp_path, layout).root
    assert all(case.require() for case in find_cases(root))


# Individual layouts


def test_radiotherapy_cases_are_refused_with_a_clear_message(tmp_path: Path) -> None:
    case = "BraTS-MEN-RT-0003-1"
    (tmp_path / case).mkdir()
    for ending in ("t1c", "gtv"):
        (tmp_path / case / f"{case}_{ending}.nii.gz").touch()
    with pytest.raises(DataError, match=r"meningioma radiotherapy \(BraTS MEN-RT\) have one contrast"):
        find_cases(tmp_path)[0].require()


def test_ucsf_pdgm_images_without_bias_correction_are_preferred(render: Render, tmp_path: Path) -> None:
    root = render(tmp_path, "UCSF-PDGM").root
    folder = root / "UCSF-PDGM-0004_nifti"
    shutil.copy(folder / "UCSF-PDGM-0004_T1.nii.gz", folder / "UCSF-PDGM-0004_T1_bias.nii.gz")
    (folder / "UCSF-PDGM-0004_T2.nii.gz").rename(folder / "UCSF-PDGM-0004_T2_bias.nii.gz")
    (folder / "UCSF-PDGM-0004_brain_segmentation.nii.gz").touch()
    case = find_cases(root)[0].require()
    assert [case.contrasts[c].name for c in ("t1", "t2")] == [
        "UCSF-PDGM-0004_T1.nii.gz",
        "UCSF-PDGM-0004_T2_bias.nii.gz",
    ]


@pytest.mark.parametrize("layout", ["MSD", "nnU-Net"])
def test_images_of_a_test_split_without_label_maps_are_cases(render: Render, tmp_path: Path, layout: str) -> None:
    root = render(tmp_path, layout).root
    shutil.move(root / "imagesTr", root / "imagesTs")
    assert [case.require().label for case in find_cases(root)] == [None, None]


@pytest.mark.parametrize("layout", ["MSD", "nnU-Net"])
def test_the_images_folder_by_itself_is_a_data_set_without_label_maps(
    render: Render, tmp_path: Path, layout: str
) -> None:
    root = render(tmp_path, layout).root
    cases = find_cases(root / "imagesTr")
    assert [(case.id, case.label) for case in cases] == [(case.id, None) for case in find_cases(root)]
    assert [case.written_convention.name for case in cases if case.written_convention] == ["msd", "msd"]


def test_the_labels_folder_by_itself_is_read_with_the_description_next_to_it(render: Render, tmp_path: Path) -> None:
    root = render(tmp_path, "nnU-Net").root
    cases = find_label_cases(root / "labelsTr")
    assert [case.declared for case in cases.values()] == ["msd", "msd"]


def test_nnunet_label_maps_without_a_description_are_not_recognised_by_brats_ids(
    render: Render, tmp_path: Path
) -> None:
    root = render(tmp_path, "nnU-Net").root
    (root / "dataset.json").unlink()
    cases = find_label_cases(root / "labelsTr")
    with pytest.raises(DataError, match="--labels"):
        decide_for(dict.fromkeys(cases, (0, 1, 2, 3)), list(cases.values()))


@pytest.mark.parametrize(
    ("channels", "words"),
    [
        (None, "must name the channels"),
        ({"0": "MRI", "1": "MRI"}, "no channel is named after a contrast: MRI, MRI"),
        ({"0": "T1", "1": "T1w"}, "two channels are named t1"),
        ({"first": "T1"}, "must name the channels"),
    ],
)
def test_channels_not_named_after_contrasts_are_refused(
    render: Render, tmp_path: Path, channels: object, words: str
) -> None:
    root = describe(render(tmp_path, "nnU-Net").root, channel_names=channels)
    with pytest.raises(DataError, match=words):
        find_cases(root)


def test_a_channel_that_is_not_a_contrast_is_ignored_and_a_missing_one_is_named(render: Render, tmp_path: Path) -> None:
    root = describe(render(tmp_path, "nnU-Net").root, channel_names={"0": "T2", "1": "T1ce", "2": "ADC", "3": "T1"})
    case = find_cases(root)[0]
    assert (list(case.contrasts), len(case.problems)) == (["t1", "t1c", "t2"], 1)
    assert "contrast flair is missing" in case.problems[0]


def test_a_4d_file_with_fewer_volumes_than_described_is_a_problem(render: Render, tmp_path: Path) -> None:
    root = render(tmp_path, "MSD").root
    save(root / "imagesTr" / "BRATS_001.nii.gz", np.ones((8, 8, 8, 2)))
    problems = check(DataSource(root)).cases[0].problems
    assert any("volume 3 (from 0) of a 4D file is needed" in problem for problem in problems)


def test_a_folder_with_one_manifest_is_a_data_set_and_other_tables_are_ignored(render: Render, tmp_path: Path) -> None:
    manifest = render(tmp_path, "manifest").root
    (tmp_path / "survival_info.csv").write_text("Brats20ID,Age\n1,60\n")
    assert find_cases(tmp_path) == find_cases(manifest)


def test_two_manifests_in_a_folder_are_refused(render: Render, tmp_path: Path) -> None:
    shutil.copy(render(tmp_path, "manifest").root, tmp_path / "other.csv")
    with pytest.raises(DataError, match=r"2 manifests: cases\.csv, other\.csv"):
        find_cases(tmp_path)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_manifest_may_be_separated_by_semicolons_or_tabs(render: Render, tmp_path: Path, separator: str) -> None:
    manifest = render(tmp_path, "manifest").root
    before = find_cases(manifest)
    manifest.write_text("\ufeff" + manifest.read_text().replace(",", separator), encoding="utf-8")
    assert find_cases(manifest) == before


def test_a_manifest_may_list_a_volume_of_a_4d_file(render: Render, tmp_path: Path) -> None:
    root = render(tmp_path, "MSD").root
    image = "imagesTr/BRATS_001.nii.gz"
    (root / "m.csv").write_text(f"case,t1,t1c,t2,flair\nx,{image}#1,{image}#2,{image}#3,{image}#0\n")
    (case,) = find_cases(root / "m.csv")
    assert case.require().volumes == {"t1": 1, "t1c": 2, "t2": 3, "flair": 0}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the manifest is empty"),
        ("a,b\n1,2\n", "not a manifest: its first row must name the columns"),
        ("case,t1,T1n\n", "two columns for t1: t1 and T1n"),
        ("case,t1\n,x.nii\n", "line 2: no case id"),
        ("case,t1\na,x.nii\na,y.nii\n", "case a appears twice, in lines 2 and 3"),
        ("case,t1,labels\na,x.nii,brats1999\n", "labels is 'brats1999', not one of"),
        ('case,t1\n"a,x.nii\n', "cannot be read as CSV"),
        ("case,t1\na,x\x07.nii\n", "which is not a path"),
        ("case,t1\n", "no case found"),
    ],
)
def test_a_malformed_manifest_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        find_cases(tmp_path / "m.csv")


@pytest.mark.parametrize(
    ("place", "words"), [("gone.nii", "names .*gone.nii, which does not exist"), ("../b.nii", "--follow-links")]
)
def test_a_manifest_path_that_is_missing_or_outside_the_data_is_a_problem(
    tmp_path: Path, place: str, words: str
) -> None:
    (tmp_path / "b.nii").touch()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "m.csv").write_text(f"case,t1c\na,{place}\n")
    with pytest.raises(DataError, match=words):
        find_cases(tmp_path / "in")[0].require()


def test_a_flat_folder_names_the_case_that_lacks_a_contrast(render: Render, tmp_path: Path) -> None:
    root = render(tmp_path, "flat 2023").root
    (root / "BraTS-GLI-00001-000-t2f.nii.gz").unlink()
    problems = {case.id: case.problems for case in find_cases(root)}
    assert problems["BraTS-GLI-00002-000"] == ()
    assert "contrast flair is missing" in problems["BraTS-GLI-00001-000"][0]


# Arbitrary content: a message, never a traceback


def survives(root: Path) -> None:
    """Check that everything that reads a data set succeeds or raises a DataError."""
    for read in (find_cases, find_label_cases, lambda root: check(DataSource(root))):
        try:
            read(root)
        except DataError as error:
            assert str(error)  # noqa: PT017 - the error is optional


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.just("1"), inner, max_size=4),
    max_leaves=8,
)
keys = st.sampled_from(["channel_names", "modality", "labels", "training", "numTraining", "file_ending"])


@properties
@given(st.one_of(st.dictionaries(keys, json_values), json_values), st.sampled_from(["MSD", "nnU-Net"]))
def test_any_description_is_read_or_refused(render: Render, content: object, layout: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = render(Path(folder), layout).root
        (root / "dataset.json").write_text(json.dumps(content))
        survives(root)


@properties
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode), st.booleans())
def test_any_bytes_as_a_description_are_read_or_refused(render: Render, content: bytes, keep: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for layout, name in (("nnU-Net", "dataset.json"), ("manifest", "cases.csv")):
            path = render(Path(folder, layout), layout).root.parent / name
            path = path if path.exists() else Path(folder, layout, name)
            path.write_bytes((path.read_bytes() if keep else b"") + content)
            survives(path if name.endswith("csv") else path.parent)


@settings(properties, max_examples=40)
@given(st.data())
def test_any_broken_tree_is_read_or_refused(render: Render, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        layout = data.draw(st.sampled_from([*LAYOUTS, "flat"]))
        root = render(Path(folder, "data"), layout).root
        for _ in range(data.draw(st.integers(1, 4))):
            paths = sorted(path for path in Path(folder, "data").rglob("*") if path.exists() or path.is_symlink())
            if not root.exists() or not paths:
                break
            spoil(data.draw(st.sampled_from(paths)), data)
        survives(root)


file_names = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..")
)


def spoil(path: Path, data: st.DataObject) -> None:
    """Break one file or folder of a tree."""
    way = data.draw(st.sampled_from(["gone", "cut", "folder", "link", "name", "text", "copy"]))
    if way == "copy":
        if path.is_file():
            shutil.copyfile(path, path.with_name(f"x{path.name}"))
        return
    if way == "name":
        name = data.draw(file_names)
        if not path.with_name(name).exists():
            path.rename(path.with_name(name))
        return
    content = path.read_bytes() if path.is_file() else b""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    if way == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif way == "folder":
        path.mkdir()
    elif way == "link":
        path.symlink_to(data.draw(st.sampled_from(["/nowhere", "..", path.name])))
    elif way == "text":
        path.write_bytes(b"case,t1\n{}[]")


# Patients and names in a manifest


def table(folder: Path, head: str, *rows: str) -> Path:
    for name in ("1", "c", "2", "f"):
        (folder / f"{name}.nii.gz").touch()
    path = folder / "m.csv"
    path.write_text("\n".join([head, *rows]), encoding="utf-8")
    return path


@pytest.mark.parametrize("head", ["case,patient", "id,Subject", "case_id,participant_id", "Case,Patient ID"])
def test_the_patient_comes_from_the_manifest_and_otherwise_from_the_id(tmp_path: Path, head: str) -> None:
    path = table(
        tmp_path,
        f"{head},t1,t1c,t2,flair",
        *(f"{row},1.nii.gz,c.nii.gz,2.nii.gz,f.nii.gz" for row in ("a,7", "b, 7", "P9_tp1,")),
    )
    assert {case.id: case.patient for case in find_cases(path)} == {"a": "7", "b": "7", "P9_tp1": "P9"}


def test_the_subject_column_is_the_case_if_no_other_column_is(tmp_path: Path) -> None:
    (case,) = find_cases(table(tmp_path, "subject,t1,t1c,t2,flair", "a,1.nii.gz,c.nii.gz,2.nii.gz,f.nii.gz"))
    assert (case.id, case.stated_patient) == ("a", None)


def test_two_patient_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two columns for patient: patient and participant"):
        find_cases(table(tmp_path, "case,patient,participant,t1", "a,1,2,1.nii.gz"))


def test_a_row_that_lacks_a_contrast_lists_the_unrecognised_columns(tmp_path: Path) -> None:
    (case,) = find_cases(table(tmp_path, "case,t1,t1c,t2,dark,age", "a,1.nii.gz,c.nii.gz,2.nii.gz,f.nii.gz,61"))
    with pytest.raises(
        DataError, match=r"contrast flair is missing, and these names match no contrast: column dark\. "
    ):
        case.require()


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_manifest_may_use_another_unicode_form_for_files_and_cases(tmp_path: Path, forms: tuple[Any, Any]) -> None:
    written, there = (unicodedata.normalize(form, "Zo\u00eb") for form in forms)
    (tmp_path / there).mkdir()
    (tmp_path / there / f"{there}_t1.nii.gz").touch()
    (case,) = find_cases(table(tmp_path, "case,t1", f"{written},{written}/{written}_t1.nii.gz"))
    assert case.id == "Zo\u00eb"
    assert case.contrasts["t1"].exists()


def test_nnunet_images_and_labels_match_across_unicode_forms(render: Render, tmp_path: Path) -> None:
    root = render(tmp_path, "nnU-Net").root
    first = find_cases(root)[0].id
    for folder, form in (("imagesTr", "NFD"), ("labelsTr", "NFC")):
        for path in (root / folder).glob(f"{first}*"):
            path.rename(path.with_name(path.name.replace(first, unicodedata.normalize(form, "Zo\u00eb"))))  # type: ignore[arg-type]  # a literal of four
    (case,) = [case for case in find_cases(root) if case.id == "Zo\u00eb"]
    assert (case.require().label is not None, len(case.contrasts)) == (True, 4)


@pytest.mark.parametrize("module", [descriptions, names])
def test_the_examples_in_the_docstrings_hold(module: Any) -> None:
    assert doctest.testmod(module).failed == 0
