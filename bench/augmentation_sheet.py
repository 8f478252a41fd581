"""Draw every augmentation of one phantom as a picture: one row each, the original on the left, then three draws.

    python bench/augmentation_sheet.py docs/images/augmentation.png

Each tile shows FLAIR in the axial slice with the most tumour, and the tumour's outline. Strengths are those of resunet,
or the defaults for augmentations that resunet leaves out. The rows are those of docs/how-to/augmentation.md.
"""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from app.config.load import load_config
from app.html.overlay import OUTLINE_COLOURS
from app.html.planes import PLANES, largest_slice
from data.labels import CONTRASTS
from data.patches.augmentation import AugmentConfig, apply_augmentation, draw_augmentation
from data.phantoms import make_phantom
from data.preprocess import smallest_box, zscore_nonzero

#: For each row, the probability that is set to 1 while all others are 0.
ROWS: Final = (
    "flip_probability",
    "affine_probability",
    "rotation_probability",
    "scaling_probability",
    "gain_probability",
    "shift_probability",
    "stretch_probability",
    "gamma_probability",
    "range_gamma_probability",
    "inverted_gamma_probability",
    "bias_field_probability",
    "blur_probability",
    "low_resolution_probability",
    "noise_probability",
)
DRAWS: Final = 3
SPACING_MM: Final = 2.0
#: Picture pixels per voxel edge.
ZOOM: Final = 2
GAP_PX: Final = 3
#: Intensities shown as black and white, in standard deviations of the brain.
WINDOW: Final = (-3.0, 3.5)

Picture = npt.NDArray[np.uint8]


def main(path: Path) -> None:
    """Write the sheet."""
    image, codes = patch()
    config = replace(load_config("resunet").augment, scale=AugmentConfig().scale, shift=AugmentConfig().shift)
    rows = []
    for row in ROWS:
        variations = [
            draw_augmentation(only(config, row), len(CONTRASTS), np.random.default_rng([7, n])) for n in range(DRAWS)
        ]
        varied = [(image, codes), *(apply_augmentation(variation, image, codes) for variation in variations)]
        rows.append(in_a_row([tile(*one) for one in varied]))
    sheet = np.concatenate([line for row in rows for line in (row, gap(row))][:-1])
    Image.fromarray(sheet).save(path, format="PNG", optimize=True)


def patch() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Return the brain of a phantom as a network sees it, with a margin."""
    phantom = make_phantom(0, spacing_mm=SPACING_MM)
    image = np.stack([phantom.images[contrast] for contrast in CONTRASTS]).astype(np.float32)
    box = smallest_box((image != 0).any(axis=0))
    image = np.stack([zscore_nonzero(contrast[box]) for contrast in image])
    margin = ((4, 4),) * 3
    return np.pad(image, ((0, 0), *margin)), np.pad(phantom.codes[box], margin)


def only(config: AugmentConfig, wanted: str) -> AugmentConfig:
    """Set all probabilities to 0 except one, which becomes 1 (0.5 for mirroring, which is drawn for each axis)."""
    off = {field.name: 0.0 for field in fields(config) if field.name.endswith("_probability")}
    return replace(config, **{**off, wanted: 0.5 if wanted == "flip_probability" else 1.0})


def tile(image: npt.NDArray[np.float32], codes: npt.NDArray[np.uint8]) -> Picture:
    """Draw one slice in grey with the tumour outlined; x points to the right, y down."""
    index = largest_slice(codes > 0, PLANES[0])
    values, tumour = image[CONTRASTS.index("flair"), :, :, index], codes[:, :, index] > 0
    low, high = WINDOW
    grey = np.where(values == 0, 0, np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    picture = np.repeat(grey[..., None], 3, axis=2)
    picture[tumour & ~ndimage.binary_erosion(tumour)] = OUTLINE_COLOURS["WT"]
    return picture.transpose(1, 0, 2).repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)


def in_a_row(tiles: list[Picture]) -> Picture:
    """Join tiles into a row, with gaps between them."""
    space = np.full((tiles[0].shape[0], GAP_PX, 3), 255, np.uint8)
    return np.concatenate([part for one in tiles for part in (one, space)][:-1], axis=1)


def gap(row: Picture) -> Picture:
    """Return the white gap below a row."""
    return np.full((GAP_PX, row.shape[1], 3), 255, np.uint8)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
