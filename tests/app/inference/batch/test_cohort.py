"""Many cases: finished ones are kept, killed runs resume, lost workers are replaced, and the manifest records it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest

from app.config.inference import DEFAULTS, PredictOptions
from app.errors import DeviceError
from app.inference.batch.job import CASE as CASE_JSON
from app.inference.batch.job import PredictJob, job_from_plain
from app.inference.batch.manifest import Outcome, this_worker
from app.inference.batch.native import Native
from app.inference.batch.parallel import devices_of
from app.inference.batch.pipeline import InThisProcess, Steps
from app.schemas import json_schema
from app.system.device import Runtime
from data.datasets.layouts import Case, find_cases
from data.errors import DataError
from data.files import file_sha256, partial_prefix, remove_stale
from data.labels import CONVENTIONS
from data.native_space.config import PrepareConfig

Call = Callable[..., Any]

CASE = "BraTS2021_00000"
SCHEMA = json_schema("manifest")


@pytest.fixture
def cohort(phantoms: Path, tmp_path: Path) -> Path:
    """Three cases that a test may spoil."""
    for case in sorted(phantoms.iterdir())[:3]:
        shutil.copytree(case, tmp_path / "in" / case.name)
    return tmp_path / "in"


@pytest.fixture(scope="module")
def predicted(phantoms: Path, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cases and their results, by the Python interface; tests copy it."""
    folder = tmp_path_factory.mktemp("predicted")
    for case in sorted(phantoms.iterdir())[:3]:
        shutil.copytree(case, folder / "in" / case.name)
    predict_all(tiny_run, folder)
    return folder


@pytest.fixture
def done(predicted: Path, tmp_path: Path) -> Path:
    """A copy of the three cases and their results."""
    return Path(shutil.copytree(predicted, tmp_path / "done"))


def predict_all(run: Path, folder: Path, **more: Any) -> Any:
    from app.inference.backends.choose import choose_backend
    from app.inference.batch.predict import predict
    from app.inference.model import load_model
    from app.runs.training_record import training_record
    from app.system.device import RuntimeConfig

    runtime = choose_backend("auto", RuntimeConfig(device="cpu"))
    more.setdefault("options", PredictOptions(training=training_record(run)))  # as the command does
    return predict(load_model(run, runtime), find_cases(folder / "in"), folder / "out", runtime=runtime, **more)


def statuses(folder: Path) -> dict[str, str]:
    content = json.loads((folder / "manifest.json").read_text())
    jsonschema.validate(content, SCHEMA)
    return {case["case"].removeprefix("BraTS2021_0000"): case["status"] for case in content["cases"]}


def results(folder: Path) -> dict[str, Any]:
    """Label maps as bytes, JSON without seconds and places, by name."""
    found: dict[str, Any] = {}
    for path in folder.iterdir():
        if path.suffix != ".json":
            found[path.name] = path.read_bytes()
        elif path.name != "manifest.json":
            content = json.loads(path.read_text())
            assert content.pop("seconds")
            assert Path(content.pop("label_map")).name == f"{content['case']}.nii.gz"
            found[path.name] = content
    return found


# Finished cases are kept


def test_a_second_run_skips_every_case_and_touches_no_file(tiny_run: Path, done: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (done / "out").glob("Bra*")}
    outcome = predict_all(tiny_run, done).to_json()
    assert outcome["skipped"] == [case["case"] for case in outcome["cases"]]
    assert {path.name: path.stat().st_mtime_ns for path in (done / "out").glob("Bra*")} == before
    assert statuses(done / "out") == {"0": "skipped", "1": "skipped", "2": "skipped"}


def spoil_json(done: Path) -> None:
    (done / "out" / f"{CASE}.json").write_text("{")


def spoil_label_map(done: Path) -> None:
    with (done / "out" / f"{CASE}.nii.gz").open("ab") as file:
        file.write(b"\0")


def change_input(done: Path) -> None:
    shutil.copy(done / "in" / CASE / f"{CASE}_t1.nii.gz", done / "in" / CASE / f"{CASE}_t2.nii.gz")


def lose_label_map(done: Path) -> None:
    (done / "out" / f"{CASE}.nii.gz").unlink()


