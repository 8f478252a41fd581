"""A hostile machine: full disks, missing permissions, signals, and killed processes.

Full disks are small tmpfs mounts in a mount namespace of the command's own; missing permission is real too: as root,
the command runs without the capabilities that let root write anywhere.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest

from app.cli.terminal import signals_unwind

Call = Callable[..., Any]

CASE = "BraTS2021_00000"
#: As root, drop what root may do beyond others; others need nothing.
UNPRIVILEGED = (
    ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-dac_override,-dac_read_search"]
    if os.geteuid() == 0
    else []
)
#: Mounts a tmpfs of $1 kB on $2, then runs the rest; needs the right to mount.
ON_A_SMALL_DISK = 'mount -t tmpfs -o size="$1"k none "$2" && shift 2 && exec "$@"'


@pytest.fixture
def options(tiny_settings: list[str]) -> list[str]:
    """The tiny settings as arguments of the command line."""
    return [word for setting in tiny_settings for word in ("--set", setting)]


def can_mount() -> bool:
    """Whether a process may mount a disk that only it can see."""
    probe = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs none /mnt"]
    return (
        shutil.which("unshare") is not None and not subprocess.run(probe, capture_output=True, check=False).returncode
    )


@pytest.fixture(scope="session")
def small_disk() -> Callable[[Path, int], list[str]]:
    """Command prefix that mounts a small empty disk on a folder, only for that command."""
    if not can_mount():
        pytest.skip("mounting is not allowed here")

    def words(folder: Path, kilobytes: int) -> list[str]:
        folder.mkdir()
        return ["unshare", "--mount", "sh", "-c", ON_A_SMALL_DISK, "sh", str(kilobytes), str(folder)]

    return words


needs_setpriv = pytest.mark.skipif(
    os.geteuid() == 0 and shutil.which("setpriv") is None, reason="as root, setpriv is needed to drop its privileges"
)


@pytest.fixture
def read_only(tmp_path: Path) -> Path:
    """A folder that may be looked into but not be written to."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(0o555)
    return folder


def assert_the_machine_is_blamed(ended: Any, *words: str | Path) -> None:
    assert ended.code == 7, ended.err
    assert "Traceback" not in ended.err
    for word in words:
        assert str(word) in ended.err


# Full disks


def left_behind(folder: Path) -> str:
    """Command prefix that runs a command and then lists a folder, even if the command failed."""
    return f'"$@"; code=$?; find "{folder}" -type f -printf "left:%f\\n" >&2; exit $code'


@pytest.mark.parametrize("kilobytes", [4, 8, 12])
def test_predict_on_a_full_disk_leaves_no_partial_label_map(
    *, kilobytes: int, tiny_run: Path, phantoms: Path, tmp_path: Path, small_disk: Call, shell: Call
) -> None:
    place = tmp_path / "disk"
    listing = ["sh", "-c", left_behind(place), "sh"]
    ended = shell([*small_disk(place, kilobytes), *listing, "znormseg", "predict", tiny_run, phantoms, place])
    assert_the_machine_is_blamed(ended, place, "No space left on device", "Free some space")
    assert "left:.partial" not in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("kilobytes", [pytest.param(16, marks=pytest.mark.slow), 300])
def test_train_that_cannot_start_on_a_full_disk_reports_it_and_leaves_no_partial_file(
    *, kilobytes: int, phantoms: Path, tmp_path: Path, options: list[str], small_disk: Call, shell: Call
) -> None:
    place = tmp_path / "disk"
    listing = ["sh", "-c", left_behind(place), "sh"]
    command = ["znormseg", "train", phantoms, place / "run", *options, "--set", "network.channels=[32, 64]"]
    ended = shell([*small_disk(place, kilobytes), *listing, *command])
    assert_the_machine_is_blamed(ended, place, "No space left on device", "Free some space")
    assert "left:.partial" not in ended.err


#: Trains in $1/run, fills the disk $1 once the second step is there, and does $2 when training has said that it waits.
FILLED_MEANWHILE = """
place=$1; then=$2; shift 2
"$@" 2>"$place/../err" & pid=$!
until grep -q '"step": 2' "$place/run/metrics.jsonl" 2>/dev/null; do kill -0 $pid || exit 99; sleep 0.01; done
head -c 100000000 /dev/zero >"$place/big" 2>/dev/null
until grep -q 'Training waits' "$place/../err"; do kill -0 $pid || break; sleep 0.05; done
eval "$then"
wait $pid; code=$?
cat "$place/../err" >&2
cp -r "$place/run" "$place/../copy"
exit $code
"""


