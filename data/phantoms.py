"""Synthetic glioma cases, named and stored as BraTS names and stores its own.

A phantom is the MNI152 anatomy that nilearn carries (Fonov et al., NeuroImage 54, 2011), bent anew for every case, with
a glioma grown into it and four contrasts rendered from it. It needs no download and nobody's data, so that tests and
first steps have something to work on. It is no substitute for patients: numbers measured on phantoms say nothing about
the clinic.

Positions are millimetres from the centre of the first voxel along the voxel axes (left, posterior, superior). Every
random field is drawn on a lattice fixed in millimetres, so a case has the same anatomy and tumour at every spacing.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nibabel as nib
import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.labels import (
    BRATS2021,
    BRATS2023,
    CONTRASTS,
    ENHANCING,
    NECROSIS,
    OEDEMA,
    Contrast,
    LabelConvention,
    encode,
)

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

#: Field of view of a BraTS volume, and the box around its centre that a brain never leaves.
_FIELD_OF_VIEW_MM: Final = (240.0, 240.0, 155.0)
_BOX_START_MM: Final = (38.0, 24.0, 1.0)
_BOX_END_MM: Final = (202.0, 216.0, 154.0)
_BRAIN_CENTRE_MM: Final = (120.0, 120.0, 69.0)
#: The point of MNI space (right, anterior, superior) that comes to lie there: about the middle of the brain mask.
_TEMPLATE_CENTRE_MM: Final = (0.0, -18.0, 5.0)
#: MNI's average head is larger than the SRI24 head that BraTS uses: 1.88 l of brain against about 1.3 l.
_HEAD_SCALE: Final = 0.87
#: Tumours grow on this grid whatever the spacing asked for, so that their shape does not depend on it.
_GROWTH_SPACING_MM: Final = 3.0

#: Intensity of (white matter, grey matter, fluid); white matter on T1 is 1.
_TISSUES: Final[dict[Contrast, tuple[float, float, float]]] = {
    "t1": (1.00, 0.76, 0.30),
    "t1c": (0.98, 0.80, 0.28),
    "t2": (0.50, 0.70, 1.75),
    "flair": (0.66, 0.84, 0.22),
}
#: Intensity of (necrosis, oedema, enhancing tumour, core of a tumour that does not enhance).
_LESIONS: Final[dict[Contrast, tuple[float, float, float, float]]] = {
    "t1": (0.58, 0.74, 0.78, 0.62),
    "t1c": (0.52, 0.72, 1.45, 0.60),
    "t2": (1.30, 1.05, 0.88, 1.15),
    "flair": (0.85, 1.25, 1.12, 1.15),
}
#: How the template's own detail, which its tissue maps do not explain, shows on each contrast.
_DETAIL_GAIN: Final[dict[Contrast, float]] = {"t1": 1.0, "t1c": 0.9, "t2": -0.8, "flair": -0.3}
#: Standard deviation of the blur in mm, in the plane and across slices; T2 and FLAIR are often scanned in thick slices.
_BLUR_MM: Final[dict[Contrast, tuple[float, float]]] = {
    "t1": (0.5, 0.5),
    "t1c": (0.5, 0.6),
    "t2": (0.5, 0.9),
    "flair": (0.6, 1.1),
}
_SUFFIXES_2021: Final[dict[Contrast, str]] = {"t1": "t1", "t1c": "t1ce", "t2": "t2", "flair": "flair"}
_SUFFIXES_2023: Final[dict[Contrast, str]] = {"t1": "t1n", "t1c": "t1c", "t2": "t2w", "flair": "t2f"}


@dataclass(frozen=True, kw_only=True)
class Phantom:
    """One synthetic case in memory."""

    images: dict[Contrast, npt.NDArray[np.int16]]
    """The four contrasts, each of shape (X, Y, Z); exactly 0 outside the brain and at least 1 inside."""
    codes: npt.NDArray[np.uint8]
    """The program's label codes 0 to 3, shape (X, Y, Z)."""
    affine: npt.NDArray[np.float64]
    """Voxel to world in mm, shape (4, 4): diag(-s, -s, s) with the origin (0, 239, 0) of BraTS."""


@dataclass(frozen=True, kw_only=True)
class _Naming:
    """How one year of BraTS names and numbers things."""

    prefix: str
    visit: str
    separator: str
    suffixes: dict[Contrast, str]
    convention: LabelConvention


_NAMINGS: Final[dict[int, _Naming]] = {
    2021: _Naming(prefix="BraTS2021_", visit="", separator="_", suffixes=_SUFFIXES_2021, convention=BRATS2021),
    2023: _Naming(prefix="BraTS-GLI-", visit="-000", separator="-", suffixes=_SUFFIXES_2023, convention=BRATS2023),
}


def make_phantom(index: int, *, seed: int = 0, spacing_mm: float = 2.0) -> Phantom:
    """Make one case; its voxels depend on the three arguments and on nothing else.

    Args:
        index: number of the case, 0 to 99999.
        seed: number of the series, 0 or more (default 0); each has its own cases.
        spacing_mm: edge of a voxel, 0.5 to 8 mm (default 2); the field of view is always 240 x 240 x 155 mm.

    Returns:
        the case, of shape (round(240 / s), round(240 / s), round(155 / s)).

    Raises:
        DataError: an argument out of range.

    Example:
        >>> make_phantom(0, spacing_mm=4.0).codes.shape
        (60, 60, 39)
    """
    _check_arguments(index=index, seed=seed, spacing_mm=spacing_mm)
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence([seed, index]).spawn(5)]
    head_rng, tumour_rng, confounder_rng, scanner_rng, noise_rng = streams
    head = _draw_head(head_rng)
    plan = _draw_tumour(tumour_rng, head, _draw_kind(index, seed))
    tumour = _grow(plan, head)
    grid = _Grid.of_spacing(spacing_mm)
    tissue = _sample_tissue(head, plan, grid, fine=spacing_mm < 1.5)
    lesion = _place_lesion(tumour, tissue, grid)
    confounders = _draw_confounders(confounder_rng, tissue, grid)
    images = _scan(scanner_rng, noise_rng, tissue, lesion=lesion, confounders=confounders, grid=grid)
    return Phantom(
        images={c: grid.embed(image) for c, image in images.items()},
        codes=grid.embed(_scatter(lesion.codes, tissue.inside, 0)),
        affine=_affine(spacing_mm),
    )


