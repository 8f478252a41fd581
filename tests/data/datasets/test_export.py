"""Export: reading the exported data set gives the same voxels, grids and regions; no partial result is left behind."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from data.datasets import export as exporting
from data.datasets.export import LAYOUTS, export_dataset
from data.datasets.label_stats import convention_of
from data.datasets.layouts import find_cases
from data.datasets.source import DataSource
from data.errors import DataError
from data.labels import CONTRASTS, decode
from data.nifti import read_label_map, read_volume

Render = Callable[..., Any]
SOURCES = ["2020", "2021", "2023 GLI", "2024 GLI", "2024 PED", "2015", "UCSF-PDGM", "MSD", "nnU-Net", "manifest"]


def contents(root: Path, labels: str | None = None) -> dict[str, list[Any]]:
    """By case: voxels and affine of each contrast, then the label map in the program's codes with its affine."""
    cases = find_cases(root)
    convention = convention_of(cases, labels=labels)
    found: dict[str, list[Any]] = {}
    for case in cases:
        images = [read_volume(case.contrasts[c], case.volumes.get(c)) for c in CONTRASTS]
        found[case.require().id] = [part for image in images for part in (image.voxels, image.affine)]
        if case.label is not None:
            label = read_label_map(case.label)
            found[case.id] += [decode(label.voxels, convention), label.affine]
    return found


def assert_same(first: dict[str, list[Any]], second: dict[str, list[Any]]) -> None:
    assert first.keys() == second.keys()
    for case, parts in first.items():
        for one, other in zip(parts, second[case], strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("layout", "source"), list(product(LAYOUTS, SOURCES)))
