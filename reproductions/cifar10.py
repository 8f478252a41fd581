"""ResNets on CIFAR-10 with and without shortcuts: gradient rules at learning rates tuned for each.

    python reproductions/cifar10.py DATA OUT

DATA holds the original binary files (data_batch_1.bin to data_batch_5.bin, test_batch.bin) or one folder of JPEG or PNG
images per class in train/ and test/. Claim: Yun, arXiv 2408.01215 and 2410.21564. The network is He et al.'s,
arXiv 1512.03385, section 4.2, with parameter-free shortcuts.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import numpy as np
import sweep
import torch
from PIL import Image
from sweep import Record, Result, Run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

import znorm

WHERE: Final = (
    "CIFAR-10 is at https://www.cs.toronto.edu/~kriz/cifar.html; take the binary version, cifar-10-binary.tar.gz, "
    "and give its unpacked folder"
)
BATCHES: Final = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
NETWORKS: Final = ("resnet20", "plain20", "resnet56", "plain56", "resnet110", "plain110")
#: One label and 32 x 32 red, green and blue values.
RECORD_BYTES: Final = 1 + 3 * 32 * 32


# Network


class Joined(nn.Module):
    """f(x) + s(x), or only f(x) without the shortcut s."""

    def __init__(self, inputs: int, outputs: int, *, shortcut: bool) -> None:
        super().__init__()
        stride = outputs // inputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = Subsampled(outputs - inputs) if shortcut and stride > 1 else nn.Identity() if shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps of shape (N, outputs, H, W), or half as high and wide where the channels double."""
        y: Tensor = self.body(x)
        return y if self.shortcut is None else y + self.shortcut(x)


class Subsampled(nn.Module):
    """Every second pixel, with channels of zeros appended: the shortcut without parameters."""

    def __init__(self, more: int) -> None:
        super().__init__()
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        """Half the height and width, and ``more`` additional channels."""
        return pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.more))


