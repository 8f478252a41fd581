"""Problems that would keep the service from starting or working are reported before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from app.cli.serve import _names
from app.errors import ConfigError, RunError, message
from app.service.check import check_service
from app.service.database import Database
from app.service.http_server import HttpSettings
from app.service.serve import require_models, require_usable
from app.service.settings import ServiceSettings


def test_files_that_are_not_a_certificate_and_key_are_refused(tmp_path: Path) -> None:
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).write_text("x")
    with pytest.raises(ConfigError, match="not a certificate and its key"):
        require_usable(HttpSettings(port=0, certificate=tmp_path / "cert.pem", key=tmp_path / "key.pem"))


@pytest.mark.parametrize("url", ["postgres+psycop://a:secret@b/c", "service.db", "postgresql+psycopg://a:secret@b:x/c"])
def test_an_invalid_database_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ConfigError, match=r"postgresql\+psycopg://USER:PASSWORD@HOST/NAME") as error:
        Database(url)
    assert "secret" not in str(error.value)


def test_a_missing_inbox_is_reported(settings: ServiceSettings, tmp_path: Path) -> None:
    changed = replace(settings, models={}, inbox=tmp_path / "nowhere")
    good, errors = check_service(changed, HttpSettings(port=0))
    assert len(good) == 3
    assert [message(error)[:7] for error in errors] == ["--inbox"]


@pytest.mark.parametrize(
    ("host", "names"), [("10.0.0.5", ("10.0.0.5", "a.org")), ("0.0.0.0", ("a.org",)), ("::", ("a.org",))]
)
def test_the_listening_address_answers(host: str, names: tuple[str, ...]) -> None:
    assert _names(host, ["a.org"]) == names


def test_a_missing_model_folder_is_refused_before_the_start(settings: ServiceSettings) -> None:
    with pytest.raises(RunError, match="run: does not exist"):
        require_models(settings)
