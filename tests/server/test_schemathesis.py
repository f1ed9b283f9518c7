"""Property-based requests made from the OpenAPI document: no 5xx, and answers are as the document says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from door import Served, make_info, served
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode, checks

from phloem.client.client import EngineClient
from phloem.core.config import Config
from phloem.server.app import create_app

pytestmark = pytest.mark.slow
EXAMPLES = 20  # requests of each operation
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]


def operations() -> dict[str, Any]:
    app = create_app(EngineClient(None, None, make_info()), Config(), make_info())
    document = schemathesis.openapi.from_dict(app.openapi())
    found = [result.ok() for result in document.get_all_operations()]
    return {operation.label: operation for operation in found}


OPERATIONS = operations()


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as found:
        yield found
        assert found.client.in_flight == 0
        assert found.client.dead is None


def takes_input(operation: Any) -> bool:
    return bool(operation.body) or bool(operation.query) or bool(operation.path_parameters)


@pytest.mark.some(26)
@pytest.mark.parametrize("label", OPERATIONS)
def test_requests_from_the_document(label: str, server: Served) -> None:
    operation = OPERATIONS[label]
    modes = [GenerationMode.POSITIVE]
    if takes_input(operation):
        modes.append(GenerationMode.NEGATIVE)
    cases = st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes])

    @settings(
        max_examples=EXAMPLES if takes_input(operation) else 2,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    @given(cases)
    def check(case: Any) -> None:
        case.call_and_validate(base_url=server.url, checks=CHECKS, timeout=10)

    check()


def test_the_document_names_every_group_of_routes() -> None:
    assert {"POST /v1/chat/completions", "POST /generate", "GET /flush_cache", "POST /v1/tokenize"} <= set(OPERATIONS)
    assert sum(takes_input(operation) for operation in OPERATIONS.values()) >= 10
