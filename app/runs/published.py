"""Published models by name: where their files come from, whether they are installed, and their download.

Each file is checked against its known hash before anything reads it. ``ZNORMSEG_MODELS`` names the folder of installed
models (default: the user's data folder), ``ZNORMSEG_MODELS_URL`` a mirror that replaces all hosts and serves
``NAME/FILE``, and ``ZNORMSEG_OFFLINE=1`` forbids downloads. Proxies and certificates are those of requests
(``HTTPS_PROXY``, ``REQUESTS_CA_BUNDLE``). A model without files to download ships with the program, in the package
``models``.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from app.errors import RunError
from app.progress import LOG, OnProgress, Progress, silent
from data.files import naming_the_place

#: Timeouts for the connection and for the next bytes.
_TIMEOUT_SECONDS: Final = (15.0, 60.0)
_RETRIES: Final = 1
#: Fraction of a download between two progress reports.
_REPORT_EVERY: Final = 0.02


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """A file of a published model."""

    name: str
    url: str
    hash: str
    """``ALGORITHM:HEX``, e.g. ``sha256:24d1...``."""


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A model that can be used by its name."""

    name: str
    task: Literal["segmentation", "skull stripping"]
    summary: str
    takes: str
    gives: str
    megabytes: float
    """Size of the download; 0 for a model that ships with the program."""
    licence: str
    citation: str
    limits: tuple[str, ...] = ()
    """What a user must know before relying on it, one sentence each."""
    files: tuple[PublishedFile, ...] = ()
    """Files to download; none for a model that ships with the program."""

    @property
    def ships(self) -> bool:
        """Whether the model is part of the program, so that nothing is downloaded."""
        return not self.files


_BRAINCHOP: Final = (
    "https://raw.githubusercontent.com/neuroneural/brainchop/4c87885f3a2a8835e260d521dcec922b58d91d41/"
    "public/models/mindgrab"
)
#: All published models by name.
MODELS: Final[Mapping[str, PublishedModel]] = {
    model.name: model
    for model in (
        PublishedModel(
            name="starter",
            task="segmentation",
            summary="Four small networks of this program, trained on sixteen adult gliomas of BraTS 2021",
            takes="skull-stripped T1, T1c, T2 and FLAIR on one grid",
            gives="WT, TC, ET",
            megabytes=0,
            licence="CC BY 4.0, as its training data",
            citation="Baid et al. 2021, arXiv 2107.02314; Menze et al. 2015, 10.1109/TMI.2014.2377694; Bakas et al. "
            "2017, 10.1038/sdata.2017.117",
            limits=(
                "A weak first version: on cases that a network was not trained on, the mean Dice is 0.82 for WT and "
                "0.59 for TC; in one of sixteen it missed the tumour.",
                "Of tumours with several lesions, those below 30 % of the largest are removed, as false positives look "
                "alike; predict --no-postprocess keeps them.",
                "Trained on sixteen adult gliomas of one challenge, BraTS 2021; expect more errors on images of other "
                "scanners and hospitals.",
                "Not for children, not for scans after surgery, not for metastases or meningiomas: none were among its "
                "training cases.",
                "For research only; not a medical device.",
            ),
        ),
        PublishedModel(
            name="monai-brats",
            task="segmentation",
            summary="MONAI's SegResNet of the bundle brats_mri_segmentation, trained on BraTS 2018",
            takes="skull-stripped T1, T1c, T2 and FLAIR on one grid of 1 mm",
            gives="WT, TC, ET",
            megabytes=19,
            licence="Apache-2.0; its training data, BraTS 2018, may not be used commercially without permission",
            citation="Myronenko 2018, arXiv 1810.11654; Menze et al. 2015, 10.1109/TMI.2014.2377694",
            limits=(
                "Trained on adult gliomas before surgery, of BraTS 2018; not for children, scans after surgery, "
                "metastases or meningiomas.",
                "For research only; not a medical device.",
            ),
            files=(
                PublishedFile(
                    name="model.pt",
                    url="https://developer.download.nvidia.com/assets/Clara/monai/tutorials/model_zoo/"
                    "model_brats_mri_segmentation.pt",
                    hash="md5:870e677b782a5184cbc48db1456b78e8",
                ),
            ),
        ),
        PublishedModel(
            name="mindgrab",
            task="skull stripping",
            summary="MindGrab, a MeshNet that marks the brain in MRI of any contrast",
            takes="one head MRI of any contrast",
            gives="a brain mask",
            megabytes=0.65,
            licence="MIT",
            citation="neuroneural/brainchop",
            files=(
                PublishedFile(
                    name="model.json",
                    url=f"{_BRAINCHOP}/model.json",
                    hash="sha256:24d1bcccba736a83c80b336ca349297f4839ae08b8ec92ec72c5d6adb9afe76e",
                ),
                PublishedFile(
                    name="model.bin",
                    url=f"{_BRAINCHOP}/model.bin",
                    hash="sha256:c9a01490fe2d13acc1515fd019b69db176ebe6f40c9b84aeb77f25acbc2ee0f3",
                ),
            ),
        ),
    )
}


