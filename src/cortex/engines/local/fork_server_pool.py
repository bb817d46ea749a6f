"""The operator's side of fork servers: one warm interpreter per deployed version, started when a job
needs it. Called by the local engine alone; everything here runs on its event loop.
"""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from pathlib import Path

import structlog

import cortex
from cortex.engines.base import Version
from cortex.engines.local.cgroups import Groups
from cortex.engines.local.fork_server import ForkServer
from cortex.engines.local.orphans import Orphans
from cortex.engines.local.supervisor import SupervisorHandle
from cortex.engines.local.supervisor_pool import Listener
from cortex.system.account import Account
from cortex.system.background import Background
from cortex.worker import beneath
from cortex.worker.messages import Order, Setup
from cortex.worker.workspace import COPY

log = structlog.get_logger()

MOST_IDLE = 8
# A job has what the operator began with, also where that has raised its own.
OPEN_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class ForkServerPool:
    """All fork servers of an engine, the most recently used ones last."""

    def __init__(
        self,
        listener: Listener,
        import_dir: Path,
        workspaces: Path,
        inherited: Orphans,
        account: Account | None,
        groups: Groups,
    ) -> None:
        self.own_folder = COPY
        """How jobs have their projects to themselves; the engine finds out when it opens."""
        self._listener = listener
        self._inherited = inherited
        self._account = account
        self._groups = groups
        self._import_dir = import_dir
        self._workspaces = workspaces
        self._servers: OrderedDict[str, ForkServer] = OrderedDict()
        # By version: why a module is not imported ahead.
        self._refused: dict[str, dict[str, str]] = {}
        self._all: set[ForkServer] = set()
        self._background = Background("a fork server failed")

    def order(self, version: Version, order: Order) -> None:
        server = self._of(version)
        server.crew.order(order)
        server.tell_waiting()
        self._trim()

    def prepare(self, version: Version, order: Order) -> SupervisorHandle | None:
        """Give an order that is held to a supervising process, if one waits for any."""
        server = self._servers.get(version.api.api_id)
        is_same = server is not None and server.version == version
        return server.crew.prepare(order) if server is not None and is_same else None

    def warm(self, version: Version) -> None:
        self._of(version)
        self._trim()

    def withdraw(self, version: Version, job_id: str) -> bool:
        """Take back an order that was given to nobody yet."""
        server = self._servers.get(version.api.api_id)
        return server is not None and server.crew.withdraw(job_id)

    def forget(self, api_id: str) -> None:
        self._refused.pop(api_id, None)
        server = self._servers.get(api_id)
        if server is not None:
            self._retire(server)

    def processes(self) -> set[int]:
        """The fork servers and their supervising processes, by pid.

        Raises:
            OSError: there are no descriptors to find out with.
        """
        pids = {server.pid for server in self._all if server.pid is not None}
        return pids.union(*(server.crew.pids() for server in self._all))

    async def tidy(self) -> None:
        """End what killed supervising processes have left. A fork server does that, unless it was stopped: then
        it is ended as well, where what it has inherited is the operator's then."""
        for server in list(self._all):
            if self._inherited.is_on:
                await server.end_if_stopped()
            else:
                server.go_on()
        await self._inherited.end()

    async def close(self) -> None:
        self._servers.clear()
        for server in list(self._all):
            server.crew.let_go()
            self._end(server)
        await self._background.finish()

    def _of(self, version: Version) -> ForkServer:
        api_id = version.api.api_id
        server = self._servers.get(api_id)
        if server is not None and server.version != version:
            self._retire(server)
            server = None
        if server is None:
            server = self._spawn(version)
        self._servers.move_to_end(api_id)
        return server

    def _spawn(self, version: Version) -> ForkServer:
        setup = self._setup(version, self._refused.get(version.api.api_id, {}))
        server = ForkServer(
            version,
            setup,
            self._account,
            self._groups,
            listener=self._listener,
            died=self._died,
            drained=self._end,
        )
        self._servers[version.api.api_id] = server
        self._all.add(server)
        self._background.run(server.spawn())
        return server

    def _died(self, server: ForkServer) -> None:
        api_id = server.version.api.api_id
        if self._servers.get(api_id) is server:
            del self._servers[api_id]
        orders = list(server.crew.waiting.values())
        self._end(server)
        if server.ready or server.was_killed:
            for order in orders:
                self._listener.unanswered(order.job_id)
        elif server.importing is not None and server.setup.preload:
            name, why = server.importing, server.why_not_imported()
            log.warning("not imported ahead", api_id=api_id, module=name, reason=why)
            self._refused.setdefault(api_id, {})[name] = why
            for order in orders:
                self.order(server.version, order)
        else:
            reason = f"the environment's Python could not start: {server.last_words()}"
            tell = self._listener.held_up if server.is_held_up else self._listener.not_forked
            for order in orders:
                tell(order.job_id, reason)

    def _trim(self) -> None:
        if len(self._servers) <= MOST_IDLE:
            return
        idle = [server for server in self._servers.values() if not server.crew.waiting]
        for server in idle[: max(0, len(idle) - MOST_IDLE)]:
            self._retire(server)

    def _retire(self, server: ForkServer) -> None:
        """It gets no more orders, and ends when those it has are given."""
        self._servers.pop(server.version.api.api_id, None)
        server.crew.retire()
        if not server.crew.waiting:
            self._end(server)

    def _end(self, server: ForkServer) -> None:
        # Kept as long as jobs of it run: their supervising processes are let go of with the rest.
        self._all = {each for each in self._all if not each.is_over}
        self._background.run(self._close(server))

    async def _close(self, server: ForkServer) -> None:
        await server.close()
        await self._inherited.end()

    def _setup(self, version: Version, refused: dict[str, str]) -> Setup:
        definition, project = version.api.definition, version.project.absolute()
        return Setup(
            package=str(Path(cortex.__file__).parent),
            import_dir=str(self._import_dir),
            open_files=OPEN_FILES,
            own_folder=self.own_folder,
            own_root=str(self._workspaces),
            project=str(project),
            python_path=str(project / definition.python_path) if definition.python_path else None,
            path=str(project / definition.path) if definition.path else None,
            command=definition.command,
            env=environment(version, self._account),
            preload=[name for name in definition.preload if name not in refused],
            refused=refused,
        )


_PASSED_ON = [
    "HOME",
    "USER",
    "LOGNAME",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "CORTEX_OPERATOR_ENDPOINT",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
]


def environment(version: Version, account: Account | None) -> dict[str, str]:
    """What a worker of this version finds in its environment, whichever job it runs."""
    folder = version.python.parent
    env = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    env["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    if _is_environment(folder.parent):
        env["VIRTUAL_ENV"] = str(folder.parent)
    return {
        **env,
        **(account.variables if account else {}),
        **version.env,
        "CORTEX_API_NAME": version.api.name,
        "CORTEX_LOG_LEVEL": version.api.definition.log_level,
        "PYTHONUNBUFFERED": "1",
    }


def _is_environment(folder: Path) -> bool:
    # It lies in a folder that may be the jobs' user's, which lies in one that is not.
    try:
        with beneath.opened(str(folder.parents[1]), folder.parent.name, folder.name) as venv:
            return beneath.stat(venv, "pyvenv.cfg") is not None
    except (OSError, IndexError):  # it is right below the root, as an interpreter of the system is
        return False
