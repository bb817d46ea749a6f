"""The names of Python's own modules, also on Python before 3.10, which does not list them."""

from __future__ import annotations

import sys

from cortex.worker import standard


def test_the_listed_names_are_those_of_sys_stdlib_module_names() -> None:
    listed = standard.names_of_files()
    loaded = {name.partition(".")[0] for name in sys.modules} & sys.stdlib_module_names
    assert loaded - {"_frozen_importlib", "_frozen_importlib_external"} <= listed
    assert {"json", "zlib", "sys", "queue"} <= listed
    assert not listed & {"numpy", "pytest", "cortex"}
    assert sys.stdlib_module_names == standard.NAMES
