"""The operator's fork servers: one warm interpreter per deployed version, started when a job needs
it. Called by the local engine alone, on its event loop.
"""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from pathlib import Path

import structlog

import cortex
from cortex.engines.base import Version
from cortex.engines.local.cgroups import CgroupManager
from cortex.engines.local.fork_server import ForkServer
from cortex.engines.local.orphans import Orphans
from cortex.engines.local.supervisor import SupervisorHandle
from cortex.engines.local.supervisor_pool import OrderListener
from cortex.system.account import Account
from cortex.system.background import Background
from cortex.worker import beneath
from cortex.worker.messages import Order, Setup
from cortex.worker.workspace import COPY

log = structlog.get_logger()

MAX_FORK_SERVERS = 8
"""Beyond that number the pool retires the fork servers without waiting orders that were used
longest ago."""
# Jobs get the limit that the operator started with, even if the operator has raised its own.
OPEN_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class ForkServerPool:
    """All fork servers of an engine, the most recently used ones last."""

    def __init__(
        self,
        listener: OrderListener,
        import_dir: Path,
        workspaces: Path,
        orphans: Orphans,
        account: Account | None,
        groups: CgroupManager,
    ) -> None:
        self.own_folder = COPY
        """How each job gets the project to itself. The engine sets it when it opens."""
        self._listener = listener
        self._orphans = orphans
        self._account = account
        self._groups = groups
        self._import_dir = import_dir
        self._workspaces = workspaces
        self._servers: OrderedDict[str, ForkServer] = OrderedDict()
        # By version and module: why the module is not imported ahead.
        self._refused: dict[str, dict[str, str]] = {}
        self._all: set[ForkServer] = set()
        self._background = Background("a fork server failed")

    def submit_order(self, version: Version, order: Order) -> None:
        """Let the version's fork server carry out the order. The listener gets the outcome."""
        server = self._get_or_spawn(version)
        server.supervisors.submit_order(order)
        server.report_waiting_orders()
        self._trim()

    def send_order_on_hold(self, version: Version, order: Order) -> SupervisorHandle | None:
        """Send an order on hold to an idle supervisor of the version, if there is one."""
        server = self._servers.get(version.api.api_id)
        is_same = server is not None and server.version == version
        return (
            server.supervisors.send_order_on_hold(order) if server is not None and is_same else None
        )

    def warm(self, version: Version) -> None:
        """Start the version's fork server, if it does not run."""
        self._get_or_spawn(version)
        self._trim()

    def withdraw_order(self, version: Version, job_id: str) -> bool:
        """Remove an order that no supervisor has received; False if there is none of this job."""
        server = self._servers.get(version.api.api_id)
        return server is not None and server.supervisors.withdraw_order(job_id)

    def forget(self, api_id: str) -> None:
        """Retire the fork server of a version that gets no more jobs."""
        self._refused.pop(api_id, None)
        server = self._servers.get(api_id)
        if server is not None:
            self._retire(server)

    def processes(self) -> set[int]:
        """The pids of the fork servers and their supervisors.

        Raises:
            OSError: no descriptor is left to read them.
        """
        pids = {server.pid for server in self._all if server.pid is not None}
        return pids.union(*(server.supervisors.pids() for server in self._all))

    async def end_leftovers(self) -> None:
        """End the processes that killed supervisors left. A fork server does that for its
        supervisors, unless it is stopped. If this operator inherits the processes of a fork server,
        it kills the stopped fork server and ends them itself; else it resumes the fork server."""
        for server in list(self._all):
            if self._orphans.is_inheriting:
                await server.kill_if_stopped()
            else:
                server.resume()
        await self._orphans.end_orphans()

    async def close(self) -> None:
        """Close all fork servers. Supervisors exit when their jobs end."""
        self._servers.clear()
        for server in list(self._all):
            server.supervisors.detach()
            self._close_later(server)
        await self._background.finish()

    def _get_or_spawn(self, version: Version) -> ForkServer:
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
            on_died=self._on_died,
            on_drained=self._close_later,
        )
        self._servers[version.api.api_id] = server
        self._all.add(server)
        self._background.run(server.spawn())
        return server

    def _on_died(self, server: ForkServer) -> None:
        api_id = server.version.api.api_id
        if self._servers.get(api_id) is server:
            del self._servers[api_id]
        orders = list(server.supervisors.waiting.values())
        self._close_later(server)
        if server.ready or server.was_killed:
            for order in orders:
                self._listener.on_order_unanswered(order.job_id)
        elif server.importing is not None and server.setup.preload:
            name, why = server.importing, server.why_not_imported()
            log.warning("not imported ahead", api_id=api_id, module=name, reason=why)
            self._refused.setdefault(api_id, {})[name] = why
            for order in orders:
                self.submit_order(server.version, order)
        else:
            reason = f"the environment's Python could not start: {server.last_output()}"
            is_temporary, listener = server.has_shortage, self._listener
            report = listener.on_order_blocked if is_temporary else listener.on_order_failed
            for order in orders:
                report(order.job_id, reason)

    def _trim(self) -> None:
        if len(self._servers) <= MAX_FORK_SERVERS:
            return
        idle = [server for server in self._servers.values() if not server.supervisors.waiting]
        for server in idle[: max(0, len(idle) - MAX_FORK_SERVERS)]:
            self._retire(server)

    def _retire(self, server: ForkServer) -> None:
        """Give the fork server no more orders, and close it once its waiting orders are sent."""
        self._servers.pop(server.version.api.api_id, None)
        server.supervisors.retire()
        if not server.supervisors.waiting:
            self._close_later(server)

    def _close_later(self, server: ForkServer) -> None:
        # A closed fork server stays in `_all` while it has supervisors: `close` detaches from them.
        self._all = {each for each in self._all if not each.is_finished}
        self._background.run(self._close(server))

    async def _close(self, server: ForkServer) -> None:
        await server.close()
        await self._orphans.end_orphans()

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


_INHERITED_VARIABLES = [
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
    """The environment variables of the version's workers that do not depend on the job."""
    folder = version.python.parent
    env = {name: os.environ[name] for name in _INHERITED_VARIABLES if name in os.environ}
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
    # The parent folder may belong to the jobs' user, who could replace it by a link. The folder
    # above that belongs to the operator.
    try:
        with beneath.opened(str(folder.parents[1]), folder.parent.name, folder.name) as venv:
            return beneath.stat(venv, "pyvenv.cfg") is not None
    except (OSError, IndexError):  # an interpreter of the system, right below the root
        return False
