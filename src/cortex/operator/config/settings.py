"""How an operator is set up, and where in its data folder everything lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import platformdirs

from cortex.engines.base import Capacity
from cortex.projects.build_rules import DEFAULT_RULES, BuildRules
from cortex.system.account import Account

DATABASE = "operator.db"


def default_data_dir() -> Path:
    """Where an operator keeps everything, if it is told nothing else."""
    return Path(platformdirs.user_data_dir("cortex"))


def database_url(data_dir: Path, store: str | None) -> str:
    """The database of an operator: the one that it is told, else a file in its data folder."""
    return store or f"sqlite:///{data_dir / DATABASE}"


@dataclass(frozen=True)
class Keep:
    """How long what is finished is kept; None is for ever."""

    jobs_s: float | None = None
    """Jobs, and versions without jobs that are not deployed any more."""
    logs_s: float | None = None
    """A job's folder: its log, and the files that it wrote there."""
    jobs: int | None = None
    """Finished jobs of each API, the newest."""
    audit_s: float | None = None
    """Entries of the audit."""


@dataclass(frozen=True)
class Ray:
    """The Ray cluster that jobs run on."""

    address: str
    node_dir: str | None = None
    """Where nodes keep projects, environments and jobs; None is a folder of their users."""


@dataclass(frozen=True)
class Settings:
    """One operator's configuration; made from its `Configuration`."""

    data_dir: Path
    store: str | None = None
    """The URL of a PostgreSQL database; None is a file in the data folder."""
    files: str | None = None
    """The URL of a store of files; None is the data folder."""
    lost_folder: str | None = None
    """The id of a data folder that is lost for good, whose place this one takes."""
    host: str = "localhost"
    port: int = 8888
    """0 takes any free port."""
    advertise: str = ""
    """The URL at which other operators on the store reach this one; as it listens, where it is empty."""
    lease_s: float = 10
    """After which an operator that hangs is taken not to drive any more, where there are others."""
    capacity: Capacity | None = None
    """What jobs may take of this machine; None is all of it."""
    ray: Ray | None = None
    """Where jobs run; None is this machine."""
    grace_s: float = 10
    """Between SIGTERM and SIGKILL."""
    require_token: bool = False
    """Whether every request has to bring a token. One that listens beyond this machine asks for it
    all the same, unless it is `insecure`."""
    insecure: bool = False
    """Whether it lets everybody in who reaches it from other machines."""
    builds: BuildRules = DEFAULT_RULES
    account: Account | None = None
    """Who jobs run as; None is the operator's own user."""
    keep: Keep = Keep()
    max_waiting_bytes: int | None = None
    """Of the configs of jobs that wait, together; None is any number."""
    allowed_origins: frozenset[str] = frozenset()
    """Origins of pages, beside the operator's own, whose browsers may send requests."""
    allowed_hosts: frozenset[str] = frozenset()
    """Names, beside the machine's own, by which it may be asked where no token is."""

    @property
    def engine_name(self) -> str:
        """The name of the engine that runs the jobs."""
        return "local" if self.ray is None else "ray"

    @property
    def database_url(self) -> str:
        return database_url(self.data_dir, self.store)

    @property
    def database(self) -> Path:
        """The file of the database, where that is no server's."""
        return self.data_dir / DATABASE

    @property
    def lock(self) -> Path:
        return self.data_dir / "operator.lock"

    @property
    def identity(self) -> Path:
        return self.data_dir / "folder.id"

    @property
    def lost_folder_marker(self) -> Path:
        return self.data_dir / "taken-over"

    @property
    def restored(self) -> Path:
        """When the backup was made that the folder was restored from, until its jobs are seen to."""
        return self.data_dir / "restored"

    @property
    def restoring(self) -> Path:
        """What is not in its place yet of a backup that is restored."""
        return self.data_dir / ".restoring"

    @property
    def ray_namespace(self) -> Path:
        return self.data_dir / "ray-namespace"

    @property
    def projects(self) -> Path:
        return self.data_dir / "projects"

    @property
    def locks(self) -> Path:
        return self.data_dir / "locks"

    @property
    def archived(self) -> Path:
        return self.data_dir / "archived"

    @property
    def environments(self) -> Path:
        return self.data_dir / "environments"

    @property
    def jobs(self) -> Path:
        return self.data_dir / "jobs"
