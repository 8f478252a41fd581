"""The research-use notice in every output."""

from typing import Final

#: Shown on pages, in JSON and in the terminal; ``data.nifti`` writes the same text into NIfTI headers.
NOTICE: Final = "Research use only; not a medical device."
