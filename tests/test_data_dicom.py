from __future__ import annotations
from pathlib import Path
import shutil
def test_smoke(dicom_study: Path) -> None:
    shutil.rmtree("/tmp/dcmexp/study", ignore_errors=True)
    shutil.copytree(dicom_study, "/tmp/dcmexp/study")
