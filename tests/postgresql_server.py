"""Runs a real PostgreSQL server in a temporary folder. Tests may kill and restart it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

_NOBODY = 65534
# PostgreSQL refuses to run as root.
_AS_NOBODY = ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"]
_WAIT_TIMEOUT_S = 60
USER, PASSWORD = "cortex", "a:b/c@d ?#%"


def _binaries() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    assert found, (
        "no PostgreSQL on this machine: `make test` installs it, or `apt-get install postgresql`"
    )
    return found[-1].parent


def program(name: str) -> str:
    """The path of a PostgreSQL program of the server's version."""
    return str(_binaries() / name)


class PostgreSQLServer:
    """A server on a Unix socket in its folder. `USER` owns the databases and needs `PASSWORD`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.log = folder / "log"
        self.settings: dict[str, str] = {}
        self.popen: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen
        self._process: subprocess.Popen[bytes] | None = None

    def make(self) -> None:
        """Make the server's files, start it, and create `USER`."""
        if os.geteuid() == 0:
            os.chown(self.folder, _NOBODY, _NOBODY)
        self.folder.chmod(0o755)
        initdb = [str(_binaries() / "initdb"), "--no-sync", "--no-instructions", "--auth=trust"]
        options = [
            "--username=postgres",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
            "-D",
            str(self.data),
        ]
        subprocess.run(
            [*self._as_owner(), *initdb, *options],
            check=True, cwd="/", stdout=subprocess.DEVNULL,
        )  # fmt: skip
        hba = "local all postgres trust\nlocal all all scram-sha-256\n"
        (self.data / "pg_hba.conf").write_text(hba)
        self.start()
        with self.connected() as connection:
            password = PASSWORD.replace("'", "''")
            connection.execute(f"CREATE ROLE {USER} LOGIN PASSWORD '{password}'")

    def start(self) -> None:
        """Start the server, and wait until it accepts connections."""
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.folder),
            "shared_buffers": "16MB",
            "max_connections": "60",
            **self.settings,
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        deadline = time.monotonic() + _WAIT_TIMEOUT_S
        while True:
            with self.log.open("ab") as log:
                self._process = self.popen(
                    [*self._as_owner(), str(_binaries() / "postgres"), "-D", str(self.data), *options],
                    cwd="/", stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
            while self._process.poll() is None:
                with contextlib.suppress(psycopg.OperationalError), self.connected():
                    return
                assert time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.02)
            # Processes of a killed server may keep its shared memory for a moment.
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        """Send SIGKILL to all processes of the server, as in a crash of the machine."""
        assert self._process is not None
        pid = self._process.pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)  # otherwise it would restart its killed children
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in [*map(int, children), pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """Stop the server without waiting for clients (PostgreSQL's fast shutdown)."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(_WAIT_TIMEOUT_S)

    def remove(self) -> None:
        """Kill the server, and remove its files."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        shutil.rmtree(self.folder)

    @contextmanager
    def connected(self, database: str = "postgres") -> Iterator[psycopg.Connection]:
        """A connection as the administrator of the server."""
        with psycopg.connect(
            host=str(self.folder), user="postgres", dbname=database, autocommit=True
        ) as connection:
            yield connection

    def url(self, database: str, user: str = USER, password: str = PASSWORD) -> str:
        """The URL of a database, for `cortex serve --store`."""
        from urllib.parse import quote

        return f"postgresql://{user}:{quote(password, safe='')}@/{database}?host={self.folder}"

    def create(self, template: str | None = None, **more: str) -> str:
        """Create a database; its name."""
        name = f"d{uuid.uuid4().hex[:12]}"
        options = {"OWNER": USER, **more, **({"TEMPLATE": template} if template else {})}
        words = " ".join(f"{key} {value}" for key, value in options.items())
        with self.connected() as connection:
            connection.execute(f"CREATE DATABASE {name} {words}")
        return name

    def drop(self, database: str) -> None:
        """Remove a database, even if it has connections."""
        with self.connected() as connection:
            connection.execute(f"DROP DATABASE {database} WITH (FORCE)")

    def _as_owner(self) -> list[str]:
        return _AS_NOBODY if os.geteuid() == 0 else []


@contextmanager
def server() -> Iterator[PostgreSQLServer]:
    """A server for the duration of the block. The path of a Unix socket must be short."""
    made = PostgreSQLServer(Path(tempfile.mkdtemp(prefix="pg-")))
    try:
        made.make()
        yield made
    finally:
        made.remove()
