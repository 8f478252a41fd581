"""Validate the arguments of the phantom functions."""

from __future__ import annotations

from data.errors import DataError
from data.phantoms.naming import NAMINGS


def check_arguments(*, index: int = 0, seed: int = 0, spacing_mm: float = 2.0, year: int = 2021) -> None:
    """Raise a DataError that states the allowed range if an argument is out of range."""
    if not 0 <= index <= 99_999:
        raise DataError(f"case index is {index}; allowed are 0 to 99999, because names carry five digits.")
    if seed < 0:
        raise DataError(f"seed is {seed}; allowed is 0 or more. Choose a whole number that is not negative.")
    if not 0.5 <= spacing_mm <= 8.0:
        raise DataError(f"spacing_mm is {spacing_mm:g}; allowed are 0.5 to 8 mm. Choose a spacing in that range.")
    if year not in NAMINGS:
        raise DataError(f"year is {year}; allowed are 2021 and 2023. Choose one of these naming schemes.")
