"""``znormseg model``: list, download, import, info, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import options, terminal
from app.cli.verbs import verb

app = typer.Typer(help="List, download, import, describe and verify models.", no_args_is_help=True)

_Model = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="Folder of a run, an ensemble, an import or an export, or a published model."),
]


@verb(app, "list", examples="znormseg model list")
def list_command() -> None:
    """List the published models that commands take by name."""
    from dataclasses import asdict

    from app.runs.published import MODELS, folder_of, is_installed

    found = {model: is_installed(model.name) for model in MODELS.values()}
    rows = [["name", "task", "installed", "download MB"]]
    rows += [
        [one.name, one.task, ("shipped" if one.ships else "yes") if here else "no", f"{one.megabytes:g}"]
        for one, here in found.items()
    ]
    sentences = [
        " ".join(
            [
                f"{one.name}: {one.summary}. Takes {one.takes}; gives {one.gives}.",
                *one.limits,
                f"Licence: {one.licence}. Cite {one.citation}.",
            ]
        )
        for one in found
    ]
    content = [
        {**asdict(one), "ships": one.ships, "installed": here, "folder": str(folder_of(one.name))}
        for one, here in found.items()
    ]
    terminal.result({"models": content}, terminal.table(rows), *sentences)


@verb(app, "download", examples="znormseg model download mindgrab\nznormseg model download monai-brats --from model.pt")
def download_command(
    *,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name from model list.")],
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Take this file, or this folder of files, instead of downloading."),
    ] = None,
) -> None:
    """Download a published model, verify it by its hash and install it.

    starter ships with the program and needs no download. Other models are in the user's data folder, or where
    ZNORMSEG_MODELS says. ZNORMSEG_MODELS_URL replaces the hosts by a mirror that serves NAME/FILE; ZNORMSEG_OFFLINE=1
    forbids downloads.
    """
    from app.exporting.install import install, published_model

    model = published_model(name)
    with terminal.watched() as on_progress:
        folder = install(model, source=source, on_progress=on_progress)
    shipped = " ships with the program, nothing to download" if model.ships else ""
    terminal.result({"model": name, "folder": str(folder)}, f"{name}{shipped}: {folder}")


@verb(app, "import", examples="znormseg model import BUNDLE OUT")
def import_(
    *,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of MONAI's brats_mri_segmentation bundle.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Model folder to create; predict accepts it like a run.")],
) -> None:
    """Import MONAI's BraTS bundle as a model, to predict without training.

    Only tensors are read from the weights; nothing is unpickled.
    """
    from app.exporting.monai_import import import_bundle

    imported = import_bundle(bundle, out)
    terminal.result(imported.to_json(), f"{imported.bundle}: {out}\nnext: znormseg predict {out} CASES OUTPUT")


@verb(app, "info", examples="znormseg model info RUN")
def info(*, model: _Model) -> None:
    """Describe a model: data, network, metrics, weights, limits, licence."""
    from app.runs.model_card import card, describe_model

    description = describe_model(options.installed_model(model))
    terminal.result(description, card(description).rstrip())


@verb(app, "verify", examples="znormseg model verify RUN")
def verify_command(*, model: _Model) -> None:
    """Verify the files of a model against its SHA256SUMS."""
    from app.runs.model_card import verify

    names = verify(options.installed_model(model))
    terminal.result({"model": str(model), "verified": list(names)}, f"{model}: {len(names)} files are unchanged")
