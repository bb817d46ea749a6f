"""An operator: opens its parts in order, makes its HTTP application, and runs its process."""

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
from typing import TYPE_CHECKING

import structlog
from fastapi import FastAPI
from starlette.types import ASGIApp

import cortex
from cortex.engines.base import Engine
from cortex.engines.local import LocalEngine
from cortex.errors import StartupError, StorageUnavailable
from cortex.joblog.watch import FileWatch
from cortex.objects import ObjectStore
from cortex.operator.config.settings import Settings
from cortex.operator.data_folder import (
    check_is_intact,
    join_group,
    lock_exclusively,
    lock_shared,
    make_folders,
    ray_namespace,
)
from cortex.operator.deploy.catalogue import Catalogue
from cortex.operator.deploy.deployer import Deployer
from cortex.operator.deploy.versions import Versions
from cortex.operator.ha.leadership import Leadership
from cortex.operator.ha.peers import Peers
from cortex.operator.http.answers import Answer, Error, install_error_handlers
from cortex.operator.http.auth import Authentication
from cortex.operator.http.connections import max_connections
from cortex.operator.http.context import Context
from cortex.operator.http.fast_path import FastPath
from cortex.operator.http.gate import Gate
from cortex.operator.http.host_check import AllowedHosts
from cortex.operator.http.refusals import Refusals
from cortex.operator.http.routes import jobs, logs, operator
from cortex.operator.http.views import Renderer
from cortex.operator.logs.archive import Archive
from cortex.operator.metrics import Metrics
from cortex.operator.server import Server, configure_listener
from cortex.projects.environments import Environments
from cortex.projects.repository import Projects
from cortex.store import Store
from cortex.system.background import Background, in_thread, retrying

if TYPE_CHECKING:
    from cortex.operator.checkpoints import Checkpoints

_CHECK_INTERVAL_S = 10.0


def create_app(ctx: Context, deployer: Deployer, refusals: Refusals) -> ASGIApp:
    """The HTTP application of an operator: the gate, authentication and the routes."""
    app: ASGIApp = FastPath(_routes(ctx, deployer), ctx)
    hosts = None
    if ctx.settings.require_token:
        app = Authentication(app, ctx.store, refusals)
    else:
        hosts = AllowedHosts.from_settings(ctx.settings)
    return Gate(app, ctx.settings.allowed_origins, hosts)


def _routes(ctx: Context, deployer: Deployer) -> FastAPI:
    app = FastAPI(
        title="Cortex tasks",
        version=cortex.__version__,
        openapi_url="/-/openapi.json",
        docs_url=None,  # its page loads scripts from another site
        redoc_url=None,
        default_response_class=Answer,
        # Else the framework documents its own 422, which no route answers.
        responses={"default": {"model": Error, "description": "The request failed."}},
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
async def open_operator(
    settings: Settings, on_failure: Callable[[Exception], None]
) -> AsyncIterator[ASGIApp]:
    """Open an operator's parts, and close them at the end. Jobs continue without the operator.

    The operator leads from its start, unless another one on the same store is the leader.

    Args:
        on_failure: called if this operator becomes the leader and cannot lead. It then has to end.

    Yields:
        The HTTP application.

    Raises:
        StartupError: the data folder, the store or the engine cannot be used; the message says why.
    """
    async with AsyncExitStack() as stack:
        make_folders(settings)
        is_shared = settings.store is not None
        files = None if settings.files is None else ObjectStore(settings.files)
        projects = Projects(settings.projects, settings.locks, files)
        lock = lock_shared if is_shared else lock_exclusively
        checkpoints = None if settings.ray is None else _checkpoints(settings, files)

        def remove_leftovers() -> None:
            projects.remove_leftovers()
            if checkpoints is not None:
                checkpoints.remove_leftovers()

        stack.enter_context(lock(settings, remove_leftovers))
        check_is_intact(settings)
        store = Store(settings.database_url, settings.max_waiting_bytes)
        stack.callback(store.close)
        data_folder_id = await join_group(settings, store, files)
        if files is not None:
            check = Background("the check of the object store failed")
            stack.push_async_callback(check.close)
            check.run(_await_usable(files))
        if settings.require_token:
            await _check_tokens(store)
        environments = Environments(
            settings.environments, settings.account, projects, settings.builds
        )
        # On a cluster, each node builds its environments itself.
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
            stack.push_async_callback(archive.stop)
            await archive.start()
        watcher = FileWatch("log watch")
        watcher.open()
        stack.push_async_callback(watcher.close)
        catalogue = Catalogue(store, others_deploy=is_shared)
        peers = Peers(store, catalogue)
        stack.push_async_callback(peers.close)
        metrics = Metrics()
        leadership = Leadership(
            settings, store, peers.jobs, catalogue, versions, projects, environments, archive,
            checkpoints, metrics,
            new_engine=engine_factory(settings, data_folder_id, projects, checkpoints),
            on_failure=on_failure,
        )  # fmt: skip
        await peers.open(leadership, settings.lease_s)
        ctx = Context(
            settings, store, peers.jobs, catalogue, versions, Renderer(store, peers.jobs), watcher,
            peers.leader, archive, metrics,
        )  # fmt: skip
        stack.callback(ctx.bodies.close)
        deployer = Deployer(
            store, projects, catalogue, peers.jobs.stop_stored, peers.jobs.lasting_refusal
        )
        refusals = Refusals(store)
        stack.push_async_callback(refusals.close)
        yield create_app(ctx, deployer, refusals)


async def run(settings: Settings, on_ready: Callable[[str], None]) -> None:
    """Run an operator until SIGTERM or SIGINT.

    Args:
        on_ready: called with the operator's URL once it answers.

    Raises:
        StartupError: the operator cannot start, or became the leader and cannot lead.
    """
    configure_logging()
    # Each running job takes two descriptors of the operator. Jobs get the limit from before this.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if settings.account is not None:
        os.umask(0o022)  # jobs of another user read what is unpacked here
    settings = replace(settings, host=_resolvable(settings.host))
    listener = _listen(settings)
    port = listener.getsockname()[1]
    url = _url(settings.host, port)
    os.environ["CORTEX_OPERATOR_ENDPOINT"] = url  # jobs on this machine inherit it
    settings = replace(
        settings,
        require_token=_requires_tokens(settings, listener),
        advertise=settings.advertise or guess_url(settings.host, port),
    )
    end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with open_operator(settings, end.set_exception) as app:
        server = Server(app, listener, max_connections(), lambda: on_ready(url))
        # The objects of start-up live on: collections while it serves skip them.
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
            # The default prints the values of local variables, which may be secrets.
            structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
            if terminal
            else structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger("info"),
    )


