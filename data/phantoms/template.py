"""Maps of the MNI152 brain, and landmarks derived from them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from data.phantoms.grids import Floats


@dataclass(frozen=True, kw_only=True)
class _Anatomy:
    """Maps of the MNI152 brain, each of shape (X, Y, Z), with their position."""

    maps: dict[str, Floats]
    spacing_mm: float
    origin_mm: tuple[float, float, float]

    def at(self, name: str, points_mm: Floats) -> Floats:
        """Interpolate a map linearly at points in MNI space, shape (3, ...)."""
        from scipy import ndimage

        origin = np.array(self.origin_mm, dtype=np.float32).reshape(3, *[1] * (points_mm.ndim - 1))
        voxels = (points_mm - origin) / np.float32(self.spacing_mm)
        return ndimage.map_coordinates(self.maps[name], voxels, order=1, output=np.float32, mode="constant")


@functools.cache
def load_anatomy(spacing_mm: int) -> _Anatomy:
    """Tissue fractions, brain mask, and the detail of the T1 template that they do not explain."""
    from nilearn import datasets  # type: ignore[import-untyped]

    template = datasets.load_mni152_template(resolution=spacing_mm)
    t1 = np.asarray(template.dataobj, dtype=np.float32)
    grey = np.asarray(datasets.load_mni152_gm_template(resolution=spacing_mm).dataobj, dtype=np.float32)
    white = np.asarray(datasets.load_mni152_wm_template(resolution=spacing_mm).dataobj, dtype=np.float32)
    brain = np.asarray(datasets.load_mni152_brain_mask(resolution=spacing_mm).dataobj, dtype=np.float32)
    fluid = np.clip(1 - grey - white, 0, 1)
    # 0.87, 0.65 and 0.28 are the template's mean values in voxels filled by a single tissue.
    detail = np.where(brain > 0, t1 - 0.87 * white - 0.65 * grey - 0.28 * fluid, 0).astype(np.float32)
    maps = {"grey": grey, "white": white, "brain": brain, "detail": np.clip(detail, -0.15, 0.15)}
    x_mm, y_mm, z_mm = template.affine[:3, 3].tolist()
    return _Anatomy(maps=maps, spacing_mm=float(spacing_mm), origin_mm=(x_mm, y_mm, z_mm))


@functools.cache
def load_landmarks() -> _Anatomy:
    """Depth below the brain's surface in mm, and proximity to the ventricles from 0 to 1."""
    from scipy import ndimage

    anatomy = load_anatomy(2)
    brain = anatomy.maps["brain"] > 0
    depth_mm = ndimage.distance_transform_edt(brain, sampling=anatomy.spacing_mm).astype(np.float32)
    fluid = brain * (1 - anatomy.maps["grey"] - anatomy.maps["white"])
    ventricles = ((fluid > 0.7) & (depth_mm > 28)).astype(np.float32)
    near = ndimage.gaussian_filter(ventricles, 3.5 / anatomy.spacing_mm) * 2.5
    maps = {"depth_mm": depth_mm, "ventricle": np.clip(near, 0, 1).astype(np.float32)}
    return _Anatomy(maps=maps, spacing_mm=anatomy.spacing_mm, origin_mm=anatomy.origin_mm)
