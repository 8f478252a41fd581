"""``znormseg compare``: what all arms share, how rates are chosen, resuming, what it writes and refuses."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.errors import ConfigError
from app.experiments.comparison.plan import ARMS, ComparisonPlan, RunKey, plan_comparison
from app.experiments.comparison.run import choose_rates
from app.experiments.comparison.split import fold_parts, read_parts
from app.experiments.runs import differences
from app.inference.backends.choose import choose_backend
from app.system.device import RuntimeConfig
from data.datasets.patients import patient_of
from data.datasets.source import DataSource
from data.errors import DataError

Call = Callable[..., Any]

#: Tiny settings that a comparison sets itself.
TAKEN = ("training.steps", "training.learning_rate")
TEN = [f"BraTS2021_{number:05}" for number in range(10)]


def alone(ids: list[str]) -> dict[str, str]:
    """Each case with a patient of its name."""
    return {case_id: case_id for case_id in ids}


@pytest.fixture(scope="module")
def options(tiny_settings: list[str]) -> list[str]:
    """Two arms, one seed, two rates, runs of a third of a second."""
    settings = [word for one in tiny_settings if not one.startswith(TAKEN) for word in ("--set", one)]
    return [*settings, "--arms=clip,znorm", "--seeds=1", "--steps=4", "--learning-rates=1e-3,1e-2"]


@pytest.fixture(scope="module")
def finished(phantoms: Path, tiny_settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison of these options, ended well; tests read it and leave it as it is."""
    from app.experiments.comparison.compare import compare
    from app.reports.comparison import write_comparison_page

    out = tmp_path_factory.mktemp("comparison") / "out"
    shared = [one for one in tiny_settings if not one.startswith(TAKEN)]
    told: list[str] = []
    outcome = compare(
        DataSource(phantoms),
        out,
        plan(overrides=shared, seeds=1, steps=4, rates=["1e-3,1e-2"]),
        on_progress=lambda progress: told.append(f"{progress.share:.0%} {progress.detail} {progress.eta_seconds}"),
    )
    write_comparison_page(outcome)
    (out.parent / "progress").write_text("\n".join(told))
    return out


def content(out: Path) -> Any:
    return json.loads((out / "compare.json").read_text())


def plan(**changes: Any) -> ComparisonPlan:
    return plan_comparison(**{"arms": ["clip", "znorm"], "seeds": 2, "steps": 10, **changes})


# Parts


@pytest.mark.parametrize("fold", range(5))
def test_the_three_parts_share_no_patient_and_cover_all(fold: int) -> None:
    ids = [f"BraTS-GLI-{patient:05}-{visit:03}" for patient in range(9) for visit in range(2)]
    parts = fold_parts({case: patient_of(case) for case in ids}, fold)
    patients = [{patient_of(case) for case in part} for part in (parts.train, parts.validation, parts.test)]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 9
    assert all(patients)


def test_each_case_is_tested_in_one_fold() -> None:
    assert sorted(case for fold in range(5) for case in fold_parts(alone(TEN), fold).test) == TEN


def test_three_patients_are_enough() -> None:
    parts = fold_parts(alone(TEN[:3]), 2)
    assert [len(parts.train), len(parts.validation), len(parts.test)] == [1, 1, 1]


def test_two_patients_are_refused() -> None:
    with pytest.raises(DataError, match="2 patients: a comparison needs at least 3"):
        fold_parts(alone(TEN[:2]), 0)


def test_a_split_without_test_cases_scores_the_validation_cases(tmp_path: Path) -> None:
    (tmp_path / "split.json").write_text(json.dumps({"train": TEN[:2], "validation": TEN[2:4]}))
    assert read_parts(tmp_path / "split.json", alone(TEN)).scored == tuple(TEN[2:4])


@pytest.mark.parametrize(
    ("test", "said"),
    [("x", "list"), (["a", "a"], "twice"), (["a"], "not in the data set: a"), (TEN[:1], "is in test and in another")],
)
def test_an_invalid_list_of_test_cases_is_refused(test: object, said: str, tmp_path: Path) -> None:
    (tmp_path / "split.json").write_text(json.dumps({"train": TEN[:2], "validation": TEN[2:4], "test": test}))
    with pytest.raises(DataError, match=said):
        read_parts(tmp_path / "split.json", alone(TEN))


