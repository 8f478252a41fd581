from __future__ import annotations

import functools
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from data.errors import DataError
from data.labels import BRATS2021, BRATS2023, CONTRASTS, ENHANCING, NECROSIS, OEDEMA, Contrast, decode
from data.phantoms import Phantom, case_name, make, make_phantom, write_phantom, write_phantoms
from data.phantoms.grids import PhantomGrid
from data.phantoms.lesion import place_lesion

SPACING_MM = 4.0
ROOT = Path(__file__).parents[3]
SUFFIXES = {2021: ["t1", "t1ce", "t2", "flair", "seg"], 2023: ["t1n", "t1c", "t2w", "t2f", "seg"]}


@functools.cache
def cases(count: int) -> list[Phantom]:
    return [make_phantom(i, spacing_mm=SPACING_MM) for i in range(count)]


def voxels(phantom: Phantom) -> list[npt.NDArray[Any]]:
    return [*(phantom.images[c] for c in CONTRASTS), phantom.codes]


def same(a: Phantom, b: Phantom) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(voxels(a), voxels(b), strict=True))


def healthy(phantom: Phantom) -> npt.NDArray[np.bool_]:
    """Brain at least three voxels away from the tumour, beyond the reach of fading oedema and blur."""
    return (phantom.images["t1"] > 0) & ~ndimage.binary_dilation(phantom.codes > 0, iterations=3)


def white_matter(phantom: Phantom) -> npt.NDArray[np.bool_]:
    """The brightest third of healthy tissue on T1."""
    t1, brain = phantom.images["t1"], healthy(phantom)
    return brain & (t1 > np.percentile(t1[brain], 67))


def mean_over_white(phantom: Phantom, contrast: Contrast, code: int) -> float:
    image = phantom.images[contrast]
    return float(image[phantom.codes == code].mean() / image[white_matter(phantom)].mean())


def test_a_case_is_the_same_in_every_run() -> None:
    assert same(make_phantom(3, spacing_mm=SPACING_MM), cases(20)[3])


