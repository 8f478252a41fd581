"""``znormseg model``: import, info, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import terminal
from app.cli.verbs import Verb, quietly

app = typer.Typer(
    name="model",
    help="Import, describe and verify models.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command(name="import", cls=Verb, epilog="znormseg model import BUNDLE OUT")
@quietly
def import_(
    *,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of MONAI's brats_mri_segmentation bundle.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Model folder to create; predict accepts it like a run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Import MONAI's BraTS bundle as a model, to predict without training.

    Only tensors are read from the weights; nothing is unpickled.
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
    """Describe a model: data, network, metrics, weights, limits, licence."""
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
    """Verify the files of a model against its SHA256SUMS."""
    from app.runs.model_card import verify as verify_sums

    names = verify_sums(model)
    if as_json:
        terminal.json_result({"model": str(model), "verified": list(names)})
    else:
        terminal.result(f"{model}: {len(names)} files, each as it was written")