def case_name(index: int, year: int) -> str:
    """Name of a case as BraTS of that year writes it.

    Args:
        index: number of the case, 0 to 99999.
        year: 2021 or 2023.

    Returns:
        the name, which is also that of the case's folder.

    Raises:
        DataError: an argument out of range.

    Example:
        >>> case_name(7, 2021), case_name(7, 2023)
        ('BraTS2021_00007', 'BraTS-GLI-00007-000')
    """
    _check_arguments(index=index, year=year)
    return f"{_NAMINGS[year].prefix}{index:05d}{_NAMINGS[year].visit}"


def write_phantom(folder: Path, index: int, *, seed: int = 0, spacing_mm: float = 2.0, year: int = 2021) -> Path:
    """Make one case and write it as compressed NIfTI; its folder appears only when it is complete.

    Args:
        folder: folder of the data set, made if missing.
        index: number of the case, 0 to 99999.
        seed: number of the series, 0 or more (default 0).
        spacing_mm: edge of a voxel, 0.5 to 8 mm (default 2).
        year: 2021 or 2023 (default 2021); decides names and label numbers, not voxels.

    Returns:
        the case's folder, with five files.

    Raises:
        DataError: an argument out of range, or the case is already there.
    """
    _check_arguments(index=index, seed=seed, spacing_mm=spacing_mm, year=year)
    case = case_name(index, year)
    _refuse_overwriting(folder, case)
    phantom = make_phantom(index, seed=seed, spacing_mm=spacing_mm)
    with _folder_when_complete(folder, case) as partial:
        _write_files(phantom, partial, case, _NAMINGS[year])
    return folder / case