def models_folder() -> Path:
    """Return the folder of installed models: ``ZNORMSEG_MODELS`` or, if not set, one in the user's data folder."""
    if folder := os.environ.get("ZNORMSEG_MODELS"):
        return Path(folder)
    import platformdirs

    return platformdirs.user_data_path("znormseg") / "models"


def folder_of(name: str) -> Path:
    """Return the folder of a published model, which exists only if the model is installed."""
    model = MODELS.get(name)
    return (shipped_folder() if model is not None and model.ships else models_folder()) / name


def shipped_folder() -> Path:
    """Return the folder of the models that ship with the program, which is that of the package ``models``.

    ``importlib.resources`` would import the package and thereby torch, which prediction can do without.
    """
    found = importlib.util.find_spec("models")
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0])


def is_installed(name: str) -> bool:
    """Whether a published model is installed. Folders appear complete or not at all."""
    return folder_of(name).is_dir()


def is_published(path: Path, file: PublishedFile) -> bool:
    """Whether a file exists and has the known hash."""
    import pooch

    return path.is_file() and bool(pooch.hashes.hash_matches(path, file.hash))


def download(
    model: PublishedModel,
    install: Callable[[Path, Path], None],
    *,
    source: Path | None = None,
    on_progress: OnProgress = silent,
) -> Path:
    """Download a model's files, verify them and install them; do nothing if the model is installed.

    Two processes may do this at once: each works in a temporary folder, and the first to finish wins.

    Args:
        model: one of :data:`MODELS` that has files.
        install: called with the folder of the verified files and the folder to fill.
        source: a file, or a folder with the files, to take instead of downloading.
        on_progress: receives progress reports of each file.

    Returns:
        the folder of the model.

    Raises:
        RunError: a file cannot be downloaded or found, or is not the published one; nothing is installed.
        OSError: the folder of models cannot be written to.
    """
    out = folder_of(model.name)
    if out.is_dir():
        return out
    if source is None and os.environ.get("ZNORMSEG_OFFLINE", "0") not in ("", "0"):
        raise RunError(
            f"{model.name}: not installed, and ZNORMSEG_OFFLINE forbids downloads. Where there is a network: "
            f"ZNORMSEG_MODELS=FOLDER znormseg model download {model.name}; then copy FOLDER/{model.name} to {out}."
        )
    with _temporary_folder(out.parent) as work:
        for file in model.files:
            if source is None:
                _fetch(model, file, work, on_progress)
            else:
                _copy(model, file, source, work)
        complete = work / "complete"
        install(work, complete)
        try:
            complete.rename(out)
        except OSError:
            if not out.is_dir():  # otherwise another process has installed it in the meantime
                raise
    return out


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    with naming_the_place(parent):
        parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
    try:
        with naming_the_place(parent):
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fetch(model: PublishedModel, file: PublishedFile, folder: Path, on_progress: OnProgress) -> None:
    """Download one file into a folder and verify its hash."""
    import pooch
    import requests

    mirror = os.environ.get("ZNORMSEG_MODELS_URL")
    url = f"{mirror.rstrip('/')}/{model.name}/{file.name}" if mirror else file.url
    LOG.info("downloading %s (%g MB, %s) from %s", model.name, model.megabytes, model.licence, url)
    bar = _ProgressBar(f"downloading {model.name}", file.name, on_progress)
    loader = pooch.HTTPDownloader(progressbar=bar, timeout=_TIMEOUT_SECONDS)
    # pooch would log each file too, with less detail than the line above.
    pooch.get_logger().setLevel("ERROR")
    try:
        pooch.create(
            path=folder,
            base_url="",
            registry={file.name: file.hash},
            urls={file.name: url},
            retry_if_failed=_RETRIES,
        ).fetch(file.name, downloader=loader)
    except (requests.RequestException, ValueError) as error:
        wrong = isinstance(error, ValueError) and not isinstance(error, requests.RequestException)
        reason = "the downloaded file is not the published one: its hash differs" if wrong else _reason(error)
        raise RunError(
            f"{model.name}: {url} could not be downloaded ({reason}). Try again, set ZNORMSEG_MODELS_URL to a mirror, "
            f"or download the file elsewhere and run: znormseg model download {model.name} --from FILE"
        ) from error


