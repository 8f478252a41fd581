"""Flags: each appears where it should and nowhere else; training cases and their intensities are recognised."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from app.inference.confidence import Trust
from app.inference.flags import CODES, LEAST_IN_LARGEST, MANY_COMPONENTS, TINY_ML, CaseFacts, flags_of
from app.runs.training_record import UNKNOWN, TrainingRecord, training_record
from app.training.cases import record_intensities
from data.datasets.layouts import find_cases
from data.labels import REGIONS, Contrast
from data.preprocess import prepare
from data.quality.intensity_range import (
    LEAST_CASES,
    MARGIN_SD,
    IntensityRange,
    merged_range,
    quantiles_of,
    range_from_json,
    range_of,
)

Call = Callable[..., Any]

CASE = "BraTS2021_00000"
PLAIN = Trust(
    volumes_ml={"WT": 40.0, "TC": 20.0, "ET": 10.0},
    confidence={"WT": 0.9, "TC": 0.9, "ET": 0.9},
    soft_volumes_ml={"WT": 41.0, "TC": 20.0, "ET": 10.0},
    components={"WT": 1, "TC": 1, "ET": 2},
    largest_component=1.0,
    answer_volumes_ml=({"WT": 39.0, "TC": 20.0, "ET": 10.0}, {"WT": 41.0, "TC": 20.0, "ET": 10.0}),
    networks=2,
    flips=1,
)
FACTS = CaseFacts(case="BraTS-GLI-00001-000", trust=PLAIN, zeroed={})
EVEN: Mapping[Contrast, tuple[float, ...]] = {"t1": (0.0,) * 7, "t1c": (1.0,) * 7}


def codes(facts: CaseFacts) -> list[str]:
    return [flag.code for flag in flags_of(facts)]


def with_volume(ml: float, **changes: Any) -> CaseFacts:
    volumes = dict.fromkeys(REGIONS, ml)
    trust = replace(PLAIN, volumes_ml=volumes, soft_volumes_ml=volumes, answer_volumes_ml=(volumes,))
    return replace(FACTS, trust=replace(trust, **changes))


# Each flag


def test_an_ordinary_case_has_no_flag() -> None:
    assert flags_of(FACTS) == ()


@pytest.mark.parametrize(
    ("facts", "code", "words"),
    [
        (replace(FACTS, missing=("t1", "t2", "flair")), "missing_contrast", "t1, t2 and flair"),
        (replace(FACTS, zeroed={"t2": 3}), "nan_to_zero", "3 voxels of t2"),
        (
            replace(FACTS, backgrounds={"t2": "the background is -1024"}),
            "background_not_zero",
            "t2: the background is -1024.",
        ),
        (replace(FACTS, repairs=("t2 was reordered",)), "geometry_repaired", "t2 was reordered."),
        (replace(FACTS, preparation=("a coarse mask.",)), "preparation", "a coarse mask."),
        (replace(FACTS, unusual=("t1c",)), "unusual_intensities", "of t1c are unlike"),
        (with_volume(0.0, components=dict.fromkeys(REGIONS, 0), largest_component=0.0), "no_tumour", "No tumour"),
        (with_volume(TINY_ML - 0.01), "tiny_tumour", "0.51 ml"),
        (with_volume(40.0, components={"WT": MANY_COMPONENTS + 1}), "scattered_tumour", "11 pieces"),
        (with_volume(40.0, largest_component=LEAST_IN_LARGEST - 0.01), "scattered_tumour", "49%"),
        (
            with_volume(40.0, soft_volumes_ml={"WT": 51.0, "TC": 40.0, "ET": 40.0}),
            "uncertain_volume",
            "WT: the label map has 40.0 ml, but the probabilities add up to 51.0 ml",
        ),
        (
            with_volume(40.0, answer_volumes_ml=(dict.fromkeys(REGIONS, 40.0), {"WT": 40.0, "TC": 25.0, "ET": 40.0})),
            "uncertain_volume",
            "TC: single predictions range from 25.0 to 40.0 ml",
        ),
        (replace(FACTS, training=TrainingRecord(trained_on=(FACTS.case,))), "seen_in_training", "trained on this case"),
        (replace(FACTS, training=TrainingRecord(validated_on=(FACTS.case,))), "seen_in_training", "used to choose"),
        (
            replace(FACTS, training=TrainingRecord(trained_on=("BraTS-GLI-00001-001",))),
            "seen_in_training",
            "another scan of this patient",
        ),
    ],
)
def test_each_peculiarity_gives_one_flag_with_a_documented_code(facts: CaseFacts, code: str, words: str) -> None:
    (flag,) = flags_of(facts)
    assert flag.code == code
    assert code in CODES
    assert words in flag.sentence
    assert flag.sentence.endswith(".")


@pytest.mark.parametrize(
    "facts",
    [
        with_volume(TINY_ML),
        with_volume(40.0, components={"WT": MANY_COMPONENTS}, largest_component=LEAST_IN_LARGEST),
        with_volume(2.0, soft_volumes_ml=dict.fromkeys(REGIONS, 2.9)),
        with_volume(40.0, soft_volumes_ml=dict.fromkeys(REGIONS, 49.0)),
        replace(FACTS, training=TrainingRecord(trained_on=("BraTS-GLI-00010-000",))),
    ],
)
def test_values_just_inside_the_bounds_give_no_flag(facts: CaseFacts) -> None:
    assert codes(facts) == []


def test_flags_are_in_the_order_of_their_codes() -> None:
    facts = with_volume(0.1, components={"WT": 20, "TC": 0, "ET": 0})
    facts = replace(facts, zeroed={"t1": 1}, unusual=("t1",), training=TrainingRecord(trained_on=(FACTS.case,)))
    found = codes(facts)
    assert found == sorted(found, key=list(CODES).index)
    assert len(found) == 5


# Intensities


def test_scanner_scale_and_offset_do_not_change_the_quantiles(phantoms: Path, tmp_path: Path) -> None:
    case = find_cases(phantoms)[0]
    for path in case.folder.glob("*.nii.gz"):
        image: Any = nib.load(path)
        voxels = np.asarray(image.dataobj, dtype=np.float32)
        nib.save(nib.Nifti1Image(np.where(voxels != 0, 3 * voxels + 70, 0), image.affine), tmp_path / path.name)
    one, other = (quantiles_of(prepare(found).image) for found in (case, find_cases(tmp_path)[0]))
    assert all(np.allclose(one[contrast], other[contrast], atol=1e-3) for contrast in one)


def test_an_inverted_contrast_is_unusual_and_a_case_within_the_range_is_not(phantoms: Path) -> None:
    images = [prepare(case).image for case in find_cases(phantoms)]
    known = replace(range_of(map(quantiles_of, images)), cases=LEAST_CASES)
    assert [known.unusual(quantiles_of(image)) for image in images] == [()] * len(images)
    inverted = images[0].copy()
    inverted[2] *= -1
    assert known.unusual(quantiles_of(inverted)) == ("t2",)


def test_a_missing_contrast_has_no_quantiles_and_is_not_judged() -> None:
    image = np.ones((4, 3, 3, 3), dtype=np.float32)
    image[1] = 0
    assert set(quantiles_of(image)) == {"t1", "t2", "flair"}
    assert range_of([EVEN] * LEAST_CASES).unusual({"flair": (9.0,) * 7}) == ()


def test_only_values_beyond_the_margin_are_unusual() -> None:
    known = range_of([EVEN] * LEAST_CASES)
    assert known.unusual({"t1": (0.0,) * 6 + (MARGIN_SD,)}) == ()
    assert known.unusual({"t1": (0.0,) * 6 + (MARGIN_SD + 0.01,)}) == ("t1",)


def test_a_range_of_too_few_cases_flags_nothing() -> None:
    assert range_of([EVEN] * (LEAST_CASES - 1)).unusual({"t1": (9.0,) * 7}) == ()


def test_a_range_survives_the_round_trip_through_json() -> None:
    known = range_of([EVEN, {"t1": (1.0,) * 7}])
    assert range_from_json(json.loads(json.dumps(known.to_json()))) == known


def test_joined_ranges_equal_the_range_of_all_cases() -> None:
    one, other = range_of([EVEN]), range_of([{"t1": (-1.0,) * 7}])
    both = range_of([EVEN, {"t1": (-1.0,) * 7}])
    assert merged_range([one, other]) == both
    assert isinstance(both, IntensityRange)


# Records of a run


def test_the_range_of_a_run_is_written_only_once(tiny_run: Path, tmp_path: Path) -> None:
    class Even:
        synthetic = False

        def image(self) -> Any:
            return np.ones((4, 2, 2, 2), dtype=np.float16)

    record_intensities(tmp_path, [Even(), Even()])  # type: ignore[list-item]  # all that is asked of a case
    known = training_record(tmp_path).intensities
    assert known is not None
    assert (known.cases, known.least["t2"]) == (2, (1.0,) * 7)
    shutil.copy(tiny_run / "intensities.json", tmp_path)
    record_intensities(tmp_path, [Even()])  # type: ignore[list-item]
    assert training_record(tmp_path).intensities == training_record(tiny_run).intensities


def test_a_run_records_its_cases_and_their_intensities(tiny_run: Path) -> None:
    known = training_record(tiny_run)
    split = json.loads((tiny_run / "split.json").read_text())
    assert (list(known.trained_on), list(known.validated_on)) == (split["train"], split["validation"])
    assert known.intensities is not None
    assert known.intensities.cases == len(split["train"])
    assert set(known.intensities.least) == {"t1", "t1c", "t2", "flair"}


def test_a_folder_without_records_gives_no_range(tmp_path: Path) -> None:
    assert training_record(tmp_path) == UNKNOWN


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 2}'])
def test_damaged_records_are_ignored_and_logged(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("split.json", "intensities.json"):
        (tmp_path / name).write_text(text)
    assert training_record(tmp_path) == UNKNOWN
    assert len(caplog.records) == 2


def test_an_ensemble_merges_the_ranges_of_its_folds(tiny_run: Path, tmp_path: Path) -> None:
    for name in ("fold-0", "fold-1"):
        (tmp_path / name).mkdir()
        shutil.copy(tiny_run / "intensities.json", tmp_path / name)
    alone, joint = training_record(tiny_run).intensities, training_record(tmp_path).intensities
    assert alone is not None
    assert joint == replace(alone, cases=2 * alone.cases)


# From files to flags


def flags_in(path: Path) -> dict[str, str]:
    return {flag["code"]: flag["sentence"] for flag in json.loads(path.read_text())["flags"]}


def test_predict_flags_a_training_case_and_a_new_case_with_unusual_files(
    tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    run, place = tmp_path / "run", tmp_path / "in" / "odd"
    shutil.copytree(tiny_run, run)
    content = json.loads((run / "intensities.json").read_text())
    (run / "intensities.json").write_text(json.dumps({**content, "cases": LEAST_CASES}))
    place.mkdir(parents=True)
    for path in (phantoms / CASE).glob("*.nii.gz"):
        image: Any = nib.load(path)
        kind = path.name.removesuffix(".nii.gz").rpartition("_")[2]
        voxels = np.asarray(image.dataobj, dtype=np.float32)
        if kind == "flair":
            voxels = np.where(voxels > 0, 2 * voxels.max() - voxels, 0)
        image = nib.Nifti1Image(voxels, image.affine)
        nib.save(nib.as_closest_canonical(image) if kind == "t2" else image, place / f"odd_{kind}.nii.gz")
    trained_on = json.loads((run / "split.json").read_text())["train"][0]
    for case in (place, phantoms / trained_on):
        assert znormseg("predict", run, case, tmp_path / "out").code == 0
    odd = flags_in(tmp_path / "out" / "odd.json")
    assert "the intensities of flair are unlike" in odd["unusual_intensities"].lower()
    assert "t2 is stored in voxel order RAS, t1c in LPS" in odd["geometry_repaired"]
    assert "seen_in_training" not in odd
    seen = flags_in(tmp_path / "out" / f"{trained_on}.json")
    assert "seen_in_training" in seen
    assert not {"unusual_intensities", "geometry_repaired"} & set(seen)


def test_headers_with_ambiguous_geometry_are_flagged(phantoms: Path, tmp_path: Path) -> None:
    for path in (phantoms / CASE).glob("*.nii.gz"):
        image: Any = nib.load(path)
        kind = path.name.removesuffix(".nii.gz").rpartition("_")[2]
        if kind == "t2":
            other = image.affine.copy()
            other[0, 3] += 7
            image.set_qform(other, 1)
        nib.save(image, tmp_path / f"{CASE}_{kind}.nii.gz")
    repairs = prepare(find_cases(tmp_path)[0]).repairs
    assert repairs == ("t2: its sform and qform are up to 7 mm apart; the sform was used",)


def test_headers_without_sform_and_qform_are_flagged(phantoms: Path, tmp_path: Path) -> None:
    for path in (phantoms / CASE).glob("*.nii.gz"):
        image: Any = nib.load(path)
        image.set_qform(None, 0)
        image.set_sform(None, 0)
        nib.save(image, tmp_path / path.name)
    repairs = prepare(find_cases(tmp_path)[0]).repairs
    assert len(repairs) == 4
    assert all("neither sform nor qform" in sentence for sentence in repairs)
