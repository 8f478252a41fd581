"""Checks of Dockerfile and docker/ that need no engine; `make image-test` builds and runs the image."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
FINAL_STAGES = {
    target: re.search(rf"^FROM \S+ AS {target}$.*?(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)[0]  # type: ignore[index]
    for target in ("gpu", "cpu")
}
SCRIPTS = sorted((ROOT / "docker").glob("*.sh"))
HANDED_TO_THE_BUILD = ("PIP_CERT", "PIP_INDEX_URL", "PIP_FIND_LINKS", "TORCH_INDEX", "ZNORMSEG_MODELS_URL")


@pytest.fixture
def without_engines(tmp_path: Path) -> dict[str, str]:
    """Environment whose PATH has what the scripts need, and neither docker nor buildah nor podman."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "dirname", "id", "mktemp", "rm", "tail", "mkdir", "cp", "chmod"):
        found = shutil.which(name)
        assert found, name
        (folder / name).symlink_to(found)
    return {"PATH": str(folder), "TMPDIR": str(tmp_path)}


def run(script: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "docker" / script], env=environment, text=True, capture_output=True, timeout=60, check=False
    )


def test_every_package_of_the_wheel_is_copied() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    for package in {pattern.removesuffix(".*") for pattern in setuptools["packages"]["find"]["include"]}:
        assert f"COPY {package} ./{package}\n" in DOCKERFILE


def test_copied_files_exist_and_nothing_else_is_sent_to_the_engine() -> None:
    lines = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    copied = {name for line in lines for name in line.split()}
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)


def test_no_version_is_pinned_twice() -> None:
    pinned = [
        re.findall(r"^(\S+)==\S+$", (ROOT / name).read_text(encoding="utf-8").lower(), re.MULTILINE)
        for name in ("constraints.txt", "docker/constraints.txt")
    ]
    assert not set(pinned[0]) & set(pinned[1])


def test_the_gpu_base_is_pinned_by_digest() -> None:
    assert re.search(r"^ARG GPU_BASE=\S+:\S+@sha256:[0-9a-f]{64}$", DOCKERFILE, re.MULTILINE)


def test_without_a_target_the_gpu_image_is_built() -> None:
    assert re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE)[-1] == "gpu"


@pytest.mark.parametrize("stage", FINAL_STAGES.values(), ids=FINAL_STAGES)
def test_the_image_runs_znormseg_as_an_ordinary_user_outside_app(stage: str) -> None:
    assert json.loads(re.findall(r"^ENTRYPOINT (.*)$", stage, re.MULTILINE)[-1]) == ["znormseg"]
    assert re.findall(r"^USER (.*)$", stage, re.MULTILINE) == ["1000:1000"]
    assert re.findall(r"^WORKDIR (.*)$", stage, re.MULTILINE) == ["/workspace"]


