"""Plans: rules on made-up fingerprints and machines, fitting with made-up trials, and real dry runs."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.config.load import RunConfig, load_config, to_plain
from app.errors import ConfigError, MemoryShortError
from app.planning.dry_run import Needed, TooMuch, try_out
from app.planning.estimate import estimate, step_bytes
from app.planning.fingerprint import Extent, Fingerprint, read_data_set
from app.planning.fit import fit
from app.planning.plan import DryRun, cut_to_hours, plan_run
from app.planning.rules import CPU_STEP_VOXELS, Hardware, TrainingPlan, plan_training, smaller_network
from app.planning.trial import OUTCOME, TrialOutcome, TrialReport, TrialRequest, run_trial
from data.datasets.source import DataSource
from data.errors import DataError
from models import build_network, patch_divisor

Call = Callable[..., Any]

GB = 10**9
LAPTOP = load_config("laptop")
ADULT = Fingerprint(
    cases=100,
    with_label_map=100,
    patients=100,
    labels="brats2021",
    spacing_mm=(1.0, 1.0, 1.0),
    spacing_percentiles_mm=((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
    extents={
        "a": Extent(brain_mm=(140.0, 172.0, 140.0), tumour_mm=(50.0, 60.0, 50.0)),
        "b": Extent(brain_mm=(136.0, 170.0, 139.0), tumour_mm=(90.0, 90.0, 90.0)),
    },
    tumour_ml=(10.0, 80.0, 160.0),
    enhancing_share=0.9,
    bytes_on_disk=GB,
)
CPU = Hardware(device="cpu", half=True, memory_bytes=16 * GB, gpu_bytes=0, cores=8)
GPU = Hardware(device="cuda", half=True, memory_bytes=64 * GB, gpu_bytes=24 * GB, cores=16)


def planned(
    hardware: Hardware = CPU, base: RunConfig = LAPTOP, *, cases: int = 80, fixed: Any = (), **changes: Any
) -> TrainingPlan:
    return plan_training(replace(ADULT, **changes), hardware, base, training_cases=cases, fixed=set(fixed))


def changed(config: RunConfig, **training: Any) -> RunConfig:
    return replace(config, training=replace(config.training, **training))


# Rules


@pytest.mark.parametrize("hardware", [CPU, GPU, replace(CPU, memory_bytes=GB), replace(GPU, gpu_bytes=2 * GB)])
def test_a_patch_fits_the_network_the_brain_and_the_machine(hardware: Hardware) -> None:
    config = planned(hardware, load_config("resunet")).config
    patch, divisor = config.training.patch_voxels, patch_divisor(config.network)
    assert all(
        side % divisor == 0 and side <= brain + divisor for side, brain in zip(patch, (138, 171, 140), strict=True)
    )
    needed = estimate(config, half=True, gpu=hardware.device == "cuda")
    assert needed.host <= hardware.memory_bytes
    assert needed.gpu <= hardware.gpu_bytes
    assert config.training.batch_size >= 2


def test_a_large_gpu_takes_the_whole_brain_and_a_cpu_limits_the_voxels_per_step() -> None:
    assert planned(replace(GPU, gpu_bytes=80 * GB), load_config("resunet")).config.training.patch_voxels == (
        144,
        176,
        144,
    )
    training = planned().config.training
    assert training.batch_size * prod(training.patch_voxels) <= CPU_STEP_VOXELS


def test_less_memory_never_gives_a_larger_step() -> None:
    plans = [planned(replace(GPU, gpu_bytes=n * GB), load_config("resunet")).config.training for n in (2, 4, 8, 16, 32)]
    voxels = [plan.batch_size * prod(plan.patch_voxels) for plan in plans]
    assert voxels == sorted(voxels)
    assert voxels[0] < voxels[-1]


def test_a_small_brain_gets_fewer_levels() -> None:
    coarse = planned(spacing_mm=(4.0, 4.0, 4.0), base=load_config("resunet")).config
    assert len(coarse.network.channels) == 4
    assert coarse.network.channels == load_config("resunet").network.channels[:4]
    assert coarse.data.spacing_mm == 4.0


@pytest.mark.parametrize(
    ("spacing", "fixed", "levels"),
    [(1.0, (), 6), (4.0, (), 4), (10.0, (), 3), (4.0, ("network.blocks",), 6)],
)
def test_removing_levels_removes_their_blocks_but_keeps_enough_for_deep_supervision(
    spacing: float, fixed: tuple[str, ...], levels: int
) -> None:
    large = load_config("large")
    config = planned(replace(GPU, gpu_bytes=80 * GB), large, spacing_mm=(spacing,) * 3, fixed=fixed).config
    assert config.network.channels == large.network.channels[:levels]
    assert config.network.blocks == (1, 3, 4, 6, 6, 6)[:levels]
    assert load_config_of(config) == config


def test_unequal_spacings_are_left_to_the_median_per_axis() -> None:
    plan = planned(spacing_mm=(0.5, 0.5, 5.0))
    assert (plan.config.data.spacing_mm, plan.bounds.spacing_mm) == (None, (0.5, 0.5, 5.0))


@pytest.mark.parametrize(("cases", "steps"), [(1, 1_000), (30, 9_750), (1000, 20_000)])
def test_steps_follow_the_cases_between_two_bounds(cases: int, steps: int) -> None:
    config = planned(cases=cases, fixed=["training.batch_size"], base=changed(LAPTOP, batch_size=2)).config
    assert config.training.patch_voxels == (64, 64, 64)
    assert config.training.steps == pytest.approx(steps, abs=1)
    assert config.training.hours is None


@pytest.mark.parametrize(
    "override",
    [
        "training.patch_voxels=[32, 40, 48]",
        "training.batch_size=5",
        "training.steps=77",
        "training.hours=1.5",
        "network.channels=[8, 16]",
        "data.spacing_mm=2.0",
        "runtime.loader_threads=3",
    ],
)
def test_user_settings_are_kept_and_reported(override: str) -> None:
    key = override.partition("=")[0]
    base = load_config("laptop", [override])
    plan = planned(base=base, fixed=[key])
    section, _, name = key.partition(".")
    assert to_plain(plan.config)[section][name] == to_plain(base)[section][name]
    assert [choice.reason for choice in plan.choices if choice.key == key] == ["set by you"]


def test_unplanned_settings_keep_their_values() -> None:
    before, after = to_plain(LAPTOP), to_plain(planned().config)
    assert {section: after[section] for section in ("gradient", "augment", "inference")} == {
        section: before[section] for section in ("gradient", "augment", "inference")
    }
    assert after["training"]["learning_rate"] == before["training"]["learning_rate"]


def test_every_choice_has_a_reason() -> None:
    plan = planned()
    assert {choice.key for choice in plan.choices} == {
        "data.spacing_mm",
        "network.channels",
        "training.patch_voxels",
        "training.batch_size",
        "training.steps",
        "runtime.loader_threads",
    }
    assert all(choice.reason for choice in plan.choices)


def test_half_of_the_tumours_fit_into_a_patch_of_their_median_size() -> None:
    assert [ADULT.tumours_inside((side,) * 3) for side in (40, 60, 90)] == [0.0, 0.5, 1.0]


# Estimates


def test_an_estimate_grows_with_batch_patch_and_channels() -> None:
    small = changed(LAPTOP, patch_voxels=(32, 32, 32), batch_size=1)
    sizes = [step_bytes(one, half=False) for one in (small, changed(small, batch_size=2), LAPTOP)]
    assert sizes == sorted(set(sizes))
    assert step_bytes(LAPTOP, half=True) < step_bytes(LAPTOP, half=False)


def test_an_estimate_includes_the_coarser_logits_of_deep_supervision() -> None:
    settings = ("network.architecture=resenc", "training.patch_voxels=[32, 32, 32]")
    plain, deep = (
        load_config("laptop", [*settings, f"network.deep_supervision={wanted}"]) for wanted in ("false", "true")
    )
    assert step_bytes(deep, half=False) > step_bytes(plain, half=False)


def test_on_a_gpu_only_batches_are_in_ram() -> None:
    there, here = estimate(LAPTOP, half=True, gpu=True), estimate(LAPTOP, half=True, gpu=False)
    assert (here.gpu, there.gpu > 0) == (0, True)
    assert there.host + there.gpu == pytest.approx(here.host, abs=2)


# Fitting


def test_shrinking_reduces_the_config_each_time_and_terminates() -> None:
    config, seen = changed(LAPTOP, patch_voxels=(96, 96, 64), batch_size=6), [1 << 60]
    words = []
    while (following := smaller_network(config, fixed=())) is not None:
        config, word = following
        words.append(word.split()[0])
        seen.append(prod(config.training.patch_voxels) * config.training.batch_size * sum(config.network.channels))
    assert seen == sorted(seen, reverse=True)
    assert words == ["batch", "batch", "patch", "patch", "patch", "channels", "batch"]
    assert (config.training.patch_voxels, config.network.channels) == ((32, 32, 32), (8, 16, 32, 64))


@pytest.mark.parametrize("config", ["laptop", "unet", "resunet", "large"])
def test_every_shrunk_config_is_valid(config: str) -> None:
    following: Any = (load_config(config), "")
    while following is not None:
        assert load_config_of(following[0]) == following[0]
        following = smaller_network(following[0], fixed=())


def load_config_of(config: RunConfig) -> RunConfig:
    from app.config.load import parse_config, to_yaml

    return parse_config(to_yaml(config), "test")


def test_user_settings_are_not_shrunk() -> None:
    keys = ("training.batch_size", "training.patch_voxels", "network.channels")
    assert smaller_network(LAPTOP, fixed=keys) is None
    for key in keys:
        config: RunConfig = LAPTOP
        while (following := smaller_network(config, fixed=[key])) is not None:
            config = following[0]
        section, _, name = key.partition(".")
        assert to_plain(config)[section][name] == to_plain(LAPTOP)[section][name]


REPORT = TrialReport(
    device="cpu",
    step_seconds=(1.0, 1.0, 1.0),
    loader_seconds=0.1,
    window_seconds=0.1,
    program_files_bytes=0,
    own_bytes=0,
    case_files_bytes=0,
    gpu_bytes=None,
    gpu_free_bytes=None,
    checkpoint_bytes=1,
)


def made_up_trial(most: int) -> Callable[[RunConfig], Needed | TooMuch]:
    """A trial that takes twice what is estimated, and 0.6 GB for the program."""

    def try_out(config: RunConfig) -> Needed | TooMuch:
        needed = 600_000_000 + 2 * estimate(config, half=True, gpu=False).host
        return (
            Needed(report=REPORT, own_bytes=needed) if needed <= most else TooMuch(why="too much", needed_bytes=needed)
        )

    return try_out


def test_a_config_that_fits_is_left_unchanged() -> None:
    fitted = fit(LAPTOP, made_up_trial(10 * GB), most_bytes=10 * GB, half=True, gpu=False, fixed=())
    assert fitted.config == LAPTOP
    assert [attempt.changed for attempt in fitted.attempts] == [""]


@pytest.mark.parametrize("gigabytes", [1.5, 1.0, 0.75])
def test_a_config_that_does_not_fit_is_shrunk_in_few_attempts(gigabytes: float) -> None:
    most = int(gigabytes * GB)
    large = changed(LAPTOP, patch_voxels=(128, 128, 128), batch_size=8)
    fitted = fit(large, made_up_trial(most), most_bytes=most, half=True, gpu=False, fixed=())
    assert fitted.needed.own_bytes is not None
    assert fitted.needed.own_bytes <= most
    assert 2 <= len(fitted.attempts) <= 4
    assert fitted.attempts[-1].changed.startswith("batch 8 -> 4")


def test_if_nothing_fits_the_error_states_what_the_smallest_attempt_needed() -> None:
    with pytest.raises(MemoryShortError, match=r"smallest attempt, patch 32x32x32, batch 1, channels \[8, .*too much"):
        fit(LAPTOP, made_up_trial(1), most_bytes=GB, half=True, gpu=False, fixed=())


def test_the_error_names_the_settings_that_were_not_changed() -> None:
    with pytest.raises(MemoryShortError, match=r"keys were not changed: training\.batch_size, training\.patch_voxels"):
        fit(
            LAPTOP,
            made_up_trial(1),
            most_bytes=GB,
            half=True,
            gpu=False,
            fixed=["training.patch_voxels", "training.batch_size"],
        )


# Fingerprints


def test_the_fingerprint_describes_the_phantoms(phantoms: Path) -> None:
    read = read_data_set(DataSource(phantoms))
    found = read.fingerprint
    assert (found.cases, found.with_label_map, found.patients) == (6, 6, 6)
    assert (found.labels, found.spacing_mm) == ("brats2021", (4.0, 4.0, 4.0))
    assert len(found.extents) == 6
    assert all(
        extent.tumour_mm is not None and all(t <= b for t, b in zip(extent.tumour_mm, extent.brain_mm, strict=True))
        for extent in found.extents.values()
    )
    assert found.bytes_on_disk == sum(path.stat().st_size for path in phantoms.glob("*/*.nii.gz"))


def test_the_brain_box_equals_the_prepared_one(phantoms: Path) -> None:
    from data.preprocess import prepare

    read = read_data_set(DataSource(phantoms))
    for case_id, extent in read.fingerprint.extents.items():
        shape = prepare(read.cases[case_id]).image.shape[1:]
        assert [side * 4.0 for side in shape] == pytest.approx(list(extent.brain_mm))


def test_no_plan_can_be_made_without_label_maps(phantoms: Path, tmp_path: Path) -> None:
    import shutil

    data = shutil.copytree(phantoms, tmp_path / "data")
    for path in data.glob("*/*_seg.nii.gz"):
        path.unlink()
    with pytest.raises(DataError, match="no case has a label map"):
        read_data_set(DataSource(data))


# The command


def test_the_plan_is_a_complete_config_with_its_reasons(phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    out = tmp_path / "plan.yaml"
    ended = znormseg("plan", phantoms, "--out", out, "--set", "runtime.device=cpu")
    assert ended.code == 0, ended.err
    config = load_config(str(out))
    assert to_plain(config) == yaml.safe_load(out.read_text())
    assert config.training.steps == 1000
    assert all(f"# {line}".rstrip() in out.read_text() for line in ended.out.splitlines()[:-1])
    assert ended.out.splitlines()[-1] == f"next: znormseg train {phantoms} RUN --config {out}"
    again = znormseg("plan", phantoms, "--out", out)
    assert (again.code, "already exists" in again.err) == (4, True)


def test_without_a_file_only_the_yaml_goes_to_stdout(phantoms: Path, znormseg: Call) -> None:
    ended = znormseg("plan", phantoms, "--set", "training.steps=7", "--set", "runtime.device=cpu")
    assert yaml.safe_load(ended.out)["training"]["steps"] == 7


@pytest.mark.parametrize("arguments", [["--out", "plan.txt"], ["--set", "training.batch=2"], ["--config", "nothing"]])
def test_an_impossible_plan_is_a_config_error(arguments: list[str], phantoms: Path, znormseg: Call) -> None:
    assert znormseg("plan", phantoms, *arguments).code == 4
    assert not Path("plan.txt").exists()


def test_a_limit_of_zero_is_a_usage_error(phantoms: Path, znormseg: Call) -> None:
    assert znormseg("plan", phantoms, "--max-memory-gb", "0").code == 2


@pytest.mark.parametrize(("precision", "half"), [("float16", True), ("bfloat16", True), ("float32", False)])
def test_half_precision_activations_are_planned_with_two_bytes(
    *, precision: str, half: bool, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.planning import plan

    given: list[Hardware] = []

    def recorded(fingerprint: Fingerprint, hardware: Hardware, *arguments: Any, **options: Any) -> TrainingPlan:
        given.append(hardware)
        return plan_training(fingerprint, hardware, *arguments, **options)

    monkeypatch.setattr(plan, "plan_training", recorded)
    plan_run(DataSource(phantoms), overrides=["runtime.device=cpu", f"runtime.precision={precision}"])
    assert [hardware.half for hardware in given] == [half]


# Dry runs


@pytest.fixture(scope="module")
def tried(phantoms: Path, tiny_settings: list[str]) -> Any:
    """The plan of a tiny network, tried out."""
    return plan_run(DataSource(phantoms), overrides=[*tiny_settings, "training.steps=50"], with_dry_run=True)


@pytest.mark.slow
def test_a_dry_run_reports_memory_speed_and_disk(tried: Any) -> None:
    found = tried.dry_run
    assert found.own_bytes is None or 10**8 < found.own_bytes < 2 * GB
    assert found.step_seconds > 0
    assert found.seconds == pytest.approx(50 * found.step_seconds + found.validation_seconds)
    assert tried.disk.checkpoint_bytes > 0
    assert len(found.attempts) == 1
    told = json.loads(json.dumps(tried.to_json()))
    assert told["dry_run"]["shm_bytes"] == 0


@pytest.mark.slow
def test_a_dry_run_does_not_change_user_settings(tried: Any, tiny_settings: list[str]) -> None:
    own = load_config("laptop", [*tiny_settings, "training.steps=50"])
    assert tried.config.training == own.training
    assert tried.config.network == own.network


def on_a_cpu(*, step_seconds: float, validation_hours: float, fixed: Any = ()) -> tuple[int, int, float, str]:
    """Steps, validations, foreseen hours and reason of a plan of 5 000 steps and 10 validations, cut to 12 hours."""
    found = DryRun(
        device="cpu",
        own_bytes=None,
        mapped_bytes=None,
        gpu_bytes=None,
        step_seconds=step_seconds,
        window_seconds=None,
        prepare_seconds=0.0,
        validation_seconds=10 * 3600 * validation_hours,
        seconds=5_000 * step_seconds + 10 * 3600 * validation_hours,
        steps=5_000,
        attempts=(),
    )
    base = changed(LAPTOP, steps=5_000, hours=None, validations=10)
    config, after, why = cut_to_hours(base, found, "why", fixed=fixed)
    assert (config.training.steps, config.training.steps) == (after.steps, after.steps)
    assert config.training.steps is not None
    return config.training.steps, config.training.validations, after.seconds / 3600, why


def test_a_plan_is_limited_to_the_hours_allowed_on_a_cpu() -> None:
    assert on_a_cpu(step_seconds=1.0, validation_hours=0.1)[:2] == (5_000, 10)
    assert on_a_cpu(step_seconds=18.0, validation_hours=0.2) == (2_000, 10, 12.0, "why; cut to 12 hours on this CPU")


def test_expensive_validations_are_made_less_often() -> None:
    steps, validations, hours, why = on_a_cpu(step_seconds=3.6, validation_hours=2.0)
    assert (steps, validations, hours) == (2_000, 5, 12.0)
    assert why.endswith("cut to 12 hours on this CPU; 5 instead of 10 validations")


@pytest.mark.parametrize(("fixed", "validations"), [((), 1), (("training.validations",), 10)])
def test_the_minimum_number_of_steps_is_planned_even_if_it_takes_longer(fixed: Any, validations: int) -> None:
    steps, found, hours, why = on_a_cpu(step_seconds=36.0, validation_hours=3.0, fixed=fixed)
    assert (steps, found, hours) == (1_000, validations, 10 + 3 * validations)
    assert "h on this CPU, more than 12 h, with the minimum number of steps" in why


@pytest.fixture
def trial(phantoms: Path, tmp_path: Path, tiny_settings: list[str]) -> TrialRequest:
    """A trial of the tiny settings."""
    (tmp_path / "run").mkdir()
    return TrialRequest(
        data=DataSource(phantoms),
        folder=tmp_path / "run",
        config=load_config("laptop", tiny_settings),
        training=("BraTS2021_00000", "BraTS2021_00001"),
        validation="BraTS2021_00002",
        labels="brats2021",
        spacing_mm=(4.0, 4.0, 4.0),
        most_share_of_limits=0.9,
    )


def test_a_trial_that_uses_too_much_memory_is_stopped(trial: TrialRequest, tmp_path: Path) -> None:
    ended = try_out(trial, tmp_path, most_bytes=50_000_000)
    assert isinstance(ended, TooMuch)
    assert "it was stopped when it held" in ended.why


@pytest.mark.parametrize("settings", [[], ["training.telemetry_steps=10"], ["augment.contrast_dropout=0.5"]])
def test_a_trial_times_five_steps_a_window_and_the_loader(trial: TrialRequest, settings: list[str]) -> None:
    changed = load_config("laptop", settings)
    training = replace(trial.config.training, telemetry_steps=changed.training.telemetry_steps)
    own = replace(trial.config, training=training, augment=changed.augment)
    report = run_trial(replace(trial, config=own))
    assert report is not None
    assert len(report.step_seconds) == 5
    assert min(*report.step_seconds, report.loader_seconds, report.window_seconds or 0) > 0
    on_disk = sum(path.stat().st_size for path in (trial.folder / "checkpoints").iterdir())
    network = build_network(own.network, in_channels=own.input_channels, out_channels=3)
    assert report.checkpoint_bytes == on_disk > 4 * sum(weight.numel() for weight in network.parameters())
    outcome = TrialOutcome(report=report)
    assert OUTCOME.validate_json(OUTCOME.dump_json(outcome)) == outcome


def test_a_trial_with_deep_supervision_uses_its_loss(trial: TrialRequest) -> None:
    settings = ["architecture=resenc", "channels=[4,8,16]", "deep_supervision=true"]
    network = load_config("laptop", [f"network.{setting}" for setting in settings]).network
    report = run_trial(replace(trial, config=replace(trial.config, network=network)))
    assert report is not None
    assert len(report.step_seconds) == 5


def test_a_trial_without_validation_cases_has_no_window(trial: TrialRequest) -> None:
    report = run_trial(replace(trial, validation=None))
    assert report is not None
    assert report.window_seconds is None


def test_two_windows_of_a_validation_case_are_computed(trial: TrialRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    from app.planning import trial as module
    from app.training.state import new_state

    windows: list[int] = []

    def counting(*arguments: Any) -> Any:
        state = new_state(*arguments)
        state.network.register_forward_hook(lambda network, *_: windows.append(1) if not network.training else None)
        return state

    monkeypatch.setattr(module, "new_state", counting)
    run_trial(trial)
    assert len(windows) == 2


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("kill -9 $$", r"it was killed \(SIGKILL\) when it held"),
        ("kill -6 $$", r"it was killed \(SIGABRT\)"),
        ("echo terminate called after throwing std::bad_alloc; exit 1", "memory ran out when it held"),
    ],
)
def test_a_trial_killed_for_memory_counts_as_too_large(
    script: str, why: str, trial: TrialRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stands_in(script, tmp_path, monkeypatch)
    ended = try_out(trial, tmp_path, most_bytes=None)
    assert isinstance(ended, TooMuch)
    assert re.match(why, ended.why)


def test_a_trial_that_fails_otherwise_is_an_error_with_its_last_output(
    trial: TrialRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stands_in("echo no such thing >&2; exit 9", tmp_path, monkeypatch)
    with pytest.raises(RuntimeError, match="exited with status 9: no such thing"):
        try_out(trial, tmp_path, most_bytes=None)


def stands_in(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have trials run a shell script instead of the program."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))


@pytest.mark.slow
def test_a_data_error_in_a_trial_is_reported_as_one(trial: TrialRequest, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="convention"):
        try_out(replace(trial, labels="brats2023"), tmp_path, most_bytes=None)


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five phantoms at 2 mm."""
    from data.phantoms import write_phantoms

    folder = tmp_path_factory.mktemp("fine")
    write_phantoms(folder, 5, seed=1, spacing_mm=2.0)
    return folder


