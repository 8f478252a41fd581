"""`--rules brats2026`: the numbers of `brats-evaluate`, unchanged, and the messages when it gives none.

The command is not installed with the tests. Fast tests put a stand-in of that name on the PATH: one replays output that
was recorded of the real command (tests/golden/brats2026_recorded.json), if it is handed the very voxels of which the
output is; others crash, hang or write something else. Slow tests run the real one where it is on the PATH.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from lesion_pairs import lesion_pair

from app.errors import EXIT_MACHINE, EXIT_SOME_FAILED
from app.evaluation.brats.brats2026 import (
    METRICS,
    NO_SCORE,
    TASKS,
    PackageEvaluation,
    evaluate_by_package,
    package_rules,
    rankable,
)
from app.evaluation.brats.brats_evaluate import COMMAND, TESTED, Installed, Runner, find_installed, processes_at_once
from app.evaluation.brats.evaluate import evaluate_officially
from app.evaluation.brats.rules import rules_for
from app.evaluation.ranking.rank import rank
from app.evaluation.ranking.scores import Scored, load
from data.datasets.source import DataSource
from data.errors import DataError

ROOT = Path(__file__).parents[4]
RECORDED = json.loads((ROOT / "tests" / "golden" / "brats2026_recorded.json").read_text(encoding="utf-8"))
CONVENTION = {"PED": "brats2024-ped"}
ARGUMENTS = """
import gzip, hashlib, json, os, sys, time
from pathlib import Path
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
config, summary = words["--config"], Path(words["--summary_json"])

def write(text):
    summary.write_bytes(text if isinstance(text, bytes) else text.encode())
    sys.exit(0)

