"""As BraTS runs containers: the folders ``/input`` and ``/output``, and nothing but ``<case>.nii.gz`` in the latter."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from app.inference.cohort import Prediction
from data.errors import DataError
from data.layouts import Case
from data.nifti import replacing

#: Where a container has its model, the cases, and the folder for the label maps.
MODEL: Final = Path("/model")
INPUT: Final = Path("/input")
OUTPUT: Final = Path("/output")


def deliver(done: Iterable[Prediction], cases: Sequence[Case], output: Path) -> None:
    """Copy label maps to where they are wanted.

    Args:
        done: what was written, elsewhere.
        cases: what was predicted.
        output: folder, made where it is missing.

    Raises:
        DataError: ``output`` is a file, or a file of a case would be replaced.
        OSError: ``output`` cannot be written to.
    """
    if output.exists() and not output.is_dir():
        raise DataError(f"{output} is a file; give a folder for the label maps")
    inputs = {path.resolve(): case.id for case in cases for path in (*case.contrasts.values(), case.label) if path}
    output.mkdir(parents=True, exist_ok=True)
    for prediction in done:
        target = output / prediction.label_map.name
        if (owner := inputs.get(target.resolve())) is not None:
            raise DataError(f"case {owner}: the label map would replace its own file {target}. Give another OUTPUT.")
        with replacing(target) as beside:
            shutil.copyfile(prediction.label_map, beside)
