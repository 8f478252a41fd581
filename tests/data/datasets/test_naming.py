"""Names of files and columns: contrasts in all spellings, Unicode forms, and the parts that belong to the case id."""

from __future__ import annotations

import doctest
import unicodedata

import pytest

from data.datasets import naming
from data.datasets.naming import contrast_of, split_name, split_names

SPELLINGS = {
    "t1": "t1 T1w t1n t1_native T1-pre t1_precontrast t1_mprage T1_3D t1_nongd t1-weighted T1WI t1_without_contrast",
    "t1c": "t1c t1ce t1gd t1km T1_GD T1w+Gd T1post t1_post_contrast t1_mprage_post T1+C T1+ t1wce cT1 t1_enh t1_ax_km",
    "t2": "t2 T2w t2_tse T2-weighted t2_ax",
    "flair": "flair fla fl t2f t2fl t2_flair T2-FLAIR tirm t2_tirm_dark-fluid dark_fluid flair_3d t2w_flair",
}


@pytest.mark.parametrize(("contrast", "spelling"), [(c, s) for c, row in SPELLINGS.items() for s in row.split()])
def test_a_contrast_is_recognised_in_every_usual_spelling(contrast: str, spelling: str) -> None:
    name, _ = split_names([f"P01_{spelling}", "P01_seg"])
    assert name is not None
    assert (name.case, name.contrast, contrast_of(spelling)) == ("P01", contrast, contrast)


@pytest.mark.parametrize("words", ["T1 (Gd)", "T1 + C", "T1w post-contrast", "T1 with contrast", "T1-weighted (Gd)"])
def test_a_column_may_name_a_contrast_in_words(words: str) -> None:
    assert contrast_of(words) == "t1c"


NO_CONTRAST = "t2_star t2s t1map t1_map t1_rho adc dwi swi pd mprage t1_sub T1GD_unstripped post gd n f c 3d ax"


@pytest.mark.parametrize("name", NO_CONTRAST.split())
def test_names_of_no_known_contrast_are_not_guessed(name: str) -> None:
    assert split_name(f"P01_{name}") is None


@pytest.mark.parametrize(
    ("files", "cases"),
    [
        (["P_t1", "P_t1ce", "P_t2", "P_t2_flair"], ["P"]),
        (["P_t2_t1", "P_t2_t1ce", "P_t2_t2", "P_t2_flair"], ["P_t2"]),
        (["P_pre_t1", "P_post_t1", "P_t2", "P_flair"], ["P"]),
        ([f"P_{visit}_{c}" for visit in ("pre", "post") for c in ("t1", "t1ce", "t2", "flair")], ["P_pre", "P_post"]),
        (["P_ax_t1", "P_ax_t1_gd", "P_sag_t2", "P_cor_flair"], ["P"]),
    ],
)
def test_the_other_files_determine_where_a_case_id_ends(files: list[str], cases: list[str]) -> None:
    assert list(dict.fromkeys(name.case for name in split_names(files) if name is not None)) == cases


def test_bids_names_are_split_into_session_and_contrast() -> None:
    files = ["T1w", "ce-gadolinium_T1w", "acq-tse_run-2_T2w", "acq-3d_FLAIR"]
    found = [name for name in split_names([f"sub-01_ses-1_{file}" for file in files]) if name is not None]
    assert [name.contrast for name in found] == ["t1", "t1c", "t2", "flair"]
    assert {name.case for name in found} == {"sub-01_ses-1"}


@pytest.mark.parametrize("entities", ["ce-gadolinium", "ce-gd_run-1", "acq-mprage_ce-dotarem"])
def test_a_t1_with_contrast_agent_is_never_mistaken_for_a_plain_t1(entities: str) -> None:
    (name,) = split_names([f"sub-01_{entities}_T1w"])
    assert name is not None
    assert name.contrast == "t1c"


def test_parts_shared_by_all_files_of_a_bids_case_stay_in_its_id() -> None:
    found = split_names([f"sub-01_space-SRI_{suffix}" for suffix in ("T1w", "T2w", "FLAIR")])
    assert {name.case for name in found if name is not None} == {"sub-01_space-SRI"}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_in_two_unicode_forms_is_one_case(form: str) -> None:
    name = split_name(unicodedata.normalize(form, "Zo\u00eb_t1"))  # type: ignore[arg-type]  # a literal of four
    assert name is not None
    assert name.case == "Zo\u00eb"


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(naming).failed == 0