@pytest.mark.slow
def test_a_run_of_50_steps_uses_the_memory_that_the_dry_run_predicted(fine: Path, tmp_path: Path, shell: Call) -> None:
    sizes = ["training.patch_voxels=[64, 64, 64]", "training.batch_size=3", "runtime.device=cpu"]
    overrides = [*sizes, "training.steps=50", "training.validations=1"]
    foreseen = plan_run(DataSource(fine), overrides=overrides, with_dry_run=True)
    out = tmp_path / "plan.yaml"
    out.write_text(foreseen.to_yaml())
    program = (
        "import atexit, sys; from app.system.resources import memory_of; from app.cli.main import run;"
        "atexit.register(lambda: print('peak', memory_of().peak)); sys.argv[0] = 'znormseg'; run()"
    )
    ended = shell(["python", "-c", program, "train", fine, tmp_path / "run", "--config", out])
    assert ended.code == 0, ended.err
    peak = int(ended.out.split("peak ")[1])
    assert foreseen.dry_run is not None
    assert foreseen.dry_run.resident_bytes == pytest.approx(peak, rel=0.15)


@pytest.mark.slow
def test_a_plan_for_2_gb_can_be_trained(fine: Path, tmp_path: Path, shell: Call) -> None:
    out = tmp_path / "plan.yaml"
    within = "ulimit -d 2000000; exec znormseg "
    plan = ["plan", fine, "--config", "resunet", "--dry-run", "--json", "--out", out, "--set", "runtime.device=cpu"]
    ended = shell(["sh", "-c", within + shlex.join(map(str, plan))])
    assert ended.code == 0, ended.err
    assert "RLIMIT_DATA" in ended.out
    train = ["train", fine, tmp_path / "run", "--config", out, "--set", "training.steps=6", "--json"]
    ended = shell(["sh", "-c", within + shlex.join(map(str, train))])
    assert (ended.code, json.loads(ended.out)["steps"]) == (0, 6), ended.err


@pytest.mark.slow
def test_a_real_trial_that_does_not_fit_is_shrunk(trial: TrialRequest, tmp_path: Path) -> None:
    large = load_config("laptop", ["training.patch_voxels=[96, 96, 96]", "training.batch_size=4", "runtime.device=cpu"])
    most = 1_100_000_000
    fitted = fit(
        large,
        lambda config: try_out(replace(trial, config=config), tmp_path, most_bytes=most),
        most_bytes=most,
        half=False,
        gpu=False,
        fixed=(),
    )
    assert len(fitted.attempts) >= 2
    assert fitted.needed.own_bytes is not None
    assert fitted.needed.own_bytes <= 0.9 * most
    assert asdict(fitted.attempts[0])["outcome"] != asdict(fitted.attempts[-1])["outcome"]


@pytest.mark.parametrize("config", ["presence", "presence-slabs"])
def test_a_presence_config_is_refused_before_any_data_is_read(tmp_path: Path, config: str) -> None:
    with pytest.raises(ConfigError, match=r"^plan: only for segmentation"):
        plan_run(DataSource(tmp_path / "nowhere"), config=config)
