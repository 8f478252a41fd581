"""Convert native scans to a case as stored by BraTS: registered, 1 mm, skull-stripped.

The contrasts are registered to T1c, resampled once to an axis-aligned 1 mm grid around T1c's field of view in the voxel
order of BraTS (left, posterior, superior), and set to 0 outside the brain. The head keeps its pose in the scanner:
BraTS also aligns it to the SRI24 atlas, which a network trained with flips and rotations does not need.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - SimpleITK's usual alias

from data.datasets.label_stats import convention_of
from data.datasets.layouts import Case
from data.errors import DataError
from data.files import file_sha256
from data.labels import CONTRASTS, Contrast, decode, from_regions, to_regions
from data.native_space.brain_mask import BrainMask, find_brain, require_mask
from data.native_space.config import PrepareConfig
from data.native_space.itk import ImageGrid, grid_of, resampled, smoothed_for, to_itk, upright_grid, voxels_of
from data.native_space.mindgrab import Network
from data.native_space.rigid import MIN_CONTRAST, MIN_OVERLAP, WORKING_MM, Registration, head_mask, register_rigid
from data.nifti import (
    Volume,
    grid_difference,
    in_order_of,
    read_image,
    read_label_map,
    with_clean_background,
)
from data.preprocess import image_problem

#: The contrast to which the others are registered.
REFERENCE: Final[Contrast] = "t1c"
#: N4 fits the bias field on voxels of about this size, with this number of iterations at each level.
_N4_MM: Final = 4.0
_N4_ITERATIONS: Final = (50, 50, 30)


@dataclass(frozen=True, kw_only=True)
class NativeCase:
    """Four contrasts, each on its own grid in the scanner's LPS millimetres."""

    id: str
    images: Mapping[Contrast, sitk.Image]
    """float32, 3D."""
    codes: sitk.Image | None = None
    """Label map in the program's codes, uint8; None if there is none."""
    codes_on: Contrast = REFERENCE
    """The contrast on whose grid the label map is."""
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Origin of each file, such as its path and SHA-256, by contrast and ``label``; part of the record."""
    zeroed: Mapping[Contrast, int] = field(default_factory=dict)
    """Number of NaN or infinite voxels that were set to 0, by contrast."""
    backgrounds: Mapping[Contrast, str] = field(default_factory=dict)
    """Description of a background that was not 0, by contrast."""
    warnings: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    """Ambiguities of the files' geometry and how they were resolved, one sentence each."""


@dataclass(frozen=True, kw_only=True)
class BratsCase:
    """A case on one grid as BraTS stores it, with everything needed to map results back."""

    id: str
    images: Mapping[Contrast, npt.NDArray[np.float32]]
    """Shape (X, Y, Z) each; 0 outside the brain."""
    codes: npt.NDArray[np.uint8] | None
    grid: ImageGrid
    registrations: Mapping[Contrast, Registration]
    """Registrations of all contrasts but T1c."""
    mask: BrainMask
    record: Mapping[str, Any]
    """Record of the preparation, as in ``prepare.json``; the same on every run."""
    warnings: tuple[str, ...]
    """What to check in the result, one sentence each; ``record`` also lists what was changed on reading."""

    def transform(self, contrast: Contrast) -> sitk.Transform:
        """The transform from LPS millimetres of the grid, which are those of T1c, to those of a contrast."""
        return sitk.TranslationTransform(3) if contrast == REFERENCE else self.registrations[contrast].transform

    def volume(self, contrast: Contrast) -> Volume:
        """A contrast as it would be read from the file of the case.

        Raises:
            DataError: the image is not a skull-stripped brain, or has voxels that are NaN or infinite.
        """
        voxels = self.images[contrast]
        if not np.isfinite(voxels).all():
            raise DataError(f"case {self.id}, contrast {contrast}, prepared: voxels are NaN or infinite.")
        if (problem := image_problem(voxels)) is not None:
            raise DataError(f"case {self.id}, contrast {contrast}, prepared: {problem}.")
        affine = self.grid.affine.astype(np.float32).astype(np.float64)  # a file stores it in single precision
        return with_clean_background(Volume(voxels=voxels, affine=affine, path=Path(self.id)))


