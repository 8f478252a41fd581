"""What can go wrong, and the exit code each kind of it has.

| code | meaning |
|---|---|
| 0 | all done |
| 1 | a fault of this program |
| 2 | the command line is wrong (unknown option, value missing) |
| 3 | the data cannot be used |
| 4 | the configuration is wrong |
| 5 | the run folder does not fit: not empty, nothing to resume, no weights, changed weights |
| 6 | some cases failed, the others are done |
| 7 | the machine: disk full, not writable, no such device, out of memory, a command not installed |
| 130 | interrupted by Ctrl-C, SIGTERM or SIGHUP |
"""

from __future__ import annotations

import os
from typing import Final

from data.errors import DataError
from data.filesystem import in_words, is_raw

EXIT_FAULT: Final = 1
EXIT_USAGE: Final = 2
EXIT_DATA: Final = 3
EXIT_CONFIG: Final = 4
EXIT_RUN: Final = 5
EXIT_SOME_FAILED: Final = 6
EXIT_MACHINE: Final = 7
EXIT_INTERRUPTED: Final = 130


class ConfigError(ValueError):
    """A config file or an override cannot be used. The message names the key, the value and what is allowed."""


class RunError(RuntimeError):
    """A run folder cannot be used as asked. The message names the folder and the way out."""


class DeviceError(RuntimeError):
    """The device asked for is not there. The message names it and what is there."""


class MissingToolError(RuntimeError):
    """A command of others is not installed, or cannot be started. The message says how to install it."""


class MemoryShortError(RuntimeError):
    """Nothing that could be planned fits into the memory there is. The message says what the least of it needed."""


class InterruptedRunError(Exception):
    """A job was interrupted and what it had is whole. The message says how to go on."""


_CODES: Final[tuple[tuple[tuple[type[BaseException], ...], int], ...]] = (
    ((DataError,), EXIT_DATA),
    ((ConfigError,), EXIT_CONFIG),
    ((RunError,), EXIT_RUN),
    ((DeviceError, MissingToolError, MemoryShortError, OSError), EXIT_MACHINE),
    ((KeyboardInterrupt, InterruptedRunError), EXIT_INTERRUPTED),
)

#: Parts of messages of torch, OpenVINO and the system that say that memory ran out.
_SAID: Final = (
    "out of memory",
    "not enough memory",
    "defaultcpuallocator",
    "bad_alloc",
    "cannot allocate memory",
    "failed to allocate",
    "memory allocation",
)


def exit_code(error: BaseException) -> int:
    """Exit code for an exception, from the table above."""
    if is_out_of_memory(error) or _has_no_deterministic_form(error):
        return EXIT_MACHINE
    for kinds, code in _CODES:
        if isinstance(error, kinds):
            return code
    return EXIT_FAULT


def message(error: BaseException) -> str:
    """One line for the user: what came, and what to do about it."""
    if isinstance(error, OSError) and not isinstance(error, DataError):
        return _of_the_system(error)
    if is_out_of_memory(error):
        return "out of memory. Use a smaller patch or batch, or close other programs."
    if _has_no_deterministic_form(error):
        operation = str(error).partition(" does not ")[0]
        return f"{operation}: the device has no deterministic form of it. Set runtime.deterministic=false."
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted"
    return str(error)


def _of_the_system(error: OSError) -> str:
    """A system error with its place and a way out; one without a number has a text of the program already."""
    if error.errno is None:
        return f"{str(error).rstrip('.')}."
    if error.filename is None:
        return f"a file cannot be used: {in_words(error)} `znormseg --debug ...` shows where it was met."
    doing = "cannot be used: " if is_raw(error) else ""
    return f"{os.fsdecode(error.filename)}: {doing}{in_words(error)}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of numpy, torch or OpenVINO says that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(part in str(error).lower() for part in _SAID)


def _has_no_deterministic_form(error: BaseException) -> bool:
    """Whether torch refused an operation because of ``runtime.deterministic``; it tells so in the text alone."""
    return isinstance(error, RuntimeError) and "does not have a deterministic implementation" in str(error)
