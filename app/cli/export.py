"""``znormseg export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from app.cli import options, terminal

EXAMPLES = """\
znormseg export RUN OUT --format onnx
znormseg export RUN OUT --format monai-bundle --case CASE"""


def export_network_command(
    *,
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a trained run, or of one network of an ensemble.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder; must be empty or not exist yet.")],
    file_format: Annotated[
        Literal["openvino", "onnx", "monai-bundle"], typer.Option("--format", help="Format of the exported network.")
    ],
    case: Annotated[
        Path | None, typer.Option(help="Case folder for the comparison; default: a synthetic case.")
    ] = None,
) -> None:
    """Export a network to another format, and verify that it gives the same output.

    Both networks are compared on windows of a case. If their logits or labels differ by more than rounding, nothing
    is written; otherwise OUT/parity.json records the differences.
    """
    from app.exporting.export import export_run

    run = options.installed_model(run)
    with terminal.watched() as on_progress:
        exported = export_run(run, out, file_format=file_format, case=case, on_progress=on_progress)
    parity = exported.parity
    terminal.result(
        exported.to_json(),
        f"{out}: {len(exported.files)} files",
        f"{parity.windows} windows of {parity.source}: logits differ by at most {parity.largest_difference:.2g}, on "
        f"average {parity.mean_difference:.2g}; labels of {parity.label_disagreement:.2%} of the voxels differ",
    )
