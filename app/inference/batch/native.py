"""Prepare scans straight from the scanner for a network, and map the answer back to a scan's own grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from app.inference.model import Predictor
from app.inference.probabilities import MeanPrediction, on_canonical_grid
from app.inference.skull_strip import mindgrab_network
from app.progress import LOG
from data.files import file_sha256
from data.labels import CONTRASTS, Contrast, to_regions
from data.native_space.config import MASK_WORDS, PrepareConfig
from data.nifti import Spacing, spacing_of
from data.preprocess import Prepared, prepare_volumes

if TYPE_CHECKING:
    from data.native_space.to_brats import BratsCase, NativeCase


@dataclass(frozen=True, kw_only=True)
class Native:
    """How scans straight from the scanner are handled."""

    config: PrepareConfig
    """How the scans are prepared."""
    space: Contrast = "t1c"
    """Contrast whose grid the label map is mapped to."""

    def settings(self) -> dict[str, Any]:
        """Return the entries for a prediction's settings; a mask file is identified by its content."""
        prepare = asdict(self.config)
        if self.config.mask not in MASK_WORDS and (mask := Path(self.config.mask)).is_file():
            prepare["mask"] = file_sha256(mask)
        return {"prepare": prepare, "space": self.space}


@dataclass(frozen=True, kw_only=True)
class PreparedScans:
    """Scans, and the case that was prepared from them."""

    scans: NativeCase
    case: BratsCase
    network_input: Prepared
    """The network's input, as if it had been read from the files of ``case``."""
    space: Contrast

    @property
    def repairs(self) -> tuple[str, ...]:
        """Choices and changes in the geometry, one sentence each."""
        registered = (f"{contrast} was registered to t1c and resampled" for contrast in self.case.registrations)
        return (*self.scans.doubts, *registered)

    def map_back(
        self, model: Predictor, answer: MeanPrediction
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32], npt.NDArray[np.float32] | None, Spacing]:
        """Map an answer to the grid of ``space``.

        Returns:
            nested masks, mean probabilities minus one half, the disagreement of the answers, and the grid's spacing.
        """
        from data.native_space.from_brats import resample_to_scan, threshold_shares
        from data.native_space.itk import grid_of

        scan, transform = grid_of(self.scans.images[self.space]), self.case.transform(self.space)
        spacing_mm = spacing_of(scan.affine)

        def mapped(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            # The prepared case is in canonical voxel order, and so is the answer.
            return resample_to_scan(on_canonical_grid(values, self.network_input), self.case.grid, transform, scan)

        shares = mapped(answer.centred + np.float32(0.5))
        masks = model.postprocess.clean(to_regions(threshold_shares(shares, model.postprocess.thresholds)), spacing_mm)
        disagreement = None if answer.disagreement is None else np.clip(mapped(answer.disagreement), 0, 1)
        return masks, shares - np.float32(0.5), disagreement, spacing_mm


def prepare_scans(
    scans: NativeCase, native: Native, spacing_mm: Spacing | None, on_step: Callable[[str], None]
) -> PreparedScans:
    """Prepare the scans of one case for a network.

    Args:
        scans: the four contrasts, from files or any other source.
        native: how they are handled.
        spacing_mm: spacing of the network's input.
        on_step: called with a description of each step.

    Raises:
        DataError: the case cannot be prepared, or is not a skull-stripped brain afterwards.
    """
    from data.native_space.to_brats import prepare_native

    case = prepare_native(scans, native.config, mindgrab=mindgrab_network(), on_step=on_step)
    for warning in case.warnings:
        LOG.warning("case %s: %s", case.id, warning)
    volumes = {contrast: partial(case.volume, contrast) for contrast in CONTRASTS}
    network_input = prepare_volumes(volumes, case_id=case.id, spacing_mm=spacing_mm)
    on_step(f"{case.id}: network")
    return PreparedScans(scans=scans, case=case, network_input=network_input, space=native.space)
