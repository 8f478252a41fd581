"""Install znormseg into .venv: ``install.py run`` for the run-time packages, ``install.py dev`` for all.

``make`` calls this. Besides pip's own variables it reads these environment variables:

TORCH_INDEX
    The index to install torch from, whatever hardware this machine has.
LOCKED
    If set, every file must match a hash from ``locks/``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
#: PyPI's torch 2.13.0 for Linux and the CUDA packages it requires, on x86-64.
CUDA_COST = "a download of about 2.7 GB, 5 GB on disk"


class Choice(NamedTuple):
    """Where torch comes from."""

    options: tuple[str, ...]  # pip options; empty: pip's default sources
    reason: str


def choose(
    environment: Mapping[str, str],
    system: str,
    own_source: Choice | None,
    gpu: Callable[[], str | None],
    cpu_index_has_torch: Callable[[], bool],
) -> Choice:
    """Choose the index for torch; the last two arguments are called only if the answer matters.

    Args:
        environment: Environment variables, of which TORCH_INDEX is used.
        system: Name of the system, as in ``platform.system()``.
        own_source: The source that the user's pip settings give for torch, or None.
        gpu: Returns the evidence of an NVIDIA GPU, or None.
        cpu_index_has_torch: Whether torch's CPU index is reachable and has the version we pin.
    """
    if index := environment.get("TORCH_INDEX"):
        return Choice(("--index-url", index), "TORCH_INDEX is set")
    if own_source is not None:
        return own_source
    if system != "Linux":
        return Choice((), f"PyPI's build; on {system} it has no CUDA libraries")
    if shown_by := gpu():
        return Choice((), f"PyPI's build with CUDA, {CUDA_COST}: {shown_by}")
    if cpu_index_has_torch():
        return Choice(
            ("--index-url", CPU_INDEX),
            "the build without CUDA: no NVIDIA GPU here. For the one with CUDA: TORCH_INDEX=https://pypi.org/simple",
        )
    return Choice(
        (),
        f"PyPI's build with CUDA, {CUDA_COST}, although there is no NVIDIA GPU here: {CPU_INDEX} cannot be reached or"
        " lacks our version. It works on a CPU too. To use a mirror of that index: TORCH_INDEX=URL",
    )


def nvidia_gpu(root: Path = Path("/")) -> str | None:
    """Return the evidence of an NVIDIA GPU on this machine, or None."""
    smi = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=str(root / "usr/lib/wsl/lib"))
    if smi is not None:
        try:
            listed = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            pass
        else:
            if listed.returncode == 0 and "GPU " in listed.stdout:
                return "nvidia-smi lists a GPU"
    for sign in ("dev/nvidiactl", "proc/driver/nvidia/version"):
        if (root / sign).exists():
            return f"there is {root / sign}"
    return None


def pip_settings(listed: str) -> dict[str, str]:
    r"""Parse the settings that apply to ``pip install`` from the output of ``pip config list``.

    Example:
        >>> pip_settings("global.find-links='/srv/wheels'\n:env:.no-index='1'\ndownload.index-url='X'")
        {'find-links': '/srv/wheels', 'no-index': '1'}
    """
    found = re.findall(r"^(?:global|install|:env:)\.([\w-]+)=['\"](.*)['\"]$", listed, re.MULTILINE)
    return {key: value.replace("\\n", " ").strip() for key, value in found if value.strip()}


def own_source(settings: Mapping[str, str], has_torch: Callable[..., bool]) -> Choice | None:
    """Return the source that the user's pip settings give for torch, or None.

    An index that replaces PyPI is always used. Sources that pip searches in addition to PyPI are used if they have
    torch, and then exclusively: if hashes are required, pip would prefer PyPI, which states them, to a folder, which
    does not.
    """
    decides = "pip's setting {} decides; TORCH_INDEX=URL overrides it"
    if "no-index" in settings:
        return Choice((), decides.format("no-index"))
    if "index-url" in settings:
        mirror = f". A mirror of PyPI has the build with CUDA, {CUDA_COST}"
        return Choice((), decides.format("index-url") + mirror)
    if "find-links" in settings and has_torch("--no-index"):
        return Choice(("--no-index",), decides.format("find-links"))
    for index in settings.get("extra-index-url", "").split()[:1]:  # pip searches the others too
        if has_torch("--index-url", index):
            return Choice(("--index-url", index), decides.format("extra-index-url"))
    return None


def pinned(package: str) -> str:
    """Return a package's version in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))