def point_elsewhere(done: Path) -> None:
    path = done / "out" / f"{CASE}.json"
    content = json.loads(path.read_text())
    content["made_from"]["files_sha256"]["../in/x"] = "0" * 64
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("spoil", [spoil_json, spoil_label_map, change_input, lose_label_map, point_elsewhere])
def test_only_a_changed_case_is_repeated(spoil: Callable[[Path], None], tiny_run: Path, done: Path) -> None:
    spoil(done)
    predict_all(tiny_run, done)
    assert statuses(done / "out") == {"0": "done", "1": "skipped", "2": "skipped"}
    assert predict_all(tiny_run, done).to_json()["skipped"] == [f"BraTS2021_0000{number}" for number in range(3)]


@pytest.mark.parametrize(
    "more",
    [{"options": PredictOptions(labels=CONVENTIONS["brats2023"])}, {"overwrite": True}],
    ids=["labels", "overwrite"],
)
def test_other_options_or_overwrite_repeat_every_case(more: dict[str, Any], tiny_run: Path, done: Path) -> None:
    predict_all(tiny_run, done, **more)
    assert set(statuses(done / "out").values()) == {"done"}


def test_a_case_that_ran_out_of_memory_is_repeated_only_with_another_limit(tiny_run: Path, done: Path) -> None:
    from app.runs.training_record import training_record

    path = done / "out" / "BraTS2021_00000.json"
    content = json.loads(path.read_text())
    content["ladder"], content["made_from"]["max_memory_gb"] = ["planned for --max-memory-gb 3: smaller windows"], 3.0
    path.write_text(json.dumps(content))
    predict_all(tiny_run, done, options=PredictOptions(max_memory_gb=3, training=training_record(tiny_run)))
    assert statuses(done / "out") == {"0": "skipped", "1": "skipped", "2": "skipped"}
    predict_all(tiny_run, done)
    assert statuses(done / "out") == {"0": "done", "1": "skipped", "2": "skipped"}


def test_the_weights_decide_whether_a_case_is_finished(tiny_run: Path, done: Path) -> None:
    from app.inference.batch.fingerprint import finished_content, settings_of
    from app.inference.model import load_model
    from app.system.device import RuntimeConfig, choose_runtime

    model = load_model(tiny_run, choose_runtime(RuntimeConfig(device="cpu")))
    case = find_cases(done / "in")[0]
    settings = settings_of(model, PredictOptions())
    assert finished_content(case, done / "out", settings) is not None
    assert finished_content(case, done / "out", {**settings, "weights_sha256": "0" * 64}) is None


def test_a_result_of_unknown_origin_is_replaced(tiny_run: Path, done: Path, predicted: Path) -> None:
    (done / "out" / f"{CASE}.nii.gz").write_text("old")
    (done / "out" / f"{CASE}.json").unlink()
    predict_all(tiny_run, done)
    place = f"{CASE}.nii.gz"
    assert (done / "out" / place).read_bytes() == (predicted / "out" / place).read_bytes()


def test_the_command_reports_how_many_cases_were_already_finished(tiny_run: Path, done: Path, znormseg: Call) -> None:
    ended = znormseg("predict", tiny_run, done / "in", done / "out", "--device", "cpu", "--json")
    assert ended.code == 0
    assert "3 of 3 cases were already finished" in ended.err
    assert len(json.loads(ended.out)["skipped"]) == 3


# Killed and partial files


