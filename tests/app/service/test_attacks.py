"""Attacks on the service: each is refused without a server error.

The attacks on archives are in test_archive.py, those that need a real connection in test_http_server.py.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from app.service.accounts import Account
from app.service.answers import JobRequest
from app.service.service import Service

API = "/api/v1"
PASSWORD = "correct horse battery"
NOBODYS = "0" * 32
Token = Callable[[str], dict[str, str]]


@pytest.fixture
def anns_job(service: Service, accounts: dict[str, Account], ready_upload: Callable[..., str]) -> str:
    """A queued job of ann."""
    upload = ready_upload(accounts["ann"])
    return service.jobs.submit(accounts["ann"], JobRequest(upload=upload), None)[0].id


def signed_in(client: TestClient, name: str = "ann", password: str = PASSWORD) -> Any:
    """Sign in with a browser's form; returns the answer."""
    form = client.get("/sign-in").text
    csrf = re.search(r'name="csrf" value="([^"]+)"', form)
    assert csrf is not None
    return client.post("/sign-in", data={"csrf": csrf[1], "name": name, "password": password})


def csrf_of(client: TestClient) -> str:
    found = re.search(r'<meta name="csrf" content="([^"]+)"', client.get("/jobs").text)
    assert found is not None
    return found[1]


def announced(client: TestClient, header: dict[str, str], size: int = 4, name: str = "a_t1.nii") -> str:
    answer = client.post(f"{API}/uploads", headers=header, json={"files": [{"name": name, "bytes": size}]})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


# ---- permissions

ADDRESSES = [
    ("GET", "/jobs"),
    ("POST", "/jobs"),
    ("GET", f"/jobs/{NOBODYS}"),
    ("DELETE", f"/jobs/{NOBODYS}"),
    ("POST", f"/jobs/{NOBODYS}/cancel"),
    ("POST", f"/jobs/{NOBODYS}/retry"),
    ("GET", f"/jobs/{NOBODYS}/results/label_map"),
    ("POST", "/uploads"),
    ("POST", "/uploads/from-folder"),
    ("GET", f"/uploads/{NOBODYS}"),
    ("PUT", f"/uploads/{NOBODYS}/files/0"),
    ("POST", f"/uploads/{NOBODYS}/complete"),
    ("DELETE", f"/uploads/{NOBODYS}"),
    ("GET", "/models"),
    ("GET", "/events"),
    ("GET", "/metrics"),
]


@pytest.mark.parametrize(("method", "path"), ADDRESSES)
def test_without_a_token_every_request_is_refused(client: TestClient, method: str, path: str) -> None:
    answer = client.request(method, f"{API}{path}", json={} if method == "POST" else None)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "header",
    [
        "Bearer zns_0000000000000000_" + "A" * 43,
        "Bearer zns_' OR 1=1 --",
        "Bearer ",
        "Basic YW5uOnB3",
        "Bearer " + "x" * 5000,
        "Bearer \xfc",
    ],
)
def test_a_forged_token_is_refused(client: TestClient, header: str) -> None:
    answer = client.get(f"{API}/jobs", headers={b"Authorization": header.encode("latin1")})
    assert answer.status_code == 401


def test_a_token_whose_last_character_differs_is_refused(client: TestClient, token: Token) -> None:
    header = token("ann")["Authorization"]
    assert client.get(f"{API}/jobs", headers={"Authorization": header}).status_code == 200
    other = header[:-1] + ("A" if header[-1] != "A" else "B")
    assert client.get(f"{API}/jobs", headers={"Authorization": other}).status_code == 401


def test_a_revoked_token_is_refused_immediately(client: TestClient, token: Token, service: Service) -> None:
    header = token("ann")
    assert client.get(f"{API}/jobs", headers=header).status_code == 200
    service.accounts.revoke_token(header["Authorization"].removeprefix("Bearer "))
    assert client.get(f"{API}/jobs", headers=header).status_code == 401


def test_guessing_tokens_is_slowed_down(client: TestClient) -> None:
    forged = {"Authorization": "Bearer zns_0000000000000000_" + "A" * 43}
    statuses = [client.get(f"{API}/jobs", headers=forged).status_code for _ in range(31)]
    assert statuses == [401] * 30 + [429]


def test_a_valid_token_in_the_url_is_refused(client: TestClient, token: Token) -> None:
    text = token("ann")["Authorization"].removeprefix("Bearer ")
    answer = client.get(f"{API}/jobs?token={text}")
    assert answer.status_code == 400
    assert text not in answer.text


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""),
        ("DELETE", ""),
        ("POST", "/cancel"),
        ("POST", "/retry"),
        ("GET", "/results/label_map"),
        ("GET", "/results/page"),
    ],
)
def test_the_job_of_another_user_looks_nonexistent(
    client: TestClient, token: Token, anns_job: str, method: str, path: str
) -> None:
    answers = [client.request(method, f"{API}/jobs/{job}{path}", headers=token("ben")) for job in (anns_job, NOBODYS)]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert answers[0].json() == answers[1].json()


