"""Hooks of mkdocs: they add generated pages and pages of the repository's root, and put every page into the nav.

Anything public without documentation fails the build (reference.py defines what counts).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import reference  # noqa: E402 - it is in this folder, which mkdocs does not search

from app.schemas import RECORDS, json_schema  # noqa: E402

#: Files of the repository's root that become pages of the site.
FROM_ROOT = {
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
}

#: Section of each folder, where pages that mkdocs.yml does not name come last.
SECTIONS = {"how-to": "How-to", "reference": "Reference", "explanation": "Explanation"}


def on_config(config: Any) -> Any:
    """Add pages that the nav does not name to it; reject a page that belongs to no section."""
    named = set(_named(config.nav))
    for path in sorted((ROOT / "docs").rglob("*.md")):
        page = path.relative_to(ROOT / "docs").as_posix()
        if page in named:
            continue
        section = SECTIONS.get(page.partition("/")[0])
        if section is None:
            raise PluginError(f"docs/{page}: add it to nav in mkdocs.yml, or move it to a folder of {sorted(SECTIONS)}")
        next(entry[section] for entry in config.nav if section in entry).append(page)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and JSON Schemas that are generated from the code, and the pages of the repository's root."""
    made = reference.pages()
    undocumented = reference.undocumented(made.values())
    if undocumented:
        raise PluginError("without documentation:\n  " + "\n  ".join(undocumented))
    for path, page in made.items():
        files.append(File.generated(config, path, content=page.text))
    for name in RECORDS:
        schema = json.dumps(json_schema(name), indent=1)
        files.append(File.generated(config, f"reference/{name}.schema.json", content=schema))
    for name, path in FROM_ROOT.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, path, content=re.sub(r"\]\(([^)#]+)", _link_of_site, text)))
    return files


def _link_of_site(link: re.Match[str]) -> str:
    """Convert a link in a file of the root to a link of the site."""
    target = link[1].removeprefix("docs/")
    return f"]({FROM_ROOT.get(target, target)}"


def _named(nav: Any) -> list[str]:
    """The pages of a nav, at any depth."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in _named(part)]
