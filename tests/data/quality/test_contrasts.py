"""The contrasts of a case compared: names with intensities, and anatomy with anatomy."""

from __future__ import annotations

from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from data.datasets.source import DataSource
from data.labels import CONTRASTS, Contrast
from data.nifti import Volume
from data.phantoms import Phantom, make_phantom
from data.quality.check import check
from data.quality.contrasts import Tissue, compare_tissue, judge_contrasts, most_likely
from data.quality.digest import Digest, digest
from data.quality.finding import Finding

LOOKS = {"t1": "T1 or T1c", "t1c": "T1 or T1c", "t2": "T2", "flair": "FLAIR"}


def digests(phantom: Phantom) -> dict[Contrast, Digest]:
    return {c: as_digest(phantom.images[c], phantom.affine) for c in CONTRASTS}


def as_digest(voxels: npt.NDArray[np.generic], affine: npt.NDArray[np.float64]) -> Digest:
    return digest(Volume(voxels=voxels.astype(np.float32), affine=affine, path=Path("a.nii.gz")))


@pytest.fixture(scope="module", params=range(3))
def seen(request: pytest.FixtureRequest) -> dict[Contrast, Digest]:
    return digests(make_phantom(request.param, seed=2, spacing_mm=4.0))


@pytest.fixture(scope="module")
def another() -> dict[Contrast, Digest]:
    return digests(make_phantom(7, seed=2, spacing_mm=4.0))


def said(findings: list[Finding], kind: str) -> set[str | None]:
    assert {finding.kind for finding in findings} <= {kind}
    return {finding.contrast for finding in findings}


def test_correctly_named_contrasts_have_no_findings(seen: dict[Contrast, Digest]) -> None:
    assert judge_contrasts(seen) == []


@pytest.mark.parametrize("pair", [p for p in combinations(CONTRASTS, 2) if p != ("t1", "t1c")], ids="-".join)
def test_two_swapped_contrasts_are_both_named(pair: tuple[Contrast, Contrast], seen: dict[Contrast, Digest]) -> None:
    one, other = pair
    findings = judge_contrasts({**seen, one: seen[other], other: seen[one]})
    assert said(findings, "swapped contrasts") == set(pair)
    assert {finding.severity for finding in findings} == {"problem"}


def test_every_permutation_of_the_contrasts_is_recognised(seen: dict[Contrast, Digest]) -> None:
    tissue = compare_tissue(seen)
    assert tissue is not None
    for order in permutations(range(4)):
        mixed = Tissue(spread=tissue.spread[[*order]], correlation=tissue.correlation[np.ix_(order, order)])
        assert most_likely(mixed) == tuple(LOOKS[CONTRASTS[real]] for real in order)


def test_swapped_t1_and_t1c_give_at_most_a_note(seen: dict[Contrast, Digest]) -> None:
    findings = judge_contrasts({**seen, "t1": seen["t1c"], "t1c": seen["t1"]})
    assert {finding.severity for finding in findings} <= {"note"}


def test_enhancement_on_t1_instead_of_t1c_is_noted() -> None:
    seen = digests(make_phantom(3, seed=2, spacing_mm=3.0))
    findings = judge_contrasts({**seen, "t1": seen["t1c"], "t1c": seen["t1"]})
    assert [(finding.kind, finding.severity) for finding in findings] == [("swapped contrasts", "note")]


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_a_contrast_of_another_patient_is_named(
    contrast: Contrast, seen: dict[Contrast, Digest], another: dict[Contrast, Digest]
) -> None:
    findings = judge_contrasts({**seen, contrast: another[contrast]})
    assert said(findings, "another patient") == {contrast}


@pytest.mark.parametrize("shrink", [1, 2])
def test_separately_skull_stripped_contrasts_still_count_as_one_patient(
    shrink: int, seen: dict[Contrast, Digest]
) -> None:
    from scipy import ndimage

    voxels = seen["t2"].coarse
    smaller = np.where(ndimage.binary_erosion(voxels != 0, iterations=shrink), voxels, 0)
    findings = judge_contrasts({**seen, "t2": as_digest(smaller, seen["t2"].grid.affine)})
    assert {finding.severity for finding in findings} <= {"note"}


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_a_contrast_missing_part_of_the_brain_is_a_note(contrast: Contrast, seen: dict[Contrast, Digest]) -> None:
    voxels = seen[contrast].coarse.copy()
    voxels[:, :, 28:] = 0
    (finding,) = judge_contrasts({**seen, contrast: as_digest(voxels, seen[contrast].grid.affine)})
    assert (finding.kind, finding.contrast, finding.severity) == ("cut field of view", contrast, "note")


def test_gain_offset_or_inversion_does_not_suggest_another_patient(
    seen: dict[Contrast, Digest],
) -> None:
    voxels = seen["t1"].coarse
    for scaled in (3 * voxels, np.where(voxels != 0, voxels + 500, 0), np.where(voxels != 0, voxels - 5000, 0)):
        assert judge_contrasts({**seen, "t1": as_digest(scaled, seen["t1"].grid.affine)}) == []


def test_a_duplicated_contrast_is_named(seen: dict[Contrast, Digest]) -> None:
    assert said(judge_contrasts({**seen, "flair": seen["t2"]}), "same image") == {"flair"}


def test_the_grid_shared_by_most_contrasts_is_the_reference(seen: dict[Contrast, Digest]) -> None:
    moved = seen["t1"].grid.affine.copy()
    moved[1, 3] += 7
    (finding,) = judge_contrasts({**seen, "t1": as_digest(seen["t1"].coarse, moved)})
    assert (finding.kind, finding.contrast, finding.severity) == ("another grid", "t1", "problem")
    assert "7.00 mm on axis y" in finding.message


def test_images_with_too_few_voxels_are_not_judged() -> None:
    random = np.random.default_rng(0)
    seen = {c: as_digest(np.pad(random.random((12, 12, 12)), 4), np.eye(4)) for c in CONTRASTS}
    assert compare_tissue(seen) is None
    assert judge_contrasts(seen) == []


def test_real_cases_have_no_problems(real_cases: Path) -> None:
    assert {case.problems for case in check(DataSource(real_cases)).cases} == {()}