def test_jobs_of_other_users_are_not_listed(client: TestClient, token: Token, anns_job: str) -> None:
    assert client.get(f"{API}/jobs", headers=token("ben")).json()["jobs"] == []
    assert len(client.get(f"{API}/jobs", headers=token("eve")).json()["jobs"]) == 1


def test_the_upload_of_another_user_cannot_be_read_filled_or_used(client: TestClient, token: Token) -> None:
    upload = announced(client, token("ann"))
    ben = token("ben")
    assert client.get(f"{API}/uploads/{upload}", headers=ben).status_code == 404
    assert client.put(f"{API}/uploads/{upload}/files/0", headers=ben, content=b"1234").status_code == 404
    assert client.post(f"{API}/uploads/{upload}/complete", headers=ben).status_code == 404
    assert client.delete(f"{API}/uploads/{upload}", headers=ben).status_code == 404
    assert client.post(f"{API}/jobs", headers=ben, json={"upload": upload}).status_code == 404


def test_an_ordinary_user_gets_neither_high_priority_nor_metrics(
    client: TestClient, token: Token, accounts: dict[str, Account], ready_upload: Callable[..., str]
) -> None:
    request = {"upload": ready_upload(accounts["ann"]), "priority": "high"}
    assert client.post(f"{API}/jobs", headers=token("ann"), json=request).status_code == 403
    assert client.get(f"{API}/metrics", headers=token("ann")).status_code == 403


# ---- paths and names


@pytest.mark.parametrize(
    "path",
    [
        "/static/../secret.key",
        "/static/%2e%2e%2fsecret.key",
        "/static/..%5csecret.key",
        "/static/service.db",
        "/static//etc/passwd",
        f"/jobs/{NOBODYS}/results/..%2f..%2fservice.db",
        f"{API}/jobs/../../service.db",
        f"{API}/jobs/{NOBODYS}/results/%2e%2e",
        f"{API}/jobs/{'../' * 8}etc/passwd",
    ],
)
def test_no_path_reaches_a_file_of_the_server(client: TestClient, token: Token, path: str) -> None:
    answer = client.get(path, headers=token("eve"))
    assert answer.status_code in (303, 404, 422)
    assert "SQLite" not in answer.text
    assert "root:" not in answer.text


@pytest.mark.parametrize("name", ["../../evil_t1.nii", "/etc/cron.d/evil_t1.nii", "..\\evil_t1.nii", ".ssh/id_t1.nii"])
def test_a_name_is_never_used_as_a_path(client: TestClient, token: Token, service: Service, name: str) -> None:
    upload = announced(client, header := token("ann"), name=name)
    assert client.put(f"{API}/uploads/{upload}/files/0", headers=header, content=b"1234").status_code == 204
    root = service.settings.place.root
    written = [path for path in root.rglob("*") if path.is_file() and path.read_bytes() == b"1234"]
    assert written == [service.settings.place.received(upload) / "00000"]


@pytest.mark.parametrize("name", ["a\0_t1.nii", "a\n_t1.nii", "a\x1b[31m_t1.nii", "", "x" * 1025, "\u202etxt_t1.nii"])
def test_a_name_with_control_characters_or_excessive_length_is_refused(
    client: TestClient, token: Token, name: str
) -> None:
    answer = client.post(f"{API}/uploads", headers=token("ann"), json={"files": [{"name": name, "bytes": 1}]})
    assert answer.status_code == 422


def test_a_name_that_is_not_valid_unicode_is_refused(client: TestClient, token: Token) -> None:
    body = b'{"files": [{"name": "\\ud800_t1.nii", "bytes": 1}]}'
    answer = client.post(f"{API}/uploads", headers={**token("ann"), "Content-Type": "application/json"}, content=body)
    assert answer.status_code == 422


@pytest.mark.parametrize("folder", ["..", "../..", "/etc", "a/../..", "link"])
def test_a_folder_outside_the_inbox_is_refused(
    client: TestClient, token: Token, service: Service, tmp_path: Path, folder: str
) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    (inbox / "link").symlink_to("/etc")
    object.__setattr__(service.settings, "inbox", inbox)
    answer = client.post(f"{API}/uploads/from-folder", headers=token("ann"), json={"folder": folder})
    assert answer.status_code in (404, 422)


def test_without_an_inbox_no_folder_is_read(client: TestClient, token: Token) -> None:
    answer = client.post(f"{API}/uploads/from-folder", headers=token("eve"), json={"folder": "etc"})
    assert answer.status_code == 403


# ---- the database and HTML


