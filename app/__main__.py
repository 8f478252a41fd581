"""``python -m app``: the same as ``znormseg``."""

import sys
from pathlib import Path

# ``python -m`` puts the current folder first on sys.path; a data/ or models.py in it must not shadow ours.
if sys.path and Path(sys.path[0]).resolve() != Path(__file__).resolve().parent.parent:
    del sys.path[0]

from app.cli.main import run

run()
