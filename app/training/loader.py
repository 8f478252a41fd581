"""The batches of a run: threads make them on a CPU; for a GPU, they are made on it from cases in its memory."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Final

import torch

from app.config.load import RunConfig
from app.progress import LOG
from app.system.device import Runtime
from data.patches.on_device import DevicePatches, case_bytes, device_batches
from data.patches.sampler import Batch, PatchSource, batches

#: Batches after which the free memory of a GPU is measured: the first step allocates what every later one needs, and
#: the host is up to ten steps ahead of the GPU.
_BATCHES_BEFORE: Final = 12
#: GPU memory that cases leave free, for validation and fragmentation: a share of all of it, at least so many bytes.
_SPARE_SHARE: Final = 0.1
_SPARE_BYTES: Final = 2 * 10**9


class Loader:
    """Makes the batches of a run where the run's device needs them."""

    def __init__(self, source: PatchSource, config: RunConfig, runtime: Runtime) -> None:
        self._source = source
        self._config = config
        self._device = runtime.device
        self._patches = DevicePatches(source, runtime.device) if runtime.device.type == "cuda" else None
        self._measured = False

    def batches(self, *, first: int, every: int = 1) -> Generator[Batch]:
        """Yield batches from number ``first`` on, every ``every``-th one, without end; close it to stop its threads."""
        size, threads = self._config.training.batch_size, self._config.runtime.loader_threads
        if self._patches is None:
            return batches(self._source, first=first, every=every, size=size, threads=threads)
        return device_batches(
            self._patches,
            self._device,
            first=first,
            every=every,
            size=size,
            threads=threads,
            on_batch=self._keep_cases,
        )

    def seconds_to_draft(self, batch: int) -> float:
        """Return the time that the host takes for one batch of a GPU."""
        assert self._patches is not None
        size = self._config.training.batch_size
        began = time.perf_counter()
        for number in range(batch * size, (batch + 1) * size):
            self._patches.draft(number)
        return time.perf_counter() - began

    def _keep_cases(self, yielded: int) -> None:
        """Once the first steps have their memory, keep in the rest as many cases as fit."""
        if self._patches is None or self._measured or yielded < _BATCHES_BEFORE:
            return
        self._measured = True
        free, size = torch.cuda.mem_get_info(self._device)
        budget, reason = cases_budget(self._config.runtime.gpu_cases_gb, free, size)
        count, used = self._patches.keep(budget)
        total = [case_bytes(case) for case in self._source.cases]
        LOG.info(
            "%d of %d prepared cases (%.1f of %.1f GB) stay in GPU memory: %s",
            *(count, len(total), used / 1e9, sum(total) / 1e9, reason),
        )


def cases_budget(wanted_gb: float | None, free_bytes: int, size_bytes: int) -> tuple[int, str]:
    """Return how many bytes of prepared cases may stay in GPU memory, and the reason.

    Args:
        wanted_gb: ``runtime.gpu_cases_gb``.
        free_bytes: free memory while training runs.
        size_bytes: all of the GPU's memory.
    """
    if wanted_gb is not None:
        return int(wanted_gb * 1e9), "runtime.gpu_cases_gb"
    spare = max(_SPARE_BYTES, int(_SPARE_SHARE * size_bytes))
    return max(0, free_bytes - spare), f"{free_bytes / 1e9:.1f} GB are free, {spare / 1e9:.1f} GB of them are spared"
