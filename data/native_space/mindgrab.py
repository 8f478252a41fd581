"""Find the brain with MindGrab's network: bring an image into the network's frame, and its mask back.

The network takes 256^3 voxels of 1 mm in the voxel order LIA, with intensities clipped at two quantiles and scaled to
0..1. The function that runs it is passed in, because this package does not import networks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - SimpleITK's usual alias
from scipy import ndimage

from data.errors import DataError
from data.native_space.itk import ImageGrid, grid_of, resampled, to_itk, voxels_of

#: A function that marks the brain in a volume with values from 0 to 1.
Network = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.bool_]]

#: Voxels along each axis of the network's frame.
SIDE: Final = 256
#: Quantiles of all voxels that become 0 and 1.
_QUANTILES: Final = (0.02, 0.98)
#: Margin in voxels around the given mask; a comparison computes the network's mask only within it.
_MARGIN: Final = 16


def mindgrab_mask(image: sitk.Image, network: Network, *, name: str) -> sitk.Image:
    """Mark the brain in an image: the largest connected part of the network's mask, with its holes filled.

    Args:
        image: one contrast of a head, float32, on any grid.
        network: computes the mask of a volume.
        name: name of case and contrast, for messages.

    Returns:
        uint8, 1 in the brain, on the grid of ``image``.

    Raises:
        DataError: the network marks nothing.
    """
    frame = network_frame(image)
    mask = network(scaled_intensities(voxels_of(resampled(image, frame))))
    if not mask.any():
        raise DataError(f"case {name}: MindGrab found no brain. Check the image, or choose another --mask.")
    marked = to_itk(largest_part(mask).astype(np.float32), frame.affine)
    found: sitk.Image = resampled(marked, grid_of(image)) >= 0.5
    return found


def mask_agreement(image: sitk.Image, mask: sitk.Image, network: Network) -> float:
    """Dice of a given mask and the network's mask of another contrast, computed only near the given mask.

    This saves time; the network's mask of a part of an image differs a little from that of the whole (Dice about 0.98).

    Args:
        image: another contrast of the same head.
        mask: uint8, on the same grid.
        network: as in :func:`mindgrab_mask`.
    """
    frame = network_frame(image)
    values = scaled_intensities(voxels_of(resampled(image, frame)))
    given = voxels_of(resampled(sitk.Cast(mask, sitk.sitkFloat32), frame)) >= 0.5
    found = ndimage.find_objects(given.astype(np.uint8))[0]
    box = tuple(slice(max(0, one.start - _MARGIN), one.stop + _MARGIN) for one in found)
    own, given = network(np.ascontiguousarray(values[box])), given[box]
    both, total = int(np.count_nonzero(own & given)), int(np.count_nonzero(own)) + int(np.count_nonzero(given))
    return 2 * both / max(1, total)


def network_frame(image: sitk.Image) -> ImageGrid:
    """The network's grid, centred on an image's field of view."""
    own = grid_of(image)
    centre = own.affine @ [*((np.array(own.size) - 1) / 2), 1.0]
    affine = np.eye(4)
    affine[:3, :3] = [[-1, 0, 0], [0, 0, 1], [0, -1, 0]]
    # Align the frame with the image's voxels, so that an image with voxels of 1 mm along these axes keeps them.
    affine[:3, 3] = centre[:3] - affine[:3, :3] @ np.full(3, (SIDE - 1) / 2)
    first = np.linalg.inv(own.affine) @ affine[:, 3]
    affine[:, 3] = own.affine @ np.array([*np.round(first[:3]), 1.0])
    return ImageGrid(size=(SIDE, SIDE, SIDE), affine=affine)


def scaled_intensities(voxels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scale intensities so that the 2 % quantile of all voxels is 0 and the 98 % quantile is 1, and clip the rest.

    Example:
        >>> scaled_intensities(np.array([0, 1, 3, 5], dtype=np.float32)).round(2).tolist()
        [0.0, 0.2, 0.61, 1.0]
    """
    low, high = np.quantile(voxels, _QUANTILES)
    if high <= low:
        low, high = float(voxels.min()), float(voxels.max())
    scaled = (voxels - np.float32(low)) / np.float32(max(high - low, np.finfo(np.float32).tiny))
    clipped: npt.NDArray[np.float32] = np.clip(scaled, 0, 1)
    return clipped


def largest_part(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The largest connected part of a mask, with its holes filled."""
    parts, count = ndimage.label(mask)
    if count > 1:
        mask = parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    filled: npt.NDArray[np.bool_] = ndimage.binary_fill_holes(mask)
    return filled
