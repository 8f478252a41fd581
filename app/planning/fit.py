"""Try a plan, and make it smaller until it fits."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from app.config.load import RunConfig
from app.errors import MemoryShortError
from app.planning.dry_run import Needed, TooMuch, memory_in_words
from app.planning.estimate import Estimate, estimate
from app.planning.rules import PROGRAM_BYTES, smaller_network, times

#: Maximum number of attempts; no plan can be made smaller this many times.
_MOST_ATTEMPTS: Final = 12
#: Allowance for the error of an estimate, as a factor, when smaller configs are skipped.
_MARGIN: Final = 0.9


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One config that was tried."""

    patch_voxels: tuple[int, int, int]
    batch_size: int
    channels: tuple[int, ...]
    changed: str
    """Change since the previous attempt; empty for the first."""
    outcome: str


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A config that fits, and the resources it needs."""

    config: RunConfig
    needed: Needed
    attempts: tuple[Attempt, ...]


def fit(
    config: RunConfig,
    try_out: Callable[[RunConfig], Needed | TooMuch],
    *,
    most_bytes: int | None,
    half: bool,
    gpu: bool,
    fixed: Collection[str],
    on_attempt: Callable[[RunConfig, int], None] = lambda *_: None,
) -> Fitted:
    """Try a config, then smaller ones (:func:`app.planning.rules.smaller_network`), until one fits.

    If the memory of an attempt is known, smaller configs are skipped if they are estimated to need too much as well.

    Args:
        config: config of the plan.
        try_out: runs some steps of a config.
        most_bytes: RAM that may be used; None if unknown.
        half: whether activations are bfloat16 or float16.
        gpu: whether steps run on a GPU.
        fixed: keys that may not be changed.
        on_attempt: called with the config and the number of each attempt.

    Raises:
        MemoryShortError: nothing fits; the message gives the memory that the smallest attempt needed.
    """
    attempts: list[Attempt] = []
    changed = ""
    while True:
        on_attempt(config, len(attempts) + 1)
        outcome = try_out(config)
        words = f"fits in {memory_in_words(outcome.own_bytes)}" if isinstance(outcome, Needed) else outcome.why
        attempts.append(
            Attempt(
                patch_voxels=config.training.patch_voxels,
                batch_size=config.training.batch_size,
                channels=config.network.channels,
                changed=changed,
                outcome=words,
            )
        )
        if isinstance(outcome, Needed):
            return Fitted(config=config, needed=outcome, attempts=tuple(attempts))
        needed = estimate(config, half=half, gpu=gpu)
        target = _target(outcome, needed, most_bytes)
        steps = []
        while len(attempts) < _MOST_ATTEMPTS and (smaller := smaller_network(config, fixed=fixed)) is not None:
            config, step = smaller
            steps.append(step)
            now = estimate(config, half=half, gpu=gpu)
            if now.host + now.gpu <= target:
                break
        if not steps:
            kept = f" These keys were not changed: {', '.join(sorted(fixed))}." if fixed else ""
            raise MemoryShortError(
                f"no plan fits into memory. The smallest attempt, {step_in_words(config)}: {words}.{kept} Free some "
                "memory, allow more with --max-memory-gb, or plan on another machine."
            )
        changed = ", ".join(steps)


def _target(outcome: TooMuch, needed: Estimate, most_bytes: int | None) -> float:
    """Return the highest estimate that the next attempt may have; it is reduced in proportion if RAM was the limit."""
    now = needed.host + needed.gpu
    if most_bytes is None or outcome.needed_bytes is None or needed.gpu or outcome.needed_bytes <= PROGRAM_BYTES:
        return _MARGIN * now
    share = (most_bytes - PROGRAM_BYTES) / (outcome.needed_bytes - PROGRAM_BYTES)
    return now * min(_MARGIN, _MARGIN * max(share, 0.0))


def step_in_words(config: RunConfig) -> str:
    """Describe the sizes of a config that determine the memory of a step."""
    training = config.training
    patch, channels = times(training.patch_voxels), list(config.network.channels)
    return f"patch {patch}, batch {training.batch_size}, channels {channels}"