def test_a_split_without_validation_cases_is_refused(tmp_path: Path) -> None:
    (tmp_path / "split.json").write_text(json.dumps({"train": TEN}))
    with pytest.raises(DataError, match="validation is empty"):
        read_parts(tmp_path / "split.json", alone(TEN))


# Plan


def test_the_arms_are_those_of_the_gradient_config() -> None:
    assert {"none", "clip", "centralize", "znorm"} <= set(ARMS)
    assert plan_comparison(arms=ARMS).arms == ARMS


def test_presence_labels_of_a_table_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.labels_csv: compare scores against label maps; leave it out"):
        plan(config="presence", overrides=["task.labels_csv=labels.csv", "task.outputs=[grade]"])


def test_runs_of_one_seed_differ_only_in_arm_rate_and_optimizer() -> None:
    made = plan(optimizers=["adamw", "sgd"])
    changed = {
        line.partition(":")[0]
        for key in made.sweep()
        for line in differences(_flat(made, RunKey(optimizer="adamw", arm="clip", rate=1e-3, seed=0)), _flat(made, key))
    }
    assert changed == {"gradient.transform", "training.optimizer", "training.learning_rate"}


def _flat(made: ComparisonPlan, key: RunKey) -> dict[str, Any]:
    from app.config.load import to_plain

    return to_plain(made.config_of(key))


def test_every_arm_gets_the_same_number_of_runs() -> None:
    made = plan(optimizers=["adamw", "sgd"], rates=["1e-3,3e-3", "sgd=1e-2"])
    keys = {*made.sweep(), *made.finals({(o, a): made.rates[o][0] for o in made.optimizers for a in made.arms})}
    assert len(keys) == made.count() == 2 * (2 + 1) + 2 * (1 + 1)
    assert sum(key.arm == "clip" for key in keys) == made.count() / 2


def test_the_best_rate_is_chosen_and_ties_go_to_the_lowest() -> None:
    made = plan(rates=["1e-3,1e-2,1e-1"], seeds=1)
    dice = {("clip", 1e-3): 0.1, ("clip", 1e-2): 0.3, ("clip", 1e-1): 0.2}
    runs = {key: {"validation_dice": {"WT": dice.get((key.arm, key.rate), 0.5)}} for key in made.sweep()}
    assert choose_rates(made, runs) == {("adamw", "clip"): 1e-2, ("adamw", "znorm"): 1e-3}


def test_the_baseline_is_clip_or_otherwise_the_first_arm() -> None:
    assert [plan(arms=["znorm", "clip"]).baseline, plan(arms=["znorm", "none"]).baseline] == ["clip", "znorm"]


def test_a_variant_is_an_arm_with_its_own_config() -> None:
    made = plan(arms=["clip", "all"], variants=["all:gradient.znorm.output_block=none", "all:training.warmup=0.2"])
    changed = [
        "gradient.transform: auto -> znorm",
        "gradient.znorm.output_block: auto -> none",
        "training.warmup: 0.05 -> 0.2",
    ]
    assert made.settings_of("all") == changed
    run = made.config_of(RunKey(optimizer="sgd", arm="all", rate=1e-2, seed=3))
    assert (run.gradient.transform, run.gradient.znorm.output_block, run.training.seed) == ("znorm", "none", 3)


def test_bgn_normalises_inside_the_network_with_or_without_znorm() -> None:
    made = plan(arms=["clip", "bgn", "bgn-znorm"])
    configs = {key.arm: made.config_of(key) for key in made.sweep()}
    assert {arm: (c.network.backward_normalization, c.gradient.transform) for arm, c in configs.items()} == {
        "clip": ((), "clip"),
        "bgn": (("auto",), "none"),
        "bgn-znorm": (("auto",), "znorm"),
    }


def test_a_variant_normalises_at_other_places() -> None:
    made = plan(arms=["clip", "deep"], variants=["deep:network.backward_normalization=[model.1]"])
    run = made.config_of(RunKey(optimizer="adamw", arm="deep", rate=1e-3, seed=0))
    assert run.network.backward_normalization == ("model.1",)