def _copy(model: PublishedModel, file: PublishedFile, source: Path, folder: Path) -> None:
    """Copy one file that the user has downloaded, and verify its hash."""
    path = source / file.name if source.is_dir() else source
    if not source.is_dir() and len(model.files) > 1:
        names = " and ".join(one.name for one in model.files)
        raise RunError(f"--from {source}: {model.name} consists of {names}; give the folder that contains them")
    if not path.is_file():
        raise RunError(f"--from {source}: {path} does not exist; it is published at {file.url}")
    shutil.copyfile(path, folder / file.name)
    if not is_published(folder / file.name, file):
        raise RunError(f"--from {source}: {path} is not the published file (its {file.hash.partition(':')[0]} differs)")


def _reason(error: Any) -> str:
    """Return why a request failed, in a few words."""
    import requests
    from requests import exceptions

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answered {error.response.status_code} {error.response.reason}"
    reasons = {
        exceptions.Timeout: "the server did not answer in time",
        exceptions.SSLError: "its certificate is not trusted; REQUESTS_CA_BUNDLE names a file of trusted certificates",
        exceptions.ProxyError: "the proxy could not be reached",
        exceptions.ChunkedEncodingError: "the connection was cut",
        exceptions.ConnectionError: "no connection",
    }
    return next((reason for kind, reason in reasons.items() if isinstance(error, kind)), type(error).__name__)


class _ProgressBar:
    """Forwards pooch's progress; has the interface of tqdm's progress bar."""

    def __init__(self, job: str, name: str, on_progress: OnProgress) -> None:
        self.total = 0
        self._job, self._name, self._on_progress = job, name, on_progress
        self._bytes, self._reported = 0, -1.0

    def update(self, count: int) -> None:
        """Add received bytes."""
        self._bytes += count
        share = min(1.0, self._bytes / self.total) if self.total else 0.0
        if share >= self._reported + _REPORT_EVERY or share == 1.0 != self._reported:
            self._reported = share
            self._on_progress(Progress(job=self._job, share=share, detail=f"{self._name}, {self._bytes / 1e6:.1f} MB"))

    def reset(self) -> None:
        """Start counting again; pooch does this before it reports the end."""
        self._bytes = 0

    def close(self) -> None:
        """Do nothing; pooch calls it at the end."""
