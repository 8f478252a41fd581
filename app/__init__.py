"""The application: training, inference, evaluation, reports and the command line."""

from typing import Final

#: The research-use notice in every output; ``data.nifti`` writes the same text into NIfTI headers.
NOTICE: Final = "Research use only; not a medical device."
