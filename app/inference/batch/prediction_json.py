"""Content of ``<case>.json`` for a predicted case, and of the output of ``predict --json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from app import NOTICE
from app.inference.batch.fingerprint import FINGERPRINT, files_sha256
from app.inference.confidence import COMPANIONS, Companion, ShareSteps, Trust
from app.inference.flags import Flag
from app.inference.model import Predictor
from app.system.device import Runtime, versions
from data.datasets.layouts import Case
from data.labels import LabelConvention


@dataclass(frozen=True, kw_only=True)
class ComputedCase:
    """A case that has been predicted and can be written; the network's input has been freed."""

    case: Case
    fingerprint: Mapping[str, Any]
    codes: npt.NDArray[np.uint8]
    """Label map in the program's codes, on the grid and in the voxel order of ``reference``."""
    reference: Path
    """File whose grid and header the results get."""
    companions: Mapping[Companion, ShareSteps]
    """Contents of the optional files, in 65535ths, on the same grid, shape (X, Y, Z, 3)."""
    trust: Trust
    flags: tuple[Flag, ...]
    seconds: Mapping[str, float]
    """Time spent so far, by step."""
    notes: Mapping[str, Any]
    """Further entries of the JSON."""


def case_content(
    computed: ComputedCase,
    model: Predictor,
    label_map: Path,
    files: Mapping[Companion, Path],
    *,
    convention: LabelConvention,
    runtime: Runtime,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Return the content of ``<case>.json``, as :class:`app.schemas.CaseRecord` describes it.

    Args:
        computed: the predicted case.
        model: the network or ensemble that predicted it.
        label_map: path of the label map, which has been written.
        files: paths of the optional files, which have been written.
        convention: label convention of the file.
        runtime: device and precision of the prediction.
        seconds: time spent, by step.
    """
    case, volumes = computed.case, computed.trust.volumes_ml
    return {
        "case": case.id,
        "label_map": str(label_map),
        "files": {name: str(files[name]) if name in files else None for name in COMPANIONS},
        "volumes_ml": {region: round(ml, 3) for region, ml in volumes.items()},
        **computed.trust.to_json(),
        "flags": [asdict(flag) for flag in computed.flags],
        "labels": {"convention": convention.name, **convention.by_tissue},
        "seconds": {step: round(spent, 3) for step, spent in seconds.items()},
        **computed.notes,
        **model.calibration.record(list(volumes.values()), complete=not computed.notes["missing_contrasts"]),
        "inputs": {contrast: str(path) for contrast, path in case.contrasts.items()},
        **({"input_volumes": dict(case.volumes)} if case.volumes else {}),
        **({} if model.statement is None else {"model": model.statement.to_json()}),
        **model.record(),
        "runtime": list(runtime.reasons),
        "versions": versions(),
        "notice": NOTICE,
        FINGERPRINT: {**computed.fingerprint, "files_sha256": files_sha256([label_map, *files.values()])},
    }


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Results of all cases, and the failures."""

    cases: tuple[Mapping[str, Any], ...]
    """Contents of the files ``<case>.json`` in the order of the cases, including those that were finished earlier."""
    skipped: tuple[str, ...]
    """Ids of the cases that were finished earlier."""
    failures: Mapping[str, str]
    """Message by case id."""
    manifest: Path | None
    """Path of the manifest, if one was written."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return {
            "cases": list(self.cases),
            "skipped": list(self.skipped),
            "failures": self.failures,
            "manifest": None if self.manifest is None else str(self.manifest),
            "notice": NOTICE,
        }

    def copied_to(self, folder: Path) -> Predictions:
        """Return these predictions as they are after only the label maps were copied to another folder."""
        cases = ({**one, "label_map": str(folder / Path(one["label_map"]).name)} for one in self.cases)
        return replace(self, cases=tuple(cases), manifest=None)
