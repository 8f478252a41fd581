"""Write locks/*.txt from pyproject.toml and constraints.txt, with hashes from the index; ``make lock`` calls this.

uv resolves the versions for all systems and Pythons at once. There are four files, since torch differs between
machines:

torch.txt
    torch, with the hashes of PyPI and of torch's CPU index.
cuda.txt
    The additional packages that PyPI's torch for Linux needs.
run.txt
    Everything else that znormseg needs to run, and setuptools, which builds the package.
dev.txt
    run.txt, and the packages for tests and documentation.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "locks"
CPU_INDEX = os.environ.get("TORCH_INDEX") or "https://download.pytorch.org/whl/cpu"
_CUDA = re.compile(r"(nvidia|cuda)-|triton$")


def compiled(*arguments: str, stdin: str = "") -> dict[str, str]:
    """Resolve with uv, and return the lines of each package including hashes."""
    command = ["uv", "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--no-header", "--no-annotate"]
    ended = subprocess.run(
        [*command, "--python-version", "3.11", *arguments],
        cwd=ROOT,
        input=stdin,
        text=True,
        capture_output=True,
        check=False,
    )
    if ended.returncode:
        raise RuntimeError(ended.stderr)
    return parsed(ended.stdout)


def parsed(text: str) -> dict[str, str]:
    """Split a requirements file into packages, and return the lines of each by name."""
    blocks = re.findall(r"^([a-z][\w.-]*)(==.*(?:\n +--hash.*)*\n)", text, re.MULTILINE)
    return {name: name + rest for name, rest in blocks}


def with_cpu_hashes(torch: str) -> str:
    """Add the hashes of torch's CPU index; if it cannot be reached, keep those of the current lock file."""
    version = torch.partition("==")[2].split()[0]
    try:
        cpu = compiled("--no-deps", "--default-index", CPU_INDEX, "-", stdin=f"torch=={version}+cpu\n")["torch"]
    except RuntimeError as error:
        sys.stderr.write(f"lock: {CPU_INDEX} does not answer; keeping the CPU hashes of locks/torch.txt\n{error}\n")
        cpu = (LOCKS / "torch.txt").read_text(encoding="utf-8")
        if f"torch=={version} " not in cpu:
            sys.exit(f"lock: locks/torch.txt is not for torch {version}, so its hashes cannot be reused")
    hashes = sorted(set(re.findall(r"--hash=sha256:\w+", torch + cpu)))
    return f"torch=={version} \\\n    " + " \\\n    ".join(hashes) + "\n"


def main() -> None:
    """Write the four files."""
    pins = ["-c", "constraints.txt", "-c", "docker/constraints.txt", "pyproject.toml"]
    everything = compiled("--extra", "dev", *pins)
    run = compiled(*pins).keys() | {"setuptools"}
    files: dict[str, list[str]] = {"torch": [], "cuda": [], "run": [], "dev": ["-r run.txt\n"]}
    for name, lines in sorted(everything.items()):
        if name == "torch":
            files["torch"].append(with_cpu_hashes(lines))
        else:
            files["cuda" if _CUDA.match(name) else "run" if name in run else "dev"].append(lines)
    LOCKS.mkdir(exist_ok=True)
    for name, parts in files.items():
        text = f"# Written by `make lock` from pyproject.toml and constraints.txt.\n{''.join(parts)}"
        (LOCKS / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
