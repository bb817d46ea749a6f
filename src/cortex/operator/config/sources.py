"""Where an operator's configuration comes from: flags go before environment variables, these before a
file, and it before the defaults. Called by `cortex serve` and `cortex token`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from cortex.errors import StartupError
from cortex.operator.config.schema import Configuration, flag
from cortex.spec.yaml_lines import Odd, Value, did_you_mean, read_nodes
from cortex.store import url as store_url

_PREFIX = "CORTEX_SERVE_"
FILE_VARIABLE = "CORTEX_CONFIG"

_DEFAULT = "default"


@dataclass(frozen=True)
class Effective:
    """A configuration, and where each value of it came from."""

    configuration: Configuration
    sources: Mapping[str, str]

    def shown(self) -> str:
        """As YAML, which a file may hold as it is, but for the password of the store."""
        lines = CommentedMap()
        for name in Configuration.model_fields:
            lines[name] = self._plain(name)
            lines.yaml_add_eol_comment(self.sources.get(name, _DEFAULT), name)
        text = io.StringIO()
        yaml = YAML()
        yaml.width = 4096
        yaml.representer.add_representer(
            type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null")
        )
        yaml.dump(lines, text)
        return text.getvalue()

    def _plain(self, name: str) -> object:
        value = getattr(self.configuration, name)
        if name == "store" and value is not None:
            return store_url.shown(store_url.read(value))
        if isinstance(value, Path):
            return str(value.absolute())
        return list(value) if isinstance(value, tuple) else value


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"{_PREFIX}{name.upper()}"


def load(
    flags: Mapping[str, object], file: Path | None, environ: Mapping[str, str] = os.environ
) -> Effective:
    """The configuration that an operator has.

    Args:
        flags: the settings that the command line gives; None is not given.
        file: the file that the command line names.

    Raises:
        StartupError: with every mistake, and where it is.
    """
    mistakes: list[str] = []
    given = {
        **_from_file(file, environ, mistakes),
        **_from_environment(environ, mistakes),
        **{n: _Given(value, flag(n)) for n, value in flags.items() if value is not None},
    }
    configuration = Configuration.model_construct()
    try:
        configuration = Configuration.model_validate({n: g.value for n, g in given.items()})
    except ValidationError as error:
        mistakes += _told(error, given)
    if mistakes:
        raise StartupError("\n".join(["the configuration has mistakes:", *mistakes]))
    return Effective(configuration, {name: each.where for name, each in given.items()})


@dataclass(frozen=True)
class _Given:
    """What one source says of one setting, and the words for where that is."""

    value: object
    where: str


def _from_environment(environ: Mapping[str, str], mistakes: list[str]) -> dict[str, _Given]:
    fields = {variable(name): name for name in Configuration.model_fields}
    given = {}
    for key, value in sorted(environ.items()):
        if not key.startswith(_PREFIX):
            continue
        if key not in fields:
            mistakes.append(f"${key}: no setting{did_you_mean(key, fields)}")
        elif value:  # an empty one is as good as none: so files of variables leave one out
            given[fields[key]] = _Given(value, f"${key}")
    return given


def _from_file(
    named: Path | None, environ: Mapping[str, str], mistakes: list[str]
) -> dict[str, _Given]:
    by = "--config"
    if named is None and environ.get(FILE_VARIABLE):
        named, by = Path(environ[FILE_VARIABLE]), f"${FILE_VARIABLE}"
    if named is None:
        return {}
    try:
        text = named.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        mistakes.append(f"{by}: {named} cannot be read: {error}")
        return {}
    root, wrong = read_nodes(text)
    mistakes += [f"{named}:{mistake.line}: {mistake.text}" for mistake in wrong]
    if root is None or wrong:
        return {}
    if not isinstance(root.data, dict):
        mistakes.append(f"{named}:{root.line}: has to be a list of settings, as `port: 8888`")
        return {}
    given = {}
    for key, value in root.data.items():
        where = f"{named}:{value.line}"
        if key not in Configuration.model_fields:
            hint = did_you_mean(key, Configuration.model_fields)
            mistakes.append(f"{where}: {key}: no setting{hint}")
        elif value.data is not None:
            given[key] = _Given(_plain(value), where)
    return given


def _plain(value: Value) -> object:
    if isinstance(value.data, list):
        return [_plain(each) for each in value.data]
    if isinstance(value.data, dict | Odd):
        return value  # which no setting takes
    return value.data


def _told(error: ValidationError, given: Mapping[str, _Given]) -> Iterable[str]:
    for each in error.errors():
        words = each["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if not each["loc"]:  # settings that do not go together
            yield words
            continue
        name = str(each["loc"][0])
        found = each["input"]
        # A password may be in it, and wherever it is, none gets into a log.
        shown = "" if name in {"store", "files"} else f"; found {_found(found)}"
        where = given[name].where
        named = where if where.startswith(("-", "$")) else f"{where}: {name}"
        yield f"{named}: {words}{shown}"


def _found(value: object) -> str:
    return value.shown() if isinstance(value, Value) else repr(value)[:100]
