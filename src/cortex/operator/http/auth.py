"""Authentication: every request brings a token, whose scope has to be wide enough for it."""

from __future__ import annotations

import asyncio
import re

from cortex.errors import CortexError, Forbidden, StorageUnavailable, Unauthorized
from cortex.operator.http.answers import App, Message, Receive, Scope, Send, refuse
from cortex.operator.http.context import client_address
from cortex.operator.http.refusals import Refusals
from cortex.spec.audit import Actor
from cortex.spec.tokens import Scope as TokenScope
from cortex.spec.tokens import digest
from cortex.store import Store

_OPEN = frozenset({"/healthz", "/readyz"})  # what probes of load balancers ask
_JOBS = re.compile(r"/-/apis/[^/]+/jobs(/.*)?", re.DOTALL)
_BEARER = re.compile(rb"bearer +([!-~]{1,512})", re.IGNORECASE)
_AUDIT = "/-/audit"
_POLL_INTERVAL_S = 1.0
_CLOSE = {"Connection": "close"}  # for the body that may follow is not going to be read
_INVALID = 'Bearer error="invalid_token"'
_MISSING = (
    "this operator wants a token, as 'Authorization: Bearer …'; whoever runs it makes one "
    "with `cortex token create`. The command takes it with `cortex env configure --token` or "
    "from $CORTEX_TOKEN"
)
_REVOKED = "the token is not known here, or was revoked; ask whoever runs the operator for another"


class Authentication:
    """ASGI middleware, in front of all that reads a body. A token is looked up for each request, and
    again and again while an answer to a GET goes on: a revoked token ends a followed log and a long poll."""

    def __init__(self, app: App, store: Store, refusals: Refusals) -> None:
        self._app = app
        self._store = store
        self._refusals = refusals
        self._answers: dict[_Answer, str] = {}
        self._watch: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN:
            await self._app(scope, receive, send)
            return
        given = _BEARER.fullmatch(dict(scope["headers"]).get(b"authorization", b""))
        if given is None:
            await self._refuse(scope, receive, send, Unauthorized(_MISSING), "Bearer")
            return
        known_by = digest(given[1].decode())
        try:
            token = await self._store.token(known_by)
        except StorageUnavailable as error:
            await refuse(error, _CLOSE)(scope, receive, send)
            return
        if token is None:
            await self._refuse(scope, receive, send, Unauthorized(_REVOKED), _INVALID)
            return
        scope["token"] = token.name
        wants = wanted(scope["method"], scope["path"])
        if not token.scope.allows(wants):
            words = f"the token's scope is {token.scope.value!r}, and this needs {wants.value!r}"
            challenge = f'Bearer error="insufficient_scope", scope="{wants.value}"'
            await self._refuse(scope, receive, send, Forbidden(words), challenge)
        elif scope["method"] == "GET":
            await self._answer(scope, receive, send, known_by)
        else:
            await self._app(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, known_by: str) -> None:
        """Answer a GET, for as long as there is a token of this digest."""
        answer = _Answer(send)
        self._answers[answer] = known_by
        if self._watch is None:
            self._watch = asyncio.create_task(self._end_revoked())
        try:
            await self._app(scope, receive, answer.send)
        except asyncio.CancelledError:
            if not answer.is_revoked:
                raise
            answer.task.uncancel()
            if not answer.has_begun:
                await self._refuse(scope, receive, send, Unauthorized(_REVOKED), _INVALID)
        finally:
            del self._answers[answer]

    async def _refuse(
        self, scope: Scope, receive: Receive, send: Send, error: CortexError, challenge: str
    ) -> None:
        actor = Actor(scope.get("token"), client_address(scope))
        self._refusals.add(actor, scope["method"], error.kind)
        headers = {**_CLOSE, "WWW-Authenticate": challenge}
        await refuse(error, headers)(scope, receive, send)

    async def _end_revoked(self) -> None:
        while self._answers:
            await asyncio.sleep(_POLL_INTERVAL_S)
            asked = dict(self._answers)  # others come while the store is asked
            try:
                known = await self._store.known_tokens(set(asked.values()))
            except StorageUnavailable:
                continue
            for answer, known_by in asked.items():
                is_open = answer in self._answers and not answer.is_revoked
                if is_open and known_by not in known:
                    answer.is_revoked = True
                    answer.task.cancel()
        self._watch = None


class _Answer:
    """The answer to a GET while it goes on."""

    __slots__ = ("_send", "has_begun", "is_revoked", "task")

    def __init__(self, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.has_begun = False
        self.is_revoked = False
        self._send = send

    async def send(self, message: Message) -> None:
        self.has_begun = True
        await self._send(message)


def wanted(method: str, path: str) -> TokenScope:
    """The scope that a request needs."""
    if path == _AUDIT:
        return TokenScope.DEPLOY
    if method in ("GET", "HEAD", "OPTIONS"):
        return TokenScope.READ
    is_of_jobs = not path.startswith("/-/") or _JOBS.fullmatch(path)
    return TokenScope.SUBMIT if is_of_jobs else TokenScope.DEPLOY
