"""Splits: patients stay together, every case validates once, and a user's split is checked."""

from __future__ import annotations

import doctest
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.datasets import splits
from data.datasets.label_stats import LabelStats
from data.datasets.patients import patient_of
from data.datasets.splits import FOLDS, Split, fold_split, read_split, stratified_folds, stratified_split
from data.errors import DataError

properties = settings(derandomize=True, deadline=None, max_examples=60)
case_ids = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 9), st.integers(0, 3)).map(lambda n: f"BraTS-GLI-{n[0]:05}-{n[1]:03}"),
        st.tuples(st.integers(0, 4), st.integers(1, 2)).map(lambda n: f"Brats18_TCIA_{n[0]}_{n[1]}"),
        st.integers(0, 9).map(lambda n: f"BraTS2021_{n:05}"),
    ),
    unique=True,
    min_size=2,
    max_size=30,
).filter(lambda ids: len(set(map(patient_of, ids))) >= 2)
seeds = st.integers(0, 1000)
IDS = ["BraTS-GLI-00001-000", "BraTS-GLI-00001-001", "BraTS-GLI-00002-000", "BraTS-GLI-00003-000"]


def by_id(ids: Iterable[str]) -> dict[str, str]:
    """The patient of each case, inferred from its id."""
    return {case_id: patient_of(case_id) for case_id in ids}


def all_folds(ids: list[str], seed: int = 0) -> list[Split]:
    return [fold_split(by_id(ids), fold, seed=seed) for fold in range(min(FOLDS, len(set(map(patient_of, ids)))))]


def write_split(folder: Path, content: Any) -> Path:
    path = folder / "split.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@properties
@given(case_ids, seeds)
def test_no_patient_is_in_both_parts(ids: list[str], seed: int) -> None:
    for split in all_folds(ids, seed):
        assert not set(map(patient_of, split.train)) & set(map(patient_of, split.validation))


@properties
@given(case_ids, seeds)
def test_every_case_is_for_validation_in_one_fold_and_for_training_in_the_others(ids: list[str], seed: int) -> None:
    folds = all_folds(ids, seed)
    assert sorted(case for split in folds for case in split.validation) == sorted(ids)
    assert all(sorted([*split.train, *split.validation]) == sorted(ids) for split in folds)


@properties
@given(case_ids, seeds)
def test_neither_part_of_a_fold_is_empty(ids: list[str], seed: int) -> None:
    assert all(split.train and split.validation for split in all_folds(ids, seed))


@properties
@given(case_ids, seeds)
def test_fold_sizes_differ_by_at_most_one_patient(ids: list[str], seed: int) -> None:
    sizes = [len(set(map(patient_of, split.validation))) for split in all_folds(ids, seed)]
    assert max(sizes) - min(sizes) <= 1


@properties
@given(case_ids, seeds, st.randoms(use_true_random=False))
def test_the_order_of_the_cases_does_not_change_a_split(ids: list[str], seed: int, random: Any) -> None:
    shuffled = random.sample(ids, len(ids))
    assert fold_split(by_id(shuffled), 1, seed=seed) == fold_split(by_id(ids), 1, seed=seed)


def test_a_split_stays_the_same_across_versions() -> None:
    ids = [f"BraTS2021_{n:05}" for n in range(10)]
    assert fold_split(by_id(ids), 0).validation == ("BraTS2021_00004", "BraTS2021_00005")


def test_another_seed_distributes_the_patients_differently() -> None:
    ids = [f"BraTS2021_{n:05}" for n in range(50)]
    assert fold_split(by_id(ids), 0, seed=1) != fold_split(by_id(ids), 0, seed=2)


@pytest.mark.parametrize("fold", [-1, 3, 5])
def test_a_fold_that_does_not_exist_is_refused_with_the_existing_folds(fold: int) -> None:
    with pytest.raises(DataError, match=f"fold {fold} does not exist; 3 patients give the folds 0 to 2"):
        fold_split(by_id(IDS), fold)


@pytest.mark.parametrize(("ids", "count"), [(IDS[:2], "1 patient"), ([], "0 patients")])
def test_fewer_than_two_patients_are_refused(ids: list[str], count: str) -> None:
    with pytest.raises(DataError, match=rf"^{count} cannot be split into training and validation; give --fold all"):
        fold_split(by_id(ids), 0)


