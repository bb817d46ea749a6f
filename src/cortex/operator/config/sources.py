"""Reads an operator's configuration from its sources. Precedence: flag, environment variable,
configuration file, default.

Called by `cortex serve`, `cortex token`, `cortex backup` and `cortex restore`.
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
from cortex.operator.config.schema import (
    ENVIRONMENT_PREFIX,
    Configuration,
    described,
    flag,
    variable,
)
from cortex.spec.yaml_lines import Odd, Value, did_you_mean, read_nodes
from cortex.store import url as store_url

FILE_VARIABLE = "CORTEX_CONFIG"

_DEFAULT = "default"


@dataclass(frozen=True)
class Effective:
    """A configuration, and the source of each value that is not a default."""

    configuration: Configuration
    sources: Mapping[str, str]

    def as_yaml(self) -> str:
        """A configuration file with these settings, each with its source as a comment. `***`
        replaces the store's password."""
        lines = CommentedMap()
        for name in Configuration.model_fields:
            lines[name] = self._as_data(name)
            lines.yaml_add_eol_comment(self.sources.get(name, _DEFAULT), name)
        text = io.StringIO()
        yaml = YAML()
        yaml.width = 4096
        yaml.representer.add_representer(
            type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null")
        )
        yaml.dump(lines, text)
        return text.getvalue()

    def _as_data(self, name: str) -> object:
        value = getattr(self.configuration, name)
        if name == "store" and value is not None:
            return store_url.shown(store_url.read(value))
        if isinstance(value, Path):
            return str(value.absolute())
        return list(value) if isinstance(value, tuple) else value


def load(
    flags: Mapping[str, object], file: Path | None, environ: Mapping[str, str] = os.environ
) -> Effective:
    """Read and check the configuration.

    Args:
        flags: the command line's values, by setting; None where the flag is not given.
        file: the file that `--config` names.

    Raises:
        StartupError: with all mistakes and their places.
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
        mistakes += _messages(error, given)
    if mistakes:
        raise StartupError("\n".join(["the configuration has mistakes:", *mistakes]))
    return Effective(configuration, {name: each.source for name, each in given.items()})


@dataclass(frozen=True)
class _Given:
    """A value, and its source as messages name it: a flag, a variable, or a line of a file."""

    value: object
    source: str


def _from_environment(environ: Mapping[str, str], mistakes: list[str]) -> dict[str, _Given]:
    names = {variable(name): name for name in Configuration.model_fields}
    given = {}
    for key, value in sorted(environ.items()):
        if not key.startswith(ENVIRONMENT_PREFIX):
            continue
        if key not in names:
            mistakes.append(f"${key}: unknown setting{did_you_mean(key, names)}")
        elif value:  # an empty variable counts as unset: files of variables cannot unset one
            given[names[key]] = _Given(value, f"${key}")
    return given


def _from_file(
    file: Path | None, environ: Mapping[str, str], mistakes: list[str]
) -> dict[str, _Given]:
    source = "--config"
    if file is None and environ.get(FILE_VARIABLE):
        file, source = Path(environ[FILE_VARIABLE]), f"${FILE_VARIABLE}"
    if file is None:
        return {}
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        mistakes.append(f"{source}: {file} cannot be read: {error}")
        return {}
    root, invalid = read_nodes(text)
    mistakes += [f"{file}:{mistake.line}: {mistake.text}" for mistake in invalid]
    if root is None or invalid:
        return {}
    if not isinstance(root.data, dict):
        mistakes.append(f"{file}:{root.line}: must be a list of settings, such as `port: 8888`")
        return {}
    given = {}
    for key, value in root.data.items():
        where = f"{file}:{value.line}"
        if key not in Configuration.model_fields:
            hint = did_you_mean(key, Configuration.model_fields)
            mistakes.append(f"{where}: {key}: unknown setting{hint}")
        elif value.data is not None:
            given[key] = _Given(_plain(value), where)
    return given


def _plain(value: Value) -> object:
    if isinstance(value.data, list):
        return [_plain(each) for each in value.data]
    if isinstance(value.data, dict | Odd):
        return value  # pydantic refuses it: no setting has such a value
    return value.data


def _messages(error: ValidationError, given: Mapping[str, _Given]) -> Iterable[str]:
    settings = described(Configuration)
    for each in error.errors():
        text = each["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if not each["loc"]:  # settings that exclude or require each other
            yield text
            continue
        name = str(each["loc"][0])
        source = given[name].source
        place = source if source.startswith(("-", "$")) else f"{source}: {name}"
        # The message goes into logs: it must not show a password.
        value = "" if settings[name].has_secret else f"; found {_shown(each['input'])}"
        yield f"{place}: {text}{value}"


def _shown(value: object) -> str:
    return value.shown() if isinstance(value, Value) else repr(value)[:100]
