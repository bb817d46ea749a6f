"""The settings of an operator: the type, checks, default and description of each.

A new setting is one field of `Configuration`. Its flag, environment variable and key in the
configuration file follow from the field's name; `cortex serve` makes its options from the fields,
and `docs/configuration.py` its table. `sources` reads the values. What the code needs of a setting
is a field of `Settings`, which `Configuration.settings` fills in.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cortex.objects import check_url as check_files
from cortex.operator.config.hosts import check_host
from cortex.operator.config.settings import (
    Ray,
    RetentionLimits,
    Settings,
    database_url,
    default_data_dir,
)
from cortex.projects.build_rules import BuildRules
from cortex.spec.quantities import MILLI, read_bytes
from cortex.spec.yaml_fields import ENV_NAME
from cortex.store import url as store_url

ENVIRONMENT_PREFIX = "CORTEX_SERVE_"
_DAY_S = 86_400


def flag(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"{ENVIRONMENT_PREFIX}{name.upper()}"


@dataclass(frozen=True)
class Setting:
    """What people read about a setting."""

    help: str
    """What the setting is, in sentences, for `cortex serve --help` and the documentation."""
    metavar: str | None = None
    """The name of the value in `--help`; None is the name of its type."""
    unset: str | None = None
    """What a default of None means."""
    docs: str = ""
    """What docs/configuration.md says after `help`: Markdown, with links from that page."""
    has_secret: bool = False
    """The value may contain a password: errors don't show it."""


def described(configuration: type[BaseModel]) -> Mapping[str, Setting]:
    """The descriptions of a configuration's settings, by name."""
    return {
        name: words
        for name, field in configuration.model_fields.items()
        for words in field.metadata
        if isinstance(words, Setting)
    }


def _check_store(text: str) -> str:
    store_url.read(text)
    return text


def _check_url(text: str) -> str:
    url = urlsplit(text)
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
        raise ValueError("not an operator's URL; write http://HOST:PORT")
    return text.rstrip("/")


def _check_size(text: str) -> str:
    _bytes(text)
    return text


def _bytes(text: str) -> int:
    size = read_bytes(text)
    if size is None:
        raise ValueError("not a size; for 16 GiB write 16Gi")
    return size


def _check_address(text: str) -> str:
    address = _running_cluster() if text == "auto" else text
    host, _, port = address.rpartition(":")
    if not _is_host(host) or not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise ValueError(f"{address!r} is not HOST:PORT; `ray start --head` prints the address")
    return address


def _is_host(text: str) -> bool:
    """Whether a resolver takes this name at all."""
    try:
        text.encode("idna")
    except UnicodeError:
        return False
    return bool(text) and "/" not in text


def _running_cluster() -> str:
    """The address that Ray's own `address="auto"` finds: $RAY_ADDRESS, or that of the cluster which
    the last `ray start` on this machine started or joined."""
    address = os.environ.get("RAY_ADDRESS")
    if address:
        return address
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        return Path(folder, "ray", "ray_current_cluster").read_text("utf-8").strip()
    except OSError as error:
        raise ValueError(
            "no Ray cluster was started on this machine; write the HOST:PORT that "
            "`ray start --head` prints"
        ) from error


def _check_variable(text: str) -> str:
    if not ENV_NAME.fullmatch(text):
        raise ValueError(
            "not the name of a variable; use letters, digits and _, the first not a digit"
        )
    return text


def _split_at_commas(value: object) -> object:
    return [word.strip() for word in value.split(",")] if isinstance(value, str) else value


def _number_as_text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Port = Annotated[int, Field(ge=0, le=65535)]
Days = Annotated[float, Field(ge=0)]
Size = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(_check_size)]
VariableName = Annotated[str, AfterValidator(_check_variable)]
HostName = Annotated[str, AfterValidator(check_host)]
Several = BeforeValidator(_split_at_commas)
"""An environment variable has several values as one text with commas."""


