"""``znormseg remote``: send images to a service, watch its jobs and fetch their results."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from app.cli import options, terminal
from app.cli.verbs import verb

if TYPE_CHECKING:
    from app.service.client import RemoteService
    from data.labels import Contrast

app = typer.Typer(
    help="Send images to a service that znormseg serve runs, and fetch the results.\n\n"
    "The token is read from ZNORMSEG_TOKEN or --token-file. Every command can be interrupted and repeated.",
    no_args_is_help=True,
)
_Url = Annotated[str, typer.Argument(metavar="URL", help="Address of the service.")]
_Job = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.")]
_TokenFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="File with the token; default: the variable ZNORMSEG_TOKEN.")
]


@verb(
    app,
    "submit",
    examples="znormseg remote submit URL CASE --watch OUTPUT\n"
    "znormseg remote submit URL --t1 A --t1c B --t2 C --flair D",
)
def submit(
    *,
    url: _Url,
    source: Annotated[
        Path | None, typer.Argument(metavar="INPUT", help="Case folder, folder of cases, DICOM study, or .zip.")
    ] = None,
    t1: options.Image = None,
    t1c: options.T1c = None,
    t2: options.Image = None,
    flair: options.Image = None,
    model: Annotated[str | None, typer.Option(help="Model; default: the service's.")] = None,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="First prepare scans straight from the scanner, as predict does.")
    ] = False,
    tta: Annotated[bool, typer.Option("--tta", help="Average over mirrored images.")] = False,
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="Also compute the file of probabilities.")
    ] = False,
    priority: Annotated[Literal["low", "normal", "high"], typer.Option(help="high is for administrators.")] = "normal",
    watch: Annotated[
        Path | None,
        typer.Option("--watch", metavar="OUTPUT", help="Wait for the jobs, and fetch their results to this folder."),
    ] = None,
    token_file: _TokenFile = None,
) -> None:
    """Send images and start a job for each case; the same command resumes after an interruption."""
    chosen = options.given(t1=t1, t1c=t1c, t2=t2, flair=flair)
    options.refuse(bool(chosen) == (source is not None), "give INPUT, or --t1, --t1c, --t2 and --flair")
    service = _service(url, token_file)
    files = _of_contrasts(chosen) if source is None else _of_folder(source)
    switches = {"prepare": prepare or None, "tta": tta, "save_probabilities": save_probabilities}
    request: dict[str, Any] = {"options": {name: value for name, value in switches.items() if value}}
    request |= {"priority": priority} | ({} if model is None else {"model": model})
    jobs = service.submit(files, request, _state_file(url, files))
    if watch is None:
        terminal.result({"jobs": jobs}, *(f"{job['id']}  {job['state']}  {job['name']}" for job in jobs))
        return
    _fetch_when_done(service, [job["id"] for job in jobs], watch)


@verb(app, "status", examples="znormseg remote status URL\nznormseg remote status URL JOB")
def status(
    *,
    url: _Url,
    job: Annotated[str | None, typer.Argument(metavar="JOB", help="Id of a job; default: all jobs.")] = None,
    token_file: _TokenFile = None,
) -> None:
    """List the jobs of the token's user, or show one."""
    service = _service(url, token_file)
    jobs = list(service.jobs()) if job is None else [service.job(job)]
    rows = [["job", "state", "place", "case"]]
    rows += [[one["id"], one["state"], str(one["place"] or "-"), one["name"]] for one in jobs]
    messages = [f"{one['id']}: {one['message']}" for one in jobs if one["message"]]
    terminal.result({"jobs": jobs}, terminal.table(rows), *messages)


@verb(app, "fetch", examples="znormseg remote fetch URL JOB OUTPUT")
def fetch(
    *,
    url: _Url,
    job: _Job,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder for the results.")],
    token_file: _TokenFile = None,
) -> None:
    """Download the results of a job that is done; files that are complete are not downloaded again."""
    from app.errors import RunError

    service = _service(url, token_file)
    found = service.job(job)
    if found["state"] != "done":
        raise RunError(f"job {job}: is {found['state']}. {found['message'] or 'Wait for it with remote watch.'}")
    written = _fetched(service, found, output)
    terminal.result({"files": [str(path) for path in written]}, *map(str, written))


