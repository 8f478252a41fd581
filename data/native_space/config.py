"""Settings of the preparation of scans, in a separate module so that they can be used without SimpleITK."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: Values of ``--mask`` that are not the path of a file.
MASK_WORDS: Final = ("auto", "hd-bet", "synthstrip", "mindgrab", "atlas", "none")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How scans are prepared."""

    spacing_mm: float = 1.0
    """Voxel size of the result."""
    n4: bool = False
    """Whether N4 removes the bias field of each contrast (Tustison et al., IEEE TMI 29, 2010)."""
    mask: str = "auto"
    """One of :data:`MASK_WORDS`, or the path of a mask."""
