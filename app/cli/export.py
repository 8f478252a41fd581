"""``znormseg export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import terminal

EXAMPLES = """\
znormseg export RUN OUT --format onnx
znormseg export RUN OUT --format monai-bundle --case CASE"""


def export_network_command(
    *,
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a trained run, or of one network of an ensemble.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder; must be empty or not exist yet.")],
    file_format: Annotated[str, typer.Option("--format", metavar="NAME", help="openvino, onnx or monai-bundle.")],
    case: Annotated[
        Path | None,
        typer.Option("--case", help="Case folder for the comparison; default: a synthetic case."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Export a network to another format, and verify that it gives the same output.

    Both networks are compared on windows of a case. If their logits or labels differ by more than rounding, nothing
    is written; otherwise OUT/parity.json records the differences.
    """
    from app.exporting.export import FORMATS, export_run

    if file_format not in FORMATS:
        raise typer.BadParameter(f"--format takes {', '.join(FORMATS)}, got {file_format!r}")
    with terminal.watched() as on_progress:
        exported = export_run(run, out, file_format=file_format, case=case, on_progress=on_progress)
    if as_json:
        terminal.json_result(exported.to_json())
        return
    parity = exported.parity
    terminal.result(
        f"{out}: {len(exported.files)} files\n"
        f"{parity.windows} windows of {parity.source}: logits differ by at most {parity.largest_difference:.2g}, on "
        f"average {parity.mean_difference:.2g}; labels of {parity.label_disagreement:.2%} of the voxels differ"
    )
