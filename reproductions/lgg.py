"""Tumour segmentation in 2D on the LGG MRI set: gradient rules at learning rates tuned for each.

    python reproductions/lgg.py DATA OUT

DATA holds one folder of .tif slices and _mask.tif masks per patient. Each slice has three channels: pre-contrast, FLAIR
and post-contrast; where a patient lacks a sequence, FLAIR stands in its place. Claim: Yun, arXiv 2408.01215. Data:
Buda, Saha and Mazurowski 2019, from TCIA's TCGA-LGG.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import sweep
import torch
from monai.losses.dice import DiceCELoss
from monai.networks.nets.unet import UNet
from PIL import Image, UnidentifiedImageError
from sweep import Record, Result, Run
from torch import Tensor, nn

WHERE: Final = (
    "The LGG MRI segmentation set is at https://www.kaggle.com/datasets/mateuszbuda/lgg-mri-segmentation; give its "
    "folder kaggle_3m"
)
SEQUENCES: Final = ("pre-contrast", "FLAIR", "post-contrast")
FLAIR: Final = 1


@dataclass(frozen=True, kw_only=True)
class Patient:
    """One patient's slices."""

    name: str
    images: Tensor
    """Shape (slices, 3, height, width), with the mean 0 and the spread 1 of each channel within the head."""
    masks: Tensor
    """Shape (slices, 1, height, width), 0 or 1."""
    missing: tuple[str, ...]
    """Sequences in whose place FLAIR stands."""
    left_out: int
    """Slices without an image or without a mask."""


def read_patients(data: Path) -> list[Patient]:
    """Read all patients.

    Raises:
        SystemExit: there is no patient, or a file cannot be read; the message says where to get the data.
    """
    folders = sorted({path.parent for path in data.glob("*/*_mask.tif")})
    if not folders:
        raise SystemExit(f"{data}: no folders of patients with slices NAME_1.tif and masks NAME_1_mask.tif. {WHERE}.")
    return [_patient(folder) for folder in folders]


def _patient(folder: Path) -> Patient:
    masks = {path.name.removesuffix("_mask.tif"): path for path in folder.glob("*_mask.tif")}
    images = {path.stem: path for path in folder.glob("*.tif") if not path.stem.endswith("_mask")}
    names = sorted(masks.keys() & images.keys(), key=_slice_number)
    if not names:
        raise SystemExit(f"{folder}: no slice has both an image and a mask. {WHERE}.")
    raw = np.stack([_pixels(images[name], channels=3) for name in names])
    return Patient(
        name=folder.name,
        images=torch.from_numpy(_scaled(raw.astype(np.float32))),
        masks=torch.from_numpy(np.stack([_pixels(masks[name], channels=1) for name in names]) > 0).float(),
        missing=tuple(
            sequence
            for channel, sequence in enumerate(SEQUENCES)
            if channel != FLAIR and np.array_equal(raw[:, channel], raw[:, FLAIR])
        ),
        left_out=len(masks.keys() ^ images.keys()),
    )


def _slice_number(name: str) -> int:
    number = name.rpartition("_")[2]
    return int(number) if number.isdigit() else 0


def _pixels(path: Path, *, channels: int) -> npt.NDArray[np.uint8]:
    """Pixels of shape (channels, height, width)."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"), np.uint8)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise SystemExit(
            f"{path}: not a readable TIFF image ({type(error).__name__}); download it again. {WHERE}."
        ) from error
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]


def _scaled(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    for channel in range(images.shape[1]):
        head = images[:, channel][images[:, channel] > 0]
        if head.size:
            images[:, channel] = (images[:, channel] - head.mean()) / max(float(head.std()), 1e-6)
    return images


@dataclass(frozen=True, kw_only=True)
class Split:
    """Patients by use: the first train, the second choose learning rates, the third choose nothing."""

    train: Sequence[Patient]
    validation: Sequence[Patient]
    test: Sequence[Patient]


def split_patients(patients: Sequence[Patient]) -> Split:
    """Deal patients into 3/5, 1/5 and 1/5, in an order that depends on nothing but their names.

    With two patients, one trains and the other is validation and test in one: a smoke test without a result.

    Raises:
        SystemExit: there is one patient.
    """
    if len(patients) < 2:
        raise SystemExit(f"1 patient ({patients[0].name}): at least 3 are needed, or 2 for a smoke test. {WHERE}.")
    order = sorted(patients, key=lambda patient: patient.name)
    random.Random(0).shuffle(order)
    if len(order) == 2:
        return Split(train=order[:1], validation=order[1:], test=order[1:])
    part = max(1, len(order) // 5)
    return Split(train=order[2 * part :], validation=order[:part], test=order[part : 2 * part])


def build(network: str, channels: Sequence[int]) -> nn.Module:
    """MONAI's U-Net in 2D, with residual units for ``resunet``."""
    return UNet(
        spatial_dims=2,
        in_channels=3,
        out_channels=1,
        channels=channels,
        strides=(2,) * (len(channels) - 1),
        num_res_units=2 if network == "resunet" else 0,
        norm="INSTANCE",
    )


