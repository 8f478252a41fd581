"""Terminal output: messages and progress on stderr, results on stdout, errors as one line and an exit code."""

from __future__ import annotations

import itertools
import json
import logging
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import typer

from app.system.process import repeat_ignored_interrupts, stopping_signals

if TYPE_CHECKING:
    from app.progress import OnProgress, Progress


@runtime_checkable
class _UsageError(Protocol):
    """A usage error that can print itself; a protocol, since typer's class comes from its vendored copy of click."""

    exit_code: int

    def show(self) -> None: ...


@dataclass
class Settings:
    """Options that apply to every command, and the state of the process."""

    debug: bool = False
    quiet: bool = False
    """Show only warnings and errors, no progress or notes."""
    as_json: bool = False
    """Print the result as JSON."""
    stopped_by: str = ""
    """Description of the signal that stopped the job, such as ``stopped by SIGTERM``."""


settings = Settings()

#: Terminals up to this many columns wide get a short progress bar.
_NARROW = 100

#: Minimum interval between lines of progress when stderr is not a terminal.
_SECONDS_BETWEEN_LINES = 15.0


def say(text: str) -> None:
    """Print a message on stderr."""
    typer.echo(text, err=True)


def result(content: Any, *lines: str) -> None:
    """Print a result on stdout: with ``--json`` the content as one JSON object, otherwise the lines."""
    if settings.as_json or lines:
        typer.echo(json.dumps(content, indent=1) if settings.as_json else "\n".join(lines))


def some(ids: Sequence[str]) -> str:
    """Join the first few case ids."""
    return ", ".join(ids[:5]) + (" ..." if len(ids) > 5 else "")


def name_failed(failures: Collection[str], *, done: int) -> None:
    """Name the cases that failed for reasons already printed; exit with code 6, or with 3 if no case succeeded."""
    from app.errors import EXIT_DATA, EXIT_SOME_FAILED

    if failures:
        say(f"znormseg: {len(failures)} of {done + len(failures)} cases failed: {', '.join(failures)}")
        raise typer.Exit(EXIT_SOME_FAILED if done else EXIT_DATA)


def complain(failures: Mapping[str, str]) -> None:
    """Print why each case failed, by case id."""
    for case, text in failures.items():
        say(f"znormseg: {case}: {text}")


def exit_if_failed(failures: Collection[str]) -> None:
    """Exit with code 6 if cases failed."""
    from app.errors import EXIT_SOME_FAILED

    if failures:
        raise typer.Exit(EXIT_SOME_FAILED)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as a table, the first column left-aligned and the others right-aligned; coloured in a terminal.

    Nothing is truncated: in a narrow terminal, lines wrap.
    """
    if sys.stdout.isatty():
        return _rich_table(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _rich_table(rows: Sequence[Sequence[str]]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, name in enumerate(rows[0]):
        drawn.add_column(Text(name), justify="right" if column else "left", no_wrap=True)
    for row in rows[1:]:
        drawn.add_row(*map(Text, row))  # as Text, so that a case id is never parsed as markup
    console = Console()
    console.width = max(console.width, console.measure(drawn, options=console.options.update(max_width=10_000)).maximum)
    with console.capture() as caught:
        console.print(drawn)
    return caught.get().strip("\n")


@contextmanager
def signals_unwind() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a job as Ctrl-C does, so that files are cleaned up.

    ``docker stop`` and batch systems send SIGTERM, a closed terminal sends SIGHUP; under nohup SIGHUP stays ignored.
    """
    caught: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - signature of a signal handler
        caught.append(number)
        name = signal.Signals(number).name
        # A second SIGTERM ends the process at once. A second SIGHUP is ignored: the kernel and the shell each send one.
        signal.signal(number, signal.SIG_IGN if name == "SIGHUP" else signal.SIG_DFL)
        settings.stopped_by = f"stopped by {name}"
        raise KeyboardInterrupt(settings.stopped_by)

    def catch_again() -> int:
        if not caught:
            return signal.SIGINT
        signal.signal(caught[-1], interrupt)
        return caught[-1]

    before = {number: signal.signal(number, interrupt) for number in stopping_signals() if number != signal.SIGINT}
    try:
        with repeat_ignored_interrupts(catch_again):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fail(error: BaseException) -> int:
    """Print what went wrong, and return the exit code."""
    if isinstance(error, _UsageError):
        error.show()
        return error.exit_code
    if isinstance(error, typer.Abort):
        error = KeyboardInterrupt()
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
        error = error.__context__  # typer exits silently, even if the pipe is not a standard stream
    from app.errors import EXIT_FAULT, exit_code, message

    code = exit_code(error)
    if settings.debug:
        traceback.print_exception(error)
    if code == EXIT_FAULT:
        say(f"znormseg: internal error: {type(error).__name__}: {error}")
        say("Please report it with the output of `znormseg --debug ...`.")
    else:
        say(f"znormseg: {message(error)}")
    return code