@verb(app, "watch", examples="znormseg remote watch URL JOB OUTPUT")
def watch_jobs(
    *,
    url: _Url,
    job: _Job,
    output: Annotated[
        Path | None, typer.Argument(metavar="OUTPUT", help="Fetch the results to this folder when they are done.")
    ] = None,
    token_file: _TokenFile = None,
) -> None:
    """Wait until a job has ended, also across restarts of the service."""
    _fetch_when_done(_service(url, token_file), [job], output)


def _fetch_when_done(service: RemoteService, jobs: Sequence[str], output: Path | None) -> None:
    def changed(job: dict[str, Any]) -> None:
        place = f", place {job['place']}" if job["place"] else ""
        terminal.say("  ".join(filter(None, (job["id"], job["state"] + place, job["step"]))))

    ended = service.watch(jobs, changed)
    failures = {job["id"]: job["message"] or job["state"] for job in ended if job["state"] != "done"}
    done = [job for job in ended if job["state"] == "done"]
    written = [path for job in done for path in _fetched(service, job, output)] if output is not None else []
    terminal.result({"jobs": ended, "files": [str(path) for path in written]}, *map(str, written))
    terminal.complain(failures)
    terminal.name_failed(failures, done=len(done))


def _fetched(service: RemoteService, job: dict[str, Any], output: Path) -> list[Path]:
    """Fetch all results of a job; files are named after its id, since the names of cases may occur twice."""
    output.mkdir(parents=True, exist_ok=True)
    endings = {"label_map": ".nii.gz", "dicom_seg": ".dcm", "record": ".json", "page": ".html"}
    written = []
    for one in job["results"]:
        place = output / f"{job['id']}{endings.get(one['name'], '_' + one['name'] + '.nii.gz')}"
        service.fetch(job["id"], one["name"], place)
        written.append(place)
    return written


def _service(url: str, token_file: Path | None) -> RemoteService:
    from app.errors import ConfigError
    from app.service.client import RemoteService

    token = os.environ.get("ZNORMSEG_TOKEN", "") if token_file is None else token_file.read_text(errors="replace")
    if not token.strip():
        raise ConfigError("no token: set ZNORMSEG_TOKEN, or give --token-file FILE")
    return RemoteService(url=url, token=token.strip(), on_wait=terminal.say)


def _of_contrasts(files: dict[Contrast, Path]) -> list[tuple[str, Path, str | None]]:
    return [(path.name, path, contrast) for contrast, path in files.items()]


def _of_folder(source: Path) -> list[tuple[str, Path, str | None]]:
    from data.errors import DataError

    if source.is_file():
        return [(source.name, source, None)]
    if not source.is_dir():
        raise DataError(f"{source}: does not exist")
    source = source.resolve()  # "." and ".." have names too
    paths = sorted(path for path in source.rglob("*") if path.is_file() and not path.is_symlink())
    files = [(str(path.relative_to(source.parent)), path, None) for path in paths if path.stat().st_size]
    if not files:
        raise DataError(f"{source}: has no files")
    return [*files]


def _state_file(url: str, files: Sequence[tuple[str, Path, str | None]]) -> Path | None:
    """Return the file that records an upload in the user's folder for such files; None if it cannot be written."""
    import hashlib

    import platformdirs

    marks = [url, *(f"{path.resolve()} {path.stat().st_mtime_ns}" for _, path, _ in files)]
    name = hashlib.sha256("\n".join(marks).encode(errors="surrogateescape")).hexdigest()[:32]
    folder = Path(platformdirs.user_state_dir("znormseg")) / "uploads"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a user without a home folder, as in a container
        terminal.say(
            f"{folder}: cannot be created ({error.strerror}); after an interruption, all files are sent again."
        )
        return None
    return folder / f"{name}.json"
