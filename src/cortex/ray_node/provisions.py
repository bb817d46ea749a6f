"""The projects and environments on a node, which jobs need. The agent calls it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from cortex.engines.ray.messages import Lock, NodeOrder
from cortex.projects.build_rules import BuildRules
from cortex.projects.environments import Environments
from cortex.projects.repository import Projects
from cortex.projects.unpack import unpack
from cortex.ray_node.workspace import AgentFolder
from cortex.system.background import in_thread

_MAX_BUILT = 1000  # an operator that is killed reports no deleted versions


class Provisions:
    """The projects and environments of one node."""

    def __init__(self, folder: AgentFolder, on_new_lock: Callable[[Lock], None]) -> None:
        """
        Args:
            folder: the agent's.
            on_new_lock: called with each lock file that the operator lacks.
        """
        self._projects = Projects(folder.projects, folder.locks)
        self._environments = Environments(folder.environments, projects=self._projects)
        self._on_new_lock = on_new_lock
        self._built: dict[str, tuple[dict[str, str], Path]] = {}
        """The lock files and the interpreter of the versions that need no further build, by the ids
        of the versions."""

    def open(self) -> None:
        """Clean up after an agent that was killed. Blocking."""
        self._projects.remove_leftovers()
        self._environments.end_leftover_builds()

    def folder(self, project_id: str) -> Path:
        """The folder of a project, which exists if the node has the project."""
        return self._projects.folder(project_id)

    def incoming(self) -> AbstractContextManager[Path]:
        """A path for an incoming file; see `Projects.incoming`."""
        return self._projects.incoming()

    def store_project(self, project_id: str, archive: IO[bytes]) -> None:
        """Store a project. Concurrent calls with the same project are harmless. Blocking.

        Raises:
            InvalidProject: the archive is invalid.
        """
        with self._projects.incoming() as incoming:
            unpack(archive, incoming)
            self._projects.install_files(project_id, incoming)

    async def build(self, order: NodeOrder, report_phase: Callable[[str], None]) -> Path:
        """Build the environment of a job from the operator's lock files.

        `on_new_lock` receives each lock file that the operator lacks.

        Args:
            report_phase: called with what the job waits for, if a build has to be waited for.

        Returns:
            The environment's interpreter.

        Raises:
            EnvironmentFailed: the environment cannot be built.
        """
        rules = BuildRules(order.builds.timeout_s, order.builds.variables)
        self._environments.rules = rules
        known = self._built.get(order.api.api_id)
        if known is not None and known[0] == order.locks and known[1].exists():
            return known[1]
        identity = order.api.project_id
        for name, text in order.locks.items():
            if self._projects.local_lockfile(identity, name) != text:
                await in_thread(self._projects.save_lockfile, identity, name, text)
        project = self.folder(identity)
        files = order.api.definition.dependencies
        phase = f"its environment is being built on {os.uname().nodename}"
        python = await self._environments.build(project, files, lambda: report_phase(phase))
        await in_thread(self._environments.pin_versions, project, files)
        locks = self._projects.locks(identity)
        for name, text in locks.items():
            if name not in order.locks:
                self._on_new_lock(Lock(identity, name, text))
        if locks == order.locks:
            self._built[order.api.api_id] = locks, python
            if len(self._built) > _MAX_BUILT:
                del self._built[next(iter(self._built))]
        return python

    def forget(self, api_id: str) -> None:
        """Forget what was built for a version; its environment stays."""
        self._built.pop(api_id, None)
