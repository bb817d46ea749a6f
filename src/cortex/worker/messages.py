"""The messages between the engine and the worker processes, and their records on disk.

These are plain classes with a JSON form: importing dataclasses or pydantic would cost more than a
fork. Both sides use these classes, so that each field is named in one place.
"""

from __future__ import annotations

from cortex.worker import checks, json_encoder, standard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Self

globals()["__builtins__"] = standard.BUILTINS

MAX_MESSAGE = 1 << 16
MAX_INLINE_RECORD = 1 << 15
"""A longer exit record is not part of the report: the engine reads its file."""
JOB_ID_ROOM = 64
"""Bytes reserved for the job's id in the initial environment block of a fork server."""
JOBS_FOLDER = "CORTEX_JOBS_FOLDER"
"""A variable in that block alone: the folder of the jobs. A copy of that folder may have jobs of
the same ids."""


encode = json_encoder.encoder()
shorten = checks.shorten
size = checks.size
_decode = checks.decode


class _Message:
    __slots__: ClassVar[tuple[str, ...]] = ()

    def fields(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}

    def dumps(self) -> bytes:
        return encode({name: getattr(self, name) for name in self.__slots__}).encode()

    def check(self) -> None:
        """Check the values: a job may have written them (`checks`).

        Raises:
            checks.Invalid: a value is impossible.
        """

    @classmethod
    def loads(cls, data: bytes) -> Self:
        """Decode a message.

        Raises:
            checks.Invalid: the data is not a valid message of this class.
        """
        try:
            fields = _decode(data.decode())
        except RecursionError as error:
            raise checks.Invalid("it is nested too deeply") from error
        except ValueError as error:
            raise checks.Invalid("it is not JSON") from error
        return cls.from_fields(fields)

    @classmethod
    def from_fields(cls, fields: object) -> Self:
        """Make a message from the decoded JSON object. Unknown fields are ignored: records outlive
        the version that wrote them, and a later version may have more fields.

        Raises:
            checks.Invalid: the fields are not a valid message of this class.
        """
        if not isinstance(fields, dict):
            raise checks.Invalid("it is not a JSON object")
        try:
            made = cls(**{name: fields[name] for name in cls.__slots__ if name in fields})
        except TypeError as error:
            raise checks.Invalid("it lacks a field") from error
        made.check()
        return made


class Setup(_Message):
    """Describes the version to a fork server: its standard input."""

    __slots__ = (
        "command",
        "env",
        "import_dir",
        "open_files",
        "own_folder",
        "own_root",
        "package",
        "path",
        "preload",
        "project",
        "python_path",
        "refused",
    )

    def __init__(
        self,
        *,
        package: str,
        import_dir: str,
        open_files: int,
        own_folder: str,
        own_root: str,
        project: str,
        python_path: str | None,
        path: str | None,
        command: list[str] | None,
        env: dict[str, str],
        preload: list[str],
        refused: dict[str, str] | None = None,
    ) -> None:
        self.package = package
        self.import_dir = import_dir  # a folder that contains only a link to the package
        self.open_files = open_files  # how many files a job may have open at once
        self.own_folder = own_folder  # "overlay" or "copy": the backend of the workspace
        self.own_root = own_root  # the folder of the workspaces
        self.project = project
        self.python_path = python_path
        self.path = path
        self.command = command
        self.env = env
        self.preload = preload  # modules to import ahead, in this order
        self.refused = refused or {}  # modules that are not preloaded, with the reasons


class Order(_Message):
    """The order to a supervisor to start one attempt of a job."""

    __slots__ = (
        "attempt",
        "deadline",
        "folder",
        "gpus",
        "grace_s",
        "held",
        "job",
        "job_id",
        "log_limit",
        "losses",
        "lost",
        "mem",
        "memory_dir",
        "memory_kind",
        "submitted",
        "timeout",
        "visible_gpus",
    )

    def __init__(
        self,
        *,
        job_id: str,
        attempt: int,
        folder: str,
        grace_s: float,
        timeout: int | None,
        deadline: float | None,
        log_limit: int,
        mem: int | None,
        memory_kind: str | None,
        memory_dir: str | None,
        gpus: list[int],
        visible_gpus: str | None,
        job: dict[str, object],
        submitted: str = "{}",
        losses: int = 0,
        lost: str | None = None,
        held: bool = False,
    ) -> None:
        self.job = job  # the content of job.json; in the engine, its config is the API's alone
        self.submitted = submitted  # the config of the job, as JSON text
        self.job_id = job_id
        self.attempt = attempt
        self.folder = folder
        self.grace_s = grace_s
        self.timeout = timeout
        self.deadline = deadline  # on the monotonic clock, which all processes share
        self.log_limit = log_limit
        self.mem = mem
        self.memory_kind = memory_kind  # "v2", "v1", "watchdog"; None: no limit
        self.memory_dir = memory_dir  # the job's control group; its open folder is sent along
        self.gpus = gpus
        self.visible_gpus = visible_gpus  # None on a machine without GPUs
        self.losses = losses  # how many earlier attempts were lost
        self.lost = lost  # why the last of them was lost
        self.held = held  # on hold: prepare at once, but start only at the engine's GO

    def dumps(self) -> bytes:
        """Encode the order. The submitted config is inserted as text: decoding and encoding a large
        one would take long."""
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "submitted"}
        head = encode(fields)[:-1] + ', "submitted": '
        return b"".join((head.encode(), self.submitted.encode(), b"}"))

    @classmethod
    def loads(cls, data: bytes) -> Self:
        """Decode an order, and merge the submitted config into the content of job.json."""
        order = super().loads(data)
        submitted: Any = order.submitted  # an object by now
        order.job["submitted_config"], order.submitted = submitted, "{}"
        order.job["config"] = _merged(order.job["config"], submitted)
        return order

    def forget_job(self) -> None:
        """Drop the content of the job, which may be large: the supervisor has got it."""
        self.job, self.submitted = {}, "{}"


