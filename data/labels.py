"""Label numbers of each convention, and regions.

Inside the program, label maps use the codes :data:`NECROSIS`, :data:`OEDEMA` and :data:`ENHANCING`; files use the
numbers of their :class:`LabelConvention`. Sources: the BraTS 2018 and 2019 task pages (upenn.edu), the scoring scripts
of BraTS 2023 (rachitsaluja/BraTS-2023-Metrics, metrics.py) and 2024 (metrics_GLI.py, metrics_PED.py), the dataset.json
of the Medical Segmentation Decathlon, nnU-Net's conversions (nnunetv2/dataset_conversion).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, cast

import numpy as np
import numpy.typing as npt

from data.errors import DataError

Contrast = Literal["t1", "t1c", "t2", "flair"]
Region = Literal["WT", "TC", "ET"]

#: Channel order used throughout the project.
CONTRASTS: Final[tuple[Contrast, ...]] = ("t1", "t1c", "t2", "flair")
#: Region order used throughout the project: whole tumour, tumour core, enhancing tumour.
REGIONS: Final[tuple[Region, ...]] = ("WT", "TC", "ET")

#: Codes used inside the program, independent of the numbers in a file.
BACKGROUND: Final = 0
NECROSIS: Final = 1
OEDEMA: Final = 2
ENHANCING: Final = 3
#: Further codes returned by :func:`decode_tissues` for tissues that the three regions do not distinguish.
CAVITY: Final = 4
CYST: Final = 5

_REGION_CODES: Final[dict[Region, tuple[int, ...]]] = {
    "WT": (NECROSIS, OEDEMA, ENHANCING),
    "TC": (NECROSIS, ENHANCING),
    "ET": (ENHANCING,),
}


@dataclass(frozen=True, kw_only=True)
class LabelConvention:
    """The numbers that one family of data sets uses in its label maps."""

    name: str
    """Name on the command line, such as ``brats2021``."""
    necrosis: int
    """Necrotic (and non-enhancing) core."""
    oedema: int
    """Oedema / invaded tissue."""
    enhancing: int
    """Enhancing tumour."""
    also_necrosis: tuple[int, ...] = ()
    """Further numbers for non-enhancing core; read as necrosis, never written."""
    cysts: tuple[int, ...] = ()
    """The members of ``also_necrosis`` that mean cysts."""
    also_background: tuple[int, ...] = ()
    """Numbers for tissue outside all three regions (resection cavity); read as background, never written."""

    @property
    def values(self) -> tuple[int, ...]:
        """The numbers written for the three tissues, in the order of the program's codes 1, 2, 3."""
        return (self.necrosis, self.oedema, self.enhancing)

    @property
    def by_tissue(self) -> dict[str, int]:
        """The same numbers by the name of the tissue."""
        return dict(zip(("necrosis", "oedema", "enhancing"), self.values, strict=True))

    @property
    def codes(self) -> dict[int, int]:
        """Maps every number that may occur in a file to the program's code."""
        return {
            BACKGROUND: BACKGROUND,
            **dict.fromkeys(self.also_background, BACKGROUND),
            **dict.fromkeys(self.also_necrosis, NECROSIS),
            **dict(zip(self.values, (NECROSIS, OEDEMA, ENHANCING), strict=True)),
        }


#: BraTS 2017 to 2022, UCSF-PDGM.
BRATS2021: Final = LabelConvention(name="brats2021", necrosis=1, oedema=2, enhancing=4)
#: BraTS 2023; also BraTS 2024 cases without a resection.
BRATS2023: Final = LabelConvention(name="brats2023", necrosis=1, oedema=2, enhancing=3)
#: BraTS 2024 GLI and MET after treatment: 4 is the resection cavity, which is not part of the whole tumour.
BRATS2024: Final = LabelConvention(name="brats2024", necrosis=1, oedema=2, enhancing=3, also_background=(4,))
#: BraTS 2024 PED: 2 is the non-enhancing core, 3 the cysts, which belong to the tumour core.
BRATS2024_PED: Final = LabelConvention(
    name="brats2024-ped", necrosis=2, oedema=4, enhancing=1, also_necrosis=(3,), cysts=(3,)
)
#: BRATS 2012 to 2016: 1 is necrosis, 3 the non-enhancing core.
BRATS2015: Final = LabelConvention(name="brats2015", necrosis=1, oedema=2, enhancing=4, also_necrosis=(3,))
#: Medical Segmentation Decathlon, Task01, and nnU-Net's conversions of BraTS.
MSD: Final = LabelConvention(name="msd", necrosis=2, oedema=1, enhancing=3)
CONVENTIONS: Final[dict[str, LabelConvention]] = {
    c.name: c for c in (BRATS2021, BRATS2023, BRATS2024, BRATS2024_PED, BRATS2015, MSD)
}

