"""The environments file: the operators that the user has configured by name, and the default one.

A change replaces the file atomically: a reader never finds half of it. A file that cannot be read
is reported and left unchanged: it is the user's, and may have entries that took work.

Standard library alone: a task's client uses it in the user's environment.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from cortex.errors import CortexError, InvalidRequest, UnknownEnvironment

if TYPE_CHECKING:
    from cortex.sdk.types import EnvironmentList

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TOKEN = re.compile(r"[!-~]{1,512}")


@dataclass(frozen=True)
class Environment:
    """An operator with a name."""

    name: str
    operator_endpoint: str
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Environments:
    """The content of the environments file."""

    default: str | None = None
    all: tuple[Environment, ...] = ()

    def named(self, name: str) -> Environment:
        """The environment `name`.

        Raises:
            UnknownEnvironment: there is none; the message lists the configured environments.
        """
        for environment in self.all:
            if environment.name == name:
                return environment
        known = ", ".join(e.name for e in self.all) or "none"
        raise UnknownEnvironment(
            f"there is no environment {name!r} (configured: {known}); "
            f"add it with `cortex env configure {name} --operator-endpoint URL`"
        )

    def as_json(self) -> EnvironmentList:
        """The output of `cortex env list -o json`, which has no tokens."""
        entries = [{"name": e.name, "operator_endpoint": e.operator_endpoint} for e in self.all]
        return cast(
            "EnvironmentList", {"default_environment": self.default, "environments": entries}
        )


LOCAL = Environment("local", "http://localhost:8888")


def path() -> Path:
    """The path of the environments file, which may not exist."""
    folder = os.environ.get("CORTEX_CLI_CONFIG_DIR") or _user_folder()
    return Path(folder).expanduser() / "environments.json"


def in_task() -> bool:
    """Whether this process belongs to a job.

    A job runs in the user's environment, which may lack the dependencies of this package.
    """
    return "CORTEX_JOB_ID" in os.environ


def load() -> Environments:
    """Read the environments file; without a file, there are no environments.

    Raises:
        CortexError: the file cannot be read.
    """
    file = path()
    try:
        text = file.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return Environments()
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, str(error)) from error
    try:
        return _parse(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, InvalidRequest) as error:
        raise _unreadable(file, f"{type(error).__name__}: {error}") from error


def resolve(name: str | None) -> Environment:
    """The environment to use.

    Args:
        name: the environment's name; by default the operator of $CORTEX_OPERATOR_ENDPOINT, or else
            the default environment.

    Raises:
        UnknownEnvironment: there is no such environment, or no default.
        CortexError: $CORTEX_OPERATOR_ENDPOINT is invalid, or the file cannot be read.
    """
    environments = load()
    endpoint = os.environ.get("CORTEX_OPERATOR_ENDPOINT")
    if name is None and endpoint:
        try:
            endpoint = checked_endpoint(endpoint)
        except InvalidRequest as error:
            raise InvalidRequest(f"$CORTEX_OPERATOR_ENDPOINT: {error.message}") from error
        matches = (e for e in environments.all if e.operator_endpoint == endpoint)
        return next(matches, Environment("", endpoint))
    if not environments.all and name in (None, LOCAL.name):
        return LOCAL
    if name is not None:
        return environments.named(name)
    if environments.default is None:
        known = ", ".join(e.name for e in environments.all)
        raise UnknownEnvironment(
            f"no environment is the default (configured: {known}); "
            "choose one with --env NAME, or set the default with `cortex env default NAME`"
        )
    return environments.named(environments.default)


def token_of(environment: Environment) -> str | None:
    """The token to send to an environment. $CORTEX_TOKEN overrides the stored token."""
    return os.environ.get("CORTEX_TOKEN") or environment.token


def configure(name: str, operator_endpoint: str, token: str | None = None) -> Environment:
    """Add or change an environment. The first environment becomes the default.

    Args:
        name: the environment's name.
        operator_endpoint: the operator's URL.
        token: without it, the stored token stays if the URL is the same. It is never sent to
            another host.

    Raises:
        InvalidRequest: the name, the URL or the token is invalid.
        CortexError: the file cannot be read or written.
    """
    _check_name(name)
    endpoint = checked_endpoint(operator_endpoint)
    current = load()
    if token is None:
        stored = (e.token for e in current.all if (e.name, e.operator_endpoint) == (name, endpoint))
        token = next(stored, None)
    environment = Environment(name, endpoint, None if token is None else checked_token(token))
    others = tuple(e for e in current.all if e.name != name)
    default = current.default if others or current.default else name
    _save(Environments(default, (*others, environment)))
    return environment


def set_default(name: str) -> Environment:
    """Make an environment the default.

    Raises:
        UnknownEnvironment: there is no such environment.
        CortexError: the file cannot be read or written.
    """
    environments = load()
    environment = environments.named(name)
    _save(replace(environments, default=name))
    return environment


def rename(name: str, new_name: str) -> None:
    """Rename an environment.

    Raises:
        UnknownEnvironment: there is no environment `name`.
        InvalidRequest: the new name is invalid, or another environment has it.
        CortexError: the file cannot be read or written.
    """
    environments = load()
    environments.named(name)
    _check_name(new_name)
    if new_name != name and any(e.name == new_name for e in environments.all):
        raise InvalidRequest(f"an environment {new_name!r} already exists; delete it first")
    default = new_name if environments.default == name else environments.default
    renamed = (replace(e, name=new_name) if e.name == name else e for e in environments.all)
    _save(Environments(default, tuple(renamed)))


def delete(name: str) -> None:
    """Remove an environment. After the default environment is removed, there is no default.

    Raises:
        UnknownEnvironment: there is no such environment.
        CortexError: the file cannot be read or written.
    """
    environments = load()
    environments.named(name)
    default = None if environments.default == name else environments.default
    _save(Environments(default, tuple(e for e in environments.all if e.name != name)))


def checked_endpoint(url: str) -> str:
    """An operator's URL, without a trailing slash.

    Raises:
        InvalidRequest: the URL is invalid. The message does not show a password in it.
    """
    problem = _endpoint_problem(url)
    if problem:
        shown = re.sub("(?<=//).*@", "***@", url)  # without a password
        raise InvalidRequest(
            f"{shown!r} is not an operator's URL: {problem}; write it as in "
            f"{LOCAL.operator_endpoint}"
        )
    return url.rstrip("/")


def checked_token(token: str) -> str:
    """A token that can be sent in a header.

    Raises:
        InvalidRequest: the token cannot be sent. The message does not show it.
    """
    if not _TOKEN.fullmatch(token):
        raise InvalidRequest(
            "the token is invalid; a token has 1 to 512 printable ASCII characters, without spaces"
        )
    return token


def _user_folder() -> str:
    try:
        from platformdirs import user_config_dir
    except ModuleNotFoundError:  # in a task, which runs on Linux: platformdirs' folder there
        return f"{os.environ.get('XDG_CONFIG_HOME') or '~/.config'}/cortex"
    return user_config_dir("cortex")


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name!r} is not a valid name for an environment; use letters, digits, '.', '_' and "
            "'-', starting with a letter or digit"
        )


def _endpoint_problem(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return str(error)
    if parts.scheme not in ("http", "https") or "://" not in url:
        return "it must start with http:// or https://"
    if not host or re.search(r"\s", url):
        return "it has no host"
    if parts.query or parts.fragment or parts.username is not None:
        return "it must not have a user, a query or a fragment"
    return None


def _parse(content: dict[str, object]) -> Environments:
    entries = cast("list[dict[str, object]]", content["environments"])
    environments = tuple(
        Environment(
            _text(e["name"]),
            checked_endpoint(_text(e["operator_endpoint"])),
            checked_token(_text(e["token"])) if "token" in e else None,
        )
        for e in entries
    )
    default = content["default_environment"]
    if default is not None and default not in [e.name for e in environments]:
        raise ValueError(f"the default environment {default!r} is not one of the environments")
    return Environments(None if default is None else _text(default), environments)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _save(environments: Environments) -> None:
    content = environments.as_json()
    entries = [
        {**entry, **({"token": e.token} if e.token else {})}
        for e, entry in zip(environments.all, content["environments"])  # noqa: B905  # equal lengths
    ]
    # NamedTemporaryFile makes a file that only its owner can read, as it may hold tokens. A
    # symbolic link, which dotfile managers make, stays one: its target is replaced.
    file = path().resolve()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=file.parent, prefix=f".{file.name}.", delete=False
        ) as out:
            try:
                json.dump({**content, "environments": entries}, out, indent=2, ensure_ascii=False)
                out.write("\n")
                out.flush()
                os.fsync(out.fileno())
                Path(out.name).replace(file)
            except BaseException:
                Path(out.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise CortexError(
            f"the environments cannot be saved in {file}: {error.strerror or error}",
            kind="client.environments_file",
        ) from error


def _unreadable(file: Path, why: str) -> CortexError:
    return CortexError(
        f"the environments file {file} cannot be read ({why}); "
        "correct it, or move it away and configure the environments again",
        kind="client.environments_file",
    )