def train(run: Run, split: Split, settings: dict[str, Any]) -> Result:
    """Train one network and return its Dice and IoU by patient."""
    began = time.process_time()
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    model = build(run.network, settings["channels"])
    optimizer = sweep.optimizer_of(run, model, ["auto"])
    loss_of = DiceCELoss(sigmoid=True)
    images = torch.cat([patient.images for patient in split.train])
    masks = torch.cat([patient.masks for patient in split.train])
    curve = []
    for step in range(settings["steps"]):
        optimizer.param_groups[0]["lr"] = sweep.rate_at(step, settings["steps"], run.rate)
        chosen = torch.randint(0, len(images), (settings["batch"],), generator=generator)
        flips = [dim for dim in (2, 3) if torch.rand(1, generator=generator) < 0.5]
        model.train()
        loss_of(model(images[chosen].flip(flips)), masks[chosen].flip(flips)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % settings["validate_every"] == 0 or step + 1 == settings["steps"]:
            curve.append([step + 1, fmean(dice for dice, _ in scores(model, split.validation).values())])
    found = scores(model, split.test)
    return {
        "validation": curve[-1][1],
        "test": fmean(dice for dice, _ in found.values()),
        "iou": fmean(iou for _, iou in found.values()),
        "steps_to_target": next((step for step, dice in curve if dice >= settings["target"]), None),
        "curve": curve,
        "patients": found,
        "processor_seconds": round(time.process_time() - began, 1),
    }


@torch.no_grad()
def scores(model: nn.Module, patients: Sequence[Patient]) -> dict[str, tuple[float, float]]:
    """Return Dice and IoU over all slices of each patient; both are 1 where mask and prediction are empty."""
    model.eval()
    found = {}
    for patient in patients:
        predicted = torch.cat([model(images) > 0 for images in patient.images.split(8)])
        truth = patient.masks > 0
        both, either = int((predicted & truth).sum()), int((predicted | truth).sum())
        iou = both / either if either else 1.0
        found[patient.name] = (2 * iou / (1 + iou), iou)
    return found


def main(words: list[str] | None = None) -> None:
    """Train what is missing, and print the table of what is finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path, help="folder of runs.jsonl; the same command resumes")
    parser.add_argument("--networks", nargs="+", choices=("unet", "resunet"), default=["unet", "resunet"])
    parser.add_argument("--optimizers", nargs="+", choices=("sgd", "adam"), default=["sgd", "adam"])
    parser.add_argument("--rules", nargs="+", choices=sweep.RULES, default=list(sweep.RULES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--validate-every", type=int, default=250)
    parser.add_argument("--target", type=float, default=0.8, help="Dice to count the steps to")
    options = parser.parse_args(words)
    patients = read_patients(options.data)
    report(patients)
    split = split_patients(patients)
    keys = ("steps", "batch", "channels", "validate_every", "target")
    settings = {key: getattr(options, key) for key in keys} | {"patients": [one.name for one in patients]}
    record = Record(options.out / "runs.jsonl", settings)
    sweep.sweep(record, partial(train, split=split, settings=settings), options)
    columns = {"test": "Dice", "iou": "IoU", "steps_to_target": f"steps to {options.target:g}"}
    print("\n".join(sweep.table(record.runs(), columns)))


def report(patients: Sequence[Patient]) -> None:
    """Print what the patients lack."""
    slices = sum(len(patient.images) for patient in patients)
    print(f"{len(patients)} patients, {slices} slices")
    for sequence in SEQUENCES:
        if lacking := [patient.name for patient in patients if sequence in patient.missing]:
            print(f"{len(lacking)} lack the {sequence} sequence, FLAIR stands in its place: {', '.join(lacking)}")
    for patient in patients:
        if patient.left_out:
            print(f"{patient.name}: {patient.left_out} slices without image or mask are left out")
    if len(patients) == 2:
        print(
            "Two patients: a smoke test. The patient that chooses learning rates is also tested: no score is a result."
        )


if __name__ == "__main__":
    main()