@pytest.mark.parametrize("stage", FINAL_STAGES.values(), ids=FINAL_STAGES)
def test_home_and_caches_share_one_writable_folder(stage: str) -> None:
    for name in ("XDG_CACHE_HOME", "MPLCONFIGDIR", "NILEARN_DATA", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert re.search(rf"\b{name}=/tmp/znormseg/\w+", stage), name
    assert re.search(r"\bHOME=/tmp/znormseg ", stage)


@pytest.mark.parametrize("name", HANDED_TO_THE_BUILD)
def test_build_inputs_are_arguments_and_unknown_to_the_last_stage(name: str) -> None:
    assert len(re.findall(rf"^ARG {name}=", DOCKERFILE, re.MULTILINE)) == len(FINAL_STAGES)
    assert not any(name in stage for stage in FINAL_STAGES.values())


@pytest.mark.parametrize(("target", "stage"), FINAL_STAGES.items())
def test_models_downloaded_in_the_build_are_where_the_program_looks_for_them(target: str, stage: str) -> None:
    models = re.search(
        rf"^FROM {target}-project AS {target}-models$.*?(?=^FROM )", DOCKERFILE, re.MULTILINE | re.DOTALL
    )
    assert models is not None
    assert "\nARG MODELS=\n" in models[0]
    assert models[0].rstrip().endswith("/download-models.sh")
    assert f"COPY --from={target}-models /opt/models /opt/models\n" in stage
    assert " ZNORMSEG_MODELS=/opt/models " in stage


def test_models_are_downloaded_by_name_with_the_certificates_of_the_build(tmp_path: Path) -> None:
    """The script runs with its folders in a temporary one, and a stand-in that records how it is called."""
    out = tmp_path / "out" / "opt" / "venv" / "bin" / "znormseg"
    out.parent.mkdir(parents=True)
    out.write_text(f'#!/bin/sh\necho "$ZNORMSEG_MODELS $REQUESTS_CA_BUNDLE $*" >>{tmp_path}/calls\n')
    out.chmod(0o755)
    for name in ("opt/venv", "mnt/znormseg-certs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "mnt/znormseg-certs/ca.pem").touch()
    script = (ROOT / "docker" / "download-models.sh").read_text(encoding="utf-8")
    script = re.sub(r"(?<![\w.])/(opt|out|mnt)/", rf"{tmp_path}/\1/", script)
    subprocess.run(["sh", "-c", script], env={**os.environ, "MODELS": "mindgrab monai-brats"}, check=True)
    expected = [
        f"{tmp_path}/opt/models {tmp_path}/mnt/znormseg-certs/ca.pem model download {name}"
        for name in ("mindgrab", "monai-brats")
    ]
    assert (tmp_path / "calls").read_text().splitlines() == expected


def test_requirements_lists_the_dependencies_of_pyproject(shell: Callable[..., Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    run = [*project["project"]["dependencies"], *extras["serve"], *extras["postgres"]]
    for which, wanted in (("run", run), ("build", project["build-system"]["requires"])):
        outcome = shell(["python", "docker/requirements.py", which], cwd=ROOT)
        assert outcome.out.splitlines() == wanted


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_and_have_valid_syntax(script: Path) -> None:
    assert script.name == "lib.sh" or os.access(script, os.X_OK)
    subprocess.run(["sh", "-n", script], check=True)


@pytest.mark.parametrize("script", ["build.sh", "test.sh"])
def test_without_an_engine_one_line_says_what_to_install(script: str, without_engines: dict[str, str]) -> None:
    ended = run(script, without_engines)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.splitlines() == [
        "image: error: found none of docker, buildah and podman. Install one, for instance: apt install buildah, "
        "dnf install buildah, or https://docs.docker.com/engine/install"
    ]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("TARGET", "tpu", "TARGET=tpu: use gpu or cpu"),
        ("ENGINE", "nerdctl", "allowed are auto, docker, buildah, podman"),
        ("ENGINE", "buildah", "there is no buildah on PATH"),
        ("PIP_CERT", "/nowhere/ca.pem", "PIP_CERT=/nowhere/ca.pem is not a file"),
        ("PIP_FIND_LINKS", "/nowhere", "PIP_FIND_LINKS=/nowhere is neither a folder nor an http(s) address"),
        ("PIP_INDEX_URL", "file:///srv/simple", "PIP_INDEX_URL must be an http(s) address"),
        ("TORCH_INDEX", "/srv/torch", "TORCH_INDEX must be an http(s) address"),
        ("ZNORMSEG_MODELS_URL", "/srv/models", "ZNORMSEG_MODELS_URL must be an http(s) address"),
        ("MODELS", "mindgrab,monai-brats", "give names from znormseg model list, separated by spaces"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_before_the_build(
    name: str, value: str, says: str, without_engines: dict[str, str], tmp_path: Path
) -> None:
    ended = run("build.sh", {**without_engines, name: value})
    assert ended.returncode == 1
    assert says in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_only_uses_existing_commands(name: str, znormseg: Callable[..., Any]) -> None:
    services = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))["services"]
    assert set(services) == {"train", "predict", "serve"}
    for service in services.values():
        assert znormseg(service.get("command", ["predict"])[0], "--help").code == 0


def test_a_tmpfs_is_mounted_so_that_compiled_code_can_be_loaded_from_it() -> None:
    """docker and podman mount a tmpfs as noexec by default, and Triton loads what it compiles into /tmp."""
    files = [*SCRIPTS, *ROOT.glob("compose*.yaml"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    mounts = [
        (path.name, mount)
        for path in files
        for mount in re.findall(r"(?:--tmpfs |tmpfs: \[)\"?(/tmp[\w:,=]*)", path.read_text(encoding="utf-8"))
    ]
    assert len(mounts) >= 5
    assert [pair for pair in mounts if ":exec" not in pair[1]] == []


def test_several_gpus_get_the_shared_memory_that_nccl_needs() -> None:
    services = yaml.safe_load((ROOT / "compose.gpu.yaml").read_text(encoding="utf-8"))["services"]
    assert services["train"]["shm_size"] == "1gb"
