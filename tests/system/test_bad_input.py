"""Bad input on the command line: one message with the cause and the remedy, an exit code, and nothing left behind.

The tables of this file are what docs/errors.md lists, and what tests/system/test_guards.py takes the guards away from.
"""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.cifti2 import cifti2_axes

Call = Callable[..., Any]

CASE = "BraTS2021_00000"


@pytest.fixture
def data(phantoms: Path, tmp_path: Path) -> Path:
    """A data set of three cases that a test may spoil."""
    for case in sorted(phantoms.iterdir())[:3]:
        shutil.copytree(case, tmp_path / "data" / case.name)
    return tmp_path / "data"


@pytest.fixture
def options(tiny_settings: list[str]) -> list[str]:
    """The tiny settings as arguments of the command line."""
    return [word for setting in tiny_settings for word in ("--set", setting)]


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A trained run that a test may spoil."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def change(path: Path, edit: Callable[[Any], Any], dtype: Any = np.float32) -> None:
    """Store an image again with other voxels."""
    image: Any = nib.load(path)
    nib.save(nib.Nifti1Image(edit(np.asarray(image.dataobj, dtype=np.float32)).astype(dtype), image.affine), path)


def move(path: Path, axis: int, mm: float) -> None:
    image: Any = nib.load(path)
    affine = image.affine.copy()
    affine[axis, 3] += mm
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), path)


def shear(path: Path) -> None:
    image: Any = nib.load(path)
    affine = image.affine.copy()
    affine[0, 1] = 1.0
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), path)


def scale(path: Path, factor: float) -> None:
    image: Any = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.diag([factor] * 3 + [1]) @ image.affine), path)


