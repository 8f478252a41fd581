"""Exceptions of the application, and the exit code of each kind of error.

| code | meaning |
|---|---|
| 0 | success |
| 1 | a bug in this program |
| 2 | invalid command line (unknown option, missing value) |
| 3 | unusable data |
| 4 | invalid configuration |
| 5 | unusable run folder: not empty, nothing to resume, no weights, changed weights |
| 6 | some cases failed, the others succeeded |
| 7 | a problem of the machine: disk full, not writable, no such device, out of memory, a command not installed |
| 130 | interrupted by Ctrl-C, SIGTERM or SIGHUP |
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from data.errors import DataError
from data.filesystem import in_words, is_raw

if TYPE_CHECKING:
    from pydantic import ValidationError

EXIT_FAULT: Final = 1
#: Typer's own, after a wrong command line.
EXIT_USAGE: Final = 2
EXIT_DATA: Final = 3
EXIT_CONFIG: Final = 4
EXIT_RUN: Final = 5
EXIT_SOME_FAILED: Final = 6
EXIT_MACHINE: Final = 7
EXIT_INTERRUPTED: Final = 130


class ConfigError(ValueError):
    """A config file or an override is invalid. The message names the key, its value and the allowed values."""


class RunError(RuntimeError):
    """A run folder cannot be used as requested. The message names the folder and a remedy."""


class DeviceError(RuntimeError):
    """The requested device does not exist. The message names it and the devices that do."""


class MissingToolError(RuntimeError):
    """An external command is not installed or cannot be started. The message says how to install it."""


class MemoryShortError(RuntimeError):
    """No plan fits into the available memory. The message says how much the smallest plan needed."""


class InterruptedRunError(Exception):
    """A job was interrupted; what it had finished is intact. The message says how to continue."""


_CODES: Final[tuple[tuple[tuple[type[BaseException], ...], int], ...]] = (
    ((DataError,), EXIT_DATA),
    ((ConfigError,), EXIT_CONFIG),
    ((RunError,), EXIT_RUN),
    ((DeviceError, MissingToolError, MemoryShortError, OSError), EXIT_MACHINE),
    ((KeyboardInterrupt, InterruptedRunError), EXIT_INTERRUPTED),
)

#: Substrings of the out-of-memory messages of torch, OpenVINO and the operating system, in lower case. cuBLAS and cuDNN
#: allocate workspaces without torch and report a status. cuDNN may report only that no engine is left, since each one
#: needs a workspace that does not fit (pytorch/pytorch#108645).
_OUT_OF_MEMORY_TEXTS: Final = (
    "out of memory",
    "not enough memory",
    "defaultcpuallocator",
    "bad_alloc",
    "cannot allocate memory",
    "failed to allocate",
    "memory allocation",
    "cudnn_status_alloc_failed",
    "cublas_status_alloc_failed",
    "unable to find an engine",
    "no valid execution plans",
)


def exit_code(error: BaseException) -> int:
    """Return the exit code of an exception, from the table above."""
    if is_out_of_memory(error) or _has_no_deterministic_form(error):
        return EXIT_MACHINE
    for kinds, code in _CODES:
        if isinstance(error, kinds):
            return code
    return EXIT_FAULT


def message(error: BaseException) -> str:
    """Return a one-line message for the user: what went wrong, and what to do about it."""
    if isinstance(error, OSError) and not isinstance(error, DataError):
        return _of_the_system(error)
    if is_out_of_memory(error):
        return "out of memory. Use a smaller patch or batch, or close other programs."
    if _has_no_deterministic_form(error):
        operation = str(error).partition(" does not ")[0]
        return f"{operation}: the device has no deterministic implementation of it. Set runtime.deterministic=false."
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted"
    return str(error)


def _of_the_system(error: OSError) -> str:
    """Describe a system error with its path and a remedy; an error without errno already has one of our messages."""
    if error.errno is None:
        return f"{str(error).rstrip('.')}."
    if error.filename is None:
        return f"a file cannot be used: {in_words(error)} `znormseg --debug ...` shows where it happened."
    problem = "cannot be used: " if is_raw(error) else ""
    return f"{os.fsdecode(error.filename)}: {problem}{in_words(error)}"


def first_problem(error: ValidationError) -> str:
    """Return the first problem that pydantic found, in one line: where it is in the data, and what is wrong."""
    problem = error.errors()[0]
    given = f", got {problem['input']!r}" if isinstance(problem["input"], str | int | float | None) else ""
    place = ".".join(map(str, problem["loc"]))
    return ": ".join(filter(None, (place, problem["msg"].removeprefix("Value error, ") + given)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of numpy, torch or OpenVINO means out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(part in str(error).lower() for part in _OUT_OF_MEMORY_TEXTS)


def _has_no_deterministic_form(error: BaseException) -> bool:
    """Whether torch refused an operation under ``runtime.deterministic``; there is no exception type for it."""
    return isinstance(error, RuntimeError) and "does not have a deterministic implementation" in str(error)