@pytest.mark.parametrize("text", ["' OR '1'='1", "1; DROP TABLE jobs", "0 UNION SELECT password FROM users", "%", "-1"])
@pytest.mark.parametrize("place", ["after", "state", "limit"])
def test_sql_in_a_query_is_only_an_invalid_value(client: TestClient, token: Token, text: str, place: str) -> None:
    assert client.get(f"{API}/jobs", headers=token("ann"), params={place: text}).status_code == 422


@pytest.mark.parametrize("name", ["' OR '1'='1", "ann'--", "ann\0", "ANN"])
def test_sql_in_the_sign_in_form_is_only_a_wrong_name(client: TestClient, name: str) -> None:
    assert signed_in(client, name=name).status_code == 403


def test_html_in_a_name_is_shown_as_text(
    client: TestClient, service: Service, accounts: dict[str, Account], ready_upload: Callable[..., str]
) -> None:
    upload = ready_upload(accounts["ann"], name="<script>alert(1)</script>")
    job = service.jobs.submit(accounts["ann"], JobRequest(upload=upload), None)[0].id
    signed_in(client)
    for path in ("/jobs", f"/jobs/{job}"):
        text = client.get(path).text
        assert "<script>alert(1)" not in text
        assert "&lt;script&gt;alert(1)" in text


def test_a_name_with_a_line_break_cannot_add_a_header_to_a_download() -> None:
    from urllib.parse import quote

    assert quote("a\r\nSet-Cookie: b", safe="") == "a%0D%0ASet-Cookie%3A%20b"


# ---- sessions and forms


def test_a_wrong_password_and_an_unknown_name_get_the_same_response(client: TestClient) -> None:
    wrong, unknown = signed_in(client, password="wrong horse battery"), signed_in(client, name="nobody")
    assert (wrong.status_code, unknown.status_code) == (403, 403)
    plain = [re.sub(r'value="[^"]+"', "", answer.text) for answer in (wrong, unknown)]
    assert plain[0] == plain[1]


def test_guessing_a_password_is_slowed_down_even_with_the_right_one(client: TestClient) -> None:
    for _ in range(5):
        assert signed_in(client, password="wrong horse battery").status_code == 403
    answer = signed_in(client)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0


def test_attempts_with_impossible_names_are_not_stored(client: TestClient, service: Service) -> None:
    for number in range(3):
        assert signed_in(client, name=f"{number} " * 1000).status_code == 403
    assert list(service.name_failures._seen) == [""]


def test_an_attempt_counts_before_its_password_is_verified_and_a_success_does_not(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, verify = [], service.accounts.sign_in

    def sign_in(name: str, password: str) -> str | None:
        counted.append(len(service.name_failures._seen) + len(service.address_failures._seen))
        return verify(name, password)

    monkeypatch.setattr(service.accounts, "sign_in", sign_in)
    assert signed_in(client).status_code == 303
    assert counted == [2]
    assert service.name_failures._seen == service.address_failures._seen == {}


def test_a_page_does_not_look_up_the_user_while_the_database_is_down(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(cookie: str) -> None:
        raise OperationalError(cookie, {}, Exception("away"))

    monkeypatch.setattr(service.accounts, "by_cookie", away)
    assert client.get("/jobs", headers={"Cookie": "znormseg=a"}).status_code == 503


def test_the_cookie_is_inaccessible_to_scripts_and_other_sites(client: TestClient) -> None:
    cookie = signed_in(client).headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie


@pytest.mark.parametrize("cookie", ["", "x", "x.y", "." * 100, "a.0000000000000000000000000000000000000000"])
def test_a_forged_cookie_identifies_nobody(client: TestClient, cookie: str) -> None:
    assert client.get("/jobs", headers={"Cookie": f"znormseg={cookie}"}).headers["location"] == "/sign-in"


def test_a_cookie_signed_for_the_form_is_not_a_session(client: TestClient, service: Service) -> None:
    cookie = service.accounts.signed("anything")
    assert client.get("/jobs", headers={"Cookie": f"znormseg={cookie}"}).status_code == 303


def test_after_signing_out_the_old_cookie_is_invalid(client: TestClient) -> None:
    cookie = signed_in(client).headers["set-cookie"].partition(";")[0]
    client.post("/sign-out", data={"csrf": csrf_of(client)})
    assert client.get("/jobs", headers={"Cookie": cookie}).headers["location"] == "/sign-in"


@pytest.mark.parametrize("action", ["cancel", "retry", "delete"])
def test_a_form_without_the_secret_of_the_session_changes_nothing(
    client: TestClient, anns_job: str, action: str
) -> None:
    signed_in(client)
    assert client.post(f"/jobs/{anns_job}/{action}", data={"csrf": "guessed"}).status_code == 403
    assert client.get(f"{API}/jobs/{anns_job}").json()["state"] == "queued"


@pytest.mark.parametrize(
    "header",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Origin": "ftp://localhost"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
def test_a_form_from_another_site_changes_nothing_even_with_the_secret(
    client: TestClient, anns_job: str, header: dict[str, str]
) -> None:
    signed_in(client)
    answer = client.post(f"/jobs/{anns_job}/delete", data={"csrf": csrf_of(client)}, headers=header)
    assert answer.status_code == 403


def test_a_script_without_the_secret_cannot_use_the_api_with_a_cookie(client: TestClient, anns_job: str) -> None:
    signed_in(client)
    assert client.delete(f"{API}/jobs/{anns_job}").status_code == 403
    secret = {"X-CSRF-Token": csrf_of(client)}
    assert client.delete(f"{API}/jobs/{anns_job}", headers=secret).status_code == 204


def test_signing_in_needs_the_form_of_this_browser(client: TestClient) -> None:
    answer = client.post("/sign-in", data={"csrf": "x", "name": "ann", "password": PASSWORD})
    assert answer.status_code == 403
    assert client.get("/jobs").status_code == 303


# ---- headers, sizes


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "127.0.0.1.nip.io", "a b"])
def test_another_host_name_is_refused(client: TestClient, host: str) -> None:
    assert client.get("/sign-in", headers={"Host": host}).status_code == 421


def test_forwarded_headers_from_untrusted_hosts_are_ignored(client: TestClient) -> None:
    headers = {"X-Forwarded-For": "10.0.0.1", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "evil.example"}
    answer = client.get("/sign-in", headers=headers)
    assert "evil.example" not in answer.text
    assert "strict-transport-security" not in answer.headers


def test_every_response_forbids_framing_sniffing_and_other_hosts(client: TestClient) -> None:
    for path in ("/sign-in", "/nowhere", f"{API}/jobs", "/static/service.js"):
        headers = client.get(path).headers
        assert headers["x-frame-options"] == "DENY"
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]


