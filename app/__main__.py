"""``python -m app``: the same as ``znormseg``."""

import sys
from pathlib import Path

# ``python -m`` puts the current folder first; its own data/ or models.py must not stand in for ours.
if sys.path and Path(sys.path[0]).resolve() != Path(__file__).resolve().parent.parent:
    del sys.path[0]

from app.cli.main import run

run()
