"""The system user that runs users' code, if it is not the operator's own user.

It runs the builds of environments, fork servers, supervisors and workers. Used by `projects` and
`engines`.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypedDict, TypeVar

from cortex.errors import StartupError
from cortex.worker import processes

P = ParamSpec("P")
R = TypeVar("R")


class Identity(TypedDict, total=False):
    """The arguments of `subprocess` for starting a process as another user."""

    user: int
    group: int
    extra_groups: list[int]


@dataclass(frozen=True)
class Account:
    """A user of this system."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables that a login sets."""
        return {"HOME": self.home, "USER": self.name, "LOGNAME": self.name}

    def own(self, path: Path) -> None:
        """Give a file to this user; of a symbolic link, the link itself."""
        os.chown(path, self.uid, self.gid, follow_symlinks=False)


def find(name: str) -> Account:
    """The account of a name, as which the operator is to run jobs.

    Raises:
        StartupError: there is no such user, it is root, or the operator itself is not root.
    """
    try:
        entry = pwd.getpwnam(name)
    except KeyError as error:
        raise StartupError(
            f"this system has no user {name!r}; create it (`useradd --system {name}`), or name "
            "another user with --run-as"
        ) from error
    if entry.pw_uid == 0:
        raise StartupError(f"--run-as {name} is root: name an unprivileged user, or omit --run-as")
    if os.geteuid() != 0:
        raise StartupError(
            f"only root can run jobs as {name!r}: start the operator as root, or without --run-as"
        )
    groups = tuple(os.getgrouplist(name, entry.pw_gid))
    return Account(name, entry.pw_uid, entry.pw_gid, groups, entry.pw_dir)


def identity(account: Account | None) -> Identity:
    """The arguments of `subprocess` for an account; none for the operator's own user."""
    if account is None:
        return {}
    return {"user": account.uid, "group": account.gid, "extra_groups": list(account.groups)}


def without_new_privileges(start: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function that starts a process, which can then gain no rights by what it executes.

    That excludes setuid programs and file capabilities, also for the descendants of the process.

    Raises:
        OSError: the process could not be started.
    """

    def bound() -> R:
        processes.prctl(processes.PR_SET_NO_NEW_PRIVS, 1)  # for this thread and its children
        return start(*args, **kwargs)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(bound).result()
