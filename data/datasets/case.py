"""One case: its files, and the problems found with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from data.contrasts import missing_contrasts, reference_contrast
from data.datasets.naming import composed
from data.datasets.patients import patient_of
from data.errors import DataError
from data.files import MOST_NAME_BYTES
from data.labels import CONTRASTS, CONVENTIONS, Contrast, LabelConvention, Naming, written_convention

MOST_ID_BYTES: Final = MOST_NAME_BYTES - len(".nii.gz")
_LONGEST_SHOWN: Final = 80
_SHOWN: Final = 6


@dataclass(frozen=True, kw_only=True)
class Case:
    """The files of one case, and the problems found with them."""

    id: str
    """Case id: the part of the file names before the contrast, in composed Unicode form (NFC)."""
    folder: Path
    contrasts: dict[Contrast, Path] = field(default_factory=dict)
    """The file of each contrast found, in project order."""
    volumes: dict[Contrast, int] = field(default_factory=dict)
    """For contrasts stored in a 4D file, the index of their volume."""
    label: Path | None = None
    """The label map, if there is one."""
    naming: Naming | None = None
    """What the file names imply about the label numbers; None if nothing."""
    declared: str | None = None
    """Name of the label convention stated in the data set's description; None if it states none."""
    case_folder: bool = True
    """Whether the case has its own folder, as in the releases of BraTS."""
    stated_patient: str | None = None
    """The patient as stated in a manifest; None if it states none."""
    unrecognised: tuple[str, ...] = ()
    """Names of files, columns or channels that match no contrast; one of them may be a missing contrast."""
    problems: tuple[str, ...] = ()
    """One sentence per problem; empty if every contrast was found exactly once and nothing else is wrong."""
    data_set: int = 0
    """Number of its data set, from 0, among the data sets that are used together."""
    synthetic: bool = False
    """Whether its images are generated for every patch (:mod:`data.patches.synthetic`) instead of read from files."""

    def __post_init__(self) -> None:
        """Normalise the id, so that ids from files, manifests and splits compare equal whatever their Unicode form."""
        object.__setattr__(self, "id", composed(self.id))
        object.__setattr__(self, "contrasts", {c: self.contrasts[c] for c in CONTRASTS if c in self.contrasts})

    @property
    def patient(self) -> str:
        """The patient of the case: as stated in a manifest, else derived from the id."""
        return self.stated_patient if self.stated_patient is not None else patient_of(self.id)

    @property
    def files(self) -> tuple[Path, ...]:
        """The contrasts and the label map, each file once."""
        return tuple(dict.fromkeys(path for path in (*self.contrasts.values(), self.label) if path is not None))

    @property
    def written_convention(self) -> LabelConvention | None:
        """The convention for label maps written for this case; None if neither description nor names determine it."""
        return CONVENTIONS[self.declared] if self.declared is not None else written_convention(self.naming)

    @property
    def reference(self) -> Contrast:
        """The contrast whose grid label maps are written on; at least one contrast is required."""
        return reference_contrast(self.contrasts)

    def require(self, *, all_contrasts: bool = True) -> Case:
        """Return the case itself if it has no problems.

        Args:
            all_contrasts: whether all four contrasts are required; if False, one is enough.

        Raises:
            DataError: a contrast is missing, present twice or behind a symlink that leaves the data folder, or the id
                is not usable as a file name.
        """
        problems = self.problems
        if not all_contrasts and self.contrasts:
            absent = missing_problems(self.contrasts, self.unrecognised)
            problems = tuple(problem for problem in problems if problem not in absent)
        problems = problems or tuple(id_problems(self.id))
        if problems:
            name = (
                self.id if self.id.isprintable() and len(self.id) <= _LONGEST_SHOWN else repr(self.id[:_LONGEST_SHOWN])
            )
            raise DataError(f"case {name}: " + "; ".join(problems))
        return self


def id_problems(case_id: str) -> list[str]:
    """One sentence if a case id cannot serve as a file name, as it does in output and cache folders; else empty."""
    if any("\udc80" <= sign <= "\udcff" for sign in case_id):
        return [
            f"the name {case_id!r} is not valid UTF-8; it comes from a system with another encoding. "
            "Rename the files, for instance with convmv -f latin1 -t utf8 --notest"
        ]
    size = len(case_id.encode(errors="replace"))
    if size > MOST_ID_BYTES:
        return [
            f"the id is {size} bytes long; the limit of {MOST_NAME_BYTES} for a file name leaves {MOST_ID_BYTES} "
            "before .nii.gz. Give the case a shorter id"
        ]
    bad = [part for part in ("..", "/", "\\") if part in case_id]
    if case_id.isprintable() and case_id and not case_id.startswith(".") and not bad:
        return []
    return [f"{case_id!r} cannot be used in file names: no leading dot, no '..', no slash. Rename the case"]


def missing_problems(contrasts: Iterable[Contrast], unrecognised: Sequence[str] = ()) -> list[str]:
    """One sentence about the missing contrasts; empty if there are none."""
    absent = missing_contrasts(set(contrasts))
    if not absent:
        return []
    several = len(absent) > 1
    missing = f"contrasts {', '.join(absent)} are missing" if several else f"contrast {absent[0]} is missing"
    file = "their files" if several else "its file"
    if not unrecognised:
        return [f"{missing}. Add {file}, or leave the case out"]
    if_there = "If they are among these, rename them" if several else "If it is among these, rename it"
    return [
        f"{missing}, and these names match no contrast: {some_names(unrecognised)}. {if_there}: a file ends in "
        f"_{absent[0]}, a column or a channel is named {absent[0]}; or state the {'files' if several else 'file'} in a "
        f"manifest (.csv: case, t1, t1c, t2, flair, seg). Otherwise add {file}, or leave the case out"
    ]


def some_names(names: Sequence[str]) -> str:
    """The first few names, made printable, and the number of the others."""
    shown = ", ".join(name if name.isprintable() else repr(name) for name in names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
