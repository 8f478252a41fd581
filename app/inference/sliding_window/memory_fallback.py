"""Fallbacks for when memory is short: plan ahead for a memory bound, and use a smaller plan whenever memory runs out.

The fallbacks, in order: fewer windows at once, blending in CPU memory, smaller windows, computing on the CPU. Each
fallback used is described in a sentence for the log and the case's JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from app.errors import is_out_of_memory
from app.inference.sliding_window.grid import Size, smaller
from app.progress import LOG
from app.system.process import give_back_freed_memory, give_back_gpu_memory
from app.system.resources import memory_of
from data.errors import DataError

T = TypeVar("T")

GB: Final = 10**9
#: Assumed memory of a process that has read nothing yet, on systems that do not report it.
_PROGRAM_BYTES: Final = GB


@dataclass(frozen=True, kw_only=True)
class ComputePlan:
    """How the windows of a volume are computed."""

    window: Size
    """Size of a window along each axis."""
    batch: int = 1
    """Windows per forward pass."""
    device: str = "cpu"
    """Device that computes windows: ``cpu`` or ``cuda:N``."""
    stitch_on: str = "cpu"
    """Device that blends windows."""
    half: bool = False
    """Whether blended logits are kept in float16."""

    def __str__(self) -> str:
        """Return a description, such as ``windows of 128x128x128 voxels, 2 at once, on cuda:0``."""
        stitched = f", blended on {self.stitch_on}" if self.stitch_on != self.device else ""
        half = ", logits in float16" if self.half else ""
        size = "x".join(map(str, self.window))
        return f"windows of {size} voxels, {self.batch} at once, on {self.device}{stitched}{half}"


class MemoryFallback:
    """The plan for the windows of one case, and sentences that explain its fallbacks.

    Args:
        max_memory_bytes: peak memory that the process may use; None for no bound.
    """

    def __init__(self, max_memory_bytes: int | None = None) -> None:
        self.sentences: list[str] = []
        self._max_bytes = max_memory_bytes
        self._plan: ComputePlan | None = None

    def run(
        self,
        compute: Callable[[ComputePlan], T],
        first: ComputePlan,
        *,
        divisor: int,
        needed_bytes: Callable[[ComputePlan], int],
    ) -> T:
        """Call ``compute``, with ever smaller plans if memory runs out; the next run starts with the plan that worked.

        Args:
            compute: does the work; it must release its memory when it fails.
            first: plan to use if memory is sufficient.
            divisor: sides of windows are multiples of this number.
            needed_bytes: estimates the CPU memory that a plan takes in addition to what the process already holds.

        Raises:
            DataError: memory is insufficient even for the last plan, or the bound is too low.
        """
        plan = self._plan or self._within_bound(first, divisor, needed_bytes)
        while True:
            try:
                answer = compute(plan)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = " ".join(str(error).split())[:200]
            else:
                self._plan = plan
                return answer
            give_back_gpu_memory()  # cuDNN and cuBLAS allocate outside torch's cache, which may hold all that is free
            after = next_plan(plan, first, divisor)
            if after is None:
                raise DataError(
                    f"not enough memory, not even for {plan} ({reason}). Close other programs, or use a machine with "
                    "more memory."
                )
            self.note(f"out of memory with {plan} ({reason}); continued with {after}")
            plan = after

    def _within_bound(
        self, first: ComputePlan, divisor: int, needed_bytes: Callable[[ComputePlan], int]
    ) -> ComputePlan:
        """Return the first plan that fits within the bound."""
        if self._max_bytes is None:
            return first
        give_back_freed_memory()
        held = memory_of()
        free = self._max_bytes - (_PROGRAM_BYTES if held is None else held.resident)
        plan: ComputePlan | None = first
        while plan is not None and needed_bytes(plan) > free:
            plan = replace(plan, half=True) if not plan.half else next_plan(plan, first, divisor)
        if plan is None:
            raise DataError(
                f"--max-memory-gb {self._max_bytes / GB:g} is too little for this case: {max(0, free) / GB:.1f} GB "
                "are left after reading it. Allow more, or leave out the option."
            )
        if plan != first:
            self.note(f"planned for --max-memory-gb {self._max_bytes / GB:g}: {plan} instead of {first}")
        return plan

    def note(self, sentence: str) -> None:
        """Log a sentence about a fallback, and keep it for the case's JSON."""
        LOG.warning("%s", sentence)
        self.sentences.append(sentence)


def next_plan(plan: ComputePlan, first: ComputePlan, divisor: int) -> ComputePlan | None:
    """Return the next plan, which needs less memory, or None if there is none.

    Args:
        plan: plan that needs too much memory.
        first: first plan of the case; on the CPU, windows return to its size.
        divisor: sides of windows are multiples of this number.
    """
    if plan.batch > 1:
        return replace(plan, batch=plan.batch // 2)
    if plan.stitch_on != "cpu":
        return replace(plan, stitch_on="cpu")
    if (window := smaller(plan.window, divisor)) is not None:
        return replace(plan, window=window)
    if plan.device != "cpu":
        return replace(plan, device="cpu", window=first.window)
    return None