#: What the names and the layout of a data set imply about its label numbers:
#: ``brats2021``, ``brats2023``: files are named as in these years; ``gli``: case ids of the tasks GLI and MET, where 4
#: is a resection cavity; ``ped``, ``brats2015``, ``msd``: case ids or layout of these data sets.
Naming = Literal["brats2021", "brats2023", "gli", "ped", "brats2015", "msd"]


def written_convention(naming: Naming | None) -> LabelConvention | None:
    """The convention for writing predictions of cases with this naming; None if the naming does not determine it."""
    return CONVENTIONS["brats2023" if naming == "gli" else naming] if naming not in {None, "ped"} else None


def convention_named(name: str) -> LabelConvention:
    """Look up a convention by its name, as given to ``--labels``.

    Raises:
        DataError: no convention has this name; the message lists the conventions.
    """
    if name not in CONVENTIONS:
        raise DataError(f"no label convention is named {name!r}. Give one of {', '.join(CONVENTIONS)}.")
    return CONVENTIONS[name]


def decide_convention(
    values: Iterable[int], *, naming: Naming | None = None, case_folders: bool = True
) -> LabelConvention:
    """Infer the label convention from all values in a data set and from its names.

    Pass the values of all cases together, because a single case may have no enhancing tumour. In BraTS case folders a 4
    means BraTS 2017-2022 and a 3 means BraTS 2023; if neither occurs, the file names decide. Elsewhere 1, 2, 3 could
    also be the Medical Segmentation Decathlon's numbers, which swap oedema and core, so nothing is guessed.

    Args:
        values: all label values that occur; 0 is allowed.
        naming: what the names imply, None if they imply nothing.
        case_folders: whether each case has its own folder, as in the releases of BraTS.

    Returns:
        the convention.

    Raises:
        DataError: a value belongs to no convention, or the values fit several conventions with different meanings.

    Example:
        >>> decide_convention([0, 1, 2, 4]).enhancing
        4
        >>> decide_convention([0, 1, 2, 3], naming="msd").oedema
        1
    """
    seen = {int(v) for v in values}
    require_known_values(seen)
    if not seen - {BACKGROUND}:
        return written_convention(naming) or BRATS2021
    if naming in ("gli", "ped", "brats2015", "msd"):
        return _of_family(seen, naming)
    if {3, 4} <= seen:
        raise DataError(
            "label values 3 and 4 occur together, so it is unclear which is enhancing tumour: 4 in BraTS 2017-2022, 3 "
            "in BraTS 2023. Keep data sets of different years in different folders; if it is one data set, "
            f"{_flag(BRATS2024, BRATS2024_PED, BRATS2015)}."
        )
    if not case_folders and 4 not in seen and (naming is None or (naming == "brats2021" and 3 in seen)):
        raise _ambiguous(seen, "without names or a description that identify the data set", BRATS2023, MSD, BRATS2021)
    by_number = BRATS2021 if 4 in seen else BRATS2023 if 3 in seen else None
    return by_number or written_convention(naming) or BRATS2021


def values_in(label_map: npt.NDArray[np.generic]) -> Sequence[float]:
    """The distinct values of a label map, ascending.

    Example:
        >>> values_in(np.array([4, 0, 4], dtype=np.uint8))
        [0, 4]
    """
    if label_map.dtype != np.uint8:
        return cast("list[float]", np.unique(label_map).tolist())
    present = np.zeros(256, dtype=np.bool_)
    present[label_map] = True
    return cast("list[float]", np.flatnonzero(present).tolist())


def require_known_values(values: Iterable[int]) -> None:
    """Reject values that belong to no convention.

    Raises:
        DataError: there are such values; the message lists them.
    """
    foreign = set(values) - {0, 1, 2, 3, 4}
    if foreign:
        raise DataError(
            f"label values {sorted(foreign)} belong to no known convention; allowed are 0, 1, 2 and 4 "
            "(BraTS 2017-2022), 0, 1, 2 and 3 (BraTS 2023, MSD) or 0 to 4 (BraTS 2024, BRATS 2012-2016). Convert the "
            "label maps first."
        )