class CifarResNet(nn.Module):
    """He et al.'s network of 6n + 2 layers for 32 x 32 images; ``plain`` has the same layers without shortcuts."""

    def __init__(self, name: str, classes: int = 10) -> None:
        super().__init__()
        shortcut, depth = name.startswith("resnet"), int(name.removeprefix("resnet").removeprefix("plain"))
        widths = [16] + [width for width in (16, 32, 64) for _ in range((depth - 2) // 6)]
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(
            *(nn.Sequential(Joined(a, b, shortcut=shortcut), nn.ReLU()) for a, b in pairwise(widths))
        )
        self.head = nn.Linear(64, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (N, classes)."""
        logits: Tensor = self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))
        return logits

    def places(self) -> list[str]:
        """Return the names of the blocks, after each of which ``bgn`` normalises the gradient."""
        return [f"blocks.{number}" for number in range(len(self.blocks))]

    def junctions(self) -> list[znorm.Junction]:
        """Return the shortcuts, for :func:`znorm.watch_overlap`; none in a plain network."""
        joined = {name: module for name, module in self.named_modules() if isinstance(module, Joined)}
        return [
            znorm.Junction(
                name=name,
                transformation=module.body,
                skip=module if isinstance(module.shortcut, nn.Identity) else module.shortcut,
                side="output" if isinstance(module.shortcut, nn.Identity) else "path",
            )
            for name, module in joined.items()
            if module.shortcut is not None
        ]


# Images


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images of shape (N, 3, 32, 32), uint8, and their classes of shape (N,)."""

    pixels: Tensor
    classes: Tensor

    def part(self, first: int, last: int) -> Images:
        """Return the images from ``first`` to before ``last`` of each class."""
        chosen = torch.cat([torch.nonzero(self.classes == c)[first:last, 0] for c in self.classes.unique()])
        return Images(pixels=self.pixels[chosen], classes=self.classes[chosen])


def read_images(data: Path, part: str, per_class: int) -> Images:
    """Read the first images of each class.

    Args:
        data: folder of the data set.
        part: ``train`` or ``test``.
        per_class: maximum number of images of each class.

    Raises:
        SystemExit: a file is missing or has a wrong size; the message says where to get the data.
    """
    names = BATCHES if part == "train" else ("test_batch.bin",)
    if (data / part).is_dir():
        return _from_folders(data / part, per_class)
    for name in names:
        if not (data / name).is_file():
            pickled = (data / name.removesuffix(".bin")).is_file()
            reason = "; the pickled version that is there could run any code when it is read" if pickled else ""
            raise SystemExit(f"{data / name}: no such file, and no folder {data / part}{reason}. {WHERE}.")
    return Images.part(_from_binary([data / name for name in names]), 0, per_class)


def _from_binary(paths: list[Path]) -> Images:
    for path in paths:
        if path.stat().st_size == 0 or path.stat().st_size % RECORD_BYTES:
            raise SystemExit(f"{path}: not whole records of {RECORD_BYTES} bytes; download it again. {WHERE}.")
    rows = np.concatenate([np.fromfile(path, np.uint8) for path in paths]).reshape(-1, RECORD_BYTES)
    pixels = torch.from_numpy(rows[:, 1:].reshape(-1, 3, 32, 32).copy())
    return Images(pixels=pixels, classes=torch.from_numpy(rows[:, 0].astype(np.int64)))


def _from_folders(folder: Path, per_class: int) -> Images:
    pixels, classes = [], []
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    for number, one in enumerate(folders):
        files = sorted(path for path in one.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        for path in files[:per_class]:
            with Image.open(path) as image:
                pixels.append(np.asarray(image.convert("RGB"), np.uint8).transpose(2, 0, 1))
            classes.append(number)
    if not pixels:
        raise SystemExit(f"{folder}: no folders of .jpg or .png images, one per class. {WHERE}.")
    if {one.shape for one in pixels} != {(3, 32, 32)}:
        raise SystemExit(f"{folder}: images must be 32 x 32 pixels. {WHERE}.")
    return Images(pixels=torch.from_numpy(np.stack(pixels)), classes=torch.tensor(classes))


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to 4 pixels, with zeros around it, and mirror half of them."""
    padded = pad(pixels, (4, 4, 4, 4))
    corners = torch.randint(0, 9, (len(pixels), 2), generator=generator).tolist()
    mirrored = torch.rand(len(pixels), generator=generator) < 0.5
    cut = torch.stack([image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(padded, corners, strict=True)])
    return torch.where(mirrored[:, None, None, None], cut.flip(-1), cut)


# Training


@dataclass(kw_only=True)
class Data:
    """The three parts: the first chooses weights, the second learning rates, the third nothing."""

    train: Images
    validation: Images
    test: Images

    @cached_property
    def colours(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each colour over the training images."""
        known = self.train.pixels.double()
        return known.mean(dim=(0, 2, 3)).float(), known.std(dim=(0, 2, 3)).float()

    def scaled(self, pixels: Tensor) -> Tensor:
        """Return pixels that have the mean 0 and the spread 1 over the training images, per colour."""
        mean, std = self.colours
        scaled = (pixels.float() - mean[:, None, None]) / std[:, None, None]
        return scaled.contiguous(memory_format=torch.channels_last)


def train(run: Run, data: Data, settings: dict[str, Any]) -> Result:
    """Train one network and return its accuracies, its validation curve and its gradient overlap."""
    began = time.process_time()
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    model = CifarResNet(run.network, classes=len(data.train.classes.unique()))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    optimizer = sweep.optimizer_of(run, model, model.places())
    junctions = model.junctions()
    curve: list[tuple[int, float]] = []
    overlaps: dict[int, dict[str, tuple[float, float]]] = {}
    for step in range(settings["steps"]):
        optimizer.param_groups[0]["lr"] = sweep.rate_at(step, settings["steps"], run.rate)
        chosen = torch.randint(0, len(data.train.classes), (settings["batch"],), generator=generator)
        images = data.scaled(augment(data.train.pixels[chosen], generator))
        due = (step + 1) % settings["validate_every"] == 0 or step + 1 == settings["steps"]
        model.train()
        with znorm.watch_overlap(junctions if due else []) as watch:
            with torch.autocast("cpu", torch.bfloat16, enabled=settings["bfloat16"]):
                logits = model(images)
            cross_entropy(logits.float(), data.train.classes[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if due:
            curve.append((step + 1, accuracy(model, data, data.validation, settings)))
            overlaps[step + 1] = {name: (found.cosine, found.ratio) for name, found in watch.read().items()}
    measured = [ratio for found in overlaps.values() for _, ratio in found.values()]
    return {
        "validation": curve[-1][1],
        "test": accuracy(model, data, data.test, settings),
        "steps_to_target": next((step for step, found in curve if found >= settings["target"]), None),
        "overlap_ratio": fmean(measured) if measured else None,
        "curve": curve,
        "overlap": overlaps,
        "processor_seconds": round(time.process_time() - began, 1),
    }


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, images: Images, settings: dict[str, Any]) -> float:
    """Share of the images whose most probable class is right."""
    model.eval()
    right = 0
    for pixels, classes in zip(images.pixels.split(250), images.classes.split(250), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=settings["bfloat16"]):
            right += int((model(data.scaled(pixels)).argmax(dim=1) == classes).sum())
    return right / len(images.classes)


def main(words: list[str] | None = None) -> None:
    """Train what is missing, and print the table of what is finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path, help="folder of runs.jsonl; the same command resumes")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet20", "plain20"])
    parser.add_argument("--optimizers", nargs="+", choices=("sgd", "adam"), default=["sgd", "adam"])
    parser.add_argument("--rules", nargs="+", choices=sweep.RULES, default=list(sweep.RULES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64_000, help="default: as He et al.")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--train-images", type=int, default=50_000, help="validation images included")
    parser.add_argument("--validation-images", type=int, default=5_000)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--validate-every", type=int, default=1_000)
    parser.add_argument("--target", type=float, default=0.8, help="accuracy to count the steps to")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16 autocast")
    options = parser.parse_args(words)
    keys = (
        "steps",
        "batch",
        "train_images",
        "validation_images",
        "test_images",
        "validate_every",
        "target",
        "bfloat16",
    )
    settings = {key: getattr(options, key) for key in keys}
    train_count, validation_count = options.train_images // 10, options.validation_images // 10
    known = read_images(options.data, "train", train_count)
    data = Data(
        train=known.part(0, train_count - validation_count),
        validation=known.part(train_count - validation_count, train_count),
        test=read_images(options.data, "test", options.test_images // 10),
    )
    if not all(len(part.classes) for part in (data.train, data.validation, data.test)):
        parser.error(f"{options.data} has fewer images than --train-images, --validation-images and --test-images need")
    record = Record(options.out / "runs.jsonl", settings)
    sweep.sweep(record, partial(train, data=data, settings=settings), options)
    columns = {"test": "test accuracy", "steps_to_target": f"steps to {options.target:g}", "overlap_ratio": "overlap"}
    print("\n".join(sweep.table(record.runs(), columns)))


if __name__ == "__main__":
    main()
