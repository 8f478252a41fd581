"""Code blocks in the documents: every command in them exists, and every block runs or says why not.

How a block is marked stands in CONTRIBUTING.md. A block runs in a folder that has the things it names and no others;
commands run as printed, but that a training is made small.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from data.datasets.source import DataSource

ROOT = Path(__file__).parents[2]


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


blocks = _load(ROOT / "docs" / "site" / "blocks.py")
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [block for document in DOCUMENTS for block in blocks.blocks(document, ROOT)]
SHELL = [block for block in BLOCKS if block.language == "bash"]

#: What a block without a mark finds in its folder where it names it. RUN is there unless the block trains it.
ALWAYS = {
    **dict.fromkeys(("DATA", "CASES", "NEW_CASES", "REFERENCES", "PUBLIC_CASES", "OWN_CASES"), "PHANTOMS"),
    **dict.fromkeys(("RUN", "SCANS", "STUDY", "PREDICTIONS")),
}
#: Blocks with only these commands take less than five seconds.
QUICK = {"data check", "data export", "doctor"}
#: Makes a training small enough for a test; later settings win.
SMALL = [
    *("network.channels=[4, 8]", "network.residual_units=1", "training.patch_voxels=[16, 16, 16]"),
    *("training.batch_size=1", "training.steps=4", "training.validations=1"),
    "runtime.device=cpu",
]
#: Stands for the program: adds the small settings, and ignores what doctor finds on this machine. A line of #! cannot
#: hold a path with spaces, so the beginning is a command of sh, too.
PROGRAM = f"""#!/bin/sh
'''exec' "{sys.executable}" "$0" "$@"
' '''
import subprocess, sys
words, small = sys.argv[1:], []
if words[0] in ("train", "crossval", "plan"):
    small = ["training.steps=6"] if "--resume" in words else {SMALL!r}
command = [sys.executable, "-m", "app", *words, *(word for setting in small for word in ("--set", setting))]
code = subprocess.run(command).returncode
sys.exit(0 if code == 7 and words[0] == "doctor" else code)
"""


def names(found: list[Any]) -> list[Any]:
    """Parameters with the place of each block as its name."""
    return [pytest.param(block, id=block.place) for block in found]


# Without running them


def test_every_block_that_looks_like_commands_is_marked_as_one() -> None:
    others = [block for block in BLOCKS if block.language not in blocks.RUNNABLE]
    programs = tuple(f"{program} " for program in blocks.PROGRAMS)
    assert [b.place for b in others if any(line.startswith(programs) for line in b.code.splitlines())] == []


@pytest.mark.parametrize("block", names([block for block in BLOCKS if block.no_run]))
def test_a_block_that_is_not_run_states_why(block: Any) -> None:
    assert len(block.no_run.split()) >= 2, "say more than one word"
    assert not block.given, "a block that is not run needs nothing"


@pytest.mark.parametrize("block", names(SHELL))
def test_every_command_and_option_in_a_block_exists(block: Any) -> None:
    from typer.main import get_command

    from app.cli.main import app

    for words in blocks.commands(block.code):
        if "znormseg" not in words:
            continue
        command: Any = get_command(app)
        known = {"-h", "--help"}
        for word in words[words.index("znormseg") + 1 :]:
            if word in getattr(command, "commands", {}):
                command = command.commands[word]
            elif word.startswith("-") and not word[1:2].isdigit():
                known |= {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
                assert word.partition("=")[0] in known, f"{block.place}: {' '.join(words)}"
            else:
                is_group = getattr(command, "commands", {}) and not command.invoke_without_command
                assert not is_group, f"{block.place}: no verb {word}"


@pytest.mark.parametrize("block", names([block for block in SHELL if "make " in block.code]))
def test_every_make_target_in_a_block_exists(block: Any) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {line.partition(":")[0] for line in makefile.splitlines() if line[:1].isalpha()}
    for words in blocks.commands(block.code):
        if "make" in words[:2]:
            asked = [word for word in words[words.index("make") + 1 :] if "=" not in word and word[0] != "-"]
            assert asked, block.place
            assert set(asked) <= targets, block.place


def test_marks_above_a_block_are_read(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(
        "x\n\n<!-- given: A=RUN, DATA -->\n```bash\nls\n```\n\n<!-- no-run: why not -->\n\n    make x\n"
    )
    first, second = blocks.blocks(document, tmp_path)
    assert (first.place, first.given, first.runs) == ("page.md:5", {"A": "RUN", "DATA": "DATA"}, True)
    assert (second.language, second.code, second.no_run, second.runs) == ("bash", "make x\n", "why not", False)


def test_a_mark_for_the_whole_page_applies_to_every_block_below(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("# A\n<!-- no-run, whole page: no GPU -->\n\n    make a\n\nb\n\n```bash\nmake b\n```\n")
    assert [block.no_run for block in blocks.blocks(document, tmp_path)] == ["no GPU", "no GPU"]


def test_the_commands_of_a_block_are_separated() -> None:
    code = "A=1 znormseg train X \\\n  Y  # why\ncd x && make -n 'a b'\npython -c 'one\ntwo'\n"
    found = list(blocks.commands(code))
    assert found == [["znormseg", "train", "X", "Y"], ["cd", "x"], ["make", "-n", "a b"], ["python", "-c", "one\ntwo"]]


# Running them


@pytest.fixture(scope="session")
def small_run(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run of the small settings and others, trained once for each."""
    from app.config.load import load_config
    from app.training.run import start

    made: dict[tuple[str, ...], Path] = {}

    def run(*settings: str) -> Path:
        if settings not in made:
            made[settings] = tmp_path_factory.mktemp("small") / "run"
            start(DataSource(phantoms), made[settings], load_config("laptop", [*settings, *SMALL]))
        return made[settings]

    return run


