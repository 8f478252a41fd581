"""All that a process must know to predict cases of a cohort, as plain data that can be sent to any process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import TypeAdapter

from app.config.inference import DEFAULTS, PredictOptions, options_from_plain, options_to_plain
from app.inference.backends.choose import Backend, choose_backend
from app.inference.batch.fingerprint import settings_of
from app.inference.batch.manifest import this_worker
from app.inference.batch.pipeline import InThisProcess, Steps
from app.inference.batch.predict import steps_of
from app.inference.ensemble import load_predictor
from app.inference.model import Predictor
from app.runs.training_record import training_record
from app.system.device import Runtime, RuntimeConfig
from data.datasets.layouts import Case
from data.labels import Contrast

if TYPE_CHECKING:
    from data.native_space.to_brats import BringInConfig

#: Converts cases to plain data that JSON can hold, and back.
CASE: Final = TypeAdapter(Case)


@dataclass(frozen=True, kw_only=True)
class Native:
    """How scans that come from the scanner are handled."""

    config: BringInConfig
    """How the scans are prepared."""
    space: Contrast = "t1c"
    """The contrast whose grid the label map is mapped to."""


@dataclass(frozen=True, kw_only=True)
class PredictJob:
    """Which network predicts, with which settings, and where results are written."""

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

    def to_plain(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return {
            **vars(self),
            "run": str(self.run),
            "output": str(self.output),
            "options": options_to_plain(self.options),
            "native": None if self.native is None else asdict(self.native),
        }

    def load(self) -> tuple[Predictor, Runtime]:
        """Load the network on its device.

        Raises:
            RunError: as in :func:`app.inference.ensemble.load_predictor`.
            DeviceError: as in :func:`app.inference.backends.choose.choose_backend`.
        """
        runtime = choose_backend(self.backend, RuntimeConfig(device=self.device, precision=self.precision))
        return load_predictor(self.run, runtime, postprocess=self.postprocess), runtime

    def settings(self, model: Predictor) -> dict[str, Any]:
        """Settings, as returned by :func:`app.inference.batch.fingerprint.settings_of`."""
        if self.native is None:
            return settings_of(model, self.options)
        from app.inference.batch.native import native_settings

        return native_settings(model, self.options, self.native.config, self.native.space)

    def engine(
        self, model: Predictor, runtime: Runtime, *, worker: str = "main", device: str | None = None
    ) -> InThisProcess[Any, Any]:
        """Create the executor that does cases of this job in this process.

        Args:
            model: as returned by :meth:`load`.
            runtime: as returned by :meth:`load`.
            worker: name of this process in the manifest.
            device: name of the device in the manifest, if this process sees it under another name.
        """
        steps: Steps[Any, Any]
        options = replace(self.options, training=training_record(self.run))
        if self.native is None:
            steps = steps_of(model, self.output, runtime, options)
        else:
            from app.inference.batch.native import native_steps

            native = self.native
            steps = native_steps(model, self.output, runtime, config=native.config, space=native.space, options=options)
        return InThisProcess(
            steps=steps,
            output=self.output,
            settings=self.settings(model),
            worker=this_worker(device or runtime.device_name, worker),
        )


def job_from_plain(content: Mapping[str, Any]) -> PredictJob:
    """Inverse of :meth:`PredictJob.to_plain`."""
    native = None
    if content["native"] is not None:
        from data.native_space.to_brats import BringInConfig

        native = Native(config=BringInConfig(**content["native"]["config"]), space=content["native"]["space"])
    return PredictJob(
        **{
            **content,
            "run": Path(content["run"]),
            "output": Path(content["output"]),
            "options": options_from_plain(content["options"]),
            "native": native,
        }
    )