def test_partial_files_of_dead_processes_are_removed_and_others_stay(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stale = tmp_path / f"{partial_prefix(gone.pid)}a.nii.gz"
    kept = [tmp_path / f"{partial_prefix(os.getpid())}b.nii.gz", tmp_path / f".partial-0a1b2c3d-{gone.pid}-c.nii.gz"]
    for path in (stale, *kept):
        path.touch()
    assert remove_stale(tmp_path) == [stale]
    assert all(path.exists() for path in kept)


def test_partial_files_stay_while_another_process_is_working(tmp_path: Path) -> None:
    from app.inference.batch.output_folder import at_work

    stale = tmp_path / f"{partial_prefix(2**30)}a.nii.gz"
    stale.touch()
    with at_work(tmp_path):
        stale.touch()
        with at_work(tmp_path):
            assert stale.exists()
    with at_work(tmp_path):
        assert not stale.exists()


#: Runs a command ten times over, each ended by SIGKILL once one more result is there and a moment has passed; forked
#: from a process that has loaded the program, so that the moments lie in the work.
KILLED_TEN_TIMES = """
import os, random, signal, sys, time
from pathlib import Path
import app.inference.batch.job, app.inference.batch.parallel
from app.cli.main import run
out, moments = Path(sys.argv.pop(1)), random.Random(7)
killed = 0
for kill in range(10):
    child = os.fork()
    if child == 0:
        run()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if len(list(out.glob("Bra*.json"))) >= kill:
            time.sleep(moments.uniform(0, 0.2))
            os.kill(child, signal.SIGKILL)
            killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
            break
        time.sleep(0.002)
print(killed)
"""


@pytest.fixture(scope="module")
def twelve(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve small cases and their results, of a command that was not stopped."""
    from data.phantoms import write_phantoms

    folder = tmp_path_factory.mktemp("twelve")
    write_phantoms(folder / "in", 12, seed=3, spacing_mm=5.0)
    predict_all(tiny_run, folder)
    return folder


@pytest.mark.slow
def test_a_cohort_killed_ten_times_ends_like_an_uninterrupted_one(
    tiny_run: Path, twelve: Path, tmp_path: Path, shell: Call, znormseg: Call
) -> None:
    out = tmp_path / "out"
    command = ["predict", tiny_run, twelve / "in", out, "--device", "cpu"]
    killed = shell(["python", "-c", KILLED_TEN_TIMES, out, *command])
    assert (killed.code, int(killed.out.split()[-1])) == (0, 10), killed.err
    ended = znormseg(*command)
    assert ended.code == 0, ended.err
    assert results(out) == results(twelve / "out")
    assert [path.name for path in out.glob(".*")] == []
    assert "skipped" in statuses(out).values()


@pytest.mark.slow
def test_a_cohort_of_several_processes_resumes_after_a_kill(
    tiny_run: Path, twelve: Path, tmp_path: Path, znormseg_process: Call
) -> None:
    command = ["predict", tiny_run, twelve / "in", tmp_path / "out", "--device=cpu", "--workers=2"]
    process = znormseg_process(*command)
    while not any((tmp_path / "out").glob("Bra*.json")):
        assert process.poll() is None
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []
    again = znormseg_process(*command)
    assert again.wait(timeout=240) == 0, again.communicate()
    again.communicate()
    assert results(tmp_path / "out") == results(twelve / "out")


# Several processes


@pytest.mark.slow
def test_two_workers_write_the_same_as_one_process(
    tiny_run: Path, done: Path, predicted: Path, tmp_path: Path, znormseg: Call
) -> None:
    ended = znormseg("predict", tiny_run, done / "in", tmp_path / "two", "--device=cpu", "--workers=2", "--json")
    assert ended.code == 0, ended.err
    maps = {name: content for name, content in results(tmp_path / "two").items() if name.endswith(".gz")}
    assert maps == {name: (predicted / "out" / name).read_bytes() for name in maps}
    assert len(maps) == len(json.loads(ended.out)["cases"]) == 3
    workers = {case["worker"] for case in json.loads((tmp_path / "two" / "manifest.json").read_text())["cases"]}
    assert workers <= {"worker-1", "worker-2"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_cases_of_a_lost_worker_are_taken_over_by_another(
    number: signal.Signals, tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg_process: Call
) -> None:
    process = znormseg_process("predict", tiny_run, phantoms, tmp_path, "--device=cpu", "--workers=2")
    while not any(tmp_path.glob("*.json")):
        assert process.poll() is None
        time.sleep(0.005)
    psutil.Process(process.pid).children()[0].send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert set(statuses(tmp_path).values()) == {"done"}


@pytest.mark.slow
def test_a_worker_that_cannot_start_stops_the_cohort_with_the_reason(
    tiny_run: Path, cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.inference.batch.parallel import InProcesses

    job = PredictJob(run=tmp_path / "no run", output=tmp_path, device="cpu")
    with pytest.raises(RuntimeError, match="no run: does not exist"):
        InProcesses(job=job, devices=(None,)).work(find_cases(cohort), Noted())


@pytest.mark.slow
def test_a_case_that_always_kills_its_worker_is_named_and_the_others_finish(
    tiny_run: Path, cohort: Path, tmp_path: Path, znormseg: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DEADLY)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    ended = znormseg("predict", tiny_run, cohort, tmp_path / "out", "--device=cpu", "--workers=2")
    assert ended.code == 6, ended.err
    assert f"case {CASE}: its process was killed by SIGKILL in 3 attempts" in ended.err
    assert statuses(tmp_path / "out") == {"0": "failed", "1": "done", "2": "done"}


#: Kills a worker that opens a file of the first case.
DEADLY = f"""
import os, signal, sys
def deadly(event, arguments):
    starts_worker = "app.inference.batch.parallel" in " ".join(sys.orig_argv)
    if event == "open" and "{CASE}_t2." in str(arguments[0]) and starts_worker:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(deadly)
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "slurm"], "Invalid value for '--engine'"),
        (["--workers", "2", "--devices", "auto"], "--devices cannot be combined with --workers"),
        (["--workers", "0"], "--workers takes 1 to 64"),
        (["--devices", "tpu"], "--devices takes auto, a number of GPUs"),
    ],
)
def test_an_invalid_engine_is_refused_before_anything_is_written(
    *, arguments: list[str], words: str, tiny_run: Path, cohort: Path, tmp_path: Path, znormseg: Call
) -> None:
    ended = znormseg("predict", tiny_run, cohort, tmp_path / "out", *arguments)
    assert ended.code in (2, 4)
    assert words in " ".join(ended.err.split())
    assert not (tmp_path / "out").exists()


