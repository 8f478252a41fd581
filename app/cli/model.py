"""``znormseg model``: import, info, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import terminal
from app.cli.verbs import verb

app = typer.Typer(help="Import, describe and verify models.", no_args_is_help=True)

_Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a run, an ensemble, an import or an export.")]


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

    description = describe_model(model)
    terminal.result(description, card(description).rstrip())


@verb(app, "verify", examples="znormseg model verify RUN")
def verify_command(*, model: _Model) -> None:
    """Verify the files of a model against its SHA256SUMS."""
    from app.runs.model_card import verify

    names = verify(model)
    terminal.result({"model": str(model), "verified": list(names)}, f"{model}: {len(names)} files are unchanged")
