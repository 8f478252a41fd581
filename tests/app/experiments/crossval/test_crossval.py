"""``znormseg crossval``: how cases are dealt, how rules are chosen, resuming, what it writes and refuses."""

from __future__ import annotations

import ast
import csv
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.config.load import load_config
from app.errors import ConfigError, RunError
from app.experiments.crossval.logits import no_counts
from app.experiments.crossval.out_of_fold import (
    OutOfFoldPrediction,
    is_of,
    read_computed_by,
    read_counts,
    read_prediction,
    write_prediction,
)
from app.experiments.crossval.plan import deal, read_folds, require_same
from app.experiments.crossval.tune import MARGIN, Scores, choose_rules, tune
from app.experiments.crossval.workers import fold_devices
from app.inference.backends.choose import choose_backend
from app.inference.postprocess import Postprocess
from app.runs.folder import read_metrics
from app.system.device import RuntimeConfig
from app.system.worker_pool import worker_environment
from data.datasets.patients import patient_of
from data.datasets.source import DataSource

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def options(tiny_settings: list[str]) -> list[str]:
    """Two folds of runs of half a second."""
    return ["--folds=2", *(word for one in tiny_settings for word in ("--set", one))]


@pytest.fixture(scope="module")
def finished(phantoms: Path, tiny_settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cross-validation of these options, ended well; tests read it and leave it as it is."""
    from app.experiments.crossval.run import CrossValidation, cross_validate
    from app.reports.crossval import write_crossval_page

    out = tmp_path_factory.mktemp("crossval") / "out"
    outcome = cross_validate(DataSource(phantoms), out, load_config("laptop", tiny_settings), folds=2)
    assert isinstance(outcome, CrossValidation)
    write_crossval_page(outcome)
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def weights_of(out: Path) -> list[str]:
    return [network["weights_sha256"] for network in read(out / "ensemble" / "ensemble.json")["networks"]]


# Rules


def answer(seed: int, *, shape: tuple[int, int, int] = (12, 12, 6)) -> OutOfFoldPrediction:
    """A blob of each region, as a network that marks too much says it: shifted, with specks."""
    draw = np.random.default_rng(seed)
    places = np.indices(shape)
    distance = np.sqrt(sum((axis - size / 2) ** 2 for axis, size in zip(places, shape, strict=True)))
    reference = np.select([distance < 1.2, distance < 2.5, distance < 4], [3, 1, 2], 0).astype(np.uint8)
    radii = np.array([4.9, 3.1, 1.2]).reshape(3, 1, 1, 1)
    shares = 1 / (1 + np.exp(distance - radii)) + draw.normal(0, 0.12, (3, *shape))
    return OutOfFoldPrediction(
        answers=(shares.clip(0, 1) * 255).astype(np.uint8),
        reference=reference,
        logit_counts=no_counts(),
        spacing_mm=(2.0, 2.0, 2.0),
        weights_sha256=f"{seed}",
    )


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of six such cases."""
    folder = tmp_path_factory.mktemp("answers")
    files = {f"case{seed}": folder / f"case{seed}.npz" for seed in range(6)}
    for seed, path in enumerate(files.values()):
        write_prediction(path, answer(seed))
    return files


def test_chosen_rules_are_never_worse_on_the_cases_they_were_chosen_on(answers: dict[str, Path]) -> None:
    scores = Scores(answers)
    for draw in range(8):
        used = np.random.default_rng(draw).random(len(answers)) < 0.5
        used[draw % len(answers)] = True
        chosen, _ = choose_rules(scores, used)
        before, after = scores.of([Postprocess(), chosen])
        assert after[used].mean() >= before[used].mean()


def test_the_total_gain_is_the_sum_of_the_steps(answers: dict[str, Path]) -> None:
    tuning = tune(Scores(answers), [0, 0, 1, 1, 2, 2])
    assert tuning.after - tuning.before == pytest.approx(sum(step.gain for step in tuning.steps))
    assert tuning.after > tuning.before + MARGIN


def test_a_rule_is_kept_only_if_it_gains_at_least_the_margin(answers: dict[str, Path]) -> None:
    for step in tune(Scores(answers), [0, 0, 1, 1, 2, 2]).steps:
        assert step.gain == (step.best_candidate_gain if step.best_candidate_gain >= MARGIN else 0.0)


def test_without_a_gain_no_rule_is_chosen(tmp_path: Path) -> None:
    perfect = answer(0)
    regions = np.stack([perfect.reference > 0, np.isin(perfect.reference, (1, 3)), perfect.reference == 3])
    kept = OutOfFoldPrediction(
        answers=(regions * 255).astype(np.uint8),
        reference=perfect.reference,
        logit_counts=no_counts(),
        spacing_mm=perfect.spacing_mm,
        weights_sha256="",
    )
    for name in ("a", "b"):
        write_prediction(tmp_path / name, kept)
    tuning = tune(Scores({name: tmp_path / name for name in ("a", "b")}), [0, 1])
    assert tuning.chosen == Postprocess()
    assert (tuning.before, tuning.after, tuning.estimated_gain) == (1.0, 1.0, 0.0)


def test_the_estimate_chooses_without_the_fold_it_scores(answers: dict[str, Path]) -> None:
    scores, fold_of = Scores(answers), [0, 0, 1, 1, 2, 2]
    tuning = tune(scores, fold_of)
    for fold, rules in enumerate(tuning.nested):
        others = np.array(fold_of) != fold
        assert rules == choose_rules(scores, others)[0]
        plain, ruled = scores.of([Postprocess(), rules])
        assert tuning.nested_gains[fold] == pytest.approx((ruled - plain)[~others].mean())
    assert tuning.estimated_gain == pytest.approx(np.mean(tuning.nested_gains))


def test_dice_of_the_kept_box_equals_dice_of_the_whole_volume(answers: dict[str, Path]) -> None:
    from app.evaluation.metrics import dice
    from data.labels import to_regions

    rules = Postprocess(thresholds=(0.625, 0.5, 0.375), smallest_mm3=(100.0, 30.0, 0.0))
    (found,) = Scores({"one": answers["case3"]}).of([rules])
    whole = answer(3)
    masks = rules.clean(whole.cut(rules), whole.spacing_mm)
    assert found[0].tolist() == [
        dice(one, other) for one, other in zip(masks, to_regions(whole.reference), strict=True)
    ]


def test_predictions_survive_the_round_trip_through_their_file(answers: dict[str, Path]) -> None:
    one, other = answer(2), read_prediction(answers["case2"])
    assert np.array_equal(one.answers, other.answers)
    assert np.array_equal(one.reference, other.reference)
    assert np.array_equal(one.logit_counts, read_counts(answers["case2"]))
    assert (one.spacing_mm, one.weights_sha256) == (other.spacing_mm, other.weights_sha256)


def test_threads_that_read_files_parse_one_header_at_a_time(
    answers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    literal_eval, busy = ast.literal_eval, threading.Lock()

    def slow(header: str) -> Any:
        assert busy.acquire(blocking=False), "two headers are parsed at once"
        time.sleep(0.002)
        busy.release()
        return literal_eval(header)

    monkeypatch.setattr(ast, "literal_eval", slow)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert len(Scores(answers).of([Postprocess()])[0]) == 6


def test_a_truncated_file_is_treated_as_missing(answers: dict[str, Path], tmp_path: Path) -> None:
    cut = tmp_path / "cut.npz"
    cut.write_bytes(answers["case1"].read_bytes()[:-40])
    assert (is_of(answers["case1"], "1"), is_of(cut, "1"), is_of(answers["case1"], "2")) == (True, False, False)
    with pytest.raises(RunError, match=r"cut.npz: missing or damaged .* Delete it to predict its case again"):
        read_prediction(cut)


# Devices and workers


def test_without_devices_everything_is_done_in_this_process() -> None:
    assert fold_devices(None, None, config_device="cpu") == (None,)


def test_each_device_is_a_process_and_may_be_given_twice() -> None:
    assert fold_devices("cuda:0, cuda:1,cuda:1", None, config_device="auto") == ("cuda:0", "cuda:1", "cuda:1")


@pytest.mark.parametrize(
    ("devices", "jobs", "config", "told"),
    [
        ("cuda:0", 2, "auto", "either --devices or --jobs"),
        ("gpu0", None, "auto", "--devices takes cpu, cuda and cuda:N"),
        (",", None, "auto", "--devices takes"),
        (None, 0, "auto", "--jobs takes 1 to 64"),
        ("cuda:0", None, "cuda:1", "cannot be combined with runtime.device: cuda:1"),
    ],
)
def test_invalid_devices_are_refused(devices: str | None, jobs: int | None, config: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        fold_devices(devices, jobs, config_device=config)


@pytest.mark.parametrize(
    ("device", "visible", "seen"),
    [("cuda:1", None, "1"), ("cuda:1", "4,6", "6"), ("cpu", "4,6", ""), ("cuda", "4,6", "4,6"), (None, None, None)],
)
def test_a_worker_sees_only_its_own_gpu(device: str | None, visible: str | None, seen: str | None) -> None:
    given = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert worker_environment(device, 2, given=given).get("CUDA_VISIBLE_DEVICES") == seen


def test_a_hidden_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES leaves 1"):
        worker_environment("cuda:1", 2, given={"CUDA_VISIBLE_DEVICES": "3"})


# Output


def test_each_case_is_predicted_by_the_network_not_trained_on_its_patient(finished: Path, phantoms: Path) -> None:
    folds = read_folds(finished, DataSource(phantoms))
    assert sorted(folds.fold_of()) == sorted(folds.cases)
    for case_id, fold in folds.fold_of().items():
        assert read_prediction(folds.prediction_file(case_id)).weights_sha256 == weights_of(finished)[fold]
        trained = {patient_of(other) for other in read(finished / f"fold-{fold}" / "split.json")["train"]}
        assert patient_of(case_id) not in trained


def test_the_table_has_every_case_with_and_without_rules(finished: Path, phantoms: Path) -> None:
    with (finished / "crossval.csv").open() as file:
        rows = list(csv.DictReader(file))
    cases = sorted(read_folds(finished, DataSource(phantoms)).cases)
    assert sorted(row["case"] for row in rows if row["masks"] == "raw") == cases
    assert sorted(row["case"] for row in rows if row["masks"] == "tuned") == cases
    mean = np.mean(
        [float(row[f"{region}_dice"]) for row in rows for region in ("WT", "TC", "ET") if row["masks"] == "raw"]
    )
    assert read(finished / "crossval.json")["raw"]["all"]["mean"]["mean"] == pytest.approx(mean)
    assert read(finished / "crossval.json")["tuning"]["objective_before"] == pytest.approx(mean)


def test_logits_are_counted_in_the_box_around_the_tumour(finished: Path, phantoms: Path) -> None:
    from app.evaluation.reliability import box_around

    for file in sorted((finished / "out-of-fold").iterdir())[:2]:
        kept = read_prediction(file)
        box = box_around((kept.answers[0] >= 128) | (kept.reference != 0), kept.spacing_mm)
        assert box is not None
        # The kept box has all of the brain and may cut the box around the tumour, where there is nothing but 0.
        voxels = np.prod(kept.reference[box].shape)
        counted = kept.logit_counts.sum(axis=(1, 2))
        assert (counted >= voxels).all()
        assert (counted - kept.logit_counts[:, :, 0].sum(axis=1) <= voxels).all()
        assert kept.logit_counts[0, 1].sum() == np.count_nonzero(kept.reference)


def test_the_ensemble_has_the_calibration_of_the_cross_validation(finished: Path) -> None:
    told = read(finished / "crossval.json")["calibration"]
    packed = read(finished / "ensemble" / "ensemble.json")["calibration"]
    assert {key: told[key] for key in packed} == packed
    assert packed["volume_interval"] == {
        "level": 0.9,
        "offset_ml": 1.0,
        "cases": 6,
        "log_ratio": {"plain": None, "postprocessed": None},
    }
    assert all(0.1 <= value <= 10 for value in packed["temperature"].values())


def test_a_prediction_without_logit_counts_is_recomputed(finished: Path, tmp_path: Path) -> None:
    first = sorted((finished / "out-of-fold").iterdir())[0]
    with np.load(first) as file:
        older = {key: file[key] for key in file.files if key != "logit_counts"}
    np.savez_compressed(tmp_path / "older.npz", **older)
    weights = str(older["weights_sha256"])
    assert (is_of(first, weights), is_of(tmp_path / "older.npz", weights)) == (True, False)
    with pytest.raises(RunError, match="missing or damaged"):
        read_counts(tmp_path / "older.npz")


def test_scores_equal_those_of_label_maps_written_by_predict(
    finished: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    fold = read(finished / "fold-0" / "split.json")["validation"]
    for case_id in fold:
        ended = znormseg("predict", finished / "fold-0", phantoms / case_id, tmp_path / "out", "--device=cpu")
        assert ended.code == 0
    scored = json.loads(znormseg("evaluate", tmp_path / "out", phantoms, "--json").out)["regions"]
    told = read(finished / "crossval.json")["raw"]["folds"][0]
    for region in ("WT", "TC", "ET"):  # the same masks; the tolerance is that of a mean's order
        assert told[region] == pytest.approx(scored[region]["dice"])
        assert told[f"{region}_hd95_mm"] == pytest.approx(scored[region]["hd95_mm"])


def test_the_table_states_what_computed_the_predictions(
    finished: Path, phantoms: Path, options: list[str], znormseg: Call
) -> None:
    runtime = choose_backend("auto", RuntimeConfig(device="cpu"))
    assert read(finished / "crossval.json")["out_of_fold"] == [{**runtime.record(), "count": 6}]
    words = f"{runtime.backend}, {runtime.precision_name}, cpu"
    assert words in (finished / "crossval.html").read_text(encoding="utf-8")
    assert f"predictions: {words}" in znormseg("crossval", phantoms, finished, *options).out


def test_predictions_without_a_recorded_backend_are_kept_and_named(
    finished: Path, phantoms: Path, options: list[str], tmp_path: Path, znormseg: Call
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    first, *others = sorted((out / "out-of-fold").iterdir())
    write_prediction(first, replace(read_prediction(first), computed_by=None))
    before = first.read_bytes()
    ended = znormseg("crossval", phantoms, out, *options)
    assert ended.code == 0
    assert first.read_bytes() == before
    assert "computed by different backends" in ended.err
    assert "torch, by an earlier version: 1" in ended.err
    assert [one["count"] for one in read(out / "crossval.json")["out_of_fold"]] == [len(others), 1]


@pytest.mark.parametrize("told", ["[]", '{"backend": 3}', "torch"])
def test_a_prediction_with_an_unreadable_backend_is_damaged(
    told: str, answers: dict[str, Path], tmp_path: Path
) -> None:
    with np.load(answers["case1"]) as file:
        np.savez_compressed(tmp_path / "odd.npz", **{**file, "computed_by": np.array(told)})
    for read_one in (read_prediction, read_computed_by):
        with pytest.raises(RunError, match=r"odd.npz: missing or damaged .* Delete it"):
            read_one(tmp_path / "odd.npz")


def test_the_ensemble_is_self_contained(finished: Path, phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    alone = shutil.copytree(finished / "ensemble", tmp_path / "moved")
    case = sorted(read_folds(finished, DataSource(phantoms)).cases)[0]
    assert znormseg("predict", alone, phantoms / case, tmp_path / "out", "--device=cpu").code == 0
    told = read(tmp_path / "out" / f"{case}.json")
    assert [one["weights_sha256"] for one in told["ensemble"]] == weights_of(finished)
    assert told["postprocess"] == read(finished / "crossval.json")["tuned"]["postprocess"]


def test_the_page_is_self_contained(finished: Path) -> None:
    page = (finished / "crossval.html").read_text(encoding="utf-8")
    assert page.count("<h2") == 5
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page
    assert '"></th>' not in page
    for text in ("Fold 0", "Fold 1", "Worst cases", "Estimated gain on others", "Validation Dice", "Temperature"):
        assert text in page


def test_the_command_prints_the_folds_and_the_next_step(
    finished: Path, phantoms: Path, options: list[str], znormseg: Call
) -> None:
    ended = znormseg("crossval", phantoms, finished, *options)
    assert ended.code == 0, ended.err
    assert "fold 1 " in ended.out
    assert "calibration ET: temperature " in ended.out
    assert f"next: znormseg predict {finished / 'ensemble'} CASES OUTPUT" in ended.out


# Resuming


def test_finished_work_is_not_repeated(finished: Path, phantoms: Path, options: list[str], znormseg: Call) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*/*") if "ensemble" not in path.parts}
    assert znormseg("crossval", phantoms, finished, *options, "--json").code == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_lost_prediction_and_a_lost_fold_are_reproduced_exactly(
    finished: Path, phantoms: Path, options: list[str], tmp_path: Path, znormseg: Call
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    first = sorted((out / "out-of-fold").iterdir())[0]
    kept = read_prediction(first)
    first.unlink()
    shutil.rmtree(out / "fold-1")
    (out / "results" / "fold-1.json").unlink()
    shutil.rmtree(out / "ensemble")
    assert znormseg("crossval", phantoms, out, *options).code == 0
    assert np.array_equal(read_prediction(first).answers, kept.answers)
    assert weights_of(out) == weights_of(finished)
    assert (out / "crossval.csv").read_text() == (finished / "crossval.csv").read_text()


def test_a_cross_validation_killed_during_start_up_resumes(
    finished: Path, phantoms: Path, options: list[str], tmp_path: Path, znormseg: Call
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished / "splits", out / "splits")
    (out / "splits" / "fold-1.json").unlink()
    (out / ".partial-1-folds.json").write_text("{")
    assert znormseg("crossval", phantoms, out, *options).code == 0
    assert weights_of(out) == weights_of(finished)


def test_damaged_best_weights_of_a_fold_fall_back_to_the_previous_pair(
    finished: Path, phantoms: Path, options: list[str], tmp_path: Path, znormseg: Call
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "fold-0" / "checkpoints" / "best-999999999.json").write_text("{")
    ended = znormseg("crossval", phantoms, out, *options)
    assert ended.code == 0, ended.err
    assert weights_of(out) == weights_of(finished)


# Refusals


def test_another_config_is_refused(finished: Path, phantoms: Path, options: list[str], znormseg: Call) -> None:
    ended = znormseg("crossval", phantoms, finished, *options, "--set=training.steps=5")
    assert ended.code == 4
    assert "config.training.steps: 4 -> 5" in ended.err


def test_another_number_of_folds_is_refused(finished: Path, phantoms: Path, options: list[str], znormseg: Call) -> None:
    ended = znormseg("crossval", phantoms, finished, *options, "--folds=3")
    assert ended.code == 4
    assert "folds: 2 -> 3" in ended.err


def test_other_cases_are_refused(
    finished: Path, phantoms: Path, options: list[str], tmp_path: Path, znormseg: Call
) -> None:
    data = shutil.copytree(phantoms, tmp_path / "data")
    gone = sorted(read_folds(finished, DataSource(phantoms)).cases)[0]
    shutil.rmtree(data / gone)
    ended = znormseg("crossval", data, finished, *options)
    assert ended.code == 3
    assert f"started with other cases: 1 ({gone}) missing, 0 new" in ended.err


@pytest.mark.parametrize(("folds", "code", "told"), [(1, 4, "--folds takes 2 to 20"), (7, 3, "6 patients for 7 folds")])
def test_impossible_folds_are_refused(
    *, folds: int, code: int, told: str, phantoms: Path, options: list[str], tmp_path: Path, znormseg: Call
) -> None:
    ended = znormseg("crossval", phantoms, tmp_path / "out", *options, f"--folds={folds}")
    assert ended.code == code
    assert told in ended.err
    assert not (tmp_path / "out").exists()


def test_cases_of_different_spacings_need_an_explicit_spacing(
    phantoms: Path, options: list[str], tmp_path: Path, znormseg: Call
) -> None:
    import nibabel as nib

    from data.phantoms import write_phantoms

    data = tmp_path / "data"
    write_phantoms(data, 2, seed=0, spacing_mm=4.0)
    for path in sorted(data.iterdir())[0].glob("*.nii.gz"):
        image: Any = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine @ np.diag([1.5, 1, 1, 1])), path)
    ended = znormseg("crossval", data, tmp_path / "out", *options)
    assert ended.code == 4
    assert "from 4 to 6 mm" in ended.err


def test_a_damaged_split_of_a_fold_is_refused_with_the_file(finished: Path, phantoms: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "splits" / "fold-1.json").write_text('{"train": ["x"]}')
    with pytest.raises(RunError, match=r"fold-1\.json: damaged"):
        read_folds(out, DataSource(phantoms))


def test_a_folder_with_other_files_is_refused(
    phantoms: Path, options: list[str], tmp_path: Path, znormseg: Call
) -> None:
    (tmp_path / "notes").write_text("mine")
    ended = znormseg("crossval", phantoms, tmp_path, *options)
    assert ended.code == 5
    assert "is not empty and contains no cross-validation" in ended.err


# Real processes


def wait_for(process: subprocess.Popen[str], seen: Callable[[], bool]) -> None:
    until = time.monotonic() + 240
    while not seen():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.slow
def test_after_two_interruptions_the_same_command_ends_with_an_ensemble_and_a_page(
    tmp_path: Path, znormseg_process: Call, shell: Call
) -> None:
    from data.phantoms import write_phantoms

    data, out = tmp_path / "data", tmp_path / "out"
    write_phantoms(data, 15, seed=0, spacing_mm=2.0)
    sets = ["network.channels=[4, 8]", "network.residual_units=1", "training.patch_voxels=[24, 24, 24]"]
    sets += ["training.batch_size=1", "training.steps=60", "training.validations=1", "runtime.device=cpu"]
    command = ["crossval", data, out, "--folds=3", *(word for one in sets for word in ("--set", one))]

    process = znormseg_process(*command)
    wait_for(process, lambda: any(record["step"] >= 20 for record in read_metrics(out / "fold-0")))
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "stopped by SIGTERM after step" in said
    assert "in fold 0 of 0 to 2; everything is saved" in said

    process = znormseg_process(*command)
    wait_for(process, lambda: bool(list(out.glob("out-of-fold/*.npz"))))
    process.kill()
    process.communicate(timeout=120)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("out-of-fold/*.npz")}

    assert shell(["znormseg", *command], timeout=290).code == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    steps = [record["step"] for record in read_metrics(out / "fold-0") if record["kind"] == "train"]
    assert steps == list(range(1, 61))
    case = sorted(data.glob("BraTS*"))[0]
    assert shell(["znormseg", "predict", out / "ensemble", case, tmp_path / "predicted"]).code == 0
    assert (tmp_path / "predicted" / f"{case.name}.nii.gz").exists()
    assert "</html>" in (out / "crossval.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_two_processes_give_the_same_result_as_one(
    phantoms: Path, options: list[str], tmp_path: Path, znormseg: Call, shell: Call
) -> None:
    one = {"OMP_NUM_THREADS": "1"}
    assert shell(["znormseg", "crossval", phantoms, tmp_path / "one", *options], environment=one).code == 0
    ended = shell(["znormseg", "crossval", phantoms, tmp_path / "two", *options, "--jobs=2"], environment=one)
    assert ended.code == 0, ended.err
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "two")
    assert (tmp_path / "one" / "crossval.csv").read_text() == (tmp_path / "two" / "crossval.csv").read_text()


@pytest.mark.slow
def test_a_signal_stops_all_processes_and_the_same_command_resumes(
    phantoms: Path, options: list[str], tmp_path: Path, znormseg_process: Call
) -> None:
    import psutil

    out = tmp_path / "out"
    command = ["crossval", phantoms, out, *options, "--jobs=2", "--set=training.steps=3000"]
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = znormseg_process(*command)
        done = [len(read_metrics(out / f"fold-{fold}")) for fold in range(2)]

        def both_go_on(done: list[int] = done) -> bool:
            return all(len(read_metrics(out / f"fold-{fold}")) > done[fold] + 9 for fold in range(2))

        wait_for(process, both_go_on)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
        assert psutil.wait_procs(children, timeout=60)[1] == []
        assert process.returncode == (130 if number == signal.SIGTERM else -number), said
    assert all(list(out.glob(f"fold-{fold}/checkpoints/last-*.json")) for fold in range(2))


@pytest.mark.slow
def test_a_killed_process_is_named_and_the_others_are_saved(
    phantoms: Path, options: list[str], tmp_path: Path, znormseg_process: Call
) -> None:
    import psutil

    out = tmp_path / "out"
    process = znormseg_process("crossval", phantoms, out, *options, "--jobs=2", "--set=training.steps=3000")
    wait_for(process, lambda: all(len(read_metrics(out / f"fold-{fold}")) > 9 for fold in range(2)))
    child, other = psutil.Process(process.pid).children()
    child.kill()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 7, said
    assert "its process was killed by SIGKILL without reporting an error" in said
    assert not other.is_running()


# Regenerating the page


def test_a_regenerated_page_is_identical(finished: Path, tmp_path: Path) -> None:
    from app.reports.report import report

    made = report(finished, tmp_path / "pages")
    assert made.kind == "cross-validation"
    assert made.page.read_text(encoding="utf-8") == (finished / "crossval.html").read_text(encoding="utf-8")


def test_an_unfinished_cross_validation_has_no_page(finished: Path, tmp_path: Path, znormseg: Call) -> None:
    (tmp_path / "begun").mkdir()
    shutil.copy(finished / "folds.json", tmp_path / "begun")
    ended = znormseg("report", tmp_path / "begun", tmp_path / "pages")
    assert ended.code == 5
    assert "the cross-validation is not finished" in ended.err


# Starting from an earlier cross-validation


@pytest.mark.parametrize("jobs", [None, pytest.param("2", marks=pytest.mark.slow)])
def test_each_fold_starts_from_the_network_not_trained_on_its_validation_cases(
    *, jobs: str | None, finished: Path, phantoms: Path, options: list[str], tmp_path: Path, znormseg: Call
) -> None:
    out, ensemble = tmp_path / "out", finished / "ensemble"
    several = [] if jobs is None else ["--jobs", jobs]
    done = znormseg("crossval", phantoms, out, *options, "--init-from", ensemble, *several)
    assert done.code == 0, done.err
    assert [read(out / f"fold-{fold}" / "run.json")["init_from"]["sha256"] for fold in range(2)] == weights_of(finished)
    assert read(out / "folds.json")["folds"] == read(finished / "folds.json")["folds"]
    again = znormseg("crossval", phantoms, out, *options, "--init-from", ensemble)
    assert again.code == 0, again.err
    card = (out / "ensemble" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"weights started from those with SHA-256: {', '.join(weights_of(finished))}" in card


def test_the_earlier_cross_validation_must_have_had_the_same_cases(
    finished: Path, phantoms: Path, options: list[str], tmp_path: Path, znormseg: Call
) -> None:
    fewer = tmp_path / "fewer"
    shutil.copytree(phantoms, fewer)
    gone = next(path for path in sorted(fewer.iterdir()) if path.is_dir())
    shutil.rmtree(gone)
    done = znormseg("crossval", fewer, tmp_path / "out", *options, "--init-from", finished / "ensemble")
    assert done.code == 3
    assert f"not the cases of {finished / 'ensemble'}: missing 1 ({gone.name}), new 0." in done.err
    assert "needs the cases that the ensemble was cross-validated on" in done.err


def test_a_cross_validation_cannot_start_from_a_run(
    finished: Path, phantoms: Path, options: list[str], tmp_path: Path, znormseg: Call
) -> None:
    done = znormseg("crossval", phantoms, tmp_path / "out", *options, "--init-from", finished / "fold-0")
    assert done.code == 5
    assert "not the ensemble of a cross-validation" in done.err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def ensemble(finished: Path, tmp_path: Path) -> Path:
    """A copy of the ensemble."""
    return Path(shutil.copytree(finished / "ensemble", tmp_path / "ensemble"))


def another_ensemble(ensemble: Path) -> None:
    """Other weights than those of the cross-validation that was started."""
    path = ensemble / "ensemble.json"
    path.write_text(path.read_text().replace(read(path)["networks"][0]["weights_sha256"], "0" * 64))


def no_networks(ensemble: Path) -> None:
    path = ensemble / "ensemble.json"
    path.write_text(json.dumps({key: value for key, value in read(path).items() if key != "networks"}))


def exchanged(ensemble: Path) -> None:
    """The network of fold 1, which trained on the cases of fold 0, in place of that of fold 0."""
    shutil.rmtree(ensemble / "fold-0")
    shutil.copytree(ensemble / "fold-1", ensemble / "fold-0")


@pytest.mark.parametrize(
    ("spoil", "more", "code", "told"),
    [
        (lambda _: None, ["--folds=3"], 4, "has 2 folds, not 3. Leave out --folds, or set it to 2."),
        (lambda _: None, ["--set=network.channels=[8, 8]"], 4, "has a different network"),
        (exchanged, [], 5, "fold-0: not the weights that ensemble.json lists. Restore the folder from a copy."),
        (no_networks, [], 5, "damaged, it does not contain the folds and their networks"),
    ],
)
def test_unsuitable_ensembles_are_refused_before_the_folder_is_created(
    *,
    spoil: Call,
    more: list[str],
    code: int,
    told: str,
    ensemble: Path,
    phantoms: Path,
    options: list[str],
    tmp_path: Path,
    znormseg: Call,
) -> None:
    spoil(ensemble)
    done = znormseg("crossval", phantoms, tmp_path / "out", *options, *more, "--init-from", ensemble)
    assert done.code == code
    assert told in done.err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def started(ensemble: Path, phantoms: Path, tiny_settings: list[str], tmp_path: Path) -> Path:
    """A cross-validation from the ensemble, before its first fold."""
    config = load_config("laptop", tiny_settings)
    folds = deal(DataSource(phantoms), tmp_path / "out", config, init_from=ensemble)
    assert len(folds.splits) == 2
    require_same(folds)
    return folds.out


def test_another_ensemble_on_resume_is_refused(
    started: Path, ensemble: Path, phantoms: Path, tiny_settings: list[str]
) -> None:
    another_ensemble(ensemble)
    folds = deal(DataSource(phantoms), started, load_config("laptop", tiny_settings), init_from=ensemble)
    with pytest.raises(ConfigError, match=r"Different: --init-from: another ensemble$"):
        require_same(folds)


def test_resuming_without_the_ensemble_is_refused(
    started: Path, phantoms: Path, options: list[str], znormseg: Call
) -> None:
    done = znormseg("crossval", phantoms, started, *options)
    assert done.code == 4
    assert "Different: --init-from: an ensemble -> none" in done.err


def test_the_ensemble_is_read_only_once(
    ensemble: Path, phantoms: Path, tiny_settings: list[str], tmp_path: Path
) -> None:
    config = load_config("laptop", tiny_settings)
    folds = deal(DataSource(phantoms), tmp_path / "out", config, init_from=ensemble)
    listed = weights_of(tmp_path)
    shutil.rmtree(ensemble)
    require_same(folds)
    assert folds.to_json()["init_from"] == listed
    assert read_folds(folds.out).to_json()["init_from"] == listed