def test_devices_can_be_all_gpus_a_number_or_names() -> None:
    assert devices_of("auto", 3) == ("cuda:0", "cuda:1", "cuda:2")
    assert devices_of("2", 4) == ("cuda:0", "cuda:1")
    assert devices_of("cuda:1, cuda:3", 4) == ("cuda:1", "cuda:3")


@pytest.mark.parametrize("text", ["auto", "3", "cuda:2"])
def test_missing_gpus_are_a_machine_error(text: str) -> None:
    with pytest.raises(DeviceError, match="GPU"):
        devices_of(text, 0)


def test_a_job_and_its_cases_survive_the_round_trip_through_json(cohort: Path) -> None:
    job = PredictJob(
        run=Path("run"),
        output=Path("out"),
        options=PredictOptions(labels=CONVENTIONS["brats2024-ped"], nan_to_zero=True),
        native=Native(config=PrepareConfig(n4=True), space="t2"),
    )
    assert job_from_plain(json.loads(json.dumps(job.to_plain()))) == job
    for case in find_cases(cohort):
        assert CASE_JSON.validate_python(json.loads(json.dumps(CASE_JSON.dump_python(case, mode="json")))) == case


# Read ahead


class Noted:
    """Records its calls."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def started(self, case: str, what: str = "") -> None:
        pass

    def ended(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


@pytest.fixture
def through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Noted, list[str]]]:
    """Work through cases a, b, c, d with steps of a test's own; returns what was told, and what was done in order."""
    from app.inference.batch import pipeline
    from app.inference.batch.predict import PredictSteps

    happened: list[str] = []

    class StepsOfATest(Steps[str, str]):
        def __init__(self, compute: Callable[[str, list[str]], None], options: PredictOptions, readers: int) -> None:
            self._compute, self._readers = compute, readers
            none: Any = None
            as_in_predict = PredictSteps(model=none, output=tmp_path, runtime=none, settings={}, options=options)
            self._most_voxels_ahead = as_in_predict.most_voxels_ahead

        @property
        def most_voxels_ahead(self) -> int:
            return self._most_voxels_ahead

        @property
        def readers(self) -> int:
            return self._readers

        def read(self, case: Case) -> str:
            happened.append(f"read {case.id}")
            if case.id == "b":
                raise DataError("b is broken")
            return case.id

        def compute(self, read: str, on_step: Any) -> str:
            self._compute(read, happened)
            happened.append(f"computed {read}")
            return read

        def write(self, computed: str) -> dict[str, Any]:
            (tmp_path / f"{computed}.json").touch()
            return {"case": computed}

    def call(
        *,
        compute: Callable[[str, list[str]], None],
        voxels: int = 1,
        options: PredictOptions = DEFAULTS,
        readers: int = 1,
    ) -> tuple[Noted, list[str]]:
        monkeypatch.setattr(pipeline, "voxel_count", lambda path: voxels)
        engine = InThisProcess(steps=StepsOfATest(compute, options, readers), worker=this_worker("cpu"))
        told = Noted()
        cases = [Case(id=name, folder=tmp_path, contrasts={"t1": tmp_path / name}) for name in "abcd"]
        engine.work(cases, told)
        return told, happened

    return call


def test_the_next_case_is_read_while_this_one_is_computed(through: Call) -> None:
    def compute(case: str, happened: list[str]) -> None:
        until = time.monotonic() + 20
        while case == "a" and "read c" not in happened:  # b is broken
            assert time.monotonic() < until
            time.sleep(0.001)

    told, happened = through(compute=compute)
    assert happened.index("read c") < happened.index("computed a")
    assert {outcome.case: outcome.message for outcome in told.outcomes} == {
        "a": None,
        "b": "b is broken",
        "c": None,
        "d": None,
    }


