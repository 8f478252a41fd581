"""The result type of all checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: ``problem``: the data are unusable, or would teach the network something wrong. ``note``: worth knowing, but usable.
Severity = Literal["problem", "note"]
Kind = Literal[
    "missing contrast",
    "duplicate contrast",
    "names and links",
    "unreadable",
    "another grid",
    "non-finite voxels",
    "empty",
    "constant",
    "background",
    "skull",
    "thick slices",
    "cut field of view",
    "swapped contrasts",
    "another patient",
    "same image",
    "same patient",
    "visits",
    "possible visits",
    "label values",
    "rounded labels",
    "no label map",
    "empty label map",
    "label outside the brain",
    "misplaced label",
    "one-voxel islands",
]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One observation about a case or a data set."""

    kind: Kind
    severity: Severity
    contrast: str | None = None
    """The contrast, or ``label map``; None if the finding concerns the case or the data set as a whole."""
    message: str
    """What was found, as the beginning of a sentence without a full stop."""
    action: str
    """What will be done about it, or what the user should do; may be empty."""

    @property
    def sentence(self) -> str:
        """Contrast, message and action in one line.

        Example:
            >>> Finding(kind="empty", severity="problem", contrast="t2", message="no voxel", action="Add it").sentence
            't2: no voxel. Add it'
        """
        parts = ". ".join(part for part in (self.message, self.action) if part)
        return parts if self.contrast is None else f"{self.contrast}: {parts}"


def problem_from(text: str, *, kind: Kind, contrast: str | None = None) -> Finding:
    """Create a problem from an error's text: its first sentence is the message, the rest the action.

    Example:
        >>> problem_from("a.nii: the file is empty. Copy it again.", kind="unreadable").action
        'Copy it again'
    """
    message, _, action = text.rstrip(".").partition(". ")
    return Finding(kind=kind, severity="problem", contrast=contrast, message=message, action=action)
