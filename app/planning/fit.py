"""Try a plan, and make it smaller until it fits."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any, Final

from app.config.load import RunConfig
from app.errors import MemoryShortError
from app.planning.dry_run import Needed, TooMuch, held_words
from app.planning.estimate import Estimate, estimate
from app.planning.rules import PROGRAM_BYTES, smaller_network

#: Maximum number of attempts; a plan has fewer steps down than this.
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

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A config that ran, and the resources it took."""

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

    If the memory of an attempt is known, smaller configs that by estimate still need too much are skipped.

    Args:
        config: config of the plan.
        try_out: runs some steps of a config.
        most_bytes: RAM that may be used; None if it is not known.
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
        words = f"fits, with {held_words(outcome.own_bytes)}" if isinstance(outcome, Needed) else outcome.why
        attempts.append(_attempt(config, changed, words))
        if isinstance(outcome, Needed):
            return Fitted(config=config, needed=outcome, attempts=tuple(attempts))
        held = estimate(config, half=half, gpu=gpu)
        target = _target(outcome, held, most_bytes)
        steps = []
        following = smaller_network(config, fixed=fixed)
        while following is not None and len(attempts) < _MOST_ATTEMPTS:
            config, step = following
            steps.append(step)
            now = estimate(config, half=half, gpu=gpu)
            following = smaller_network(config, fixed=fixed)
            if now.host + now.gpu <= target or following is None:
                break
        if not steps:
            kept = f" The settings {', '.join(sorted(fixed))} were not touched." if fixed else ""
            raise MemoryShortError(
                f"no plan fits into memory. The smallest attempt, {_in_words(attempts[-1])}: {words}.{kept} Free some "
                "memory, allow more with --max-memory-gb, or plan on another machine."
            )
        changed = ", ".join(steps)


def _target(outcome: TooMuch, held: Estimate, most_bytes: int | None) -> float:
    """Maximum estimate for the next attempt; reduced in proportion if the bound was RAM."""
    now = held.host + held.gpu
    if most_bytes is None or outcome.needed_bytes is None or held.gpu or outcome.needed_bytes <= PROGRAM_BYTES:
        return _MARGIN * now
    share = (most_bytes - PROGRAM_BYTES) / (outcome.needed_bytes - PROGRAM_BYTES)
    return now * min(_MARGIN, _MARGIN * max(share, 0.0))


def _attempt(config: RunConfig, changed: str, outcome: str) -> Attempt:
    return Attempt(
        patch_voxels=config.training.patch_voxels,
        batch_size=config.training.batch_size,
        channels=config.network.channels,
        changed=changed,
        outcome=outcome,
    )


def _in_words(attempt: Attempt) -> str:
    patch = "x".join(str(side) for side in attempt.patch_voxels)
    return f"patch {patch}, batch {attempt.batch_size}, channels {list(attempt.channels)}"
