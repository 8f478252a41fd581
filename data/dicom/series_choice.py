"""Identify the T1, T1c, T2 and FLAIR series of a study, and explain why the other series are none of them.

A series' name (SeriesDescription, else ProtocolName) and its timing are judged separately; if they contradict each
other, the series is not assigned. The limits in ms separate the usual protocols at 1.5 and 3 T: T1 has short echo and
repetition times or, as in MPRAGE, an inversion time below 1.3 s; T2 has a long echo time; FLAIR has a long echo time
and an inversion time above 1.3 s, which nulls fluid (Bernstein, King and Zhou, Handbook of MRI Pulse Sequences, 2004,
chapter 14).
Names follow vendors' conventions in English, German, French, Italian, Spanish and Portuguese.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final

from data.dicom.series import Acquisition, Series
from data.errors import DataError
from data.labels import CONTRASTS, Contrast

#: A series with fewer slices is a localizer or a test, not a brain.
FEWEST_SLICES: Final = 5
#: If a series holds more volumes than this, they are time points or an echo train.
MOST_VOLUMES: Final = 3

_FLAIR_INVERSION_MS: Final = 1300.0
_T1_INVERSION_MS: Final = 400.0
_LONG_ECHO_MS: Final = 60.0
_SHORT_ECHO_MS: Final = 40.0
_LONG_REPETITION_MS: Final = 1500.0
_SHORT_GRADIENT_ECHO_MS: Final = 15.0


@dataclass(frozen=True)
class SeriesFinding:
    """The contrast assigned to a series."""

    contrast: Contrast | None
    reason: str
    """Why the series is that contrast, or none."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The series chosen for one contrast."""

    series: Series
    reason: str


def identify(series: Series) -> SeriesFinding:
    """Identify the contrast of a series from its name and its timing, with the reason for the decision."""
    acquisition = series.acquisition
    if (excluded := next(_exclusions(series), None)) is not None:
        return SeriesFinding(None, excluded)
    named, timed = _named(acquisition), _timed(acquisition)
    kind = _agreed(named, timed, acquisition)
    hint = _hint_of_reformat(acquisition)
    why = "; ".join(
        [
            *([f"name {_name(acquisition)!r}"] if named is not None else []),
            *filter(None, [timing(acquisition)]),
            *([f"{hint!r} in its name may mean a reformat, which its header does not confirm"] if hint else []),
        ]
    )
    if kind is None and named is None and timed is None:
        return SeriesFinding(None, f"neither its name nor its timing indicates a contrast ({why or 'empty'})")
    if kind is None:
        said, measured = _KINDS.get(named or "", "nothing"), _KINDS.get(timed or "", "nothing")
        return SeriesFinding(
            None, f"contradictory: its name says {said}, its timing {measured} ({timing(acquisition)})"
        )
    if kind in _NO_CONTRASTS:
        return SeriesFinding(None, f"{_NO_CONTRASTS[kind]} ({why})")
    if kind != "t1":
        return SeriesFinding("t2" if kind == "t2" else "flair", why)
    after, evidence = _is_after_agent(acquisition)
    return SeriesFinding("t1c" if after else "t1", f"{why}; {evidence}")


