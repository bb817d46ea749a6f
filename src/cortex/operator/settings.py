"""How an operator is set up, and where in its data folder everything lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cortex.engines.base import Capacity


@dataclass(frozen=True)
class Settings:
    """One operator's configuration; `cortex serve` fills it from its options."""

    data_dir: Path
    host: str = "localhost"
    port: int = 8888
    """0 takes any free port."""
    capacity: Capacity | None = None
    """What jobs may take of this machine; None is all of it."""
    grace_s: float = 10
    """Between SIGTERM and SIGKILL."""
    insecure: bool = False
    """Whether it may listen where other machines reach it."""
    allowed_origins: frozenset[str] = frozenset()
    """Origins of pages, beside the operator's own, whose browsers may send requests."""

    @property
    def database_url(self) -> str:
        return f"sqlite:///{self.data_dir / 'operator.db'}"

    @property
    def lock(self) -> Path:
        return self.data_dir / "operator.lock"

    @property
    def projects(self) -> Path:
        return self.data_dir / "projects"

    @property
    def environments(self) -> Path:
        return self.data_dir / "environments"

    @property
    def jobs(self) -> Path:
        return self.data_dir / "jobs"
