"""Random requests after the OpenAPI document: no fault of the server, no answer outside of the document."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.specs.openapi import checks
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from app.service.accounts import Account
from app.service.answers import JobRequest
from app.service.service import Service

#: Requests for each operation, and each kind of request; with 18 operations, the two tests make more than 2,000.
EXAMPLES = 35
OPERATIONS = 18
MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
PUBLIC = ("/api/v1/health", "/api/v1/ready")

pytestmark = pytest.mark.slow


def test_the_openapi_document_has_examples_and_describes_every_operation(client: TestClient) -> None:
    document = client.get("/api/v1/openapi.json").json()
    operations = [one for path in document["paths"].values() for one in path.values()]
    assert len(operations) == OPERATIONS
    assert all(one["description"] for one in operations)
    assert document["components"]["schemas"]["JobRequest"]["examples"]


@pytest.mark.parametrize("with_token", [True, False], ids=["token", "nobody"])
def test_no_request_makes_the_server_fail_or_violate_its_schema(
    *,
    service: Service,
    site: ASGIApp,
    accounts: dict[str, Account],
    ready_upload: Callable[..., str],
    token: Callable[[str], dict[str, str]],
    with_token: bool,
) -> None:
    ann = accounts["ann"]
    service.jobs.submit(ann, JobRequest(upload=ready_upload(ann, cases=3)), None)
    service.token_failures.most = 10**9
    schema = schemathesis.openapi.from_asgi("/api/v1/openapi.json", site, headers={"Host": "localhost"})
    headers = {"Host": "localhost", **(token("eve") if with_token else {})}
    count = 0

    def check(case: Any) -> None:
        nonlocal count
        count += 1
        path = case.operation.path
        if path.endswith("/events"):
            case.query = {**(case.query or {}), "seconds": 0}
        answer = case.call(headers=headers)
        assert answer.status_code < 500 or path in PUBLIC, (case.operation.label, answer.text)
        if not with_token and path not in PUBLIC:
            assert 400 <= answer.status_code < 500, case.operation.label
        case.validate_response(answer, checks=CHECKS)

    for result, mode in itertools.product(list(schema.get_all_operations()), MODES):
        run = hypothesis.given(case=result.ok().as_strategy(generation_mode=mode))(check)
        try:
            hypothesis.settings(max_examples=EXAMPLES, database=None, derandomize=True)(run)()
        except hypothesis.errors.Unsatisfiable:  # nothing can be wrong about a request without parameters
            assert mode is schemathesis.GenerationMode.NEGATIVE
    assert count >= 1000
