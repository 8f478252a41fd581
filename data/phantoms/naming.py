"""File names and label numbers of BraTS, by year."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from data.labels import BRATS2021, BRATS2023, Contrast, LabelConvention

_SUFFIXES_2021: Final[dict[Contrast, str]] = {"t1": "t1", "t1c": "t1ce", "t2": "t2", "flair": "flair"}
_SUFFIXES_2023: Final[dict[Contrast, str]] = {"t1": "t1n", "t1c": "t1c", "t2": "t2w", "flair": "t2f"}


@dataclass(frozen=True, kw_only=True)
class Naming:
    """The file names and label numbers of one year of BraTS."""

    prefix: str
    visit: str
    separator: str
    suffixes: dict[Contrast, str]
    convention: LabelConvention


NAMINGS: Final[dict[int, Naming]] = {
    2021: Naming(prefix="BraTS2021_", visit="", separator="_", suffixes=_SUFFIXES_2021, convention=BRATS2021),
    2023: Naming(prefix="BraTS-GLI-", visit="-000", separator="-", suffixes=_SUFFIXES_2023, convention=BRATS2023),
}
