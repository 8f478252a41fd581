"""``znormseg serve``: the service, its users and their tokens."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from app.cli import options, terminal
from app.cli.verbs import VerbWithVerbs, verb

if TYPE_CHECKING:
    from app.service.accounts import Accounts
    from app.service.http_server import HttpSettings
    from app.service.settings import ServiceSettings

EXAMPLES = """\
znormseg serve user add ann --role admin --data FOLDER
znormseg serve --data FOLDER --model starter"""

app = typer.Typer(
    cls=VerbWithVerbs,
    help="Serve predictions to a department: pages, an API and a queue on the GPUs of this machine.\n\n"
    "Add the first user with serve user add. The service answers on 127.0.0.1 only, unless --host is given.",
    invoke_without_command=True,
    epilog=EXAMPLES,
)
_user = typer.Typer(help="Add, list and remove users, and change passwords.", no_args_is_help=True)
_token = typer.Typer(help="Add and revoke tokens of the API.", no_args_is_help=True)
app.add_typer(_user, name="user")
app.add_typer(_token, name="token")

_queue, _web, _hardware, _limits = map(options.panel, ("Queue", "Web", "Hardware", "Limits"))
_Folder = Annotated[Path, typer.Option("--data", metavar="FOLDER", help="Data folder of the service.")]
_Database = Annotated[
    str,
    typer.Option(
        "--database",
        metavar="URL",
        envvar="ZNORMSEG_DATABASE",
        show_envvar=False,
        help="PostgreSQL database, postgresql+psycopg://USER:PASSWORD@HOST/NAME; default: SQLite in --data. Also read "
        "from ZNORMSEG_DATABASE.",
    ),
]
_Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the user.")]


@app.callback()
def serve_command(
    context: typer.Context,
    *,
    folder: Annotated[
        Path | None, typer.Option("--data", metavar="FOLDER", help="Data folder, created if missing.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Folder of a run or of an ensemble, or a published model; may be repeated. The first is the default.",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only report what would keep the service from working.")
    ] = False,
    database: _Database = "",
    host: Annotated[str, _web(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, _web(min=0, max=65535, help="Port to listen on; 0 chooses one.")] = 8000,
    name: Annotated[
        list[str] | None,
        _web(metavar="HOST", help="Host name under which browsers reach the service; may be repeated."),
    ] = None,
    tls_cert: Annotated[Path | None, _web(metavar="PEM", help="Certificate and chain, to serve HTTPS.")] = None,
    tls_key: Annotated[Path | None, _web(metavar="PEM", help="Key of the certificate.")] = None,
    proxy: Annotated[
        str | None,
        _web(
            metavar="ADDRESS",
            help="Reverse proxy whose X-Forwarded-For and X-Forwarded-Proto are trusted; those of other "
            "clients are ignored.",
        ),
    ] = None,
    device: options.Device = "auto",
    devices: Annotated[
        str | None,
        _hardware(help="GPUs, one worker each: auto (all), a number, or names such as cuda:0,cuda:1."),
    ] = None,
    workers: Annotated[int | None, _hardware(help="Number of worker processes on --device; default: 1.")] = None,
    inbox: Annotated[
        Path | None, _queue(metavar="FOLDER", help="Let jobs name folders of images below this folder.")
    ] = None,
    keep_days: Annotated[float, _queue(min=0.001, help="Delete jobs this many days after they ended.")] = 7.0,
    grace_seconds: Annotated[
        float,
        _queue(min=0, help="Time for running jobs to finish after SIGTERM; others run again after the next start."),
    ] = 5.0,
    most_queued: Annotated[int, _limits(min=1, help="Jobs that may wait or run.")] = 500,
    most_queued_per_user: Annotated[int, _limits(min=1, help="The same, for one user.")] = 200,
    most_file_gb: Annotated[float, _limits(min=0.001, help="Largest file of an upload.")] = 2.0,
    most_upload_gb: Annotated[float, _limits(min=0.001, help="Largest upload, also after unpacking.")] = 8.0,
    reserve_gb: Annotated[float, _limits(min=0, help="Space that uploads leave free on the disk.")] = 1.0,
) -> None:
    """Serve predictions to a department, or manage its users."""
    if context.invoked_subcommand is not None:
        return
    options.refuse(folder is None, "give --data FOLDER, the data folder of the service")
    assert folder is not None
    options.refuse(not model, "give --model MODEL, for instance --model starter")
    options.refuse(devices is not None and (workers is not None or device != "auto"), _DEVICES)
    with _installed():
        from app.service.http_server import HttpSettings
        from app.service.settings import ServiceSettings

    options.runtime_config(device)
    settings = ServiceSettings(
        folder=folder,
        models=_models(model or []),
        database=database,
        device=device,
        devices=_slots(devices, workers),
        inbox=inbox,
        keep_days=keep_days,
        most_queued=most_queued,
        most_queued_per_user=most_queued_per_user,
        most_file_bytes=int(most_file_gb * 1e9),
        most_upload_bytes=int(most_upload_gb * 1e9),
        reserve_bytes=int(reserve_gb * 1e9),
        grace_seconds=grace_seconds,
        names=_names(host, name or []),
    )
    http = HttpSettings(host=host, port=port, certificate=tls_cert, key=tls_key, proxy=proxy)
    with terminal.watched():
        if check:
            _check(settings, http)
        else:
            _serve(settings, http)


_DEVICES = "--devices cannot be combined with --workers or --device"


def _serve(settings: ServiceSettings, http: HttpSettings) -> None:
    from app import NOTICE
    from app.service.serve import serve

    def started(address: str) -> None:
        terminal.say(f"znormseg serves at {address}. {NOTICE}")

    serve(settings, http, on_start=started)


def _check(settings: ServiceSettings, http: HttpSettings) -> None:
    from app.errors import exit_code
    from app.service.check import check_service, problems_in_words

    good, errors = check_service(settings, http)
    problems = problems_in_words(errors)
    lines = [*(f"ok       {one}" for one in good), *(f"problem  {one}" for one in problems)]
    terminal.result({"ok": good, "problems": problems}, *lines)
    if errors:
        raise typer.Exit(exit_code(errors[0]))


@verb(
    _user, "add", examples="znormseg serve user add ann --data FOLDER\nznormseg serve user add ben --data FOLDER < FILE"
)
def add_user(
    *,
    name: _Name,
    folder: _Folder,
    role: Annotated[Literal["user", "admin"], typer.Option(help="Admins see the jobs of all users.")] = "user",
    database: _Database = "",
) -> None:
    """Add a user; asks for the password, or reads a line of standard input."""
    with _accounts(folder, database) as accounts:
        accounts.add(name, _password(), role)
    terminal.result({"user": name, "role": role}, f"{name}: added as {role}")


@verb(_user, "password", examples="znormseg serve user password ann --data FOLDER")
def change_password(*, name: _Name, folder: _Folder, database: _Database = "") -> None:
    """Change a user's password, and sign the user out everywhere."""
    with _accounts(folder, database) as accounts:
        accounts.set_password(name, _password())
    terminal.result({"user": name}, f"{name}: has a new password")


