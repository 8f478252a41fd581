"""Install published models: download, verify and convert them, so that commands can take them by name."""

from __future__ import annotations

from pathlib import Path

from app.errors import RunError
from app.progress import OnProgress, silent
from app.runs.published import MODELS, PublishedModel, download, folder_of, is_installed


def model_folder(run: Path, on_progress: OnProgress = silent) -> Path:
    """Return the folder that a command's RUN stands for: a path, or the name of a published model.

    An existing path takes precedence. A published model that is not installed is downloaded, unless it ships with the
    program.

    Args:
        run: the argument as the user gave it.
        on_progress: receives progress reports of a download.

    Raises:
        RunError: the model cannot be downloaded, is missing from the program, or does not segment tumours; or ``run``
            is a single word that is neither a folder nor such a name.
        OSError: the folder of models cannot be written to.
    """
    model = MODELS.get(str(run))
    if run.exists() or (model is None and len(run.parts) > 1):
        return run
    if model is None:
        raise RunError(
            f"{run}: does not exist, and no published model has this name; give the folder of a run, or a name from "
            "znormseg model list"
        )
    if model.task != "segmentation":
        raise RunError(f"{model.name}: a model for {model.task}, not for segmentation; see znormseg model list")
    return install(model, on_progress=on_progress)


def published_model(name: str) -> PublishedModel:
    """Return a published model by name.

    Raises:
        RunError: no published model has this name.
    """
    if name not in MODELS:
        raise RunError(f"{name}: no published model has this name; available: {', '.join(MODELS)}")
    return MODELS[name]


def install(model: PublishedModel, *, source: Path | None = None, on_progress: OnProgress = silent) -> Path:
    """Install a published model unless it is already installed, and return its folder.

    Args:
        model: one of :data:`app.runs.published.MODELS`.
        source: its file, or a folder with its files, to use instead of downloading them.
        on_progress: receives progress reports.

    Raises:
        RunError: as raised by :func:`app.runs.published.download`; or the model ships with the program, but is missing
            from it, or ``source`` is given for it.
        OSError: as raised by :func:`app.runs.published.download`.
    """
    if model.ships:
        return _shipped(model, source)

    def convert(verified: Path, out: Path) -> None:
        if model.task == "segmentation":
            from app.exporting.monai_import import import_published

            import_published(verified / "model.pt", model, out)
            return
        out.mkdir()
        for file in model.files:
            (verified / file.name).rename(out / file.name)

    return download(model, convert, source=source, on_progress=on_progress)


def _shipped(model: PublishedModel, source: Path | None) -> Path:
    """Return the folder of a model that ships with the program.

    Raises:
        RunError: it is missing, or ``source`` is given.
    """
    if source is not None:
        raise RunError(f"--from {source}: {model.name} ships with the program and is not installed from files")
    if not is_installed(model.name):
        raise RunError(
            f"{model.name}: ships with the program, but its weights are missing here: {folder_of(model.name)} does not "
            f"exist. Install a release, or train them in a source checkout: make {model.name} CASES=FOLDER"
        )
    return folder_of(model.name)
