"""The host names under which an operator without tokens answers. Called by the gate.

The check protects against DNS rebinding: an attacker points the name of their page at this machine.
The browser then sends that name as `Host`, with an `Origin` that agrees, and lets the page read the
answers. Only the name distinguishes such a page from a page of this operator.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from functools import lru_cache
from urllib.parse import urlsplit

from cortex.errors import ForeignHost
from cortex.operator.config.hosts import HOST
from cortex.operator.config.settings import Settings

_LOOPBACK = "localhost"


class AllowedHosts:
    """The hosts that requests to one operator may name."""

    def __init__(self, own: Iterable[str], allowed: Iterable[str] = ()) -> None:
        """
        Args:
            own: names that are allowed with any port: a forwarded port (ssh, containers) differs
                from the operator's.
            allowed: values of `--allow-host`. A name with a port is allowed with that port alone.
        """
        self._names = {_LOOPBACK, *(name.lower().removesuffix(".") for name in own)}
        self._names |= set(allowed)
        # Most requests name the same host. The cache is small because clients choose its keys.
        self.allows = lru_cache(64)(self._allows)

    @classmethod
    def from_settings(cls, settings: Settings) -> AllowedHosts:
        """The names of this operator that are known without a DNS lookup, and the configured
        ones."""
        machine = socket.gethostname()
        short = machine.partition(".")[0]
        urls = [settings.advertise, *settings.allowed_origins]
        own = [settings.host, machine, short, f"{short}.local", *map(_host_of, urls)]
        return cls(own, settings.allowed_hosts)

    def _allows(self, host: bytes) -> bool:
        match = HOST.fullmatch(host.decode("latin-1").lower())
        if match is None:
            return False
        name, port = match[1].removesuffix("."), match[2]
        if name in self._names or name.endswith(f".{_LOOPBACK}") or _is_address(name):
            return True
        return port is not None and f"{name}:{port}" in self._names


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # an origin that no browser sends
        return ""


def _is_address(name: str) -> bool:
    """Whether a host is an IP address.

    Any address is allowed, as forwarded ports need: a URL with an address involves no DNS, and
    leads to that address only.
    """
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def foreign_host(host: bytes) -> ForeignHost:
    """The error for a request that names a host which is not allowed."""
    return ForeignHost(
        "this operator requires no token and does not answer as "
        f"{host.decode('latin-1')[:200]!r}, a name that may belong to a page of another site. Use "
        "localhost or an IP address, or allow the name with `cortex serve --allow-host`"
    )
