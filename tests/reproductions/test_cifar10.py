"""The CIFAR-10 reproduction: both forms of the data, the networks, and a whole run on made images."""

from __future__ import annotations

from pathlib import Path

import cifar10
import numpy as np
import numpy.typing as npt
import pytest
import sweep
import torch
from cifar10 import CifarResNet
from PIL import Image

import znorm

#: Settings of a run of two steps.
TINY = (
    *("--steps", "2", "--batch", "4", "--train-images", "40", "--validation-images", "10", "--test-images", "10"),
    *("--validate-every", "1", "--target", "0", "--optimizers", "sgd", "--seeds", "1"),
)


def made(count: int, seed: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six files of 20 images, two of each class."""
    folder = tmp_path_factory.mktemp("cifar") / "cifar-10-batches-bin"
    folder.mkdir()
    labels = (np.arange(20, dtype=np.uint8) % 10)[:, None]
    for seed, name in enumerate([*cifar10.BATCHES, "test_batch.bin"]):
        np.concatenate([labels, made(20, seed).reshape(20, -1)], axis=1).tofile(folder / name)
    return folder


def test_binary_files_are_read_correctly(binary: Path) -> None:
    images = cifar10.read_images(binary, "test", 2)
    assert sorted(images.classes.tolist()) == sorted(list(range(10)) * 2)
    first = images.pixels[images.classes == 3][0]
    assert torch.equal(first, torch.from_numpy(made(20, 5)[3]))


def test_image_folders_give_the_same_pixels(tmp_path: Path) -> None:
    pixels = made(3, 0)
    for name, one in zip(("cat/0001.png", "cat/0000.png", "airplane/0000.png"), pixels, strict=True):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(one.transpose(1, 2, 0)).save(tmp_path / "train" / name)
    images = cifar10.read_images(tmp_path, "train", 9)
    assert images.classes.tolist() == [0, 1, 1]
    assert torch.equal(images.pixels, torch.from_numpy(pixels[[2, 1, 0]]))


def test_only_the_first_images_of_each_class_are_used(binary: Path) -> None:
    assert torch.bincount(cifar10.read_images(binary, "train", 3).classes).tolist() == [3] * 10


def test_a_missing_file_is_named_with_the_source_of_the_data(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"data_batch_1\.bin: no such file.*https://www\.cs\.toronto\.edu"):
        cifar10.main([str(tmp_path), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_pickled_version_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(SystemExit, match="the pickled version that is there could run any code"):
        cifar10.read_images(tmp_path, "train", 1)


@pytest.mark.parametrize("size", [0, 1000])
def test_a_file_of_the_wrong_size_is_refused(size: int, binary: Path, tmp_path: Path) -> None:
    (tmp_path / "test_batch.bin").write_bytes(bytes(size))
    with pytest.raises(SystemExit, match=r"test_batch\.bin: not whole records of 3073 bytes; download it again"):
        cifar10.read_images(tmp_path, "test", 1)


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    (tmp_path / "test" / "cat").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "test" / "cat" / "0.jpg")
    with pytest.raises(SystemExit, match="images must be 32 x 32 pixels"):
        cifar10.read_images(tmp_path, "test", 1)


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (56, 853_018), (110, 1_727_962)])
def test_the_networks_have_the_size_of_the_paper_and_shortcuts_add_no_weights(depth: int, parameters: int) -> None:
    for kind in ("resnet", "plain"):
        assert sum(p.numel() for p in CifarResNet(f"{kind}{depth}").parameters()) == parameters


def test_initial_weights_are_equal_with_and_without_shortcuts() -> None:
    found = []
    for name in ("resnet20", "plain20"):
        torch.manual_seed(0)
        found.append(CifarResNet(name).state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_overlap_is_measured_only_at_shortcuts_and_at_every_one() -> None:
    for name, count in (("resnet20", 9), ("plain20", 0)):
        model = CifarResNet(name)
        with znorm.watch_overlap(model.junctions()) as watch:
            model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        assert len(watch.read()) == count


def test_a_shortcut_that_halves_the_image_keeps_its_pixels() -> None:
    x = torch.randn(2, 16, 8, 8)
    y = cifar10.Subsampled(16)(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert not y[:, 16:].any()


def test_augmented_images_keep_their_shape_and_only_move_pixels() -> None:
    pixels = torch.from_numpy(made(8, 0)).clamp(min=1)
    shifted = cifar10.augment(pixels, torch.Generator().manual_seed(0))
    assert shifted.shape == pixels.shape
    assert (shifted > 0).flatten(1).float().mean(dim=1).min() > (28 / 32) ** 2 - 0.01


def test_a_run_shorter_than_a_validation_interval_is_validated_at_its_end(
    binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "RATES", 1)
    more = ("--steps", "1", "--validate-every", "9", "--rules", "none", "--networks", "resnet20")
    cifar10.main([str(binary), str(tmp_path), *TINY, *more])
    assert '"curve": [[1,' in (tmp_path / "runs.jsonl").read_text()


def test_too_few_images_are_refused(binary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cifar10.main([str(binary), str(tmp_path), *TINY, "--train-images", "400", "--validation-images", "50"])
    assert "has fewer images than --train-images" in capsys.readouterr().err


def test_all_rules_run_on_synthetic_images_and_the_same_command_resumes(
    binary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "RATES", 1)
    words = [str(binary), str(tmp_path), *TINY, "--networks", "resnet20"]
    cifar10.main(words)
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[2] for line in table[2:]] == list(sweep.RULES)
    before = (tmp_path / "runs.jsonl").read_text()
    cifar10.main(words)
    assert (tmp_path / "runs.jsonl").read_text() == before
    assert capsys.readouterr().out.splitlines() == table