def write_phantoms(
    folder: Path,
    count: int,
    *,
    seed: int = 0,
    spacing_mm: float = 2.0,
    year: int = 2021,
    on_case: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Make the cases 0 to ``count`` - 1 and write them; a case does not depend on how many there are.

    Args:
        folder: folder of the data set, made if missing.
        count: how many cases, 1 or more.
        seed: number of the series, 0 or more (default 0).
        spacing_mm: edge of a voxel, 0.5 to 8 mm (default 2).
        year: 2021 or 2023 (default 2021).
        on_case: called with each case's folder once it is written (default None).

    Returns:
        the folders of the cases, in order.

    Raises:
        DataError: an argument out of range, or one of the cases is already there; then nothing is written.
    """
    if count < 1:
        raise DataError(f"count is {count}; allowed is 1 or more. Ask for at least one case.")
    _check_arguments(index=count - 1, seed=seed, spacing_mm=spacing_mm, year=year)
    for index in range(count):
        _refuse_overwriting(folder, case_name(index, year))
    written = []
    for index in range(count):
        written.append(write_phantom(folder, index, seed=seed, spacing_mm=spacing_mm, year=year))
        if on_case is not None:
            on_case(written[-1])
    return written


# Arguments and files


def _check_arguments(*, index: int = 0, seed: int = 0, spacing_mm: float = 2.0, year: int = 2021) -> None:
    if not 0 <= index <= 99_999:
        raise DataError(f"case index is {index}; allowed are 0 to 99999, because names carry five digits.")
    if seed < 0:
        raise DataError(f"seed is {seed}; allowed is 0 or more. Choose a whole number that is not negative.")
    if not 0.5 <= spacing_mm <= 8.0:
        raise DataError(f"spacing_mm is {spacing_mm:g}; allowed are 0.5 to 8 mm. Choose a spacing in that range.")
    if year not in _NAMINGS:
        raise DataError(f"year is {year}; allowed are 2021 and 2023. Choose one of these naming schemes.")


def _refuse_overwriting(folder: Path, case: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file, but phantoms go into a folder. Choose another place.")
    if (folder / case).exists():
        raise DataError(f"{folder / case} already exists and is not overwritten. Remove it or choose another folder.")


@contextmanager
def _folder_when_complete(folder: Path, case: str) -> Iterator[Path]:
    """A hidden folder to write into, renamed to the case's name at the end, or removed after a failure."""
    partial = folder / f".{case}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _refuse_overwriting(folder, case)
        partial.replace(folder / case)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_files(phantom: Phantom, folder: Path, case: str, naming: _Naming) -> None:
    volumes: dict[str, npt.NDArray[Any]] = {naming.suffixes[c]: phantom.images[c] for c in CONTRASTS}
    volumes["seg"] = encode(phantom.codes, naming.convention)
    for suffix, volume in volumes.items():
        image = nib.Nifti1Image(volume, phantom.affine)
        # The codes are those of the released BraTS files: images 2 and 1, label maps 1 and 1.
        image.set_qform(phantom.affine, code=1 if suffix == "seg" else 2)
        image.set_sform(phantom.affine, code=1)
        image.header.set_xyzt_units("mm")
        nib.save(image, folder / f"{case}{naming.separator}{suffix}.nii.gz")


def _affine(spacing_mm: float) -> npt.NDArray[np.float64]:
    affine = np.diag([-spacing_mm, -spacing_mm, spacing_mm, 1.0])
    affine[1, 3] = 239.0
    return affine


# Grids and smooth random fields


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """The part of a voxel grid that lies in the brain's box."""

    spacing_mm: float
    shape: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def of_spacing(cls, spacing_mm: float) -> _Grid:
        shape = tuple(round(length / spacing_mm) for length in _FIELD_OF_VIEW_MM)
        start = tuple(math.ceil(a / spacing_mm) for a in _BOX_START_MM)
        stop = tuple(min(math.floor(b / spacing_mm) + 1, n - 1) for b, n in zip(_BOX_END_MM, shape, strict=True))
        return cls(spacing_mm=spacing_mm, shape=shape, start=start, stop=stop)

    @property
    def axes_mm(self) -> tuple[Floats, ...]:
        """Positions of the box's voxels along each axis."""
        pairs = zip(self.start, self.stop, strict=True)
        return tuple((np.arange(a, b) * self.spacing_mm).astype(np.float32) for a, b in pairs)

    def embed(self, volume: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The whole volume, 0 outside the box."""
        whole = np.zeros(self.shape, dtype=volume.dtype)
        whole[tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))] = volume
        return whole


@dataclass(frozen=True, kw_only=True)
class _Field:
    """A smooth random field over the brain's box: cubic B-splines on a lattice of normal numbers, of unit spread."""

    lattice: Floats
    pitch_mm: float

    @classmethod
    def draw(cls, rng: np.random.Generator, pitch_mm: float) -> _Field:
        lengths = zip(_BOX_START_MM, _BOX_END_MM, strict=True)
        shape = [math.ceil((b - a) / pitch_mm) + 4 for a, b in lengths]
        # A cubic B-spline averages independent numbers; 0.479 is its mean sum of squared weights along one axis.
        return cls(lattice=rng.standard_normal(shape, dtype=np.float32) / np.float32(0.479**1.5), pitch_mm=pitch_mm)

    def on(self, axes_mm: tuple[Floats, ...]) -> Floats:
        """Values at every point of a rectilinear grid."""
        values = self.lattice
        for axis_mm, start_mm in zip(axes_mm, _BOX_START_MM, strict=True):
            weights = self._weights((axis_mm - start_mm) / self.pitch_mm, values.shape[0])
            # tensordot moves the axis just done to the end, so three rounds restore the order.
            values = np.tensordot(values, weights, axes=([0], [1]))
        return values

    @staticmethod
    def _weights(positions: Floats, size: int) -> Floats:
        distance = np.abs(positions[:, None] + 1 - np.arange(size, dtype=np.float32))
        near = 2 / 3 - distance**2 + distance**3 / 2
        far = np.clip(2 - distance, 0, None) ** 3 / 6
        return np.where(distance < 1, near, far).astype(np.float32)


def _scatter(values: npt.NDArray[Any], inside: Mask, outside: float) -> npt.NDArray[Any]:
    """A volume that holds ``values`` inside the mask and one number elsewhere."""
    volume = np.full(inside.shape, outside, dtype=values.dtype)
    volume[inside] = values
    return volume


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)), dtype=np.float32)


# Anatomy


@dataclass(frozen=True, kw_only=True)
class _Anatomy:
    """Maps of the MNI152 brain, each of shape (X, Y, Z), and where they lie."""

    maps: dict[str, Floats]
    spacing_mm: float
    origin_mm: tuple[float, float, float]

    def at(self, name: str, points_mm: Floats) -> Floats:
        """Linear interpolation of a map at points in MNI space, shape (3, ...)."""
        from scipy import ndimage  # noqa: PLC0415 - importing this module must stay cheap

        origin = np.array(self.origin_mm, dtype=np.float32).reshape(3, *[1] * (points_mm.ndim - 1))
        voxels = (points_mm - origin) / np.float32(self.spacing_mm)
        return ndimage.map_coordinates(self.maps[name], voxels, order=1, output=np.float32, mode="constant")


@functools.cache
def _load_anatomy(spacing_mm: int) -> _Anatomy:
    """Tissue fractions, brain mask and the detail of the T1 template that they leave unexplained."""
    from nilearn import datasets  # type: ignore[import-untyped]  # noqa: PLC0415 - importing it takes a second

    template = datasets.load_mni152_template(resolution=spacing_mm)
    t1 = np.asarray(template.dataobj, dtype=np.float32)
    grey = np.asarray(datasets.load_mni152_gm_template(resolution=spacing_mm).dataobj, dtype=np.float32)
    white = np.asarray(datasets.load_mni152_wm_template(resolution=spacing_mm).dataobj, dtype=np.float32)
    brain = np.asarray(datasets.load_mni152_brain_mask(resolution=spacing_mm).dataobj, dtype=np.float32)
    fluid = np.clip(1 - grey - white, 0, 1)
    # 0.87, 0.65 and 0.28 are the template's own means where a tissue fills the voxel.
    detail = np.where(brain > 0, t1 - 0.87 * white - 0.65 * grey - 0.28 * fluid, 0).astype(np.float32)
    maps = {"grey": grey, "white": white, "brain": brain, "detail": np.clip(detail, -0.15, 0.15)}
    x_mm, y_mm, z_mm = template.affine[:3, 3].tolist()
    return _Anatomy(maps=maps, spacing_mm=float(spacing_mm), origin_mm=(x_mm, y_mm, z_mm))


