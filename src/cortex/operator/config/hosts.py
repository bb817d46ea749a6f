"""The host names that `--allow-host` takes, and the form of a `Host` header."""

from __future__ import annotations

import re

# RFC 9110, 7.2: a host, and a port unless it is the scheme's default.
HOST = re.compile(r"([a-z0-9_.-]+|\[[0-9a-f:.]+(?:%[a-z0-9._~-]+)?\])(?::(\d{1,5})?)?")


def check_host(text: str) -> str:
    """Check a value of `--allow-host`.

    Returns:
        The value as `AllowedHosts` compares it.

    Raises:
        ValueError: the value is not a host; the message says how to write one.
    """
    match = HOST.fullmatch(text.lower())
    if match is None or (match[2] is not None and int(match[2]) > 65535):
        raise ValueError(
            "not a host name; write tasks.example.org or tasks.example.org:8080, each name by "
            "itself, without https:// and in ASCII (xn--…)"
        )
    name = match[1].removesuffix(".")
    return name if match[2] is None else f"{name}:{match[2]}"