def test_a_request_that_is_too_large_is_refused_before_it_is_read(client: TestClient, token: Token) -> None:
    answer = client.post(f"{API}/jobs", headers=token("ann"), content=b"x" * (4 << 20 | 1))
    assert answer.status_code == 413


def test_a_request_that_hides_its_size_is_cut_off(client: TestClient, token: Token) -> None:
    parts = (b"x" * 65536 for _ in range(80))
    assert client.post(f"{API}/jobs", headers=token("ann"), content=parts).status_code in (400, 408, 413)


def test_a_file_that_is_larger_than_announced_is_refused(client: TestClient, token: Token, service: Service) -> None:
    upload = announced(client, header := token("ann"), size=4)
    answer = client.put(f"{API}/uploads/{upload}/files/0", headers=header, content=b"12345")
    assert answer.status_code == 413
    assert list(service.settings.place.received(upload).iterdir()) == []


def test_an_upload_above_the_limit_is_refused_before_it_is_sent(client: TestClient, token: Token) -> None:
    request = {"files": [{"name": "a_t1.nii", "bytes": 10**13}]}
    assert client.post(f"{API}/uploads", headers=token("ann"), json=request).status_code == 413


def test_deeply_nested_json_is_refused(client: TestClient, token: Token) -> None:
    headers = {**token("ann"), "Content-Type": "application/json"}
    answer = client.post(f"{API}/jobs", headers=headers, content=b"[" * 200_000)
    assert answer.status_code in (400, 422)


def test_unknown_fields_and_values_of_the_wrong_type_are_refused(client: TestClient, token: Token) -> None:
    for request in ({"upload": NOBODYS, "owner": "eve"}, {"upload": NOBODYS, "options": {"tta": "yes"}}):
        assert client.post(f"{API}/jobs", headers=token("ann"), json=request).status_code == 422


# ---- uploads that are not images


class Trap:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/znormseg-unpickled"),))


@pytest.mark.parametrize(
    "content",
    [pickle.dumps(Trap()), b"\x93NUMPY\x01\x00", b"#!/bin/sh\nid\n", b"%PDF-1.7", b"\x1f\x8b" + b"\0" * 30],
    ids=["pickle", "npy", "script", "pdf", "damaged gzip"],
)
def test_a_file_that_is_not_an_image_is_refused_and_never_executed(
    client: TestClient, token: Token, content: bytes
) -> None:
    upload = announced(client, header := token("ann"), size=len(content), name="a_t1.nii.gz")
    client.put(f"{API}/uploads/{upload}/files/0", headers=header, content=content)
    answer = client.post(f"{API}/uploads/{upload}/complete", headers=header).json()
    assert answer["state"] == "refused" or answer["cases"][0]["problems"]
    assert not Path("/tmp/znormseg-unpickled").exists()
    if answer["state"] == "ready":
        assert client.post(f"{API}/jobs", headers=header, json={"upload": upload}).status_code == 422
