"""Start the service, and check beforehand whether it can start."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from app.errors import ConfigError, RunError
from app.progress import LOG
from app.service.http_server import HttpSettings, run_http
from app.service.service import create_service
from app.service.settings import ServiceSettings
from app.service.site import create_site
from data.files import naming_the_place
from data.filesystem import has_no_locks, lock, warn_once

_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
#: Addresses that stand for all of the machine.
WILDCARDS: Final = ("0.0.0.0", "::")  # noqa: S104 - only compared with


def serve(settings: ServiceSettings, http: HttpSettings, *, on_start: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; running jobs then finish within the grace period or are queued again.

    Args:
        settings: the service.
        http: where to listen.
        on_start: called with the address once requests are answered.

    Raises:
        RunError: another service uses the data folder or the database, a newer program made the database, or a model's
            folder does not exist.
        ConfigError: as raised by :func:`require_usable` and :func:`~app.service.service.create_service`.
        OSError: the data folder cannot be written to, or the address is in use.
    """
    os.umask(0o077)
    require_usable(http)
    require_models(settings)
    if http.host not in _LOOPBACK and http.certificate is None and http.proxy is None:
        LOG.warning(
            "%s: passwords and images travel unencrypted; use --tls-cert and --tls-key, or a proxy that speaks TLS",
            http.host,
        )
    if http.host in WILDCARDS and not settings.names:
        LOG.warning(
            "%s: requests from other machines are refused until --name gives the host name in their addresses",
            http.host,
        )
    with naming_the_place(settings.folder):
        settings.place.create()
    with only_service(settings.place.root):
        service = create_service(settings)
        site = create_site(service)
        scheme = "http" if http.certificate is None else "https"
        service.start()
        try:
            run_http(
                site,
                http,
                on_start=lambda port: on_start(f"{scheme}://{http.host}:{port}"),
                on_stop=service.stopping.set,
            )
        finally:
            service.stop()


@contextmanager
def only_service(folder: Path) -> Iterator[None]:
    """Hold the lock of a data folder; the system releases it when the process ends, however it ends.

    Raises:
        RunError: another service holds it.
    """
    with (folder / ".lock").open("a", encoding="utf-8") as file:
        try:
            lock(file, folder)
        except BlockingIOError:
            raise RunError(f"{folder}: another service uses this folder. Stop it, or give another folder.") from None
        except OSError as error:
            if not has_no_locks(error):
                raise
            warn_once(folder, "lock files", error, "Make sure that no second service uses this folder.")
        yield


def require_models(settings: ServiceSettings) -> None:
    """Check that the folders of the models exist; only workers load them, and a service without any serves nobody.

    Raises:
        RunError: one does not exist.
    """
    for folder in settings.models.values():
        if not folder.is_dir():
            raise RunError(f"--model {folder}: does not exist; give the folder of a run or of an ensemble")


def require_usable(http: HttpSettings) -> None:
    """Check certificate and address before anything is created.

    Raises:
        ConfigError: only one of certificate and key is given, one cannot be read, or they do not belong together.
        OSError: the address cannot be used.
    """
    if (http.certificate is None) != (http.key is None):
        raise ConfigError("--tls-cert and --tls-key are needed together")
    for path in (http.certificate, http.key):
        if path is not None and not os.access(path, os.R_OK):
            raise ConfigError(f"{path}: cannot be read; give the PEM files of the certificate and its key")
    if http.certificate is not None:
        try:
            # Without a password, OpenSSL would ask for that of an encrypted key.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(http.certificate, http.key, password="")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{http.certificate}, {http.key}: not a certificate and its key; give PEM files that belong together, "
                "and a key without a password"
            ) from error
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((http.host, http.port))
        except OSError as error:
            raise OSError(
                f"{http.host}:{http.port}: cannot listen there: {error.strerror}. Give another --host or --port."
            ) from error
