"""The command line: recorded help texts, results on stdout, all else on stderr, an exit code for each kind of error.

The texts of ``--help`` are kept in ``tests/golden/help_*.txt``. After a wanted change write them anew with
``ZNORMSEG_REGENERATE=1 python -m pytest tests/app/cli/test_cli.py -k help_text`` and look at the difference.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from app.cli import terminal
from app.progress import Progress

Call = Callable[..., Any]

GOLDEN = Path(__file__).parents[2] / "golden"
VERBS = [
    [],
    ["plan"],
    ["train"],
    ["predict"],
    ["evaluate"],
    ["contrasts"],
    ["rank"],
    ["report"],
    ["compare"],
    ["config"],
    ["config", "list"],
    ["config", "show"],
    ["crossval"],
    ["demo"],
    ["doctor"],
    ["export"],
    ["model"],
    ["model", "download"],
    ["model", "import"],
    ["model", "info"],
    ["model", "list"],
    ["model", "verify"],
    ["remote"],
    ["remote", "fetch"],
    ["remote", "status"],
    ["remote", "submit"],
    ["remote", "watch"],
    ["serve"],
    ["serve", "token"],
    ["serve", "token", "add"],
    ["serve", "token", "revoke"],
    ["serve", "user"],
    ["serve", "user", "add"],
    ["serve", "user", "list"],
    ["serve", "user", "password"],
    ["serve", "user", "remove"],
    ["data"],
    ["data", "cache"],
    ["data", "check"],
    ["data", "dicom"],
    ["data", "dicom-seg"],
    ["data", "export"],
    ["data", "phantom"],
    ["data", "prepare"],
]
#: A terminal of fixed width, without colours.
TERMINAL = {"COLUMNS": "100", "LINES": "40", "NO_COLOR": "1", "TERM": "dumb", "LC_ALL": "C.UTF-8"}


@pytest.fixture
def options(tiny_settings: list[str]) -> list[str]:
    """The tiny settings as arguments of the command line."""
    return [word for setting in tiny_settings for word in ("--set", setting)]


def only_object(ended: Any) -> Any:
    """The one JSON object on stdout, of a command that went well."""
    assert ended.code == 0, ended.err
    content = json.loads(ended.out)
    assert isinstance(content, dict)
    assert "{" not in ended.err
    return content


# Help


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: " ".join(verb) or "top")
def test_the_help_text_equals_the_golden_one(verb: list[str], shell: Call, tmp_path: Path) -> None:
    ended = shell(["znormseg", *verb, "--help"], environment=TERMINAL, cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    golden = GOLDEN / f"help_{'_'.join(verb) or 'top'}.txt"
    if os.environ.get("ZNORMSEG_REGENERATE"):
        golden.write_text(ended.out, encoding="utf-8")
    assert ended.out == golden.read_text(encoding="utf-8")


def test_exactly_the_existing_commands_have_a_golden_help_text() -> None:
    assert sorted(path.name for path in GOLDEN.glob("help_*.txt")) == sorted(
        f"help_{'_'.join(verb) or 'top'}.txt" for verb in VERBS
    )


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: " ".join(verb) or "top")
def test_the_help_fits_a_terminal_and_shows_no_markup(verb: list[str]) -> None:
    text = (GOLDEN / f"help_{'_'.join(verb) or 'top'}.txt").read_text(encoding="utf-8")
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "``" not in text
    assert "\x1b" not in text


def test_without_arguments_the_common_tasks_are_shown(znormseg: Call) -> None:
    ended = znormseg()
    shown = [line.partition("  znormseg ")[2].split()[0] for line in ended.err.splitlines() if "  znormseg " in line]
    assert shown == ["predict", "report", "demo", "data", "train", "predict", "evaluate"]
    assert "znormseg predict starter OUTPUT --t1 A --t1c B --t2 C --flair D" in ended.err


@pytest.mark.parametrize(
    "verb", ["train", "crossval", "compare", "predict", "evaluate", "contrasts", "rank", "data prepare"]
)
def test_commands_with_panels_put_every_option_in_a_panel(verb: str) -> None:
    from typer.main import get_command

    from app.cli.main import app

    command: Any = get_command(app)
    for word in verb.split():
        command = command.commands[word]
    options = [one for one in command.params if one.param_type_name == "option" and not one.hidden]
    assert {one.name for one in options if not one.rich_help_panel} == set()
    assert {one.name for one in options if one.rich_help_panel == "Common options"} == {"as_json", "quiet"}


@pytest.mark.parametrize("verb", ["predict", "compare", "model verify"])
def test_common_options_come_last_before_the_examples(verb: str) -> None:
    text = (GOLDEN / f"help_{verb.replace(' ', '_')}.txt").read_text(encoding="utf-8")
    headings = re.findall(r"^([A-Z][^:\n]*):$", text, re.MULTILINE)
    assert headings[-2:] == ["Common options", "Examples"]


def test_a_long_example_is_not_wrapped_in_a_narrow_terminal(shell: Call, tmp_path: Path) -> None:
    ended = shell(["znormseg", "predict", "--help"], environment={**TERMINAL, "COLUMNS": "60"}, cwd=tmp_path)
    assert (
        "  znormseg predict starter PREDICTIONS --t1 a.nii.gz --t1c b.nii.gz --t2 c.nii.gz --flair d.nii.gz\n"
        in ended.out
    )


#: Verbs that only have subcommands, or whose subcommands have the common options.
GROUPS: tuple[list[str], ...] = (
    [],
    ["data"],
    ["config"],
    ["model"],
    ["remote"],
    ["serve"],
    ["serve", "token"],
    ["serve", "user"],
)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in GROUPS], ids=" ".join)
def test_every_help_text_has_quiet_and_most_have_an_example(verb: list[str]) -> None:
    text = (GOLDEN / f"help_{'_'.join(verb)}.txt").read_text(encoding="utf-8")
    assert "-q, --quiet" in text
    assert verb[0] == "data" or f"  znormseg {' '.join(verb)}" in text


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (("predcit",), "Did you mean 'predict'?"),
        (("train", "DATA", "RUN", "--conifg", "laptop"), "--config"),
        (("config", "show", "laptp"), "did you mean laptop?"),
        (("config", "show", "laptop", "--set", "training.stepps=3"), "did you mean training.steps?"),
    ],
    ids=str,
)
def test_a_typo_is_answered_with_a_suggestion(words: tuple[str, ...], advice: str, znormseg: Call) -> None:
    ended = znormseg(*words)
    assert ended.code in (2, 4)
    assert advice in ended.err


def test_quiet_does_not_suppress_the_result(tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    ended = znormseg("predict", tiny_run, phantoms, tmp_path, "--quiet")
    assert ended.err == ""
    assert "Research use only" in ended.out


def test_config_show_prints_a_config_that_train_accepts(tmp_path: Path, znormseg: Call) -> None:
    shown = znormseg("config", "show", "laptop", "--set", "training.steps=7")
    (tmp_path / "mine.yaml").write_text(shown.out, encoding="utf-8")
    again = znormseg("config", "show", tmp_path / "mine.yaml", "--json")
    assert json.loads(again.out)["training"]["steps"] == 7


def test_config_list_names_every_config(znormseg: Call) -> None:
    from app.config.load import config_names

    assert list(only_object(znormseg("config", "list", "--json"))) == config_names()


def test_a_table_in_a_terminal_does_not_interpret_ids_as_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    from app.cli import terminal

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "[red]x[/red]" in terminal.table([["case", "ml"], ["[red]x[/red]", "1.0"]])


def test_the_help_names_every_config(shell: Call) -> None:
    from app.config.load import config_names

    text = (GOLDEN / "help_train.txt").read_text(encoding="utf-8")
    assert [name for name in config_names() if name not in text] == []


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["predict", "--help"], ["--version"]])
def test_help_and_version_import_neither_torch_nor_monai(arguments: list[str], shell: Call, tmp_path: Path) -> None:
    ended = shell(["python", "-X", "importtime", "-m", "app", *arguments], cwd=tmp_path)
    loaded = {line.rpartition("|")[2].strip() for line in ended.err.splitlines()}
    assert "app.cli.main" in loaded
    assert not {"torch", "monai", "numpy", "nibabel"} & loaded


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_short_and_long_help_are_the_same(option: str, znormseg: Call) -> None:
    assert znormseg("evaluate", option).out == znormseg("evaluate", "--help").out


def test_the_version_is_that_of_the_package(znormseg: Call) -> None:
    from importlib import metadata

    assert znormseg("--version") == (0, f"znormseg {metadata.version('znormseg')}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [[], ["segment"], ["--nonsense"], ["data"], ["data", "mend"], ["train"], ["train", "--set"], ["evaluate", "a"]],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)
def test_a_usage_error_has_its_own_exit_code(arguments: list[str], znormseg: Call) -> None:
    ended = znormseg(*arguments)
    assert ended.code == 2
    assert "Usage: " in ended.out + ended.err or "Error: " in ended.err


@pytest.mark.parametrize("verb", ["evaluate", "rank"])
def test_scoring_commands_report_progress_on_stderr_unless_quiet(
    verb: str, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    shutil.copytree(phantoms, tmp_path / "others")
    given = [phantoms, phantoms] if verb == "evaluate" else [phantoms, tmp_path / "others", "--references", phantoms]
    last = f"{'' if verb == 'evaluate' else 'others: '}{max(path.name for path in phantoms.iterdir())}"
    told, quiet = znormseg(verb, *given), znormseg(verb, *given, "--quiet")
    assert told.err.splitlines()[-1] == f"scoring 100%  {last}"
    assert (quiet.out, quiet.err) == (told.out, "")


# JSON on stdout


def test_train_prints_one_json_object(phantoms: Path, tmp_path: Path, options: list[str], znormseg: Call) -> None:
    content = only_object(znormseg("train", phantoms, tmp_path / "run", *options, "--json"))
    known = {"run", "steps", "seconds", "loss", "validation_dice", "best_step", "skipped_steps", "stopped_early"}
    assert set(content) == known
    assert (content["run"], content["steps"], content["best_step"]) == (str(tmp_path / "run"), 4, 4)
    assert set(content["validation_dice"]) == {"WT", "TC", "ET"}


def test_predict_prints_one_json_object(tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    case = sorted(phantoms.iterdir())[0]
    content = only_object(znormseg("predict", tiny_run, case, tmp_path, "--json"))
    assert content["failures"] == {}
    assert content["cases"] == [json.loads((tmp_path / f"{case.name}.json").read_text())]


def test_evaluate_prints_one_json_object(phantoms: Path, znormseg: Call) -> None:
    content = only_object(znormseg("evaluate", phantoms, phantoms, "--json"))
    assert set(content["regions"]) == {"WT", "TC", "ET"}
    assert {content["regions"][region]["dice"] for region in content["regions"]} == {1.0}
    assert [case["case"] for case in content["cases"]] == sorted(path.name for path in phantoms.iterdir())


def test_data_check_prints_one_json_object(phantoms: Path, znormseg: Call) -> None:
    content = only_object(znormseg("data", "check", phantoms, "--json"))
    assert (content["convention"], content["patients"], content["problems"]) == ("brats2021", 6, [])
    assert [case["problems"] for case in content["cases"]] == [[]] * 6


def test_data_phantom_prints_one_json_object(tmp_path: Path, znormseg: Call) -> None:
    content = only_object(znormseg("data", "phantom", tmp_path, "-n", "2", "--spacing-mm", "8", "--json"))
    assert content == {"folder": str(tmp_path), "cases": sorted(path.name for path in tmp_path.iterdir())}
    assert len(content["cases"]) == 2


@pytest.mark.slow
def test_demo_prints_one_json_object(tmp_path: Path, znormseg: Call) -> None:
    from app.experiments.demo import HELD_OUT

    content = only_object(znormseg("demo", "--out", tmp_path / "demo", "--json"))
    assert Path(content["page"]).is_file()
    assert len(content["cases"]) == HELD_OUT
    assert content["regions"]["WT"]["dice"] > 0.4  # trains for minutes, and a busy machine makes few steps in them


@pytest.mark.slow
def test_a_separate_process_writes_only_json_to_stdout(
    phantoms: Path, tmp_path: Path, options: list[str], shell: Call
) -> None:
    ended = shell(["znormseg", "train", phantoms, tmp_path / "run", *options, "--json"])
    assert json.loads(ended.out)["steps"] == 4
    assert "training 100%" in ended.err
    assert "Warning" not in ended.err


# Words on stdout


def test_train_reports_the_result_and_the_next_step(
    phantoms: Path, tmp_path: Path, options: list[str], znormseg: Call
) -> None:
    ended = znormseg("train", phantoms, tmp_path / "run", *options)
    assert ended.out.startswith("4 steps in ")
    assert f"next: znormseg predict {tmp_path / 'run'} CASES OUTPUT" in ended.out
    assert "training" not in ended.out


def test_predict_shows_one_row_per_case_and_the_notice(
    tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    ended = znormseg("predict", tiny_run, phantoms, tmp_path)
    rows = [line.split()[0] for line in ended.out.splitlines() if line.startswith("BraTS2021_")]
    assert rows == sorted(path.name for path in phantoms.iterdir())
    assert "Research use only; not a medical device." in ended.out


def test_evaluate_writes_the_table_to_the_given_path(phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    ended = znormseg("evaluate", phantoms, phantoms, "--out", tmp_path / "scores.csv")
    assert ended.code == 0
    assert "1.000" in ended.out
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 1 + 6 + 2


def test_evaluate_checks_the_table_path_before_scoring(phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    ended = znormseg("evaluate", phantoms, phantoms, "--out", tmp_path / "missing" / "scores.csv")
    assert (ended.code, ended.out) == (3, "")
    assert "missing does not exist. Create it first." in ended.err


def test_evaluate_reports_unmatched_cases(phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    case = sorted(phantoms.iterdir())[0]
    shutil.copytree(case, tmp_path / case.name)
    ended = znormseg("evaluate", tmp_path, phantoms)
    assert ended.code == 0
    assert "no prediction for 5 cases: BraTS2021_00001" in ended.err


def test_evaluate_of_a_folder_with_one_bad_file_scores_the_others(
    phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    for case in sorted(phantoms.iterdir())[:2]:
        shutil.copy(case / f"{case.name}_seg.nii.gz", tmp_path / f"{case.name}.nii.gz")
    bad = tmp_path / "BraTS2021_00000.nii.gz"
    bad.write_bytes(bad.read_bytes()[:100])
    ended = znormseg("evaluate", tmp_path, phantoms)
    assert ended.code == 6
    assert str(bad) in ended.err
    assert "BraTS2021_00001" in ended.out


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["words", "json"])
def test_data_check_of_a_broken_data_set_names_the_problem_and_exits_with_bad_data(
    as_json: list[str], phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    data = Path(shutil.copytree(phantoms, tmp_path / "data"))
    (data / "BraTS2021_00002" / "BraTS2021_00002_t2.nii.gz").unlink()
    ended = znormseg("data", "check", data, *as_json)
    assert ended.code == 3
    assert "contrast t2 is missing" in ended.out


def test_data_check_reports_notes_and_succeeds(phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    data = Path(shutil.copytree(phantoms, tmp_path / "data"))
    (data / "BraTS2021_00002" / "BraTS2021_00002_seg.nii.gz").unlink()
    ended = znormseg("data", "check", data)
    assert ended.code == 0
    assert "note, data set: no label map: 1 of 6 have no label map: BraTS2021_00002. They can be predicted" in ended.out


def test_data_check_names_what_was_swapped_and_what_to_do(phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    data = Path(shutil.copytree(phantoms, tmp_path / "data"))
    t2, flair = (data / "BraTS2021_00002" / f"BraTS2021_00002_{name}.nii.gz" for name in ("t2", "flair"))
    t2.rename(tmp_path / "t2.nii.gz")
    flair.rename(t2)
    (tmp_path / "t2.nii.gz").rename(flair)
    ended = znormseg("data", "check", data, "--json")
    assert ended.code == 3
    (case,) = [case for case in json.loads(ended.out)["cases"] if case["findings"]]
    assert [(f["kind"], f["contrast"]) for f in case["findings"]] == [
        ("swapped contrasts", "t2"),
        ("swapped contrasts", "flair"),
    ]


def test_data_check_reports_a_clean_data_set(phantoms: Path, znormseg: Call) -> None:
    ended = znormseg("data", "check", phantoms)
    assert ended.code == 0
    assert "6 cases of 6 patients; labels: brats2021" in ended.out
    assert "nothing wrong found" in ended.out


# Errors


def test_an_error_is_one_line_without_a_traceback(tmp_path: Path, znormseg: Call) -> None:
    ended = znormseg("predict", tmp_path, tmp_path / "nowhere", tmp_path / "out")
    assert ended.err == f"znormseg: {tmp_path / 'nowhere'}: does not exist\n"
    assert ended.out == ""


def test_debug_shows_the_traceback_and_keeps_the_code(tmp_path: Path, znormseg: Call) -> None:
    ended = znormseg("--debug", "predict", tmp_path, tmp_path / "nowhere", tmp_path / "out")
    assert ended.code == 3
    assert "Traceback (most recent call last)" in ended.err
    assert "DataError" in ended.err


def test_a_refused_config_has_its_own_exit_code(phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    ended = znormseg("train", phantoms, tmp_path / "run", "--set", "training.step=5")
    assert ended.code == 4
    assert "laptop: unknown key training.step; did you mean training.steps?" in ended.err
    assert not (tmp_path / "run").exists()


def test_a_closed_pipe_is_not_an_error(shell: Call, phantoms: Path) -> None:
    ended = shell(["bash", "-c", 'set -o pipefail; znormseg data check "$0" --json | head -c 1 > /dev/null', phantoms])
    assert "Traceback" not in ended.err
    assert "internal error" not in ended.err


# In a narrow terminal


def test_a_table_is_never_truncated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    row = ["BraTS2021_01479", *(f"{number}.12345" for number in range(9))]
    shown = terminal.table([["case", *(f"column {number}" for number in range(9))], row])
    assert all(cell in shown for cell in row)


def test_a_narrow_terminal_still_shows_progress_bar_and_time() -> None:
    console = Console(file=io.StringIO(), width=70, force_terminal=True, color_system=None)
    with terminal._bar(console) as drawn:
        drawn(Progress(job="training", share=0.5, detail="step 48  loss 0.792  " + "more " * 30, eta_seconds=266))
    last = [line for line in console.file.getvalue().splitlines() if "training" in line][-1]  # type: ignore[attr-defined]
    assert "50%" in last
    assert "ETA 4:26 step 48" in last


def test_a_config_is_shown_without_documentation_markup(znormseg: Call) -> None:
    assert not re.search(r":[a-z]+:`", znormseg("config", "show", "laptop").out)


def test_t1ce_is_an_alias_of_t1c(tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    case = phantoms / "BraTS2021_00000"
    words = [word for end in ("t1", "t1ce", "t2", "flair") for word in (f"--{end}", case / f"{case.name}_{end}.nii.gz")]
    assert znormseg("predict", tiny_run, tmp_path / "out", *words).code == 0


def test_a_folder_that_is_not_a_run_is_reported_as_such(phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    ended = znormseg("predict", phantoms, phantoms, tmp_path / "out")
    assert (ended.code, "not the folder of a run" in ended.err) == (5, True)