@contextmanager
def watched() -> Iterator[OnProgress]:
    """Send the application's messages to stderr, and yield a callback that shows progress there."""
    log = logging.getLogger("znormseg")
    log.setLevel(logging.DEBUG if settings.debug else logging.WARNING if settings.quiet else logging.INFO)
    log.propagate = False
    # nibabel logs header repairs without the file's name; our own messages cover those that matter.
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
    with _threads_without_tracebacks(), _drawn(log) as drawn:
        yield drawn


@contextmanager
def _threads_without_tracebacks() -> Iterator[None]:
    """Suppress tracebacks of system errors in a library's thread, such as TensorBoard's.

    The code that uses the thread also receives the error, reports the path and decides whether the job continues.
    """
    before = threading.excepthook

    def only_faults(arguments: threading.ExceptHookArgs) -> None:
        if settings.debug or not isinstance(arguments.exc_value, OSError):
            before(arguments)

    threading.excepthook = only_faults
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def _drawn(log: logging.Logger) -> Iterator[OnProgress]:
    from app.progress import silent

    drawn: OnProgress = silent if settings.quiet else _Lines()
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    with ExitStack() as stack:
        if sys.stderr.isatty() and not settings.quiet:
            from rich.console import Console
            from rich.logging import RichHandler

            console = Console(stderr=True)
            handler = RichHandler(console=console, show_path=False, show_level=False, markup=False)
            drawn = stack.enter_context(_bar(console))
        log.addHandler(handler)
        stack.callback(log.removeHandler, handler)
        yield drawn


def by_case(on_progress: OnProgress, job: str) -> Callable[[str, float], None]:
    """Return a callback that takes a finished case and the fraction of finished cases, and reports progress."""
    from app.progress import Progress

    def ready(case: str, share: float) -> None:
        on_progress(Progress(job=job, share=share, detail=case))

    return ready


def case_counter(on_progress: OnProgress, job: str, count: int) -> Callable[[str], None]:
    """Return a callback that takes each of ``count`` cases when it is finished, and reports progress."""
    ready, numbers = by_case(on_progress, job), itertools.count(1)
    return lambda case: ready(case, next(numbers) / count)


@contextmanager
def _bar(console: Any) -> Iterator[OnProgress]:
    """Show a progress bar with detail and remaining time."""
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    # In a narrow terminal only the detail is truncated, never the bar or the time.
    def whole() -> Any:
        return Column(no_wrap=True, overflow="ignore")

    columns = (
        TextColumn("{task.description}", table_column=whole()),
        BarColumn(bar_width=24 if console.width > _NARROW else 8),
        TaskProgressColumn(table_column=whole()),
        TimeElapsedColumn(table_column=whole()),
        TextColumn("{task.fields[eta]}", table_column=whole()),
        TextColumn("{task.fields[detail]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    )
    with Bar(*columns, console=console, refresh_per_second=4, expand=True) as bar:
        tasks: dict[str, Any] = {}

        def draw(progress: Progress) -> None:
            if progress.job not in tasks:
                tasks[progress.job] = bar.add_task(progress.job, total=1.0, detail="", eta="")
            bar.update(
                tasks[progress.job], completed=progress.share, detail=progress.detail, eta=_eta(progress.eta_seconds)
            )

        yield draw


class _Lines:
    """Prints progress as lines, for logs and pipes."""

    def __init__(self) -> None:
        self._last = 0.0
        self._job = ""

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.job == self._job and progress.share < 1 and now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last, self._job = now, progress.job
        parts = (f"{progress.job} {progress.share:4.0%}", progress.detail, _eta(progress.eta_seconds))
        say("  ".join(part for part in parts if part))


def _eta(seconds: float | None) -> str:
    """Format the remaining time.

    Example:
        >>> _eta(75)
        'ETA 1:15'
    """
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"ETA {hours}:{minutes:02}:{rest:02}" if hours else f"ETA {minutes}:{rest:02}"