@pytest.fixture
def things(
    phantoms: Path, small_run: Callable[..., Path], request: pytest.FixtureRequest
) -> dict[str, Callable[[Path], object]]:
    """By its name, what puts a thing at a place."""
    first = sorted(phantoms.iterdir())[0]

    def predictions(place: Path) -> None:
        place.mkdir()
        for case in sorted(phantoms.iterdir()):
            shutil.copy(case / f"{case.name}_seg.nii.gz", place / f"{case.name}.nii.gz")

    def output(place: Path) -> None:
        """Label maps and JSON, as predict writes them."""
        command = [sys.executable, "-m", "app", "predict", str(small_run()), str(first), str(place)]
        subprocess.run(command, check=True, capture_output=True)

    def label_map(place: Path) -> None:
        """A label map on the grid of the study's T1c."""
        from data.dicom.series_choice import choose_series
        from data.dicom.study import open_study, read_chosen, write_dicom_case

        with open_study(request.getfixturevalue("dicom_study")) as study:
            case = write_dicom_case(
                place.parent / "scratch", read_chosen(study, choose_series(study.series, {})), case_id="a"
            )
        image: Any = nib.load(next(case.glob("*_t1ce.nii.gz")))
        labels = np.zeros(image.shape, dtype=np.uint8)
        labels[4:8, 4:8, 4:8] = 2
        nib.save(nib.Nifti1Image(labels, image.affine), place)
        shutil.rmtree(place.parent / "scratch")

    return {
        "PHANTOMS": lambda place: shutil.copytree(phantoms, place),
        "PREDICTIONS": predictions,
        "OUTPUT": output,
        "RUN": lambda place: shutil.copytree(small_run(), place),
        "DROPOUT_RUN": lambda place: shutil.copytree(small_run("augment.contrast_dropout=0.5"), place),
        "SCANS": lambda place: shutil.copytree(first, place / first.name),
        "STUDY": lambda place: shutil.copytree(request.getfixturevalue("dicom_study"), place),
        "LABELMAP": label_map,
        "T1": lambda place: shutil.copy(first / f"{first.name}_t1.nii.gz", place),
        "T1C": lambda place: shutil.copy(first / f"{first.name}_t1ce.nii.gz", place),
        "T2": lambda place: shutil.copy(first / f"{first.name}_t2.nii.gz", place),
        "FLAIR": lambda place: shutil.copy(first / f"{first.name}_flair.nii.gz", place),
    }


def wanted(block: Any) -> dict[str, str]:
    """What a block needs: by its mark, else by the names in it."""
    if block.given:
        return {name: ALWAYS.get(thing) or thing for name, thing in block.given.items()}
    words = {word.partition("/")[0] for command in blocks.commands(block.code) for word in command}
    needed = {name: thing or name for name, thing in ALWAYS.items() if name in words}
    trained = any("train" in c and "RUN" in c and "--resume" not in c for c in blocks.commands(block.code))
    return {name: thing for name, thing in needed.items() if not (name == "RUN" and trained)}


def to_be_run(block: Any) -> Any:
    """A block as a parameter; slow unless it is known to be quick."""
    verbs = {" ".join(c[1:3]) if c[1] == "data" else c[1] for c in blocks.commands(block.code) if c[0] == "znormseg"}
    quick = block.language == "python" or (verbs and verbs <= QUICK)
    return pytest.param(block, id=block.place, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize("block", [to_be_run(block) for block in BLOCKS if block.runs])
def test_a_block_runs(
    block: Any, things: dict[str, Callable[[Path], object]], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if "openvino" in block.code:
        request.getfixturevalue("openvino_computes")
    place, programs = tmp_path / "folder", tmp_path / "bin"
    (place / ".venv" / "bin").mkdir(parents=True)
    (place / ".venv" / "bin" / "activate").touch()
    programs.mkdir()
    (programs / "znormseg").write_text(PROGRAM)
    (programs / "znormseg").chmod(0o755)
    for name, thing in wanted(block).items() if block.language == "bash" else ():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        things[thing](place / name)
    shell = ["bash", "-eu", "-o", "pipefail", "-c", block.code]
    ended = subprocess.run(
        [sys.executable, "-c", block.code] if block.language == "python" else shell,
        cwd=place,
        env={
            **os.environ,
            "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
        },
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
    )
    hint = "mend it, say above it what it needs (given:) or why it is not run (no-run:); see CONTRIBUTING.md"
    assert ended.returncode == 0, f"{block.place}: {hint}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
