"""Requests that Schemathesis makes from the operator's OpenAPI document: valid and invalid ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from fuzz.raw_http import WAIT_TIMEOUT_S, Answer

Judge = Callable[[Answer, str, bytes], None]


def fuzz_schema(url: str, headers: dict[str, str], cases: int, seed: int, judge: Judge) -> None:
    """Send about `cases` cases, spread over all operations. Call `judge` with every answer, its
    method and its request."""
    schema = schemathesis.openapi.from_url(f"{url}/-/openapi.json", headers=headers)
    found = []
    for result in schema.get_all_operations():
        assert isinstance(result, Ok), result
        found.append(result.ok())
    each = max(1, cases // (2 * len(found)))
    with requests.Session() as session:
        session.trust_env = False
        session.headers.update(headers)
        # Some cases take long to make, and the operator may close an idle connection meanwhile.
        session.headers["Connection"] = "close"
        for operation in found:
            for mode in GenerationMode:
                _send_all(operation, mode, each, seed, session, url, judge)


def _send_all(
    operation: schemathesis.APIOperation[Any, Any, Any, Any],
    mode: GenerationMode,
    cases: int,
    seed: int,
    session: requests.Session,
    url: str,
    judge: Judge,
) -> None:
    @seeded(seed)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case[Any]) -> None:
        if case.operation.method == "delete" and case.operation.path == "/-/apis/{name}":
            case.path_parameters["name"] = "nothing"
        arguments = case.as_transport_kwargs(base_url=url)
        arguments["headers"] = {**arguments.get("headers", {}), **session.headers}
        sent = session.request(**arguments, timeout=WAIT_TIMEOUT_S, allow_redirects=False)
        lowered = {name.lower(): value for name, value in sent.headers.items()}
        judge(
            Answer(sent.status_code, lowered, sent.content),
            case.method.upper(),
            f"{case.method} {sent.url}".encode(),
        )

    # An operation that accepts any input has no invalid cases.
    with contextlib.suppress(Unsatisfiable):
        send()
