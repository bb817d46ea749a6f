"""A real HTTP server with scripted answers, for tests of the clients and the command. It contains
no logic of an operator: the tests of the operator check an operator's answers."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Answer:
    """The answer to one request; the stub sends the pieces of the body one by one."""

    status: int = 200
    pieces: Iterable[bytes] = ()
    content_type: str = "application/json"


@dataclass(frozen=True)
class Request:
    """A request that the stub received."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


# The stub receives the request and closes the connection without an answer.
LOST = Answer(status=0)


def answer(value: object, status: int = 200) -> Answer:
    return Answer(status, (json.dumps(value).encode(),))


def events(*pieces: bytes) -> Answer:
    return Answer(200, pieces, "text/event-stream; charset=utf-8")


@dataclass
class OperatorStub:
    """Answers by "METHOD /path?query"; a list of answers is used in order, and its last one repeats."""

    answers: dict[str, Answer | list[Answer]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    port: int = 0
    tls: ssl.SSLContext | None = None

    def __enter__(self) -> OperatorStub:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                stub.requests.append(Request(self.command, self.path, headers, body))
                found = stub.take(f"{self.command} {self.path}")
                if found is LOST:
                    self.close_connection = True
                    return
                self.send_response(found.status)
                self.send_header("Content-Type", found.content_type)
                self.end_headers()
                for piece in found.pieces:
                    self.wfile.write(piece)
                    self.wfile.flush()

            do_GET = do_POST = do_DELETE = _serve  # noqa: N815

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        if self.tls is not None:
            self._server.socket = self.tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *arguments: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        host = "http://127.0.0.1" if self.tls is None else "https://localhost"
        return f"{host}:{self._server.server_port}"

    def take(self, key: str) -> Answer:
        missing = answer({"kind": "not_found", "message": f"the stub has no {key}"}, 404)
        found = self.answers.get(key, missing)
        if isinstance(found, Answer):
            return found
        return found.pop(0) if len(found) > 1 else found[0]


SUBMITTED = {
    "job_id": "01jobjobjobjobjob1",
    "api_name": "iris",
    "kind": "TaskAPI",
    "workers": 1,
    "config": {"C": 0.5},
    "api_id": "01versionversion01",
    "timeout": 60,
    "created_time": "2020-07-16T14:56:10.276007415Z",
}
RUNNING = {
    **SUBMITTED,
    "status": "status_running",
    "start_time": "2020-07-16T14:56:10.276007415Z",
    "worker_counts": {"pending": 1, "running": 0},
    "message": "needs 32 GiB, 31 GiB free",
}
SUCCEEDED = {
    **SUBMITTED,
    "status": "status_succeeded",
    "start_time": "2020-07-16T14:56:11.000000000Z",
    "end_time": "2020-07-16T14:57:13.000000000Z",
    "exit_code": 0,
    "result": {"accuracy": 0.9, "note": "[bold]größer"},
}
SPEC = {
    "name": "iris",
    "kind": "TaskAPI",
    "api_id": "01versionversion01",
    "last_updated": "2020-07-16T14:56:10.276007415Z",
}
VIEW = {
    "spec": SPEC,
    "endpoint": "http://127.0.0.1:8888/iris",
    "task_job_statuses": [RUNNING, SUCCEEDED],
    "api_versions": [
        {"api_id": "01versionversion01", "last_updated": "2020-07-16T14:56:10.276007415Z"}
    ],
}


def job_view(status: dict[str, object]) -> dict[str, object]:
    return {
        "job_status": status,
        "endpoint": f"http://127.0.0.1:8888/iris/{status['job_id']}",
        "api_spec": SPEC,
    }