def test_a_case_is_the_same_in_another_process() -> None:
    code = (
        "import hashlib; from data.phantoms import make_phantom; p = make_phantom(2, spacing_mm=4.0);"
        "print(hashlib.sha256(b''.join(v.tobytes() for v in [*p.images.values(), p.codes])).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    digest = hashlib.sha256(b"".join(v.tobytes() for v in voxels(cases(20)[2]))).hexdigest()
    assert run.stdout.strip() == digest


def test_a_case_does_not_depend_on_how_many_are_generated(tmp_path: Path) -> None:
    one = write_phantoms(tmp_path / "one", 1, spacing_mm=SPACING_MM)[0]
    two = write_phantoms(tmp_path / "two", 2, spacing_mm=SPACING_MM)[0]
    for suffix in SUFFIXES[2021]:
        name = f"BraTS2021_00000_{suffix}.nii.gz"
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_cases_of_one_series_differ() -> None:
    assert len({p.codes.tobytes() for p in cases(20)}) == 20
    assert len({(p.images["t1"] > 0).tobytes() for p in cases(20)}) == 20


def test_series_of_different_seeds_differ() -> None:
    assert not same(make_phantom(0, seed=1, spacing_mm=SPACING_MM), cases(20)[0])


def test_the_tumour_has_the_same_volume_at_every_spacing() -> None:
    coarse, fine = cases(20)[0].codes, make_phantom(0, spacing_mm=2.0).codes
    for code in (NECROSIS, OEDEMA, ENHANCING):
        volume_ml = np.count_nonzero(fine == code) * 2.0**3 / 1000
        assert np.count_nonzero(coarse == code) * 4.0**3 / 1000 == pytest.approx(volume_ml, rel=0.25, abs=1.0)


@pytest.mark.parametrize(("spacing_mm", "shape"), [(4.0, (60, 60, 39)), (2.0, (120, 120, 78)), (8.0, (30, 30, 19))])
def test_the_field_of_view_matches_brats(spacing_mm: float, shape: tuple[int, ...]) -> None:
    phantom = make_phantom(1, spacing_mm=spacing_mm)
    assert {v.shape for v in voxels(phantom)} == {shape}
    assert phantom.affine.tolist() == [
        [-spacing_mm, 0, 0, 0],
        [0, -spacing_mm, 0, 239],
        [0, 0, spacing_mm, 0],
        [0, 0, 0, 1],
    ]


def test_all_contrasts_share_one_skull_stripped_brain() -> None:
    for phantom in cases(20):
        brain = phantom.images["t1"] > 0
        assert all(np.array_equal(phantom.images[c] > 0, brain) for c in CONTRASTS)
        assert 0.9 < np.count_nonzero(brain) * SPACING_MM**3 / 1e6 < 1.8  # litres
        assert not brain[0].any()
        assert ndimage.label(brain)[1] <= 3


def test_the_brain_does_not_touch_the_edge_of_its_bounding_box() -> None:
    grid = PhantomGrid.of_spacing(SPACING_MM)
    for phantom in cases(20):
        for axis, (start, stop) in enumerate(zip(grid.start, grid.stop, strict=True)):
            hit = np.flatnonzero((phantom.images["t1"] > 0).any(axis=tuple({0, 1, 2} - {axis})))
            assert hit[-1] < stop - 1
            # The brainstem is cut off at the bottom, as in real volumes.
            assert hit[0] > start or axis == 2


def test_intensities_are_int16_and_vary_between_scanners() -> None:
    maxima = [p.images["flair"].max() for p in cases(20)]
    assert all(p.images[c].dtype == np.int16 for p in cases(20) for c in CONTRASTS)
    assert min(maxima) > 100
    assert max(maxima) > 3 * min(maxima)


def test_the_tumour_lies_inside_the_brain() -> None:
    for phantom in cases(20):
        assert not (phantom.codes[phantom.images["t1"] == 0]).any()


def test_the_codes_are_those_of_the_program() -> None:
    for phantom in cases(20):
        assert phantom.codes.dtype == np.uint8
        assert set(np.unique(phantom.codes)) <= {0, NECROSIS, OEDEMA, ENHANCING}
        assert {NECROSIS, OEDEMA} <= set(np.unique(phantom.codes))


def test_enhancing_tumour_is_surrounded_by_the_rest_of_the_tumour() -> None:
    for phantom in cases(20):
        parts, _ = ndimage.label(phantom.codes > 0)
        with_oedema = np.isin(parts, np.unique(parts[phantom.codes == OEDEMA]))
        enhancing = phantom.codes == ENHANCING
        assert np.count_nonzero(enhancing & with_oedema) >= 0.9 * np.count_nonzero(enhancing)


def test_about_one_case_in_five_does_not_enhance() -> None:
    without = sum(not (p.codes == ENHANCING).any() for p in cases(20))
    assert 3 <= without <= 5


def test_some_cases_have_several_foci_and_most_have_one() -> None:
    foci = []
    for phantom in cases(20):
        parts, n = ndimage.label((phantom.codes == NECROSIS) | (phantom.codes == ENHANCING), np.ones((3, 3, 3)))
        sizes_ml = ndimage.sum_labels(parts > 0, parts, np.arange(1, n + 1)) * SPACING_MM**3 / 1000
        foci.append(int(np.count_nonzero(sizes_ml > 1.0)))
    assert 3 <= sum(n > 1 for n in foci) <= 9


def test_volumes_cover_the_range_of_gliomas() -> None:
    volumes_ml = [np.count_nonzero(p.codes) * SPACING_MM**3 / 1000 for p in cases(20)]
    assert 5 < min(volumes_ml) < 30
    assert 90 < max(volumes_ml) < 170


def test_oedema_prefers_white_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, Any]] = []

    def spy(tumour: Any, tissue: Any, grid: Any) -> Any:
        seen.append((tissue, place_lesion(tumour, tissue, grid)))
        return seen[-1][1]

    monkeypatch.setattr(make, "place_lesion", spy)
    for index in range(4):
        make_phantom(index, spacing_mm=SPACING_MM)
    for tissue, lesion in seen:
        assert tissue.white[lesion.codes == OEDEMA].mean() > 1.3 * tissue.white.mean()
        assert tissue.fluid[lesion.codes == OEDEMA].max() < 0.5


@pytest.mark.parametrize(
    ("contrast", "code", "least", "most"),
    [
        ("t1c", ENHANCING, 1.03, 3.0),
        ("t1c", NECROSIS, 0.2, 0.95),
        ("t1", OEDEMA, 0.5, 1.05),
        ("flair", OEDEMA, 1.05, 3.0),
        ("t2", OEDEMA, 1.1, 4.0),
        ("t2", NECROSIS, 1.2, 5.0),
    ],
)
def test_tumour_intensities_relate_correctly_to_white_matter(
    contrast: Contrast, code: int, least: float, most: float
) -> None:
    present = [p for p in cases(20) if np.count_nonzero(p.codes == code) > 30]
    # The limits are loose, because white matter elsewhere is affected differently by the bias field.
    assert all(least < mean_over_white(p, contrast, code) < most for p in present)


def test_fluid_is_bright_on_t2_and_dark_on_flair() -> None:
    for phantom in cases(20):
        brain = healthy(phantom)
        t2, flair = phantom.images["t2"], phantom.images["flair"]
        fluid = brain & (t2 > np.percentile(t2[brain], 99))
        assert np.median(flair[fluid]) < np.median(flair[brain])


