"""Requests to every route of the operator's OpenAPI document, and submits."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from urllib.parse import quote

from fuzz import odd_values
from fuzz.raw_http import Case, request

Headers = list[tuple[bytes, bytes]]

METHODS = [
    "GET",
    "POST",
    "DELETE",
    "PUT",
    "PATCH",
    "HEAD",
    "OPTIONS",
    "TRACE",
    "FOO",
    "get",
    "PROPFIND",
    "CONNECT",
]
_OTHER_QUERIES = ["jobID", "wait", "status", "limit", "cursor", "offset", "force", "x", "", "jobid"]
# Valid waits are short: a long poll would delay the run.
_WAITS = ["0", "0.01", "-1", "nan", "inf", "1e400", "3600.1", "", "x", "0,1", "\u0663"]
_STATUSES = ["status_running", "status_succeeded", "status_stopped", "running", "status_unknown"]
_CONTENT_TYPES = [
    b"application/json", b"application/json; charset=utf-8", b"application/json; charset=utf-7",
    b"application/x+json", b"text/plain", b"", b"/", b";", b"application/json, text/plain",
    b"multipart/form-data; boundary=b", b"application/x-www-form-urlencoded", b"APPLICATION/JSON",
]  # fmt: skip
_ODD_HEADERS: list[tuple[bytes, list[bytes]]] = [
    (b"Content-Type", _CONTENT_TYPES),
    (b"Accept", [b"text/event-stream", b"text/html", b"*/*;q=x", b"", b"application/json;q=0"]),
    (b"Range", [
        b"bytes=0-", b"bytes=-1", b"bytes=5-1", b"bytes=0-0,1-1", b"bytes=" + b"9" * 30 + b"-",
        b"bytes=-", b"lines=1-2", b"bytes=0-" + b"9" * 18, b"bytes=\xb2-", b"bytes=" + b"9" * 18 + b"-",
    ]),
    (b"Last-Event-ID", [b"0", b"-1", b"9" * 30, b"9" * 5000, b"9" * 18, b"\xb2", b"x", b"1e9"]),
    (b"Idempotency-Key", [b"", b"a", b"\xff", b"k" * 255, b"k" * 256, b"'", b"\xc3\xa4"]),
    (b"Origin", [b"null", b"http://evil.example", b"http://", b"://", b"\xff", b""]),
    (b"Authorization", [b"Bearer", b"Bearer x", b"Basic eDp5", b"Bearer \xff", b"", b"Bearer  a b"]),
    (b"Expect", [b"100-continue", b"100-Continue", b"200-ok", b""]),
    (b"Upgrade", [b"websocket", b"h2c", b"TLS/1.0"]),
    (b"Connection", [b"Upgrade", b"close", b"keep-alive", b"Upgrade, HTTP2-Settings", b"\xff"]),
    (b"Accept-Encoding", [b"gzip", b"identity;q=0", b"br;q=1.0, *;q=0"]),
    (b"Content-Encoding", [b"gzip", b"br", b"x"]),
    (b"If-None-Match", [b"*", b'"x"', b'W/"']),
    (b"Cookie", [b"a=b", b"=", b";;;", b"session=\xff; cortex=1", b'a="\\999"']),
    (b"X-Forwarded-For", [b"127.0.0.1", b"unknown", b"\xff"]),
    (b"X-Forwarded-Proto", [b"https", b"javascript", b""]),
    (b"Forwarded", [b"for=127.0.0.1;host=[", b"x"]),
    (b"X-HTTP-Method-Override", [b"DELETE"]),
]  # fmt: skip
_LOG_HEADERS = [
    (name, [values[0]] if name == b"Accept" else values)
    for name, values in _ODD_HEADERS
    if name in {b"Accept", b"Range", b"Last-Event-ID"}
]
HOSTS = [
    b"", b"localhost", b"[", b"[::1", b"[::1]:x", b"a:b:c", b"localhost:99999999", b"localhost:-1", b"a/b?c#d",
    b"user:pw@host", b"\xff", b"evil.example", b"localhost:", b"[v1.x]", b"a b", b"xn--", b"a" * 5000, b"%00",
    b"[fe80::1%25eth0]", b"\\", b"//", b"\xe2\x84\x80.example", b"a\tb",
]  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """One method at one path of the OpenAPI."""

    method: str
    path: str
    queries: tuple[str, ...]
    has_body: bool


@dataclass
class World:
    """The operator's address, APIs and jobs; the run adds the jobs that it submits."""

    host: bytes
    headers: Headers
    endpoint: str
    name: str
    operations: list[Operation]
    jobs: deque[str] = field(default_factory=lambda: deque(maxlen=50))


