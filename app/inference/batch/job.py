"""Everything that a process needs to predict cases of a cohort, as plain data that can be sent to any process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import TypeAdapter

from app.config.inference import DEFAULTS, PredictOptions
from app.inference.backends.choose import Backend, choose_backend
from app.inference.batch.fingerprint import settings_of
from app.inference.batch.manifest import this_worker
from app.inference.batch.native import Native
from app.inference.batch.pipeline import InThisProcess
from app.inference.batch.predict import AnsweredCase, PredictSteps, ReadCase
from app.inference.batch.prediction_json import ComputedCase
from app.inference.ensemble import load_predictor
from app.inference.model import Predictor
from app.inference.tumour_presence.gate import Gate, load_gate
from app.runs.training_record import training_record
from app.system.device import Runtime, RuntimeConfig, choose_runtime
from data.datasets.layouts import Case

#: Converts cases to plain data that JSON can hold, and back.
CASE: Final = TypeAdapter(Case)


@dataclass(frozen=True, kw_only=True)
class PredictJob:
    """The network, the settings of the prediction, and the output folder."""

    run: Path
    """Folder of a run or an ensemble."""
    output: Path
    """Folder of the results."""
    device: str = "auto"
    """See :class:`app.system.device.RuntimeConfig`."""
    backend: Backend = "auto"
    """See :func:`app.inference.backends.choose.choose_backend`."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """See :class:`app.system.device.RuntimeConfig`."""
    options: PredictOptions = DEFAULTS
    postprocess: bool = True
    """Whether to apply the post-processing rules of an ensemble."""
    native: Native | None = None
    """None if cases are skull-stripped and on one grid."""
    presence: Path | None = None
    """Presence run or ensemble that removes enhancing tumour where it finds none."""

    def to_plain(self) -> dict[str, Any]:
        """Return plain data that JSON can hold, except the record of training cases, which is reread from the run."""
        left_out = {"options": {"training"}}
        plain: dict[str, Any] = TypeAdapter(PredictJob).dump_python(self, mode="json", exclude=left_out)
        return plain

    def load(self) -> tuple[Predictor, Runtime]:
        """Load the network on its device.

        Raises:
            RunError: as raised by :func:`app.inference.ensemble.load_predictor`.
            DeviceError: as raised by :func:`app.inference.backends.choose.choose_backend`.
        """
        runtime = choose_backend(self.backend, RuntimeConfig(device=self.device, precision=self.precision))
        return load_predictor(self.run, runtime, postprocess=self.postprocess), runtime

    def settings(self, model: Predictor) -> dict[str, Any]:
        """Return the settings from :func:`app.inference.batch.fingerprint.settings_of`."""
        return self._settings(model, self.gate(RuntimeConfig(device="cpu")))

    def _settings(self, model: Predictor, gate: Gate | None) -> dict[str, Any]:
        native = {} if self.native is None else self.native.settings()
        return settings_of(model, self.options, **native, **({} if gate is None else gate.settings()))

    def gate(self, config: RuntimeConfig) -> Gate | None:
        """Load the presence network, if there is one, on its device.

        Raises:
            RunError: as raised by :func:`app.inference.tumour_presence.gate.load_gate`.
            DeviceError: the device is not available.
        """
        if self.presence is None:
            return None
        return load_gate(self.presence, choose_runtime(config))

    def engine(
        self, model: Predictor, runtime: Runtime, *, worker: str = "main", device: str | None = None
    ) -> InThisProcess[ReadCase, ComputedCase | AnsweredCase]:
        """Create the executor that predicts cases of this job in this process.

        Args:
            model: as returned by :meth:`load`.
            runtime: as returned by :meth:`load`.
            worker: name of this process in the manifest.
            device: name of the device in the manifest, if this process sees it under another name.
        """
        gate = self.gate(RuntimeConfig(device=self.device))
        steps = PredictSteps(
            model=model,
            output=self.output,
            runtime=runtime,
            settings=self._settings(model, gate),
            options=replace(self.options, training=training_record(self.run)),
            native=self.native,
            gate=gate,
        )
        return InThisProcess(steps=steps, worker=this_worker(device or runtime.device_name, worker))


def job_from_plain(content: Mapping[str, Any]) -> PredictJob:
    """Return the job from the output of :meth:`PredictJob.to_plain`."""
    return TypeAdapter(PredictJob).validate_python(content)
