"""Reads an operator's configuration from its sources. Precedence: flag, environment variable,
configuration file, default.

Called by `cortex serve`, `cortex token`, `cortex backup` and `cortex restore`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
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
from cortex.spec.yaml_lines import (
    NotJson,
    Report,
    Value,
    did_you_mean,
    in_file,
    read_nodes,
    shown_name,
)
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
    report = Report()
    others: list[str] = []
    file, named_by = _file(file, environ)
    given = {
        **(_from_file(file, named_by, report, others) if file is not None else {}),
        **_from_environment(environ, others),
        **{n: _SourcedValue(value, flag(n)) for n, value in flags.items() if value is not None},
    }
    configuration = Configuration.model_construct()
    try:
        configuration = Configuration.model_validate({n: g.value for n, g in given.items()})
    except ValidationError as error:
        _add_mistakes(error, given, report, others)
    if report.mistakes or others:
        lines = [*in_file(str(file), report.mistakes), *others]
        raise StartupError("\n".join(["the configuration has mistakes:", *lines]))
    return Effective(configuration, {name: each.source for name, each in given.items()})


@dataclass(frozen=True)
class _SourcedValue:
    """The value of a setting, and its source."""

    value: object
    source: str
    """A flag, a variable, or a line of the file."""
    written: Value | None = None
    """The value as the file has it."""


def _from_environment(environ: Mapping[str, str], mistakes: list[str]) -> dict[str, _SourcedValue]:
    names = {variable(name): name for name in Configuration.model_fields}
    given = {}
    for key, value in sorted(environ.items()):
        if not key.startswith(ENVIRONMENT_PREFIX):
            continue
        if key not in names:
            mistakes.append(f"${key}: unknown setting{did_you_mean(key, names)}")
        elif value:  # an empty variable counts as unset: files of variables cannot unset one
            given[names[key]] = _SourcedValue(value, f"${key}")
    return given


def _file(file: Path | None, environ: Mapping[str, str]) -> tuple[Path | None, str]:
    """The configuration file, and the name of what chose it."""
    if file is None and environ.get(FILE_VARIABLE):
        return Path(environ[FILE_VARIABLE]), f"${FILE_VARIABLE}"
    return file, "--config"


def _from_file(
    file: Path, named_by: str, report: Report, unreadable: list[str]
) -> dict[str, _SourcedValue]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        unreadable.append(f"{named_by}: {file} cannot be read: {error}")
        return {}
    root, mistakes = read_nodes(text)
    report.mistakes += mistakes
    if root is None:
        return {}
    if not isinstance(root.data, dict):
        # Not its content: text such as `store:postgresql://…` may have a password.
        expected = "settings by name, such as `port: 8888`"
        report.add(root.line, "", f"found {root.kind()}; allowed: {expected}")
        return {}
    given = {}
    for key, value in root.data.items():
        if key not in Configuration.model_fields:
            hint = did_you_mean(key, Configuration.model_fields)
            report.add(value.line, shown_name(key), f"unknown setting{hint}")
        elif value.data is not None:
            given[key] = _SourcedValue(_plain(value), f"{file}:{value.line}", value)
    return given


def _plain(value: Value) -> object:
    if isinstance(value.data, list):
        return [_plain(each) for each in value.data]
    if isinstance(value.data, dict | NotJson):
        return value  # pydantic refuses it: no setting has such a value
    return value.data


def _add_mistakes(
    error: ValidationError, given: Mapping[str, _SourcedValue], report: Report, others: list[str]
) -> None:
    """Add pydantic's errors: those in the file to the report, all others to the list."""
    settings = described(Configuration)
    for each in error.errors():
        text = each["msg"].removeprefix("Value error, ").removeprefix("Input ")
        text = text.removesuffix(f" for {Path}")
        if not each["loc"]:  # settings that exclude or require each other
            others.append(text)
            continue
        name, *index = each["loc"]
        setting = given[str(name)]
        where, written = str(name), setting.written
        # An element of a list has a line of its own; words between commas do not.
        if written is not None and isinstance(written.data, list) and index:
            where, written = f"{name}[{index[0]}]", written.data[int(index[0])]
            index = []
        shown = repr(each["input"])[:100] if written is None or index else written.shown()
        # The message goes into logs: it must not show a password.
        found = "" if settings[str(name)].has_secret else f"; found {shown}"
        if written is None:
            others.append(f"{setting.source}: {text}{found}")
        else:
            report.add(written.line, where, f"{text}{found}")