sides = [next(Path(words[name]).iterdir()) for name in ("--pred_path", "--ref_path")]
stored = [gzip.decompress(side.read_bytes())[352:] for side in sides]
"""
REPLAY = """
print("progress that nobody reads")
recorded = json.loads((Path(__file__).parent / "recorded.json").read_text())
entry = recorded[config + hashlib.sha256(b"".join(stored)).hexdigest()]
summary.write_text(json.dumps({"metrics": [entry], "missings": []}))
"""
Image = npt.NDArray[np.uint8]
Put = Callable[..., Path]
Write = Callable[[str], tuple[Path, Path]]
Call = Callable[..., Any]


def pair(row: dict[str, Any]) -> tuple[Image, Image]:
    return lesion_pair(row["seed"], tuple(RECORDED["shape"]), tuple(row["labels"]))


def recorded(task: str) -> list[dict[str, Any]]:
    return [row for row in RECORDED["pairs"] if row["task"] == task]


def affine_of(row: dict[str, Any]) -> npt.NDArray[np.float64]:
    x, y, z = RECORDED["spacings_mm"][row["seed"] % 4]
    return np.diag([-x, -y, z, 1.0])


def save(path: Path, voxels: Image, affine: npt.NDArray[np.float64]) -> None:
    path.parent.mkdir(exist_ok=True)
    nib.loadsave.save(nib.nifti1.Nifti1Image(voxels, affine), path)


#: Starts the script with this Python; a line of #! cannot hold a path with spaces, so it is a command of sh, too.
START = f"""#!/bin/sh
'''exec' "{sys.executable}" -S "$0" "$@"
' '''
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Put an executable named as the command on the PATH, in its own environment; return its folder."""

    def put(body: str = REPLAY, versions: dict[str, str] = dict(TESTED)) -> Path:  # noqa: B006 - never changed
        root = tmp_path / "environment"
        shutil.rmtree(root, ignore_errors=True)
        command = root / "bin" / COMMAND
        command.parent.mkdir(parents=True)
        command.write_text(f"{START}{ARGUMENTS}{body}", encoding="utf-8")
        command.chmod(0o755)
        for name, version in versions.items():
            folder = root / "lib/python3.12/site-packages" / f"{name.replace('-', '_')}-{version}.dist-info"
            folder.mkdir(parents=True)
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        index = {}
        for row in RECORDED["pairs"]:
            digest = hashlib.sha256(b"".join(side.tobytes("F") for side in pair(row))).hexdigest()
            index[TASKS[row["task"]].config + digest] = row["entry"]
        (command.parent / "recorded.json").write_text(json.dumps(index))
        monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}/usr/bin:/bin")
        return command.parent

    return put


@pytest.fixture
def sides(tmp_path: Path) -> Write:
    """The recorded pairs of a task as files."""

    def write(task: str) -> tuple[Path, Path]:
        for row in recorded(task):
            for side, voxels in zip(("p", "r"), pair(row), strict=True):
                save(tmp_path / side / f"case-{row['seed']:05d}.nii.gz", voxels, affine_of(row))
        return tmp_path / "p", tmp_path / "r"

    return write


def scored(task: str, folders: tuple[Path, Path], **more: Any) -> PackageEvaluation:
    labels = CONVENTION.get(task, "brats2024")
    predictions, references = (DataSource(folder, labels=labels) for folder in folders)
    return evaluate_by_package(predictions, references, package_rules(task), **more)


def same(ours: float, theirs: float | None) -> bool:
    """Bit for bit; the command leaves out precision and recall where they are not defined."""
    return math.isnan(ours) if theirs is None or math.isnan(theirs) else ours == theirs


@pytest.mark.parametrize("task", TASKS)
def test_every_number_equals_that_of_the_command(task: str, stand_in: Put, sides: Write) -> None:
    stand_in()
    cases = scored(task, sides(task)).cases
    assert len(cases) == 3
    for case, row in zip(cases, recorded(task), strict=True):
        assert list(case.regions) == list(TASKS[task].regions)
        for region, numbers in case.regions.items():
            entry = row["entry"][region.lower()]
            assert list(numbers) == list(METRICS)
            assert set(entry) - {"reference_instances"} <= set(METRICS)
            assert all(same(numbers[metric], entry.get(metric)) for metric in METRICS), (task, row["seed"], region)


def test_the_recorded_output_contains_non_finite_numbers() -> None:
    values = [
        v
        for row in RECORDED["pairs"]
        for numbers in row["entry"].values()
        if isinstance(numbers, dict)
        for v in numbers.values()
        if isinstance(v, float)
    ]
    assert any(map(math.isnan, values))
    assert any(map(math.isinf, values))


def test_the_json_is_strict_and_names_configuration_and_versions(stand_in: Put, sides: Write, znormseg: Call) -> None:
    stand_in()
    done = znormseg(
        "evaluate", *sides("GOAT"), "--rules", "brats2026", "--task", "GOAT", "--labels", "brats2023", "--json"
    )
    assert done.code == 0, done.err
    told = json.loads(done.out, parse_constant=pytest.fail)
    assert told["package"] == {
        "name": "brats-evaluation",
        "version": "0.0.10",
        "panoptica": "2.1.7",
        "configuration": "GoAT",
    }
    first = told["cases"][0]
    assert first["ET"]["sq_hd95"] == "inf"
    assert first["WT"]["sq_dsc"] == recorded("GOAT")[0]["entry"]["wt"]["sq_dsc"]
    assert told["cases"][1]["ET"]["sq_dsc"] is None


def test_the_csv_has_every_number_and_states_how_it_was_scored(
    stand_in: Put,
    sides: Write,
    tmp_path: Path,
    znormseg: Call,
) -> None:
    stand_in()
    out = tmp_path / "scores.csv"
    words = ("--rules", "brats2026", "--task", "PED", "--labels", "brats2024-ped", "--out", out)
    assert znormseg("evaluate", *sides("PED"), *words).code == 0
    with out.open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["case"] for row in table] == ["case-00000", "case-00003", "case-00007", "mean", "median"]
    assert {row["scored_by"] for row in table} == {
        "brats2026 PED (configuration ped, brats-evaluation 0.0.10, panoptica 2.1.7)"
    }
    entry = recorded("PED")[2]["entry"]
    for region in TASKS["PED"].regions:
        for metric in METRICS:
            assert same(float(table[2][f"{region}_{metric}"]), entry[region.lower()].get(metric))


def test_the_terminal_output_names_the_scorer_and_the_non_finite_values(
    stand_in: Put, sides: Write, znormseg: Call
) -> None:
    stand_in()
    shown = znormseg("evaluate", *sides("GOAT"), "--rules", "brats2026", "--task", "GOAT", "--labels", "brats2023")
    assert "ET lesion HD95" in shown.out
    row = next(line for line in shown.out.splitlines() if line.startswith("case-00003"))
    assert row.split()[1:] == ["-"] * 9
    assert "configuration GoAT, brats-evaluation 0.0.10, panoptica 2.1.7" in shown.out
    assert "inf: no lesion matched; mean and median use 373" in shown.out
    assert "Research use only" in shown.out
    assert "the voxels of 2 cases are not 1 mm cubes: case-00003, case-00007." in shown.err


def test_means_leave_out_undefined_values(stand_in: Put, sides: Write) -> None:
    stand_in()
    found = scored("GOAT", sides("GOAT"))
    first, _, last = (case.regions["WT"]["global_bin_dsc"] for case in found.cases)
    assert found.means()["WT"]["global_bin_dsc"] == pytest.approx((first + last) / 2)
    assert found.medians()["ET"]["sq_hd95"] == 373


def test_the_command_ranks_folders(
    stand_in: Put,
    sides: Write,
    tmp_path: Path,
    znormseg: Call,
) -> None:
    stand_in()
    predictions, references = sides("MET")
    shutil.copytree(predictions, tmp_path / "other")
    (tmp_path / "other" / "case-00007.nii.gz").unlink()
    words = ("--references", references, "--rules", "brats2026", "--task", "MET", "--labels", "brats2024", "--json")
    done = znormseg("rank", predictions, tmp_path / "other", *words)
    assert done.code == 0, done.err
    told = json.loads(done.out, parse_constant=pytest.fail)
    assert told["metrics"] == ["sq_dsc", "sq_hd95", "rq"]
    assert told["regions"] == ["WT", "TC", "ET", "RC"]
    assert (told["left_out"], [row["mean_rank"] for row in told["ranking"]]) == (["case-00007"], [1.5, 1.5])


def test_tables_rank_like_their_folders(stand_in: Put, sides: Write, tmp_path: Path) -> None:
    stand_in()
    found = scored("GLI", sides("GLI"))
    found.write_table(tmp_path / "a.csv")
    (tmp_path / "b.json").write_text(json.dumps(found.to_json(), allow_nan=False))
    tables = load([DataSource(tmp_path / "a.csv"), DataSource(tmp_path / "b.json")], None, None)
    assert tables[0].scored_by == tables[1].scored_by == found.scored_by
    assert tables[0].cases == tables[1].cases
    both = (*tables, Scored(name="better", cases={c: dict.fromkeys(v, 1.0) for c, v in tables[0].cases.items()}))
    assert np.isfinite(rank(both).values).all()


def test_sets_of_other_versions_or_years_are_not_ranked_together(tmp_path: Path) -> None:
    by_package = "case,WT_sq_dsc,WT_sq_hd95,WT_rq,WT_n_ref_instances,WT_n_pred_instances,scored_by\n"
    (tmp_path / "a.csv").write_text(f"{by_package}x,0.5,2,1,1,1,brats2026 GLI (panoptica 2.1.7)\n")
    (tmp_path / "b.csv").write_text(f"{by_package}x,0.5,2,1,1,1,brats2026 GLI (panoptica 2.2.0)\n")
    (tmp_path / "c.csv").write_text("case,WT_lesion_dice,WT_lesion_hd95_mm\nx,0.5,2\n")
    with pytest.raises(DataError, match=r"panoptica 2\.1\.7\); brats2026 GLI \(panoptica 2\.2\.0"):
        rank(load([DataSource(tmp_path / "a.csv"), DataSource(tmp_path / "b.csv")], None, None))
    with pytest.raises(DataError, match="Score all sets in the same way"):
        rank(load([DataSource(tmp_path / "a.csv"), DataSource(tmp_path / "c.csv")], None, None))


def test_non_finite_numbers_in_a_table_of_another_year_are_refused(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("case,WT_dice,WT_hd95_mm\nx,0.5,inf\n")
    with pytest.raises(DataError, match="a score is inf"):
        load([DataSource(tmp_path / "a.csv"), DataSource(tmp_path / "b.csv")], None, None)


UNDEFINED = dict.fromkeys(METRICS, math.nan) | {"tp": 0, "fp": 0, "fn": 0, "n_ref_instances": 0, "n_pred_instances": 0}


def test_a_region_in_neither_label_map_ranks_as_perfect() -> None:
    found = rankable(UNDEFINED)
    assert set(found) == set(METRICS) - set(NO_SCORE)
    assert {found[name] for name in ("sq_dsc", "rq", "prec", "global_bin_nsd")} == {1.0}
    assert {found[name] for name in ("sq_hd95", "global_bin_hd95", "fp")} == {0.0}


def test_precision_without_a_prediction_ranks_last_and_infinity_as_the_penalty() -> None:
    found = rankable({**UNDEFINED, "n_ref_instances": 2, "fn": 2, "rec": 0.0, "sq_hd95": math.inf})
    assert (found["prec"], found["sq_hd95"], found["fn"]) == (0.0, 373.0, 2.0)


def test_a_missing_command_is_reported_with_its_installation_and_licence(
    sides: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    znormseg: Call,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    predictions, references = sides("GLI")
    for words in (("evaluate",), ("rank", references, "--references")):
        done = znormseg(*words[:1], predictions, *words[1:], references, "--rules", "brats2026")
        assert (done.code, done.out) == (EXIT_MACHINE, "")
        assert "pip install brats-evaluation==0.0.10 panoptica==2.1.7" in done.err
        assert "AGPL-3.0, but its licence file is Apache-2.0" in done.err
        assert "Traceback" not in done.err


IF_EMPTY = "if not any(stored[1]):\n    "
UNREADABLE = "wrote no readable summary of one case"
WRONG = {
    "crash": (
        "sys.exit('Traceback\\nline\\nValueError: no')",
        "exited with status 1: Traceback / line / ValueError: no. Run",
    ),
    "killed": ("os.kill(os.getpid(), 9)", "was killed by SIGKILL: it printed nothing"),
    "garbage": ("""write('{"metrics": [')""", f"{UNREADABLE} (JSONDecodeError)"),
    "bytes": ("write(bytes(range(256)))", UNREADABLE),
    "nothing": ("print('Error: no configuration') or sys.exit(0)", "(FileNotFoundError): Error: no configuration"),
    "skipped": ("""write('{"metrics": [], "missings": [1]}')""", f"{UNREADABLE} (ValueError)"),
    "another shape": ("""write('{"metrics": [[1]]}')""", f"{UNREADABLE} (TypeError)"),
    "refused": ("""write('{"metrics": [{"error": "Size\\\\nMismatch"}]}')""", "refused the case: Size Mismatch"),
    "region": ("""write('{"metrics": [{"et": {}}]}')""", "returned no scores for region WT"),
    "number": ("""write('{"metrics": [{"wt": {"sq_dsc": "high"}}]}')""", "returned 'high' for sq_dsc"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_failure_of_one_case_does_not_affect_the_others(
    kind: str, stand_in: Put, sides: Write, znormseg: Call
) -> None:
    body, message = WRONG[kind]
    stand_in(f"{IF_EMPTY}{body}\n{REPLAY}")
    done = znormseg(
        "evaluate", *sides("GOAT"), "--rules", "brats2026", "--task", "GOAT", "--labels", "brats2023", "--json"
    )
    assert done.code == EXIT_SOME_FAILED, done.err
    told = json.loads(done.out)
    assert [case["case"] for case in told["cases"]] == ["case-00000", "case-00007"]
    assert message in told["failures"]["case-00003"]
    assert "case case-00003: brats-evaluate" in done.err
    assert "Traceback (most" not in done.err


def test_a_hanging_case_is_stopped_with_its_child_processes(stand_in: Put, tmp_path: Path) -> None:
    child = tmp_path / "child"
    shell = f"echo matching; sleep 600 & echo $! > {child}; wait"
    stand_in(f"os.execv('/bin/sh', ['sh', '-c', {shell!r}])")
    for side in ("prediction", "reference"):
        save(tmp_path / side / "00000.nii.gz", np.zeros((2, 2, 2), np.uint8), np.eye(4))
    with pytest.raises(DataError, match="was stopped after 3 s without a result: matching"):
        Runner(find_installed(), "gli", timeout_s=3).score(tmp_path)
    assert ends(int(child.read_text()))


def lives(process: int) -> bool:
    """Whether a process still runs; one that ended may be waiting for whoever inherits it."""
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def ends(process: int) -> bool:
    """Whether a process that was killed ends within ten seconds; a busy machine may take a moment."""
    until = time.monotonic() + 10
    while lives(process) and time.monotonic() < until:
        time.sleep(0.02)
    return not lives(process)


def test_sigterm_stops_the_command_and_leaves_no_temporary_files(
    stand_in: Put, sides: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, znormseg_process: Call
) -> None:
    stand_in(f"Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\ntime.sleep(600)")
    (tmp_path / "copies").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "copies"))
    words = ("--rules", "brats2026", "--task", "GOAT", "--labels", "brats2023", "-q")
    process = znormseg_process("evaluate", *sides("GOAT"), *words)
    try:
        while process.poll() is None and not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
            time.sleep(0.01)
        process.terminate()
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, "stopped by SIGTERM" in err) == (130, True), err
    assert ends(int((tmp_path / "pid").read_text()))
    assert list((tmp_path / "copies").iterdir()) == []


def test_a_command_whose_interpreter_is_missing_is_reported_as_broken(
    stand_in: Put, sides: Write, znormseg: Call
) -> None:
    command = stand_in() / COMMAND
    command.write_text("#!/nowhere/bin/python\n")
    done = znormseg("evaluate", *sides("GLI"), "--rules", "brats2026", "--labels", "brats2024")
    assert done.code == EXIT_MACHINE
    assert "cannot be started (No such file or directory). Is its environment intact?" in done.err


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"brats-evaluation": "0.1.0", "panoptica": "2.1.7"}, "belongs to brats-evaluation 0.1.0; znormseg was"),
        ({"brats-evaluation": "0.0.10", "panoptica": "3.0.0"}, "belongs to panoptica 3.0.0;"),
        ({}, "belongs to brats-evaluation of unknown version and panoptica of unknown version;"),
    ],
)
def test_untested_versions_cause_a_warning(
    versions: dict[str, str], said: str, stand_in: Put, sides: Write, znormseg: Call
) -> None:
    stand_in(versions=versions)
    done = znormseg("evaluate", *sides("GLI"), "--rules", "brats2026", "--labels", "brats2024", "--json", "-q")
    assert (done.code, said in done.err) == (0, True), done.err
    assert json.loads(done.out)["package"]["panoptica"] == versions.get("panoptica")


def test_tested_versions_cause_no_warning() -> None:
    assert Installed(command=Path("x"), versions=dict(TESTED)).doubt is None


def test_a_symlink_on_the_path_resolves_to_the_versions_of_its_environment(
    stand_in: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = stand_in() / COMMAND
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / COMMAND).symlink_to(command)
    monkeypatch.setenv("PATH", str(tmp_path / "links"))
    assert find_installed().versions == TESTED


def relabelled(folder: Path, table: list[int], order: int = 1) -> None:
    """Write each label map with other numbers, and with its first axis the other way round for -1."""
    for path in folder.iterdir():
        image: Any = nib.loadsave.load(path)
        voxels = np.array(table, np.uint8)[np.asarray(image.dataobj)]
        affine = image.affine.copy()
        if order < 0:
            affine[:3, 3] += affine[:3, 0] * (voxels.shape[0] - 1)
            affine[:3, 0] *= -1
        save(path, voxels[::order], affine)


def test_label_numbers_and_voxel_order_are_converted_to_those_of_the_reference(stand_in: Put, sides: Write) -> None:
    stand_in()
    predictions, references = sides("GOAT")
    relabelled(references, [0, 1, 2, 4])  # BraTS 2021
    relabelled(predictions, [0, 2, 1, 3], order=-1)  # Decathlon
    found = evaluate_by_package(
        DataSource(predictions, labels="msd"), DataSource(references, labels="brats2021"), package_rules("GOAT")
    )
    assert not found.failures  # else the stand-in does not know the voxels
    assert len(found.cases) == 3


def test_uncompressed_and_floating_point_files_score_the_same(stand_in: Put, sides: Write) -> None:
    stand_in()
    predictions, references = sides("GLI")
    for path in list(predictions.iterdir()):
        image: Any = nib.loadsave.load(path)
        voxels = np.asarray(image.dataobj).astype(np.float32)
        nib.loadsave.save(
            nib.nifti1.Nifti1Image(voxels, image.affine), predictions / path.name.replace(".nii.gz", ".nii")
        )
        path.unlink()
    assert len(scored("GLI", (predictions, references)).cases) == 3


@pytest.mark.parametrize(
    ("task", "label", "said"),
    [
        ("GOAT", 4, r"contains label values 4 \(convention brats2024\), which are not part of task GOAT"),
        ("MEN-RT", 2, r"case a: .*contains label values 2 .* task MEN-RT: its regions are GTV"),
        ("PED", 4, "not part of task PED"),
    ],
)
def test_a_tissue_without_a_label_number_in_the_task_is_refused(
    task: str, label: int, said: str, stand_in: Put, tmp_path: Path
) -> None:
    stand_in()
    for side in ("p", "r"):
        save(tmp_path / side / "a.nii.gz", np.full((4, 4, 4), label, np.uint8), np.eye(4))
    with pytest.raises(DataError, match=said):
        evaluate_by_package(
            DataSource(tmp_path / "p", labels="brats2024"), DataSource(tmp_path / "r"), package_rules(task)
        )


def test_the_example_in_the_documentation_has_the_stated_scores_of_each_year(tmp_path: Path) -> None:
    voxels = np.zeros((2, 200, 40, 40), dtype=np.uint8)
    voxels[1, 5:25, 5:25, 5:25] = voxels[0, 6:26, 5:25, 5:25] = voxels[0, 165:170, 10:15, 10:15] = 3
    for side, one in zip(("p", "r"), voxels, strict=True):
        save(tmp_path / side / "a.nii.gz", one, np.diag([-1.0, -1.0, 1.0, 1.0]))
    predictions, references = (DataSource(tmp_path / side, labels="brats2023") for side in ("p", "r"))
    for year, lesions in (("brats2023", 187.5), ("brats2024", 169)):
        (case,) = evaluate_officially(predictions, references, rules_for(year, "GLI")).cases
        assert (case.regions["ET"].hd95_mm, case.regions["ET"].lesion_hd95_mm) == (140, lesions)
    if shutil.which(COMMAND) is not None:
        (found,) = evaluate_by_package(predictions, references, package_rules("GLI")).cases
        assert (found.regions["ET"]["global_bin_hd95"], found.regions["ET"]["sq_hd95"]) == (1.0, 1.0)


def test_other_grids_are_refused(stand_in: Put, sides: Write) -> None:
    stand_in()
    predictions, references = sides("GLI")
    save(predictions / "case-00000.nii.gz", np.zeros((8, 8, 8), np.uint8), np.eye(4))
    assert "different grids: shape" in scored("GLI", (predictions, references)).failures["case-00000"]


def test_our_python_path_does_not_reach_the_other_environment(
    stand_in: Put, sides: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(f"assert 'PYTHONPATH' not in os.environ and os.environ['OMP_NUM_THREADS'] == '1'\n{REPLAY}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert not scored("GLI", sides("GLI")).failures


def test_as_many_cases_run_at_once_as_threads_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert processes_at_once() == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= processes_at_once() <= len(os.sched_getaffinity(0))


def test_a_task_that_2026_does_not_have_is_refused_with_the_valid_tasks() -> None:
    with pytest.raises(DataError, match=r"no such task; choose from GLI, PED, MET, MEN-PRE, MEN-RT, GOAT\."):
        package_rules("SSA")


def test_the_package_is_neither_a_dependency_nor_in_an_image() -> None:
    files = [ROOT / "pyproject.toml", ROOT / "constraints.txt", ROOT / "Dockerfile", *(ROOT / "docker").rglob("*")]
    text = "".join(path.read_text(encoding="utf-8") for path in files if path.is_file()).lower()
    assert not [name for name in ("brats-evaluation", "brats_evaluation", "panoptica") if name in text]
    sources = [path for package in ("app", "data", "models", "znorm") for path in (ROOT / package).rglob("*.py")]
    imported = re.compile(r"^\s*(import|from) (brats_evaluation|panoptica)\b", re.MULTILINE)
    assert not [path for path in sources if imported.search(path.read_text(encoding="utf-8"))]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMMAND) is None, reason=f"no command {COMMAND} on the PATH")
def test_numbers_equal_those_of_the_command_run_by_hand() -> None:
    subprocess.run([sys.executable, ROOT / "bench" / "brats2026_scores.py", "--pairs", "5"], check=True, timeout=900)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMMAND) is None, reason=f"no command {COMMAND} on the PATH")
def test_the_installed_command_still_gives_what_was_recorded(tmp_path: Path) -> None:
    if find_installed().versions != RECORDED["versions"]:
        pytest.skip("another version than the recorded one")
    out = tmp_path / "recorded.json"
    subprocess.run([sys.executable, ROOT / "bench" / "brats2026_scores.py", "--record", out], check=True, timeout=900)
    golden = ROOT / "tests" / "golden" / "brats2026_recorded.json"
    # NaN is equal to nothing, itself included.
    again, before = (json.loads(path.read_text(encoding="utf-8").replace("NaN", "null")) for path in (out, golden))
    assert again == before
