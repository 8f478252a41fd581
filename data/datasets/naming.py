"""Infer the contrast and the family of data sets from file names, case ids and channel names.

Patients are inferred in data/datasets/patients.py. Sources: the data set conversions of nnU-Net
(nnunetv2/dataset_conversion), the BraTS data descriptions of 2018 to 2024, the dataset.json of the Medical Segmentation
Decathlon, the collections UCSF-PDGM and UPENN-GBM of The Cancer Imaging Archive, the BIDS specification (``_T1w``,
``ce-gadolinium``).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Final

from data.labels import Contrast, Naming

#: Characters between the parts of a contrast's name; a case id ends before one of ``_CASE_ENDS``.
_SEPARATOR: Final = r"[-_+. ]*"
_CASE_ENDS: Final = "-_"
#: Words for a T1 after gadolinium (km is German: Kontrastmittel), and for one before it.
_AFTER: Final = (
    rf"(?:w?ce|ce[-_](?:gd|gad|gadolinium)|c|cm|km|w?gd|gad|gado|gadolinium|gadovist|dotarem|cw|(?:\+|plus){_SEPARATOR}(?:c|gd)?"
    rf"|(?:with|w){_SEPARATOR}(?:contrast|gd|gad|gadolinium)|post{_SEPARATOR}(?:c|ce|gd|gad|gadolinium|contrast|con|km)?"
    rf"|contrast{_SEPARATOR}(?:enhanced)?|enhanced|enh|kontrast(?:mittel)?)"
)
_BEFORE: Final = (
    rf"(?:n|nc|nativ|native|nce|plain|unenhanced|pre{_SEPARATOR}(?:c|ce|gd|gad|gadolinium|contrast|con|km)?"
    rf"|(?:non|no|without|wo){_SEPARATOR}(?:contrast|gd|gad|gadolinium|enhanced))"
)
#: Words for the acquisition, which say nothing about the contrast.
_TAKEN: Final = (
    r"(?:mprage|mpr|mp2rage|spgr|fspgr|bravo|tfe|ffe|vibe|space|cube|vista|tse|fse|frfse|se|gre|ax|axial|sag|sagittal"
    r"|cor|coronal|tra|transversal|transverse|3d|2d|iso)"
)
_WEIGHTED: Final = rf"(?:wi?|{_SEPARATOR}weighted)?"
_T1: Final = rf"t1{_WEIGHTED}(?:{_SEPARATOR}{_TAKEN})*"
_T2: Final = rf"t2{_WEIGHTED}"
#: BIDS entities between session and contrast.
_ENTITIES: Final = r"(?:_[a-z]+-[a-z0-9]+)*"
_GIVEN: Final = rf"ce-(?!none)[a-z0-9]+{_ENTITIES}"
_PATTERNS: Final[tuple[tuple[Contrast, str], ...]] = (
    ("t1c", rf"{_T1}{_SEPARATOR}{_AFTER}(?:{_SEPARATOR}{_TAKEN})*"),
    ("t1c", rf"(?:{_AFTER}|{_GIVEN}|acq-post[a-z0-9]*){_SEPARATOR}{_T1}"),
    ("t1", rf"{_T1}(?:{_SEPARATOR}{_BEFORE}(?:{_SEPARATOR}{_TAKEN})*)?"),
    ("t1", rf"(?:{_BEFORE}|ce-none|acq-pre[a-z0-9]*){_SEPARATOR}{_T1}"),
    (
        "flair",
        rf"(?:{_T2}{_SEPARATOR})?(?:flair|fla|fl|tirm|dark{_SEPARATOR}fluid|tirm{_SEPARATOR}dark{_SEPARATOR}fluid)"
        rf"(?:{_SEPARATOR}{_TAKEN})*",
    ),
    ("flair", r"t2f"),
    ("t2", rf"{_T2}(?:{_SEPARATOR}{_TAKEN})*"),
)
_CONTRASTS: Final = tuple(
    (contrast, re.compile(rf"(?:{_TAKEN}{_SEPARATOR})*(?:{pattern})", re.IGNORECASE)) for contrast, pattern in _PATTERNS
)
#: Longer endings are never a contrast, so the patterns need not search them.
_LONGEST_ENDING: Final = 80
_LABEL_WORDS: Final = ("seg", "segm", "tumor_segmentation", "glistrboost_manuallycorrected")
#: A radiotherapy target, as in BraTS 2024 MEN-RT, has no tumour regions.
_TARGET_WORDS: Final = ("gtv",)
_BIAS: Final = "_bias"
_BIDS: Final = re.compile(rf"^(?P<session>sub-[a-z0-9]+(?:_ses-[a-z0-9]+)?)(?P<entities>{_ENTITIES})$", re.IGNORECASE)
#: Endings that reveal the year even without case folders; t1c, t2w and flair are used everywhere.
ENDINGS_OF_A_YEAR: Final = {"t1n", "t2f", "t1ce"}
#: File name suffixes of the contrasts in BraTS 2018-2021.
SUFFIXES_2021: Final[dict[Contrast, str]] = {"t1": "t1", "t1c": "t1ce", "t2": "t2", "flair": "flair"}
_WORDS_OF_2021: Final = {"t1ce", "flair"}
_WORDS_OF_2023: Final = {"t1n", "t1c", "t2w", "t2f"}
_FAMILIES: Final[tuple[tuple[str, Naming], ...]] = (
    (r"BraTS-(GLI|MET)-\d", "gli"),
    (r"BraTS-PEDs?-\d", "ped"),
    (r"BraTS-(SSA|MEN|MEN-RT)-\d", "brats2023"),
    (r"BraTS(17|18|19|20|2021)_", "brats2021"),
    (r"UCSF-PDGM-\d", "brats2021"),
    (r"brats_(2012|2013|2014|2015|tcia)_pat", "brats2015"),
    (r"(?-i:BRATS_\d{3})$", "msd"),
)


#: Endings of files saved next to a predicted label map under the same case id; they are not label maps.
COMPANION_ENDINGS: Final = ("_probabilities", "_uncertainty", "_disagreement")


#: Prefix of the ids of synthetic cases; the rest is the id of the real case whose label map they use.
SYNTHETIC_ID: Final = "synthetic-"


_BIDS_FILE: Final = re.compile(r"^sub-[a-z0-9]+_", re.IGNORECASE)
_GIVEN_AT_END: Final = re.compile(rf"_{_GIVEN}$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class FileName:
    """The parts of a file name without its extension: ``UCSF-PDGM-0004``, ``t1c``, corrected."""

    case: str
    ending: str
    """Lower case, without ``_bias``."""
    corrected: bool = False
    """Whether the name ends in ``_bias``, that is, the bias field was corrected."""

    @property
    def contrast(self) -> Contrast | None:
        """The contrast, or None for a label map or a radiotherapy target."""
        return contrast_of(self.ending)

    @property
    def is_label(self) -> bool:
        """Whether it is a label map."""
        return self.ending in _LABEL_WORDS

    @property
    def is_target(self) -> bool:
        """Whether it is a radiotherapy target."""
        return self.ending in _TARGET_WORDS


def composed(name: str) -> str:
    r"""Convert a name to composed Unicode form (NFC), in which names are compared; macOS returns the decomposed form.

    Example:
        >>> composed("Jose\u0301") == "Jos\u00e9"
        True
    """
    return unicodedata.normalize("NFC", name)


def real_id(case_id: str) -> str:
    """The id of the real case whose label map a case uses: the id without the prefix of synthetic cases.

    Example:
        >>> real_id("synthetic-BraTS2021_00000"), real_id("BraTS2021_00000")
        ('BraTS2021_00000', 'BraTS2021_00000')
    """
    return case_id.removeprefix(SYNTHETIC_ID)


def split_name(name: str) -> FileName | None:
    """Split a file name (without .nii.gz) that ends in a contrast or in a word for label maps; None for other names.

    If it can be split in several ways, the longest case id wins; :func:`split_names` also considers the other files of
    a folder.

    Example:
        >>> split_name("BraTS-GLI-00012-001-t2W").contrast
        't2'
    """
    readings = _readings(name)
    return readings[0] if readings else None


def split_names(names: Sequence[str]) -> list[FileName | None]:
    """Split each of the file names of one folder.

    Next to ``P_t1``, ``P_t2_flair`` is the T2-FLAIR of P; next to ``P_t2_t1``, it is the FLAIR of P_t2. If a name can
    be split in several ways, the case id that fits most files wins and, on a tie, the longest one. BIDS entities
    between session and contrast (``acq-3D``, ``run-1``) belong to the case id only if all files of the session share
    them.

    Example:
        >>> [name.case for name in split_names(["P_t1", "P_t2_flair"])]
        ['P', 'P']
    """
    readings = [_readings(name) for name in names]
    support = Counter(case for own in readings for case in {reading.case for reading in own})
    chosen = [max(own, key=lambda reading: support[reading.case]) if own else None for own in readings]
    sessions: dict[str, set[str]] = defaultdict(set)
    for name in chosen:
        if name is not None and (match := _BIDS.match(name.case)) is not None:
            sessions[match["session"]].add(name.case)
    several = {case: session for session, cases in sessions.items() if len(cases) > 1 for case in cases}
    return [replace(name, case=several.get(name.case, name.case)) if name is not None else None for name in chosen]


def _readings(name: str) -> list[FileName]:
    """Every way to split a file name, the longest case id first."""
    name = composed(name)
    bare = name[: -len(_BIAS)] if name.lower().endswith(_BIAS) else name
    in_bids = _BIDS_FILE.match(bare) is not None
    found = []
    for at in range(len(bare) - 2, max(0, len(bare) - _LONGEST_ENDING), -1):
        case, ending = bare[:at], bare[at + 1 :].lower()
        if bare[at] not in ("_" if in_bids else _CASE_ENDS) or not case.strip(_CASE_ENDS):
            continue
        contrast = contrast_of(ending)
        if contrast is None and (bare != name or ending not in (*_LABEL_WORDS, *_TARGET_WORDS)):
            continue
        if in_bids and contrast == "t1" and _GIVEN_AT_END.search(case):
            continue  # a T1 after a contrast agent, that is, a T1c
        found.append(FileName(case=case, ending=ending, corrected=bare != name))
    return found


@cache
def contrast_of(words: str) -> Contrast | None:
    """The contrast that a file, channel or column is named after, in any spelling, or None.

    Example:
        >>> [contrast_of(words) for words in ("T1w", "t1-ce", "T1 post", "T2", "t2_flair", "t2_star", "MRI")]
        ['t1', 't1c', 't1c', 't2', 'flair', None, None]
    """
    bare = re.sub(r"[^a-z0-9+._-]+", " ", words.lower()).strip(" .-_")
    if len(bare) > _LONGEST_ENDING:
        return None
    return next((contrast for contrast, pattern in _CONTRASTS if pattern.fullmatch(bare)), None)


def naming_of(case_id: str, endings: Collection[str] = ()) -> Naming | None:
    """What a case id, or else the endings of its files, implies about its label numbers; None if nothing.

    Args:
        case_id: such as ``BraTS-GLI-00012-001``.
        endings: the parts of its file names after the id, in lower case.

    Example:
        >>> naming_of("BraTS-PED-00003-000"), naming_of("a", {"t1n", "t2f"}), naming_of("a")
        ('ped', 'brats2023', None)
    """
    for pattern, naming in _FAMILIES:
        if re.match(pattern, case_id, re.IGNORECASE):
            return naming
    years: list[Naming] = []
    years += ["brats2021"] if _WORDS_OF_2021 & set(endings) else []
    years += ["brats2023"] if _WORDS_OF_2023 & set(endings) else []
    return years[0] if len(years) == 1 else None
