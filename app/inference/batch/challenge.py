"""The BraTS convention for containers: folders ``/input`` and ``/output``, the latter with only ``<case>.nii.gz``."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.inference.batch.output_folder import make_output
from data.datasets.layouts import Case
from data.errors import DataError
from data.files import replacing

#: Folders in a container: the model, the cases, and the label maps.
MODEL: Final = Path("/model")
INPUT: Final = Path("/input")
OUTPUT: Final = Path("/output")


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """Copies label maps to another folder, each as soon as its case is done."""

    output: Path
    """Folder that receives ``<case>.nii.gz``."""

    def create_folder(self, cases: Sequence[Case]) -> None:
        """Create the folder, before anything is computed.

        Args:
            cases: the cases to predict.

        Raises:
            DataError: ``output`` is a file, or a label map would replace a file of its case.
            OSError: ``output`` cannot be written to.
        """
        make_output(self.output)
        inputs = {path.resolve(): case.id for case in cases for path in case.files}
        for case in cases:
            target = self.output / f"{case.id}.nii.gz"
            if (owner := inputs.get(target.resolve())) is not None:
                raise DataError(
                    f"case {owner}: the label map would replace its own file {target}. Give another OUTPUT."
                )
        with replacing(self.output / ".znormseg") as partial:
            partial.touch()
        (self.output / ".znormseg").unlink()

    def copy(self, label_map: Path) -> None:
        """Copy a label map; the copy appears complete or not at all.

        Raises:
            OSError: ``output`` cannot be written to.
        """
        with replacing(self.output / label_map.name) as partial:
            shutil.copyfile(label_map, partial)