def installed_torch() -> str | None:
    """Return the version of torch in .venv including its build, such as 2.13.0+cpu, or None."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def has_torch(*options: str) -> bool:
    """Whether pip finds the torch version we pin, for this Python, in the sources of ``options``; takes seconds."""
    command = [*PIP, "index", "versions", "torch", "--timeout", "10", "--retries", "0", *options]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return False
    available = re.findall(r"^Available versions: (.*)$", answer.stdout, re.MULTILINE)
    versions = {version.partition("+")[0] for line in available for version in line.split(", ")}
    return answer.returncode == 0 and pinned("torch") in versions


PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def pip_install(*arguments: str) -> None:
    """Run ``pip install`` quietly; show warnings and errors, with those about missing locations as one line."""
    command = [*PIP, "install", "--quiet", *arguments]
    absent = 0
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stderr is not None
        for line in process.stderr:
            # pip prints this for every package that a local index lacks.
            if line.startswith("WARNING: Location '") and "is ignored" in line:
                absent += 1
            else:
                sys.stderr.write(line)
    if absent:
        say(f"pip ignored {absent} locations that do not exist; `{VENV.name}/bin/pip config list` shows its sources")
    if process.returncode:
        sys.exit(process.returncode)


def provide_pip() -> None:
    """Install pip into .venv; a .venv made by ``uv venv`` or by Debian's Python without python3-venv has none."""
    if importlib.util.find_spec("pip") is not None:
        return
    commands = [[sys.executable, "-m", "ensurepip", "--default-pip"]]
    if uv := shutil.which("uv"):
        commands.append([uv, "pip", "install", "--quiet", "--python", sys.executable, "pip"])
    for command in commands:
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return
    sys.exit("There is no pip for .venv. On Debian and Ubuntu: apt install python3-venv; or install uv.")


def install_torch(locked: bool) -> None:
    """Install torch separately, so that nothing else comes from torch's index."""
    record, wanted = VENV / ".torch-index", os.environ.get("TORCH_INDEX")
    have = installed_torch()
    asked_anew = wanted and wanted != (record.read_text(encoding="utf-8").strip() if record.exists() else None)
    if have is not None and have.partition("+")[0] == pinned("torch") and not asked_anew:
        return
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=True).stdout
    options, reason = choose(
        os.environ,
        platform.system(),
        None if wanted else own_source(pip_settings(listed), has_torch),
        nvidia_gpu,
        lambda: has_torch("--index-url", CPU_INDEX),
    )
    say(f"torch {pinned('torch')}: {reason}")
    what = ["--require-hashes", "-r", "locks/torch.txt"] if locked else [f"torch=={pinned('torch')}"]
    pip_install("--no-deps", *(["--force-reinstall"] if asked_anew else []), *options, *what)
    if wanted:
        record.write_text(f"{wanted}\n", encoding="utf-8")


def main(which: str) -> None:
    """Create .venv if there is none, and install into it: ``which`` is run or dev."""
    if Path(sys.prefix).resolve() != VENV.resolve():
        python = VENV / "bin" / "python"
        if not python.exists():
            venv.create(VENV, symlinks=True)
        same = f"import sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
        if subprocess.run([python, "-c", same], check=False).returncode:
            version = platform.python_version()
            sys.exit(f".venv was made with a Python other than {version} (set by PYTHON). Remove it: make clean")
        os.execv(python, [str(python), *sys.argv])
    provide_pip()
    locked = bool(os.environ.get("LOCKED"))
    if locked and installed_torch() is not None and not any(VENV.glob(".installed-*-locked")):
        sys.exit("LOCKED=1: .venv has packages whose hashes were not checked. Remove it first: make clean")
    say({"run": "installing the run-time packages", "dev": "adding the packages for tests and documentation"}[which])
    install_torch(locked)
    if locked:
        files = [f"locks/{which}.txt"]
        if platform.system() == "Linux" and "+cpu" not in (installed_torch() or ""):
            files.append("locks/cuda.txt")
        pip_install("--no-deps", "--require-hashes", *(part for file in files for part in ("-r", file)))
        pip_install("--no-deps", "--no-index", "--no-build-isolation", "--editable", ".")
    else:
        pip_install("--constraint", "constraints.txt", "--editable", {"run": ".", "dev": ".[dev]"}[which])
    say(f"done, with torch {installed_torch()}")


def say(text: str) -> None:
    """Write a line to stderr."""
    sys.stderr.write(f"set-up: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main(sys.argv[1])
