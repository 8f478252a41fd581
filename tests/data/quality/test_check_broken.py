"""Whatever a data folder contains, checking it ends in findings or a DataError, without a warning."""

from __future__ import annotations

import gzip
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data.datasets.source import DataSource
from data.errors import DataError
from data.quality.check import CheckedDataSet, check

FILES = ("t1", "t1ce", "t2", "flair", "seg")
SHAPE = (26, 25, 24)
AFFINE = np.diag([-2.0, -2.0, 2.0, 1.0])


def volume(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray[Any, Any]:
    """Random numbers, 1 to 255 in the middle and 0 around it."""
    voxels = np.random.default_rng(seed).integers(1, 256, shape).astype(np.float32)
    for axis in range(min(3, len(shape))):
        edge: list[Any] = [slice(None)] * len(shape)
        for side in (0, -1):
            edge[axis] = side
            voxels[tuple(edge)] = 0
    return voxels


def image(path: Path, voxels: np.ndarray[Any, Any], affine: np.ndarray[Any, Any] = AFFINE) -> None:
    nib.save(nib.Nifti1Image(voxels, affine), path)


def patched(path: Path, place: int, content: bytes) -> None:
    """Overwrite bytes of a header; the voxels are kept."""
    image(path, volume(1))
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[place : place + len(content)] = content
    path.write_bytes(gzip.compress(bytes(raw), 1))


def cut_short(path: Path) -> None:
    image(path, volume(2))
    path.write_bytes(path.read_bytes()[:-200])


def many(value: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        voxels = volume(3)
        voxels[5:9, 5:9, 5:9] = value
        image(path, voxels)

    return write


def scaled(slope: float, offset: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        voxels = volume(4)
        image(path, np.where(voxels != 0, voxels * np.float32(slope) + np.float32(offset), np.float32(0)))

    return write


def a_label_map(path: Path) -> None:
    image(path, (volume(5) > 200).astype(np.uint8))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "absent": lambda path: None,
    "whole": lambda path: image(path, volume(len(path.name) + sum(path.name.encode()))),
    "a copy": lambda path: image(path, volume(9)),
    "label map": a_label_map,
    "empty file": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no image"),
    "gzip of text": lambda path: path.write_bytes(gzip.compress(b"no image" * 100)),
    "cut short": cut_short,
    "a folder": lambda path: path.mkdir(),
    "a dangling link": lambda path: path.symlink_to("nowhere.nii.gz"),
    "another shape": lambda path: image(path, volume(6, (24, 26, 25))),
    "one voxel": lambda path: image(path, np.ones((1, 1, 1), dtype=np.float32)),
    "4D": lambda path: image(path, volume(7, (8, 8, 8, 4))),
    "2D": lambda path: image(path, volume(7, (8, 8))),
    "another place": lambda path: image(path, volume(8), AFFINE + np.eye(4)[:, [3]] * [[0, 0, 0, 1]]),
    "another order": lambda path: image(path, volume(8), AFFINE[:, [1, 2, 0, 3]]),
    "NaN": many(np.nan),
    "infinity": many(np.inf),
    "all NaN": lambda path: image(path, np.full(SHAPE, np.nan, dtype=np.float32)),
    "zeros": lambda path: image(path, np.zeros(SHAPE, dtype=np.int16)),
    "ones": lambda path: image(path, np.ones(SHAPE, dtype=np.int16)),
    "two values": lambda path: image(path, (volume(1) > 128).astype(np.int16) + (volume(1) > 0)),
    "huge numbers": scaled(1e36, 0),
    "tiny numbers": scaled(1e-42, 0),
    "negative numbers": scaled(-1, 0),
    "far from 0": scaled(1e-3, 1e8),
    "a sheet": lambda path: image(path, np.where(np.arange(SHAPE[2]) == 9, volume(1), 0).astype(np.float32)),
    "complex numbers": lambda path: image(path, volume(1).astype(np.complex64)),
    "no spacing": lambda path: patched(path, 280, bytes(48)),
    "metres": lambda path: image(path, volume(1), np.diag([-0.002, -0.002, 0.002, 1.0])),
    "thick slices": lambda path: image(path, volume(1), np.diag([-1.0, -1.0, 9.0, 1.0])),
    "sheared": lambda path: image(
        path, volume(1), AFFINE + np.eye(4)[[1, 0, 2, 3]] * np.diag([1, 0, 0, 0])[:, [1, 0, 2, 3]]
    ),
    "a header of too many voxels": lambda path: patched(path, 40, struct.pack("<4h", 3, 30000, 30000, 30000)),
    "a header of negative size": lambda path: patched(path, 40, struct.pack("<4h", 3, -5, 5, 5)),
    "a data type that does not exist": lambda path: patched(path, 70, struct.pack("<h", 12345)),
    "labels beyond 255": lambda path: image(path, volume(1) * 7),
    "labels of fractions": lambda path: image(path, volume(1) / 7),
}


def look(damages: tuple[str, ...]) -> CheckedDataSet | str:
    """Check a case with damaged files next to an intact one; return the result, or the text of a DataError."""
    with tempfile.TemporaryDirectory() as folder:
        for case, what in (("a", damages), ("b", ("whole",) * len(FILES))):
            (Path(folder) / case).mkdir()
            for name, damage in zip(FILES, what, strict=True):
                DAMAGES[damage](Path(folder) / case / f"{case}_{name}.nii.gz")
        try:
            return check(DataSource(Path(folder)))
        except DataError as error:
            return str(error)


@settings(derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.tuples(*[st.sampled_from(sorted(DAMAGES))] * len(FILES)))
@example(("huge numbers", "tiny numbers", "negative numbers", "far from 0", "label map"))
@example(("two values", "two values", "a sheet", "ones", "zeros"))
def test_any_damage_ends_in_findings(damages: tuple[str, ...]) -> None:
    found = look(damages)
    assert isinstance(found, CheckedDataSet), found
    for case in found.cases:
        assert all(finding.message for finding in case.findings)
        assert len(case.problems) + len(case.notes) == len(case.findings)


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_each_kind_of_damage_in_every_file_at_once_ends_in_findings(damage: str) -> None:
    found = look((damage,) * len(FILES))
    assert isinstance(found, CheckedDataSet), found


@pytest.mark.parametrize(
    "damage", sorted(set(DAMAGES) - {"whole", "negative numbers", "tiny numbers", "huge numbers", "far from 0"})
)
def test_each_kind_of_damage_in_one_contrast_is_noticed(damage: str) -> None:
    found = look(("whole", "whole", damage, "whole", "label map"))
    assert isinstance(found, CheckedDataSet)
    (case,) = [case for case in found.cases if case.case == "a"]
    quiet = {"label map", "two values", "a copy", "labels beyond 255", "labels of fractions"}
    assert case.findings or damage in quiet
