"""Register images: rigidly between the contrasts of a head, affinely from a template to a head.

The metric is Mattes mutual information (Mattes et al., IEEE TMI 22, 120, 2003) as implemented in ITK, over a pyramid
that stops at :data:`WORKING_MM`. A single thread and a fixed seed make the transform the same on every run and machine.
The start is chosen among several candidates, and a result that does not stand out from distant poses is rejected.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - SimpleITK's usual alias

from data.errors import DataError
from data.native_space.itk import grid_of, refined, resampled, smoothed_for, upright_grid_around, voxels_of

#: Finest voxel size used in registration.
WORKING_MM: Final = 2.0
#: Voxel size of the coarsest pyramid level, on which the starting poses are compared.
_COARSE_MM: Final = 8.0
#: Voxels with a longer edge count as thick slices.
_THICK_MM: Final = 2.5
_BINS: Final = 32
_SEED: Final = 20408
#: Share of voxels sampled by the metric at the finest level.
_SAMPLED: Final = 0.25
#: Initial rotations tried about each world axis, in degrees.
_TRIED_DEGREES: Final = 15.0
#: Number of starting poses that are optimised before one is chosen.
_FOLLOWED: Final = 3
#: Shifts in mm and rotations in degrees of the poses from which a result must stand out.
_AWAY_MM: Final = 15.0
_AWAY_DEGREES: Final = 25.0
#: Minimum ratio of mutual information at the result to the best of the distant poses; two different heads give about 1.
MIN_CONTRAST: Final = 1.1
#: Minimum Dice of the two heads, within the field of view of both.
MIN_OVERLAP: Final = 0.75
#: Minimum ratio of mutual information at the result to that at the headers' pose. Below 1, because between thick
#: slices the metric at the true pose is a few thousandths lower than at neighbouring poses.
LEAST_KEPT: Final = 0.95
#: Assumed distances of the brain's top below the head's top, and height of the part of the head with the brain.
_SCALP_MM: Final = (0.0, 12.0)
_BRAIN_HEIGHT_MM: Final = 140.0


@dataclass(frozen=True, kw_only=True)
class Registration:
    """The pose of one image relative to another, with measures of its quality."""

    transform: sitk.Transform
    """From LPS millimetres of the fixed image to those of the moving one, as needed to resample in ITK."""
    metric_before: float
    """Mutual information (nats, higher is better) with the moving image positioned by its header."""
    metric_after: float
    """Mutual information with the result."""
    contrast: float
    """Ratio of ``metric_after`` to the best of 12 distant poses: how much the result stands out."""
    overlap: float
    """Dice of the two heads (everything that is not background) within the field of view of both."""
    cpu_seconds: float

    @property
    def degrees(self) -> float:
        """Rotation angle."""
        turn = linear_part(self.transform)[:3, :3]
        return math.degrees(math.acos(max(-1.0, min(1.0, (float(np.trace(turn)) - 1) / 2))))

    @property
    def shift_mm(self) -> float:
        """Displacement of the centre of rotation, which is the centre of the fixed head."""
        centre = np.array(self.transform.GetFixedParameters()[:3])
        return float(np.linalg.norm(self.transform.TransformPoint(centre.tolist()) - centre))


def register_rigid(fixed: sitk.Image, moving: sitk.Image, *, name: str) -> Registration:
    """Find the rigid transform that aligns one contrast of a head with another.

    Both images may have any spacing, orientation and field of view, with or without a skull.

    Args:
        fixed: float32, the image to align to; LPS millimetres.
        moving: float32, the image to align.
        name: name of the moving image, for messages.

    Returns:
        an ``Euler3DTransform`` about the centre of the fixed head.

    Raises:
        DataError: an image has no contrast, or no pose stands out: the images show different heads or are damaged.
    """
    started = time.process_time()
    own, moving_head = _Head.of(fixed, "t1c"), _Head.of(moving, name)
    fixed_head = own.upright()
    start = sitk.Euler3DTransform()
    start.SetCenter(fixed_head.centre)
    with _one_thread():
        found = _search(fixed_head, moving_head, list(_rigid_starts(start, fixed_head.centre, moving_head.centre)))
        found = _refined(own, moving_head, found)
        overlap = _overlap(fixed_head.mask, moving_head.mask, found)
        result = _measured(
            fixed_head, moving_head, start, found, _rigid_poses_away(found), overlap=overlap, started=started
        )
    _require_found(result, name, "t1c")
    return result


def _measured(
    fixed_head: _Head,
    moving_head: _Head,
    start: Any,
    found: Any,
    away: Iterable[Any],
    *,
    overlap: float,
    started: float,
    mask: sitk.Image | None = None,
) -> Registration:
    """The result with its quality measures."""
    before, after, *distant = (
        _information(fixed_head.image, moving_head.image, pose, mask=mask) for pose in (start, found, *away)
    )
    return Registration(
        transform=found,
        metric_before=before,
        metric_after=after,
        contrast=after / max(*distant, 1e-6),
        overlap=overlap,
        cpu_seconds=time.process_time() - started,
    )


def register_template(template: sitk.Image, brain: sitk.Image, head: sitk.Image, *, name: str) -> Registration:
    """Find the affine transform that maps a template's brain to a head, with or without its skull.

    The metric is evaluated in the template's brain and a rim around it, so that skull and neck have little influence.
    Starting poses place the brain's top below the head's by the thickness of scalp and skull, or align the centres.

    Args:
        template: float32, a brain without its skull.
        brain: float32, 1 in the template's brain.
        head: float32, the image to map it to.
        name: name of the head, for messages.

    Returns:
        an ``AffineTransform`` from the template's LPS millimetres to those of the head.

    Raises:
        DataError: an image has no contrast, or no pose stands out.
    """
    started = time.process_time()
    moving_head = _Head.of(head, name)
    # Two voxels of rim include the brain's border but little of the scalp's.
    rim = sitk.BinaryDilate(sitk.Cast(brain, sitk.sitkUInt8), [2] * 3)
    fixed_head = _Head(image=template, mask=rim, centre=_centre(sitk.Cast(brain, sitk.sitkUInt8)))
    starts: list[Any] = []
    for place in _template_places(fixed_head, moving_head):
        shift = [there - here for here, there in zip(fixed_head.centre, place, strict=True)]
        for tilt in (-1, 0, 1):
            pose = sitk.AffineTransform(3)
            pose.SetCenter(fixed_head.centre)
            pose.SetTranslation(shift)
            pose.Rotate(1, 2, math.radians(_TRIED_DEGREES) * tilt)
            starts.append(pose)
    with _one_thread():
        found = _search(fixed_head, moving_head, starts, mask=rim)
        inside = float(_on_grid(moving_head.mask, rim, found)[_marked(rim)].mean())
        away = _affine_poses_away(found)
        result = _measured(fixed_head, moving_head, starts[1], found, away, overlap=inside, started=started, mask=rim)
    _require_found(result, name, "the MNI152 template", least_overlap=0.5)
    return result


def _template_places(fixed_head: _Head, moving_head: _Head) -> Iterator[tuple[float, float, float]]:
    """Candidate positions of the template brain's centre.

    These are the head's centre, and positions that put the brain's top at each of the assumed distances below the
    head's top.
    """
    points = np.argwhere(voxels_of(moving_head.mask)).astype(np.float64)
    to_ras = grid_of(moving_head.mask).affine
    places = points @ to_ras[:3, :3].T + to_ras[:3, 3]
    places[:, :2] *= -1  # LPS
    yield moving_head.centre
    top = float(places[:, 2].max())
    upper = places[places[:, 2] > top - _BRAIN_HEIGHT_MM].mean(axis=0)
    brain = np.argwhere(voxels_of(fixed_head.mask))
    height = (brain[:, 2].max() - brain[:, 2].mean()) * fixed_head.mask.GetSpacing()[2]
    for scalp in _SCALP_MM:
        yield (float(upper[0]), float(upper[1]), top - scalp - float(height))


def _affine_poses_away(found: sitk.AffineTransform) -> Iterator[sitk.AffineTransform]:
    """Distant poses in both directions along each axis."""
    for axis, sign in product(range(3), (1, -1)):
        pose = sitk.AffineTransform(found)
        pose.Translate([sign * _AWAY_MM * (a == axis) for a in range(3)])
        yield pose


def linear_part(transform: sitk.Transform) -> npt.NDArray[np.float64]:
    """The 4x4 matrix of a linear transform of LPS millimetres."""
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    columns = [np.array(transform.TransformPoint(point)) - origin for point in np.eye(3).tolist()]
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(columns).T
    matrix[:3, 3] = origin
    return matrix


def head_mask(image: sitk.Image) -> sitk.Image:
    """Mask of the head: the non-zero voxels if many are 0, else those above Otsu's threshold; holes are filled.

    Args:
        image: float32.

    Returns:
        uint8 image, 1 inside.
    """
    zeros = float(np.mean(sitk.GetArrayViewFromImage(image) == 0))
    inside = image != 0 if zeros > 0.2 else sitk.OtsuThreshold(sitk.DiscreteGaussian(image, [4.0, 4.0, 4.0]), 0, 1)
    labelled = sitk.RelabelComponent(sitk.ConnectedComponent(inside), sortByObjectSize=True) == 1
    filled: sitk.Image = sitk.BinaryFillhole(labelled)
    return filled


@dataclass(frozen=True, kw_only=True)
class _Head:
    """An image at the working resolution with grey values from 0 to 1, and the mask and centre of its head."""

    image: sitk.Image
    mask: sitk.Image
    centre: tuple[float, float, float]

    @classmethod
    def of(cls, image: sitk.Image, name: str) -> _Head:
        factors = [max(1, round(WORKING_MM / own)) for own in image.GetSpacing()]
        coarse = sitk.BinShrink(image, factors)
        mask = head_mask(coarse)
        values = sitk.GetArrayViewFromImage(coarse)[_marked(mask)]
        if not values.size or np.ptp(values) == 0:
            raise DataError(f"{name}: the image shows no head: all its voxels have one value. Export it again.")
        low, high = (float(np.percentile(values, share)) for share in (0.5, 99.5))
        low = min(low, 0.0) if low < 0.1 * high else low
        scaled = sitk.Clamp((coarse - low) / max(high - low, 1e-12), lowerBound=0.0, upperBound=1.0)
        scaled = sitk.Cast(scaled, sitk.sitkFloat32)  # the metric requires equal pixel types
        return cls(image=scaled, mask=mask, centre=_centre(mask))

    def upright(self) -> _Head:
        """Resample the part around the head to an axis-aligned grid of the working resolution."""
        grid = upright_grid_around(self.mask, WORKING_MM, margin_mm=8.0)
        return _Head(
            image=resampled(smoothed_for(self.image, WORKING_MM), grid),
            mask=resampled(self.mask, grid, nearest=True),
            centre=self.centre,
        )


def _centre(mask: sitk.Image) -> tuple[float, float, float]:
    """Centroid of the marked voxels in LPS millimetres."""
    middle = np.argwhere(voxels_of(mask)).mean(axis=0)
    x, y, z = mask.TransformContinuousIndexToPhysicalPoint(middle.tolist())
    return (x, y, z)


def _rigid_starts(
    start: sitk.Euler3DTransform, fixed_centre: tuple[float, ...], moving_centre: tuple[float, ...]
) -> Iterator[sitk.Euler3DTransform]:
    """The headers' pose, and the pose with aligned head centres; each also rotated about every axis."""
    offset = tuple(there - here for here, there in zip(fixed_centre, moving_centre, strict=True))
    step = math.radians(_TRIED_DEGREES)
    turns = [
        (0.0, 0.0, 0.0),
        *(tuple(sign * step * (a == axis) for a in range(3)) for axis in range(3) for sign in (1, -1)),
    ]
    for shift, turn in product(((0.0, 0.0, 0.0), offset), turns):
        pose = sitk.Euler3DTransform(start)
        pose.SetRotation(*turn)
        pose.SetTranslation(shift)
        yield pose