def read_native(case: Case, *, nan_to_zero: bool = False) -> NativeCase:
    """Read a case whose contrasts need not share a grid.

    Args:
        case: a case with all four contrasts; a label map must be on the grid of one of them.
        nan_to_zero: set image voxels that are NaN or infinite to 0 instead of rejecting the case.

    Raises:
        DataError: a contrast is missing or unreadable, or the label map is on none of the contrasts' grids.
    """
    case.require()
    volumes: dict[Contrast, Volume] = {}
    for contrast in CONTRASTS:
        path, number = case.contrasts[contrast], case.volumes.get(contrast)
        try:
            volumes[contrast] = read_image(path, number, nan_to_zero=nan_to_zero)
        except DataError as error:
            raise DataError(f"case {case.id}, contrast {contrast}: {error}") from error
        if not volumes[contrast].voxels.any():
            raise DataError(f"case {case.id}, contrast {contrast}: {path}: every voxel is 0.")
    files: dict[str, Path] = {str(contrast): path for contrast, path in case.contrasts.items()}
    files |= {} if case.label is None else {"label": case.label}
    codes, codes_on = (None, REFERENCE) if case.label is None else _read_codes(case, case.label, volumes)
    return NativeCase(
        id=case.id,
        images={contrast: to_itk(volume.voxels, volume.affine) for contrast, volume in volumes.items()},
        codes=codes,
        codes_on=codes_on,
        sources={name: {"path": str(path), "sha256": file_sha256(path)} for name, path in files.items()},
        zeroed={contrast: volume.zeroed for contrast, volume in volumes.items() if volume.zeroed},
        backgrounds={contrast: volume.background for contrast, volume in volumes.items() if volume.background},
        doubts=tuple(f"{contrast}: {volume.doubt}" for contrast, volume in volumes.items() if volume.doubt),
    )


