"""The entry point of a fork server. The local engine starts one for each deployed version, in the
environment of that version: `python -s main.py <socket fd>`, with a `messages.Setup` on standard
input. `forkserver.server` does the work.
"""

from __future__ import annotations

import sys

if not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # the folder of this file, whose modules could shadow others

STARTUP = frozenset(sys.modules)  # the modules that a plain interpreter has loaded

import importlib.util  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402


def main() -> None:
    data = sys.stdin.buffer.read()
    _register_package(json.loads(data)["package"])
    from cortex.worker.forkserver import server

    server.serve(data, int(sys.argv[1]), STARTUP)


def _register_package(folder: str) -> None:
    """Make `cortex` importable without the site-packages folder that contains it. That folder is
    the operator's; this interpreter has the user's environment."""
    spec = importlib.util.spec_from_file_location(
        "cortex", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"no package cortex in {folder}")
    module = importlib.util.module_from_spec(spec)
    sys.modules["cortex"] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    main()
    os._exit(0)  # skip the exit handlers of preloaded modules