def _rigid_poses_away(found: sitk.Euler3DTransform) -> Iterator[sitk.Euler3DTransform]:
    """Distant poses in both directions along and about each axis."""
    for parameter, sign in product(range(6), (1, -1)):
        values = list(found.GetParameters())
        values[parameter] += sign * (math.radians(_AWAY_DEGREES) if parameter < 3 else _AWAY_MM)
        pose = sitk.Euler3DTransform(found)
        pose.SetParameters(values)
        yield pose


def _search(fixed_head: _Head, moving_head: _Head, starts: list[Any], *, mask: sitk.Image | None = None) -> Any:
    """The best transform found from any of the starting poses."""
    coarse = sitk.Shrink(_blurred(fixed_head.image, _COARSE_MM / 2), [round(_COARSE_MM / WORKING_MM)] * 3)
    blurred = _blurred(moving_head.image, _COARSE_MM / 2)
    ranked = sorted(starts, key=lambda pose: -_information(coarse, blurred, pose, mask=mask))
    followed = [_descend(coarse, blurred, pose, step_mm=4.0, least_mm=0.2, mask=mask) for pose in ranked[:_FOLLOWED]]
    best = max(followed, key=lambda pose: _information(coarse, blurred, pose, mask=mask))
    middle = sitk.Shrink(_blurred(fixed_head.image, WORKING_MM), [2] * 3)
    best = _descend(middle, _blurred(moving_head.image, WORKING_MM), best, step_mm=1.0, least_mm=0.05, mask=mask)
    return _descend(fixed_head.image, moving_head.image, best, step_mm=0.5, least_mm=0.01, sampled=_SAMPLED, mask=mask)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Make ITK use one thread: with several, the order of summation varies and so do the last digits."""
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


def _refined(fixed_head: _Head, moving_head: _Head, found: Any) -> Any:
    """Refine a transform if one of the two images has thick slices; otherwise return ``found`` itself.

    Interpolation between thick slices blurs an image by an amount that varies with position, which shifts the metric's
    optimum by a millimetre or two. Therefore the thick image is used on its own voxels, and the other image, resampled
    to them with the transform found, is blurred across the slices as if it had been scanned in them. The remaining
    small rigid transform between the two is then estimated.
    """
    if max(*fixed_head.image.GetSpacing(), *moving_head.image.GetSpacing()) < _THICK_MM:
        return found
    swapped = max(moving_head.image.GetSpacing()) > max(fixed_head.image.GetSpacing())
    thick, thin, to_thin = (
        (moving_head, fixed_head, found.GetInverse()) if swapped else (fixed_head, moving_head, found)
    )
    own = grid_of(thick.image)
    x, y, z = (max(1, round(mm / WORKING_MM)) for mm in thick.image.GetSpacing())
    blurred = resampled(thin.image, refined(own, (x, y, z)), to_thin)
    # A slice profile of thickness d is a box of variance d^2 / 12.
    profile = [mm**2 / 12 if mm > _THICK_MM else 0.0 for mm in thick.image.GetSpacing()]
    blurred = sitk.DiscreteGaussian(blurred, profile, 32, 0.01, True)
    rest = sitk.Euler3DTransform()
    rest.SetCenter(thick.centre)
    rest = _descend(_cut(thick), blurred, rest, step_mm=0.5, least_mm=0.005)
    # Points of the thick image are mapped by `rest` to the resampled image, and from there to the thin image.
    matrix: npt.NDArray[np.floating] = linear_part(to_thin) @ linear_part(rest)
    matrix = np.linalg.inv(matrix) if swapped else matrix
    better = sitk.Euler3DTransform(found)
    better.SetMatrix(matrix[:3, :3].ravel().tolist(), 1e-5)
    centre = np.array(found.GetCenter())
    better.SetTranslation((matrix[:3, :3] @ centre + matrix[:3, 3] - centre).tolist())
    return better


def _cut(head: _Head) -> sitk.Image:
    """Crop an image to its head plus a margin."""
    marked = np.argwhere(voxels_of(head.mask))
    spare = np.ceil(8.0 / np.array(head.image.GetSpacing())).astype(int)
    low = np.maximum(marked.min(axis=0) - spare, 0)
    high = np.minimum(marked.max(axis=0) + spare + 1, head.image.GetSize())
    x, y, z = (slice(int(first), int(stop)) for first, stop in zip(low, high, strict=True))
    cut: sitk.Image = head.image[x, y, z]
    return cut


def _method(sampled: float, mask: sitk.Image | None) -> sitk.ImageRegistrationMethod:
    """Registration method with mutual information, sampled with a fixed seed."""
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)
    method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=_BINS)
    method.SetInterpolator(sitk.sitkLinear)
    if mask is not None:
        method.SetMetricFixedMask(mask)
    if sampled < 1:
        method.SetMetricSamplingStrategy(method.RANDOM)
        method.SetMetricSamplingPercentage(sampled, seed=_SEED)
    return method


def _information(fixed: sitk.Image, moving: sitk.Image, pose: Any, *, mask: sitk.Image | None = None) -> float:
    """Mutual information in nats at a pose; 0 if the images hardly overlap."""
    method = _method(1.0, mask)
    method.SetInitialTransform(pose)
    try:
        return -float(method.MetricEvaluate(fixed, moving))
    except RuntimeError as error:
        _ignore_no_overlap(error)
        return 0.0


def _descend(
    fixed: sitk.Image,
    moving: sitk.Image,
    start: Any,
    *,
    step_mm: float,
    least_mm: float,
    sampled: float = 1.0,
    mask: sitk.Image | None = None,
) -> Any:
    """Follow the metric's gradient from a starting pose; return that pose if the images do not overlap."""
    method = _method(sampled, mask)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=step_mm,
        minStep=least_mm,
        numberOfIterations=100,
        relaxationFactor=0.5,
        gradientMagnitudeTolerance=1e-8,
    )
    method.SetOptimizerScalesFromPhysicalShift()
    pose = type(start)(start)
    method.SetInitialTransform(pose, inPlace=True)
    try:
        method.Execute(fixed, moving)
    except RuntimeError as error:
        _ignore_no_overlap(error)
        return type(start)(start)
    return pose