def _merged(base: Any, override: Any) -> dict[str, object]:
    """Merge two configs: an object is merged into an object, any other value replaces."""
    merged = dict(base)
    for key, value in override.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merged(below, value) if both else value
    return merged


class Reply(_Message):
    """A report to the engine.

    A fork server reports which module it is about to import, why it refuses one, that it is ready
    (no pid), that it has forked a supervising process (with its pidfd and socket), or why that
    failed. A supervising process (with a job id) reports that a start or exit record exists, or why
    the job could not start.
    """

    __slots__ = (
        "attempt",
        "ended",
        "errno",
        "error",
        "importing",
        "job_id",
        "pid",
        "record",
        "recorded",
        "refused",
        "start_ns",
    )

    def __init__(
        self,
        *,
        job_id: str | None = None,
        attempt: int = 0,
        pid: int = 0,
        start_ns: int = 0,
        recorded: bool = False,
        ended: bool = False,
        error: str | None = None,
        errno: int = 0,
        record: dict[str, object] | None = None,
        importing: str | None = None,
        refused: str | None = None,
    ) -> None:
        self.importing = importing
        self.refused = refused  # why the module must not be imported ahead
        self.errno = errno
        self.record = record  # the exit record, unless it is large
        self.ended = ended
        self.recorded = recorded
        self.job_id = job_id
        self.attempt = attempt
        self.pid = pid
        self.start_ns = start_ns
        self.error = error

    def check(self) -> None:
        checks.reply(self)
        if self.record is not None:
            self.record = ExitRecord.from_fields(self.record).fields()


class StartRecord(_Message):
    """The content of `start.<attempt>`: the fence.

    Its creator decides: with a supervisor's record, the attempt runs; with an engine's (`fenced`),
    it never will. The records of one supervising process share a file, which contains the record of
    its latest job: `job_id` and `attempt` name it, and are empty in records of old versions.
    """

    __slots__ = (
        "attempt",
        "boot",
        "fenced",
        "gpus",
        "job_id",
        "pid",
        "start_ns",
        "ticks",
        "v",
    )

    def __init__(
        self,
        *,
        v: int = 1,
        job_id: str = "",
        attempt: int = 0,
        fenced: bool = False,
        pid: int = 0,
        ticks: int = 0,
        boot: str = "",
        start_ns: int = 0,
        gpus: list[int] | None = None,
    ) -> None:
        self.v = v
        self.job_id = job_id
        self.attempt = attempt
        self.fenced = fenced
        self.pid = pid
        self.ticks = ticks
        self.boot = boot
        self.start_ns = start_ns
        self.gpus = gpus or []

    def check(self) -> None:
        checks.start_record(self)


class ExitRecord(_Message):
    """In `exit.<attempt>`: how an attempt ended. `ending` is one of engines.base.Ending, or "lost".

    The file contains this record alone, or is a journal with a line for each of several jobs:
    `job_id` and `attempt` name the attempt, and are empty in records of old versions.
    """

    __slots__ = (
        "attempt",
        "end_ns",
        "ending",
        "exit_code",
        "has_result",
        "hints",
        "job_id",
        "measures",
        "message",
        "result",
        "start_ns",
        "v",
    )

    def __init__(
        self,
        *,
        v: int = 1,
        job_id: str = "",
        attempt: int = 0,
        ending: str,
        exit_code: int,
        start_ns: int,
        end_ns: int,
        message: str | None,
        result: object = None,
        has_result: bool = False,
        hints: list[str] | None = None,
        measures: list[object] | None = None,
    ) -> None:
        self.v = v
        self.measures = measures or []  # the metrics of its task
        self.hints = hints or []  # what the users of its version should know
        self.job_id = job_id
        self.attempt = attempt
        self.ending = ending
        self.exit_code = exit_code
        self.start_ns = start_ns
        self.end_ns = end_ns
        self.message = message
        self.result = result
        self.has_result = has_result

    def check(self) -> None:
        checks.exit_record(self)


class LogCut(_Message):
    """The content of `log.cut`: the bytes from `start` up to `end` were removed from the log,
    because it exceeded `limit`."""

    __slots__ = ("end", "limit", "start")

    def __init__(self, *, start: int, end: int, limit: int) -> None:
        self.start = start
        self.end = end
        self.limit = limit

    def check(self) -> None:
        checks.log_cut(self)


class Outcome(_Message):
    """The content of the outcome file, which a job's process writes once."""

    __slots__ = ("has_result", "loading", "lost", "measures", "message", "result")

    def __init__(
        self,
        *,
        message: str | None = None,
        result: object = None,
        has_result: bool = False,
        lost: bool = False,
        loading: list[object] | None = None,
        measures: object = None,
    ) -> None:
        self.measures = measures  # the metrics of the task
        self.loading = loading  # seconds spent on imports, and the modules
        self.message = message
        self.result = result
        self.has_result = has_result
        self.lost = lost  # the platform could not set up the process

    def check(self) -> None:
        checks.outcome(self)
