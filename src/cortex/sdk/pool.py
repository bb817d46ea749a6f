"""Connections of httpx to one operator: what both transports over httpx share."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

import httpx

from cortex.sdk.certificates import trusted, unused
from cortex.sdk.endpoint import CONNECT_S, Answer, Endpoint
from cortex.sdk.exchange import Request


class Settings(TypedDict):
    """Those of a pool of connections, which `httpx.Client` and `httpx.AsyncClient` take."""

    base_url: str
    headers: dict[str, str]
    trust_env: bool
    proxy: httpx.Proxy | None
    verify: ssl.SSLContext
    limits: httpx.Limits


def settings(endpoint: Endpoint) -> Settings:
    """How connections to it are made.

    Raises:
        CortexError: the certificates that the environment names cannot be read.
    """
    urls = [endpoint.url, *([endpoint.proxy.url] if endpoint.proxy else [])]
    is_encrypted = any(url.lower().startswith("https:") for url in urls)
    authorities = trusted() if is_encrypted else unused()
    verify = authorities or httpx.create_ssl_context(trust_env=False)
    return {
        "base_url": endpoint.url,
        "headers": endpoint.headers,
        # The environment's proxies and certificates are read here: httpx raises what is no CortexError.
        "trust_env": False,
        "proxy": _proxy(endpoint, verify),
        "verify": verify,
        # Kept shorter than a server's own (uvicorn: 5 s), else a request can meet a closing connection.
        # As many as are asked for: who waits for one here may wait behind those that wait for jobs.
        "limits": httpx.Limits(
            max_connections=None, max_keepalive_connections=20, keepalive_expiry=2.0
        ),
    }


def built(request: Request, pool: httpx.Client | httpx.AsyncClient) -> httpx.Request:
    """A request as it is sent over a pool of connections."""
    return pool.build_request(
        request.method,
        request.path,
        params=request.params,
        headers=request.headers,
        content=request.content,
        data=request.data,
        files=request.files,
        timeout=httpx.Timeout(request.answer_s, connect=CONNECT_S),
    )


def answer(response: httpx.Response) -> Answer:
    """What a response says before its body."""
    return Answer(
        str(response.request.url),
        response.status_code,
        response.reason_phrase,
        response.headers.get("content-type", ""),
    )


@contextmanager
def reporting(endpoint: Endpoint, answer_s: float) -> Iterator[None]:
    """Raise what a connection says as an error of this tree."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
        raise endpoint.unreachable(str(error)) from error
    except httpx.TimeoutException as error:
        raise endpoint.unanswered(answer_s) from error
    except httpx.TransportError as error:
        raise endpoint.broken(str(error) or type(error).__name__) from error
    except Exception as error:
        # What a proxy answers that speaks no SOCKS. To import its class takes longer than a request.
        if type(error).__module__ != "socksio.exceptions":
            raise
        raise endpoint.unreachable(f"the proxy speaks no SOCKS: {error}") from error
    else:
        endpoint.answered()


def _proxy(endpoint: Endpoint, verify: ssl.SSLContext) -> httpx.Proxy | None:
    found = endpoint.proxy
    if found is None:
        return None
    # An empty password is one that the proxy is sent.
    user = None if found.username is None else (found.username, found.password or "")
    return httpx.Proxy(
        found.url, auth=user, ssl_context=verify if found.scheme == "https" else None
    )
