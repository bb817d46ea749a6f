"""One operator: its parts opened in order, its HTTP application, and its process."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace

import structlog
from fastapi import FastAPI

import cortex
from cortex.engines.base import Engine
from cortex.engines.local import LocalEngine
from cortex.errors import StartupError
from cortex.joblog.watch import FileWatch
from cortex.objects import ObjectStore
from cortex.operator.config.settings import Settings
from cortex.operator.data_folder import check_whole, held, held_with_others, make_folders, namespace
from cortex.operator.data_folder_id import settle
from cortex.operator.deploy.catalogue import Catalogue
from cortex.operator.deploy.deployer import Deployer
from cortex.operator.deploy.versions import Versions
from cortex.operator.ha.leadership import Leadership
from cortex.operator.ha.peers import Peers
from cortex.operator.http.answers import Answer, App, Error, Gate, install_error_handlers
from cortex.operator.http.auth import Authentication
from cortex.operator.http.connections import most
from cortex.operator.http.context import Context
from cortex.operator.http.fast_path import FastPath
from cortex.operator.http.hosts import Hosts
from cortex.operator.http.refusals import Refusals
from cortex.operator.http.routes import jobs, logs, operator
from cortex.operator.http.views import Renderer
from cortex.operator.logs.archive import Archive
from cortex.operator.metrics import Metrics
from cortex.operator.server import Server, prepare
from cortex.projects.environments import Environments
from cortex.projects.repository import Projects
from cortex.store import Store


def create_app(ctx: Context, deployer: Deployer, refusals: Refusals) -> App:
    """The HTTP application on an operator's parts."""
    app: App = FastPath(_routes(ctx, deployer), ctx)
    hosts = None
    if ctx.settings.require_token:
        app = Authentication(app, ctx.store, refusals)
    else:
        hosts = Hosts.of(ctx.settings)
    return Gate(app, ctx.settings.allowed_origins, hosts)


def _routes(ctx: Context, deployer: Deployer) -> FastAPI:
    app = FastAPI(
        title="Cortex tasks",
        version=cortex.__version__,
        openapi_url="/-/openapi.json",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        default_response_class=Answer,
        # Else the framework describes a 422 of its own, which is never answered.
        responses={"default": {"model": Error, "description": "What went wrong."}},
        redirect_slashes=False,
    )
    app.state.context = ctx
    app.state.deployer = deployer
    routers = [operator.router, jobs.router, logs.router]
    for router in routers:
        app.include_router(router)
    install_error_handlers(app, [route for router in routers for route in router.routes])
    return app


@asynccontextmanager
async def opened(settings: Settings, failed: Callable[[Exception], None]) -> AsyncIterator[App]:
    """An operator and its application; closed at the end, jobs go on. It leads from the start, unless another
    operator on the same store is the leader.

    Args:
        failed: called when this operator has become the leader and cannot lead: it has to end.

    Raises:
        StartupError: the data folder, the store or the engine cannot be used; the message says why.
    """
    async with AsyncExitStack() as stack:
        make_folders(settings)
        is_shared = settings.store is not None
        files = None if settings.files is None else ObjectStore(settings.files)
        projects = Projects(settings.projects, settings.locks, files)
        hold = held_with_others if is_shared else held
        stack.enter_context(hold(settings, projects.remove_leftovers))
        check_whole(settings)
        store = Store(settings.database_url, settings.max_waiting_bytes)
        stack.callback(store.close)
        data_folder_id = await settle(settings, store, files)
        if settings.require_token:
            await _check_tokens(store)
        environments = Environments(
            settings.environments, settings.account, projects, settings.builds
        )
        # On a cluster each node builds its own.
        versions = Versions(store, projects, environments if settings.ray is None else None)
        stack.push_async_callback(versions.close)
        archive = None
        if files is not None:
            archive = Archive(
                files,
                settings.job_folders,
                store,
                settings.archived,
                is_apart=is_shared and settings.ray is not None,
            )
            stack.callback(archive.end)
        watcher = FileWatch("log watch")
        watcher.open()
        stack.push_async_callback(watcher.close)
        catalogue = Catalogue(store, others_deploy=is_shared)
        await catalogue.refresh()
        peers = Peers(store, catalogue)
        stack.push_async_callback(peers.close)
        metrics = Metrics()
        leadership = Leadership(
            settings, store, peers.jobs, catalogue, versions, projects, environments, archive,
            metrics,
            new_engine=lambda: _engine(settings, data_folder_id, projects), failed=failed,
        )  # fmt: skip
        await peers.open(leadership, settings.lease_s)
        ctx = Context(
            settings, store, peers.jobs, catalogue, versions, Renderer(store, peers.jobs), watcher,
            peers.leader, archive, metrics,
        )  # fmt: skip
        stack.callback(ctx.bodies.close)
        deployer = Deployer(store, projects, catalogue, peers.jobs)
        refusals = Refusals(store)
        stack.push_async_callback(refusals.close)
        yield create_app(ctx, deployer, refusals)