def test_seeds_count_up_from_the_first() -> None:
    made = plan(first_seed=5, seeds=2)
    assert {key.seed for key in made.sweep()} == {5}
    assert {key.seed for key in made.finals(dict.fromkeys([("adamw", "clip"), ("adamw", "znorm")], 1e-3))} == {5, 6}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": ["clip", "magic"]}, "--arms: 'magic' is unknown; allowed: none, clip, "),
        ({"arms": []}, "--arms: empty"),
        ({"arms": ["clip"]}, "at least two"),
        ({"arms": ["clip", "clip"]}, "--arms: clip is given twice"),
        ({"optimizers": ["lion"]}, "--optimizers: 'lion' is unknown; allowed: adamw, sgd"),
        ({"rates": ["fast"]}, "--learning-rates fast: expected numbers above 0"),
        ({"rates": ["1e-3,-1"]}, "--learning-rates 1e-3,-1: expected numbers above 0"),
        ({"rates": ["1e-3,0.001"]}, "a rate is given twice"),
        ({"rates": ["sgd=1e-2"]}, "'sgd' is not among the optimizers (adamw)"),
        ({"rates": ["1e6"]}, "--learning-rates: training.learning_rate: from 1e-09 to 100"),
        ({"seeds": 0}, "--seeds: from 1"),
        ({"steps": 0}, "training.steps: from 1"),
        ({"baseline": "none"}, "--baseline none: not among the arms (clip, znorm)"),
        ({"target_dice": 1.5}, "--target-dice: above 0 and below 1"),
        ({"first_seed": -1}, "--first-seed: from 0"),
        ({"overrides": ["network.backward_normalization=[auto]"]}, "use --arms bgn, or --variant for other places"),
        ({"variants": ["all"]}, "--variant all: expected NAME:SECTION.KEY=VALUE"),
        ({"variants": ["clip:gradient.clip_norm=2"]}, "clip is the name of a rule"),
        ({"variants": ["all:training.seed=3"]}, "use --seeds"),
        (
            {"variants": ["all:gradient.clip_norm=2"]},
            "--variant all: not among the arms; add it, --arms clip,znorm,all",
        ),
        ({"variants": ["x:gradient.nothing=2"], "arms": ["clip", "x"]}, "--variant x: "),
        ({"overrides": ["training.seed=3"]}, "use --seeds"),
        ({"overrides": ["gradient.transform=clip"]}, "use --arms"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_an_impossible_plan_is_refused_with_a_clear_message(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(**changes)
    assert said in str(refused.value)


# A comparison from end to end


def test_initial_weights_and_first_batch_are_the_same_in_every_run_of_a_seed(finished: Path) -> None:
    starts = [run["start"] for run in content(finished)["runs"]]
    assert len(starts) == 4
    assert starts.count(starts[0]) == 4
    assert {len(starts[0][what]) for what in ("weights_sha256", "batch_sha256")} == {64}
    assert content(finished)["same_start"] is True


def test_the_recorded_initial_weights_are_those_of_the_seed(finished: Path) -> None:
    import torch

    from app.config.load import load_config
    from app.experiments.comparison.run import hash_of_weights
    from app.runs.checkpoints import Checkpoint, weight_tensors
    from app.system.device import choose_runtime
    from app.training.state import new_state

    run = content(finished)["runs"][0]
    config = load_config(str(finished / run["run"] / "config.yaml"))
    torch.manual_seed(0)
    tensors = weight_tensors(new_state(config, choose_runtime(config.runtime)).network)
    fresh = Checkpoint(step=0, tensors=tensors, details={}, sha256="")
    assert run["start"]["weights_sha256"] == hash_of_weights(fresh)


def test_every_run_is_a_run_folder_with_the_same_split(finished: Path) -> None:
    runs = sorted((finished / "runs").iterdir())
    assert [run.name for run in runs] == [
        f"adamw-{arm}-lr{rate}-seed0" for arm in ("clip", "znorm") for rate in ("0.001", "0.01")
    ]
    splits = [json.loads((run / "split.json").read_text()) for run in runs]
    assert splits == [json.loads((finished / "split.json").read_text())] * 4


def test_the_csv_has_a_row_for_each_final_run_and_test_case(finished: Path) -> None:
    with (finished / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    test = content(finished)["plan"]["parts"]["test"]
    assert [(row["arm"], row["case"]) for row in rows] == [(arm, case) for arm in ("clip", "znorm") for case in test]
    assert {row["part"] for row in rows} == {"test"}


def test_the_final_dice_equals_that_of_predict_and_evaluate(
    finished: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    with (finished / "compare.csv").open() as file:
        row = next(csv.DictReader(file))
    znormseg("predict", finished / row["run"], phantoms / row["case"], tmp_path)
    scores = json.loads(znormseg("evaluate", tmp_path, phantoms, "--json").out)
    assert float(row["dice_WT"]) == pytest.approx(scores["cases"][0]["WT"]["dice"])


def test_a_comparison_records_what_computed_the_scores(finished: Path) -> None:
    finals = [run for run in content(finished)["runs"] if "dice" in run]
    records = [run["computed_by"] for run in finals]
    assert records == [choose_backend("auto", RuntimeConfig(device="cpu")).record()] * len(finals)
    assert ", ".join(records[0].values()) in (finished / "compare.html").read_text()


def test_scores_of_an_earlier_version_are_kept_with_a_caveat_next_to_new_ones(
    finished: Path, phantoms: Path, options: list[str], tmp_path: Path, znormseg: Call
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    path = next(path for path in sorted((out / "results").iterdir()) if "computed_by" in path.read_text())
    older = json.loads(path.read_text())
    del older["computed_by"]
    path.write_text(json.dumps(older))
    assert znormseg("compare", phantoms, out, *options).code == 0
    assert json.loads(path.read_text()) == older
    assert any("torch, by an earlier version" in sentence for sentence in content(out)["caveats"])


def test_the_page_is_self_contained(finished: Path) -> None:
    page = (finished / "compare.html").read_text()
    for heading in ("Verdict", "Final Dice", "Differences from clip", "Learning curves", "Learning rates", "Seconds"):
        assert f">{heading}</h2>" in page
    assert content(finished)["verdicts"][0] in page
    assert page.count("<svg") == 2
    assert not [word for word in ("http://", "https://", "<script", "src=") if word in page]


def test_the_terminal_shows_table_verdict_limitations_and_page(
    finished: Path, phantoms: Path, options: list[str], znormseg: Call
) -> None:
    said = znormseg("compare", phantoms, finished, *options).out
    for words in (
        "clip, adamw",
        "znorm, adamw",
        content(finished)["verdicts"][0],
        "One seed: ",
        str(finished / "compare.html"),
    ):
        assert words in said


def test_progress_shows_the_run_and_the_time_left(finished: Path) -> None:
    told = (finished.parent / "progress").read_text().splitlines()
    assert "run 1 of 4  adamw-clip-lr0.001-seed0" in told[0]
    assert any("run 4 of 4  adamw-znorm-lr0.01-seed0  step 4" in line for line in told)
    assert told[-1] == "100% 4 runs 0.0"


def test_the_same_command_again_trains_nothing(
    finished: Path, phantoms: Path, options: list[str], znormseg: Call
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("runs/*/metrics.jsonl")}
    ended = znormseg("compare", phantoms, finished, *options, "--json")
    assert json.loads(ended.out) == content(finished)
    assert {path: path.stat().st_mtime_ns for path in finished.glob("runs/*/metrics.jsonl")} == before


def test_missing_runs_are_repeated_with_the_same_result(
    finished: Path, phantoms: Path, options: list[str], tmp_path: Path, znormseg: Call
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "runs" / "adamw-znorm-lr0.01-seed0")
    (tmp_path / "out" / "results" / "adamw-znorm-lr0.01-seed0.json").unlink()
    (tmp_path / "out" / "results" / "adamw-znorm-lr0.001-seed0.json").unlink()  # the run itself is whole
    assert znormseg("compare", phantoms, tmp_path / "out", *options).code == 0
    assert (tmp_path / "out" / "compare.csv").read_text() == (finished / "compare.csv").read_text()


def test_another_plan_in_the_same_folder_is_refused_with_the_differences(
    finished: Path, phantoms: Path, options: list[str], znormseg: Call
) -> None:
    ended = znormseg("compare", phantoms, finished, *options, "--steps=5", "--seeds=2")
    assert ended.code == 4
    assert "config.training.steps: 4 -> 5; seeds: 1 -> 2" in ended.err


def test_a_plan_older_than_a_config_key_is_the_same_plan(
    finished: Path, phantoms: Path, options: list[str], tmp_path: Path, znormseg: Call
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    del plan["config"]["training"]["momentum"]
    (tmp_path / "out" / "plan.json").write_text(json.dumps(plan))
    assert znormseg("compare", phantoms, tmp_path / "out", *options).code == 0


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_resumes(
    phantoms: Path, options: list[str], tmp_path: Path, znormseg: Call, znormseg_process: Call
) -> None:
    arguments = ["compare", phantoms, tmp_path / "out", *options, "--steps=200", "--learning-rates=1e-3"]
    process = znormseg_process(*arguments)
    until = time.monotonic() + 60
    while not list(tmp_path.glob("out/results/*.json")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped by SIGINT after step " in said
    assert " in run 1 of 2; everything is saved" in said
    assert "Run the same command again to resume." in said
    assert znormseg(*arguments).code == 0
    assert content(tmp_path / "out")["same_start"] is True


def test_a_damaged_result_is_named(
    finished: Path, phantoms: Path, options: list[str], tmp_path: Path, znormseg: Call
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    path = tmp_path / "out" / "results" / "adamw-clip-lr0.001-seed0.json"
    path.write_text("{")
    ended = znormseg("compare", phantoms, tmp_path / "out", *options)
    assert (ended.code, str(path) in ended.err) == (5, True)


def test_arms_that_normalise_inside_the_network_are_compared(
    phantoms: Path, options: list[str], tmp_path: Path, znormseg: Call
) -> None:
    arguments = [*options, "--arms=clip,bgn,bgn-znorm", "--learning-rates=1e-3"]
    ended = znormseg("compare", phantoms, tmp_path / "out", *arguments)
    assert ended.code == 0, ended.err
    assert content(tmp_path / "out")["same_start"] is True
    assert [row["arm"] for row in content(tmp_path / "out")["arms"]] == ["clip", "bgn", "bgn-znorm"]


# Refusals on the command line


def test_a_file_instead_of_the_folder_is_refused(phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    (tmp_path / "out").write_text("")
    ended = znormseg("compare", phantoms, tmp_path / "out")
    assert (ended.code, "is a file" in ended.err) == (5, True)


def test_a_folder_with_other_files_is_refused(phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    (tmp_path / "thesis.tex").write_text("")
    ended = znormseg("compare", phantoms, tmp_path)
    assert (ended.code, "is not empty and contains no comparison" in ended.err) == (5, True)


def test_an_unknown_arm_is_refused_before_anything_is_created(phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    ended = znormseg("compare", phantoms, tmp_path / "out", "--arms", "clip,magic")
    assert (ended.code, (tmp_path / "out").exists()) == (4, False)


def test_too_few_patients_are_a_data_error(phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    for case in sorted(phantoms.iterdir())[:2]:
        shutil.copytree(case, tmp_path / "data" / case.name)
    assert znormseg("compare", tmp_path / "data", tmp_path / "out").code == 3


def test_fold_and_split_together_are_a_usage_error(phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    assert znormseg("compare", phantoms, tmp_path / "out", "--fold=1", "--split=x.json").code == 2


def test_the_help_names_every_arm_and_config() -> None:
    from app.config.load import config_names

    text = (Path(__file__).parents[3] / "golden" / "help_compare.txt").read_text(encoding="utf-8")
    assert [name for name in (*ARMS, *config_names()) if name not in text] == []


# Regenerating the page


def test_a_regenerated_page_is_identical(finished: Path, tmp_path: Path) -> None:
    from app.reports.report import report

    made = report(finished, tmp_path / "pages")
    assert made.kind == "comparison"
    assert made.page.read_text(encoding="utf-8") == (finished / "compare.html").read_text(encoding="utf-8")


def test_an_unfinished_comparison_has_no_page(finished: Path, tmp_path: Path, znormseg: Call) -> None:
    shutil.copytree(finished, tmp_path / "begun", ignore=shutil.ignore_patterns("runs"))
    next((tmp_path / "begun" / "results").iterdir()).unlink()
    ended = znormseg("report", tmp_path / "begun", tmp_path / "pages")
    assert ended.code == 5
    assert "the comparison is not finished" in ended.err
