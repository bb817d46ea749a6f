"""Cortex tasks: a Python function, a command or a script behind a URL.

This is the whole public surface. Names are loaded on first use, because `import cortex.worker` runs
this file too and must stay a matter of milliseconds.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cortex import errors as errors
    from cortex.errors import CortexError
    from cortex.sdk import Client, client, env_delete, env_list, new_client
    from cortex.sdk.aio import AsyncClient

_HOME = {
    "AsyncClient": "cortex.sdk.aio",
    "Client": "cortex.sdk",
    "CortexError": "cortex.errors",
    "client": "cortex.sdk",
    "env_delete": "cortex.sdk",
    "env_list": "cortex.sdk",
    "new_client": "cortex.sdk",
}

__version__ = "0.1.0"
__all__ = [  # noqa: RUF022  # in the order in which a reader meets them
    "client",
    "new_client",
    "env_list",
    "env_delete",
    "Client",
    "AsyncClient",
    "CortexError",
]


def __getattr__(name: str) -> object:
    if name == "errors":  # what `except cortex.errors.NotFound` names
        return importlib.import_module("cortex.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'cortex' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
