"""The settings, requests and errors of an httpx pool, for `transport` and `transport_async`."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

import httpx

from cortex.sdk.certificates import empty_context, environment_context
from cortex.sdk.endpoint import CONNECT_TIMEOUT_S, Endpoint, ResponseHead
from cortex.sdk.exchange import Request


class Settings(TypedDict):
    """Arguments that `httpx.Client` and `httpx.AsyncClient` share."""

    base_url: str
    headers: dict[str, str]
    trust_env: bool
    proxy: httpx.Proxy | None
    verify: ssl.SSLContext
    limits: httpx.Limits


def settings(endpoint: Endpoint) -> Settings:
    """The settings of a pool of connections to an operator.

    Raises:
        CortexError: the certificates that the environment names cannot be read.
    """
    urls = [endpoint.url, *([endpoint.proxy.url] if endpoint.proxy else [])]
    is_encrypted = any(url.lower().startswith("https:") for url in urls)
    context = environment_context() if is_encrypted else empty_context()
    verify = context or httpx.create_ssl_context(trust_env=False)
    return {
        "base_url": endpoint.url,
        "headers": endpoint.headers,
        # `proxies` and `certificates` read the environment: httpx would raise errors of its own.
        "trust_env": False,
        "proxy": _proxy(endpoint, verify),
        "verify": verify,
        # Shorter than a server's keep-alive (uvicorn: 5 s): the server must not close a connection
        # that the pool is about to use. Connections are unlimited: a request that waited for a free
        # one could wait behind requests that wait for jobs.
        "limits": httpx.Limits(
            max_connections=None, max_keepalive_connections=20, keepalive_expiry=2.0
        ),
    }


def build(request: Request, pool: httpx.Client | httpx.AsyncClient) -> httpx.Request:
    """The request as httpx sends it."""
    return pool.build_request(
        request.method,
        request.path,
        params=request.params,
        headers=request.headers,
        content=request.content,
        data=request.data,
        files=request.files,
        timeout=httpx.Timeout(request.response_timeout_s, connect=CONNECT_TIMEOUT_S),
    )


def head_of(response: httpx.Response) -> ResponseHead:
    """The response without its body."""
    return ResponseHead(
        str(response.request.url),
        response.status_code,
        response.reason_phrase,
        response.headers.get("content-type", ""),
    )


@contextmanager
def translated_errors(endpoint: Endpoint, timeout_s: float) -> Iterator[None]:
    """Raise the errors of httpx as a CortexError.

    Args:
        endpoint: the operator's.
        timeout_s: the response timeout of the request, for the message.
    """
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
        raise endpoint.not_connected(str(error)) from error
    except httpx.TimeoutException as error:
        raise endpoint.timed_out(timeout_s) from error
    except httpx.TransportError as error:
        raise endpoint.disconnected(str(error) or type(error).__name__) from error
    except Exception as error:
        # socksio raises it for a response that is not SOCKS, and httpx lets it through. Importing
        # its class takes longer than a request.
        if type(error).__module__ != "socksio.exceptions":
            raise
        raise endpoint.not_connected(f"the proxy does not speak SOCKS: {error}") from error
    else:
        endpoint.mark_reached()


def _proxy(endpoint: Endpoint, verify: ssl.SSLContext) -> httpx.Proxy | None:
    proxy = endpoint.proxy
    if proxy is None:
        return None
    # A user without a password has an empty one, which httpx sends.
    user = None if proxy.username is None else (proxy.username, proxy.password or "")
    return httpx.Proxy(
        proxy.url, auth=user, ssl_context=verify if proxy.scheme == "https" else None
    )
