"""Decide by SHA-256 which cases are finished: whether a label map's inputs, settings and files are unchanged.

Every ``<case>.json`` has an entry ``made_from``: the SHA-256 of the settings (weights, rules, options), of each input
file and of each output file. A case is finished if all of them are unchanged. Timestamps are ignored, so
copies and restored backups are recognised by their content.
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

#: Key of this entry in ``<case>.json``.
FINGERPRINT: Final = "made_from"
#: Value of ``task`` in the settings of a presence network.
PRESENCE: Final = "presence"


def settings_of(model: Predictor, options: PredictOptions, **more: Any) -> dict[str, Any]:
    """Return everything that determines a case's result apart from its files, as plain data.

    Device, backend and precision are left out: a cohort may be started on one machine and finished on another. The
    memory bound is included, but only matters for cases that were computed differently because of it.

    Args:
        model: the predictor.
        options: options of the prediction.
        more: further settings, such as how scans are prepared.
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


def fingerprint(case: Case, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Hash the inputs of a case; call it before the case is read, so that a change in the meantime is detected.

    Raises:
        OSError: a file cannot be read.
    """
    return {
        "settings_sha256": _settings_sha256(case, settings),
        "inputs_sha256": {contrast: file_sha256(path) for contrast, path in case.contrasts.items()},
        "max_memory_gb": settings["options"].get("max_memory_gb"),
    }


def finished_content(case: Case, output: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the content of ``<case>.json`` if the case is finished, else None.

    A case is not finished if anything is missing, damaged or changed: the JSON, the settings, an input file or an
    output file. Nor is it finished if memory was short and the memory bound has changed, as the result may then
    differ.

    Args:
        case: the case to predict.
        output: folder of the results.
        settings: as returned by :func:`settings_of`.
    """
    try:
        content = json.loads((output / f"{case.id}.json").read_text(encoding="utf-8"))
        noted = content[FINGERPRINT]
        same = content["case"] == case.id and noted["settings_sha256"] == _settings_sha256(case, settings)
        if not same or (content["ladder"] and noted.get("max_memory_gb") != settings["options"].get("max_memory_gb")):
            return None
        files = dict(noted["files_sha256"])
        is_there = (
            noted["answer_sha256"] == answer_sha256(content)
            if settings.get("task") == PRESENCE
            else f"{case.id}.nii.gz" in files
        )
        if not is_there or any(Path(name).name != name for name in files):
            return None
        if {name: file_sha256(output / name) for name in files} != files:
            return None
        if fingerprint(case, settings)["inputs_sha256"] != noted["inputs_sha256"]:
            return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    assert isinstance(content, dict)
    return content


def answer_sha256(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the answer in the ``<case>.json`` of a presence network, which is its only file."""
    return sha256_of([content["probability"], content["present"], content["slabs"]])


def files_sha256(paths: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of files, by file name."""
    return {path.name: file_sha256(path) for path in paths}


def sha256_of(content: Any) -> str:
    """Return the SHA-256 of plain data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _settings_sha256(case: Case, settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the settings and of facts from the layout: label numbers, volumes of 4D files."""
    convention = case.written_convention
    unbound = {**settings, "options": {k: v for k, v in settings["options"].items() if k != "max_memory_gb"}}
    return sha256_of([unbound, dict(case.volumes), None if convention is None else convention.name])
