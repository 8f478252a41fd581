"""Exit codes and messages: one code for each kind of error, and one line that says what to do."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
import torch
import typer

from app import errors
from app.cli import terminal
from app.errors import ConfigError, DeviceError, InterruptedRunError, RunError, exit_code, message
from data.errors import DataError
from data.filesystem import remedy


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("x"), 3),
        (ConfigError("x"), 4),
        (RunError("x"), 5),
        (DeviceError("x"), 7),
        (OSError(errno.ENOSPC, "x"), 7),
        (PermissionError(errno.EACCES, "x"), 7),
        (FileNotFoundError(errno.ENOENT, "x"), 7),
        (MemoryError(), 7),
        (KeyboardInterrupt(), 130),
        (InterruptedRunError("x"), 130),
        (ValueError("x"), 1),
        (RuntimeError("x"), 1),
        (AssertionError(), 1),
    ],
    ids=lambda value: value if isinstance(value, int) else type(value).__name__,
)
def test_each_kind_of_error_has_its_exit_code(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


@pytest.mark.parametrize("error", [OSError("It broke."), OSError("It broke")])
def test_a_system_message_ends_with_exactly_one_full_stop(error: OSError) -> None:
    assert message(error) == "It broke."


def test_running_out_of_gpu_memory_is_a_machine_error() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    assert exit_code(error) == 7
    assert "smaller patch or batch" in message(error)


def test_running_out_of_main_memory_in_torch_is_a_machine_error() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert exit_code(raised.value) == 7


def test_a_non_deterministic_operation_is_named_with_a_remedy() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError) as raised:
            torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert exit_code(raised.value) == 7
    assert message(raised.value).startswith("put_: the device has no deterministic implementation of it.")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "Free some space, or choose another folder."),
        (errno.EACCES, "Check who may read and write it, or choose another place."),
        (errno.EROFS, "The file system is read-only; choose another folder."),
    ],
)
def test_a_system_error_names_the_file_and_a_remedy(number: int, advice: str) -> None:
    text = message(OSError(number, "what the system says", "/some/file"))
    assert text == f"/some/file: what the system says. {advice}"


@pytest.mark.parametrize("number", sorted(errno.errorcode), ids=errno.errorcode.get)
def test_every_system_message_names_a_path_and_a_remedy(number: int) -> None:
    raw = OSError(number, os.strerror(number), "/some/file")
    assert message(raw).startswith(f"/some/file: cannot be used: {os.strerror(number)}. ")
    assert message(raw).endswith(remedy(number))
    unnamed = message(OSError(number, os.strerror(number)))
    assert remedy(number) in unnamed
    assert unnamed.endswith("`znormseg --debug ...` shows where it happened.")


def test_our_own_messages_are_passed_on_unchanged() -> None:
    assert message(DataError("case a: broken")) == "case a: broken"


def test_running_out_of_memory_is_reported_with_a_remedy() -> None:
    assert "smaller patch or batch" in message(MemoryError())


def test_an_internal_error_is_shown_as_a_bug_and_asks_for_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert terminal.fail(ZeroDivisionError("by zero")) == 1
    shown = capsys.readouterr()
    assert "internal error: ZeroDivisionError: by zero" in shown.err
    assert "--debug" in shown.err
    assert shown.out == ""


def test_an_aborted_command_counts_as_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    assert terminal.fail(typer.Abort()) == 130
    assert capsys.readouterr().err == "znormseg: interrupted\n"


def test_the_documented_exit_codes_match_the_program() -> None:
    text = (Path(__file__).parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)}
    assert documented == {0} | {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
