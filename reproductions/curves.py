"""Print the table of a reproduction's finished runs, and draw their validation curves as SVG.

    python reproductions/curves.py OUT/runs.jsonl CURVES.svg

There is one chart per network and optimiser, and one line per rule: the mean over the seeds at its chosen rate.
"""

from __future__ import annotations

import argparse
import json
from importlib import resources
from pathlib import Path

import numpy as np
from sweep import Result, Run, chosen, table

from app.html.chart import WIDTH, Chart, arm_line, draw_chart

_STYLE = """
svg { font-family: sans-serif; --soft: #57606a; --ink: #1b1f24; --rule: #d0d7de }
text { fill: var(--soft); font-size: 12px } .quantity { fill: var(--ink); font-weight: 600 }
.grid, .axis { fill: none; stroke: var(--rule) } .axis { stroke: var(--soft) } .line { fill: none; stroke-width: 2 }
"""


def draw(results: dict[Run, Result]) -> str:
    """Return an SVG picture of the curves, on white, with two charts side by side."""
    groups = chosen(results)
    rules = list(dict.fromkeys(rule for _, _, rule in groups))
    charts = []
    for network, optimizer in dict.fromkeys((network, optimizer) for network, optimizer, _ in groups):
        lines = []
        for rule in rules:
            curves = [np.array(result["curve"]) for result in groups.get((network, optimizer, rule), [])]
            if curves:
                x, y = np.mean(curves, axis=0).T
                lines.append(arm_line(rules.index(rule), rule, x, y))
        charts.append(Chart(title=f"{network}, {optimizer}", y_label=f"{network}, {optimizer}", lines=lines))
    height = charts[0].height
    placed = [
        str(draw_chart(chart)).replace(
            "<svg ", f'<svg x="{number % 2 * WIDTH}" y="{number // 2 * height}" width="{WIDTH}" height="{height}" ', 1
        )
        for number, chart in enumerate(charts)
    ]
    wide, high = min(2, len(charts)) * WIDTH, (len(charts) + 1) // 2 * height
    style = _STYLE + (resources.files("app.html") / "arms.css").read_text(encoding="utf-8").split("@media")[0]
    style += "".join(line for line in _arm_rules())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}"><style>{style}</style>'
        f'<rect width="{wide}" height="{high}" fill="#fff"/>{"".join(placed)}</svg>\n'
    )


def _arm_rules() -> list[str]:
    lines = (resources.files("app.html") / "arms.css").read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.startswith(".line.arm")]


def main(words: list[str] | None = None) -> None:
    """Read the runs, print the table and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(words)
    entries = [json.loads(line) for line in options.runs.read_text(encoding="utf-8").splitlines()]
    results = {Run(**entry["run"]): entry["result"] for entry in entries}
    columns = {"test": "test score", "steps_to_target": "steps to target", "overlap_ratio": "overlap"}
    print("\n".join(table(results, columns)))
    options.out.write_text(draw(results), encoding="utf-8")


if __name__ == "__main__":
    main()
