"""One operator: its parts opened in order, its HTTP application, and its process."""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import structlog
import uvicorn
from fastapi import FastAPI

import cortex
from cortex.engines.local import LocalEngine
from cortex.errors import StartupError
from cortex.operator import admin, jobs
from cortex.operator.context import Context
from cortex.operator.deploys import Deployer
from cortex.operator.dispatcher import Dispatcher
from cortex.operator.http import Answer, Gate, install_error_handlers
from cortex.operator.logs import LogWatcher
from cortex.operator.render import Renderer
from cortex.operator.settings import Settings
from cortex.operator.versions import Versions
from cortex.projects.environments import Environments
from cortex.store import Store

# Long polls and followed logs are cut off after this; clients ask again.
_SHUTDOWN_S = 2


def create_app(ctx: Context, deployer: Deployer) -> FastAPI:
    """The HTTP application on an operator's parts."""
    app = FastAPI(
        title="Cortex tasks",
        version=cortex.__version__,
        openapi_url="/-/openapi.json",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        default_response_class=Answer,
        redirect_slashes=False,
    )
    app.state.context = ctx
    app.state.deployer = deployer
    app.include_router(admin.router)
    app.include_router(jobs.router)
    install_error_handlers(app, [*admin.router.routes, *jobs.router.routes])
    app.add_middleware(Gate, allowed_origins=ctx.settings.allowed_origins)
    return app


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[FastAPI]:
    """An operator that drives its jobs, and its application; closed at the end, jobs go on.

    Raises:
        StartupError: the data folder, the store or the engine cannot be used; it says why.
    """
    async with AsyncExitStack() as stack:
        _make_folders(settings)
        stack.enter_context(_locked(settings.lock))
        store = Store(settings.database_url)
        stack.callback(store.close)
        engine = LocalEngine(settings.jobs, settings.capacity, settings.grace_s)
        versions = Versions(store, settings.projects, Environments(settings.environments))
        stack.push_async_callback(versions.close)
        dispatcher = Dispatcher(store, engine, versions)
        watcher = LogWatcher()
        watcher.open()
        stack.push_async_callback(watcher.close)
        await engine.open(dispatcher.observed)
        stack.push_async_callback(engine.close)
        stack.push_async_callback(dispatcher.close)
        ctx = Context(
            settings, store, engine, versions, dispatcher,
            Renderer(store, dispatcher, versions), watcher,
        )  # fmt: skip
        await ctx.refresh_endpoints()
        await dispatcher.open()
        deployer = Deployer(ctx)
        await deployer.open()
        stack.push_async_callback(deployer.close)
        yield create_app(ctx, deployer)


async def run(settings: Settings, ready: Callable[[str], None]) -> None:
    """Run an operator until SIGTERM or SIGINT.

    Args:
        ready: called with the operator's URL once it answers.

    Raises:
        StartupError: it cannot start, and why.
    """
    configure_logging()
    listener = _listen(settings)
    async with opened(settings) as app:
        port = listener.getsockname()[1]
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_SHUTDOWN_S,
        )
        ready(f"http://{settings.host}:{port}")
        await _Server(config).serve(sockets=[listener])


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again when it has shut down, before our parts are closed.
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


def configure_logging() -> None:
    """Events to stderr: one JSON line each, or coloured words on a terminal."""
    terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if terminal else [structlog.processors.format_exc_info]),
            structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger("info"),
    )


def _listen(settings: Settings) -> socket.socket:
    host, port = settings.host, settings.port
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if not (settings.insecure or ipaddress.ip_address(address[0]).is_loopback):
            raise StartupError(
                f"{host} is reached from other machines, and whoever reaches the operator can run "
                "code here. Listen on localhost behind a proxy that asks who it is, or say --insecure."
            )
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # asyncio sets it only on sockets that name their protocol; Nagle's algorithm would hold an
        # answer's body back until the client's delayed acknowledgement of its head: 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, OverflowError) as error:
        raise StartupError(
            f"cannot listen on {host}:{port}: {error}. Choose another with --host and --port."
        ) from error


def _make_folders(settings: Settings) -> None:
    try:
        for folder in (settings.projects, settings.environments, settings.jobs):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(
            f"the data folder {settings.data_dir} cannot be used: {error}. "
            "Choose another with --data-dir, or give this user the right to write there."
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the data folder: two operators on one would both drive its jobs."""
    try:
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise StartupError(
                    f"the data folder {path.parent} is in use by another operator (pid "
                    f"{file.read().strip() or 'unknown'}). Stop that one, or choose another folder "
                    "with --data-dir."
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield
    except PermissionError as error:
        raise StartupError(f"{path} cannot be written: {error}") from error
