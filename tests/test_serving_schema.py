"""Requests drawn from the server's own OpenAPI description (S2): nothing of it makes a 5xx."""

import pytest
from hypothesis import HealthCheck, settings

from sememe.serving.app import build_app
from sememe.serving.service import Service
from sememe.serving.settings import Settings
from served import running, served_online

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
SCHEMA = schemathesis.openapi.from_dict(build_app(Service(Settings(), "tiny")).app.openapi())


@pytest.fixture(scope="module")
def client():
    with running(served_online()) as (_, client):
        yield client


@SCHEMA.parametrize()
@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_what_the_description_allows_is_answered(case, client):
    response = case.call(base_url=str(client.base_url), timeout=60)
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
