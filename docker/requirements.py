"""Print the requirements in pyproject.toml, one per line: ``requirements.py build`` or ``requirements.py run``."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
wanted = {"build": project["build-system"]["requires"], "run": project["project"]["dependencies"]}
sys.stdout.write("".join(f"{requirement}\n" for requirement in wanted[sys.argv[1]]))
