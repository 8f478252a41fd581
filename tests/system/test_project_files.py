"""Continuous integration, pre-commit and the issue forms: files that no other test checks."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
PRE_COMMIT = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))


def jobs(workflow: Path) -> dict[str, Any]:
    """The jobs of a workflow by name."""
    found: dict[str, Any] = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    return found


def steps(workflow: Path) -> list[dict[str, Any]]:
    """The steps of all its jobs."""
    return [step for job in jobs(workflow).values() for step in job["steps"]]


def test_workflows_and_issue_forms_exist() -> None:
    assert [path.name for path in WORKFLOWS] == ["nightly.yml", "test.yml"]
    assert [path.name for path in FORMS] == ["bug.yml", "idea.yml"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_by_a_commit_and_names_its_version(workflow: Path) -> None:
    lines = re.findall(r"^.*\buses:.*$", workflow.read_text(encoding="utf-8"), re.MULTILINE)
    pinned = re.compile(r" +- uses: [\w-]+/[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
    assert len(lines) == len([step for step in steps(workflow) if "uses" in step]) > 0
    assert [line for line in lines if not pinned.fullmatch(line)] == []


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_every_make_target_of_a_workflow_exists(workflow: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    asked = {name for step in steps(workflow) for name in re.findall(r"\bmake ([\w-]+)", step.get("run", ""))}
    assert asked
    assert asked <= targets


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_read_only_and_their_jobs_have_timeouts(workflow: Path) -> None:
    assert yaml.safe_load(workflow.read_text(encoding="utf-8"))["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] > 0 for job in jobs(workflow).values())


def test_the_tested_python_versions_match_the_classifiers() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    matrix = jobs(ROOT / ".github" / "workflows" / "test.yml")["test"]["strategy"]["matrix"]
    assert matrix["python"] == named
    assert project["requires-python"] == f">={named[0]}"


def test_contributing_gives_one_reason_for_each_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    _, _, table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Why each dependency")
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    named = [name for row in rows for name in row[0].removeprefix("| ").split(", ")]
    assert sorted(named) == sorted(re.split(r"[<>=[]", name)[0] for name in wanted if not name.startswith("znormseg["))
    assert all(reason.strip(" |") for _, _, reason in rows)


def test_pre_commit_uses_the_pinned_ruff() -> None:
    revisions = {repository["repo"].rpartition("/")[2]: repository["rev"] for repository in PRE_COMMIT["repos"]}
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"ruff=={revisions['ruff-pre-commit'].removeprefix('v')}" in pins


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.name)
def test_issue_forms_have_everything_github_requires(form: Path) -> None:
    content = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= content.keys()
    questions = [part for part in content["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in questions}) == len(questions) > 0
    assert all(part["attributes"]["label"] for part in questions)
