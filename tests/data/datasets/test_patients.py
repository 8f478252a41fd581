"""Patients: which ids are visits of one patient, which are not, and which only look like visits."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.datasets import patients
from data.datasets.label_stats import LabelStats
from data.datasets.patients import grouped_by_words, patient_of, possible_visits
from data.datasets.splits import fold_split, stratified_split

properties = settings(derandomize=True, deadline=None, max_examples=60)
#: Every known naming of visits, with placeholders for the numbers of patient and visit.
NAMINGS = (
    "BraTS-GLI-{0:05}-{1:03}",
    "Brats18_TCIA01_{0}_{1}",
    "UPENN-GBM-{0:05}_{1}1",
    "sub-{0:02}_ses-{1}",
    "sub-x{0}_ses-{1}_run-1",
    "P{0}_tp{1}",
    "P{0}-visit{1}",
    "P{0}_2019031{1}",
    "P{0}_2019-03-1{1}",
    "PatientID_{0:04}_Timepoint_{1}_brain",
    "Patient-{0:03}_week-00{1}-1",
)
#: P1_tp1 and P1_20190312 belong to one patient although their namings differ.
OF_P = {naming for naming in NAMINGS if naming.startswith("P{0}")}


def made(drawn: list[tuple[str, int, int]]) -> dict[str, tuple[str, int]]:
    """The true patient of every case, by its id."""
    return {
        naming.format(number, visit): ("P" if naming in OF_P else naming, number) for naming, number, visit in drawn
    }


visits = (
    st.lists(
        st.tuples(st.sampled_from(NAMINGS), st.integers(1, 6), st.integers(1, 3)), unique=True, min_size=2, max_size=40
    )
    .map(made)
    .filter(lambda patients: len(set(patients.values())) > 1)
)


@pytest.mark.parametrize(
    ("ids", "patient"),
    [
        (["UPENN-GBM-00001_11", "UPENN-GBM-00001_21"], "UPENN-GBM-00001"),
        (["sub-01_ses-1", "sub-01_ses-2", "sub-01_ses-1_run-2", "sub-01"], "sub-01"),
        (["P7_tp1", "P7_tp2", "P7_TP03"], "P7"),
        (["anna_tp1", "anna_timepoint-2", "anna_visit3"], "anna"),
        (["P7_20190312", "P7_2019-03-12", "P7.2019.03.12", "P7_12.03.2019", "P7_20190312_1145"], "P7"),
        (["TCGA-02-0003_1997.06.08", "TCGA-02-0003"], "TCGA-02-0003"),
        (["brats_tcia_pat105_0001", "brats_tcia_pat105_0120"], "brats_tcia_pat105"),
        (["PatientID_0003_Timepoint_1_brain", "PatientID_0003_Timepoint_2_brain"], "PatientID_0003"),
        (["Patient-001_week-000-1", "Patient-001_week-044"], "Patient-001"),
        (["100118_time1", "100118_time2"], "100118"),
        (["P7_pre", "P7_post", "P7_pre-op", "P7_baseline", "P7_followup2", "P7_6months"], "P7"),
        (["P7_visit2_20190312", "P7_20190312_visit2"], "P7"),
    ],
)
def test_visits_named_in_the_ids_belong_to_one_patient(ids: list[str], patient: str) -> None:
    assert {patient_of(case_id) for case_id in ids} == {patient}


@pytest.mark.parametrize(
    "ids",
    [
        ["BraTS2021_00001", "BraTS2021_00002"],
        ["BraTS20_Training_001", "BraTS20_Training_002"],
        ["Brats18_TCIA01_131_1", "Brats18_TCIA01_132_1"],
        ["case_1", "case_2"],
        ["patient01", "patient02"],
        ["scan_1", "scan_2"],
        ["TCGA-02-0003", "TCGA-02-0006"],
        ["GBM_20190312", "GBM_20190401"],
        ["GBM_baseline_001", "GBM_baseline_002"],
        ["cohort_visit2_P01", "cohort_visit2_P02"],
        ["site1_00012345", "site1_00012346"],
        ["P1_13012019999", "P1_99999999"],
    ],
)
def test_different_patients_with_similar_ids_stay_separate(ids: list[str]) -> None:
    assert len({patient_of(case_id) for case_id in ids}) == len(ids)


@properties
@given(visits, st.integers(0, 100))
def test_no_patient_is_in_two_folds_under_any_naming_of_visits(patient: dict[str, Any], seed: int) -> None:
    by_id = {case_id: patient_of(case_id) for case_id in patient}
    tumours = {case_id: LabelStats(volume_um3=len(case_id), enhances=True) for case_id in patient}
    for split in (fold_split(by_id, 0, seed=seed), stratified_split(tumours, by_id, 0, seed=seed)):
        assert not {patient[c] for c in split.train} & {patient[c] for c in split.validation}
        assert len(split.train) + len(split.validation) == len(patient)


@properties
@given(visits)
def test_visits_of_different_patients_are_not_merged(patient: dict[str, Any]) -> None:
    assert len({patient_of(case_id) for case_id in patient}) == len(set(patient.values()))


@properties
@given(visits, st.sets(st.sampled_from(["a", "b", "P01_1", "P01_2", "P02_1"])), st.randoms(use_true_random=False))
def test_grouping_does_not_depend_on_the_order_of_the_cases(
    patient: dict[str, Any], more: set[str], random: Any
) -> None:
    ids = sorted({*patient, *more})
    shuffled = random.sample(ids, len(ids))
    assert grouped_by_words(shuffled) == grouped_by_words(ids)
    assert possible(shuffled) == possible(ids)


@properties
@given(st.text(max_size=300))
def test_the_patient_of_a_patient_id_is_that_id(case_id: str) -> None:
    assert patient_of(patient_of(case_id)) == patient_of(case_id)


def test_an_id_of_any_length_is_parsed_quickly() -> None:
    assert patient_of("1_" * 50_000) == "1_" * 50_000


def possible(ids: Any) -> tuple[tuple[str, ...], ...]:
    return possible_visits({case_id: patient_of(case_id) for case_id in ids})


@pytest.mark.parametrize(
    ("ids", "groups"),
    [
        (["P01_1", "P01_2", "P02_1"], (("P01_1", "P01_2"),)),
        (["P01", "P01_2", "P02"], (("P01", "P01_2"),)),
        (["P01_v1", "P01_v2", "P02_v1"], (("P01_v1", "P01_v2"),)),
        (["P01a", "P01b", "P02a"], (("P01a", "P01b"),)),
        (["P01_190312", "P01_190401", "P02_190312"], (("P01_190312", "P01_190401"),)),
        (["anna_20190312", "anna_20190401", "bert_20190312"], (("anna_20190312", "anna_20190401"),)),
        (["pre_001", "post_001", "pre_002"], (("post_001", "pre_001"),)),
        (["P01_tp1", "P01_7", "P02"], (("P01_7", "P01_tp1"),)),
    ],
)
def test_ids_that_may_be_visits_are_reported(ids: list[str], groups: tuple[tuple[str, ...], ...]) -> None:
    assert possible(ids) == groups


@pytest.mark.parametrize(
    "ids",
    [
        ["case_1", "case_2", "other"],
        ["patient01", "patient02"],
        ["BraTS2021_00001", "BraTS2021_00002", "BraTS20_Training_001"],
        ["BraTS-GLI-00001-000", "BraTS-GLI-00001-001", "BraTS-GLI-00002-000"],
        ["TCGA-02-0003", "TCGA-02-0006", "TCGA-06-0001"],
        [f"study7_{number:03}" for number in range(50)],
        ["study7_1", "study7_2"],
        [*(f"site1_{number}" for number in range(20)), *(f"site2_{number}" for number in range(20))],
    ],
)
def test_ids_of_different_patients_are_not_reported_as_visits(ids: list[str]) -> None:
    assert possible(ids) == ()


def test_stated_patients_are_not_reported_as_guesses() -> None:
    ids = ("P01_1", "P01_2", "P02_1")
    assert possible_visits({case_id: case_id for case_id in ids}, ids) == ()


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(patients).failed == 0
