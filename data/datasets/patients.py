"""Infer the patient of a case from its id, and find ids that may be visits of one patient.

Sources: the naming of BraTS 2012 to 2024; the BIDS specification (``sub-<label>_ses-<label>``); the collections
UPENN-GBM, UCSF-PDGM, UCSD-PTGBM, RHUH-GBM, MU-Glioma-Post and TCGA-GBM of The Cancer Imaging Archive.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Final

#: Ids whose final number is a visit.
_WITH_VISIT: Final = tuple(
    re.compile(rf"^(?P<patient>{pattern}$", re.IGNORECASE)
    for pattern in (
        r"BraTS-[A-Z]+(?:-RT)?-\d+)-\d+",  # 2023 and later: patient, time point
        r"Brats1[789]_.+)_\d+",  # 2017 to 2019: site, patient, scan
        r"brats_(?:20\d\d|tcia)_pat\d+)_\d+",  # 2012 to 2016: patient, scan
        r"UCSF-PDGM-\d+)_FU\d+d",  # follow-up after this number of days
        r"UPENN-GBM-\d+)_\d+",  # 11 before surgery, 21 at follow-up
        r"UCSD-PTGBM-\d+)_\d+",
        r"RHUH-(?:GBM-)?\d+)[-_]\d",
        r"sub-[a-z0-9]+)(?:_[a-z]+-[a-z0-9]+)+",  # BIDS: anything after the subject
    )
)
#: Ids whose final number is a patient.
_WITHOUT_VISIT: Final = re.compile(
    r"^(?:BraTS2021_\d+|BraTS20_(?:Training|Validation|Testing)_\d+|BRATS_\d{3}|UCSF-PDGM-\d+|UPENN-GBM-\d+|TCGA-\w\w-\w{4}"
    r"|sub-[a-z0-9]+)$",
    re.IGNORECASE,
)
_SEPARATOR: Final = r"[-_. ]"
#: Words that number the visits of one patient, whatever precedes them. A suffix may describe processing of the image
#: (``Timepoint_1_brain``).
_NUMBERED: Final = (
    rf"(?:tp|time{_SEPARATOR}?point|ses|session|visit){_SEPARATOR}?[a-z]?\d{{1,3}}[a-z]?(?:{_SEPARATOR}[^\d]*)?"
    r"|ses-[a-z0-9]+"
)
_DAY, _MONTH, _YEAR = r"(?:0[1-9]|[12]\d|3[01])", r"(?:0[1-9]|1[0-2])", r"(?:19|20)\d\d"
_DATE: Final = (
    rf"(?:{_YEAR}(?P<first>[-_.]?){_MONTH}(?P=first){_DAY}|{_DAY}(?P<second>[-_.]){_MONTH}(?P=second){_YEAR})"
    r"(?:[-_T ]?\d{4}(?:\d\d)?)?"
)
#: Words that mean a visit only after something that identifies a patient: cohorts also have names like
#: ``GBM_baseline``.
_DATED: Final = (
    rf"{_DATE}"
    rf"|(?:day|week|month|year|time|run)s?{_SEPARATOR}?\d{{1,4}}(?:-\d)?"
    r"|\d{1,4}[-_]?(?:days?|weeks?|wks?|mo|months?|yrs?|years?)"
    rf"|(?:follow[-_]?up|fu){_SEPARATOR}?\d{{0,2}}|baseline|bl|initial|recurrence"
    rf"|(?:pre|post)(?:{_SEPARATOR}?(?:op|operative|treatment|therapy|surgery|rt|crt|chemo))?"
)
_VISIT: Final = (
    re.compile(rf"^(?P<patient>.+?){_SEPARATOR}(?:{_NUMBERED})$", re.IGNORECASE),
    re.compile(rf"^(?P<patient>.*\d.*?){_SEPARATOR}(?:{_DATED})$", re.IGNORECASE),
)
#: Patterns that may or may not indicate a visit.
_MAYBE: Final = (
    re.compile(rf"^(?P<patient>.+?){_SEPARATOR}(?:{_DATED})$", re.IGNORECASE),
    re.compile(rf"^(?:{_NUMBERED}|{_DATED}){_SEPARATOR}(?P<patient>.*\d.*)$", re.IGNORECASE),
    re.compile(rf"^(?P<patient>.*\d.*){_SEPARATOR}(?:scan|exam|study|mri?|v|t|m|w|d|y){_SEPARATOR}?\d{{1,4}}$", re.I),
    re.compile(rf"^(?P<patient>.*\d.*){_SEPARATOR}(?:\d{{1,3}}[dwmy]?|\d{{6}})$", re.IGNORECASE),
    re.compile(rf"^(?P<patient>.*\d){_SEPARATOR}?[a-h]$", re.IGNORECASE),
)
#: If more cases than this share a prefix, they are a numbered cohort, not visits.
_MOST_VISITS: Final = 8
#: Longer ids cannot name files, and matching them against the visit patterns would be slow.
_LONGEST_ID: Final = 255


def patient_of(case_id: str) -> str:
    """Infer from its id which patient a case belongs to; all cases of a patient stay in the same part of a split.

    The result depends only on this id, not on the other cases, because data sets grow and prediction has no data set.

    Example:
        >>> [patient_of(case_id) for case_id in ("BraTS-GLI-00012-001", "sub-01_ses-2", "P7_2019-03-12", "case_2")]
        ['BraTS-GLI-00012', 'sub-01', 'P7', 'case_2']
    """
    if _WITHOUT_VISIT.match(case_id) or len(case_id) > _LONGEST_ID:
        return case_id
    for pattern in _WITH_VISIT:
        if (match := pattern.match(case_id)) is not None:
            return match["patient"]
    for pattern in _VISIT:
        if (match := pattern.match(case_id)) is not None:
            return patient_of(match["patient"])  # P7_visit2_20190312
    return case_id


def patient_by_older_versions(case_id: str) -> str:
    """The patient as inferred by versions before 2026-12, so that comparisons started with them keep their splits."""
    patterns = (r"(BraTS-[A-Z]+(?:-RT)?-\d+)-\d+", r"(Brats1[789]_.+)_\d+", r"(UCSF-PDGM-\d+)_FU\d+d")
    matches = (re.fullmatch(pattern, case_id, re.IGNORECASE) for pattern in patterns)
    return next((match[1] for match in matches if match is not None), case_id)


def grouped_by_words(case_ids: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Groups of cases, by patient, whose ids contain a word or date for a visit and follow no known data set's naming.

    Example:
        >>> grouped_by_words(["P7_tp1", "P7_tp2", "P8_tp1", "sub-01_ses-1", "sub-01_ses-2"])
        {'P7': ('P7_tp1', 'P7_tp2')}
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for case_id in sorted(case_ids):
        if patient_of(case_id) != case_id and not any(pattern.match(case_id) for pattern in _WITH_VISIT):
            groups[patient_of(case_id)].append(case_id)
    return {patient: tuple(ids) for patient, ids in groups.items() if len(ids) > 1}


def possible_visits(patients: Mapping[str, str], stated: Collection[str] = ()) -> tuple[tuple[str, ...], ...]:
    """Groups of cases whose ids look like visits of one patient although they count as several patients.

    Args:
        patients: the patient of every case, by case id.
        stated: ids of cases whose patient is stated elsewhere and need not be guessed.

    Returns:
        the sorted ids of each group, without groups too large for one patient; empty if all ids share one prefix.

    Example:
        >>> possible_visits({case_id: case_id for case_id in ("P01_1", "P01_2", "P02_1", "case_1", "case_2")})
        (('P01_1', 'P01_2'),)
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for case_id in sorted(patients):
        decided = case_id in stated or patients[case_id] != case_id or _WITHOUT_VISIT.match(case_id)
        groups[patients[case_id] if decided else _beginning(case_id)].append(case_id)
    if len(groups) < 2:
        return ()
    return tuple(
        tuple(ids)
        for _, ids in sorted(groups.items())
        if len({patients[case_id] for case_id in ids}) > 1 and len(ids) <= _MOST_VISITS
    )


def _beginning(case_id: str) -> str:
    """The presumed patient if the end of an id may be a visit; otherwise the id itself."""
    for pattern in _MAYBE if len(case_id) <= _LONGEST_ID else ():
        if (match := pattern.match(case_id)) is not None:
            return match["patient"]
    return case_id
