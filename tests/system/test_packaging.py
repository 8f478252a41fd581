"""The installed program: nothing in the working folder shadows its modules, and every package is shipped."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A working folder whose own modules are called as ours and raise when they are imported."""
    for module in ("data", "znorm"):
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text(f"raise RuntimeError('the wrong {module}')\n")
    (tmp_path / "models.py").write_text("raise RuntimeError('the wrong models')\n")
    return tmp_path


@pytest.mark.parametrize("command", [["znormseg"], ["python", "-m", "app"]], ids=" ".join)
def test_the_working_folder_does_not_shadow_our_packages(
    command: list[str], trap: Path, shell: Callable[..., Any]
) -> None:
    ended = shell([*command, "predict", "runs/nowhere", "cases", "out"], cwd=trap)
    assert ended.code == 3, ended.err
    assert ended.err == "znormseg: cases: does not exist\n"


def test_the_module_and_the_script_are_the_same_program(shell: Callable[..., Any], tmp_path: Path) -> None:
    assert shell(["python", "-m", "app", "--version"], cwd=tmp_path) == shell(["znormseg", "--version"], cwd=tmp_path)


def test_the_wheel_contains_only_our_four_packages() -> None:
    patterns = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    folders = [place.name for place in ROOT.iterdir() if place.is_dir()]
    matching = {name for name in folders if any(fnmatch(name, pattern) for pattern in patterns)}
    assert matching == {"znorm", "models", "data", "app"}


def test_every_python_file_is_in_a_package() -> None:
    roots = ("znorm", "models", "data", "app")
    files = [path for root in roots for path in (ROOT / root).rglob("*.py")]
    assert [path for path in files if not (path.parent / "__init__.py").exists()] == []


def test_every_file_next_to_the_code_is_package_data() -> None:
    declared = dict(PROJECT["tool"]["setuptools"]["package-data"])
    patterns = declared.pop("*")
    named = {path for package, some in declared.items() for one in some for path in (ROOT / package).glob(one)}
    roots = ("znorm", "models", "data", "app")
    files = [path for root in roots for path in (ROOT / root).rglob("*") if path.is_file()]
    others = [path for path in files if path.suffix not in (".py", ".pyc", ".so", ".md") and path not in named]
    assert [path for path in others if not any(path.match(pattern) for pattern in patterns)] == []


def test_the_shipped_weights_are_package_data(tmp_path: Path) -> None:
    (pattern,) = PROJECT["tool"]["setuptools"]["package-data"]["models"]
    weights = tmp_path / "starter" / "fold-0" / "checkpoints" / "best-000000001.safetensors"
    for path in (weights, tmp_path / "starter" / "SHA256SUMS"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert path in tmp_path.glob(pattern)
