"""What jobs of a version need of their node: the project's files, and the environment by its lock files. Made
by the agent, whose slot keeps it.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from pathlib import Path

from cortex.engines.ray.messages import Lock, NodeOrder
from cortex.projects.build_rules import BuildRules
from cortex.projects.environments import Environments
from cortex.projects.repository import Projects
from cortex.projects.unpack import unpack
from cortex.ray_node.workspace import AgentFolder


class Provisions:
    """One node's."""

    def __init__(self, slot: AgentFolder, tell: Callable[[Lock], None]) -> None:
        """
        Args:
            tell: called with each lock file that the operator has not.
        """
        self._projects = Projects(slot.projects, slot.locks)
        self._environments = Environments(slot.environments, projects=self._projects)
        self._tell = tell

    def open(self) -> None:
        """Remove and end what was cut off. Blocking."""
        self._projects.remove_leftovers()
        self._environments.end_leftover_builds()

    def folder(self, project_id: str) -> Path:
        """Where a project's files are, as far as they are here."""
        return self._projects.folder(project_id)

    def take_in(self, project_id: str, archive: bytes) -> None:
        """Keep a project, as it was sent. Two that come at once are the same. Blocking.

        Raises:
            InvalidProject: it is none.
        """
        with self._projects.incoming() as incoming:
            unpack(io.BytesIO(archive), incoming)
            self._projects.install_files(project_id, incoming)

    async def build(self, order: NodeOrder) -> Path:
        """The interpreter of the environment, by the operator's lock files; what it has not, it is told.

        Raises:
            EnvironmentFailed: it cannot be built.
        """
        identity = order.api.project_id
        for name, text in order.locks.items():
            if self._projects.local_lockfile(identity, name) != text:
                await asyncio.to_thread(self._projects.save_lockfile, identity, name, text)
        rules = BuildRules(order.builds.timeout_s, order.builds.variables)
        self._environments.rules = rules
        project = self.folder(identity)
        files = order.api.definition.dependencies
        python = await self._environments.build(project, files)
        await asyncio.to_thread(self._environments.pin_versions, project, files)
        for name, text in self._projects.locks(identity).items():
            if name not in order.locks:
                self._tell(Lock(identity, name, text))
        return python