@functools.cache
def _load_landmarks() -> _Anatomy:
    """Depth below the brain's surface in mm, and nearness of the ventricles from 0 to 1."""
    from scipy import ndimage  # noqa: PLC0415 - importing this module must stay cheap

    anatomy = _load_anatomy(2)
    brain = anatomy.maps["brain"] > 0
    depth_mm = ndimage.distance_transform_edt(brain, sampling=anatomy.spacing_mm).astype(np.float32)
    fluid = brain * (1 - anatomy.maps["grey"] - anatomy.maps["white"])
    ventricles = ((fluid > 0.7) & (depth_mm > 28)).astype(np.float32)
    near = ndimage.gaussian_filter(ventricles, 3.5 / anatomy.spacing_mm) * 2.5
    maps = {"depth_mm": depth_mm, "ventricle": np.clip(near, 0, 1).astype(np.float32)}
    return _Anatomy(maps=maps, spacing_mm=anatomy.spacing_mm, origin_mm=anatomy.origin_mm)


@dataclass(frozen=True, kw_only=True)
class _Head:
    """One person: how the template is turned, scaled, bent and aged."""

    matrix: npt.NDArray[np.float64]
    """From mm off the brain's centre (left, posterior, superior) to mm off the template's centre."""
    shift_mm: npt.NDArray[np.float64]
    bends: tuple[tuple[float, tuple[_Field, _Field, _Field]], ...]
    """Amplitude in mm and the three components of each warp."""
    atrophy: float
    """Share by which fluid is widened at the cost of grey matter."""
    ragged: _Field
    """Where the skull stripping cut deeper."""


def _draw_head(rng: np.random.Generator) -> _Head:
    angles = rng.normal(0, math.radians(2.5), 3)
    stretch = np.diag(np.exp(rng.normal(0, 0.018, 3)) / (_HEAD_SCALE * math.exp(rng.normal(0, 0.012))))
    matrix = _rotation(angles) @ stretch @ np.diag([-1.0, -1.0, 1.0])
    scales = ((2.9, 45.0), (1.6, 18.0), (0.9, 9.0))
    bends = tuple((a, (_Field.draw(rng, p), _Field.draw(rng, p), _Field.draw(rng, p))) for a, p in scales)
    return _Head(
        matrix=matrix,
        shift_mm=rng.normal(0, 1.5, 3),
        bends=bends,
        atrophy=float(rng.uniform(0.2, 1.0)),
        ragged=_Field.draw(rng, 14.0),
    )


def _rotation(angles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    (a, b, c), (u, v, w) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, a, -u], [0, u, a]])
    about_y = np.array([[b, 0, v], [0, 1, 0], [-v, 0, b]])
    about_z = np.array([[c, -w, 0], [w, c, 0], [0, 0, 1]])
    return np.asarray(about_x @ about_y @ about_z, dtype=np.float64)


def _template_points(head: _Head, axes_mm: tuple[Floats, ...], plan: _TumourPlan | None) -> Floats:
    """Where in MNI space the points of a grid lie, shape (3, X, Y, Z); the tumour pushes tissue away from its foci."""
    points = np.stack(np.meshgrid(*axes_mm, indexing="ij"))
    if plan is not None:
        _pull_to_foci_(points, plan)
    for amplitude_mm, components in head.bends:
        for axis, field in enumerate(components):
            points[axis] += np.float32(amplitude_mm) * field.on(axes_mm)
    points -= (np.array(_BRAIN_CENTRE_MM) + head.shift_mm).astype(np.float32)[:, None, None, None]
    turned = np.tensordot(head.matrix.astype(np.float32), points, axes=1)
    turned += np.array(_TEMPLATE_CENTRE_MM, dtype=np.float32)[:, None, None, None]
    return turned


def _pull_to_foci_(points: Floats, plan: _TumourPlan) -> None:
    """Mass effect: tissue seen at a point comes from nearer to the focus, so it was pushed outwards."""
    for focus in plan.foci:
        centre = focus.centre_mm.astype(np.float32)[:, None, None, None]
        offset = points - centre
        reach_mm = 2.0 * focus.radius_mm
        pull = plan.mass_effect * np.exp(-np.sum(offset**2, axis=0) / np.float32(reach_mm**2))
        points -= pull * offset


@dataclass(frozen=True, kw_only=True)
class _Tissue:
    """A head on a grid; all but ``inside`` are vectors over the brain's voxels."""

    inside: Mask
    """The brain, shape of the box."""
    white: Floats
    grey: Floats
    fluid: Floats
    detail: Floats
    depth_mm: Floats
    ventricle: Floats
    midline_mm: Floats
    """Distance from the plane between the hemispheres."""


def _sample_tissue(head: _Head, plan: _TumourPlan | None, grid: _Grid, *, fine: bool) -> _Tissue:
    anatomy, landmarks = _load_anatomy(1 if fine else 2), _load_landmarks()
    points_mm = _template_points(head, grid.axes_mm, plan)
    cut = 0.5 + 0.12 * head.ragged.on(grid.axes_mm)
    inside = anatomy.at("brain", points_mm) > np.clip(cut, 0.2, 0.95)
    points_mm = points_mm[:, inside]
    white, grey, fluid = _sharpen(anatomy.at("white", points_mm), anatomy.at("grey", points_mm), head.atrophy)
    return _Tissue(
        inside=inside,
        white=white,
        grey=grey,
        fluid=fluid,
        detail=anatomy.at("detail", points_mm),
        depth_mm=landmarks.at("depth_mm", points_mm),
        ventricle=landmarks.at("ventricle", points_mm),
        midline_mm=np.abs(points_mm[0]),
    )