def claim(path: Path, side: int) -> None:
    """A header that promises more voxels than there are."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header["dim"] = [3, side, side, side, 1, 1, 1, 1]
    header["vox_offset"] = 352
    path.write_bytes(gzip.compress(header.binaryblock + bytes(1000)))


def cifti(path: Path, *, compressed: bool) -> None:
    """A dense scalar file of one map over a few voxels, under the name of a volume."""
    mask = np.ones((2, 2, 2), dtype=bool)
    brain = cifti2_axes.BrainModelAxis.from_mask(mask, affine=np.eye(4), name="other")
    axes = (cifti2_axes.ScalarAxis(["thickness"]), brain)
    image = nib.Cifti2Image(np.zeros((1, 8), dtype=np.float32), header=axes)
    plain = path.with_name(path.name.removesuffix(".gz"))
    image.to_filename(plain)
    path.unlink()
    if compressed:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()


def twice(path: Path) -> None:
    shutil.copy(path, path.with_name(path.name.removesuffix(".gz")))


def link_out(path: Path) -> None:
    """Put the file elsewhere, and a link in its place."""
    elsewhere = path.parents[2] / "elsewhere.nii.gz"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("gone.nii.gz")


def hole(value: float) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        def edit(voxels: Any) -> Any:
            voxels[0, 0, :2] = value
            return voxels

        change(path, edit)

    return spoil


RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])

#: What a file may be that stands where the T2 image of a case belongs, and the words of the message.
BAD_IMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (Path.unlink, [f"case {CASE}: contrast t2 is missing"]),
    "two files": (twice, [f"case {CASE}: two files for t2", "_t2.nii,", "_t2.nii.gz"]),
    "other shape": (lambda p: change(p, lambda v: v[:-1]), [f"case {CASE}", "t2", "shape", "Register and resample"]),
    "other origin": (lambda p: move(p, 0, 5), [f"case {CASE}", "t2", "5.00 mm on axis x (right-left)", "resample"]),
    "other slices": (lambda p: move(p, 2, -3), ["3.00 mm on axis z (inferior-superior)"]),
    "4D": (lambda p: change(p, lambda v: np.stack([v, v], axis=3)), ["contrast t2", "4D with shape", "Split it"]),
    "RGB": (lambda p: change(p, lambda v: np.zeros(v.shape, RGB), RGB), ["contrast t2", "real-valued grey-scale"]),
    "complex": (lambda p: change(p, lambda v: v, np.complex64), ["contrast t2", "complex64", "real-valued"]),
    "CIFTI": (lambda p: cifti(p, compressed=False), ["contrast t2", "CIFTI", "Export the volume as NIfTI"]),
    "CIFTI, compressed": (lambda p: cifti(p, compressed=True), ["contrast t2", "CIFTI", "Export the volume as NIfTI"]),
    "cut short": (lambda p: p.write_bytes(p.read_bytes()[:1000]), ["contrast t2", "cut short", "download it again"]),
    "empty": (lambda p: p.write_bytes(b""), ["contrast t2", "the file is empty", "again"]),
    "not gzip": (
        lambda p: p.write_bytes(b"no image, and long enough" * 99),
        ["contrast t2", "cannot be read as NIfTI"],
    ),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), ["t2"]),
    "huge": (lambda p: claim(p, 30000), ["contrast t2", "claims 30000x30000x30000 voxels"]),
    "more than there is": (lambda p: claim(p, 1000), ["contrast t2", "claims 1000000000 bytes of voxels"]),
    "NaN": (hole(np.nan), ["contrast t2", "2 voxels are NaN or infinite", "--nan-to-zero"]),
    "infinite": (hole(-np.inf), ["contrast t2", "2 voxels are NaN or infinite", "--nan-to-zero"]),
    "all zero": (
        lambda p: change(p, np.zeros_like),
        [f"case {CASE}, contrast t2: ", "every voxel is 0", "leave the case out"],
    ),
    "a mask": (lambda p: change(p, lambda v: v > 0), ["contrast t2", "has the same value", "Is it a mask?"]),
    "skull": (
        lambda p: change(p, lambda v: v + np.random.default_rng(0).integers(5, 40, v.shape)),
        ["contrast t2", "background is not 0", "skull-stripped", "HD-BET"],
    ),
    "in metres": (lambda p: scale(p, 1e-3), ["contrast t2", "voxels of 0.004", "Convert it to mm"]),
    "in micrometres": (lambda p: scale(p, 1e3), ["contrast t2", "voxels of 4000", "Convert it to mm"]),
    "sheared": (shear, ["contrast t2", "sheared", "Resample to a right-angled grid"]),
    "link out": (link_out, [f"case {CASE}", "outside of", "--follow-links"]),
    "dangling link": (dangle, [f"case {CASE}", "is a link to gone.nii.gz, which does not exist"]),
}
bad_images = pytest.mark.parametrize(("spoil", "words"), list(BAD_IMAGES.values()), ids=list(BAD_IMAGES))


def assert_refused(ended: Any, code: int, words: list[str]) -> None:
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.err


def assert_nothing_left(place: Path) -> None:
    """No partial file, no label map, no run: as if the command had not been given."""
    left = [path.name for path in place.rglob("*")] if place.exists() else []
    assert left == []


@bad_images
def test_predict_refuses_a_bad_image_and_writes_nothing(
    *, spoil: Callable[[Path], object], words: list[str], data: Path, tiny_run: Path, tmp_path: Path, znormseg: Call
) -> None:
    spoil(data / CASE / f"{CASE}_t2.nii.gz")
    ended = znormseg("predict", tiny_run, data / CASE, tmp_path / "out")
    assert_refused(ended, 3, words)
    assert_nothing_left(tmp_path / "out")


@bad_images
def test_train_refuses_a_bad_image_and_leaves_no_run(
    *,
    spoil: Callable[[Path], object],
    words: list[str],
    data: Path,
    tmp_path: Path,
    options: list[str],
    znormseg: Call,
) -> None:
    spoil(data / CASE / f"{CASE}_t2.nii.gz")
    ended = znormseg("train", data, tmp_path / "new", *options)
    assert_refused(ended, 3, words)
    assert not (tmp_path / "new").exists()


@bad_images
def test_data_check_finds_a_bad_image(
    *, spoil: Callable[[Path], object], words: list[str], data: Path, znormseg: Call
) -> None:
    spoil(data / CASE / f"{CASE}_t2.nii.gz")
    ended = znormseg("data", "check", data)
    assert ended.code == 3, ended.out
    assert CASE in ended.out
    assert "nothing wrong found" not in ended.out


# Ways to continue


def test_nan_voxels_become_0_on_request(data: Path, run: Path, tmp_path: Path, znormseg: Call) -> None:
    hole(np.nan)(data / CASE / f"{CASE}_t2.nii.gz")
    ended = znormseg("predict", run, data / CASE, tmp_path / "out", "--nan-to-zero", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["cases"][0]["nan_to_zero"] == {"t2": 2}
    assert "2 voxels of t2 were NaN or infinite; replaced with 0" in ended.err


def test_replacing_nan_in_the_background_changes_no_voxel_of_the_prediction(
    data: Path, run: Path, tmp_path: Path, znormseg: Call
) -> None:
    znormseg("predict", run, data / CASE, tmp_path / "before")
    hole(np.inf)(data / CASE / f"{CASE}_t2.nii.gz")
    znormseg("predict", run, data / CASE, tmp_path / "after", "--nan-to-zero")
    before, after = (
        np.asarray(nib.Nifti1Image.from_filename(tmp_path / p / f"{CASE}.nii.gz").dataobj) for p in ("before", "after")
    )
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("words", [["--nan-to-zero"], ["--set", "data.nan_to_zero=true"]])
def test_training_continues_with_nan_replaced_by_0(
    words: list[str], data: Path, tmp_path: Path, options: list[str], znormseg: Call
) -> None:
    hole(np.nan)(data / CASE / f"{CASE}_t1.nii.gz")
    ended = znormseg("train", data, tmp_path / "new", *options, *words)
    assert ended.code == 0, ended.err
    assert "nan_to_zero: true" in (tmp_path / "new" / "config.yaml").read_text()


@pytest.mark.parametrize("what", ["file", "case folder", "data set"])
def test_a_symlink_out_of_the_data_is_followed_on_request(
    *, what: str, data: Path, run: Path, tmp_path: Path, znormseg: Call
) -> None:
    link(data, what)
    assert znormseg("predict", run, data, tmp_path / "out", "--follow-links").code == 0
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 3


def link(data: Path, what: str) -> None:
    """Move a file, a case or every case elsewhere, and put links in their places."""
    if what == "file":
        link_out(data / CASE / f"{CASE}_t2.nii.gz")
        return
    target = data / CASE if what == "case folder" else data / "HGG"
    if what == "data set":
        target.mkdir()
        for case in [path for path in data.iterdir() if path != target]:
            case.rename(target / case.name)
    elsewhere = Path(shutil.move(target, data.parent / "elsewhere"))
    target.symlink_to(elsewhere)


@pytest.mark.parametrize(("what", "code"), [("case folder", 6), ("data set", 3)])
def test_a_symlink_to_an_outside_folder_is_refused_and_named(
    *, what: str, code: int, data: Path, run: Path, tmp_path: Path, znormseg: Call
) -> None:
    link(data, what)
    name = CASE if what == "case folder" else "HGG"
    ended = znormseg("predict", run, data, tmp_path / "out")
    assert_refused(ended, code, [str(data / name), "--follow-links"])


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_evaluate_refuses_a_symlink_out_of_a_folder_unless_requested(
    *, kind: str, data: Path, phantoms: Path, znormseg: Call
) -> None:
    place = data / CASE / f"{CASE}_seg.nii.gz" if kind == "file" else data / CASE
    place.rename(elsewhere := data.parent / "elsewhere.nii.gz")
    place.symlink_to(elsewhere)
    assert_refused(znormseg("evaluate", data, phantoms), 3, [str(data / CASE), "outside of", "--follow-links"])
    assert znormseg("evaluate", data, phantoms, "--follow-links").code == 0


def test_a_symlink_within_the_data_is_not_a_second_case(data: Path, run: Path, tmp_path: Path, znormseg: Call) -> None:
    (data / "favourite").symlink_to(data / CASE)
    assert znormseg("predict", run, data, tmp_path / "out").code == 0


def test_a_symlinked_data_folder_is_not_a_symlink_out_of_the_data(
    data: Path, run: Path, tmp_path: Path, znormseg: Call
) -> None:
    (tmp_path / "link").symlink_to(data)
    assert znormseg("predict", run, tmp_path / "link", tmp_path / "out").code == 0


# Case ids


@pytest.mark.parametrize("case_id", ["a..b", "..", "a\\b", "a\nb"])
def test_a_case_id_that_is_not_a_valid_file_name_is_refused(
    case_id: str, data: Path, run: Path, tmp_path: Path, znormseg: Call
) -> None:
    files = []
    for option, end in (("--t1", "t1"), ("--t1c", "t1ce"), ("--t2", "t2"), ("--flair", "flair")):
        place = data / f"{case_id}_{end}.nii.gz"
        shutil.copy(data / CASE / f"{CASE}_{end}.nii.gz", place)
        files += [option, place]
    ended = znormseg("predict", run, tmp_path / "out", *files)
    assert_refused(ended, 3, [repr(case_id), "cannot be used in file names", "Rename the case"])
    assert_nothing_left(tmp_path / "out")


@pytest.mark.parametrize("case_id", ["../escaped", "/tmp/escaped", "..", ""])
def test_a_case_object_with_a_path_traversal_id_is_refused(case_id: str, phantoms: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from data.datasets.layouts import find_cases
    from data.errors import DataError
    from data.labels import BRATS2021
    from data.patches.sampler import cache_cases

    case = replace(find_cases(phantoms)[0], id=case_id)
    with pytest.raises(DataError, match="cannot be used in file names"):
        cache_cases([case], tmp_path / "deep" / "cache", spacing_mm=(4.0, 4.0, 4.0), convention=BRATS2021)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cache", "deep"]


def test_a_case_id_with_dots_in_a_data_set_does_not_stop_the_others(
    data: Path, run: Path, tmp_path: Path, znormseg: Call
) -> None:
    for path in (data / CASE).iterdir():
        path.rename(path.with_name(path.name.replace(CASE, "up..up")))
    assert_refused(znormseg("predict", run, data, tmp_path / "out"), 6, ["'up..up' cannot be used in file names"])


@pytest.mark.parametrize("case_id", ["../../etc/passwd", "a/b", ".."])
def test_a_split_with_an_unknown_case_id_is_refused(
    case_id: str, data: Path, tmp_path: Path, options: list[str], znormseg: Call
) -> None:
    (tmp_path / "split.json").write_text(json.dumps({"train": [case_id]}))
    ended = znormseg("train", data, tmp_path / "new", *options, "--split", tmp_path / "split.json")
    assert_refused(ended, 3, [str(tmp_path / "split.json"), f"not in the data set: {case_id}"])
    assert not (tmp_path / "new").exists()


# Label maps


def relabel(old: int, new: int) -> Callable[[Path], None]:
    return lambda path: change(path, lambda labels: np.where(labels == old, new, labels), np.uint8)


#: What a label map may be that nobody can train on, and the words of the message.
BAD_LABELS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (Path.unlink, [CASE, "no label map", "--split"]),
    "two files": (twice, [f"case {CASE}", "two files for label map"]),
    "outside the convention": (relabel(2, 7), ["label values [7]", "known convention", f"7 in {CASE}", "Convert"]),
    "3 and 4 together": (relabel(2, 3), ["3 and 4 occur together", f"3 in {CASE}", "different folders"]),
    "another grid": (lambda p: move(p, 1, 2), [f"case {CASE}", "label map", "2.00 mm on axis y (anterior-posterior)"]),
    "another shape": (lambda p: change(p, lambda v: v[1:], np.uint8), [f"case {CASE}", "label map", "shape"]),
    "fractions": (lambda p: change(p, lambda v: v + 0.5), [f"case {CASE}, label map", "whole numbers", "an image?"]),
    "NaN": (hole(np.nan), [f"case {CASE}, label map", "2 voxels are NaN", "Repair the label map"]),
    "empty file": (lambda p: p.write_bytes(b""), [f"case {CASE}, label map", "the file is empty"]),
    "link out": (link_out, [f"case {CASE}", "outside of", "--follow-links"]),
}
bad_labels = pytest.mark.parametrize(("spoil", "words"), list(BAD_LABELS.values()), ids=list(BAD_LABELS))


@bad_labels
def test_train_refuses_a_bad_label_map_and_leaves_no_run(
    *,
    spoil: Callable[[Path], object],
    words: list[str],
    data: Path,
    tmp_path: Path,
    options: list[str],
    znormseg: Call,
) -> None:
    spoil(data / CASE / f"{CASE}_seg.nii.gz")
    ended = znormseg("train", data, tmp_path / "new", *options)
    assert_refused(ended, 3, words)
    assert not (tmp_path / "new").exists()


# Configs

#: Settings that must be refused, and the words of the message.
BAD_SETTINGS: dict[str, tuple[str, list[str]]] = {
    "mistyped key": ("training.learning_rat=0.1", ["training.learning_rat", "did you mean training.learning_rate?"]),
    "unknown key": ("training.zzz=1", ["unknown key training.zzz", "allowed here:"]),
    "unknown section": ("trainings.steps=1", ["did you mean training?"]),
    "text for a number": ('training.steps="64"', ["training.steps", 'got "64"']),
    "fraction for a count": ("training.steps=1.5", ["training.steps", "1.5"]),
    "not a number": ("training.learning_rate=.nan", ["laptop"]),
    "patch": ("training.patch_voxels=[17, 16, 16]", ["training.patch_voxels", "multiple of 2"]),
    "no value": ("training.steps", ["expected section.key=value"]),
}


@pytest.mark.parametrize(("setting", "words"), list(BAD_SETTINGS.values()), ids=list(BAD_SETTINGS))
def test_train_refuses_a_bad_setting_before_reading_the_data(
    *, setting: str, words: list[str], tmp_path: Path, options: list[str], znormseg: Call
) -> None:
    ended = znormseg("train", tmp_path / "nowhere", tmp_path / "new", *options, "--set", setting)
    assert_refused(ended, 4, words)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", ["[" * 5000, "a: " + "{b: " * 3000], ids=["lists", "mappings"])
def test_an_excessively_nested_config_is_refused(content: str, data: Path, tmp_path: Path, znormseg: Call) -> None:
    (tmp_path / "deep.yaml").write_text(content)
    ended = znormseg("train", data, tmp_path / "new", "--config", tmp_path / "deep.yaml")
    assert_refused(ended, 4, [str(tmp_path / "deep.yaml")])


def test_an_excessively_nested_split_is_refused(data: Path, tmp_path: Path, options: list[str], znormseg: Call) -> None:
    (tmp_path / "split.json").write_text("[" * 100_000)
    ended = znormseg("train", data, tmp_path / "new", *options, "--split", tmp_path / "split.json")
    assert_refused(ended, 3, [str(tmp_path / "split.json")])


# Runs


def best(run: Path, ending: str) -> Path:
    return max((run / "checkpoints").glob(f"best-*.{ending}"))


def alone(run: Path) -> None:
    """Delete the previous best weights, so that there is no fallback."""
    for path in set((run / "checkpoints").glob("best-*")) - {best(run, "json"), best(run, "safetensors")}:
        path.unlink()


def flip_a_bit(run: Path) -> None:
    alone(run)
    content = bytearray(best(run, "safetensors").read_bytes())
    content[-1] ^= 1
    best(run, "safetensors").write_bytes(content)


def pickle_weights(run: Path) -> None:
    """A pickle with the right digest: the digest is no protection against who can write both files."""
    import hashlib

    alone(run)
    content = pickle.dumps({"weights": [1.0]})
    best(run, "safetensors").write_bytes(content)
    details = json.loads(best(run, "json").read_text())
    details = {**details, "sha256": hashlib.sha256(content).hexdigest(), "json_sha256": None}
    best(run, "json").write_text(json.dumps(details))


def rewrite(old: str, new: str) -> Callable[[Path], None]:
    """Write another JSON, and leave out its own digest, which would be in the way."""

    def spoil(run: Path) -> None:
        alone(run)
        details = {**json.loads(best(run, "json").read_text()), "json_sha256": None}
        best(run, "json").write_text(json.dumps(details).replace(old, new))

    return spoil


#: What a run may be that cannot predict, and the words of the message.
BAD_RUNS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "not there": (shutil.rmtree, ["does not exist", "give the folder of a run"]),
    "a file": (lambda r: (shutil.rmtree(r), r.touch()), ["not a folder"]),
    "without weights": (lambda r: shutil.rmtree(r / "checkpoints"), ["no weights yet", "--resume"]),
    "a changed bit": (flip_a_bit, ["its SHA-256 is not the one", "Restore both from a copy"]),
    "a pickle": (pickle_weights, ["not a safetensors file"]),
    "no digest": (rewrite('"sha256"', '"sha"'), ["its SHA-256 is not the one"]),
    "other contrasts": (rewrite('"flair"', '"dwi"'), ["trained for other contrasts"]),
    "another version": (rewrite('"dropout"', '"drop"'), ["do not fit this version", "Train again"]),
}


@pytest.mark.parametrize(("spoil", "words"), list(BAD_RUNS.values()), ids=list(BAD_RUNS))
def test_predict_refuses_an_unusable_run_and_writes_nothing(
    *, spoil: Callable[[Path], object], words: list[str], run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    spoil(run)
    ended = znormseg("predict", run, phantoms / CASE, tmp_path / "out")
    assert_refused(ended, 5, [str(run), *words])
    assert not (tmp_path / "out").exists()


# Output


def test_an_output_that_is_a_file_is_refused_and_kept(
    run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    (tmp_path / "out").write_text("mine")
    ended = znormseg("predict", run, phantoms / CASE, tmp_path / "out")
    assert_refused(ended, 3, [str(tmp_path / "out"), "is a file; give a folder for the label maps"])
    assert (tmp_path / "out").read_text() == "mine"


def test_a_traceback_is_shown_only_with_debug(data: Path, run: Path, tmp_path: Path, znormseg: Call) -> None:
    assert "Traceback" not in znormseg("predict", tmp_path / "no", data, tmp_path / "out").err
    assert "Traceback" in znormseg("--debug", "predict", tmp_path / "no", data, tmp_path / "out").err