def choose_series(
    series: Sequence[Series],
    chosen: Mapping[Contrast, str] | None = None,
    *,
    wanted: Sequence[Contrast] = CONTRASTS,
) -> dict[Contrast, Choice]:
    """Choose one series for each contrast.

    Args:
        series: the volumes of one study.
        chosen: series given by the user, by number (``5``, ``5/2``) or SeriesInstanceUID.
        wanted: the contrasts required.

    Returns:
        a series with a reason for each required contrast, in that order.

    Raises:
        DataError: a contrast has no series or several; a given series does not exist, was given twice, or is not a
            complete volume. Every message names the option that resolves it.
    """
    by_hand = {contrast: find(series, key, f"--{contrast}") for contrast, key in (chosen or {}).items()}
    for (contrast, one), (other, another) in combinations(by_hand.items(), 2):
        if one is another:
            raise DataError(f"series {one.key} was chosen as --{contrast} and as --{other}. Choose one for each.")
    findings = [(one, identify(one)) for one in series if not any(one is taken for taken in by_hand.values())]
    result: dict[Contrast, Choice] = {}
    problems = []
    for contrast in wanted:
        if contrast in by_hand:
            result[contrast] = Choice(series=by_hand[contrast], reason=f"chosen with --{contrast}")
            continue
        candidates = _best([(one, finding) for one, finding in findings if finding.contrast == contrast])
        if len(candidates) == 1:
            result[contrast] = Choice(series=candidates[0][0], reason=candidates[0][1].reason)
        elif candidates:
            shown = ", ".join(describe_series(one) for one, _ in candidates)
            problems.append(f"{len(candidates)} series may be the {contrast}: {shown}; choose with --{contrast} SERIES")
        else:
            problems.append(
                f"no series was recognised as the {contrast}; if there is one, choose it with --{contrast} SERIES"
            )
    if problems:
        raise DataError(
            "; ".join(problems)
            + ". `znormseg data dicom STUDY` lists the series; SERIES is the first column."
            + _hint_of_scattered_slices(series)
        )
    for contrast, choice in result.items():
        modality = choice.series.acquisition.modality
        problems = (
            [f"modality {modality or 'not stated'}, not MR"] if modality != "MR" else list(choice.series.problems)
        )
        if problems:
            raise DataError(
                f"{contrast}: series {describe_series(choice.series)}: {problems[0]}. "
                f"Export it again, or choose another with --{contrast} SERIES."
            )
    return result


def _hint_of_scattered_slices(series: Sequence[Series]) -> str:
    """Advice if slices of one volume seem to be stored as one series each and could not be joined; else empty."""
    single = [one for one in series if one.acquisition.modality == "MR" and len(one.frames) == 1]
    if len(single) < FEWEST_SLICES:
        return ""
    return (
        f" {len(single)} series hold one slice each. If these are slices of one volume, they could not be joined: "
        "their SeriesInstanceUIDs differ, and so do their series numbers, orientations, descriptions, timing or frames "
        "of reference. "
        "Give the slices of a volume one SeriesInstanceUID, or export the study as enhanced DICOM."
    )


def series_of(series: Sequence[Series], name: str) -> Series:
    """Look up a series by contrast, number or UID.

    Raises:
        DataError: see :func:`choose_series` and :func:`find`.
    """
    for contrast in CONTRASTS:
        if name.lower() == contrast:
            return choose_series(series, wanted=(contrast,))[contrast].series
    return find(series, name, "--reference")


