"""Compare an exported network with the original, on windows of a case, in float32."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from app.errors import RunError
from app.inference.batch.predict import require_contrasts
from app.inference.model import Model
from app.inference.probabilities import in_whole_volume
from app.inference.sliding_window.grid import window_places
from data.datasets.layouts import Case, find_cases
from data.errors import DataError
from data.labels import from_regions
from data.nifti import Spacing
from data.phantoms import write_phantoms
from data.preprocess import prepare

#: Number of windows to compare.
WINDOWS: Final = 3
#: Difference of logits that rounding may cause, relative to the largest logit, or to 1 if that is larger.
LARGEST_DIFFERENCE: Final = 1e-3
#: Share of voxels whose labels may differ: those with a logit close to 0.
LARGEST_LABEL_DISAGREEMENT: Final = 1e-4
#: Voxel size of the phantom that is used if no case is given.
_PHANTOM_MM: Final = 3.0

Floats = npt.NDArray[np.float32]
#: Maps windows of shape (N, contrasts, X, Y, Z) to logits of shape (N, regions, X, Y, Z).
Answer = Callable[[Floats], Floats]


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far apart the logits of two networks are."""

    source: str
    """Where the windows come from, in words."""
    windows: int
    largest_difference: float
    mean_difference: float
    largest_logit: float
    """Largest absolute logit of the original; infinite if any of its logits is not finite."""
    label_disagreement: float
    """Share of the windows' voxels whose labels differ, with logits cut at 0."""

    @property
    def holds(self) -> bool:
        """Whether rounding explains all differences; never if the original's logits are not finite."""
        if not math.isfinite(self.largest_logit):
            return False
        allowed = LARGEST_DIFFERENCE * max(1.0, self.largest_logit)
        return self.largest_difference <= allowed and self.label_disagreement <= LARGEST_LABEL_DISAGREEMENT

    def require(self, what: str) -> None:
        """Check that parity holds.

        Raises:
            RunError: it does not; the message gives the numbers.
        """
        if not math.isfinite(self.largest_logit):
            raise RunError(
                f"{what}: not kept, because the original network returns non-finite logits on windows of "
                f"{self.source}. Its weights are unusable; choose another run."
            )
        if not self.holds:
            raise RunError(
                f"{what}: not kept, because it differs from the original network: on {self.windows} windows of "
                f"{self.source} the logits differ by up to {self.largest_difference:.3g} (the largest is "
                f"{self.largest_logit:.3g}; allowed is {LARGEST_DIFFERENCE:g} times that), and the labels of "
                f"{self.label_disagreement:.3%} of the voxels differ (allowed are {LARGEST_LABEL_DISAGREEMENT:.3%})"
            )

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``parity.json``."""
        return {
            "source": self.source,
            "windows": self.windows,
            "precision": "float32",
            "largest_difference": self.largest_difference,
            "mean_difference": self.mean_difference,
            "largest_logit": self.largest_logit,
            "label_disagreement": self.label_disagreement,
            "allowed": {
                "difference_relative_to_largest_logit": LARGEST_DIFFERENCE,
                "label_disagreement": LARGEST_LABEL_DISAGREEMENT,
            },
        }


def labels_of(logits: Floats) -> npt.NDArray[Any]:
    """Return the label map of the logits of one window, shape (regions, X, Y, Z)."""
    return from_regions(logits > 0)


def compare_outputs(
    network: nn.Module,
    answer: Answer,
    windows: Sequence[Tensor],
    source: str,
    *,
    decide: Callable[[Floats], npt.NDArray[Any]] = labels_of,
) -> Parity:
    """Compare the logits of the original and of an exported network, window by window.

    Args:
        network: the original, on the CPU, in eval mode.
        answer: the exported network, run by the program that it is exported for.
        windows: each of shape (1, contrasts, X, Y, Z), at least one.
        source: where the windows come from, in words.
        decide: returns the decisions that follow from the logits of one window; default: the labels of its voxels.
    """
    largest = total = logit = 0.0
    count = voxels = differing = 0
    for window in windows:
        with torch.inference_mode():
            ours: Floats = network(window).float().numpy()
        theirs = answer(window.numpy())
        if theirs.shape != ours.shape:
            raise RunError(f"the exported network returns the shape {theirs.shape}, the original {ours.shape}")
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            apart = np.abs(ours - theirs)
        # A difference that is NaN counts as infinite.
        largest = max(largest, float(np.nan_to_num(apart, nan=np.inf).max()))
        total += float(apart.sum(dtype=np.float64))
        logit = max(logit, float(np.abs(ours).max()) if np.isfinite(ours).all() else math.inf)
        labels = [decide(logits[0]) for logits in (ours, theirs)]
        differing += int(np.count_nonzero(labels[0] != labels[1]))
        count, voxels = count + ours.size, voxels + labels[0].size
    return Parity(
        source=source,
        windows=len(windows),
        largest_difference=largest,
        mean_difference=total / count,
        largest_logit=logit,
        label_disagreement=differing / voxels,
    )


def windows_of(model: Model, folder: Path | None) -> tuple[list[Tensor], str]:
    """Return windows that contain brain, from a case or from a phantom that is made for the model.

    Args:
        model: determines window and spacing.
        folder: folder of the case; None uses a phantom.

    Returns:
        at most :data:`WINDOWS` windows of shape (1, contrasts, X, Y, Z), spread over the volume; and where they come
        from, in words.

    Raises:
        DataError: the case cannot be used, or the folder does not hold exactly one case.
    """
    with _case_for(model.spacing_mm, folder) as (case, words):
        return _windows(model, case), words


def image_of(spacing_mm: Spacing, folder: Path | None) -> tuple[Floats, str]:
    """Return the prepared image of a case, shape (contrasts, X, Y, Z), and where it comes from, in words.

    Args:
        spacing_mm: spacing of the network's input.
        folder: folder of the case; None uses a phantom.

    Raises:
        DataError: the case cannot be used, or the folder does not hold exactly one case.
    """
    with _case_for(spacing_mm, folder) as (case, words):
        return prepare(case.require(), spacing_mm=spacing_mm).image, words


@contextmanager
def _case_for(spacing_mm: Spacing, folder: Path | None) -> Iterator[tuple[Case, str]]:
    """Return the case of a folder, or a phantom that exists during the block."""
    if folder is not None:
        cases = find_cases(folder)
        if len(cases) != 1:
            raise DataError(f"{folder}: contains {len(cases)} cases; give the folder of one")
        yield cases[0], f"case {cases[0].id}"
        return
    with tempfile.TemporaryDirectory() as place:
        write_phantoms(Path(place), 1, seed=0, spacing_mm=max(_PHANTOM_MM, *spacing_mm))
        yield find_cases(Path(place))[0], "a phantom"


def _windows(model: Model, case: Case) -> list[Tensor]:
    require_contrasts(case, model)
    case.require()
    prepared = prepare(case, spacing_mm=model.spacing_mm)
    image = torch.from_numpy(prepared.image if model.crop else in_whole_volume(prepared.image, prepared)[0])
    window = model.window
    for axis, side in enumerate(window):
        missing = max(0, side - image.shape[axis + 1])
        before_last = [0, 0] * (2 - axis)
        image = functional.pad(image, [*before_last, missing // 2, missing - missing // 2])
    shape = (image.shape[1], image.shape[2], image.shape[3])
    patches = [image[(slice(None), *place)] for place in window_places(shape, window, model.overlap)]
    filled = [patch for patch in patches if patch.any()]
    chosen = np.unique(np.linspace(0, len(filled) - 1, WINDOWS).round().astype(int))
    return [filled[number][None].contiguous() for number in chosen]
