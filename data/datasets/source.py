"""A data set and how to read it, in one value: a command's DATA, ``--labels`` and ``--follow-links``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from data.datasets.label_stats import LabelMap, values_of
from data.datasets.layouts import Case, decide_for, find_cases, find_label_cases
from data.labels import LabelConvention


@dataclass(frozen=True)
class DataSource:
    """A data set, or a folder of label maps, and how to read it."""

    root: Path
    """Folder or manifest in any layout of :func:`data.datasets.layouts.find_cases`."""
    _: KW_ONLY
    labels: str | None = None
    """Name of the label convention; None to infer it from the files."""
    follow_links: bool = False
    """Whether to accept symlinks that leave ``root``."""

    def find_cases(self) -> dict[str, Case]:
        """Find every case, by id.

        Raises:
            DataError: as :func:`data.datasets.layouts.find_cases`.
        """
        return {case.id: case for case in find_cases(self.root, follow_links=self.follow_links)}

    def find_label_cases(self) -> dict[str, Case]:
        """Find every label map, by case id, as cases that hold nothing else.

        Raises:
            DataError: as :func:`data.datasets.layouts.find_label_cases`.
        """
        return find_label_cases(self.root, follow_links=self.follow_links)

    def decide_convention(self, cases: Mapping[str, Case], label_maps: Mapping[str, LabelMap]) -> LabelConvention:
        """Decide the meaning of the label numbers: by name if ``labels`` is given, else from the files.

        Args:
            cases: all cases, by id.
            label_maps: those of their label maps that can be read, by case id.

        Raises:
            DataError: as :func:`data.datasets.layouts.decide_for`.
        """
        return decide_for(values_of(cases, label_maps), list(cases.values()), labels=self.labels)
