"""Users, passwords, tokens and sessions."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app.errors import ConfigError
from app.service.accounts import SESSION_SECONDS, Account
from app.service.answers import JobRequest
from app.service.service import Service

PASSWORD = "correct horse battery"


def test_a_user_stays_signed_in_for_twelve_hours(service: Service) -> None:
    at = [1000.0]
    service.accounts.now = lambda: at[0]
    cookie = service.accounts.sign_in("ann", PASSWORD)
    assert cookie is not None
    found = service.accounts.by_cookie(cookie)
    assert found is not None
    assert (found.name, found.is_admin) == ("ann", False)
    at[0] += SESSION_SECONDS + 1
    assert service.accounts.by_cookie(cookie) is None


def test_a_new_password_ends_all_sessions(service: Service) -> None:
    cookie = service.accounts.sign_in("ann", PASSWORD)
    assert cookie is not None
    service.accounts.set_password("ann", "another long password")
    assert service.accounts.by_cookie(cookie) is None
    assert service.accounts.sign_in("ann", PASSWORD) is None
    assert service.accounts.sign_in("ann", "another long password") is not None


def test_neither_passwords_nor_tokens_are_in_the_database(service: Service) -> None:
    secret = service.accounts.add_token("ann").rpartition("_")[2]
    cookie = service.accounts.sign_in("ann", PASSWORD)
    assert cookie is not None
    service.database.forget()
    content = b"".join(path.read_bytes() for path in service.settings.place.root.glob("service.db*"))
    assert b"$argon2id$" in content
    for text in (PASSWORD, secret, cookie.partition(".")[0]):
        assert text.encode() not in content


def test_a_token_is_verified_by_argon2_once_and_then_recognised(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, at, verified = service.accounts.add_token("ann"), [1000.0], []
    service.accounts.now = lambda: at[0]
    real = type(service.accounts)._verified
    monkeypatch.setattr(
        type(service.accounts), "_verified", lambda self, *given: (verified.append(1), real(self, *given))[1]
    )
    for seconds in (0, 1, 298, 2, 1):
        at[0] += seconds
        assert service.accounts.by_token(token) is not None
    assert len(verified) == 2


@pytest.mark.parametrize("name", ["", "a b", "../x", "a" * 64, "a\n", "<b>", "ann"])
def test_an_invalid_or_taken_name_is_refused(service: Service, name: str) -> None:
    with pytest.raises(ConfigError, match="user"):
        service.accounts.add(name, PASSWORD, "user")


@pytest.mark.parametrize("password", ["", "short", "x" * 257])
def test_passwords_that_are_too_short_or_too_long_are_refused(service: Service, password: str) -> None:
    with pytest.raises(ConfigError, match="must have 12 to 256"):
        service.accounts.add("new", password, "user")


def test_only_a_user_without_jobs_can_be_removed_and_loses_all_tokens(
    service: Service,
    accounts: dict[str, Account],
    ready_upload: Callable[..., str],
    token: Callable[[str], dict[str, str]],
) -> None:
    service.jobs.submit(accounts["ann"], JobRequest(upload=ready_upload(accounts["ann"])), None)
    with pytest.raises(ConfigError, match="has jobs"):
        service.accounts.remove("ann")
    header = token("ben")["Authorization"].removeprefix("Bearer ")
    service.accounts.remove("ben")
    assert service.accounts.by_token(header) is None


def test_the_list_of_users_counts_tokens(service: Service) -> None:
    service.accounts.add_token("ann")
    assert service.accounts.listed() == [("ann", "user", 1), ("ben", "user", 0), ("eve", "admin", 0)]
