"""The fork server of one deployed version, as the local engine starts it: `python -s main.py
<socket fd>`, in the version's own environment, with the version (`messages.Setup`) on its standard
input. What it does then is in `forking`.
"""

from __future__ import annotations

import sys

if not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # this file's folder, whose modules have the names of nobody's packages

STARTUP = frozenset(sys.modules)  # what a plain interpreter has loaded

import importlib.util  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402


def main() -> None:
    data = sys.stdin.buffer.read()
    _register_package(json.loads(data)["package"])
    from cortex.worker.forkserver import server

    server.serve(data, int(sys.argv[1]), STARTUP)


def _register_package(folder: str) -> None:
    """Make `cortex` importable without the site-packages that it lies in: those are the
    operator's, and this is the user's environment."""
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
    os._exit(0)  # no exit handlers of what was preloaded