def _requires_tokens(settings: Settings, listener: socket.socket) -> bool:
    """Whether requests need a token.

    A client that reaches the operator can run code. An operator that other machines can reach
    therefore requires tokens.
    """
    is_local = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
    return settings.require_token or not (is_local or settings.insecure)


async def _await_usable(files: ObjectStore) -> None:
    """Say on the operator's log why its object store cannot be used, until it can be."""
    await retrying(
        lambda: in_thread(files.check),
        (StorageUnavailable, OSError),
        delay_s=_CHECK_INTERVAL_S,
        warning="cannot use the object store; deploys and archived logs wait for it",
    )


async def _check_tokens(store: Store) -> None:
    if not await store.tokens():
        raise StartupError(
            "tokens are required (the operator listens beyond localhost, or --require-token is "
            "set), but none exists. Anyone who can reach it could run code. Make one with "
            "`cortex token create NAME --scope deploy` (and the same --data-dir), listen on "
            "localhost, or use --insecure."
        )


def _resolvable(host: str) -> str:
    """The host; a loopback address for `localhost` if the resolver does not know that name."""
    if host != "localhost":
        return host
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror:  # a container image without /etc/hosts
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
        configure_listener(listener)
        return listener
    except (OSError, OverflowError) as error:
        raise StartupError(
            f"cannot listen on {host}:{port}: {error}. Choose another address with --host and "
            "--port."
        ) from error


def guess_url(host: str, port: int) -> str:
    """The URL at which other operators reach this one, guessed from the address that it listens
    on."""
    if host in ("", "0.0.0.0", "::"):
        host = socket.getfqdn()
    return _url(host, port)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _checkpoints(settings: Settings, files: ObjectStore | None) -> Checkpoints:
    from cortex.operator.checkpoints import Checkpoints  # with the Ray engine

    return Checkpoints(settings.checkpoints, files)


def engine_factory(
    settings: Settings,
    data_folder_id: str,
    projects: Projects,
    checkpoints: Checkpoints | None,
) -> Callable[[], Engine]:
    """Makes the engine of each term. What can fail fails now, also at the start of a follower.

    Raises:
        StartupError: the namespace of a Ray cluster cannot be read or written.
    """
    if settings.ray is None:
        return lambda: LocalEngine(
            settings.jobs,
            settings.capacity,
            settings.grace_s,
            account=settings.account,
            inherits=True,
        )
    from cortex.engines.ray import RayEngine
    from cortex.engines.ray.messages import Builds

    ray, namespace = settings.ray, ray_namespace(settings, data_folder_id)
    return lambda: RayEngine(
        settings.jobs,
        ray.address,
        namespace,
        settings.grace_s,
        ray.node_dir,
        projects,
        Builds(settings.builds.timeout_s, settings.builds.variables),
        checkpoints,
        has_autoscaler=ray.has_autoscaler,
    )