def test_no_flair_threshold_alone_segments_the_tumour() -> None:
    best = []
    for phantom in cases(20):
        flair, whole = phantom.images["flair"], phantom.codes > 0
        cuts = (flair > t for t in np.percentile(flair[flair > 0], np.arange(70, 100, 2)))
        best.append(max(2 * (c & whole).sum() / (c.sum() + whole.sum()) for c in cuts))
    assert 0.2 < np.mean(best) < 0.85


@pytest.mark.parametrize(("year", "prefix"), [(2021, "BraTS2021_00007_"), (2023, "BraTS-GLI-00007-000-")])
def test_files_follow_the_naming_of_their_year(tmp_path: Path, year: int, prefix: str) -> None:
    folder = write_phantom(tmp_path, 7, spacing_mm=8.0, year=year)
    assert folder == tmp_path / case_name(7, year)
    assert {p.name for p in folder.iterdir()} == {f"{prefix}{s}.nii.gz" for s in SUFFIXES[year]}


def test_headers_match_released_brats_files(tmp_path: Path) -> None:
    folder = write_phantom(tmp_path, 0, spacing_mm=8.0)
    expected = [[-8, 0, 0, 0], [0, -8, 0, 239], [0, 0, 8, 0], [0, 0, 0, 1]]
    for path in folder.iterdir():
        image = nib.Nifti1Image.from_filename(path)
        is_seg = path.name.endswith("seg.nii.gz")
        assert image.get_data_dtype() == (np.uint8 if is_seg else np.int16)
        assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == ((1, 1) if is_seg else (2, 1))
        for affine in (image.get_qform(), image.get_sform(), image.affine):
            np.testing.assert_allclose(affine, expected, atol=1e-5)
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        assert image.header.get_xyzt_units()[0] == "mm"


def test_files_contain_the_voxels_of_the_phantom(tmp_path: Path) -> None:
    folder = write_phantom(tmp_path, 1, spacing_mm=SPACING_MM)
    for contrast, suffix in zip(CONTRASTS, SUFFIXES[2021], strict=False):
        stored = np.asarray(nib.Nifti1Image.from_filename(folder / f"{folder.name}_{suffix}.nii.gz").dataobj)
        np.testing.assert_array_equal(stored, cases(20)[1].images[contrast])


def test_years_differ_in_label_numbers_but_not_in_codes(tmp_path: Path) -> None:
    paths = [write_phantom(tmp_path, 0, spacing_mm=SPACING_MM, year=y) for y in (2021, 2023)]
    old = np.asarray(nib.Nifti1Image.from_filename(paths[0] / "BraTS2021_00000_seg.nii.gz").dataobj)
    new = np.asarray(nib.Nifti1Image.from_filename(paths[1] / "BraTS-GLI-00000-000-seg.nii.gz").dataobj)
    assert (old.max(), new.max()) == (4, 3)
    np.testing.assert_array_equal(decode(old, BRATS2021), decode(new, BRATS2023))


def test_an_existing_case_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "BraTS2021_00001").mkdir()
    with pytest.raises(DataError, match="BraTS2021_00001 already exists"):
        write_phantoms(tmp_path, 3, spacing_mm=8.0)
    assert [p.name for p in tmp_path.iterdir()] == ["BraTS2021_00001"]


def test_a_failure_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(nib, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_phantom(tmp_path, 0, spacing_mm=8.0)
    assert list(tmp_path.iterdir()) == []


def test_each_case_is_reported_once_it_is_complete(tmp_path: Path) -> None:
    reported: list[tuple[Path, int]] = []
    written = write_phantoms(
        tmp_path, 2, spacing_mm=8.0, on_case=lambda p: reported.append((p, len(list(p.iterdir()))))
    )
    assert reported == [(p, 5) for p in written]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count is 0; allowed is 1 or more"),
        ({"count": 1, "seed": -1}, "seed is -1; allowed is 0 or more"),
        ({"count": 1, "spacing_mm": 0.4}, r"spacing_mm is 0.4; allowed are 0.5 to 8 mm"),
        ({"count": 1, "spacing_mm": 9.0}, r"spacing_mm is 9; allowed are 0.5 to 8 mm"),
        ({"count": 1, "spacing_mm": float("nan")}, "spacing_mm is nan"),
        ({"count": 1, "year": 2020}, "year is 2020; allowed are 2021 and 2023"),
        ({"count": 100_001}, "case index is 100000; allowed are 0 to 99999"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_phantoms(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_a_file_instead_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file"):
        write_phantom(tmp_path / "file", 0, spacing_mm=8.0)


def test_importing_the_module_does_not_import_nilearn() -> None:
    code = "import sys, data.phantoms; assert not {'nilearn', 'sklearn', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
