"""Which cases need not be predicted again: what a label map was made from, told by SHA-256.

Every ``<case>.json`` has ``made_from``: the SHA-256 of the settings (weights, rules, options), of each input file, and
of each file that was written. A case is finished when all of them are what they were. Contents are hashed, not
times compared: copies and restored backups count as what they hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from app.config.inference import PredictOptions, options_to_plain
from app.inference.model import Predictor
from app.system.device import versions
from data.datasets.layouts import Case
from data.files import file_sha256
from data.labels import Contrast

#: The object in ``<case>.json``.
MADE_FROM: Final = "made_from"


def settings_of(model: Predictor, options: PredictOptions, **more: Any) -> dict[str, Any]:
    """What decides a case's result beside its files, as plain data.

    Device, backend and precision are not in it: a cohort may be begun on one machine and ended on another. The bound on
    memory is, but counts for those cases alone that were computed in another way because of it.

    Args:
        model: what predicts.
        options: what is asked for.
        more: further settings, such as how scans are brought in.
    """
    return {
        "weights_sha256": model.sha256,
        "overlap": model.plain_config["inference"]["overlap"],
        "postprocess": model.postprocess.to_json(),
        "calibration": asdict(model.calibration),
        "options": options_to_plain(options),
        "znormseg": versions()["znormseg"],
        **more,
    }


def made_from(case: Case, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a result of a case is made from; to be found out before the case is read, so that a change meanwhile shows.

    Raises:
        OSError: a file cannot be read.
    """
    return {
        "settings_sha256": _settings_sha256(case, settings),
        "inputs_sha256": {contrast: file_sha256(path) for contrast, path in case.contrasts.items()},
        "max_memory_gb": _bound_of(settings),
    }


def finished_content(case: Case, output: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The content of ``<case>.json`` where the case is finished, else None.

    It is not finished where anything is missing, damaged or other than it was: the JSON, the settings, an input, a
    file that was written. Nor where memory was short and another bound is asked for now: the answer may be another.

    Args:
        case: what is to be predicted.
        output: folder of the results.
        settings: as of :func:`settings_of`.
    """
    try:
        content = json.loads((output / f"{case.id}.json").read_text(encoding="utf-8"))
        noted = content[MADE_FROM]
        same = content["case"] == case.id and noted["settings_sha256"] == _settings_sha256(case, settings)
        if not same or (content["ladder"] and noted.get("max_memory_gb") != _bound_of(settings)):
            return None
        files = dict(noted["files_sha256"])
        if f"{case.id}.nii.gz" not in files or any(Path(name).name != name for name in files):
            return None
        if {name: file_sha256(output / name) for name in files} != files:
            return None
        if made_from(case, settings)["inputs_sha256"] != noted["inputs_sha256"]:
            return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    assert isinstance(content, dict)
    return content


def files_sha256(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of files, by name."""
    return {path.name: file_sha256(path) for path in paths}


def sha256_of(content: Any) -> str:
    """SHA-256 of plain data in a form that does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _settings_sha256(case: Case, settings: Mapping[str, Any]) -> str:
    """Over the settings and what the layout told of the case: label numbers, and which volume a contrast is."""
    convention = case.written_convention
    volumes: dict[Contrast, int] = dict(case.volumes)
    unbound = {**settings, "options": {k: v for k, v in settings["options"].items() if k != "max_memory_gb"}}
    return sha256_of([unbound, volumes, None if convention is None else convention.name])


def _bound_of(settings: Mapping[str, Any]) -> float | None:
    """``--max-memory-gb`` of the settings."""
    bound: float | None = settings["options"].get("max_memory_gb")
    return bound