@pytest.fixture
def filled_meanwhile(
    *, phantoms: Path, tmp_path: Path, options: list[str], small_disk: Call, shell: Call
) -> Callable[[str], Any]:
    """Train 40 steps on a disk that is full from the second on: ``filled_meanwhile("what to do then")``."""

    def call(then: str) -> Any:
        place = tmp_path / "disk"
        settings = ["training.steps=40", "training.checkpoint_minutes=0.001", "training.batch_size=4"]
        more = [word for setting in settings for word in ("--set", setting)]
        command = ["znormseg", "train", phantoms, place / "run", *options, *more]
        return shell([*small_disk(place, 3000), "sh", "-c", FILLED_MEANWHILE, "sh", place, then, *command])

    return call


@pytest.mark.slow
def test_training_waits_while_a_disk_is_full_and_finishes_once_space_is_available(
    filled_meanwhile: Call, tmp_path: Path
) -> None:
    ended = filled_meanwhile('rm "$place/big"')
    assert ended.code == 0, ended.err
    assert "No space left on device" in ended.err
    assert " needs " in ended.err
    records = [json.loads(line) for line in (tmp_path / "copy" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, 41))


@pytest.mark.slow
def test_training_stopped_while_a_disk_is_full_ends_with_the_error_and_an_old_checkpoint(
    filled_meanwhile: Call, phantoms: Path, tmp_path: Path, shell: Call
) -> None:
    ended = filled_meanwhile("kill -TERM $pid")
    assert_the_machine_is_blamed(ended, tmp_path / "disk", "No space left on device", "Free some space")
    resumed = shell(["znormseg", "train", phantoms, tmp_path / "copy", "--resume"])
    assert resumed.code == 0, resumed.err


def test_evaluate_on_a_full_disk_leaves_no_partial_table(
    phantoms: Path, tmp_path: Path, small_disk: Call, shell: Call
) -> None:
    place = tmp_path / "disk"
    fill = f'head -c 1000000 /dev/zero > "{place}/big" 2>/dev/null; ' + left_behind(place)
    command = ["znormseg", "evaluate", phantoms, phantoms, "--out", place / "scores.csv"]
    ended = shell([*small_disk(place, 16), "sh", "-c", fill, "sh", *command])
    assert ended.code == 7, ended.err
    assert str(place / "scores.csv") in ended.err
    assert "left:big" in ended.err
    assert "left:scores.csv" not in ended.err
    assert "left:.partial" not in ended.err


def test_phantoms_on_a_full_disk_are_refused_naming_the_path(tmp_path: Path, small_disk: Call, shell: Call) -> None:
    place = tmp_path / "disk"
    ended = shell([*small_disk(place, 64), "znormseg", "data", "phantom", place / "p", "-n", "1", "--spacing-mm", "4"])
    assert_the_machine_is_blamed(ended, place, "No space left on device")


# Permission


@needs_setpriv
@pytest.mark.parametrize("below", ["", "new"])
def test_predict_into_a_read_only_folder_is_refused(
    *, below: str, tiny_run: Path, phantoms: Path, read_only: Path, shell: Call
) -> None:
    ended = shell([*UNPRIVILEGED, "znormseg", "predict", tiny_run, phantoms / CASE, read_only / below])
    assert_the_machine_is_blamed(ended, read_only, "Permission denied", "choose another place")


@needs_setpriv
@pytest.mark.parametrize("below", ["", pytest.param("new", marks=pytest.mark.slow)])
def test_train_into_a_read_only_folder_is_refused(
    *, below: str, phantoms: Path, read_only: Path, options: list[str], shell: Call
) -> None:
    ended = shell([*UNPRIVILEGED, "znormseg", "train", phantoms, read_only / below, *options])
    assert_the_machine_is_blamed(ended, read_only, "Permission denied", "choose another place")


@needs_setpriv
def test_evaluate_into_a_read_only_folder_is_refused(phantoms: Path, read_only: Path, shell: Call) -> None:
    ended = shell([*UNPRIVILEGED, "znormseg", "evaluate", phantoms, phantoms, "--out", read_only / "scores.csv"])
    assert_the_machine_is_blamed(ended, read_only / "scores.csv", "Permission denied")


