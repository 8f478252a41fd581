"""Digest of a contrast: its grid, a subsampled copy and a few numbers, kept after its voxels are released."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from data.background import share_of_faces
from data.nifti import Spacing, Volume, spacing_of
from data.preprocess import MAX_NONZERO_FACES

#: Statistics use every n-th voxel along each axis, so that neighbouring samples are about this far apart.
COARSE_MM: Final = 2.0
#: Smaller volumes are not subsampled.
_SMALL_VOXELS: Final = 100_000


@dataclass(frozen=True, kw_only=True)
class Digest:
    """A contrast as seen by the checks."""

    grid: Volume
    """Shape, affine and path; its voxels are zeros that use no memory."""
    coarse: npt.NDArray[np.float32]
    """Every n-th voxel along each axis, shape (X, Y, Z), C order."""
    coarse_spacing_mm: Spacing
    nonzero_faces: float
    """Share of the voxels on the volume's six faces that are not 0."""
    has_range: bool
    """Whether the non-zero voxels have different values."""
    is_empty: bool
    """Whether every voxel is 0."""
    fingerprint: bytes
    """Equal for images with equal voxels."""

    @property
    def spacing_mm(self) -> Spacing:
        """Voxel size of the file along each array axis."""
        return self.grid.spacing_mm

    @property
    def is_image(self) -> bool:
        """Whether there is a brain to judge; False if the background is not 0, since it would be taken for brain."""
        return self.has_range and not self.is_empty and not self.has_background

    @property
    def has_background(self) -> bool:
        """Whether the background is not 0."""
        return self.nonzero_faces > MAX_NONZERO_FACES


def grid_only(volume: Volume) -> Volume:
    """The volume with its voxels replaced by zeros of the same shape, which use no memory."""
    return Volume(voxels=np.broadcast_to(np.uint8(0), volume.voxels.shape), affine=volume.affine, path=volume.path)


def strides(shape: tuple[int, ...], spacing_mm: Spacing) -> tuple[int, int, int]:
    """Step along each axis for voxels about :data:`COARSE_MM` apart; 1 in small volumes.

    Example:
        >>> strides((240, 240, 155), (1.0, 1.0, 1.0)), strides((512, 512, 24), (0.5, 0.5, 6.0))
        ((2, 2, 2), (4, 4, 1))
    """
    if np.prod(shape) < _SMALL_VOXELS:
        return (1, 1, 1)
    x, y, z = (max(1, round(COARSE_MM / mm)) for mm in spacing_mm)
    return (x, y, z)


def digest(volume: Volume) -> Digest:
    """Create the digest of a contrast whose voxels are finite."""
    steps = strides(volume.voxels.shape, volume.spacing_mm)
    coarse = np.ascontiguousarray(volume.voxels[tuple(slice(None, None, step) for step in steps)])
    whole = coarse if _differ(coarse) else volume.voxels  # differences in the coarse copy exist in the volume too
    return Digest(
        grid=grid_only(volume),
        coarse=coarse,
        coarse_spacing_mm=spacing_of(volume.affine @ np.diag([*steps, 1.0])),
        nonzero_faces=share_of_faces(volume.voxels),
        has_range=_differ(whole),
        is_empty=not whole.any(),
        fingerprint=_fingerprint(coarse, volume.voxels.shape),
    )


def _differ(voxels: npt.NDArray[np.float32]) -> bool:
    """Whether the non-zero voxels have different values."""
    values = voxels[voxels != 0]
    return bool(values.size) and bool(values.max() > values.min())


def _fingerprint(coarse: npt.NDArray[np.float32], shape: tuple[int, ...]) -> bytes:
    return hashlib.blake2b(coarse.tobytes(), digest_size=16, salt=np.array(shape, dtype=np.uint32).tobytes()).digest()
