"""Label numbers and regions: the only place where a BraTS label number is written down.

Inside the program a label map uses the codes of :data:`NECROSIS`, :data:`OEDEMA` and :data:`ENHANCING`; files use
whatever their :class:`LabelConvention` says. Sources: the BraTS 2018 and 2019 task pages (upenn.edu) and the scoring
scripts of BraTS 2023 (rachitsaluja/BraTS-2023-Metrics, metrics.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from data.errors import DataError

Contrast = Literal["t1", "t1c", "t2", "flair"]
Region = Literal["WT", "TC", "ET"]

#: The project's channel order, everywhere.
CONTRASTS: Final[tuple[Contrast, ...]] = ("t1", "t1c", "t2", "flair")
#: The project's region order, everywhere: whole tumour, tumour core, enhancing tumour.
REGIONS: Final[tuple[Region, ...]] = ("WT", "TC", "ET")

#: Codes used inside the program, whatever the file says.
BACKGROUND: Final = 0
NECROSIS: Final = 1
OEDEMA: Final = 2
ENHANCING: Final = 3

_REGION_CODES: Final[dict[Region, tuple[int, ...]]] = {
    "WT": (NECROSIS, OEDEMA, ENHANCING),
    "TC": (NECROSIS, ENHANCING),
    "ET": (ENHANCING,),
}


@dataclass(frozen=True, kw_only=True)
class LabelConvention:
    """The numbers one family of data sets writes into its label maps."""

    name: str
    """Name used on the command line, e.g. ``brats2021``."""
    necrosis: int
    """Necrotic (and non-enhancing) core."""
    oedema: int
    """Oedema / invaded tissue."""
    enhancing: int
    """Enhancing tumour."""

    @property
    def values(self) -> tuple[int, ...]:
        """The numbers of the three tissues, in the order of the program's own codes 1, 2, 3."""
        return (self.necrosis, self.oedema, self.enhancing)


BRATS2021: Final = LabelConvention(name="brats2021", necrosis=1, oedema=2, enhancing=4)
BRATS2023: Final = LabelConvention(name="brats2023", necrosis=1, oedema=2, enhancing=3)
CONVENTIONS: Final[dict[str, LabelConvention]] = {c.name: c for c in (BRATS2021, BRATS2023)}


def decide_convention(values: Iterable[int], *, naming: str | None = None) -> LabelConvention:
    """Decide the label convention from every value that a whole data set uses.

    A single case may lack enhancing tumour, so the values of all cases go in together: a 4 means BraTS 2018-2021, a 3
    means BraTS 2023. With neither, ``naming`` decides: the convention that the file names of the data set belong to.

    Args:
        values: all label values seen, 0 allowed.
        naming: name of the convention that the file names suggest, or None.

    Returns:
        the convention.

    Raises:
        DataError: values outside both conventions, or 3 and 4 together.

    Example:
        >>> decide_convention([0, 1, 2, 4]).enhancing
        4
    """
    seen = {int(v) for v in values}
    foreign = seen - {0, 1, 2, 3, 4}
    if foreign:
        raise DataError(
            f"label values {sorted(foreign)} belong to no known convention; allowed are 0, 1, 2 and 4 "
            "(BraTS 2018-2021) or 0, 1, 2 and 3 (BraTS 2023). Convert the label maps first."
        )
    if {3, 4} <= seen:
        raise DataError(
            "label values 3 and 4 occur together, so enhancing tumour cannot be told: BraTS 2018-2021 writes it as 4, "
            "BraTS 2023 as 3. Keep data sets of different years in different folders."
        )
    if 4 in seen:
        return BRATS2021
    if 3 in seen:
        return BRATS2023
    return CONVENTIONS[naming] if naming is not None else BRATS2021


def decode(label_map: npt.NDArray[np.generic], convention: LabelConvention) -> npt.NDArray[np.uint8]:
    """Translate a file's label numbers to the program's codes.

    Args:
        label_map: any shape, integer-valued (floats such as 4.0 are accepted).
        convention: what the numbers mean.

    Returns:
        uint8 array of the same shape with the codes 0 to 3.

    Raises:
        DataError: a value that is not a whole number, or not in the convention.

    Example:
        >>> decode(np.array([0, 4, 2]), BRATS2021).tolist()
        [0, 3, 2]
    """
    seen = np.unique(label_map)
    allowed = {0, *convention.values}
    foreign = [float(v) for v in seen if float(v) not in allowed]
    if foreign:
        shown = ", ".join(f"{v:g}" for v in foreign[:8])
        raise DataError(
            f"label values {shown} are not in the convention {convention.name}, which allows "
            f"{', '.join(str(v) for v in sorted(allowed))}. Convert the label map, or leave the case out."
        )
    codes = np.zeros(label_map.shape, dtype=np.uint8)
    for code, value in enumerate(convention.values, start=1):
        codes[label_map == value] = code
    return codes


def encode(codes: npt.NDArray[np.uint8], convention: LabelConvention) -> npt.NDArray[np.uint8]:
    """Translate the program's codes to a file's label numbers; the inverse of :func:`decode`.

    Example:
        >>> encode(np.array([0, 3, 2], dtype=np.uint8), BRATS2021).tolist()
        [0, 4, 2]
    """
    table = np.array([0, *convention.values], dtype=np.uint8)
    return table[codes]


def to_regions(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Region masks of a label map in the program's codes.

    Args:
        codes: shape (X, Y, Z), values 0 to 3.

    Returns:
        bool array of shape (3, X, Y, Z) in the order of :data:`REGIONS`; WT contains TC contains ET.
    """
    enhancing = codes == ENHANCING
    core = enhancing | (codes == NECROSIS)
    return np.stack([codes != BACKGROUND, core, enhancing])


def from_regions(masks: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Label map, in the program's codes, of region masks that need not be nested.

    The larger region decides: a voxel outside WT is background whatever TC and ET say, one outside TC is oedema
    whatever ET says, so that the regions of the result are nested.

    Args:
        masks: bool, shape (3, X, Y, Z), order of :data:`REGIONS`.

    Returns:
        uint8, shape (X, Y, Z); ``from_regions(to_regions(codes))`` is ``codes``.
    """
    whole, core, enhancing = masks
    codes = np.where(whole, OEDEMA, BACKGROUND).astype(np.uint8)
    codes[whole & core] = NECROSIS
    codes[whole & core & enhancing] = ENHANCING
    return codes


def region_codes(region: Region) -> tuple[int, ...]:
    """The program's codes that make up a region, e.g. (1, 3) for TC."""
    return _REGION_CODES[region]
