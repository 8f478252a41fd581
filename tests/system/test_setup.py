"""Set-up: where torch comes from, what each make target installs, and lock files that agree with the pins.

The index is a stand-in: a real HTTP server on the loopback interface with a wheel named torch that has nothing in it.
nvidia-smi is a stand-in too: a shell script. pip and virtual environments are real.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
)
OURS = ("znorm", "models", "data", "app")
NOTHING = {"PATH": os.environ["PATH"], "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

_spec = importlib.util.spec_from_file_location("install", ROOT / "setup" / "install.py")
assert _spec is not None
assert _spec.loader is not None
install = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(install)


def stand_in_wheel(folder: Path, version: str) -> str:
    """Write a wheel named torch without content; returns its SHA-256."""
    info = f"torch-{version}.dist-info"
    members = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: stand-in\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, text in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(text)}\n"
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"torch-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {**members, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(name, text)
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


class Silent(SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - as its parent calls it
        pass


@pytest.fixture
def index(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """An index on the loopback interface without packages: its address, and torch's folder in it."""
    handler = partial(Silent, directory=str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", tmp_path / "index" / "torch"
        server.shutdown()


@pytest.fixture
def plain_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip without this machine's settings."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in NOTHING.items():
        monkeypatch.setenv(name, value)


def choose(**changes: Any) -> Any:
    """The choice on a Linux machine without a GPU that reaches the CPU index, but for ``changes``."""
    facts: dict[str, Any] = {"environment": {}, "system": "Linux", "own_source": None, "gpu": lambda: None}
    return install.choose(**{**facts, "cpu_index_has_torch": lambda: True, **changes})


def never() -> Any:
    raise AssertionError("asked although the answer does not matter")


# ---- where torch comes from


def test_without_a_gpu_torch_comes_from_the_cpu_index() -> None:
    assert choose().options == ("--index-url", "https://download.pytorch.org/whl/cpu")


def test_with_a_gpu_torch_comes_from_pypi_and_the_cpu_index_is_not_queried() -> None:
    choice = choose(gpu=lambda: "nvidia-smi lists a GPU", cpu_index_has_torch=never)
    assert choice.options == ()
    assert "nvidia-smi lists a GPU" in choice.reason


def test_an_unreachable_cpu_index_is_reported_with_fallback_cost_and_remedy() -> None:
    choice = choose(cpu_index_has_torch=lambda: False)
    assert choice.options == ()
    for words in ("cannot be reached", "2.7 GB", "although there is no NVIDIA GPU", "TORCH_INDEX=URL"):
        assert words in choice.reason


@pytest.mark.parametrize("changes", [{"own_source": install.Choice((), "")}, {"system": "Darwin"}], ids=str)
def test_custom_sources_and_systems_without_cuda_builds_leave_the_choice_to_pip(changes: dict[str, Any]) -> None:
    assert choose(**changes, gpu=never, cpu_index_has_torch=never).options == ()


def test_torch_index_overrides_everything() -> None:
    environment = {"TORCH_INDEX": "https://mirror.example/whl/cu130"}
    choice = choose(environment=environment, own_source=install.Choice((), ""), gpu=never, cpu_index_has_torch=never)
    assert choice.options == ("--index-url", "https://mirror.example/whl/cu130")


@pytest.mark.parametrize(
    ("script", "seen"),
    [
        ("echo 'GPU 0: NVIDIA H200 (UUID: GPU-0)'", True),
        ("echo 'No devices were found'; exit 6", False),
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9", False),
    ],
)
def test_nvidia_smi_indicates_a_gpu_only_if_it_lists_one(
    script: str, seen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert (install.nvidia_gpu(tmp_path / "no-devices") is not None) == seen


@pytest.mark.parametrize("sign", ["dev/nvidiactl", "proc/driver/nvidia/version"])
def test_driver_files_indicate_a_gpu_without_nvidia_smi(
    sign: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install.nvidia_gpu(tmp_path) is None
    (tmp_path / sign).parent.mkdir(parents=True)
    (tmp_path / sign).touch()
    assert sign in install.nvidia_gpu(tmp_path)


def test_an_index_is_used_only_if_it_responds_and_has_the_pinned_version(
    index: tuple[str, Path], plain_pip: None
) -> None:
    address, torch = index
    assert not install.has_torch("--index-url", address)
    stand_in_wheel(torch, "2.0.1+cpu")
    assert not install.has_torch("--index-url", address)
    stand_in_wheel(torch, f"{PINS['torch']}+cpu")
    assert install.has_torch("--index-url", address)


def test_an_index_that_refuses_connections_is_not_used(plain_pip: None) -> None:
    assert not install.has_torch("--index-url", "http://127.0.0.1:9")


@pytest.mark.parametrize("key", ["index-url", "no-index"])
def test_a_replacement_for_pypi_is_used_without_a_query(key: str) -> None:
    assert key in install.own_source({key: "1", "find-links": "W"}, never).reason


def test_local_wheels_are_used_only_if_they_include_torch(
    tmp_path: Path, plain_pip: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    settings = {"find-links": str(tmp_path)}
    assert install.own_source(settings, install.has_torch) is None
    stand_in_wheel(tmp_path, PINS["torch"])
    assert install.own_source(settings, install.has_torch).options == ("--no-index",)


def test_a_second_index_is_used_only_if_it_has_torch(index: tuple[str, Path], plain_pip: None) -> None:
    settings = {"extra-index-url": f"{index[0]} http://127.0.0.1:9"}
    assert install.own_source(settings, install.has_torch) is None
    stand_in_wheel(index[1], f"{PINS['torch']}+cu126")
    assert install.own_source(settings, install.has_torch).options == ("--index-url", index[0])


def test_pip_settings_are_those_that_apply_to_install(plain_pip: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://a.example\nhttps://b.example")
    monkeypatch.setenv("PIP_INDEX_URL", "")
    listed = subprocess.run([*install.PIP, "config", "list"], capture_output=True, text=True, check=True).stdout
    settings = install.pip_settings(f"{listed}download.no-index='1'\n")
    assert settings["extra-index-url"].split() == ["https://a.example", "https://b.example"]
    assert not {"index-url", "no-index"} & settings.keys()


# ---- a set-up from beginning to end, of a project that needs nothing but torch

BACKEND = """
import zipfile, os
def build_editable(folder, config_settings=None, metadata_directory=None):
    name, info = "standin-1-py3-none-any.whl", "standin-1.dist-info/"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as wheel:
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: standin\\nVersion: 1\\n\\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "RECORD", "")
    return name
"""
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "standin"
version = "1"
dependencies = ["torch"]
"""


def site_packages(project: Path) -> Path:
    return next((project / ".venv").glob("lib/python3*/site-packages"))


@pytest.fixture
def project(tmp_path: Path, index: tuple[str, Path]) -> Path:
    """A stand-in for a clone, in a path with spaces, with our install.py; for it the CPU index is on this machine."""
    folder = tmp_path / "a path with spaces"
    (folder / "setup").mkdir(parents=True)
    (folder / "locks").mkdir()
    text = (ROOT / "setup" / "install.py").read_text(encoding="utf-8")
    (folder / "setup" / "install.py").write_text(text.replace(install.CPU_INDEX, index[0]), encoding="utf-8")
    (folder / "constraints.txt").write_text(f"torch=={PINS['torch']}\n")
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "backend.py").write_text(BACKEND)
    venv.create(folder / ".venv", with_pip=False, symlinks=True)
    shutil.copytree(
        Path(pytest.importorskip("pip").__file__).parent, site_packages(folder) / "pip"
    )  # ensurepip is slow
    digest = stand_in_wheel(index[1], f"{PINS['torch']}+cpu")
    (folder / "locks" / "torch.txt").write_text(f"torch=={PINS['torch']} --hash=sha256:{digest}\n")
    (folder / "locks" / "run.txt").write_text("# nothing\n")
    return folder


def set_up(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run install.py as make does, without this machine's pip settings."""
    return subprocess.run(
        [sys.executable, "setup/install.py", "run"],
        cwd=project,
        env={**NOTHING, **environment},
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )


def version_of_torch(project: Path) -> str:
    ask = "import importlib.metadata as m; print(m.version('torch'))"
    return subprocess.run(
        [project / ".venv" / "bin" / "python", "-c", ask], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.skipif(install.nvidia_gpu() is not None, reason="this machine has an NVIDIA GPU")
@pytest.mark.skipif(sys.platform != "linux", reason="the CPU index is asked on Linux")
def test_a_fresh_clone_in_a_path_with_spaces_gets_torch_from_the_cpu_index(project: Path) -> None:
    ended = set_up(project)
    assert ended.returncode == 0, ended.stderr
    assert version_of_torch(project) == f"{PINS['torch']}+cpu"
    assert "no NVIDIA GPU here" in ended.stderr
    assert len(ended.stderr.splitlines()) <= 4


@pytest.mark.slow
def test_a_venv_created_by_uv_without_pip_gets_pip(project: Path, index: tuple[str, Path]) -> None:
    shutil.rmtree(site_packages(project) / "pip")
    ended = set_up(project, TORCH_INDEX=index[0])
    assert ended.returncode == 0, ended.stderr
    assert version_of_torch(project) == f"{PINS['torch']}+cpu"


def test_locked_refuses_a_file_with_a_different_hash(project: Path, index: tuple[str, Path]) -> None:
    with (index[1] / f"torch-{PINS['torch']}+cpu-py3-none-any.whl").open("ab") as wheel:
        wheel.write(b"tampered with")
    ended = set_up(project, TORCH_INDEX=index[0], LOCKED="1")
    assert ended.returncode != 0
    assert "DO NOT MATCH THE HASHES" in ended.stderr


def test_locked_installs_files_with_the_right_hash_and_skips_installed_ones(
    project: Path, index: tuple[str, Path]
) -> None:
    ended = set_up(project, TORCH_INDEX=index[0], LOCKED="1")
    assert ended.returncode == 0, ended.stderr
    again = set_up(project, TORCH_INDEX=index[0], LOCKED="1")
    assert again.returncode == 1
    assert "make clean" in again.stderr


def test_locked_prefers_a_local_torch_wheel_to_an_index_with_a_hash(
    project: Path, index: tuple[str, Path], tmp_path: Path
) -> None:
    shutil.move(next(index[1].glob("*.whl")), tmp_path)
    plain = stand_in_wheel(index[1], PINS["torch"])
    name = f"torch-{PINS['torch']}-py3-none-any.whl"
    (index[1] / "index.html").write_text(f'<a href="{name}#sha256={plain}">{name}</a>')
    with (project / "locks" / "torch.txt").open("r+") as lock:
        both = f"{lock.read().strip()} --hash=sha256:{plain}\n"
        lock.seek(0)
        lock.write(both)
    ended = set_up(project, PIP_FIND_LINKS=str(tmp_path), PIP_EXTRA_INDEX_URL=index[0], LOCKED="1")
    assert ended.returncode == 0, ended.stderr
    assert version_of_torch(project) == f"{PINS['torch']}+cpu"


def test_a_failing_torch_index_ends_with_the_error_of_pip(project: Path) -> None:
    ended = set_up(project, TORCH_INDEX="http://127.0.0.1:9", PIP_RETRIES="0")
    assert ended.returncode == 1
    assert f"ERROR: No matching distribution found for torch=={PINS['torch']}" in ended.stderr


# ---- make


def dry_run(*goals: str, **environment: str) -> str:
    """What make would do in a fresh clone."""
    ended = subprocess.run(
        ["make", "-n", "VENV=build/none", *goals],
        cwd=ROOT,
        env={**os.environ, **environment},
        text=True,
        capture_output=True,
        check=True,
    )
    return ended.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("goal", "installs"), [("demo", ["run"]), ("setup", ["run"]), ("test", ["run", "dev"])])
def test_only_the_development_targets_install_more_than_running_needs(goal: str, installs: list[str]) -> None:
    assert re.findall(r"install\.py (\w+)", dry_run(goal)) == installs


# ---- locks


def locked(name: str) -> dict[str, str]:
    """Name to version of a lock file."""
    text = (ROOT / "locks" / f"{name}.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z][\w.-]*)==([^ ]+)", text, re.MULTILINE))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_files_and_the_pins_agree() -> None:
    docker = (ROOT / "docker" / "constraints.txt").read_text(encoding="utf-8")
    pins = PINS | dict(re.findall(r"^(\S+)==(\S+)$", docker, re.MULTILINE))
    locks = {name: version for file in ("run", "dev", "torch", "cuda") for name, version in locked(file).items()}
    ours = {canonical(name): version for name, version in pins.items()}
    assert {name: locks.get(name) for name in ours} == ours
    # What is not pinned is either pinned by torch, or for Windows or a browser only.
    assert {name for name in locks.keys() - ours if not re.match(r"nvidia-|cuda-|triton$", name)} <= {
        "cffi",
        "pycparser",
        "httpx2-jsfetch",
    }


@pytest.mark.parametrize("name", ["run", "dev", "torch", "cuda"])
def test_every_package_in_a_lock_file_has_a_hash(name: str) -> None:
    text = (ROOT / "locks" / f"{name}.txt").read_text(encoding="utf-8")
    blocks = re.findall(r"^[a-z].*(?:\n +.*)*", text, re.MULTILINE)
    assert len(blocks) == len(locked(name))
    assert [block for block in blocks if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", block)] == []


@pytest.mark.parametrize(("extra", "files"), [("", ["run"]), ("dev", ["run", "dev", "cuda"])])
def test_a_lock_file_has_everything_the_project_requires_here(extra: str, files: list[str]) -> None:
    requirements = pytest.importorskip("packaging.requirements")
    wanted, seen = [("znormseg", extra)], set()
    while wanted:
        name, extra_of = wanted.pop()
        for line in importlib.metadata.requires(name) or []:
            requirement = requirements.Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra_of}):
                for further in [(requirement.name, more) for more in ("", *requirement.extras)]:
                    if further not in seen and canonical(further[0]) != "torch":
                        seen.add(further)
                        wanted.append(further)
    here = {canonical(name) for name, _ in seen} - {"znormseg"}
    assert here - {name for file in files for name in locked(file)} == set()


#: Modules that only the extra ``serve`` brings.
SERVICE_MODULES = frozenset(
    ("alembic", "anyio", "argon2", "fastapi", "prometheus_client", "sqlalchemy", "starlette", "uvicorn")
)


def test_the_program_imports_only_packages_that_are_runtime_requirements() -> None:
    trees = [ast.parse(file.read_text("utf-8")) for name in OURS for file in (ROOT / name).rglob("*.py")]
    names = {alias.name for node in walked(trees, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in walked(trees, ast.ImportFrom) if node.level == 0}
    modules = {name.partition(".")[0] for name in names} - {*OURS, *sys.stdlib_module_names}
    brought_by = importlib.metadata.packages_distributions()
    extras = {"onnx", "onnxruntime", "onnxscript", "ray", *SERVICE_MODULES}
    needed = {module: {canonical(name) for name in brought_by.get(module, [module])} for module in modules - extras}
    lock = locked("run") | locked("torch") | locked("cuda")
    assert {"torch", "typer", "SimpleITK"} <= needed.keys()
    assert {module: names for module, names in needed.items() if not names & lock.keys()} == {}


def walked(trees: list[ast.Module], kind: type[Any]) -> list[Any]:
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, kind)]


def test_the_development_requirements_extend_the_runtime_ones() -> None:
    assert "-r run.txt\n" in (ROOT / "locks" / "dev.txt").read_text(encoding="utf-8")
    assert not locked("run").keys() & locked("dev").keys()


def test_the_pins_support_the_oldest_supported_python() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11"
    specifiers = pytest.importorskip("packaging.specifiers")
    refuse = []
    for name, version in PINS.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            fields = importlib.metadata.metadata(name)
            if fields["Version"] == version and "Requires-Python" in fields:
                refuse += [name] * ("3.11.0" not in specifiers.SpecifierSet(fields["Requires-Python"]))
    assert refuse == []