def _of_family(seen: set[int], family: Naming) -> LabelConvention:
    """The convention of a data set whose case ids or layout identify its family; at most the year is left to infer."""
    if family == "brats2015":
        return BRATS2015
    if family == "msd" and {3, 4} <= seen:
        raise _ambiguous(seen, "under the names of the Decathlon, whose labels are 1, 2 and 3,", *CONVENTIONS.values())
    if family == "msd":
        return BRATS2021 if 4 in seen else MSD
    if family == "ped" and 4 not in seen:
        raise _ambiguous(seen, "of the PED task, without a 4 anywhere,", BRATS2023, BRATS2024_PED)
    if family == "ped":
        return BRATS2024_PED
    if 4 in seen and 3 not in seen:
        raise _ambiguous(seen, "with a 4 and no 3 under names of GLI or MET", BRATS2021, BRATS2024)
    return BRATS2024 if 4 in seen else BRATS2023


def _ambiguous(seen: set[int], where: str, *possible: LabelConvention) -> DataError:
    values = ", ".join(str(value) for value in sorted(seen))
    return DataError(f"label values {values} {where} can be read in several ways: {_flag(*possible)}.")


def _flag(*possible: LabelConvention) -> str:
    """The advice to use ``--labels``, with the meaning of the numbers in each possible convention."""
    named = (f"{c.name} (necrosis {c.necrosis}, oedema {c.oedema}, enhancing {c.enhancing})" for c in possible)
    return f"give the right convention with --labels: {', '.join(named)}"


_TISSUE_WORDS: Final = (
    # The first match wins: words for cavities come first, and "non-enhancing" before "enhancing".
    (BACKGROUND, re.compile(r"background|cavity|\brc\b|unlabel")),
    (NECROSIS, re.compile(r"necro|non.?enh|\bncr|\bnetc?\b|cyst|\bcc\b|\bncr/net\b")),
    (OEDEMA, re.compile(r"o?edema|\bed\b|snfh|flair|invaded|infiltrat")),
    (ENHANCING, re.compile(r"enhanc|\bet\b|\bat\b|active")),
)
_REGION_WORDS: Final[tuple[tuple[Region, re.Pattern[str]], ...]] = (
    ("WT", re.compile(r"whole|\bwt\b")),
    ("TC", re.compile(r"core|\btc\b")),
    ("ET", re.compile(r"(?<!non.)(?<!non)enhanc|\bet\b")),
)


def convention_of_names(names: Mapping[str, tuple[int, ...]]) -> LabelConvention | None:
    """Infer the convention from names of labels or regions, such as those in a dataset.json.

    Args:
        names: the numbers of each name, such as ``{"edema": (1,), ...}`` or ``{"whole tumor": (1, 2, 3), ...}``.

    Returns:
        the convention; None if a name identifies no tissue (``"label 1"``) or no known convention matches.

    Example:
        >>> convention_of_names({"background": (0,), "NCR": (1,), "ED": (2,), "ET": (3,)}).name
        'brats2023'
        >>> convention_of_names({"whole tumor": (1, 2, 3), "tumor core": (2, 3), "enhancing tumor": (3,)}).name
        'msd'
    """
    words = {re.sub(r"[_\s]+", " ", name.lower()): numbers for name, numbers in names.items()}
    if any(len(numbers) > 1 for numbers in words.values()):
        found = {region: set(n) for region, word in _REGION_WORDS for name, n in words.items() if word.search(name)}
        if set(found) != set(REGIONS):
            return None
        return next(
            (
                c
                for c in CONVENTIONS.values()
                if all(found[region] == _numbers(c, region) for region in REGIONS)
                and all(set(numbers) <= c.codes.keys() for numbers in words.values())
            ),
            None,
        )
    codes: dict[int, int] = {}
    for name, numbers in words.items():
        code = next((code for code, word in _TISSUE_WORDS if word.search(name)), None)
        if code is None:
            return None
        codes |= dict.fromkeys(numbers, code)
    if not {NECROSIS, OEDEMA, ENHANCING} <= set(codes.values()):
        return None
    codes.setdefault(BACKGROUND, BACKGROUND)
    fitting = [c for c in CONVENTIONS.values() if codes.items() <= c.codes.items()]
    return next((c for c in fitting if c.codes == codes), fitting[0] if fitting else None)


