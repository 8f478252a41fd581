"""The PatchCamelyon reproduction: the HDF5 files, the messages when they are missing, and a run on made patches."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import patchcamelyon
import pytest
import sweep

h5py = pytest.importorskip("h5py")

#: Settings of a run of two steps.
TINY = (
    *("--steps", "2", "--batch", "2", "--train-images", "6", "--validation-images", "4", "--test-images", "4"),
    *("--validate-every", "1", "--target", "0", "--optimizers", "adam", "--seeds", "1", "--rules", "none", "bgn+znorm"),
    *("--networks", "resnet10"),
)


def name(part: str, kind: str) -> str:
    return f"camelyonpatch_level_2_split_{part}_{kind}.h5"


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    """Eight patches per part, in the shapes of the published files; every second one holds tumour."""
    random = np.random.default_rng(0)
    for part in patchcamelyon.PARTS:
        with h5py.File(tmp_path / name(part, "x"), "w") as file:
            file["x"] = random.integers(0, 256, (8, 96, 96, 3), dtype=np.uint8)
        with h5py.File(tmp_path / name(part, "y"), "w") as file:
            file["y"] = (np.arange(8, dtype=np.uint8) % 2).reshape(8, 1, 1, 1)
    return tmp_path


def test_patches_are_read_by_number(patches: Path) -> None:
    found = patchcamelyon.open_part(patches, "train", 6)
    images, labels = found.batch([1, 4])
    assert images.shape == (2, 3, 96, 96)
    assert -1 <= float(images.min()) < float(images.max()) <= 1
    assert labels.tolist() == [1.0, 0.0]
    assert len(found.labels) == 6


def test_a_missing_file_is_named_with_the_source_of_the_data(patches: Path) -> None:
    (patches / name("valid", "y")).unlink()
    with pytest.raises(SystemExit, match=r"split_valid_y\.h5: no such file\. PatchCamelyon is at https://zenodo\.org"):
        patchcamelyon.main([str(patches), str(patches / "out")])


def test_a_damaged_file_is_named(patches: Path) -> None:
    (patches / name("train", "x")).write_bytes(b"\x1f\x8b not unpacked")
    with pytest.raises(SystemExit, match=r"split_train_x\.h5: not a readable HDF5 file with a data set x"):
        patchcamelyon.open_part(patches, "train", 1)


def test_without_h5py_the_command_that_installs_it_is_named(patches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(SystemExit, match=r"pip install 'znormseg\[reproductions\]'"):
        patchcamelyon.open_part(patches, "train", 1)


def test_the_reproduction_runs_on_synthetic_patches(
    patches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "RATES", 1)
    patchcamelyon.main([str(patches), str(tmp_path / "out"), *TINY])
    lines = capsys.readouterr().out.splitlines()
    assert "AUROC" in lines[0]
    assert [line.split(" | ")[2] for line in lines[2:]] == ["none", "bgn+znorm"]