def prepare_native(
    native: NativeCase,
    config: PrepareConfig,
    *,
    mindgrab: Network | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> BratsCase:
    """Register, correct, resample and mask the contrasts of one case; the result is deterministic.

    Args:
        native: the four contrasts on their own grids.
        config: the processing options.
        mindgrab: computes MindGrab's mask; None if it is not installed.
        on_step: called with a description of each step.

    Raises:
        DataError: a contrast cannot be registered, or the requested brain mask is not available; the message names it.
    """
    require_mask(config.mask, mindgrab)
    fixed = native.images[REFERENCE]
    registrations: dict[Contrast, Registration] = {}
    for contrast in CONTRASTS:
        if contrast != REFERENCE:
            on_step(f"{native.id}: registering {contrast}")
            try:
                registrations[contrast] = register_rigid(fixed, native.images[contrast], name=contrast)
            except DataError as error:
                raise DataError(f"case {native.id}: {error}") from error
    transforms = {contrast: found.transform for contrast, found in registrations.items()}
    grid = upright_grid(fixed, config.spacing_mm)
    made: dict[Contrast, sitk.Image] = {}
    for contrast in CONTRASTS:
        image = native.images[contrast]
        if config.n4:
            on_step(f"{native.id}: N4 of {contrast}")
            image = corrected(image)
        made[contrast] = resampled(smoothed_for(image, config.spacing_mm), grid, transforms.get(contrast))
    on_step(f"{native.id}: brain mask")
    others = {contrast: image for contrast, image in made.items() if contrast != REFERENCE}
    mask = find_brain(made[REFERENCE], fixed, config.mask, name=native.id, network=mindgrab, others=others)
    images = {contrast: voxels_of(image) for contrast, image in made.items()}
    if mask.mask is not None:
        inside = voxels_of(mask.mask) != 0
        images = {contrast: np.where(inside, voxels, np.float32(0)) for contrast, voxels in images.items()}
    codes = None
    if native.codes is not None:
        codes = _resampled_codes(native.codes, grid, transforms.get(native.codes_on))
    return BratsCase(
        id=native.id,
        images=images,
        codes=codes,
        grid=grid,
        registrations=registrations,
        mask=mask,
        record=_record(native, config, grid, registrations, mask),
        warnings=(*native.warnings, *mask.warnings),
    )


def corrected(image: sitk.Image) -> sitk.Image:
    """Remove an image's bias field, fitted by N4 on a coarser copy; zeros stay 0."""
    factors = [
        max(1, min(round(_N4_MM / own), n // 8)) for own, n in zip(image.GetSpacing(), image.GetSize(), strict=True)
    ]
    # N4 takes logarithms, so the mask must exclude voxels that are not above 0.
    coarse = sitk.Shrink(image, factors)
    mask = sitk.And(head_mask(coarse), sitk.Cast(coarse > 0, sitk.sitkUInt8))
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations(_N4_ITERATIONS)
    n4.SetNumberOfThreads(1)
    n4.Execute(coarse, mask)
    even: sitk.Image = image / sitk.Exp(n4.GetLogBiasFieldAsImage(image))
    return even


def _read_codes(case: Case, path: Path, volumes: Mapping[Contrast, Volume]) -> tuple[sitk.Image, Contrast]:
    """The label map in the program's codes, and the contrast on whose grid it is."""
    try:
        label = read_label_map(path)
        codes = decode(label.voxels, convention_of([case]))
    except DataError as error:
        raise DataError(f"case {case.id}, label map: {error}") from error
    for contrast in (REFERENCE, *CONTRASTS):
        if grid_difference(volumes[contrast], in_order_of(volumes[contrast], label)) is None:
            return to_itk(codes, label.affine), contrast
    raise DataError(
        f"case {case.id}: the label map {path} is not on the grid of any contrast. Resample it to the one it was drawn "
        "on, or leave it out."
    )


def _resampled_codes(codes: sitk.Image, grid: ImageGrid, transform: sitk.Transform | None) -> npt.NDArray[np.uint8]:
    """Resample a label map: interpolate each region linearly, threshold it at one half, and nest the regions."""
    shares = []
    for mask in to_regions(voxels_of(codes)):
        image = sitk.GetImageFromArray(np.ascontiguousarray(mask.T.astype(np.float32)))
        image.CopyInformation(codes)
        shares.append(voxels_of(resampled(image, grid, transform)) >= 0.5)
    return from_regions(np.stack(shares))


def _record(
    native: NativeCase,
    config: PrepareConfig,
    grid: ImageGrid,
    registrations: Mapping[Contrast, Registration],
    mask: BrainMask,
) -> dict[str, Any]:
    """Record of the preparation as plain data."""
    zeroed = [f"{count} voxels of {one} were NaN or infinite and are 0" for one, count in native.zeroed.items()]
    backgrounds = [f"{contrast}: {sentence}" for contrast, sentence in native.backgrounds.items()]
    return {
        "case": native.id,
        "inputs": {name: {**native.sources.get(name, {}), **_described(native.images[name])} for name in CONTRASTS},
        "label": {**native.sources.get("label", {}), "drawn_on": native.codes_on} if native.codes is not None else None,
        "parameters": {
            **asdict(config),
            "reference": REFERENCE,
            "registration": "rigid, Mattes mutual information",
            "registration_spacing_mm": WORKING_MM,
            "least_contrast": MIN_CONTRAST,
            "least_overlap": MIN_OVERLAP,
        },
        "registrations": {
            contrast: {
                "mutual_information_before": found.metric_before,
                "mutual_information": found.metric_after,
                "contrast_to_poses_away": found.contrast,
                "head_overlap_dice": found.overlap,
                "degrees": found.degrees,
                "shift_mm": found.shift_mm,
            }
            for contrast, found in registrations.items()
        },
        "grid": {"shape": list(grid.size), "affine": grid.affine.tolist(), "axes": "LPS"},
        "mask": {"source": mask.source, "coarse": mask.coarse, "detail": mask.detail, "litres": mask.litres},
        "transforms": "from LPS millimetres of t1c, which are those of this case, to those of the contrast's own file",
        "warnings": [*native.warnings, *zeroed, *backgrounds, *mask.warnings],
        "versions": _versions(),
    }


def _described(image: sitk.Image) -> dict[str, Any]:
    own = grid_of(image)
    return {
        "shape": list(own.size),
        "spacing_mm": [float(mm) for mm in image.GetSpacing()],
        "affine": own.affine.tolist(),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("znormseg", "SimpleITK", "nibabel", "nilearn", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
