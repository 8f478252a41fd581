"""docs/errors.md shows errors as they print; ZNORMSEG_REGENERATE=1 writes that part anew: look at the difference.

The tables of tests/test_bad_input.py are shown whole; further rows stand below.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

Call = Callable[..., Any]
Render = Callable[[Path, str], Any]

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "errors.md"
BEGIN, END = "<!-- as printed: written by tests/test_docs_errors.py -->\n", "<!-- as printed: end -->\n"
CASE = "BraTS2021_00000"
#: Progress where there is no terminal; when a line of it comes depends on the machine.
PROGRESS = re.compile(r"^[a-z ]+ +\d+%  ")


def _bad_input() -> Any:
    """The tables of tests/test_bad_input.py, which pytest imports under a name of its own."""
    spec = importlib.util.spec_from_file_location("bad_input", ROOT / "tests" / "test_bad_input.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bad = _bad_input()


class Row(NamedTuple):
    """Something bad, and the command that meets it."""

    title: str
    command: str
    spoil: Callable[[], object]
    code: int
    hidden: tuple[str, ...] = ()
    """Words of the command that the document leaves out: small settings."""


@pytest.fixture
def place(phantoms: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which commands name what they take by short names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    return tmp_path


def fresh(place: Path, phantoms: Path, tiny_run: Path) -> None:
    """Leave the folder with three cases as DATA and a run as RUN, and nothing else."""
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for case in sorted(phantoms.iterdir())[:3]:
        shutil.copytree(case, place / "DATA" / case.name)
    shutil.copytree(tiny_run, place / "RUN")


def nothing() -> None:
    """Leave all as it is."""


def slice_taken_out() -> None:
    """Take the middle slice out of the study's FLAIR."""
    import pydicom

    files = sorted(Path("STUDY/A/S3").iterdir(), key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])
    files[len(files) // 2].unlink()


def of_tables(options: list[str]) -> Iterator[tuple[str, list[Row]]]:
    """The rows of the tables of bad input."""
    small = tuple(options)

    def row(title: str, command: str, spoil: Callable[[Path], object], path: str, code: int, *hidden: str) -> Row:
        return Row(title, command, lambda: spoil(Path(path).absolute()), code, hidden)

    image, label = f"DATA/{CASE}/{CASE}_t2.nii.gz", f"DATA/{CASE}/{CASE}_seg.nii.gz"
    predict, train = f"predict RUN DATA/{CASE} OUT", "train DATA NEW"
    yield "Images", [row(name, predict, spoil, image, 3) for name, (spoil, _) in bad.BAD_IMAGES.items()]
    yield "Label maps", [row(name, train, spoil, label, 3, *small) for name, (spoil, _) in bad.BAD_LABELS.items()]
    yield (
        "Settings",
        [Row(n, f"{train} --set '{setting}'", nothing, 4) for n, (setting, _) in bad.BAD_SETTINGS.items()],
    )
    yield "Runs", [row(name, predict, spoil, "RUN", 5) for name, (spoil, _) in bad.BAD_RUNS.items()]


def written(name: str, text: str) -> Callable[[], object]:
    """Write a file of that text."""
    return lambda: Path(name).write_text(text)


def further(options: list[str], render: Render) -> Iterator[tuple[str, list[Row]]]:
    """Rows beyond those tables."""
    small = tuple(options)

    def rendered(layout: str, then: Callable[[Path], object] = lambda _: None) -> Callable[[], object]:
        return lambda: then(render(Path("SET").absolute(), layout).root)

    def described(**changes: Any) -> Callable[[Path], object]:
        def change(root: Path) -> None:
            content = json.loads((root / "dataset.json").read_text())
            (root / "dataset.json").write_text(json.dumps({**content, **changes}))

        return change

    def predictions(change: Callable[[Path], object]) -> Callable[[], object]:
        def make() -> None:
            Path("OUT").mkdir()
            shutil.copy(f"DATA/{CASE}/{CASE}_seg.nii.gz", f"OUT/{CASE}.nii.gz")
            change(Path(f"OUT/{CASE}.nii.gz").absolute())

        return make

    yield (
        "Data sets",
        [
            Row("not there", "data check NOWHERE", nothing, 3),
            Row("no case in it", "data check EMPTY", lambda: Path("EMPTY").mkdir(), 3),
            Row("a link out of it", "predict RUN DATA OUT", lambda: bad.link(Path("DATA").absolute(), "data set"), 3),
            Row("label numbers that tell no year", "train SET NEW", rendered("flat"), 3, small),
            Row("an unknown name of label numbers", "train DATA NEW --labels brats", nothing, 3, small),
            Row(
                "no such case in a split",
                "train DATA NEW --split split.json",
                written("split.json", '{"train": ["x"]}'),
                3,
                small,
            ),
            Row(
                "dataset.json is no JSON",
                "data check SET",
                rendered("MSD", lambda r: (r / "dataset.json").write_text("{")),
                3,
            ),
            Row(
                "channels without names",
                "data check SET",
                rendered("nnU-Net", described(channel_names={"0": "A", "1": "B"})),
                3,
            ),
            Row("a manifest without columns", "data check cases.csv", written("cases.csv", "a,b\n1,2\n"), 3),
            Row("export to a folder that is not empty", "data export DATA RUN --format csv", nothing, 3),
            Row("export to an unknown layout", "data export DATA OUT --format bids", nothing, 3),
        ],
    )
    yield (
        "Scores",
        [
            Row("another grid", "evaluate OUT DATA", predictions(lambda path: bad.move(path, 1, 2)), 3),
            Row(
                "nothing in common", "evaluate OUT DATA --resample", predictions(lambda path: bad.move(path, 1, 999)), 3
            ),
            Row("no prediction", "evaluate OUT DATA", lambda: Path("OUT").mkdir(), 3),
            Row("a run that needs all contrasts", "evaluate RUN DATA --contrast-subsets --cases all", nothing, 5),
        ],
    )
    yield (
        "DICOM",
        [
            Row("no DICOM file", "data dicom DATA", nothing, 3),
            Row("a series that is not there", "data dicom STUDY CASES --t1 99", nothing, 3),
            Row("a series chosen twice", "data dicom STUDY CASES --t1 2 --t2 2", nothing, 3),
            Row("a series of several volumes", "data dicom STUDY CASES --t2 4", nothing, 3),
            Row("missing slices", "data dicom STUDY CASES", slice_taken_out, 3),
            Row("a file cut short", "data dicom STUDY", lambda: Path("STUDY/A/S2/0003.dcm").write_bytes(b""), 3),
            Row(
                "a case that is there", "data dicom STUDY CASES --id a", lambda: Path("CASES/a").mkdir(parents=True), 3
            ),
            Row("no label map", "data dicom-seg gone.nii.gz STUDY OUT.dcm", nothing, 3),
            Row("another grid", f"data dicom-seg DATA/{CASE}/{CASE}_seg.nii.gz STUDY OUT.dcm", nothing, 3),
        ],
    )
    yield (
        "Configs, runs, output",
        [
            Row("no such config", "train DATA NEW --config labtop", nothing, 4),
            Row("a key twice", "train DATA NEW --config c.yaml", written("c.yaml", "data: {}\ndata: {}\n"), 4),
            Row("an alias", "train DATA NEW --config c.yaml", written("c.yaml", "data: &a {}\nruntime: *a\n"), 4),
            Row("no YAML", "train DATA NEW --config c.yaml", written("c.yaml", "data: {\n"), 4),
            Row(
                "deep supervision of another network", "train DATA NEW --set network.deep_supervision=true", nothing, 4
            ),
            Row(
                "patience without validation", "train DATA NEW --fold all --set training.patience=3", nothing, 4, small
            ),
            Row("a run that is there", "train DATA RUN", nothing, 5, small),
            Row("nothing to resume", "train DATA NEW --resume", nothing, 5),
            Row(
                "a resumed run with another config",
                "train DATA RUN --resume --set training.learning_rate=1",
                nothing,
                4,
            ),
            Row("weights of what is no run", "train DATA NEW --init-from DATA", nothing, 5, small),
            Row("OUTPUT that is a file", f"predict RUN DATA/{CASE} OUT", written("OUT", "mine"), 3),
            Row("a plan that is there", "plan DATA --out plan.yaml", written("plan.yaml", ""), 4),
            Row("an unknown arm", "compare DATA OUT --arms none,best", nothing, 4),
            Row("more folds than patients", "crossval DATA OUT --folds 5", nothing, 3, small),
        ],
    )
    yield (
        "The command line",
        [
            Row("an unknown verb", "segment DATA", nothing, 2),
            Row("an unknown option", "predict RUN DATA OUT --gpu 0", nothing, 2),
            Row("an argument missing", "train DATA", nothing, 2),
            Row("options that exclude each other", "train DATA RUN --resume --fold 1", nothing, 2),
        ],
    )


def as_printed(ended: Any, place: Path) -> str:
    """The message alone, with short paths and without what differs from run to run."""
    lines = [line for line in (ended.err or ended.out).strip("\n").splitlines() if not PROGRESS.match(line)]
    begins = [number for number, line in enumerate(lines) if line.startswith(("znormseg:", "case "))]
    text = "\n".join(lines[begins[0] :] if begins else lines)
    text = re.sub(r"^(Usage: |Try ')\S.*?znormseg", r"\1znormseg", text, flags=re.MULTILINE)
    text = text.replace(f"{place}/", "").replace(str(place), ".")
    return re.sub(r"\b[0-9a-f]{12,}\b", "0123456789ab", text)


@pytest.mark.slow
def test_the_document_shows_errors_as_they_print(
    *,
    place: Path,
    phantoms: Path,
    tiny_run: Path,
    dicom_study: Path,
    tiny_settings: list[str],
    render: Render,
    znormseg: Call,
) -> None:
    options = [word for setting in tiny_settings for word in ("--set", setting)]
    lines: list[str] = []
    wrong: list[str] = []
    for section, rows in [*of_tables(options), *further(options, render)]:
        lines += [f"### {section}", ""]
        for row in rows:
            fresh(place, phantoms, tiny_run)
            if "STUDY" in row.command:
                shutil.copytree(dicom_study, place / "STUDY")
            row.spoil()
            ended = znormseg(*shlex.split(row.command), *row.hidden)
            if (ended.code, "Traceback" in ended.err) != (row.code, False):
                wrong.append(f"{section}, {row.title}: {ended}")
            lines += [f"{row.title[0].upper()}{row.title[1:]} ({ended.code}):", "", "```text"]
            lines += [f"$ znormseg {row.command}", *as_printed(ended, place).splitlines(), "```", ""]
    assert not wrong, "\n".join(wrong)
    shown = "\n".join(lines) + "\n"
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    found, _, after = rest.partition(END)
    if os.environ.get("ZNORMSEG_REGENERATE"):
        DOCUMENT.write_text(before + BEGIN + "\n" + shown + END + after, encoding="utf-8")
        return
    assert found.strip().splitlines() == shown.strip().splitlines(), "write it anew with ZNORMSEG_REGENERATE=1"
