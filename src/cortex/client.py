"""The old name of `cortex.sdk`. Deployed pickles name it, and programs import from it.

Importing a module sets its name in its package, and `cortex.client` is a function there. This
module can be called, so that `cortex.client()` works after `import cortex.client`.
"""

from __future__ import annotations

import sys
from types import ModuleType

from cortex import sdk
from cortex.sdk import *  # noqa: F403


class _CallableModule(ModuleType):
    def __call__(self, env: str | None = None) -> sdk.Client:
        return sdk.client(env)


sys.modules[__name__].__class__ = _CallableModule
