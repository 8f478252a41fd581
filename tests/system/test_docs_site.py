"""The documentation site: public names are documented, every page has its place, nothing is loaded from elsewhere."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reference() -> Any:
    """docs/site/reference.py."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "site" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(reference: Any) -> dict[str, Any]:
    return dict(reference.pages())


@pytest.fixture
def elsewhere(reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the packages that the reference is written from, to leave documentation out of."""
    for package in reference.PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    for cached in ("_tree", "_class", "_constants", "_package_of"):
        getattr(reference, cached).cache_clear()
    yield tmp_path
    for cached in ("_tree", "_class", "_constants", "_package_of"):
        getattr(reference, cached).cache_clear()


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_every_public_name_option_and_config_key_is_documented(reference: Any, pages: dict[str, Any]) -> None:
    assert reference.undocumented(pages.values()) == []


def test_an_undocumented_config_key_is_noticed(reference: Any, elsewhere: Path) -> None:
    change(elsewhere / "app/config/training.py", '    """Momentum of ``sgd``."""\n', "")
    assert reference.config().undocumented == ["training.momentum (TrainingConfig): no docstring under the field"]


def test_an_undocumented_public_function_is_noticed(reference: Any, elsewhere: Path) -> None:
    (elsewhere / "data" / "datasets" / "naming.py").write_text('"""Names."""\n\n\ndef public():\n    pass\n')
    assert reference.modules("data").undocumented == ["public (data/datasets/naming.py): no docstring"]


def test_an_option_without_help_is_noticed(reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    from app.cli import main

    program = typer.Typer()

    @program.command()
    def verb(size: int = 1) -> None:
        """Do."""

    monkeypatch.setattr(main, "app", program)
    assert "znormseg --size: no help" in reference.command_line().undocumented


def test_the_config_page_has_every_key_of_a_config(pages: dict[str, Any]) -> None:
    from app.config.load import load_config, to_plain

    def keys(content: dict[str, Any], path: str = "") -> list[str]:
        nested = [
            keys(value, f"{path}{key}.") if isinstance(value, dict) else [f"{path}{key}"]
            for key, value in content.items()
        ]
        return [key for part in nested for key in part]

    sections = dict(
        re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", pages["reference/config.md"].text, re.MULTILINE | re.DOTALL)
    )
    wanted = keys(to_plain(load_config("laptop")))
    assert [key for key in wanted if f"| `{key.rpartition('.')[2]}` |" not in sections[key.rpartition(".")[0]]] == []


def test_the_command_line_page_has_every_golden_help_text(pages: dict[str, Any]) -> None:
    verbs = [path.stem.removeprefix("help_").split("_") for path in (ROOT / "tests" / "golden").glob("help_*.txt")]
    titles = re.findall(r"^## (.*)$", pages["reference/cli.md"].text, re.MULTILINE)
    assert sorted(titles) == sorted(" ".join(["znormseg", *(w for w in verb if w != "top")]) for verb in verbs)


def test_the_examples_in_the_docstrings_hold(reference: Any) -> None:
    import doctest

    assert doctest.testmod(reference).failed == 0


def test_the_packages_of_the_site_are_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {re.split(r"[<>=]", name)[0] for name in project["optional-dependencies"]["docs"]} <= pinned


def test_the_citation_file_has_what_the_format_requires() -> None:
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"cff-version", "message", "title", "authors"} <= set(content)
    assert (content["cff-version"], content["type"]) == ("1.2.0", "software")
    program, _, weights = project["license"].partition(" AND ")
    assert (content["version"], content["license"]) == (project["version"], program)
    assert weights == "CC-BY-4.0"
    for entry in [content, *content["references"]]:
        assert entry["title"]
        assert all(author.keys() <= {"name"} or author.keys() >= {"family-names"} for author in entry["authors"])
    assert {reference["type"] for reference in content["references"]} == {"article"}


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("*.md")))
def test_links_of_the_top_level_documents_exist(name: str) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / name).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert {"index.html", "tutorial.html", "reference/cli.html", "security.html"} <= {
        page.relative_to(tmp_path / "site").as_posix() for page in pages
    }
    loaded = re.compile(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)")
    assert [(page.name, found) for page in pages for found in loaded.findall(page.read_text(encoding="utf-8"))] == []


@pytest.mark.slow
def test_a_page_outside_the_navigation_fails_the_build(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the extra docs is not installed")
    for name in ("docs", "app", "data", "models", "znorm"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.md"), ROOT / "mkdocs.yml"]:
        shutil.copy(path, tmp_path)
    (tmp_path / "docs" / "how-to" / "new.md").write_text("# New\n")
    (tmp_path / "docs" / "stray.md").write_text("# Stray\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode != 0
    assert "docs/stray.md: add it to nav" in ended.stderr
    assert "new.md" not in ended.stderr