class Configuration(BaseModel):
    """The settings of an operator, by the names that users know.

    A value of None is the default of the machine or the platform, as `Setting.unset` describes it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    host: Annotated[
        str,
        Setting(
            "Address to listen on.",
            docs="`localhost` is 127.0.0.1 where the resolver does not know that name. Beyond this "
            "machine the operator requires [tokens](security.md).",
        ),
    ] = "localhost"
    port: Annotated[Port, Setting("0 takes any free port.")] = 8888
    data_dir: Annotated[
        Path,
        Setting(
            "Folder of the operator's jobs, projects and logs.",
            unset="the platform's folder for user data",
            docs="Also of the database if `store` names none.",
        ),
    ] = Field(default_factory=default_data_dir)
    store: Annotated[
        Annotated[str, AfterValidator(_check_store)] | None,
        Setting(
            "PostgreSQL database, as postgresql://USER@HOST/DATABASE.",
            metavar="URL",
            unset="a file in the data folder",
            docs="With all parts: `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`; see "
            "[PostgreSQL](deploy/README.md#postgresql).",
            has_secret=True,
        ),
    ] = None
    advertise: Annotated[
        Annotated[str, AfterValidator(_check_url)] | None,
        Setting(
            "URL at which other operators on the store reach this one.",
            metavar="URL",
            unset="as it listens",
            docs="As `http://HOST:PORT`.",
        ),
    ] = None
    lease: Annotated[
        float,
        Field(ge=1),
        Setting("Seconds after which another operator takes over from a leader that hangs."),
    ] = 10
    files: Annotated[
        Annotated[str, AfterValidator(check_files)] | None,
        Setting(
            "Object store for projects and the logs of finished jobs, as s3://BUCKET/PREFIX.",
            metavar="URL",
            unset="the data folder",
            docs="Or a folder, as `file:///FOLDER`; see "
            "[An object store](deploy/README.md#an-object-store).",
            has_secret=True,
        ),
    ] = None
    lost_folder: Annotated[
        str | None,
        Setting(
            "Id of a data folder that is lost for good; the jobs of its machine end.",
            metavar="ID",
            docs="This data folder [replaces it]"
            "(deploy/README.md#when-the-operators-machine-is-lost).",
        ),
    ] = None
    cpu: Annotated[
        Annotated[float, Field(ge=0.001)] | None,
        Setting("Cores that jobs may use.", unset="the machine's"),
    ] = None
    mem: Annotated[
        Size | None,
        Setting("Memory that jobs may use, such as 16Gi.", unset="the machine's"),
    ] = None
    gpu: Annotated[
        Annotated[int, Field(ge=0)] | None,
        Setting("GPUs that jobs may use.", unset="the machine's"),
    ] = None
    grace: Annotated[
        float,
        Field(ge=0),
        Setting("Seconds between SIGTERM and SIGKILL when a job is stopped."),
    ] = 10
    build_timeout: Annotated[
        float,
        Field(gt=0),
        Setting(
            "Seconds after which the operator ends the build of an environment.",
            docs="The jobs that [need it](guide.md#dependencies) fail then.",
        ),
    ] = 1800
    build_env: Annotated[
        tuple[VariableName, ...],
        Several,
        Setting(
            "Variable of the operator's environment that builds get as well.",
            metavar="NAME",
            docs="Builds get [the usual ones](guide.md#a-builds-environment-variables) without it.",
        ),
    ] = ()
    engine: Annotated[
        Literal["local", "ray"],
        Setting(
            "Where jobs run: on this machine, or on a Ray cluster.",
            docs="A [Ray cluster](ray.md) also needs `ray_address`.",
        ),
    ] = "local"
    ray_address: Annotated[
        Annotated[str, AfterValidator(_check_address)] | None,
        Setting(
            "The Ray cluster, with a node on this machine; auto finds it.",
            metavar="HOST:PORT",
            docs="`HOST:PORT` is the cluster's head; `auto` is `$RAY_ADDRESS`, or the cluster that "
            "the last `ray start` here joined.",
        ),
    ] = None
    ray_node_dir: Annotated[
        str | None,
        Setting(
            "Folder on Ray's nodes for projects, environments and jobs.",
            metavar="FOLDER",
            unset="a folder of the node's user",
        ),
    ] = None
    ray_autoscaler: Annotated[
        bool,
        Setting(
            "The cluster adds nodes that jobs need, and removes idle ones.",
            docs="See [An autoscaler](ray.md#an-autoscaler).",
        ),
    ] = False
    run_as: Annotated[
        str | None,
        Setting(
            "System user that jobs run as; the operator must run as root.",
            metavar="USER",
            unset="the operator's user",
            docs="See [Whose rights a job has](guide.md#whose-rights-a-job-has).",
        ),
    ] = None
    keep_jobs: Annotated[Days, Setting("Days to keep finished jobs; 0 is for ever.")] = 90
    keep_logs: Annotated[
        Days, Setting("Days to keep the logs and files of finished jobs; 0 is for ever.")
    ] = 30
    keep_count: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Setting("Number of finished jobs to keep for each API, the newest.", unset="any number"),
    ] = None
    keep_audit: Annotated[
        Days,
        Setting(
            "Days to keep the audit; 0 is for ever.",
            docs="See [The audit](security.md#the-audit).",
        ),
    ] = 365
    max_waiting_bytes: Annotated[
        Size,
        Setting(
            "Limit for the config of all waiting jobs; a submit beyond it is refused.",
            metavar="SIZE",
            docs="The answer is 429.",
        ),
    ] = "1Gi"
    require_token: Annotated[
        bool,
        Setting("Require tokens on this machine as well; for other machines they always are."),
    ] = False
    insecure: Annotated[
        bool,
        Setting("Require no tokens: anyone who can reach the operator can run code."),
    ] = False
    allow_origin: Annotated[
        tuple[str, ...],
        Several,
        Setting("Origin of web pages that may call the operator.", metavar="ORIGIN"),
    ] = ()
    allow_host: Annotated[
        tuple[HostName, ...],
        Several,
        Setting(
            "Another host name that requests without tokens may use for the operator.",
            metavar="NAME",
            docs="With a port or without; [the machine's own names](http.md#hosts) are always "
            "allowed.",
        ),
    ] = ()

    @model_validator(mode="after")
    def _store_fits(self) -> Self:
        if self.advertise is not None and self.store is None:
            raise ValueError("--advertise needs --store: it is for several operators on one store")
        return self

    @model_validator(mode="after")
    def _engine_fits(self) -> Self:
        is_ray = self.engine == "ray"
        if is_ray and self.ray_address is None:
            raise ValueError("--engine ray needs --ray-address HOST:PORT")
        if not is_ray and (self.ray_address or self.ray_node_dir or self.ray_autoscaler):
            raise ValueError("--ray-address, --ray-node-dir and --ray-autoscaler need --engine ray")
        for name in ("cpu", "mem", "gpu", "run_as"):
            if is_ray and getattr(self, name) is not None:
                raise ValueError(f"{flag(name)} needs --engine local")
        return self

    @property
    def database_url(self) -> str:
        """The URL of the operator's database."""
        return database_url(self.data_dir.absolute(), self.store)

    def settings(self) -> Settings:
        """What the operator's code needs of the configuration.

        Raises:
            StartupError: jobs cannot run as `run_as`.
        """
        from cortex.engines.base import Capacity
        from cortex.engines.local.machine import detect
        from cortex.system.account import find

        machine = detect()
        return Settings(
            data_dir=self.data_dir.absolute(),
            store=self.store,
            files=self.files,
            lost_folder=self.lost_folder,
            host=self.host,
            port=self.port,
            advertise=self.advertise or "",
            lease_s=self.lease,
            capacity=Capacity(
                cpu_m=machine.cpu_m if self.cpu is None else round(self.cpu * MILLI),
                mem=machine.mem if self.mem is None else _bytes(self.mem),
                gpu=machine.gpu if self.gpu is None else self.gpu,
            ),
            ray=None
            if self.ray_address is None
            else Ray(self.ray_address, self.ray_node_dir, self.ray_autoscaler),
            grace_s=self.grace,
            builds=BuildRules(self.build_timeout, frozenset(self.build_env)),
            account=None if self.run_as is None else find(self.run_as),
            retention=RetentionLimits(
                jobs_s=self.keep_jobs * _DAY_S or None,
                logs_s=self.keep_logs * _DAY_S or None,
                jobs=self.keep_count,
                audit_s=self.keep_audit * _DAY_S or None,
            ),
            max_waiting_bytes=_bytes(self.max_waiting_bytes),
            require_token=self.require_token,
            insecure=self.insecure,
            allowed_origins=frozenset(self.allow_origin),
            allowed_hosts=frozenset(self.allow_host),
        )
