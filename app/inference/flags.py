"""Warnings to read before relying on a label map; the rules are pure functions of the facts about a case."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from app.inference.confidence import Trust
from app.runs.training_record import UNKNOWN, TrainingRecord
from data.datasets.patients import patient_of
from data.labels import REGIONS, Contrast, Region

#: A whole tumour smaller than this is flagged as tiny: the volume of a ball of 10 mm diameter, the smallest lesion that
#: counts as measurable in the RANO criteria (Wen et al., J Clin Oncol 28, 1963, 2010). A few voxels more or less change
#: such a volume a lot.
TINY_ML: Final = math.pi / 6
#: A whole tumour with more components than this is flagged as scattered; multifocal gliomas have two to a handful. The
#: value is our choice.
MANY_COMPONENTS: Final = 10
#: A whole tumour is also flagged as scattered if its largest component is less than this share of it. Our choice.
LEAST_IN_LARGEST: Final = 0.5
#: A volume is flagged as uncertain if two estimates of it differ by more than this share: half of the 40 % growth in
#: volume that counts as progression in RANO 2.0 (Wen et al., J Clin Oncol 41, 5187, 2023). Such a difference may hide
#: or mimic half of that growth.
UNCERTAIN_SHARE: Final = 0.2
#: The two estimates must also differ by more than this, since faint probabilities all over a brain can add up to as
#: much. Our choice.
UNCERTAIN_ML: Final = 1.0


@dataclass(frozen=True)
class Flag:
    """One thing that a reader of the label map should know."""

    code: str
    """One of :data:`CODES`; codes are stable, sentences may change."""
    sentence: str


#: Every code and its meaning.
CODES: Final[Mapping[str, str]] = {
    "missing_contrast": "a contrast was missing; the network predicted without it",
    "nan_to_zero": "voxels that were NaN or infinite were replaced with 0",
    "background_not_zero": "the background was not 0 (a fill such as -1024, or values near 0) and was replaced with 0",
    "geometry_repaired": "the geometry was not clear from the files; it was reordered, registered, or chosen",
    "preparation": "the preparation of the scans (--prepare) gave a warning, such as a coarse brain mask",
    "unusual_intensities": "the intensities of a contrast are unlike those of the training cases",
    "no_tumour": "no tumour was found",
    "tiny_tumour": "the whole tumour is smaller than a ball of 10 mm diameter",
    "scattered_tumour": "the whole tumour is in many pieces, or the largest has less than half of it",
    "uncertain_volume": "the sum of the probabilities, or single predictions, give another volume than the label map",
    "enhancing_removed": "a presence network found no enhancing tumour, and --presence removed it from the label map",
    "seen_in_training": "this case or another of its patient was used to train the networks or to choose their weights",
}


@dataclass(frozen=True, kw_only=True)
class CaseFacts:
    """Facts about one case that the rules are applied to."""

    case: str
    """Case id."""
    trust: Trust
    missing: tuple[Contrast, ...] = ()
    """Missing contrasts."""
    zeroed: Mapping[Contrast, int]
    """By contrast: number of NaN or infinite voxels that were replaced with 0."""
    backgrounds: Mapping[Contrast, str] = field(default_factory=dict)
    """By contrast: the non-zero background that was replaced with 0, in words."""
    repairs: tuple[str, ...] = ()
    """Corrections of the geometry, one sentence each."""
    preparation: tuple[str, ...] = ()
    """Warnings from the preparation of the scans (``--prepare``), one sentence each."""
    unusual: tuple[Contrast, ...] = ()
    """Contrasts whose intensities are unlike those of the training cases."""
    removed: str = ""
    """What ``--presence`` removed, in one sentence; empty if nothing."""
    training: TrainingRecord = UNKNOWN


def flags_of(facts: CaseFacts) -> tuple[Flag, ...]:
    """Return the flags of a case, in the order of :data:`CODES`."""
    return tuple(_flags(facts))


def _flags(facts: CaseFacts) -> Iterator[Flag]:
    if facts.missing:
        yield Flag(
            "missing_contrast",
            f"Predicted without {_and(facts.missing)}, which {'is' if len(facts.missing) == 1 else 'are'} missing.",
        )
    for contrast, count in facts.zeroed.items():
        yield Flag("nan_to_zero", f"{count} voxels of {contrast} were NaN or infinite and were replaced with 0.")
    for contrast, sentence in facts.backgrounds.items():
        yield Flag("background_not_zero", _sentence(f"{contrast}: {sentence}"))
    for sentence in facts.repairs:
        yield Flag("geometry_repaired", _sentence(sentence))
    for sentence in facts.preparation:
        yield Flag("preparation", _sentence(sentence))
    if facts.unusual:
        unusual = _and(facts.unusual)
        yield Flag("unusual_intensities", f"The intensities of {unusual} are unlike those of the training cases.")
    yield from _tumour_flags(facts.trust)
    if facts.removed:
        yield Flag("enhancing_removed", facts.removed)
    if (seen := _seen(facts.case, facts.training)) is not None:
        yield Flag("seen_in_training", seen)


def _tumour_flags(trust: Trust) -> Iterator[Flag]:
    whole, pieces, largest = trust.volumes_ml["WT"], trust.components["WT"], trust.largest_component
    if not whole:
        yield Flag("no_tumour", "No tumour was found.")
    elif whole < TINY_ML:
        least = f"that of a ball of 10 mm diameter ({TINY_ML:.2f} ml)"
        yield Flag("tiny_tumour", f"The volume of the whole tumour is {whole:.2f} ml, less than {least}.")
    if pieces > MANY_COMPONENTS or 0 < largest < LEAST_IN_LARGEST:
        sentence = f"The whole tumour is in {pieces} pieces; the largest has {largest:.0%} of it."
        yield Flag("scattered_tumour", sentence)
    for region in REGIONS:
        if (uncertain := _uncertain(region, trust)) is not None:
            yield Flag("uncertain_volume", uncertain)


def _uncertain(region: Region, trust: Trust) -> str | None:
    """Return why the volume of a region is uncertain, or None."""
    marked, soft = trust.volumes_ml[region], trust.soft_volumes_ml[region]
    if _apart(marked, soft):
        return f"{region}: the label map has {marked:.1f} ml, but the probabilities add up to {soft:.1f} ml."
    spread = trust.volume_range_ml
    if spread is not None and _apart(*spread[region]):
        least, largest = spread[region]
        return f"{region}: single predictions range from {least:.1f} to {largest:.1f} ml."
    return None


def _apart(one_ml: float, other_ml: float) -> bool:
    difference = abs(one_ml - other_ml)
    return difference > UNCERTAIN_ML and difference > UNCERTAIN_SHARE * max(one_ml, other_ml)


def _seen(case: str, training: TrainingRecord) -> str | None:
    """Return how the case was used in training, or None."""
    if case in training.trained_on:
        return "The networks were trained on this case; its label map does not show how well they predict new cases."
    if case in training.validated_on:
        return "This case was used to choose the networks' weights, so its label map is better than that of a new case."
    if patient_of(case) in {patient_of(other) for other in (*training.trained_on, *training.validated_on)}:
        return "The networks were trained with another scan of this patient."
    return None


def _and(names: tuple[str, ...]) -> str:
    """Join names for a sentence.

    Example:
        >>> _and(("t1", "t2", "flair"))
        't1, t2 and flair'
    """
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."