async def run(settings: Settings, ready: Callable[[str], None]) -> None:
    """Run an operator until SIGTERM or SIGINT.

    Args:
        ready: called with the operator's URL once it answers.

    Raises:
        StartupError: it cannot start, or it has become the leader and cannot lead.
    """
    configure_logging()
    # Each running job takes two descriptors here; jobs themselves get what was there before.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if settings.account is not None:
        os.umask(0o022)  # jobs of another user read what is unpacked here
    settings = replace(settings, host=_resolvable(settings.host))
    listener = _listen(settings)
    port = listener.getsockname()[1]
    os.environ["CORTEX_OPERATOR_ENDPOINT"] = _url(
        settings.host, port
    )  # jobs on this machine find it
    settings = replace(
        settings,
        require_token=_asks_for_tokens(settings, listener),
        advertise=settings.advertise or _address(settings.host, port),
    )
    end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with opened(settings, end.set_exception) as app:
        server = Server(app, listener, most(), lambda: ready(_url(settings.host, port)))
        # What was loaded so far stays: a collection while it serves need not look through it.
        gc.freeze()
        gc.enable()
        end.add_done_callback(lambda _: server.handle_exit(signal.SIGTERM, None))
        await server.serve(sockets=[])
    if end.done():
        end.result()


def configure_logging() -> None:
    """Write log events to stderr: one JSON line each, or coloured text on a terminal."""
    terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if terminal else [structlog.processors.format_exc_info]),
            # The default shows the values of local variables, secrets among them.
            structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
            if terminal
            else structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger("info"),
    )


def _asks_for_tokens(settings: Settings, listener: socket.socket) -> bool:
    """Whether requests need a token: whoever can reach the operator can run code, so they do beyond this machine."""
    is_local = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
    return settings.require_token or not (is_local or settings.insecure)


async def _check_tokens(store: Store) -> None:
    if not await store.tokens():
        raise StartupError(
            "tokens are required (the operator listens beyond localhost, or --require-token is set), but "
            "none exists. Anyone who can reach it could run code. Make one with `cortex token create NAME "
            "--scope deploy` (and the same --data-dir), listen on localhost, or use --insecure."
        )


def _resolvable(host: str) -> str:
    """The host; for `localhost` an address of this machine, where the resolver does not know that name."""
    if host != "localhost":
        return host
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror:  # as in an image without /etc/hosts
        with suppress(OSError):
            socket.create_server(("127.0.0.1", 0)).close()
            return "127.0.0.1"
        return "::1"
    return host


def _listen(settings: Settings) -> socket.socket:
    host, port = settings.host, settings.port
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
        prepare(listener)
        return listener
    except (OSError, OverflowError) as error:
        raise StartupError(
            f"cannot listen on {host}:{port}: {error}. Choose another with --host and --port."
        ) from error


def _address(host: str, port: int) -> str:
    """The URL at which other operators reach this one, guessed from the address that it listens on."""
    if host in ("", "0.0.0.0", "::"):
        host = socket.getfqdn()
    return _url(host, port)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _engine(settings: Settings, data_folder_id: str, projects: Projects) -> Engine:
    if settings.ray is None:
        return LocalEngine(
            settings.jobs,
            settings.capacity,
            settings.grace_s,
            account=settings.account,
            inherits=True,
        )
    from cortex.engines.ray import RayEngine
    from cortex.engines.ray.messages import Builds

    return RayEngine(
        settings.jobs,
        settings.ray.address,
        namespace(settings, data_folder_id),
        settings.grace_s,
        settings.ray.node_dir,
        projects,
        Builds(settings.builds.timeout_s, settings.builds.variables),
    )
