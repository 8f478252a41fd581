"""Tumour in patches of lymph node sections (PatchCamelyon): gradient rules at learning rates tuned for each.

    python reproductions/patchcamelyon.py DATA OUT

DATA holds the six published HDF5 files, unpacked. Claim: Yun, arXiv 2408.01215. Data: Veeling et al. 2018, arXiv
1806.03962, from Camelyon16. Needs h5py: pip install 'znormseg[reproductions]'.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import sweep
import torch
from monai.metrics.rocauc import compute_roc_auc
from monai.networks.nets import resnet
from sweep import Record, Result, Run
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

WHERE: Final = "PatchCamelyon is at https://zenodo.org/records/2546921; unpack its .h5.gz files with gunzip"
PARTS: Final = ("train", "valid", "test")
NETWORKS: Final = ("resnet10", "resnet18", "resnet34", "resnet50")


@dataclass(frozen=True, kw_only=True)
class Patches:
    """Patches of one part; only those that are asked for are read."""

    images: Any
    """HDF5 data set of shape (N, 96, 96, 3), uint8."""
    labels: Tensor
    """Shape (N,): 1 if the central 32 x 32 pixels hold tumour, else 0."""

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return images of shape (B, 3, 96, 96), from -1 to 1, and their labels; numbers are sorted and unique."""
        pixels = torch.from_numpy(self.images[list(numbers)])
        return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(), self.labels[list(numbers)]


def open_part(data: Path, part: str, most: int) -> Patches:
    """Open one part, limited to its first ``most`` patches.

    Raises:
        SystemExit: h5py or a file is missing or unreadable; the message says what to do.
    """
    try:
        import h5py
    except ImportError:
        raise SystemExit("h5py is missing; install it with: pip install 'znormseg[reproductions]'") from None
    found = []
    for kind in ("x", "y"):
        path = data / f"camelyonpatch_level_2_split_{part}_{kind}.h5"
        if not path.is_file():
            raise SystemExit(f"{path}: no such file. {WHERE}.")
        try:
            found.append(h5py.File(path, "r")[kind])
        except (OSError, KeyError) as error:
            raise SystemExit(
                f"{path}: not a readable HDF5 file with a data set {kind}; download it again. {WHERE}."
            ) from error
    images, labels = found
    if images.shape[1:] != (96, 96, 3) or len(images) != len(labels):
        raise SystemExit(f"{data}: {part} has images of shape {images.shape} and {len(labels)} labels. {WHERE}.")
    return Patches(images=images, labels=torch.from_numpy(labels[:most].reshape(-1)).float())


def train(run: Run, parts: dict[str, Patches], settings: dict[str, Any]) -> Result:
    """Train one network and return its accuracies and AUROC."""
    began = time.process_time()
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    model = getattr(resnet, run.network)(spatial_dims=2, n_input_channels=3, num_classes=1)
    places = [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(len(getattr(model, f"layer{stage}")))]
    optimizer = sweep.optimizer_of(run, model, places)
    curve = []
    for step in range(settings["steps"]):
        optimizer.param_groups[0]["lr"] = sweep.rate_at(step, settings["steps"], run.rate)
        drawn = torch.randint(0, len(parts["train"].labels), (settings["batch"],), generator=generator)
        images, labels = parts["train"].batch(sorted(set(drawn.tolist())))
        flips = [dim for dim in (2, 3) if torch.rand(1, generator=generator) < 0.5]
        model.train()
        binary_cross_entropy_with_logits(model(images.flip(flips))[:, 0], labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % settings["validate_every"] == 0 or step + 1 == settings["steps"]:
            curve.append([step + 1, scores(model, parts["valid"])["accuracy"]])
    found = scores(model, parts["test"])
    return {
        "validation": curve[-1][1],
        "test": found["accuracy"],
        "auroc": found["auroc"],
        "steps_to_target": next((step for step, accuracy in curve if accuracy >= settings["target"]), None),
        "curve": curve,
        "processor_seconds": round(time.process_time() - began, 1),
    }


@torch.no_grad()
def scores(model: nn.Module, patches: Patches) -> dict[str, float]:
    """Return accuracy at a probability of one half, and AUROC."""
    model.eval()
    numbers = range(len(patches.labels))
    logits = torch.cat([model(patches.batch(numbers[i : i + 64])[0])[:, 0] for i in numbers[::64]])
    accuracy = float(((logits > 0) == (patches.labels > 0)).float().mean())
    area = compute_roc_auc(logits, patches.labels)
    return {"accuracy": accuracy, "auroc": float(area)}  # type: ignore[arg-type]


def main(words: list[str] | None = None) -> None:
    """Train what is missing, and print the table of what is finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path, help="folder of runs.jsonl; the same command resumes")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet18"])
    parser.add_argument("--optimizers", nargs="+", choices=("sgd", "adam"), default=["sgd", "adam"])
    parser.add_argument("--rules", nargs="+", choices=sweep.RULES, default=list(sweep.RULES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--train-images", type=int, default=262_144)
    parser.add_argument("--validation-images", type=int, default=32_768)
    parser.add_argument("--test-images", type=int, default=32_768)
    parser.add_argument("--validate-every", type=int, default=2_000)
    parser.add_argument("--target", type=float, default=0.8, help="accuracy to count the steps to")
    options = parser.parse_args(words)
    counts = (options.train_images, options.validation_images, options.test_images)
    parts = {part: open_part(options.data, part, most) for part, most in zip(PARTS, counts, strict=True)}
    keys = ("steps", "batch", "train_images", "validation_images", "test_images", "validate_every", "target")
    settings = {key: getattr(options, key) for key in keys}
    record = Record(options.out / "runs.jsonl", settings)
    sweep.sweep(record, partial(train, parts=parts, settings=settings), options)
    columns = {"test": "accuracy", "auroc": "AUROC", "steps_to_target": f"steps to {options.target:g}"}
    print("\n".join(sweep.table(record.runs(), columns)))


if __name__ == "__main__":
    main()
