"""A worker for test_worker_pool.py that does what its job and its tasks say."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from app.errors import RunError
from app.progress import LOG
from app.system import worker_pool
from app.system.worker_pool import Send, TaskQueue, be_worker
from app.training.signals import stop_on_signals
from data.errors import DataError


class Finalized:
    """Gets a signal where Python ignores exceptions."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def work(job: dict[str, Any], tasks: TaskQueue, send: Send) -> None:
    if job["first"] == "refuse":
        raise DataError("no such run")
    send({"ready": "cpu"})
    for task, content in iter(tasks.get, None):
        if content == "die" or (content == "die once" and not Path(job["mark"]).exists()):
            Path(job["mark"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if content == "fail":
            raise RunError("no weights")
        if content == "warn":
            LOG.warning("careful")
        if content == "wait":
            send({"task": task, "progress": "half"})
            time.sleep(60)
        if content == "signal in a finalizer":
            send({"task": task, "progress": "half"})
            Finalized()
            time.sleep(60)
        if content == "save":
            with stop_on_signals() as stop:
                send({"task": task, "progress": "half"})
                while stop.signal_name is None:
                    time.sleep(0.01)
                time.sleep(1.5)  # longer than the interval at which a signal is repeated
            raise RunError("saved")
        if content == "train to the end":
            with stop_on_signals() as stop:
                send({"task": task, "progress": "half"})
                while stop.signal_name is None:
                    time.sleep(0.01)
            time.sleep(60)
        send({"task": task, "progress": "half"})
        send({"task": task, "done": os.getpid()})


if __name__ == "__main__":
    worker_pool._SAVING_SECONDS = 2.0  # type: ignore[misc]  # a constant
    sys.exit(be_worker(work))
