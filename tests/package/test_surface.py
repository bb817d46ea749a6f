"""The public names, and the modules that they load."""

from __future__ import annotations

import json
import subprocess
import sys

import cortex
from cortex import errors


def test_the_public_names_are_these() -> None:
    assert cortex.__all__ == [
        "client", "new_client", "env_list", "env_delete", "Client", "AsyncClient", "CortexError",
    ]  # fmt: skip
    for name in cortex.__all__:
        assert getattr(cortex, name).__doc__
    assert dir(cortex) == sorted(cortex.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    try:
        _ = cortex.nothing
    except AttributeError as error:
        assert "nothing" in str(error)
    else:
        raise AssertionError("cortex.nothing exists")


def test_importing_the_package_is_enough_for_its_errors() -> None:
    code = "import cortex; assert issubclass(cortex.errors.NotFound, cortex.CortexError)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_loads_only_the_standard_library() -> None:
    code = "import sys, json, cortex, cortex.logger; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    tops = {name.partition(".")[0] for name in json.loads(out)}
    assert not {"pydantic", "httpx", "fastapi", "sqlalchemy", "typer", "rich"} & tops


def test_every_kind_of_error_is_one_class() -> None:
    tree = errors._tree(errors.CortexError)
    assert len({c.kind for c in tree}) == len(tree)
    for each in tree:
        rebuilt = errors.from_response(each.http_status, each.kind, "m")
        assert type(rebuilt) is each
    assert type(errors.from_response(404, "not_found.unknown", "m")) is errors.NotFound
    assert type(errors.from_response(418, "teapot", "m")) is errors.CortexError