@verb(_user, "remove", examples="znormseg serve user remove ann --data FOLDER")
def remove_user(*, name: _Name, folder: _Folder, database: _Database = "") -> None:
    """Remove a user without jobs, with all tokens."""
    with _accounts(folder, database) as accounts:
        accounts.remove(name)
    terminal.result({"user": name}, f"{name}: removed")


@verb(_user, "list", examples="znormseg serve user list --data FOLDER")
def list_users(*, folder: _Folder, database: _Database = "") -> None:
    """List the users."""
    with _accounts(folder, database) as accounts:
        found = accounts.listed()
    rows = [["name", "role", "tokens"], *([name, role, str(tokens)] for name, role, tokens in found)]
    content = [{"name": name, "role": role, "tokens": tokens} for name, role, tokens in found]
    terminal.result({"users": content}, terminal.table(rows))


@verb(_token, "add", examples="znormseg serve token add ann --data FOLDER")
def add_token(*, name: _Name, folder: _Folder, database: _Database = "") -> None:
    """Create a token of a user, and print it; it cannot be shown again."""
    with _accounts(folder, database) as accounts:
        token = accounts.add_token(name)
    terminal.result({"user": name, "token": token}, token)


@verb(_token, "revoke", examples="znormseg serve token revoke 0f3a5c7e9b1d2f46 --data FOLDER")
def revoke_token(
    *,
    token: Annotated[str, typer.Argument(metavar="TOKEN", help="The token, or its middle part.")],
    folder: _Folder,
    database: _Database = "",
) -> None:
    """Revoke a token; it is refused from now on."""
    with _accounts(folder, database) as accounts:
        accounts.revoke_token(token)
    terminal.result({"revoked": True}, "revoked")


@contextmanager
def _accounts(folder: Path, database: str) -> Iterator[Accounts]:
    """Yield the users of a service, which may be running."""
    with _installed():
        from app.service.accounts import Accounts
        from app.service.database import Database
        from app.service.settings import ServiceSettings

    settings = ServiceSettings(folder=folder, models={}, database=database)
    settings.place.create()
    opened = Database(settings.database_url)
    try:
        opened.migrate()
        yield Accounts(database=opened, secret=b"")
    finally:
        opened.close()


@contextmanager
def _installed() -> Iterator[None]:
    """Say how to install the packages of the service if they are missing."""
    from app.errors import MissingToolError

    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingToolError(
            f"serve needs packages that are not installed ({error.name}). Install them: pip install 'znormseg[serve]'"
        ) from error


def _password() -> str:
    if sys.stdin.isatty():
        return str(typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True))
    return sys.stdin.readline().rstrip("\n")


def _models(names: list[str]) -> dict[str, Path]:
    """Return the folder of each model by the name that jobs give."""
    found: dict[str, Path] = {}
    for text in names:
        place = options.installed_model(Path(text))
        name = text if "/" not in text else place.resolve().name
        options.refuse(name in found, f"--model: two models are called {name}; rename one of the folders")
        found[name] = place
    return found


def _names(host: str, names: list[str]) -> tuple[str, ...]:
    """Return the host names that are answered: those that are given, and the address if it is that of one interface."""
    from app.service.serve import WILDCARDS

    return (*(() if host in WILDCARDS else (host,)), *names)


def _slots(devices: str | None, workers: int | None) -> tuple[str | None, ...]:
    """Return the device of each worker."""
    from app.inference.batch.parallel import devices_of
    from app.system.worker_pool import default_devices

    if devices is None:
        return default_devices(1 if workers is None else workers, option="--workers")
    import torch

    return devices_of(devices, torch.cuda.device_count())
