"""Predict cases on the hosts of a Ray cluster: one task per case, retried on another worker if its own is lost.

Every host must have this program installed and see the run, the cases and the output folder under the same paths,
because no volumes are sent through Ray, only text. Ray is an optional dependency (``pip install 'znormseg[ray]'``).
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import platform
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

from app.errors import ConfigError, DeviceError, message
from app.inference.batch.cohort import CaseObserver
from app.inference.batch.job import CASE, PredictJob, job_from_plain
from app.inference.batch.manifest import Outcome, Worker
from app.inference.batch.output_folder import at_work
from app.inference.batch.parallel import MAX_ATTEMPTS
from app.inference.batch.pipeline import InThisProcess
from app.progress import LOG
from app.system.device import versions
from app.system.resources import cores
from app.system.worker_pool import error_name, error_of
from data.datasets.layouts import Case

#: Size of Ray's object store: the minimum that Ray accepts, as only text is sent through it.
_STORE_BYTES: Final = 80 << 20
#: Grace period for a cancelled task to complete its files.
_STOP_SECONDS: Final = 60.0
_QUIET: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no telemetry
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # avoids a warning
    "RAY_DEDUP_LOGS": "0",
}


@dataclass(frozen=True, kw_only=True)
class OnRay:
    """Executes cases as Ray tasks."""

    job: PredictJob
    processes: int = 1
    """Cases at once on the CPU of each host; on GPUs, one per GPU."""

    @property
    def name(self) -> str:
        """Name for the manifest."""
        return "ray"

    def work(self, cases: Sequence[Case], observer: CaseObserver) -> None:
        """Predict cases, each as a task.

        Raises:
            ConfigError: Ray is not installed, or the cluster at RAY_ADDRESS does not respond.
            DeviceError: a GPU is requested by number, or the cluster has none.
            DataError, RunError, OSError: the error that stopped a worker, such as a run that its host does not see.
            KeyboardInterrupt: interrupted; tasks in progress have completed their files.
        """
        if not cases:
            return
        ray = ray_module()
        with _stdout_to_stderr(), _connected(ray):
            device, resources = _resources(ray, self.job.device, self.processes)
            job = replace(self.job, run=self.job.run.absolute(), output=self.job.output.absolute(), device=device)
            words = json.dumps(job.to_plain())
            task = ray.remote(do_case).options(
                **resources, max_retries=MAX_ATTEMPTS - 1, retry_exceptions=False, scheduling_strategy="SPREAD"
            )
            pending = {
                task.remote(words, json.dumps(CASE.dump_python(_absolute(case), mode="json"))): case for case in cases
            }
            try:
                self._collect(ray, pending, observer)
            except BaseException:
                _cancel(ray, list(pending))
                raise

    def _collect(self, ray: Any, pending: dict[Any, Case], observer: CaseObserver) -> None:
        """Collect the results of tasks as they finish."""
        warned = False
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=1.0)
            for reference in done:
                case = pending.pop(reference)
                observer.started(case.id)
                try:
                    answer = ray.get(reference)
                except ray.exceptions.RayError as error:
                    first = (str(error).strip() or type(error).__name__).splitlines()[0]
                    text = f"case {case.id}: its workers were lost in up to {MAX_ATTEMPTS} attempts: {first}"
                    observer.ended(Outcome(case=case.id, message=text, attempts=None))
                    continue
                for level, line in answer["logs"]:
                    LOG.log(level, "%s", line)
                if "error" in answer:
                    raise error_of(answer, f"host {answer['host']}")
                if not warned and answer["versions"] != versions():
                    warned = True
                    LOG.warning("host %s has different versions: %s", answer["host"], answer["versions"])
                observer.ended(self._outcome(case, answer))

    def _outcome(self, case: Case, answer: dict[str, Any]) -> Outcome:
        worker = Worker(name=answer["worker"], device=answer["device"], host=answer["host"])
        content, text = answer["content"], answer["message"]
        if content is not None and not (self.job.output / f"{case.id}.nii.gz").exists():
            content = None
            text = (
                f"case {case.id}: host {worker.host} wrote its label map to {self.job.output}, which is a "
                "different folder on that host. Give a folder that all hosts share."
            )
        return Outcome(case=case.id, content=content, message=text, worker=worker, attempts=None)


def ray_module() -> Any:
    """Import Ray, configured to be quiet.

    Raises:
        ConfigError: Ray is not installed.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            "--engine ray: Ray is not installed. Install it, on every host: pip install 'znormseg[ray]'"
        ) from error


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect stdout to stderr at file-descriptor level: Ray's messages about lost nodes must not mix with results."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """Join the cluster at RAY_ADDRESS, or one that runs on this machine, or start a temporary one."""
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    before = signal.getsignal(signal.SIGTERM)
    given = os.environ.get("RAY_ADDRESS") or None
    try:
        ray.init(address=given or "auto", **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        if given is not None:
            raise ConfigError(f"RAY_ADDRESS={given}: no Ray cluster responds at this address ({error})") from error
        ray.init(
            address="local",
            num_cpus=cores(),
            include_dashboard=False,
            object_store_memory=_STORE_BYTES,
            **quiet,
        )
    try:
        if before is not None:
            signal.signal(signal.SIGTERM, before)  # Ray installs a handler that ends the process
        yield
    finally:
        ray.shutdown()
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _resources(ray: Any, device: str, processes: int) -> tuple[str, dict[str, float]]:
    """Return the device that a task requests, and the resources that it takes from a host."""
    if device.startswith("cuda:"):
        raise DeviceError(f"--engine ray with --device {device}: Ray assigns the GPUs. Use --device cuda.")
    gpus = ray.cluster_resources().get("GPU", 0)
    if device == "cuda" and not gpus:
        raise DeviceError("--engine ray with --device cuda: the cluster has no GPU. Use --device cpu.")
    if device != "cpu" and gpus:
        return "cuda", {"num_cpus": 1, "num_gpus": 1}
    here = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    least = min((int(count) for count in here if count >= 1), default=1)
    return "cpu", {"num_cpus": max(1, least // processes)}


def _cancel(ray: Any, references: list[Any]) -> None:
    """Cancel tasks as Ctrl-C does, and wait for those in progress."""
    with suppress(Exception):  # the error that stopped the cohort is reported instead
        for reference in references:
            ray.cancel(reference)
        ray.wait(references, num_returns=len(references), timeout=_STOP_SECONDS)


def _absolute(case: Case) -> Case:
    return replace(
        case,
        folder=case.folder.absolute(),
        contrasts={contrast: path.absolute() for contrast, path in case.contrasts.items()},
        label=None if case.label is None else case.label.absolute(),
    )


def do_case(job: str, case: str) -> dict[str, Any]:
    """Predict one case in a Ray worker.

    Args:
        job: output of :meth:`app.inference.batch.job.PredictJob.to_plain`, as JSON.
        case: the case, converted by :data:`app.inference.batch.job.CASE`, as JSON.

    Returns:
        plain data: ``content`` or ``message`` of the case, or ``error`` and ``message`` of an error that stops all
        cases; log lines; and the host, its versions and the worker.
    """
    recorder = _Recorder()
    LOG.setLevel(logging.WARNING)
    LOG.propagate = False
    LOG.addHandler(recorder)
    answer: dict[str, Any] = {"host": platform.node(), "versions": versions(), "worker": f"ray-{os.getpid()}"}
    try:
        engine = _engine(job)
        with at_work(job_from_plain(json.loads(job)).output):
            engine.one(CASE.validate_python(json.loads(case)), recorder)
        answer |= {
            "content": recorder.outcome.content,
            "message": recorder.outcome.message,
            "device": engine.worker.device,
        }
    except Exception as error:
        answer |= {"error": error_name(error), "message": message(error)}
    finally:
        LOG.removeHandler(recorder)
    return {**answer, "logs": recorder.lines}


@lru_cache(maxsize=1)
def _engine(job: str) -> InThisProcess[Any, Any]:
    """Load the network of a job, and keep it for the next case in this process."""
    found = job_from_plain(json.loads(job))
    model, runtime = found.load()
    return found.engine(model, runtime)


class _Recorder(logging.Handler):
    """Keeps the log lines and the outcome of a case for the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str]] = []
        self.outcome = Outcome(case="")

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a log line."""
        self.lines.append((record.levelno, record.getMessage()))

    def started(self, case: str, what: str = "") -> None:
        """Do nothing: progress is not reported from a Ray task."""

    def ended(self, outcome: Outcome) -> None:
        """Keep the outcome of the case."""
        self.outcome = outcome
