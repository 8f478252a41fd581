"""Data sets and how to read them, in one value: a command's DATA, ``--labels`` and ``--follow-links``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Final

from data.datasets.label_stats import LabelMap, values_of
from data.datasets.layouts import Case, decide_for, find_cases, find_label_cases
from data.datasets.naming import SYNTHETIC_ID
from data.errors import DataError
from data.labels import LabelConvention

#: Beginning of a DATA argument that stands for synthetic cases.
SYNTHETIC_ARGUMENT: Final = "synthetic:"


@dataclass(frozen=True)
class DataSource:
    """A data set, or a folder of label maps, and how to read it; with ``others``, several that are used together."""

    root: Path
    """Folder or manifest in any layout of :func:`data.datasets.layouts.find_cases`."""
    _: KW_ONLY
    labels: str | None = None
    """Name of the label convention; None to infer it from the files."""
    follow_links: bool = False
    """Whether to accept symlinks that leave ``root``."""
    synthetic: bool = False
    """Whether to take only the label maps and tissues of its labelled cases; :mod:`data.patches.synthetic` makes the
    images. The cases get other ids, and keep their patients."""
    others: tuple[DataSource, ...] = ()
    """Further data sets, without ``others`` of their own."""

    @property
    def data_sets(self) -> tuple[DataSource, ...]:
        """Each data set by itself; a case's ``data_set`` is its position here."""
        return (replace(self, others=()), *self.others)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The data sets as a command takes them, as :func:`data_source` reads them."""
        return tuple(f"{SYNTHETIC_ARGUMENT if one.synthetic else ''}{one.root}" for one in self.data_sets)

    @property
    def name(self) -> str:
        """The data sets as on a command line, for messages."""
        return " ".join(self.arguments)

    def resolved(self) -> DataSource:
        """The same with absolute paths."""
        return replace(self, root=self.root.resolve(), others=tuple(one.resolved() for one in self.others))

    def with_labels(self, names: Sequence[str]) -> DataSource:
        """The same with the name of a label convention for each data set."""
        first, *others = (replace(one, labels=name) for one, name in zip(self.data_sets, names, strict=True))
        return replace(first, others=tuple(others))

    def find_cases(self) -> dict[str, Case]:
        """Find every case, by id, in the order of the ids.

        Raises:
            DataError: as :func:`data.datasets.layouts.find_cases`; two data sets have cases with the same id; no case
                has a label map to make synthetic images from.
        """
        found: dict[str, list[Case]] = defaultdict(list)
        for number, one in enumerate(self.data_sets):
            for case in one._own_cases():
                found[case.id].append(replace(case, data_set=number))
        twice = [case_id for case_id, cases in found.items() if len(cases) > 1]
        if twice:
            first, second, *_ = found[twice[0]]
            more = f" ({len(twice)} such ids in all)" if len(twice) > 1 else ""
            raise DataError(
                f"case {twice[0]} is in two data sets, in {first.folder} and in {second.folder}{more}. Case ids must "
                "be unique: leave such cases out of one of the data sets, or rename them there (in a manifest, .csv, "
                "no file needs another name)."
            )
        return {case_id: case for case_id, (case,) in sorted(found.items())}

    def find_label_cases(self) -> dict[str, Case]:
        """Find every label map, by case id, as cases that hold nothing else.

        Raises:
            DataError: as :func:`data.datasets.layouts.find_label_cases`.
        """
        return find_label_cases(self.root, follow_links=self.follow_links)

    def decide_convention(self, cases: Mapping[str, Case], label_maps: Mapping[str, LabelMap]) -> LabelConvention:
        """Decide the meaning of a data set's label numbers: by name if ``labels`` is given, else from the files.

        Args:
            cases: all cases, by id.
            label_maps: those of their label maps that can be read, by case id.

        Raises:
            DataError: as :func:`data.datasets.layouts.decide_for`.
        """
        assert not self.others, "each data set has a convention: decide_conventions"
        return decide_for(values_of(cases, label_maps), list(cases.values()), labels=self.labels)

    def decide_conventions(
        self, cases: Mapping[str, Case], label_maps: Mapping[str, LabelMap]
    ) -> tuple[LabelConvention, ...]:
        """Decide the meaning of the label numbers of each data set by itself.

        Args:
            cases: all cases, by id.
            label_maps: those of their label maps that can be read, by case id.

        Raises:
            DataError: as :meth:`decide_convention`; the message names the data set, if there are several.
        """
        decided = []
        for number, one in enumerate(self.data_sets):
            own = {case_id: case for case_id, case in cases.items() if case.data_set == number}
            try:
                decided.append(one.decide_convention(own, label_maps))
            except DataError as error:
                if not self.others:
                    raise
                raise DataError(
                    f"{one.name}: {error} With several data sets, --labels takes one name for each, separated by "
                    "commas."
                ) from error
        return tuple(decided)

    def _own_cases(self) -> tuple[Case, ...]:
        """The cases of a single data set; of a synthetic one, the labelled cases under their synthetic ids."""
        cases = find_cases(self.root, follow_links=self.follow_links)
        if not self.synthetic:
            return cases
        labelled = tuple(
            replace(case, id=f"{SYNTHETIC_ID}{case.id}", stated_patient=case.patient, synthetic=True)
            for case in cases
            if case.label is not None
        )
        if not labelled:
            raise DataError(
                f"{self.name}: none of {len(cases)} cases has a label map (a file that ends in seg), and synthetic "
                "images are made from label maps. Add them, or leave this data set out."
            )
        return labelled


def data_source(arguments: Sequence[str], *, follow_links: bool = False) -> DataSource:
    """Data sets as given on a command line: paths, with ``synthetic:`` before those whose images are made anew.

    Args:
        arguments: at least one.
        follow_links: as :class:`DataSource`, for each of them.

    Example:
        >>> data_source(["CASES", "synthetic:CASES"]).others
        (DataSource(root=PosixPath('CASES'), labels=None, follow_links=False, synthetic=True, others=()),)
    """
    first, *others = (
        DataSource(
            Path(text.removeprefix(SYNTHETIC_ARGUMENT)),
            follow_links=follow_links,
            synthetic=text.startswith(SYNTHETIC_ARGUMENT),
        )
        for text in arguments
    )
    return replace(first, others=tuple(others))
