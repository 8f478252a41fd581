"""A DICOM study as one .zip: it becomes a job whose result is also a DICOM segmentation."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydicom
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quick_run() -> Path:
    """The model that ships, in place of a run of two steps: an empty label map has no DICOM segmentation."""
    return Path(__file__).parents[3] / "models" / "starter"


@pytest.fixture
def zipped_study(phantom_study: Callable[..., Path], tmp_path: Path) -> Path:
    """A phantom as a DICOM study in an archive."""
    study, archive = phantom_study(tmp_path / "study"), tmp_path / "study.zip"
    with zipfile.ZipFile(archive, "w") as made:
        for path in study.rglob("*"):
            if path.is_file():
                made.write(path, path.relative_to(tmp_path))
    return archive


def test_a_dicom_study_becomes_a_job_with_a_dicom_segmentation(
    start_server: Callable[..., Any], zipped_study: Path
) -> None:
    server = start_server()
    announced = {"files": [{"name": zipped_study.name, "bytes": zipped_study.stat().st_size}]}
    upload = server.ask("POST", "/uploads", announced)["id"]
    server.ask("PUT", f"/uploads/{upload}/files/0", zipped_study.read_bytes())
    assert server.ask("POST", f"/uploads/{upload}/complete")["state"] == "ready"
    (made,) = server.ask("POST", "/jobs", {"upload": upload})["jobs"]
    (job,) = server.wait_until_ended([made["id"]])
    assert job["state"] == "done", server.log()
    content = server.ask("GET", f"/jobs/{job['id']}/results/dicom_seg")
    segmentation = pydicom.dcmread(io.BytesIO(content))
    assert segmentation.Modality == "SEG"
    assert segmentation.PatientID == "PID-4711"
    assert b"Mustermann" not in server.ask("GET", f"/jobs/{job['id']}/results/record")
