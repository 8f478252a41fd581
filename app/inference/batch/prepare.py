"""Prepare many cases from scans and write them as BraTS stores them, without a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from app.inference.batch.cohort import CaseProgress
from app.inference.batch.manifest import this_worker
from app.inference.batch.pipeline import InThisProcess, Steps
from app.inference.skull_strip import mindgrab_network
from app.progress import LOG, OnProgress, silent
from data.datasets.layouts import Case
from data.native_space.case_files import write_brats_case
from data.native_space.config import PrepareConfig
from data.native_space.to_brats import BratsCase, NativeCase, prepare_native, read_native


@dataclass(frozen=True, kw_only=True)
class _PrepareSteps(Steps[NativeCase, BratsCase]):
    out: Path
    config: PrepareConfig
    nan_to_zero: bool
    read_before: Mapping[str, NativeCase]
    done: dict[str, BratsCase] = field(default_factory=dict)
    """By case id, without voxels."""

    def read(self, case: Case) -> NativeCase:
        return self.read_before.get(case.id) or read_native(case, nan_to_zero=self.nan_to_zero)

    def compute(self, read: NativeCase, on_step: Callable[[str], None]) -> BratsCase:
        return prepare_native(read, self.config, mindgrab=mindgrab_network(), on_step=on_step)

    def write(self, computed: BratsCase) -> Mapping[str, object]:
        write_brats_case(computed, self.out)
        for warning in computed.record["warnings"]:
            LOG.warning("case %s: %s", computed.id, warning)
        self.done[computed.id] = replace(computed, images={}, codes=None)
        return computed.record


def prepare_cases(
    cases: Sequence[Case | NativeCase],
    out: Path,
    config: PrepareConfig,
    *,
    nan_to_zero: bool = False,
    on_progress: OnProgress = silent,
) -> tuple[list[BratsCase], dict[str, str]]:
    """Prepare cases; a case that fails does not stop the others.

    Args:
        cases: cases to be read from their files, or scans that have been read.
        out: folder of the data set, created if missing.
        config: how the scans are prepared.
        nan_to_zero: set image voxels that are NaN or infinite to 0 instead of rejecting the case.
        on_progress: called with the case and step in progress.

    Returns:
        the cases that were written, without their voxels, and the messages of the others by case id.

    Raises:
        OSError: ``out`` cannot be written to.
    """
    read_before = {case.id: case for case in cases if isinstance(case, NativeCase)}
    todo = [Case(id=case.id, folder=out) if isinstance(case, NativeCase) else case for case in cases]
    steps = _PrepareSteps(out=out, config=config, nan_to_zero=nan_to_zero, read_before=read_before)
    progress = CaseProgress(job="preparing", cases=todo, on_progress=on_progress)
    InThisProcess(steps=steps, worker=this_worker("cpu")).work(todo, progress)
    progress.finish()
    return [steps.done[case.id] for case in todo if case.id in steps.done], progress.failures()