def find(series: Sequence[Series], key: str, option: str) -> Series:
    """Look up a series by number or UID.

    Raises:
        DataError: no series matches, or several do; the message names ``option``.
    """
    wanted = key.strip()
    found = [one for one in series if wanted == one.key] or [
        one for one in series if wanted in (one.uid, str(one.number), *filter(None, one.uids))
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        raise DataError(f"{option} {wanted}: no such series. There are {', '.join(one.key for one in series)}.")
    shown = ", ".join(describe_series(one) for one in found)
    raise DataError(f"{option} {wanted}: {len(found)} volumes match: {shown}. Give one of them by its first word.")


def describe_series(series: Series) -> str:
    """A short description of a series: key, description, timing."""
    parts = [f"{_name(series.acquisition)!r}", timing(series.acquisition)]
    return f"{series.key} ({', '.join(part for part in parts if part)})"


def timing(acquisition: Acquisition) -> str:
    """TE, TR and TI as text, without those that the header lacks.

    Example:
        >>> timing(Acquisition(echo_ms=98.0, repetition_ms=4500.0))
        'TE 98 ms, TR 4500 ms'
    """
    values = (("TE", acquisition.echo_ms), ("TR", acquisition.repetition_ms), ("TI", acquisition.inversion_ms))
    return ", ".join(f"{name} {value:.4g} ms" for name, value in values if value is not None)


def to_json(series: Series, finding: SeriesFinding) -> dict[str, Any]:
    """Plain data about a series, without patient data."""
    spacing = series.spacing_mm
    acquisition = series.acquisition
    return {
        "series": series.key,
        "uid": series.uid,
        "description": _name(acquisition),
        "modality": acquisition.modality,
        "slices": len(series.frames),
        "shape": list(series.shape),
        "spacing_mm": None if spacing is None else [round(mm, 4) for mm in spacing],
        "echo_ms": acquisition.echo_ms,
        "repetition_ms": acquisition.repetition_ms,
        "inversion_ms": acquisition.inversion_ms,
        "recognised_as": finding.contrast,
        "reason": finding.reason,
        "problems": list(series.problems),
        "notes": list(series.notes),
    }


_KINDS: Final = {"t1": "T1", "t2": "T2", "flair": "FLAIR", "pd": "proton density", "stir": "STIR", "t2star": "T2*"}
_NO_CONTRASTS: Final = {
    "pd": "proton density",
    "stir": "a short inversion that nulls fat (STIR)",
    "t2star": "T2*: gradient echo with a long echo time",
}


def _best(candidates: list[tuple[Series, SeriesFinding]]) -> list[tuple[Series, SeriesFinding]]:
    """Filter candidates: prefer original images to derived ones, then names without a hint of a reformat.

    Among those left, complete volumes are preferred to damaged ones.
    """
    original = [one for one in candidates if "DERIVED" not in one[0].acquisition.image_type[:1]] or candidates
    plain = [one for one in original if _hint_of_reformat(one[0].acquisition) is None] or original
    return [one for one in plain if not one[0].problems] or plain


def _hint_of_reformat(acquisition: Acquisition) -> str | None:
    """A word in the name of a non-original image that suggests a reformat; None if there is none."""
    if acquisition.image_type[:1] == ("ORIGINAL",):
        return None
    hint = _MAYBE_REFORMATTED_NAMES.search(_plain(_name(acquisition)))
    return None if hint is None else hint[0]


def _name(acquisition: Acquisition) -> str:
    return acquisition.description or acquisition.protocol


def _plain(name: str) -> str:
    """A name in lower case with symbols replaced by words: ``T1_SE+C`` becomes ``t1 se contrast``."""
    plain = name.lower()
    for sign, word in (("t2*", " t2star "), ("w/o", " without "), ("s/c", " sem contraste "), ("+/-", " ")):
        plain = plain.replace(sign, word)
    plain = re.sub(r"(?<![a-z])c-(?![a-z0-9])|(?<!\S)-c(?![a-z0-9])", " without contrast ", plain)
    plain = re.sub(r"\+ ?(c|km|gd|gad|ce|mdc|contrast|k)(?![a-z])|(?<![a-z])c\+", " contrast ", plain)
    return " ".join(re.findall(r"[^\W_]+", plain))


_EXCLUDED_NAMES: Final = tuple(
    (re.compile(rf"\b(?:{pattern})\b"), reason)
    for pattern, reason in (
        (
            r"loc|\w*locali[sz]\w*|lokali\w*|scout|\w*scout|survey|pilot|topogram\w*|[23] ?planes?|three planes?|3 ?pl",
            "a localizer",
        ),
        (r"\w*dwi\w*|dw|\w*diff\w*|dti|e?adc|trace\w*|tensor|ivim|dki|colfa|b ?(?:0|500|800|1000)", "diffusion"),
        (r"\w*perf\w*|pwi|dsc|dce|p?c?asl|r?cbf|r?cbv|mtt|ttp|tmax|twist|perfusie", "perfusion"),
        (r"swip?|swan\w*|venobold|t2star\w*|t2 star|\w*hemo\w*|qsm|pha images?", "susceptibility"),
        (r"tof\w*|(?:ce ?)?mr[av]|\w*angio\w*|pca|[23]d ?pc|phase contrast|venogra\w*", "angiography"),
        (r"\w*spectro\w*|mrs|csi\w*|svs\w*", "spectroscopy"),
        (r"\w*fmri\w*|bold\w*|resting|moco\w*", "functional"),
        (r"mip|minip|mnip|mip images?", "a projection"),
        (r"sub|subtr\w*|subtraktion|sottrazione|difference", "a subtraction"),
        (r"t[12] ?map\w*|field ?map\w*|\w*mapping|\w*calib\w*|ref ?scan|asset\w*|b1 ?map|inv ?[12]", "a map"),
        (r"stir", "a short inversion that nulls fat (STIR)"),
        (r"ciss\w*|fiesta\w*|b ?ffe", "cisternography"),
        (r"\w*spine\w*|[hbl]ws|lumbar|wirbel\w*|neck|hals", "not the brain"),
    )
)
#: Words that mark a reformat if the image does not claim to be original. ``mpr`` and ``recon`` are not proof: Siemens
#: calls an MPRAGE ``t1_mpr``, and scanners reconstruct every acquisition.
_REFORMATTED_NAMES: Final = re.compile(r"\b(?:reformat\w*|curved)\b")
_MAYBE_REFORMATTED_NAMES: Final = re.compile(r"\b(?:mprs?|reko?\w*|recon\w*)\b")
#: Context group 7203 (Image Derivation, DICOM PS3.16).
_EXCLUDED_DERIVATIONS: Final = {
    "113072": "reformatted",
    "113073": "reformatted",
    "113078": "a projection",
    "113079": "a projection",
    "113062": "a subtraction",
}
#: Values of ImageType, by reason.
_EXCLUDED_TYPES: Final = {
    "a localizer": ("LOCALIZER",),
    "diffusion": ("ADC", "TRACEW", "FA", "DIFFUSION"),
    "perfusion": ("ASL", "PERFUSION", "CBF", "CBV", "MTT", "TTP"),
    "reformatted": ("MPR", "REFORMATTED"),
    "a projection": ("PROJECTION IMAGE", "MIP", "MNIP", "MINIP", "MIN IP"),
    "a subtraction": ("SUB", "SUBTRACTION"),
    "a phase image": ("P", "PHASE", "PHASE MAP"),
    "an imaginary part": ("I", "IMAGINARY"),
    "a mosaic": ("MOSAIC",),
    "functional": ("FMRI",),
    "a map": ("T1 MAP", "T2 MAP", "MAP"),
    "susceptibility": ("SWI",),
    "a picture of a screen": ("SCREEN SAVE",),
}


def _exclusions(series: Series) -> Iterator[str]:
    """Reasons why a series cannot be one of the four contrasts, whatever its timing."""
    acquisition, slices = series.acquisition, len(series.frames)
    image_type = "/".join(acquisition.image_type)
    if acquisition.modality != "MR":
        yield f"modality {acquisition.modality or 'not stated'}, not MR"
    if not series.frames[0].file.has_voxels:
        yield "it holds no image"
    for word in acquisition.image_type[2:]:
        yield from (f"{reason} (ImageType {image_type})" for reason, words in _EXCLUDED_TYPES.items() if word in words)
    for code in acquisition.derivation:
        if code in _EXCLUDED_DERIVATIONS:
            yield f"{_EXCLUDED_DERIVATIONS[code]} (DerivationCodeSequence {code})"
    name = _plain(_name(acquisition))
    for pattern, reason in _EXCLUDED_NAMES:
        if pattern.search(name):
            yield f"{reason} (name {_name(acquisition)!r})"
    is_reformatted = acquisition.image_type[:1] != ("ORIGINAL",) and bool(_REFORMATTED_NAMES.search(name))
    others = (
        (acquisition.image_type[1:2] == ("SECONDARY",), f"derived from other images (ImageType {image_type})"),
        (is_reformatted, f"reformatted (name {_name(acquisition)!r})"),
        (bool(acquisition.b_value), f"diffusion (b-value {acquisition.b_value or 0:g} s/mm2)"),
        ("EP" in acquisition.scanning, "echo-planar: diffusion, perfusion or functional"),
        (
            series.volumes_in_series > MOST_VOLUMES,
            f"one of {series.volumes_in_series} volumes of its series: dynamic, or many echoes",
        ),
        ("SPINE" in acquisition.body_part, "not the brain (BodyPartExamined)"),
        (slices < FEWEST_SLICES, f"{slices} {'slice' if slices == 1 else 'slices'}: a localizer or a test"),
    )
    yield from (reason for applies, reason in others if applies)


_T1_NAME: Final = re.compile(
    r"\b[a-z]?(?:[23]d)?t1|\b(?:mp ?rage|mp2rage|bravo|\w*spgr|tfe|vibe|tfl\w*|fl[23]d\w*|flash)\b"
)
_T2_NAME: Final = re.compile(r"\b[a-z]?(?:[23]d)?t2")
_FLAIR_NAME: Final = re.compile(r"flair|dark ?fl|\bda ?fl\b|\btirm\b|\btir[23]d|\bt2f\b")
_PD_NAME: Final = re.compile(r"\b(?:pdw?|proton density|dp|rho)\b|densit")


def _named(acquisition: Acquisition) -> str | None:
    """The kind suggested by the name: t1, t2, flair, pd, or ``echoes`` for proton density and T2 combined."""
    for name in (acquisition.description, acquisition.protocol):
        plain = _plain(name)
        first, second = bool(_T1_NAME.search(plain)), bool(_T2_NAME.search(plain))
        if first and second:
            continue
        if first:
            return "t1"
        if _FLAIR_NAME.search(plain):
            return "flair"
        if _PD_NAME.search(plain):
            return "echoes" if second else "pd"
        if second:
            return "t2"
    return None


def _timed(acquisition: Acquisition) -> str | None:  # noqa: PLR0911 - one return per kind
    """The kind suggested by the timing; None if it is inconclusive."""
    echo, repetition, inversion = acquisition.echo_ms, acquisition.repetition_ms, acquisition.inversion_ms or 0.0
    if echo is None or repetition is None:
        return None
    is_gradient = "GR" in acquisition.scanning and "SE" not in acquisition.scanning
    if inversion >= _FLAIR_INVERSION_MS:
        return "flair" if echo >= _LONG_ECHO_MS else None
    if inversion >= _T1_INVERSION_MS:
        return "t1" if echo < _SHORT_ECHO_MS else None
    if inversion > 0:
        return "stir"
    if is_gradient:
        return "t1" if echo < _SHORT_GRADIENT_ECHO_MS else "t2star"
    if repetition >= _LONG_REPETITION_MS:
        return "t2" if echo >= _LONG_ECHO_MS else "pd"
    return "t1" if echo < _SHORT_ECHO_MS else None


def _agreed(named: str | None, timed: str | None, acquisition: Acquisition) -> str | None:
    """The kind that name and timing agree on; None if there is none or they contradict each other."""
    if named is None or named == timed:
        return timed
    if timed is None:
        return None if named == "echoes" else named
    accepted = {
        ("echoes", "pd"): "pd",
        ("echoes", "t2"): "t2",
        ("pd", "t2"): "t2",  # the second echo of a series named after its first
        ("t2", "pd"): "pd",
        ("t2", "flair"): "flair",
        ("flair", "t2"): "flair" if not acquisition.inversion_ms else None,  # the inversion time may be missing
        ("t1", "pd"): "t1" if (acquisition.echo_ms or 0.0) < _SHORT_ECHO_MS else None,  # also for T1 FLAIR and MPRAGE
    }
    return accepted.get((named, timed))


_CONTRAST_WORD: Final = (
    r"contrast\w*|kontr\w*|enhanced|km|gd\w*|gad\w*|ce|mdc|mezzo di contrasto|inject\w*|inyec\w*|dotarem|"
    r"magnevist|multihance|prohance|omniscan|clariscan|elucirem|vueway"
)
_BEFORE: Final = re.compile(
    r"\b(?:(?:without|wo|w o|ohne|vor|voor|zonder|sans|avant|senza|sin|sem|no|non|pre|before|prima) ?(?:iv |i v )?"
    rf"(?:{_CONTRAST_WORD})"
    r"|kontrastsiz\w*|pre|vor|avant|antes|nativ\w*|plain|unenhanced|basal)\b"
)
_AFTER: Final = re.compile(
    rf"\b(?:{_CONTRAST_WORD}|post(?! ?(?:op\w*|surg\w*|rt|radi\w*|chemo\w*|treat\w*|proc\w*))|postcontrast|"
    r"nach|apres|apr\u00e8s|dopo|despues|t1w?(?:c|ce|gd|km|post))\b"
)
_NO_AGENT: Final = {"", "NO", "NONE", "N/A", "NA", "0", "OHNE", "NATIV", "WITHOUT", "NO CONTRAST", "KEIN", "KEINE"}


def _is_after_agent(acquisition: Acquisition) -> tuple[bool, str]:
    """Whether a T1 was acquired after the contrast agent, and the evidence: its name, else a header attribute."""
    plain = _plain(_name(acquisition))
    before = _BEFORE.search(plain)
    after = _AFTER.search(_BEFORE.sub(" ", plain))
    if after is not None and before is None:
        return True, f"{after[0]!r} in its name"
    if before is not None and after is None:
        return False, f"{before[0]!r} in its name"
    agent = acquisition.agent
    if agent is not None and agent.upper().strip(". ") not in _NO_AGENT:
        return True, "a contrast agent in its header"
    return False, "no contrast agent in name or header"
