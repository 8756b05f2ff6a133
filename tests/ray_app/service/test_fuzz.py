"""A fuzzer of the OpenAPI finds no answer that is not of the contract."""

from collections.abc import Iterator

import pytest
import schemathesis
from fastapi.testclient import TestClient
from httpx2 import Response
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from ray_app.service.app import create_app
from ray_app.service.settings import ServiceSettings
from service_parts import TOKEN, FakeRunner

_CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
_EXAMPLES = 12
_EXAMPLES_OF_LONG_FORM = 400


@pytest.fixture(scope="module")
def quick_client(service_settings: ServiceSettings) -> Iterator[TestClient]:
    """A client of the application, with a time limit that lets a fuzzer go on."""
    app = create_app(service_settings.model_copy(update={"max_seconds": 2}), FakeRunner())
    # What a route fails with is an answer here, not an error of the test.
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def send(client: TestClient, case: schemathesis.Case) -> Response:
    sent = case.as_transport_kwargs(base_url="http://testserver")
    headers = {**sent.get("headers", {}), "Authorization": f"Bearer {TOKEN}"}
    body = {"json": sent["json"]} if "json" in sent else {"content": sent.get("data")}
    return client.request(
        sent["method"], sent["url"], params=sent.get("params"), headers=headers, **body
    )


def test_the_fuzzer_finds_no_failure_of_the_service(
    quick_client: TestClient, long_form: bool
) -> None:
    document = quick_client.get(
        "/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}
    ).json()
    seen: dict[str, set[int]] = {}
    for result in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=_EXAMPLES_OF_LONG_FORM if long_form else _EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def fuzz(case: schemathesis.Case) -> None:
            answer = send(quick_client, case)
            assert answer.status_code < 500, answer.text
            case.validate_response(answer, checks=_CHECKS)
            seen.setdefault(case.operation.label, set()).add(answer.status_code)

        fuzz()
    assert len(seen) >= 12
    assert 200 in seen["GET /api/runs"]
    assert seen["POST /api/sql"] - {200}
