"""What file names, case ids and channel names tell: the contrast, the patient, the family of data sets.

Sources: the data set conversions of nnU-Net (nnunetv2/dataset_conversion), the BraTS data descriptions of 2018 to 2024,
the dataset.json of the Medical Segmentation Decathlon, the UCSF-PDGM collection of The Cancer Imaging Archive.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from data.labels import Contrast, Naming

_CONTRAST_WORDS: Final[dict[str, Contrast]] = {
    "t1": "t1",
    "t1n": "t1",
    "t1w": "t1",
    "t1ce": "t1c",
    "t1c": "t1c",
    "t1gd": "t1c",
    "t1cw": "t1c",
    "t1wce": "t1c",
    "t1wgd": "t1c",
    "t1post": "t1c",
    "t2": "t2",
    "t2w": "t2",
    "flair": "flair",
    "t2f": "flair",
}
#: Words that stand for a contrast in a table or a dataset.json alone, as a file name splits at their hyphen.
_CONTRAST_PHRASES: Final[dict[str, Contrast]] = {"t2flair": "flair", "fl": "flair", "t1native": "t1"}
_LABEL_WORDS: Final = ("seg", "segm", "tumor_segmentation", "glistrboost_manuallycorrected")
#: A target of radiotherapy, as in BraTS 2024 MEN-RT: no tumour regions.
_TARGET_WORDS: Final = ("gtv",)
_ENDINGS: Final = "|".join(sorted([*_CONTRAST_WORDS, *_LABEL_WORDS, *_TARGET_WORDS], key=len, reverse=True))
_FILE: Final = re.compile(rf"^(?P<case>.+)[_-](?P<ending>{_ENDINGS})(?P<corrected>_bias)?$", re.IGNORECASE | re.DOTALL)
_WORDS_OF_2021: Final = {"t1ce", "flair"}
_WORDS_OF_2023: Final = {"t1n", "t1c", "t2w", "t2f"}
_PATIENT: Final = (
    re.compile(r"^(?P<patient>BraTS-[A-Z]+(?:-RT)?-\d+)-\d+$", re.IGNORECASE),  # 2023 and later: patient, time point
    re.compile(r"^(?P<patient>Brats1[789]_.+)_\d+$", re.IGNORECASE),  # 2017 to 2019: site, patient, scan
    re.compile(r"^(?P<patient>UCSF-PDGM-\d+)_FU\d+d$", re.IGNORECASE),  # a scan so many days later
)
_FAMILIES: Final[tuple[tuple[str, Naming], ...]] = (
    (r"BraTS-(GLI|MET)-\d", "gli"),
    (r"BraTS-PEDs?-\d", "ped"),
    (r"BraTS-(SSA|MEN|MEN-RT)-\d", "brats2023"),
    (r"BraTS(17|18|19|20|2021)_", "brats2021"),
    (r"UCSF-PDGM-\d", "brats2021"),
    (r"brats_(2012|2013|2014|2015|tcia)_pat", "brats2015"),
    (r"(?-i:BRATS_\d{3})$", "msd"),
)


#: What files beside a predicted label map are named after its case: no label maps.
COMPANION_ENDINGS: Final = ("_probabilities", "_uncertainty", "_disagreement")


@dataclass(frozen=True, kw_only=True)
class FileName:
    """The parts of a file name without its ending: ``UCSF-PDGM-0004``, ``t1c``, corrected."""

    case: str
    ending: str
    """In lower case, without ``_bias``."""
    corrected: bool = False
    """Whether ``_bias`` follows: the bias field was corrected."""

    @property
    def contrast(self) -> Contrast | None:
        """The contrast, or None for a label map or a target of radiotherapy."""
        return _CONTRAST_WORDS.get(self.ending)

    @property
    def is_label(self) -> bool:
        """Whether it is a label map."""
        return self.ending in _LABEL_WORDS

    @property
    def is_target(self) -> bool:
        """Whether it is a target of radiotherapy."""
        return self.ending in _TARGET_WORDS


def split_name(name: str) -> FileName | None:
    """The parts of a file name (without .nii.gz) that ends in a contrast or in a word for label maps, else None.

    Example:
        >>> split_name("BraTS-GLI-00012-001-t2W").contrast
        't2'
    """
    match = _FILE.match(name)
    if match is None or (match["corrected"] and match["ending"].lower() not in _CONTRAST_WORDS):
        return None
    return FileName(case=match["case"], ending=match["ending"].lower(), corrected=match["corrected"] is not None)


def contrast_of(words: str) -> Contrast | None:
    """The contrast that a channel or a column is named after, however it is spelled, or None.

    Example:
        >>> [contrast_of(words) for words in ("T1w", "t1-ce", "T2", "FLAIR", "MRI")]
        ['t1', 't1c', 't2', 'flair', None]
    """
    bare = re.sub(r"[^a-z0-9]", "", words.lower())
    return _CONTRAST_WORDS.get(bare) or _CONTRAST_PHRASES.get(bare)


def naming_of(case_id: str, endings: Collection[str] = ()) -> Naming | None:
    """What a case's id, else the endings of its files, tell of its label numbers; None where they do not.

    Args:
        case_id: such as ``BraTS-GLI-00012-001``.
        endings: what follows the id in the names of its files, in lower case.

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


def patient_of(case_id: str) -> str:
    """The patient a case belongs to; cases of one patient never part in a split.

    Example:
        >>> patient_of("BraTS-GLI-00012-001")
        'BraTS-GLI-00012'
    """
    for pattern in _PATIENT:
        match = pattern.match(case_id)
        if match is not None:
            return match["patient"]
    return case_id