def operations(openapi: dict[str, object]) -> list[Operation]:
    """All operations that an operator describes."""
    paths = openapi["paths"]
    assert isinstance(paths, dict)
    return [
        Operation(
            method.upper(),
            path,
            tuple(p["name"] for p in one.get("parameters", ()) if p["in"] == "query"),
            "requestBody" in one,
        )
        for path, methods in paths.items()
        for method, one in methods.items()
    ]


def route(rng: random.Random, world: World) -> Case:
    """An operation with odd parameters, headers and body, or a method that it does not have."""
    operation = rng.choice(world.operations)
    method = operation.method if rng.random() < 0.8 else rng.choice(METHODS)
    target = _path(rng, world, operation, is_safe=method != "DELETE")
    query = []
    for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
        name = rng.choice(
            [*operation.queries, *operation.queries, *_OTHER_QUERIES, odd_values.word(rng)]
        )
        query.append(f"{_quoted(rng, name)}={_quoted(rng, _query_value(rng, world, name))}")
    if query:
        target += "?" + "&".join(query)
    headers = _headers(rng, world)
    if operation.path.endswith("/logs") and rng.random() < 0.5:
        headers += [(name, rng.choice(values)) for name, values in _LOG_HEADERS]
    body = None
    if operation.has_body or rng.random() < 0.15:
        body = odd_values.submission(rng)
        if operation.path.endswith("/apis"):
            headers.append((b"Content-Type", b"multipart/form-data; boundary=b"))
    return Case(request(method, target, headers, body), method)


def submit(rng: random.Random, world: World) -> Case:
    """A submit with an odd body."""
    target = rng.choice([f"/{world.endpoint}", f"/-/apis/{world.name}/jobs"])
    headers = [(b"Host", world.host), *world.headers]
    if rng.random() < 0.8:
        headers.append((b"Content-Type", b"application/json"))
    if rng.random() < 0.2:
        headers.append((b"Idempotency-Key", odd_values.header_value(rng)))
    if rng.random() < 0.1:
        headers += _odd_headers(rng)
    return Case(request("POST", target, headers, odd_values.submission(rng)), "POST")


def _path(rng: random.Random, world: World, operation: Operation, *, is_safe: bool) -> str:
    parts = []
    for part in operation.path.split("/"):
        if not part.startswith("{"):
            parts.append(part)
        elif rng.random() < 0.4:
            parts.append(_quoted(rng, odd_values.word(rng)))
        elif part == "{endpoint}":
            parts.append(world.endpoint)
        elif part == "{name}":
            # Other requests need the API: none may delete it.
            is_harmless = is_safe or "{job_id}" in operation.path
            parts.append(world.name if is_harmless else "nothing")
        else:
            parts.append(rng.choice(list(world.jobs) or ["x"]))
    if rng.random() < 0.05:
        parts.insert(rng.randrange(1, len(parts) + 1), _quoted(rng, odd_values.word(rng)))
    return "/".join(parts)


def _quoted(rng: random.Random, text: str) -> str:
    """A text escaped for a URL. Half of the texts are escaped only where they would break the
    request line."""
    if rng.random() < 0.5:
        return quote(text, safe="%")
    return "".join(c if "!" <= c <= "~" else quote(c) for c in text)


def _query_value(rng: random.Random, world: World, name: str) -> str:
    if name == "wait":
        return rng.choice(_WAITS)
    if name == "jobID" and rng.random() < 0.5:
        return rng.choice(list(world.jobs) or ["x"])
    if name == "status" and rng.random() < 0.5:
        return rng.choice(_STATUSES)
    return rng.choice(odd_values.NUMBERS) if rng.random() < 0.5 else odd_values.word(rng)


def _headers(rng: random.Random, world: World) -> Headers:
    host = world.host if rng.random() < 0.9 else rng.choice(HOSTS)
    found = [(b"Host", host)]
    if rng.random() < 0.95:
        found += world.headers
    return found + (_odd_headers(rng) if rng.random() < 0.5 else [])


def _odd_headers(rng: random.Random) -> Headers:
    found = []
    for _ in range(rng.choice([1, 1, 2, 5])):
        name, values = rng.choice(_ODD_HEADERS)
        is_odder = rng.random() < 0.25 and name != b"Connection"
        found.append((name, odd_values.header_value(rng) if is_odder else rng.choice(values)))
    return found
