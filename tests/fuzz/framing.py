"""Requests that no client would send: odd bytes, lengths, chunks, targets, and early disconnects."""

from __future__ import annotations

import random
from collections.abc import Callable

from fuzz import odd_values
from fuzz.raw_http import Case, request
from fuzz.routes import HOSTS, METHODS, World


def framing(rng: random.Random, world: World) -> Case:
    """A request with odd bytes."""
    return rng.choice(_FRAMINGS)(rng, world)


_Framing = Callable[[random.Random, World], Case]


def _valid_request(rng: random.Random, world: World) -> bytes:
    body = odd_values.submission(rng)
    if len(body) > 5000:
        body = b"{}"
    headers = [(b"Host", world.host), *world.headers, (b"Content-Type", b"application/json")]
    return request("POST", f"/{world.endpoint}", headers, body)


def _mutated_request(rng: random.Random, world: World) -> Case:
    sent = odd_values.mutated(rng, _valid_request(rng, world))
    return Case(sent, "POST", fresh=True, then="shut", may_close=True)


def _noise(rng: random.Random, world: World) -> Case:
    sent = rng.choice([
        rng.randbytes(rng.randrange(1, 300)), b"\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\nA" + b"a" * 100_000, b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000 + b"\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n b: c\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", b"GET / HTTP/1.1\nHost: a\n\n", b"GET / HTTP/1.1\r\n: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET \xff HTTP/1.1\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n", b"GET / HTTP/1.1\r\nHost: \x00\r\n\r\n", b" GET / HTTP/1.1\r\n\r\n",
    ])  # fmt: skip
    return Case(sent, fresh=True, then="shut", may_close=True)


def _lengths(rng: random.Random, world: World) -> Case:
    head = _head(world)
    length = rng.choice([
        b"Content-Length: -1", b"Content-Length: x", b"Content-Length: 1e1", b"Content-Length: " + b"9" * 18,
        b"Content-Length: " + b"9" * 30, b"Content-Length: " + b"9" * 5000, b"Content-Length: 2\r\nContent-Length: 3",
        b"Content-Length: 2, 2", b"Content-Length: +2", b"Content-Length: 0x2", b"Content-Length:",
        b"Content-Length: 2\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: identity", b"Transfer-Encoding: chunked, chunked", b"Transfer-Encoding: xchunked",
        b"Content-Length: 11000000", b"Content-Length: 100", b"Content-Length: 1", b"Content-Length: 0",
    ])  # fmt: skip
    return Case(head + length + b"\r\n\r\n{}", "POST", fresh=True, then="shut", may_close=True)


def _head(world: World) -> bytes:
    own = b"".join(name + b": " + value + b"\r\n" for name, value in world.headers)
    return b"POST /%s HTTP/1.1\r\nHost: %s\r\n%s" % (world.endpoint.encode(), world.host, own)


def _chunked(rng: random.Random, world: World) -> Case:
    """Valid chunks of any size, with extensions: the operator answers them."""
    body = rng.choice(odd_values.VALID)
    chunks = b""
    while body:
        size = rng.randrange(1, len(body) + 1)
        shown = rng.choice([b"%x", b"%X", b"0%x", b'%x;a="b"', b"%x;x"]) % size
        chunks += shown + b"\r\n" + body[:size] + b"\r\n"
        body = body[size:]
    chunks += b"0\r\n" + rng.choice([b"", b"X-Trailer: 1\r\n"]) + b"\r\n"
    expect = rng.choice([b"", b"Expect: 100-continue\r\n"])
    sent = _head(world) + expect + b"Transfer-Encoding: chunked\r\n\r\n" + chunks
    return Case(sent, "POST", fresh=True)


