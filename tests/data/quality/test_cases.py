"""Checks across cases: one scan under two ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.datasets.patients import patient_of
from data.labels import CONTRASTS
from data.nifti import Volume
from data.phantoms import make_phantom
from data.quality.cases import Prints, judge_cases, prints_of
from data.quality.digest import digest
from data.quality.finding import Finding


def prints(index: int, gain: float = 1.0) -> Prints:
    phantom = make_phantom(index, seed=2, spacing_mm=4.0)
    noise = np.random.default_rng(index).normal(0, 1, phantom.codes.shape)
    volumes = {c: np.where(v != 0, np.float32(gain) * v + (gain != 1) * noise, 0) for c, v in phantom.images.items()}
    return prints_of(
        {
            c: digest(Volume(voxels=volumes[c].astype(np.float32), affine=phantom.affine, path=Path(c)))
            for c in CONTRASTS
        }
    )


def judge(prints: dict[str, Prints]) -> dict[str, list[Finding]]:
    return judge_cases(prints, {case_id: patient_of(case_id) for case_id in prints})


@pytest.fixture(scope="module")
def three() -> dict[str, Prints]:
    return {f"case{index}": prints(index) for index in range(3)}


def test_different_patients_have_no_findings(three: dict[str, Prints]) -> None:
    assert judge(three) == {}


def test_the_same_images_under_another_id_are_a_problem_of_both_cases(three: dict[str, Prints]) -> None:
    findings = judge({**three, "again": three["case1"]})
    assert sorted(findings) == ["again", "case1"]
    (finding,) = findings["again"]
    assert (finding.kind, finding.severity) == ("same image", "problem")
    assert finding.message == "t1, t1c, t2, flair has the same voxels as in case case1"


def test_a_rescaled_scan_is_a_note_of_both_cases(three: dict[str, Prints]) -> None:
    findings = judge({**three, "again": prints(1, gain=1.7)})
    assert {case: [(f.kind, f.severity) for f in found] for case, found in findings.items()} == {
        "case1": [("same patient", "note")],
        "again": [("same patient", "note")],
    }


def test_time_points_of_one_patient_may_look_alike(three: dict[str, Prints]) -> None:
    ids = ("BraTS-GLI-00001-000", "BraTS-GLI-00001-001")
    assert judge({ids[0]: three["case0"], ids[1]: prints(0, gain=1.7)}) == {}


def test_no_cases_and_empty_cases_have_no_findings() -> None:
    nothing = prints_of({})
    assert judge({}) == {}
    assert judge({"a": nothing, "b": nothing}) == {}
