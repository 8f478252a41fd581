"""Print the requirements in pyproject.toml, one per line: ``requirements.py build`` or ``requirements.py run``.

The image also has what ``znormseg serve`` needs.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
extras = project["project"]["optional-dependencies"]
run = [*project["project"]["dependencies"], *extras["serve"], *extras["postgres"]]
wanted = {"build": project["build-system"]["requires"], "run": run}
sys.stdout.write("".join(f"{requirement}\n" for requirement in wanted[sys.argv[1]]))