def _ignore_no_overlap(error: RuntimeError) -> None:
    """Ignore ITK's error about images that do not overlap, but re-raise others, as ITK has only one exception type."""
    if "samples map outside" not in str(error):
        raise error


def _blurred(image: sitk.Image, sigma_mm: float) -> sitk.Image:
    smooth: sitk.Image = sitk.SmoothingRecursiveGaussian(image, sigma_mm)
    return smooth


def _overlap(fixed: sitk.Image, moving: sitk.Image, transform: Any) -> float:
    """Dice of two masks within the field of view of both, on the grid of the first."""
    first = _marked(fixed) & _on_grid(moving * 0 + 1, fixed, transform)
    second = _on_grid(moving, fixed, transform)
    return float(2 * (first & second).sum() / max(1, first.sum() + second.sum()))


def _on_grid(mask: sitk.Image, image: sitk.Image, transform: Any) -> npt.NDArray[np.bool_]:
    """A mask on the grid of another image, in ITK's axis order."""
    return _marked(sitk.Resample(mask, image, transform, sitk.sitkNearestNeighbor, 0, sitk.sitkUInt8))


def _marked(mask: sitk.Image) -> npt.NDArray[np.bool_]:
    return np.asarray(sitk.GetArrayViewFromImage(mask) != 0)


def _require_found(result: Registration, name: str, onto: str, *, least_overlap: float = MIN_OVERLAP) -> None:
    """Reject a result whose quality measures are too low."""
    problem = None
    if result.metric_after < LEAST_KEPT * result.metric_before:
        problem = (
            f"mutual information fell from {result.metric_before:.3f} at the position in the headers to "
            f"{result.metric_after:.3f}"
        )
    elif result.contrast < MIN_CONTRAST:
        problem = (
            f"no position stands out: mutual information {result.metric_after:.3f} is only {result.contrast:.2f} times "
            "that of distant positions"
        )
    elif result.overlap < least_overlap:
        problem = f"the heads overlap by only {result.overlap:.2f}; at least {least_overlap:g} is required"
    if problem is not None:
        raise DataError(
            f"{name} could not be registered to {onto}: {problem}. Do both show the same head? Register it yourself, "
            "or leave the case out."
        )
