"""The environment's proxy for an operator's URL, by the rules of curl, requests and Go.

Standard library alone: a task's client uses it in the user's environment.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, getproxies_environment, proxy_bypass

from cortex.errors import CortexError

_SCHEMES = ("http", "https", "socks5", "socks5h")
_DEFAULT_PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080}


@dataclass(frozen=True)
class Proxy:
    """A proxy, with the credentials to send to it."""

    scheme: str
    host: str
    port: int
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """The proxy's URL, without the credentials."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def proxy_of(url: str) -> Proxy | None:
    """The proxy to use for a URL; None for a direct connection.

    Raises:
        CortexError: the environment names an invalid proxy.
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    if is_this_machine(host):
        return None
    values = {name: value.strip() for name, value in getproxies().items()}
    kind = next((kind for kind in (parts.scheme, "all") if values.get(kind)), None)
    port = parts.port or _DEFAULT_PORTS[parts.scheme]
    if kind is None or _is_exempt(host, port, values.get("no", "")):
        return None
    return _parse_proxy(values[kind], kind)


def is_this_machine(host: str) -> bool:
    """Whether a host is this machine, which no proxy can reach."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    address = _address(host)
    # A connection to 0.0.0.0 or [::] reaches this machine.
    return address is not None and (address.is_loopback or address.is_unspecified)


def _is_exempt(host: str, port: int, no_proxy: str) -> bool:
    # Without variables, macOS and Windows have exemptions of their own.
    if not getproxies_environment() and proxy_bypass(host):
        return True
    return any(_matches(entry, host, port) for entry in re.split(r"[,\s]+", no_proxy.lower()))


def _matches(entry: str, host: str, port: int) -> bool:
    """Whether an entry of NO_PROXY (a name, address, domain, network, or *) covers a host."""
    if entry in ("", "*"):
        return entry == "*"
    address = _address(host)
    if "/" in entry:
        try:
            return address is not None and address in ip_network(
                re.sub(r"[\[\]]", "", entry), strict=False
            )
        except ValueError:
            return False
    name, entry_port = _host_and_port(entry)
    if entry_port is not None and entry_port != port:
        return False
    if address is not None:
        return _address(name) == address
    domain = name.removeprefix("*").strip(".")
    return bool(domain) and (host == domain or host.endswith(f".{domain}"))


def _host_and_port(entry: str) -> tuple[str, int | None]:
    if _address(entry) is not None:  # an IPv6 address has no brackets here, and no port
        return entry, None
    match = re.fullmatch(r"\[?(.*?)\]?(?::(\d{1,5}))?", entry)
    assert match is not None  # the pattern matches every text of one line
    return match[1], int(match[2]) if match[2] else None


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _parse_proxy(value: str, kind: str) -> Proxy:
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _invalid_proxy(value, kind, str(error)) from error
    if parts.scheme not in _SCHEMES:
        raise _invalid_proxy(
            value, kind, f"{parts.scheme}:// is not supported; use {', '.join(_SCHEMES)}"
        )
    if not host or re.search(r"\s", value):
        raise _invalid_proxy(value, kind, "it has no host")
    return Proxy(
        parts.scheme,
        host,
        port or _DEFAULT_PORTS[parts.scheme],
        None if parts.username is None else unquote(parts.username),
        None if parts.password is None else unquote(parts.password),
    )


def _invalid_proxy(value: str, kind: str, why: str) -> CortexError:
    # The part before the @ has the password.
    shown = value.rpartition("@")[2]
    return CortexError(
        f"{_variable(kind)} names an invalid proxy {shown!r}: {why}. Write it as in "
        "http://proxy.lan:3128, or list the operator's host in NO_PROXY",
        kind="client.proxy",
    )


def _variable(kind: str) -> str:
    names = (f"{kind}_proxy", f"{kind}_proxy".upper())
    return next((f"${name}" for name in names if os.environ.get(name, "").strip()), "the system")
