"""Every request and every answer of the API, as strict models; the OpenAPI document is made of them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from data.labels import Contrast

Id = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
State = Literal["queued", "running", "done", "failed", "cancelled"]
UploadState = Literal["receiving", "checking", "ready", "refused"]
Priority = Literal["low", "normal", "high"]


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("contains characters that cannot be printed")
    return name


_FileName = Annotated[str, StringConstraints(min_length=1, max_length=1024), AfterValidator(_printable)]

EXAMPLE_ID = "3f0c9a5e7b1d4c2f8a6e0d9b5c7f1a23"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileToSend(_Strict):
    """A file that an upload will contain."""

    name: _FileName
    """Its name, with folders below the one that was chosen; used to recognise contrasts, never as a path."""
    bytes: Annotated[int, Field(ge=1, le=2**53)]
    """Its exact size."""
    contrast: Contrast | None = None
    """Its contrast; None to recognise it by its name."""


class UploadRequest(_Strict):
    """Announces the files of an upload: four images, one .zip, or the files of a DICOM study."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "files": [
                        {"name": f"case1_{suffix}.nii.gz", "bytes": 2_400_000}
                        for suffix in ("t1", "t1ce", "t2", "flair")
                    ]
                }
            ]
        }
    )
    files: Annotated[list[FileToSend], Field(min_length=1, max_length=20_000)]


class FolderRequest(_Strict):
    """Names a folder of images on the server, below the folder that its administrator allows."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"folder": "2026-11/case1"}]})
    folder: _FileName


class SentFile(_Answer):
    """A file of an upload."""

    number: int
    name: str
    bytes: int
    received: bool
    """Whether the whole file has arrived."""


class RecognisedCase(_Answer):
    """A case that was recognised in an upload."""

    number: int
    name: str
    contrasts: dict[str, str]
    """By contrast: the name of its file, or its DICOM series."""
    missing: list[str]
    """Contrasts that were not found."""
    problems: list[str]
    """Why the case cannot be predicted; empty if it can."""
    warnings: list[str]
    """What the images show and is probably wrong."""
    notes: list[str]
    dicom: bool


class UploadAnswer(_Answer):
    """An upload."""

    id: Id
    state: UploadState
    created: datetime
    files: list[SentFile]
    cases: list[RecognisedCase]
    message: str
    """Why it was refused."""


class PredictionOptions(_Strict):
    """Options of ``znormseg predict``."""

    prepare: bool | None = None
    """Register and resample the contrasts and remove the skull first; None does so for DICOM only."""
    space: Contrast = "t1c"
    """With ``prepare``: contrast whose grid the label map gets."""
    n4: bool = False
    """With ``prepare``: correct the bias field."""
    tta: bool = False
    """Average over mirrored images; eight times slower."""
    postprocess: bool = True
    """Apply the post-processing rules of an ensemble."""
    nan_to_zero: bool = False
    """Replace NaN and infinite voxels with 0."""
    save_probabilities: bool = False
    uncertainty: bool = False
    labels: Literal["brats2021", "brats2023", "brats2024", "brats2024-ped", "brats2015", "msd"] | None = None
    """Label convention of the output; None follows the file names or the model."""


class JobRequest(_Strict):
    """Starts a job for each case of an upload."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"upload": EXAMPLE_ID, "model": "starter", "options": {"tta": True}}]}
    )
    upload: Id
    model: Annotated[str, StringConstraints(max_length=64)] | None = None
    """Name from ``models``; None for the default."""
    options: PredictionOptions = PredictionOptions()
    priority: Priority = "normal"
    """``high`` is for administrators."""
    cases: Annotated[list[Annotated[int, Field(ge=0, le=10_000)]], Field(min_length=1, max_length=500)] | None = None
    """Numbers of the cases; None for all."""


class ResultFile(_Answer):
    """A file that can be fetched."""

    name: str
    """Last part of its address: ``/jobs/ID/results/NAME``."""
    bytes: int
    media_type: str


class JobAnswer(_Answer):
    """A job."""

    id: Id
    name: str
    """Name of the case, from the names of its files."""
    owner: str
    state: State
    priority: Priority
    model: str
    options: PredictionOptions
    place: int | None
    """Place in the queue, from 1; None unless it is queued."""
    step: str
    """What is being done, or why the job waits."""
    message: str
    """Why it failed; otherwise empty."""
    attempts: int
    created: datetime
    started: datetime | None
    ended: datetime | None
    volumes_ml: dict[str, float] | None
    flags: list[dict[str, str]] | None
    results: list[ResultFile]


class JobsAnswer(_Answer):
    """The jobs that a request made."""

    jobs: list[JobAnswer]


class JobPage(_Answer):
    """A part of the list of jobs, newest first."""

    jobs: list[JobAnswer]
    next: str | None
    """Value of ``after`` for the next part; None at the end."""


class ModelAnswer(_Answer):
    """A model that jobs may name."""

    name: str
    default: bool
    summary: str
    limits: list[str]


class ModelsAnswer(_Answer):
    """The models of this service."""

    models: list[ModelAnswer]


class HealthAnswer(_Answer):
    """Whether the process answers."""

    status: Literal["ok"]


class ReadyAnswer(_Answer):
    """Whether jobs can be computed."""

    ready: bool
    reason: str


class ProblemAnswer(_Answer):
    """Why a request was refused."""

    detail: str


def moment(seconds: float) -> datetime:
    """Return a time from the database."""
    return datetime.fromtimestamp(seconds, UTC)


def plain_options(options: PredictionOptions) -> dict[str, Any]:
    """Return options as plain data for the database."""
    return options.model_dump(mode="json")