def _sharpen(white: Floats, grey: Floats, atrophy: float) -> tuple[Floats, Floats, Floats]:
    """Fractions as crisp as one person's: the template's are the average of 152 people."""
    fluid = np.clip(1 - white - grey, 0, 1) * np.float32(1.2 + atrophy)
    powers = [np.clip(tissue, 1e-4, None) ** np.float32(2.2) for tissue in (white, grey, fluid)]
    total = powers[0] + powers[1] + powers[2]
    return powers[0] / total, powers[1] / total, powers[2] / total


# Tumour


@dataclass(frozen=True, kw_only=True)
class _Focus:
    """One centre of growth."""

    centre_mm: npt.NDArray[np.float64]
    radius_mm: float
    stretch: npt.NDArray[np.float64]
    """Matrix that turns the ellipsoid about the centre into a ball, shape (3, 3)."""


@dataclass(frozen=True, kw_only=True)
class _TumourPlan:
    """What is drawn about a tumour before it grows."""

    foci: tuple[_Focus, ...]
    core_ml: float
    oedema_ml: float
    rim_share: float
    """Thickness of the enhancing rim over the radius; 0 where nothing enhances."""
    mass_effect: float
    contour: tuple[_Field, _Field]
    """Coarse and fine irregularity of the core's border."""
    rim: tuple[_Field, _Field, _Field]
    """Thickness of the enhancing rim, gaps in it, and enhancing nests inside the core."""
    permeability: _Field
    """How easily oedema spreads."""
    core_softness_mm: float
    oedema_softness_mm: float


@dataclass(frozen=True, kw_only=True)
class _Tumour:
    """A grown tumour: where its core ends, and when oedema arrives at each point of the growth grid."""

    plan: _TumourPlan
    core_offset_mm: float
    arrival_mm: Floats
    """Distance from the core in mm of white matter, shape of the growth grid's box."""
    oedema_reach_mm: float


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What sort of tumour a case has."""

    enhances: bool
    n_foci: int
    whole_ml: float


def _draw_kind(index: int, seed: int) -> _Kind:
    """Kinds in fixed shares, spread evenly over the cases, so that a series of ten has some of each.

    Case i takes the i-th point of Richtmyer's additive recurrence, started by the seed: its steps are irrational
    numbers that no short fraction comes near, so that no short run of cases clusters.
    """
    steps = np.array([(math.sqrt(5) - 1) / 2, math.sqrt(2) - 1, math.sqrt(3) - 1])
    plain, many, size = (np.random.default_rng(seed).random(3) + index * steps) % 1
    return _Kind(
        enhances=bool(plain >= 0.2),
        n_foci=1 if many >= 0.25 else 2 if many >= 0.1 else 3,
        whole_ml=math.exp(math.log(12.0) + size * math.log(140.0 / 12.0)),
    )


def _draw_tumour(rng: np.random.Generator, head: _Head, kind: _Kind) -> _TumourPlan:
    core_share = rng.uniform(0.18, 0.65) if kind.enhances else rng.uniform(0.3, 0.75)
    core_ml = kind.whole_ml * core_share
    return _TumourPlan(
        foci=_draw_foci(rng, head, core_ml, kind.n_foci),
        core_ml=core_ml,
        oedema_ml=kind.whole_ml - core_ml,
        rim_share=float(rng.uniform(0.15, 0.55)) if kind.enhances else 0.0,
        mass_effect=float(rng.uniform(0.1, 0.4)),
        contour=(_Field.draw(rng, 15.0), _Field.draw(rng, 6.0)),
        rim=(_Field.draw(rng, 6.0), _Field.draw(rng, 12.0), _Field.draw(rng, 5.0)),
        permeability=_Field.draw(rng, 12.0),
        core_softness_mm=float(rng.uniform(0.3, 0.8)),
        oedema_softness_mm=float(rng.uniform(1.0, 3.0)),
    )


def _draw_foci(rng: np.random.Generator, head: _Head, core_ml: float, n_foci: int) -> tuple[_Focus, ...]:
    """Foci in cerebral white matter, apart from one another, whose balls add up to the core's volume."""
    candidates_mm = _possible_centres(head)
    shares = rng.uniform(0.35, 1.0, n_foci)
    radii_mm = np.cbrt(shares / shares.sum() * core_ml * 1000 * 3 / (4 * math.pi))
    centres_mm = [candidates_mm[rng.integers(len(candidates_mm))]]
    for radius_mm in radii_mm[1:]:
        tries = candidates_mm[rng.integers(len(candidates_mm), size=64)]
        gaps = [np.linalg.norm(tries - c, axis=1) - r for c, r in zip(centres_mm, radii_mm, strict=False)]
        gap_mm = np.min(gaps, axis=0) - radius_mm
        # The nearest place with a clear gap: foci of one glioma are seldom at opposite ends of the brain.
        centres_mm.append(tries[np.argmin(np.where(gap_mm > 10, gap_mm, 1000 - gap_mm))])
    return tuple(
        _Focus(centre_mm=c, radius_mm=float(r), stretch=_draw_stretch(rng))
        for c, r in zip(centres_mm, radii_mm, strict=True)
    )