def test_an_export_reads_back_the_same(render: Render, tmp_path: Path, layout: str, source: str) -> None:
    root = render(tmp_path / "in", source).root
    done = export_dataset(DataSource(root), tmp_path / "out", layout)
    assert (done.cases, done.labelled) == (2, 2)
    assert_same(contents(root), contents(tmp_path / "out"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cases_without_label_maps_are_exported_without_them(render: Render, tmp_path: Path, layout: str) -> None:
    root = render(tmp_path / "in", "2021").root
    (root / "BraTS2021_00002" / "BraTS2021_00002_seg.nii.gz").unlink()
    assert export_dataset(DataSource(root), tmp_path / "out", layout).labelled == 1
    assert_same(contents(root), contents(tmp_path / "out"))


@pytest.mark.parametrize("layout", ["nnunet", "csv"])
def test_files_are_copied_byte_for_byte_if_the_layout_allows_it(render: Render, tmp_path: Path, layout: str) -> None:
    root = render(tmp_path / "in", "2021").root
    export_dataset(DataSource(root), tmp_path / "out", layout)
    for old, new in zip(find_cases(root), find_cases(tmp_path / "out"), strict=True):
        for contrast in CONTRASTS:
            assert new.contrasts[contrast].read_bytes() == old.contrasts[contrast].read_bytes()


def test_compressing_an_uncompressed_file_keeps_every_byte(render: Render, tmp_path: Path) -> None:
    root = render(tmp_path / "in", "2020").root
    export_dataset(DataSource(root), tmp_path / "out", "nnunet")
    for old, new in zip(find_cases(root), find_cases(tmp_path / "out"), strict=True):
        assert gzip.decompress(new.contrasts["t1"].read_bytes()) == old.contrasts["t1"].read_bytes()


def test_the_nnunet_description_has_regions_in_the_order_they_are_written(render: Render, tmp_path: Path) -> None:
    export_dataset(DataSource(render(tmp_path / "in", "2021").root), tmp_path / "out", "nnunet")
    content = json.loads((tmp_path / "out" / "Dataset001_BraTS" / "dataset.json").read_text())
    assert content == {
        "channel_names": {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"},
        "labels": {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]},
        "regions_class_order": [1, 2, 3],
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }


def test_contrasts_of_several_voxel_orders_and_fractional_values_fit_in_one_4d_file(
    render: Render, tmp_path: Path
) -> None:
    root = render(tmp_path / "in", "2021").root
    path = find_cases(root)[0].contrasts["t2"]
    image = nib.Nifti1Image.from_filename(path)
    halves = nib.Nifti1Image(np.asarray(image.dataobj, dtype=np.float32) / 2, image.affine)
    nib.save(halves.as_reoriented(np.array([[2, 1], [0, -1], [1, 1]])), path)
    for layout in LAYOUTS:
        export_dataset(DataSource(root), tmp_path / layout, layout)
        case = find_cases(tmp_path / layout)[0]
        t2 = read_volume(case.contrasts["t2"], case.volumes.get("t2"))
        np.testing.assert_array_equal(t2.voxels, halves.dataobj)
        np.testing.assert_array_equal(t2.affine, image.affine)


def test_data_that_a_layout_cannot_store_is_reported(render: Render, tmp_path: Path) -> None:
    root = render(tmp_path / "in", "2024 GLI").root
    assert export_dataset(DataSource(root), tmp_path / "a", "nnunet").notes == (
        "label 4 (resection cavity) became background",
    )
    kept = export_dataset(DataSource(root), tmp_path / "b", "csv")
    assert (kept.notes, kept.labels) == ((), "brats2024")


def test_an_ambiguous_data_set_needs_the_flag(render: Render, tmp_path: Path) -> None:
    root = render(tmp_path / "in", "flat").root
    with pytest.raises(DataError, match="--labels"):
        export_dataset(DataSource(root), tmp_path / "out", "csv")
    assert not (tmp_path / "out").exists()
    export_dataset(DataSource(root, labels="msd"), tmp_path / "out", "csv")
    assert_same(contents(root, "msd"), contents(tmp_path / "out"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("broken", ["t1c", "seg"])
def test_a_bad_file_leaves_no_partial_export(render: Render, tmp_path: Path, layout: str, broken: str) -> None:
    case = find_cases(render(tmp_path / "in", "2021").root)[1]
    path = case.label if broken == "seg" else case.contrasts["t1c"]
    assert path is not None
    path.write_bytes(b"no image")
    with pytest.raises(DataError, match=path.name):
        export_dataset(DataSource(tmp_path / "in"), tmp_path / "out", layout)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


def test_another_grid_and_nan_are_refused_when_files_are_combined(render: Render, tmp_path: Path) -> None:
    path = find_cases(render(tmp_path / "in", "2021").root)[0].contrasts["t2"]
    nib.save(
        nib.Nifti1Image(np.full((8, 8, 8), np.nan, dtype=np.float32), nib.Nifti1Image.from_filename(path).affine), path
    )
    with pytest.raises(DataError, match="512 voxels are NaN or infinite"):
        export_dataset(DataSource(tmp_path / "in"), tmp_path / "out", "msd")
    nib.save(nib.Nifti1Image(np.ones((8, 8, 9), dtype=np.float32), nib.Nifti1Image.from_filename(path).affine), path)
    with pytest.raises(DataError, match="t2 is not on the grid of t1c"):
        export_dataset(DataSource(tmp_path / "in"), tmp_path / "out", "msd")


def test_a_full_disk_leaves_no_partial_export(render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    render(tmp_path / "in", "2021")
    monkeypatch.setattr(exporting, "_write_json", full)
    with pytest.raises(OSError, match="No space left"):
        export_dataset(DataSource(tmp_path / "in"), tmp_path / "out", "nnunet")
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


def test_an_unusable_destination_is_refused(render: Render, tmp_path: Path) -> None:
    root = render(tmp_path / "in", "2021").root
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for place, words in (("full", "not empty"), ("full/file", "is a file"), ("in/out", "is inside")):
        with pytest.raises(DataError, match=words):
            export_dataset(DataSource(root), tmp_path / place, "csv")
    (tmp_path / "empty").mkdir()
    assert export_dataset(DataSource(root), tmp_path / "empty", "csv").cases == 2


def test_ids_that_a_layout_cannot_represent_are_refused(render: Render, tmp_path: Path) -> None:
    root = render(tmp_path / "in", "case folders").root
    for path in (root / "a").iterdir():
        path.rename(path.with_name(f" {path.name}"))
    with pytest.raises(DataError, match=r"the layout csv does not preserve every case id"):
        export_dataset(DataSource(root), tmp_path / "out", "csv")
    assert export_dataset(DataSource(root), tmp_path / "out", "msd").cases == 2


def test_ids_that_end_like_an_nnunet_channel_are_kept(render: Render, tmp_path: Path) -> None:
    root = render(tmp_path / "in", "manifest").root
    root.write_text(root.read_text().replace("\na,", "\nscan_0001,").replace("\nb,", "\nscan_0002,"))
    for layout in LAYOUTS:
        export_dataset(DataSource(root), tmp_path / layout, layout)
        shutil.rmtree(tmp_path / layout / "labelsTr", ignore_errors=True)
        assert [case.id for case in find_cases(tmp_path / layout)] == ["scan_0001", "scan_0002"]


@pytest.mark.parametrize(("layout", "kept"), [("csv", True), ("msd", False), ("nnunet", False)])
def test_patients_from_a_manifest_are_kept_or_their_loss_is_reported(
    render: Render, tmp_path: Path, layout: str, kept: bool
) -> None:
    root = render(tmp_path / "in", "manifest").root
    path = root if root.is_file() else next(root.glob("**/*.csv"))
    head, *rows = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([f"patient,{head}", *(f"anna,{row}" for row in rows)]), encoding="utf-8")
    done = export_dataset(DataSource(root), tmp_path / "out", layout)
    assert {case.patient == "anna" for case in find_cases(tmp_path / "out")} == {kept}
    assert (f"{layout} cannot store patients" in " ".join(done.notes)) is not kept


def test_the_command_writes_the_export_and_reports_it(
    render: Render, tmp_path: Path, znormseg: Callable[..., Any]
) -> None:
    root, out = render(tmp_path / "in", "2024 GLI").root, tmp_path / "out"
    ended = znormseg("data", "export", root, out, "--format", "msd", "--json")
    assert (ended.code, json.loads(ended.out)["labels"]) == (0, "msd")
    ended = znormseg("data", "export", root, tmp_path / "again", "--format", "nnunet")
    assert "2 cases, 2 with a label map (msd)" in ended.out
    assert "label 4 (resection cavity) became background" in ended.out
    assert znormseg("data", "export", root, tmp_path / "no", "--format", "dicom").code == 3
    assert znormseg("data", "check", out).code == 0
