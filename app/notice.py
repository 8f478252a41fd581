"""What every output says."""

from typing import Final

#: On pages, in JSON and in the terminal; ``data.nifti`` has the same in the headers of what it writes.
NOTICE: Final = "Research use only; not a medical device."
