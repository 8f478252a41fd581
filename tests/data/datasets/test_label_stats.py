"""Label statistics: each label map is read once, and a changed one is detected."""

from __future__ import annotations

import doctest
import gzip
import json
import os
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data.datasets import label_stats
from data.datasets.label_stats import (
    LabelStats,
    changed,
    hash_of,
    label_map_from_json,
    read_label_maps,
    tumour_of,
    tumours_of,
    values_of,
)
from data.datasets.layouts import Case
from data.errors import DataError
from data.labels import BRATS2021, BRATS2023
from data.nifti import read_label_map

SPACING = np.diag([-1.0, -1.0, 2.0, 1.0])


def write_case(folder: Path, name: str, labels: list[int]) -> Case:
    path = folder / f"{name}_seg.nii.gz"
    voxels = np.zeros((4, 3, 2), dtype=np.uint8)
    voxels.ravel()[: len(labels)] = labels
    nib.save(nib.Nifti1Image(voxels, SPACING), path)
    return Case(id=name, folder=folder, label=path)


def test_label_values_are_counted_and_the_voxel_volume_is_recorded(tmp_path: Path) -> None:
    held = read_label_maps([write_case(tmp_path, "a", [1, 2, 2, 4])])["a"]
    assert (held.counts, held.voxel_um3) == ({1: 1, 2: 2, 4: 1}, 2 * 10**9)
    assert tumour_of(held, BRATS2021) == LabelStats(volume_um3=8 * 10**9, enhances=True)


def test_whether_a_tumour_enhances_depends_on_the_convention(tmp_path: Path) -> None:
    held = read_label_maps([write_case(tmp_path, "a", [1, 2, 3]), write_case(tmp_path, "b", [1, 2])])
    assert [tumour_of(held[name], BRATS2023).enhances for name in "ab"] == [True, False]
    with pytest.raises(DataError, match="3"):
        tumour_of(held["a"], BRATS2021)


def test_a_missing_or_damaged_label_map_is_left_out(tmp_path: Path) -> None:
    cases = [write_case(tmp_path, "a", [1]), Case(id="b", folder=tmp_path), write_case(tmp_path, "c", [2])]
    (tmp_path / "c_seg.nii.gz").write_bytes(b"damaged")
    cases.append(Case(id="d", folder=tmp_path, label=tmp_path / "d_seg.nii.gz"))
    held = read_label_maps(cases)
    assert set(held) == {"a"}
    assert values_of("abcd", held) == {"a": (1,), "b": (), "c": (), "d": ()}
    assert tumours_of("ab", held, BRATS2021)["b"] == LabelStats(volume_um3=0, enhances=False)


def test_each_label_map_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(label_stats, "read_label_map", lambda path: (read.append(path), read_label_map(path))[1])
    cases = [write_case(tmp_path, name, [1, 2]) for name in "abc"]
    held = read_label_maps(cases)
    values_of("abc", held), tumours_of("abc", held, BRATS2021), hash_of(held), changed(held, cases)
    assert len(read) == 3


def test_a_written_record_reads_back_the_same(tmp_path: Path) -> None:
    held = read_label_maps([write_case(tmp_path, "a", [1, 2, 2, 4])])["a"]
    assert label_map_from_json(json.loads(json.dumps(asdict(held)))) == held


def test_a_changed_voxel_is_reported_with_its_case(tmp_path: Path) -> None:
    cases = [write_case(tmp_path, name, [1, 2, 4]) for name in "abc"]
    before = read_label_maps(cases)
    write_case(tmp_path, "b", [1, 4, 2])
    os.utime(tmp_path / "b_seg.nii.gz", ns=(1, 1))
    assert changed(before, cases) == ["b"]
    assert hash_of(read_label_maps(cases)) != hash_of(before)


def test_a_deleted_label_map_is_noticed(tmp_path: Path) -> None:
    cases = [write_case(tmp_path, name, [1]) for name in "ab"]
    before = read_label_maps(cases)
    (tmp_path / "a_seg.nii.gz").unlink()
    assert changed(before, cases) == ["a"]


def test_recompressing_the_same_voxels_is_not_a_change(tmp_path: Path) -> None:
    cases = [write_case(tmp_path, name, [1, 2, 4]) for name in "ab"]
    before = read_label_maps(cases)
    path = tmp_path / "a_seg.nii.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 0))
    assert changed(before, cases) == []
    assert hash_of(read_label_maps(reversed(cases))) == hash_of(before)


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(label_stats).failed == 0