def test_at_most_one_case_is_read_ahead(through: Call) -> None:
    def compute(case: str, happened: list[str]) -> None:
        time.sleep(0.05)
        assert case != "a" or "read d" not in happened

    _, happened = through(compute=compute)
    assert happened[-1] == "computed d"


@pytest.mark.parametrize("readers", [2, 3, 9])
def test_several_readers_read_several_cases_ahead_and_lose_none(readers: int, through: Call) -> None:
    def compute(case: str, happened: list[str]) -> None:
        until = time.monotonic() + 20
        while case == "a" and "read d" not in happened and readers > 2:
            assert time.monotonic() < until
            time.sleep(0.001)

    told, happened = through(compute=compute, readers=readers)
    assert sorted(outcome.case for outcome in told.outcomes) == ["a", "b", "c", "d"]
    assert [what for what in happened if what.startswith("computed")] == ["computed a", "computed c", "computed d"]


def test_several_readers_read_large_cases_one_at_a_time(through: Call) -> None:
    _, happened = through(voxels=512**3, readers=3, compute=lambda case, happened: time.sleep(0.02))
    computed = [what.removeprefix("computed ") for what in happened if what.startswith("computed")]
    assert sorted(computed) == ["a", "c", "d"]
    assert [what.removeprefix("read ") for what in happened if what != "read b" and what.startswith("read")] == computed
    assert all(happened.index(f"computed {case}") == happened.index(f"read {case}") + 1 for case in computed)