@properties
@given(case_ids, st.integers(0, 1))
def test_a_written_split_reads_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str], fold: int
) -> None:
    split = fold_split(by_id(ids), fold)
    assert read_split(write_split(tmp_path_factory.mktemp("split"), split.to_json()), by_id(ids)) == split


# Folds with similar tumours


@st.composite
def data_sets(draw: st.DrawFn) -> dict[str, LabelStats]:
    tumour = st.builds(LabelStats, volume_um3=st.integers(0, 10**6), enhances=st.booleans())
    return {case_id: draw(tumour) for case_id in draw(case_ids)}


def fold_count(tumours: dict[str, LabelStats]) -> int:
    return min(FOLDS, len(set(map(patient_of, tumours))))


@properties
@given(data_sets(), seeds)
def test_stratified_folds_keep_patients_together_and_contain_every_case_once(
    tumours: dict[str, LabelStats], seed: int
) -> None:
    splits_ = [stratified_split(tumours, by_id(tumours), fold, seed=seed) for fold in range(fold_count(tumours))]
    assert sorted(case for split in splits_ for case in split.validation) == sorted(tumours)
    for split in splits_:
        assert sorted([*split.train, *split.validation]) == sorted(tumours)
        assert not set(map(patient_of, split.train)) & set(map(patient_of, split.validation))
        assert split.train
        assert split.validation


@properties
@given(data_sets(), st.integers(2, 9))
def test_any_number_of_folds_keeps_patients_together_and_contains_every_case_once(
    tumours: dict[str, LabelStats], folds: int
) -> None:
    count = min(folds, len(set(map(patient_of, tumours))))
    splits_ = [stratified_split(tumours, by_id(tumours), fold, folds=folds) for fold in range(count)]
    assert sorted(case for split in splits_ for case in split.validation) == sorted(tumours)
    for split in splits_:
        assert not set(map(patient_of, split.train)) & set(map(patient_of, split.validation))
        assert split.train
        assert split.validation


@properties
@given(data_sets(), seeds)
def test_stratified_fold_sizes_differ_by_at_most_one_patient(tumours: dict[str, LabelStats], seed: int) -> None:
    folds = list(stratified_folds(tumours, by_id(tumours), seed=seed).values())
    sizes = [folds.count(number) for number in range(fold_count(tumours))]
    assert max(sizes) - min(sizes) <= 1


@properties
@given(data_sets(), seeds)
def test_enhancing_tumour_is_spread_over_the_folds(tumours: dict[str, LabelStats], seed: int) -> None:
    folds = stratified_folds(tumours, by_id(tumours), seed=seed)
    enhancing = [folds[patient] for patient in {patient_of(c) for c, tumour in tumours.items() if tumour.enhances}]
    counts = [enhancing.count(number) for number in range(fold_count(tumours))]
    assert max(counts) - min(counts) <= 1
    if len(enhancing) >= FOLDS:
        assert min(counts) >= 1


@properties
@given(st.lists(st.integers(0, 10**6), min_size=10, max_size=60), seeds)
def test_every_fold_gets_one_of_each_five_cases_of_similar_volume(volumes: list[int], seed: int) -> None:
    tumours = {f"BraTS2021_{n:05}": LabelStats(volume_um3=volume, enhances=True) for n, volume in enumerate(volumes)}
    folds = stratified_folds(tumours, by_id(tumours), seed=seed)
    of_fold = [sorted(tumours[p].volume_um3 for p in folds if folds[p] == number) for number in range(FOLDS)]
    ordered = sorted(volumes)
    for mine in of_fold:
        for place, volume in enumerate(mine):
            assert ordered[FOLDS * place] <= volume <= ordered[min(FOLDS * place + FOLDS, len(ordered)) - 1]


@properties
@given(data_sets(), seeds, st.randoms(use_true_random=False))
def test_the_order_of_the_cases_does_not_change_stratified_folds(
    tumours: dict[str, LabelStats], seed: int, random: Any
) -> None:
    shuffled = dict(random.sample(list(tumours.items()), len(tumours)))
    assert stratified_folds(shuffled, by_id(shuffled), seed=seed) == stratified_folds(
        tumours, by_id(tumours), seed=seed
    )


