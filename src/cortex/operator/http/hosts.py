"""The names by which an operator without tokens is asked. A page whose own name an attacker's DNS suddenly
points at this machine (DNS rebinding) sends that name as `Host`, and an `Origin` that agrees with it; a
browser lets the page read the answers. Only the name tells it from a page of ours. Called by the gate.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from functools import lru_cache
from urllib.parse import urlsplit

from cortex.errors import ForeignHost
from cortex.operator.config.settings import Settings

# RFC 9110, 7.2: a host, and a port where it is not the scheme's.
_HOST = re.compile(r"([a-z0-9_.-]+|\[[0-9a-f:.]+(?:%[a-z0-9._~-]+)?\])(?::(\d{1,5})?)?")
_LOOPBACK = "localhost"


class Hosts:
    """Those of one operator."""

    def __init__(self, own: Iterable[str], allowed: Iterable[str] = ()) -> None:
        """
        Args:
            own: names that are taken with any port: a port that is passed on (ssh, a container's) differs.
            allowed: as `--allow-host` has them; one with a port is taken with that port alone.
        """
        self._names = {_LOOPBACK, *(name.lower().removesuffix(".") for name in own)}
        self._names |= set(allowed)
        # Most requests name the same one; what clients send is kept of few.
        self.takes = lru_cache(64)(self._takes)

    @classmethod
    def of(cls, settings: Settings) -> Hosts:
        """Those that lead to this operator, as far as can be told without asking a resolver."""
        machine = socket.gethostname()
        short = machine.partition(".")[0]
        urls = [settings.advertise, *settings.allowed_origins]
        own = [settings.host, machine, short, f"{short}.local", *map(_host_of, urls)]
        return cls(own, settings.allowed_hosts)

    def _takes(self, host: bytes) -> bool:
        found = _HOST.fullmatch(host.decode("latin-1").lower())
        if found is None:
            return False
        name, port = found[1].removesuffix("."), found[2]
        if name in self._names or name.endswith(f".{_LOOPBACK}") or _is_address(name):
            return True
        return port is not None and f"{name}:{port}" in self._names


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # an origin that no browser sends
        return ""


def _is_address(name: str) -> bool:
    """Whether no DNS was asked: an address in a URL leads there, and nowhere else. So any may be taken, as
    of a port that is passed on from another address."""
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def checked(text: str) -> str:
    """A value of `--allow-host`, as it is compared.

    Raises:
        ValueError: it is no host, and why.
    """
    found = _HOST.fullmatch(text.lower())
    if found is None or (found[2] is not None and int(found[2]) > 65535):
        raise ValueError(
            "no name of a host; write tasks.example.org or tasks.example.org:8080, each name by itself, "
            "without https:// and in ASCII (xn--…)"
        )
    name = found[1].removesuffix(".")
    return name if found[2] is None else f"{name}:{found[2]}"


def foreign(host: bytes) -> ForeignHost:
    """The refusal of a request that names another host."""
    return ForeignHost(
        f"this operator asks for no token, and is not known as {host.decode('latin-1')[:200]!r}: a page of "
        "another site may be behind that name. Use localhost or an IP address, or allow the name with "
        "`cortex serve --allow-host`"
    )
