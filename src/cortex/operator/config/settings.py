"""The settings of an operator as its code reads them, and the paths in its data folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import platformdirs

from cortex.engines.base import Capacity
from cortex.joblog.folders import JobFolders
from cortex.projects.build_rules import DEFAULT_RULES, BuildRules
from cortex.system.account import Account

DATABASE = "operator.db"


def default_data_dir() -> Path:
    """The platform's folder for user data."""
    return Path(platformdirs.user_data_dir("cortex"))


def database_url(data_dir: Path, store: str | None) -> str:
    """The URL of an operator's database: `store`, or a file in the data folder."""
    return store or f"sqlite:///{data_dir / DATABASE}"


@dataclass(frozen=True)
class RetentionLimits:
    """How long and how much data of finished jobs is stored; None is without a limit."""

    jobs_s: float | None = None
    """Finished jobs, and versions that have no jobs and are no longer deployed."""
    logs_s: float | None = None
    """The folders of finished jobs, with their logs and files."""
    jobs: int | None = None
    """The number of finished jobs of each API; the newest are kept."""
    audit_s: float | None = None
    """Entries of the audit."""


@dataclass(frozen=True)
class Ray:
    """The Ray cluster that runs the jobs."""

    address: str
    node_dir: str | None = None
    """The folder on nodes for projects, environments and jobs; None is one of the node's user."""
    has_autoscaler: bool = False
    """Whether the cluster adds nodes that jobs need, and removes idle nodes."""


@dataclass(frozen=True)
class Settings:
    """The settings of one operator, made from its `Configuration`."""

    data_dir: Path
    store: str | None = None
    """The URL of a PostgreSQL database; None is a file in the data folder."""
    files: str | None = None
    """The URL of an object store; None is the data folder."""
    lost_folder: str | None = None
    """The id of a data folder that is lost for good, and that this one replaces."""
    host: str = "localhost"
    port: int = 8888
    """0 takes any free port."""
    advertise: str = ""
    """The URL at which other operators on the store reach this one; empty is where it listens."""
    lease_s: float = 10
    """The time after which another operator on the store takes over from a leader that hangs."""
    capacity: Capacity | None = None
    """What jobs may use of this machine; None is all of it."""
    ray: Ray | None = None
    """The cluster that runs the jobs; None is this machine."""
    grace_s: float = 10
    """The time between SIGTERM and SIGKILL."""
    require_token: bool = False
    """Every request needs a token. An operator that listens beyond this machine requires tokens in
    any case, unless it is `insecure`."""
    insecure: bool = False
    """Requests from other machines need no token either."""
    builds: BuildRules = DEFAULT_RULES
    account: Account | None = None
    """The system user of the jobs; None is the operator's own."""
    retention: RetentionLimits = RetentionLimits()
    max_waiting_bytes: int | None = None
    """The limit for the configs of all waiting jobs together; None is without a limit."""
    allowed_origins: frozenset[str] = frozenset()
    """Origins of web pages, besides the operator's own, that may send requests."""
    allowed_hosts: frozenset[str] = frozenset()
    """Host names, besides the machine's own, that requests without tokens may use."""

    @property
    def engine_name(self) -> str:
        """The name of the engine that runs the jobs."""
        return "local" if self.ray is None else "ray"

    @property
    def database_url(self) -> str:
        """The URL of the operator's database."""
        return database_url(self.data_dir, self.store)

    @property
    def database(self) -> Path:
        """The file of the database, if it is not a PostgreSQL database."""
        return self.data_dir / DATABASE

    @property
    def lock(self) -> Path:
        """The file that a running operator locks."""
        return self.data_dir / "operator.lock"

    @property
    def folder_id_file(self) -> Path:
        """The file with the id of the data folder."""
        return self.data_dir / "folder.id"

    @property
    def object_store_file(self) -> Path:
        """The file with the id of the folder and the URL of the object store that it has used."""
        return self.data_dir / "object-store"

    @property
    def lost_folder_marker(self) -> Path:
        """The file with the id of the lost folder that this one replaces.

        It exists until that folder's jobs have ended.
        """
        return self.data_dir / "taken-over"

    @property
    def restore_time_file(self) -> Path:
        """The file with the time of the backup that the folder was restored from.

        It exists until the attempts of that time are lost.
        """
        return self.data_dir / "restored"

    @property
    def restore_folder(self) -> Path:
        """The files of a backup while they are being restored."""
        return self.data_dir / ".restoring"

    @property
    def ray_namespace(self) -> Path:
        """The file with the Ray namespace of the operator's agents and reservations."""
        return self.data_dir / "ray-namespace"

    @property
    def projects(self) -> Path:
        return self.data_dir / "projects"

    @property
    def locks(self) -> Path:
        """The lock files of projects: the versions of their packages."""
        return self.data_dir / "locks"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints of jobs on a cluster, where there is no object store."""
        return self.data_dir / "checkpoints"

    @property
    def archived(self) -> Path:
        """A mark for each job whose log is in the object store."""
        return self.data_dir / "archived"

    @property
    def environments(self) -> Path:
        return self.data_dir / "environments"

    @property
    def jobs(self) -> Path:
        return self.data_dir / "jobs"

    @property
    def job_folders(self) -> JobFolders:
        """The folders of the jobs in `jobs`."""
        return JobFolders(self.jobs)