@pytest.mark.parametrize(
    ("device", "options", "several"),
    [("cuda:0", DEFAULTS, True), ("cpu", DEFAULTS, False), ("cuda:0", PredictOptions(max_memory_gb=6), False)],
)
def test_several_threads_read_for_a_gpu_unless_memory_is_limited(
    device: str, options: PredictOptions, several: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from app.inference.batch import predict

    monkeypatch.setattr(predict, "granted_processors", lambda: 8)
    none: Any = None
    runtime = Runtime(device_name=device, precision_name="float32", channels_last=False, reasons=())
    steps = predict.PredictSteps(model=none, output=tmp_path, runtime=runtime, settings={}, options=options)
    assert (steps.readers > 1, steps.writers > 1) == (several, several)


def test_the_output_is_the_same_with_the_threads_used_for_a_gpu(
    tiny_run: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.inference.batch.predict import PredictSteps, predict

    model, runtime = PredictJob(run=tiny_run, output=tmp_path, device="cpu", backend="torch").load()
    options = PredictOptions(save_probabilities=True)
    written = []
    for feeds_gpu in (False, True):
        monkeypatch.setattr(PredictSteps, "_feeds_gpu", feeds_gpu)
        output = tmp_path / str(feeds_gpu)
        found = predict(model, find_cases(phantoms), output, runtime=runtime, options=options)
        assert not found.failures
        written.append({path.name: file_sha256(path) for path in output.glob("*.nii.gz")})
    assert len(written[0]) == 12
    assert written[0] == written[1]


def test_a_large_case_is_not_read_ahead(through: Call) -> None:
    _, happened = through(voxels=512**3, compute=lambda case, happened: time.sleep(0.02))
    assert happened == ["read a", "computed a", "read b", "read c", "computed c", "read d", "computed d"]


def test_nothing_is_read_ahead_if_memory_is_limited(through: Call) -> None:
    bounded = PredictOptions(max_memory_gb=6)
    _, happened = through(options=bounded, compute=lambda case, happened: time.sleep(0.02))
    assert happened == ["read a", "computed a", "read b", "read c", "computed c", "read d", "computed d"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory")])
def test_a_case_that_runs_out_of_memory_is_named_and_the_others_continue(error: Exception, through: Call) -> None:
    def compute(case: str, happened: list[str]) -> None:
        if case == "c":
            raise error

    told, happened = through(compute=compute)
    messages = {outcome.case: outcome.message for outcome in told.outcomes}
    assert "case c: not enough memory" in (messages["c"] or "")
    assert messages["a"] is messages["d"] is None
    assert happened[-1] == "computed d"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_cases_computed_before_the_end_are_written(error: type[BaseException], through: Call, tmp_path: Path) -> None:
    def compute(case: str, happened: list[str]) -> None:
        if case == "c":
            raise error

    with pytest.raises(error):
        through(compute=compute)
    assert (tmp_path / "a.json").exists()
    assert not (tmp_path / "c.json").exists()


# The manifest


def test_the_json_of_a_case_has_the_hash_of_each_file_that_was_written(done: Path) -> None:
    content = json.loads((done / "out" / f"{CASE}.json").read_text())
    assert content["made_from"]["files_sha256"] == {f"{CASE}.nii.gz": file_sha256(done / "out" / f"{CASE}.nii.gz")}


def test_a_failed_case_is_in_the_manifest_with_its_message(tiny_run: Path, done: Path) -> None:
    broken = done / "in" / CASE / f"{CASE}_t2.nii.gz"
    broken.write_bytes(broken.read_bytes()[:1000])
    predict_all(tiny_run, done)
    assert statuses(done / "out")["0"] == "failed"
    first = json.loads((done / "out" / "manifest.json").read_text())["cases"][0]
    assert str(broken) in first["message"]


def test_an_interrupted_command_writes_the_manifest_of_the_finished_cases(
    tiny_run: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.errors import InterruptedRunError
    from app.inference.batch.predict import PredictSteps

    compute = PredictSteps.compute

    def interrupted(steps: Any, read: Any, on_step: Any) -> Any:
        if read.case.id != CASE:
            raise KeyboardInterrupt
        return compute(steps, read, on_step)

    monkeypatch.setattr(PredictSteps, "compute", interrupted)
    with pytest.raises(InterruptedRunError, match=r"1 of 3 label maps are in .* Run the same command again to resume"):
        predict_all(tiny_run, done, overwrite=True)
    assert statuses(done / "out") == {"0": "done", "1": "left", "2": "left"}


def test_evaluate_accepts_a_folder_with_a_manifest(done: Path, znormseg: Call) -> None:
    ended = znormseg("evaluate", done / "out", done / "in", "--json")
    assert ended.code == 0, ended.err
    assert len(json.loads(ended.out)["cases"]) == 3


def test_a_case_whose_json_would_be_the_manifest_is_refused(
    tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    (tmp_path / "in").mkdir()
    for path in (phantoms / CASE).glob("*.nii.gz"):
        shutil.copy(path, tmp_path / "in" / path.name.replace(CASE, "manifest"))
    ended = znormseg("predict", tiny_run, tmp_path / "in", tmp_path / "out")
    assert ended.code == 3
    assert "would overwrite the cohort's manifest.json. Rename the case" in ended.err


# Ray


def test_without_ray_one_line_says_what_to_install(
    tiny_run: Path, cohort: Path, tmp_path: Path, znormseg: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    ended = znormseg("predict", tiny_run, cohort, tmp_path / "out", "--engine", "ray")
    assert ended.code == 4
    assert "pip install 'znormseg[ray]'" in ended.err


@pytest.mark.slow
def test_without_a_cluster_ray_starts_one_and_stdout_is_only_json(
    tiny_run: Path, done: Path, predicted: Path, tmp_path: Path, shell: Call
) -> None:
    command = ["znormseg", "predict", tiny_run, done / "in", tmp_path / "ray", "--engine=ray", "--device=cpu", "--json"]
    ended = shell(command, environment={"RAY_ADDRESS": ""})
    assert ended.code == 0, ended.err
    assert len(json.loads(ended.out)["cases"]) == 3
    assert set(statuses(tmp_path / "ray").values()) == {"done"}
    for name, content in results(predicted / "out").items():
        assert not name.endswith(".gz") or (tmp_path / "ray" / name).read_bytes() == content


@pytest.mark.slow
def test_the_cases_of_a_killed_ray_node_are_taken_over_by_the_other(
    tiny_run: Path, twelve: Path, tmp_path: Path, znormseg_process: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.inference.batch.ray_pool import ray_module

    ray_module()
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "120")  # on a busy machine 30 s are too few
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        second = cluster.add_node(**node)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        process = znormseg_process("predict", tiny_run, twelve / "in", tmp_path / "ray", "--engine=ray", "--json")
        until = time.monotonic() + 240
        while process.poll() is None and len(list((tmp_path / "ray").glob("Bra*.json"))) < 3:
            assert time.monotonic() < until
            time.sleep(0.01)
        cluster.remove_node(second, allow_graceful=False)
        out, err = process.communicate(timeout=240)
    finally:
        cluster.shutdown()
    assert process.returncode == 0, err
    assert len(json.loads(out)["cases"]) == 12
    assert results(tmp_path / "ray") == results(twelve / "out")
    assert set(statuses(tmp_path / "ray").values()) == {"done"}