@needs_setpriv
def test_an_image_without_read_permission_is_bad_data(
    tiny_run: Path, phantoms: Path, tmp_path: Path, shell: Call
) -> None:
    case = Path(shutil.copytree(phantoms / CASE, tmp_path / CASE))
    (case / f"{CASE}_t2.nii.gz").chmod(0)
    ended = shell([*UNPRIVILEGED, "znormseg", "predict", tiny_run, case, tmp_path / "out"])
    assert (ended.code, list((tmp_path / "out").iterdir())) == (3, [])
    assert "no permission to read it" in ended.err


@needs_setpriv
def test_a_data_folder_without_read_permission_is_named(
    tiny_run: Path, phantoms: Path, tmp_path: Path, shell: Call
) -> None:
    case = Path(shutil.copytree(phantoms / CASE, tmp_path / "data" / CASE))
    case.chmod(0)
    ended = shell([*UNPRIVILEGED, "znormseg", "predict", tiny_run, tmp_path / "data", tmp_path / "out"])
    case.chmod(0o755)
    assert_the_machine_is_blamed(ended, case, "Permission denied")


# Signals and processes


@pytest.fixture(scope="session")
def large_case(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three phantoms at four times the resolution, so that a prediction takes a while."""
    folder = tmp_path_factory.mktemp("large")
    for case in sorted(phantoms.iterdir())[:3]:
        (folder / case.name).mkdir()
        for path in case.glob("*.nii.gz"):
            image: Any = nib.load(path)
            voxels = np.asarray(image.dataobj).repeat(4, 0).repeat(4, 1).repeat(4, 2)
            affine = image.affine @ np.diag([0.25, 0.25, 0.25, 1])
            nib.save(nib.Nifti1Image(voxels, affine), folder / case.name / path.name)
    return folder


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
@pytest.mark.parametrize("moment", ["while the first is read", "once one is written"])
def test_predict_stopped_by_a_signal_leaves_only_complete_files(
    *, moment: str, number: signal.Signals, tiny_run: Path, large_case: Path, tmp_path: Path, znormseg_process: Call
) -> None:
    out = tmp_path / "out"
    process = znormseg_process("predict", tiny_run, large_case, out)
    seen = out.is_dir if moment == "while the first is read" else lambda: any(out.glob("[!.]*.nii.gz"))
    until = time.monotonic() + 120
    while not seen():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.001)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "of 3 label maps are in" in err
    assert "Traceback" not in err
    assert [path.name for path in out.rglob(".partial*")] == []
    for path in out.glob("*.nii.gz"):
        np.asarray(nib.Nifti1Image.from_filename(path).dataobj)  # whole


class _Finalized:
    """Gets a signal while Python ignores exceptions."""

    def __init__(self, number: signal.Signals) -> None:
        self._number = number

    def __del__(self) -> None:
        signal.raise_signal(self._number)


def _signal_in_a_finalizer(number: signal.Signals) -> None:
    with signals_unwind():
        _Finalized(number)
        time.sleep(60)


@pytest.mark.parametrize(("number", "message"), [(signal.SIGINT, None), (signal.SIGTERM, "stopped by SIGTERM")])
def test_a_signal_that_arrives_in_a_finalizer_is_not_lost(number: signal.Signals, message: str | None) -> None:
    with pytest.raises(KeyboardInterrupt, match=message):
        _signal_in_a_finalizer(number)


@pytest.mark.slow
def test_sigterm_before_the_first_step_does_not_prevent_a_new_start(
    large_case: Path, tmp_path: Path, options: list[str], znormseg_process: Call
) -> None:
    run = tmp_path / "run"
    process = znormseg_process("train", large_case, run, *options)
    until = time.monotonic() + 120
    while not (run / "run.json").exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "stopped by SIGTERM" in err
    assert not run.exists()


@pytest.mark.slow
def test_training_has_no_worker_process_that_could_be_killed(
    phantoms: Path, tmp_path: Path, options: list[str], znormseg_process: Call
) -> None:
    process = znormseg_process("train", phantoms, tmp_path / "run", *options, "--set", "training.steps=40")
    children: list[psutil.Process] = []
    while process.poll() is None and not children:
        try:
            children = psutil.Process(process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            break
        _, children = psutil.wait_procs(children, timeout=5)  # a command that ends by itself is no worker
        time.sleep(0.01)
    for one in (*children, *([process] if children else [])):  # their parent may wait for ever for a killed child
        one.kill()
    process.communicate()
    assert children == []
    assert process.returncode == 0