def _numbers(convention: LabelConvention, region: Region) -> set[int]:
    return {number for number, code in convention.codes.items() if code in _REGION_CODES[region]}


def decode(label_map: npt.NDArray[np.generic], convention: LabelConvention) -> npt.NDArray[np.uint8]:
    """Translate a file's label numbers to the program's codes.

    Args:
        label_map: any shape, whole numbers (floats such as 4.0 are accepted).
        convention: the meaning of the numbers.

    Returns:
        uint8 array of the same shape with the codes 0 to 3.

    Raises:
        DataError: a value is not a whole number or not in the convention.

    Example:
        >>> decode(np.array([0, 4, 2]), BRATS2021).tolist()
        [0, 3, 2]
    """
    return _translated(label_map, convention, convention.codes)


def decode_tissues(label_map: npt.NDArray[np.generic], convention: LabelConvention) -> npt.NDArray[np.uint8]:
    """Like :func:`decode`, with separate codes for resection cavities and cysts, which BraTS 2024 rules score.

    Args:
        label_map: any shape, whole numbers.
        convention: the meaning of the numbers.

    Returns:
        uint8 array of the same shape with the codes 0 to 3, :data:`CAVITY` and :data:`CYST`.

    Raises:
        DataError: see :func:`decode`.

    Example:
        >>> decode_tissues(np.array([4, 3, 0]), BRATS2024).tolist()
        [4, 3, 0]
    """
    of_their_own = dict.fromkeys(convention.also_background, CAVITY) | dict.fromkeys(convention.cysts, CYST)
    return _translated(label_map, convention, convention.codes | of_their_own)


def _translated(
    label_map: npt.NDArray[np.generic], convention: LabelConvention, codes: Mapping[int, int]
) -> npt.NDArray[np.uint8]:
    """The code of every voxel, from a lookup table by label number."""
    foreign = [float(v) for v in values_in(label_map) if float(v) not in codes]
    if foreign:
        shown = ", ".join(f"{v:g}" for v in foreign[:8])
        raise DataError(
            f"label values {shown} are not in the convention {convention.name}, which allows "
            f"{', '.join(str(v) for v in sorted(codes))}. Convert the label map, or leave the case out."
        )
    table = np.zeros(256, dtype=np.uint8)
    table[list(codes)] = list(codes.values())
    decoded: npt.NDArray[np.uint8] = table[label_map.astype(np.uint8, copy=False)]
    return decoded


def encode(codes: npt.NDArray[np.uint8], convention: LabelConvention) -> npt.NDArray[np.uint8]:
    """Translate the program's codes to a file's label numbers; ``decode(encode(codes, c), c)`` equals ``codes``.

    Example:
        >>> encode(np.array([0, 3, 2], dtype=np.uint8), BRATS2021).tolist()
        [0, 4, 2]
    """
    table = np.array([0, *convention.values], dtype=np.uint8)
    return table[codes]


def to_regions(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Split a label map in the program's codes into region masks.

    Args:
        codes: shape (X, Y, Z), values 0 to 3.

    Returns:
        bool array of shape (3, X, Y, Z) in the order of :data:`REGIONS`; WT contains TC, TC contains ET.
    """
    enhancing = codes == ENHANCING
    core = enhancing | (codes == NECROSIS)
    return np.stack([codes != BACKGROUND, core, enhancing])


def from_regions(masks: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Merge region masks, nested or not, into a label map in the program's codes.

    The larger region takes precedence: a voxel outside WT is background whatever TC and ET are, and one outside TC is
    oedema whatever ET is, so the regions of the result are nested.

    Args:
        masks: bool, shape (3, X, Y, Z), order of :data:`REGIONS`.

    Returns:
        uint8, shape (X, Y, Z); ``from_regions(to_regions(codes))`` equals ``codes``.
    """
    whole, core, enhancing = masks
    codes = np.where(whole, OEDEMA, BACKGROUND).astype(np.uint8)
    codes[whole & core] = NECROSIS
    codes[whole & core & enhancing] = ENHANCING
    return codes


def region_codes(region: Region) -> tuple[int, ...]:
    """The program's codes that make up a region, such as (1, 3) for TC."""
    return _REGION_CODES[region]
