"""The LGG reproduction: reading slices and masks, patient-wise parts, scores, and a whole run on made patients."""

from __future__ import annotations

from pathlib import Path

import lgg
import numpy as np
import pytest
import sweep
import torch
from PIL import Image
from torch import nn

#: Settings of a run of two steps.
TINY = (
    *("--steps", "2", "--batch", "2", "--channels", "4", "8", "--validate-every", "1", "--target", "0"),
    *("--optimizers", "adam", "--seeds", "1", "--rules", "none", "bgn+znorm"),
)


def write_patient(data: Path, name: str, *, slices: int = 3, missing: int | None = None) -> Path:
    """A patient with a bright square in every slice but the first; FLAIR in place of a missing channel."""
    folder = data / name
    folder.mkdir(parents=True)
    for number in range(1, slices + 1):
        pixels = np.random.default_rng(number).integers(1, 99, (32, 32, 3), dtype=np.uint8)
        mask = np.zeros((32, 32), np.uint8)
        if number > 1:
            mask[8:16, 8:16] = 255
            pixels[8:16, 8:16] += 100
        if missing is not None:
            pixels[:, :, missing] = pixels[:, :, lgg.FLAIR]
        Image.fromarray(pixels).save(folder / f"{name}_{number}.tif")
        Image.fromarray(mask).save(folder / f"{name}_{number}_mask.tif")
    return folder


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("lgg")
    for number in range(5):
        write_patient(data, f"TCGA_CS_{number}_19960909", missing=2 if number == 4 else None)
    return data


def test_slices_are_read_in_numerical_order(tmp_path: Path) -> None:
    write_patient(tmp_path, "A", slices=11)
    (patient,) = lgg.read_patients(tmp_path)
    assert patient.images.shape == (11, 3, 32, 32)
    assert patient.masks.sum(dim=(1, 2, 3)).tolist() == [0.0] + [64.0] * 10


def test_a_missing_sequence_is_recognised_by_the_repeated_flair(patients: Path) -> None:
    assert [patient.missing for patient in lgg.read_patients(patients)] == [(), (), (), (), ("post-contrast",)]


def test_channels_have_mean_0_and_standard_deviation_1(patients: Path) -> None:
    images = lgg.read_patients(patients)[0].images
    torch.testing.assert_close(images.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_slices_without_image_or_mask_are_left_out_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_patient(tmp_path, "A")
    (folder / "A_1.tif").unlink()
    (folder / "A_2_mask.tif").unlink()
    found = lgg.read_patients(tmp_path)
    lgg.report(found)
    assert (len(found[0].images), found[0].left_out) == (1, 2)
    assert "A: 2 slices without image or mask are left out" in capsys.readouterr().out


def test_an_empty_folder_is_refused_with_the_source_of_the_data(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no folders of patients.*https://www\.kaggle\.com"):
        lgg.main([str(tmp_path), str(tmp_path / "out")])


@pytest.mark.parametrize("content", [b"", b"II*\0\x08\xef\xbf\xbd\0\0", b"II*\0\x08\0\0\0"])
def test_a_damaged_image_is_named(content: bytes, tmp_path: Path) -> None:
    folder = write_patient(tmp_path, "A")
    (folder / "A_2.tif").write_bytes(content)
    with pytest.raises(SystemExit, match=r"A_2\.tif: not a readable TIFF image .*download it again"):
        lgg.read_patients(tmp_path)


@pytest.mark.parametrize("count", [3, 5, 10, 110])
def test_no_patient_is_in_two_parts_and_none_is_lost(count: int) -> None:
    empty = torch.zeros(1, 3, 8, 8)
    known = [
        lgg.Patient(name=f"{number:03}", images=empty, masks=empty[:, :1], missing=(), left_out=0)
        for number in range(count)
    ]
    split = lgg.split_patients(known)
    parts = [{patient.name for patient in part} for part in (split.train, split.validation, split.test)]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts)) == count


def test_two_patients_are_labelled_a_smoke_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("A", "B"):
        write_patient(tmp_path, name)
    found = lgg.read_patients(tmp_path)
    lgg.report(found)
    split = lgg.split_patients(found)
    assert split.train[0].name != split.test[0].name == split.validation[0].name
    assert "Two patients: a smoke test." in capsys.readouterr().out


def test_one_patient_is_refused(tmp_path: Path) -> None:
    write_patient(tmp_path, "A")
    with pytest.raises(SystemExit, match=r"1 patient \(A\): at least 3 are needed"):
        lgg.split_patients(lgg.read_patients(tmp_path))


class Always(nn.Module):
    """Answers a logit everywhere."""

    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = logit

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.full_like(images[:, :1], self.logit)


def test_dice_and_iou_are_computed_over_all_slices_of_a_patient(patients: Path) -> None:
    patient = lgg.read_patients(patients)[0]
    iou = 128 / (3 * 32 * 32)
    assert lgg.scores(Always(1.0), [patient])[patient.name] == pytest.approx((2 * iou / (1 + iou), iou))
    assert lgg.scores(Always(-1.0), [patient])[patient.name] == (0.0, 0.0)


@pytest.mark.parametrize("network", ["unet", "resunet"])
def test_both_networks_run_on_synthetic_patients(
    network: str,
    patients: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sweep, "RATES", 1)
    lgg.main([str(patients), str(tmp_path), *TINY, "--networks", network])
    said = capsys.readouterr().out
    assert "1 lack the post-contrast sequence" in said
    rows = [line for line in said.splitlines() if line.startswith(f"| {network}")]
    assert [row.split(" | ")[2] for row in rows] == ["none", "bgn+znorm"]