def _broken_chunks(rng: random.Random, world: World) -> Case:
    chunks = rng.choice([
        b"2\r\n{}\r\n", b"-2\r\n{}\r\n0\r\n\r\n", b"2\r\n{}0\r\n\r\n", b"g\r\n{}", b"ffffffffffffffffffff\r\n{}",
        b"\r\n\r\n", b"2;" + b"a" * 70_000, b"0\r\n" + b"X: y\r\n" * 15_000 + b"\r\n", b"2\n{}\n0\n\n", b"0x2\r\n{}\r\n",
        b"2\r\n{}\r\n0\r\nContent-Length: 5\r\n\r\n", b"1\r\n{\r\n" * 10, b"\xff",
    ])  # fmt: skip
    sent = _head(world) + b"Transfer-Encoding: chunked\r\n\r\n" + chunks
    return Case(sent, "POST", fresh=True, then="shut", may_close=True)


def _targets(rng: random.Random, world: World) -> Case:
    """A valid request with an odd target: the operator answers it."""
    target = rng.choice([
        b"*", b"http://%s/%s" % (world.host, world.endpoint.encode()), b"http://[/", b"localhost:80", b"//",
        b"///", b"//evil.example/x", b"/%s//x" % world.endpoint.encode(), b"/./%s" % world.endpoint.encode(), b"?",
        b"/?", b"/#x", b"/%", b"/%2", b"/%00", b"/" + b"%2e" * 9000, b"/" + b"a" * 30_000, b"/" + b"a/" * 9000,
        b"/?" + b"a&" * 9000, b"/-/apis?" + b"jobID=" + b"a" * 30_000, b"/-/apis/%2e%2e/info", b"/-/../healthz",
        b"\\", b"/\\..\\", b"/healthz;x=y", b"/healthz/", b"/-/openapi.json/", b"/-", b"/-/", b"/[::1]", b"http:",
    ])  # fmt: skip
    method = rng.choice(METHODS)
    headers = [(b"Host", rng.choice([world.host, *HOSTS[:6]])), *world.headers]
    # The operator may close a CONNECT unanswered: its answer would have no end of its own.
    return Case(request(method, target, headers), method, fresh=True, may_close=method == "CONNECT")


def _http_1_0(rng: random.Random, world: World) -> Case:
    sent = _valid_request(rng, world).replace(b" HTTP/1.1", b" HTTP/1.0", 1)
    if rng.random() < 0.5:
        sent = sent.replace(b"Host: " + world.host + b"\r\n", b"", 1)
    if rng.random() < 0.3:
        sent = sent.replace(b"\r\n", b"\r\nConnection: keep-alive\r\n", 1)
    return Case(sent, "POST", fresh=True)


def _pipelined(rng: random.Random, world: World) -> Case:
    count = rng.randrange(2, 6)
    return Case(
        b"".join(_valid_request(rng, world) for _ in range(count)),
        "POST",
        fresh=True,
        answers=count,
    )


def _disconnecting(rng: random.Random, world: World) -> Case:
    """A client that disconnects in the middle of its request, or during the answer."""
    polled = f"/{world.endpoint}/{rng.choice(list(world.jobs) or ['x'])}"
    sent = rng.choice([
        _valid_request(rng, world),
        request("GET", f"{polled}?wait=1", [(b"Host", world.host), *world.headers]),
        request("GET", f"{polled}/logs", [(b"Host", world.host), (b"Accept", b"text/event-stream"), *world.headers]),
        _head(world) + b"Content-Length: 100\r\n\r\n{",
        _head(world).replace(b"/" + world.endpoint.encode(), b"/-/apis", 1)
        + b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 1000\r\n\r\n--b\r\n"
        b'Content-Disposition: form-data; name="config"; filename="c"\r\n\r\nx',
    ])  # fmt: skip
    cut = sent if rng.random() < 0.5 else sent[: rng.randrange(1, len(sent))]
    return Case(cut, fresh=True, then=rng.choice(["leave", "reset", "shut"]), may_close=True)


_FRAMINGS: list[_Framing] = [
    _mutated_request, _mutated_request, _noise, _lengths, _chunked, _broken_chunks, _targets, _targets, _http_1_0,
    _pipelined, _disconnecting,
]  # fmt: skip
