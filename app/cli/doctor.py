"""``znormseg doctor``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from app.cli import terminal

EXAMPLES = """\
znormseg doctor
znormseg doctor --json"""


def doctor(
    *,
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FOLDER", help="Folders of data sets or runs, whose disks are checked too."),
    ] = None,
) -> None:
    """Check this machine for problems that affect training, and suggest remedies.

    Checks the GPU driver against torch, bfloat16, the available memory and processors, threads, disk and package
    versions. Each finding is ok, a note, a warning or a problem; if there is a problem, the exit code is 7.
    """
    from app.doctor.findings import examine
    from app.doctor.probe import probe
    from app.errors import EXIT_MACHINE

    findings = examine(probe(folders or ()))
    healthy = all(finding.level != "problem" for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<8} {finding.topic}: {finding.found}")
        if finding.remedy:
            lines.append(f"{'':<8} -> {finding.remedy}")
    terminal.result({"ok": healthy, "findings": [asdict(finding) for finding in findings]}, *lines)
    if not healthy:
        raise typer.Exit(EXIT_MACHINE)
