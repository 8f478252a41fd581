"""``znormseg model``: import, info, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import terminal
from app.cli.verbs import Verb, quietly

app = typer.Typer(
    name="model",
    help="Trained models: take one of MONAI's in, say what one is, check that nothing changed.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command(name="import", cls=Verb, epilog="znormseg model import BUNDLE OUT")
@quietly
def import_(
    *,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of MONAI's brats_mri_segmentation bundle.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make; predict takes it like a run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Make a model folder of MONAI's BraTS bundle: predict without training.

    Weights are read as tensors alone; nothing is unpickled.
    """
    from app.exporting.monai_import import import_bundle

    imported = import_bundle(bundle, out)
    if as_json:
        terminal.json_result(imported.to_json())
        return
    terminal.result(f"{imported.bundle}: {out}\nnext: znormseg predict {out} CASES OUTPUT")


@app.command(name="info", cls=Verb, epilog="znormseg model info RUN")
@quietly
def info(
    *,
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Folder of a run, an ensemble, an import or an export.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Say what a model is: data, network, metrics, weights, limits, licence."""
    from app.runs.model_card import card, describe_model

    description = describe_model(model)
    if as_json:
        terminal.json_result(description)
    else:
        terminal.result(card(description).rstrip())


@app.command(name="verify", cls=Verb, epilog="znormseg model verify RUN")
@quietly
def verify_command(
    *,
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Folder of a run, an ensemble, an import or an export.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Check that no file of a model changed since it was written, by its SHA256SUMS."""
    from app.runs.model_card import verify as verify_sums

    names = verify_sums(model)
    if as_json:
        terminal.json_result({"model": str(model), "verified": list(names)})
    else:
        terminal.result(f"{model}: {len(names)} files, each as it was written")