def _draw_stretch(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    logs = rng.normal(0, 0.18, 3)
    turn = _rotation(rng.uniform(0, 2 * math.pi, 3))
    return turn.T @ np.diag(np.exp(logs - logs.mean())) @ turn


def _possible_centres(head: _Head) -> npt.NDArray[np.float64]:
    """Points of the growth grid in the white matter of the cerebrum, shape (N, 3) in mm."""
    grid = _Grid.of_spacing(_GROWTH_SPACING_MM)
    points_mm = _template_points(head, grid.axes_mm, None)
    white = _load_anatomy(2).at("white", points_mm)
    landmarks = _load_landmarks()
    depth_mm = landmarks.at("depth_mm", points_mm)
    x, y, z = points_mm
    brainstem_or_cerebellum = (z < -5) & (y < -15) & ((np.abs(x) < 25) | (y < -45))
    beside_ventricle = landmarks.at("ventricle", points_mm) > 0.2
    good = (white > 0.6) & (depth_mm > 9) & (z > -30) & (np.abs(x) > 8) & ~brainstem_or_cerebellum & ~beside_ventricle
    voxels = np.argwhere(good) + np.array(grid.start)
    return np.asarray(voxels * _GROWTH_SPACING_MM, dtype=np.float64)


def _core_depth_mm(plan: _TumourPlan, axes_mm: tuple[Floats, ...]) -> Floats:
    """Depth below the core's border before it is moved to enclose the volume asked for; negative outside."""
    coarse, fine = (field.on(axes_mm) for field in plan.contour)
    swelling = 1 + np.float32(0.34) * coarse + np.float32(0.14) * fine
    depth_mm = np.full(coarse.shape, -np.inf, dtype=np.float32)
    x, y, z = np.meshgrid(*axes_mm, indexing="ij", sparse=True)
    for focus in plan.foci:
        offset = (x - focus.centre_mm[0], y - focus.centre_mm[1], z - focus.centre_mm[2])
        squares = sum((row[0] * offset[0] + row[1] * offset[1] + row[2] * offset[2]) ** 2 for row in focus.stretch)
        distance_mm = np.sqrt(np.asarray(squares, dtype=np.float32))
        depth_mm = np.maximum(depth_mm, np.float32(focus.radius_mm) * swelling - distance_mm)
    return depth_mm


def _grow(plan: _TumourPlan, head: _Head) -> _Tumour:
    """Move the core's border and the oedema's reach until both have the volumes asked for."""
    grid = _Grid.of_spacing(_GROWTH_SPACING_MM)
    tissue = _sample_tissue(head, plan, grid, fine=False)
    voxel_ml = _GROWTH_SPACING_MM**3 / 1000
    open_tissue = _scatter(tissue.fluid < 0.5, tissue.inside, 0)
    depth_mm = np.where(open_tissue, _core_depth_mm(plan, grid.axes_mm), -np.inf).astype(np.float32)
    core_offset_mm = _nth_largest(depth_mm[open_tissue], plan.core_ml / voxel_ml)
    core = depth_mm > core_offset_mm
    cost = _scatter(_oedema_cost(tissue), tissue.inside, np.inf)
    cost *= np.exp(0.45 * plan.permeability.on(grid.axes_mm))
    arrival_mm = _arrival(cost, open_tissue, core)
    late_mm = arrival_mm + _scatter(_cortical_delay_mm(tissue), tissue.inside, 0)
    reach_mm = -_nth_largest(-late_mm[open_tissue & ~core], plan.oedema_ml / voxel_ml)
    return _Tumour(plan=plan, core_offset_mm=core_offset_mm, arrival_mm=arrival_mm, oedema_reach_mm=reach_mm)


def _nth_largest(values: Floats, n: float) -> float:
    rank = min(max(round(n), 1), values.size - 1)
    return float(np.partition(values, values.size - 1 - rank)[values.size - 1 - rank])


def _oedema_cost(tissue: _Tissue) -> Floats:
    """Millimetres of white matter that one millimetre of this tissue is worth."""
    return np.float32(1) / (tissue.white + np.float32(0.12) * tissue.grey + np.float32(0.02))


def _cortical_delay_mm(tissue: _Tissue) -> Floats:
    """Keeps oedema out of the cortex at a finer scale than that of the growth grid."""
    return np.float32(6.0) * (1 - tissue.white)


def _arrival(cost: Floats, open_tissue: Mask, core: Mask) -> Floats:
    """Cheapest way from the core to every voxel, by Dijkstra over the 26 neighbours; fluid bars the way."""
    from scipy import ndimage, sparse  # noqa: PLC0415 - importing this module must stay cheap
    from scipy.sparse import csgraph  # noqa: PLC0415

    number = np.full(cost.shape, -1, dtype=np.int32)
    number[open_tissue] = np.arange(np.count_nonzero(open_tissue), dtype=np.int32)
    edges = [_edges(number, cost, step) for step in np.ndindex(3, 3, 3) if step > (1, 1, 1)]
    first, second, length_mm = (np.concatenate(part) for part in zip(*edges, strict=True))
    size = np.count_nonzero(open_tissue)
    graph = sparse.csr_matrix((length_mm, (first, second)), shape=(size, size))
    found = csgraph.dijkstra(graph, directed=False, indices=number[core & open_tissue], min_only=True)
    reached = np.zeros(cost.shape, dtype=bool)
    reached[open_tissue] = np.isfinite(found)
    arrival_mm = np.zeros(cost.shape, dtype=np.float32)
    arrival_mm[reached] = found[np.isfinite(found)]
    # Elsewhere the nearest voxel's value, so that interpolation next to fluid meets no jump.
    nearest = ndimage.distance_transform_edt(~reached, return_distances=False, return_indices=True)
    return np.asarray(arrival_mm[tuple(nearest)], dtype=np.float32)


def _edges(
    number: npt.NDArray[np.int32], cost: Floats, step: tuple[int, ...]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """Pairs of open neighbours one step apart (0 to 2 per axis, 1 is none), and the cost of each pair."""
    offset = [s - 1 for s in step]
    here = tuple(slice(max(0, -o), -o if o > 0 else None) for o in offset)
    there = tuple(slice(max(0, o), o if o < 0 else None) for o in offset)
    both = (number[here] >= 0) & (number[there] >= 0)
    step_mm = _GROWTH_SPACING_MM * math.sqrt(sum(o * o for o in offset))
    length_mm = 0.5 * step_mm * (cost[here][both] + cost[there][both]).astype(np.float64)
    return number[here][both], number[there][both], length_mm


@dataclass(frozen=True, kw_only=True)
class _Lesion:
    """A tumour on a grid, as vectors over the brain's voxels."""

    codes: npt.NDArray[np.uint8]
    core: Floats
    """Share of tumour core in a voxel, soft at its border."""
    enhancing: Floats
    """Share of the core that enhances."""
    oedema: Floats
    """Strength of oedema; fades outwards and beyond the border that is labelled."""
    enhances: bool
    """Whether any of the tumour does; a core that does not looks otherwise than necrosis."""


def _place_lesion(tumour: _Tumour, tissue: _Tissue, grid: _Grid) -> _Lesion:
    plan = tumour.plan
    depth_mm = (_core_depth_mm(plan, grid.axes_mm) - np.float32(tumour.core_offset_mm))[tissue.inside]
    enhancing_mm = _enhancing_depth_mm(plan, depth_mm, tissue, grid)
    beyond_mm = _arrival_at(tumour, grid, tissue.inside) + _cortical_delay_mm(tissue) - tumour.oedema_reach_mm
    open_tissue = tissue.fluid < 0.5
    is_core = open_tissue & (depth_mm > 0)
    codes = np.where(open_tissue & (beyond_mm < 0), OEDEMA, 0).astype(np.uint8)
    codes[is_core] = NECROSIS
    codes[is_core & (enhancing_mm > 0)] = ENHANCING
    reach_mm = max(tumour.oedema_reach_mm, 6.0)
    fade = np.clip(0.7 - 0.3 * beyond_mm / reach_mm, 0, 1)
    softness_mm = np.float32(plan.core_softness_mm)
    return _Lesion(
        codes=codes,
        core=_sigmoid(depth_mm / softness_mm) * (1 - tissue.fluid),
        enhancing=_sigmoid(enhancing_mm / softness_mm),
        oedema=fade * _sigmoid(np.float32(0.7) - beyond_mm / np.float32(plan.oedema_softness_mm)) * (1 - tissue.fluid),
        enhances=plan.rim_share > 0,
    )


def _enhancing_depth_mm(plan: _TumourPlan, depth_mm: Floats, tissue: _Tissue, grid: _Grid) -> Floats:
    """Depth in the part of the core that enhances: an uneven rim with gaps, and nests; negative elsewhere."""
    if plan.rim_share == 0:
        return np.full(depth_mm.shape, -100.0, dtype=np.float32)
    thickness, gaps, nests = (field.on(grid.axes_mm)[tissue.inside] for field in plan.rim)
    mean_mm = max(plan.rim_share * max(f.radius_mm for f in plan.foci), 2.5)
    in_rim_mm = np.float32(mean_mm) * np.exp(np.float32(0.5) * thickness) - depth_mm
    in_rim_mm[gaps < -1.2] = -100.0
    in_nests_mm = np.float32(3.0) * (nests - np.float32(1.3))
    return np.asarray(np.maximum(in_rim_mm, in_nests_mm), dtype=np.float32)


def _arrival_at(tumour: _Tumour, grid: _Grid, inside: Mask) -> Floats:
    from scipy import ndimage  # noqa: PLC0415 - importing this module must stay cheap

    growth = _Grid.of_spacing(_GROWTH_SPACING_MM)
    voxels = np.argwhere(inside).T + np.array(grid.start)[:, None]
    voxels = voxels * (grid.spacing_mm / growth.spacing_mm) - np.array(growth.start)[:, None]
    return ndimage.map_coordinates(tumour.arrival_mm, voxels, order=1, output=np.float32, mode="nearest")


# Healthy look-alikes


@dataclass(frozen=True, kw_only=True)
class _Confounders:
    """What is bright but no tumour, as strengths from 0 to 1 over the brain's voxels."""

    leukoaraiosis: Floats
    """White-matter hyperintensities of age: bright on FLAIR and T2, never labelled."""
    vessels: Floats
    """Blood that takes up contrast agent: bright on T1c only, dark on T2."""


def _draw_confounders(rng: np.random.Generator, tissue: _Tissue, grid: _Grid) -> _Confounders:
    age = rng.beta(1.2, 1.5)
    patches, spots, one, other = (_Field.draw(rng, pitch).on(grid.axes_mm)[tissue.inside] for pitch in (9, 5, 9, 9))
    caps = _sigmoid(np.float32(8) * (tissue.ventricle + np.float32(0.25) * patches + np.float32(0.5 * age - 1.05)))
    spotted = _sigmoid(np.float32(6) * (np.float32(0.7) * spots + np.float32(0.5) * patches - np.float32(2.6 - age)))
    leukoaraiosis = age * np.maximum(caps, spotted * (tissue.depth_mm > 8)) * tissue.white**2
    # Two sheets, where a field is 0, meet in a line: a tube about it winds like a vessel.
    width = np.float32(0.16)
    tubes = np.exp(-(one**2 + other**2) / (2 * width**2)) * np.clip(tissue.fluid + 0.6 * (tissue.depth_mm < 12), 0, 1)
    sinus = _sigmoid(2 * (2.5 - tissue.midline_mm)) * _sigmoid(1.5 * (3.5 - tissue.depth_mm))
    plexus = tissue.fluid * (tissue.ventricle > 0.5) * _sigmoid(6 * (patches - 1.0))
    vessels = np.clip(tubes + sinus + 0.7 * plexus, 0, 1)
    return _Confounders(leukoaraiosis=leukoaraiosis.astype(np.float32), vessels=vessels.astype(np.float32))


# Scanner


def _scan(
    rng: np.random.Generator,
    noise_rng: np.random.Generator,
    tissue: _Tissue,
    *,
    lesion: _Lesion,
    confounders: _Confounders,
    grid: _Grid,
) -> dict[Contrast, npt.NDArray[np.int16]]:
    """The four contrasts over the box; scanners differ in gain, bias field, blur and noise from case to case.

    Noise alone is drawn voxel by voxel; it has its own stream, so that the rest does not depend on the spacing.
    """
    images: dict[Contrast, npt.NDArray[np.int16]] = {}
    patches = _Field.draw(rng, 7.0)
    for contrast in CONTRASTS:
        signal = _healthy_signal(rng, contrast, tissue, confounders)
        signal = _add_lesion(rng, contrast, signal, lesion, _mottle(rng, patches, grid, tissue.inside))
        signal *= np.exp(0.13 * _Field.draw(rng, 75.0).on(grid.axes_mm)[tissue.inside])
        images[contrast] = _acquire(_draw_scanner(rng, contrast), noise_rng, signal, tissue.inside, grid)
    return images


def _healthy_signal(rng: np.random.Generator, contrast: Contrast, tissue: _Tissue, confounders: _Confounders) -> Floats:
    white, grey, fluid = _TISSUES[contrast] * np.exp(rng.normal(0, (0.02, 0.04, 0.08)))
    signal = white * tissue.white + grey * tissue.grey + fluid * _open_fluid(tissue, contrast)
    signal += _DETAIL_GAIN[contrast] * tissue.detail
    if contrast == "t1c":
        signal += rng.uniform(0.5, 1.1) * confounders.vessels
    elif contrast == "t2":
        signal *= 1 - 0.4 * confounders.vessels
        signal += rng.uniform(0.2, 0.4) * confounders.leukoaraiosis
    elif contrast == "flair":
        signal += rng.uniform(0.3, 0.6) * confounders.leukoaraiosis
    return np.asarray(signal, dtype=np.float32)


def _open_fluid(tissue: _Tissue, contrast: Contrast) -> Floats:
    """Fluid as it shines on T2: less in the thin layer over the brain, which the skull stripping half removes."""
    if contrast != "t2":
        return tissue.fluid
    return tissue.fluid * np.clip(0.35 + 0.65 * tissue.depth_mm / 7, 0, 1)


def _mottle(rng: np.random.Generator, patches: _Field, grid: _Grid, inside: Mask) -> Floats:
    """Unevenness inside a tumour: patches that all contrasts share, and finer ones of each contrast's own."""
    own = _Field.draw(rng, 4.0)
    return (0.7 * patches.on(grid.axes_mm) + 0.7 * own.on(grid.axes_mm))[inside]


def _add_lesion(
    rng: np.random.Generator, contrast: Contrast, signal: Floats, lesion: _Lesion, mottle: Floats
) -> Floats:
    """Mix the tumour's tissues into the healthy signal; oedema lets the anatomy below shine through."""
    necrosis, oedema, enhancing, solid = _LESIONS[contrast] * np.exp(rng.normal(0, 0.08, 4))
    inner = necrosis if lesion.enhances else solid
    swollen = signal + 0.85 * lesion.oedema * (oedema * (1 + 0.06 * mottle) - signal)
    core = inner * (1 + 0.13 * mottle) * (1 - lesion.enhancing) + enhancing * (1 + 0.15 * mottle) * lesion.enhancing
    return np.asarray(swollen + 0.93 * lesion.core * (core - swollen), dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class _Scanner:
    """How one contrast of one case was acquired."""

    gain: float
    """Stored number of a signal of 1."""
    blur_mm: tuple[float, float, float]
    noise: float
    """Spread of the thermal noise, as a signal."""
    surroundings: float
    """Signal outside the brain while the scanner blurred; it was cut away later."""


def _draw_scanner(rng: np.random.Generator, contrast: Contrast) -> _Scanner:
    plane_mm, slice_mm = (mm * rng.uniform(0.8, 1.4) for mm in _BLUR_MM[contrast])
    return _Scanner(
        gain=math.exp(rng.uniform(math.log(180.0), math.log(1600.0))),
        blur_mm=(plane_mm, plane_mm, slice_mm),
        noise=float(rng.uniform(0.012, 0.035)),
        surroundings=0.5 * _TISSUES[contrast][2],
    )


def _acquire(
    scanner: _Scanner, noise_rng: np.random.Generator, signal: Floats, inside: Mask, grid: _Grid
) -> npt.NDArray[np.int16]:
    """Blur, Rician noise, gain and rounding; 0 outside the brain, at least 1 inside."""
    from scipy import ndimage  # noqa: PLC0415 - importing this module must stay cheap

    texture, real, imaginary = noise_rng.standard_normal((3, signal.size), dtype=np.float32)
    volume = _scatter(signal + np.float32(0.03) * texture, inside, scanner.surroundings)
    sigmas = [mm / grid.spacing_mm for mm in scanner.blur_mm]
    blurred = ndimage.gaussian_filter(volume, sigmas, truncate=3.0)[inside]
    noise = np.float32(scanner.noise)
    counts = np.float32(scanner.gain) * np.hypot(blurred + noise * real, noise * imaginary)
    return _scatter(np.clip(np.rint(counts), 1, 32767).astype(np.int16), inside, 0)
