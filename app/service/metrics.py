"""Prometheus metrics, counted in the database when they are asked for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select

from app.service.durations import CLASSES
from app.service.service import Service
from app.service.tables import Job

_STATES: Final = ("queued", "running", "done", "failed", "cancelled")


def metrics_text(service: Service) -> bytes:
    """Return all numbers in Prometheus' text format; labels contain no names of users or cases."""
    registry = CollectorRegistry()
    registry.register(_Numbers(service))
    return generate_latest(registry)


class _Numbers(Collector):
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Yield each family of numbers."""
        with self._service.database.reading() as session:
            counted = select(Job.state, func.count()).where(Job.deleted.is_(False)).group_by(Job.state)
            counts = dict(session.execute(counted).all())
        jobs = GaugeMetricFamily("znormseg_jobs", "Jobs that are kept, by state.", labels=["state"])
        for state in _STATES:
            jobs.add_metric([state], counts.get(state, 0))
        yield jobs
        durations = self._service.dispatcher.durations
        ends = [*(f"{end:g}" for end in CLASSES), "+Inf"]
        yield HistogramMetricFamily(
            "znormseg_job_seconds",
            "Duration of jobs since the start of the service.",
            buckets=list(zip(ends, durations.counts(), strict=True)),
            sum_value=durations.total,
        )
        memory = GaugeMetricFamily("znormseg_memory_bytes", "Resident memory, by process.", labels=["process"])
        memory.add_metric(["service"], _resident_bytes("self"))
        for number, process in enumerate(self._service.dispatcher.processes, 1):
            memory.add_metric([f"worker-{number}"], _resident_bytes(str(process)))
        yield memory
        free = shutil.disk_usage(self._service.settings.place.root).free
        yield GaugeMetricFamily("znormseg_disk_free_bytes", "Free space on the disk of the data folder.", value=free)
        ready = float(not self._service.dispatcher.trouble)
        yield GaugeMetricFamily("znormseg_ready", "1 if jobs can be computed, else 0.", value=ready)


def _resident_bytes(process: str) -> int:
    """Return the resident memory of a process; 0 where the system does not show it."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmRSS:")), "VmRSS: 0 kB")
    return int(line.split()[1]) * 1024
