"""``znormseg serve --check``: everything that would keep the service from starting or from working well."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from app.errors import message
from app.inference.batch.job import PredictJob
from app.service.accounts import Accounts
from app.service.database import Database
from app.service.http_server import HttpSettings
from app.service.serve import only_service, require_usable
from app.service.service import require_inbox
from app.service.settings import ServiceSettings


def check_service(settings: ServiceSettings, http: HttpSettings) -> tuple[list[str], list[Exception]]:
    """Try each part of a service without starting it; the data folder is created if it is missing.

    Returns:
        what is in order, one sentence each, and the errors.
    """
    good: list[str] = []
    errors: list[Exception] = []

    def attempt(check: Callable[[], str]) -> bool:
        try:
            good.append(check())
        except Exception as error:  # every kind is reported
            errors.append(error)
            return False
        return True

    if attempt(lambda: _folder(settings)):
        attempt(lambda: _database(settings))
    attempt(lambda: _address(http))
    if settings.inbox is not None:
        attempt(lambda: _inbox(settings))
    for name, folder in settings.models.items():
        attempt(lambda name=name, folder=folder: _model(settings, name, folder))  # type: ignore[misc]
    return good, errors


def problems_in_words(errors: list[Exception]) -> list[str]:
    """Return one sentence for each error."""
    return [message(error) for error in errors]


def _folder(settings: ServiceSettings) -> str:
    settings.place.create()
    with only_service(settings.place.root):
        free = shutil.disk_usage(settings.place.root).free
    if free < settings.reserve_bytes:
        raise OSError(
            f"{settings.folder}: {free / 1e9:.1f} GB are free, less than the {settings.reserve_bytes / 1e9:g} GB that "
            "uploads leave. Free some space, or give --reserve-gb."
        )
    for parent in (settings.place.root, *settings.place.root.parents):
        if not os.access(parent, os.X_OK):
            raise OSError(f"{parent}: cannot be entered; check its permissions")
    return f"{settings.folder}: writable, not in use, {free / 1e9:.1f} GB free"


def _database(settings: ServiceSettings) -> str:
    database = Database(settings.database_url)
    try:
        found = database.revision()
        if found is None:
            return "database: new; add the first user with: znormseg serve user add NAME --role admin --data FOLDER"
        users = Accounts(database=database, secret=b"").listed()
    finally:
        database.close()
    return (
        f"database: version {found}, {len(users)} users, {sum(role == 'admin' for _, role, _ in users)} of them admins"
    )


def _address(http: HttpSettings) -> str:
    require_usable(http)
    scheme = "http" if http.certificate is None else "https"
    return f"address: {scheme}://{http.host}:{http.port} is free"


def _inbox(settings: ServiceSettings) -> str:
    require_inbox(settings)
    return f"inbox: {settings.inbox} can be read"


def _model(settings: ServiceSettings, name: str, folder: Path) -> str:
    _, runtime = PredictJob(run=folder, output=Path(), device=settings.device).load()
    return f"model {name}: loads on {runtime.device_name}"
