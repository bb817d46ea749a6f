"""Authentication: every request needs a token whose scope covers it."""

from __future__ import annotations

import asyncio
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cortex.errors import CortexError, Forbidden, StorageUnavailable, Unauthorized
from cortex.operator.http.answers import refusal
from cortex.operator.http.context import client_address
from cortex.operator.http.refusals import Refusals
from cortex.spec.audit import Actor
from cortex.spec.tokens import Scope as TokenScope
from cortex.spec.tokens import digest
from cortex.store import Store

_PUBLIC_PATHS = frozenset({"/healthz", "/readyz"})  # for the probes of load balancers
_JOB_PATH = re.compile(r"/-/apis/[^/]+/jobs(/.*)?", re.DOTALL)
_BEARER = re.compile(rb"bearer +([!-~]{1,512})", re.IGNORECASE)
_AUDIT_PATH = "/-/audit"
_POLL_INTERVAL_S = 1.0
_CLOSE = {"Connection": "close"}  # because the server does not read the body that may follow
_INVALID_TOKEN = 'Bearer error="invalid_token"'
_MISSING = (
    "this operator requires a token, sent as 'Authorization: Bearer …'; its administrator makes "
    "one with `cortex token create`. The command reads it from $CORTEX_TOKEN or stores it with "
    "`cortex env configure --token`"
)
_REVOKED = "the token is unknown or was revoked; ask the operator's administrator for a new one"


class Authentication:
    """ASGI middleware, in front of everything that reads a body.

    It looks the token up for each request, and once a second while a GET is being answered. A
    revoked token thereby ends a followed log and a long poll.
    """

    def __init__(self, app: ASGIApp, store: Store, refusals: Refusals) -> None:
        self._app = app
        self._store = store
        self._refusals = refusals
        self._open_answers: dict[_OpenAnswer, str] = {}  # with the digests of their tokens
        self._poll_task: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _PUBLIC_PATHS:
            await self._app(scope, receive, send)
            return
        given = _BEARER.fullmatch(dict(scope["headers"]).get(b"authorization", b""))
        if given is None:
            await self._refuse(scope, receive, send, Unauthorized(_MISSING), "Bearer")
            return
        token_digest = digest(given[1].decode())
        try:
            token = await self._store.token(token_digest)
        except StorageUnavailable as error:
            await refusal(error, _CLOSE)(scope, receive, send)
            return
        if token is None:
            await self._refuse(scope, receive, send, Unauthorized(_REVOKED), _INVALID_TOKEN)
            return
        scope["token"] = token.name
        required = required_scope(scope["method"], scope["path"])
        if not token.scope.allows(required):
            message = (
                f"the token's scope is {token.scope.value!r}; this request needs {required.value!r}"
            )
            challenge = f'Bearer error="insufficient_scope", scope="{required.value}"'
            await self._refuse(scope, receive, send, Forbidden(message), challenge)
        elif scope["method"] == "GET":
            await self._answer_while_valid(scope, receive, send, token_digest)
        else:
            await self._app(scope, receive, send)

    async def _answer_while_valid(
        self, scope: Scope, receive: Receive, send: Send, token_digest: str
    ) -> None:
        """Answer a GET, until its token is revoked."""
        answer = _OpenAnswer(send)
        self._open_answers[answer] = token_digest
        if self._poll_task is None:
            self._poll_task = asyncio.create_task(self._cancel_revoked())
        try:
            await self._app(scope, receive, answer.send)
        except asyncio.CancelledError:
            if not answer.is_revoked:
                raise
            answer.task.uncancel()
            if not answer.has_begun:
                await self._refuse(scope, receive, send, Unauthorized(_REVOKED), _INVALID_TOKEN)
        finally:
            del self._open_answers[answer]

    async def _refuse(
        self, scope: Scope, receive: Receive, send: Send, error: CortexError, challenge: str
    ) -> None:
        actor = Actor(scope.get("token"), client_address(scope))
        self._refusals.add(actor, scope["method"], error.kind)
        headers = {**_CLOSE, "WWW-Authenticate": challenge}
        await refusal(error, headers)(scope, receive, send)

    async def _cancel_revoked(self) -> None:
        while self._open_answers:
            await asyncio.sleep(_POLL_INTERVAL_S)
            polled = dict(self._open_answers)  # answers open and close while the store is queried
            try:
                valid = await self._store.known_tokens(set(polled.values()))
            except StorageUnavailable:
                continue
            for answer, token_digest in polled.items():
                is_open = answer in self._open_answers and not answer.is_revoked
                if is_open and token_digest not in valid:
                    answer.is_revoked = True
                    answer.task.cancel()
        self._poll_task = None


class _OpenAnswer:
    """The answer to a GET, while it is being sent."""

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


def required_scope(method: str, path: str) -> TokenScope:
    """The token scope that a request needs."""
    if path == _AUDIT_PATH:
        return TokenScope.DEPLOY
    if method in ("GET", "HEAD", "OPTIONS"):
        return TokenScope.READ
    is_for_jobs = not path.startswith("/-/") or _JOB_PATH.fullmatch(path)
    return TokenScope.SUBMIT if is_for_jobs else TokenScope.DEPLOY
