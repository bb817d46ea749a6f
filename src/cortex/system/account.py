"""The system user that users' code runs as, where that is not the operator's own: builds of
environments, fork servers, supervisors and workers. Used by `projects` and `engines`.
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
    """What `subprocess` takes to start a process as somebody."""

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
        """What a login would set."""
        return {"HOME": self.home, "USER": self.name, "LOGNAME": self.name}

    def own(self, path: Path) -> None:
        """Make it this user's; of a link, the link."""
        os.chown(path, self.uid, self.gid, follow_symlinks=False)


def find(name: str) -> Account:
    """The account of a name, for an operator that is to run jobs as it.

    Raises:
        StartupError: there is none, it is root, or this operator may not become it.
    """
    try:
        entry = pwd.getpwnam(name)
    except KeyError as error:
        raise StartupError(
            f"this system has no user {name!r}; make one (`useradd --system {name}`), or give "
            "another to --run-as"
        ) from error
    if entry.pw_uid == 0:
        raise StartupError(f"--run-as {name} is root itself: name a user without rights, or none")
    if os.geteuid() != 0:
        raise StartupError(
            f"only root can run jobs as {name!r}: start the operator as root, or without --run-as"
        )
    groups = tuple(os.getgrouplist(name, entry.pw_gid))
    return Account(name, entry.pw_uid, entry.pw_gid, groups, entry.pw_dir)


def identity(account: Account | None) -> Identity:
    """What starts a process as an account; nothing for the operator's own."""
    if account is None:
        return {}
    return {"user": account.uid, "group": account.gid, "extra_groups": list(account.groups)}


def without_new_privileges(start: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call what starts a process: neither that nor what comes from it gains rights by what it executes (setuid
    programs, capabilities of files).

    Raises:
        OSError: the process could not be started.
    """

    def bound() -> R:
        processes.prctl(processes.PR_SET_NO_NEW_PRIVS, 1)  # of this thread, and of what it forks
        return start(*args, **kwargs)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(bound).result()
