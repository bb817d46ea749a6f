"""What users set of an operator: each setting, what it may be, and its default. `sources` reads it for
`cortex serve` and `cortex token`; docs/configuration.md lists what there is.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cortex.objects import check_url as check_files
from cortex.operator.config.settings import Keep, Ray, Settings, database_url, default_data_dir
from cortex.operator.http.host_check import check_host
from cortex.projects.build_rules import BuildRules
from cortex.spec.api import MILLI
from cortex.spec.quantities import read_bytes
from cortex.store import url as store_url

_DAY_S = 86_400
_VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"


def flag(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


def _is_store(text: str) -> str:
    store_url.read(text)
    return text


def _is_http(text: str) -> str:
    url = urlsplit(text)
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
        raise ValueError("no URL of an operator; write http://HOST:PORT")
    return text.rstrip("/")


def _is_size(text: str) -> str:
    _bytes(text)
    return text


def _bytes(text: str) -> int:
    found = read_bytes(text)
    if found is None:
        raise ValueError("no size; write 16Gi")
    return found


def _is_address(text: str) -> str:
    address = _running_cluster() if text == "auto" else text
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise ValueError(f"{address!r} is no HOST:PORT; `ray start --head` prints it")
    return address


def _running_cluster() -> str:
    """As Ray's own `address="auto"`: $RAY_ADDRESS, or where the last `ray start` on this machine wrote it."""
    named = os.environ.get("RAY_ADDRESS")
    if named:
        return named
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        return Path(folder, "ray", "ray_current_cluster").read_text("utf-8").strip()
    except OSError as error:
        raise ValueError(
            "no Ray cluster was started on this machine; write HOST:PORT, as `ray start --head` prints it"
        ) from error


def _separated(found: object) -> object:
    return [word.strip() for word in found.split(",")] if isinstance(found, str) else found


def _as_words(found: object) -> object:
    return str(found) if isinstance(found, int) and not isinstance(found, bool) else found


class Configuration(BaseModel):
    """What users set of an operator, by the names that they use. None is what the machine or the
    platform has."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    host: str = "localhost"
    port: Annotated[int, Field(ge=0, le=65535)] = 8888
    data_dir: Path = Field(default_factory=default_data_dir)
    store: Annotated[str, AfterValidator(_is_store)] | None = None
    advertise: Annotated[str, AfterValidator(_is_http)] | None = None
    lease: Annotated[float, Field(ge=1)] = 10
    files: Annotated[str, AfterValidator(check_files)] | None = None
    lost_folder: str | None = None
    cpu: Annotated[float, Field(ge=0.001)] | None = None
    mem: Annotated[str, BeforeValidator(_as_words), AfterValidator(_is_size)] | None = None
    gpu: Annotated[int, Field(ge=0)] | None = None
    grace: Annotated[float, Field(ge=0)] = 10
    build_timeout: Annotated[float, Field(gt=0)] = 1800
    build_env: Annotated[
        tuple[Annotated[str, Field(pattern=_VARIABLE)], ...], BeforeValidator(_separated)
    ] = ()
    engine: Literal["local", "ray"] = "local"
    ray_address: Annotated[str, AfterValidator(_is_address)] | None = None
    ray_node_dir: str | None = None
    run_as: str | None = None
    keep_jobs: Annotated[float, Field(ge=0)] = 90
    keep_logs: Annotated[float, Field(ge=0)] = 30
    keep_count: Annotated[int, Field(ge=1)] | None = None
    keep_audit: Annotated[float, Field(ge=0)] = 365
    max_waiting_bytes: Annotated[str, BeforeValidator(_as_words), AfterValidator(_is_size)] = "1Gi"
    require_token: bool = False
    insecure: bool = False
    allow_origin: Annotated[tuple[str, ...], BeforeValidator(_separated)] = ()
    allow_host: Annotated[
        tuple[Annotated[str, AfterValidator(check_host)], ...], BeforeValidator(_separated)
    ] = ()

    @model_validator(mode="after")
    def _store_fits(self) -> Self:
        if self.advertise is not None and self.store is None:
            raise ValueError("--advertise: it is for several operators on one --store")
        return self

    @model_validator(mode="after")
    def _engine_fits(self) -> Self:
        is_ray = self.engine == "ray"
        if is_ray and self.ray_address is None:
            raise ValueError("--engine ray needs --ray-address HOST:PORT")
        if not is_ray and (self.ray_address or self.ray_node_dir):
            raise ValueError("--ray-address and --ray-node-dir: say --engine ray too")
        for name in ("cpu", "mem", "gpu", "run_as"):
            if is_ray and getattr(self, name) is not None:
                raise ValueError(f"{flag(name)}: it is for --engine local alone")
        return self

    @property
    def database_url(self) -> str:
        return database_url(self.data_dir.absolute(), self.store)

    def settings(self) -> Settings:
        """The operator's settings.

        Raises:
            StartupError: jobs cannot run as the user that is named.
        """
        from cortex.engines.base import Capacity
        from cortex.engines.local.machine import detect
        from cortex.system.account import find

        found = detect()
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
                cpu_m=found.cpu_m if self.cpu is None else round(self.cpu * MILLI),
                mem=found.mem if self.mem is None else _bytes(self.mem),
                gpu=found.gpu if self.gpu is None else self.gpu,
            ),
            ray=None if self.ray_address is None else Ray(self.ray_address, self.ray_node_dir),
            grace_s=self.grace,
            builds=BuildRules(self.build_timeout, frozenset(self.build_env)),
            account=None if self.run_as is None else find(self.run_as),
            keep=Keep(
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