def test_stratified_folds_are_the_same_on_every_machine() -> None:
    tumours = {f"p{n}": LabelStats(volume_um3=n * 7 % 5, enhances=n % 3 > 0) for n in range(12)}
    assert "".join(str(fold) for _, fold in sorted(stratified_folds(tumours, by_id(tumours)).items())) == "110342324040"


def test_another_seed_distributes_neighbours_differently() -> None:
    tumours = {f"p{n:02}": LabelStats(volume_um3=n, enhances=True) for n in range(50)}
    assert stratified_folds(tumours, by_id(tumours), seed=1) != stratified_folds(tumours, by_id(tumours), seed=2)


@pytest.mark.parametrize("fold", [-1, 3])
def test_a_stratified_fold_that_does_not_exist_is_refused(fold: int) -> None:
    with pytest.raises(DataError, match=f"fold {fold} does not exist; 3 patients give the folds 0 to 2"):
        stratified_split(dict.fromkeys(IDS, LabelStats(volume_um3=1, enhances=True)), by_id(IDS), fold)


@pytest.mark.parametrize("ids", [IDS[:2], []])
def test_fewer_than_two_patients_cannot_be_stratified(ids: list[str]) -> None:
    with pytest.raises(DataError, match="cannot be split into training and validation"):
        stratified_split(dict.fromkeys(ids, LabelStats(volume_um3=1, enhances=True)), by_id(ids), 0)


# Splits from a file


@pytest.mark.parametrize("key", ["validation", "val"])
def test_the_validation_part_may_be_called_validation_or_val(tmp_path: Path, key: str) -> None:
    split = read_split(write_split(tmp_path, {"train": IDS[:2], key: IDS[2:3]}), by_id(IDS))
    assert split == Split(train=(IDS[0], IDS[1]), validation=(IDS[2],))


@pytest.mark.parametrize("content", [{"train": IDS}, {"train": IDS, "validation": []}, {"train": IDS, "test": ["x"]}])
def test_a_split_may_do_without_validation(tmp_path: Path, content: dict[str, list[str]]) -> None:
    assert read_split(write_split(tmp_path, content), by_id(IDS)) == Split(train=tuple(IDS), validation=())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("train: [a, b]", "cannot be read as a split"),
        ("", "cannot be read as a split"),
        (IDS, "this file has another form"),
        ({"train": IDS, "fold": 0}, "this file has another form"),
        ({"train": IDS[:1], "val": IDS[2:3], "validation": IDS[3:]}, "both validation and val"),
        ({"train": "BraTS-GLI-00001-000"}, "train must be a list of case ids"),
        ({"train": [1, 2]}, "train must be a list of case ids"),
        ({"train": IDS[:1], "validation": None}, "validation must be a list of case ids"),
        ({"validation": IDS}, "train must be a list of case ids"),
        ({"train": [], "validation": IDS}, "train is empty"),
        ({"train": [IDS[0], IDS[0]]}, "train names a case twice"),
        ({"train": IDS[:1], "val": [IDS[2], IDS[2]]}, "validation names a case twice"),
        ({"train": [*IDS, "nobody"]}, "not in the data set: nobody"),
        ({"train": IDS[:1], "val": ["nobody"]}, "not in the data set: nobody"),
        ({"train": IDS[:1], "val": IDS[1:2]}, "patient BraTS-GLI-00001 is in train and in validation"),
        ({"train": IDS[2:], "val": IDS[2:3]}, "patient BraTS-GLI-00002 is in train and in validation"),
    ],
)
def test_a_bad_split_file_is_refused_with_its_path_and_the_reason(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(DataError, match=rf"split\.json: .*{words}"):
        read_split(write_split(tmp_path, content), by_id(IDS))


def test_a_missing_or_non_text_split_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\xff\xfe\x00\x81")
    for name in ("image", "nowhere"):
        with pytest.raises(DataError, match=f"{name}: cannot be read as a split"):
            read_split(tmp_path / name, by_id(IDS))


def test_only_the_first_five_of_many_unknown_cases_are_named(tmp_path: Path) -> None:
    path = write_split(tmp_path, {"train": [f"c{n}" for n in range(7)]})
    with pytest.raises(DataError, match=r"c0, c1, c2, c3, c4 \.\.\.$"):
        read_split(path, by_id(IDS))


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(splits).failed == 0
