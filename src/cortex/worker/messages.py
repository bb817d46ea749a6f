"""What the engine and the worker side tell one another, and the records that they leave on disk.

Plain classes with a JSON form: dataclasses and pydantic cost more to import than a fork. Both sides
build them, so a field is named in one place.
"""

from __future__ import annotations

from cortex.worker import checks, json_encoder, standard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Self

globals()["__builtins__"] = standard.BUILTINS

MOST_MESSAGE = 1 << 16
MOST_RECORD = 1 << 15
"""An exit record that is longer is not told along, but read from its file."""
JOB_ID_ROOM = 64
"""Bytes kept free for the job's id in the first environment block of a fork server."""
JOBS_FOLDER = "CORTEX_JOBS_FOLDER"
"""A variable in that block alone: which folder of jobs it is, as a copy of it may have jobs of the same ids."""


encode = json_encoder.encoder()
shorten = checks.shorten
_decode = checks.decode


class _Message:
    __slots__: ClassVar[tuple[str, ...]] = ()

    def fields(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}

    def dumps(self) -> bytes:
        return encode({name: getattr(self, name) for name in self.__slots__}).encode()

    def check(self) -> None:
        """See that it can be true, where a job may have written it (`checks`).

        Raises:
            checks.Invalid: it cannot.
        """

    @classmethod
    def loads(cls, data: bytes) -> Self:
        """Read what was written of one.

        Raises:
            checks.Invalid: it is none.
        """
        try:
            fields = _decode(data.decode())
        except RecursionError as error:
            raise checks.Invalid("it is nested too deep") from error
        except ValueError as error:
            raise checks.Invalid("it is no JSON") from error
        return cls.of(fields)

    @classmethod
    def of(cls, fields: object) -> Self:
        """Make one of its fields, as JSON has them. Those of a later version are left out: records outlive the version
        that wrote them.

        Raises:
            checks.Invalid: it is none.
        """
        if not isinstance(fields, dict):
            raise checks.Invalid("it is no object of JSON")
        try:
            made = cls(**{name: fields[name] for name in cls.__slots__ if name in fields})
        except TypeError as error:
            raise checks.Invalid("it lacks a field") from error
        made.check()
        return made


class Setup(_Message):
    """What a fork server is told once, through its standard input: the version."""

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
        self.import_dir = import_dir  # a folder with nothing but a link to the package
        self.open_files = open_files  # how many a job may have at once
        self.own_folder = own_folder  # "overlay" or "copy": how a job's own folder is made
        self.own_root = own_root  # where these folders lie
        self.project = project
        self.python_path = python_path
        self.path = path
        self.command = command
        self.env = env
        self.preload = preload  # modules to import ahead, in this order
        self.refused = refused or {}  # of those that were wished for: why they are not


class Order(_Message):
    """One start: what a supervisor is told."""

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
        self.job = job  # the content of job.json; for the engine, with the config of the API alone
        self.submitted = submitted  # the config of the job, as JSON text
        self.job_id = job_id
        self.attempt = attempt
        self.folder = folder
        self.grace_s = grace_s
        self.timeout = timeout
        self.deadline = deadline  # by the monotonic clock, which all processes share
        self.log_limit = log_limit
        self.mem = mem
        self.memory_kind = memory_kind  # "v2", "v1", "watchdog"; None is no limit
        self.memory_dir = memory_dir  # the job's control group, whose folder comes along
        self.gpus = gpus
        self.visible_gpus = visible_gpus  # None on a machine without GPUs
        self.losses = losses  # attempts before this one, whose processes were lost
        self.lost = lost  # how the last of them was, in words
        self.held = held  # laid out at once, but begun with only when the engine says so

    def dumps(self) -> bytes:
        """The submitted config goes in as it is: the engine would take long to read and write a large one."""
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "submitted"}
        head = encode(fields)[:-1] + ', "submitted": '
        return b"".join((head.encode(), self.submitted.encode(), b"}"))

    @classmethod
    def loads(cls, data: bytes) -> Self:
        """The content of job.json is complete from here on."""
        order = super().loads(data)
        submitted: Any = order.submitted  # an object by now
        order.job["submitted_config"], order.submitted = submitted, "{}"
        order.job["config"] = _merged(order.job["config"], submitted)
        return order

    def forget_job(self) -> None:
        """Whoever carries it out has it: it may be large."""
        self.job, self.submitted = {}, "{}"


def _merged(base: Any, override: Any) -> dict[str, object]:
    """`override` laid over `base`: an object merges into an object, anything else replaces."""
    merged = dict(base)
    for key, value in override.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merged(below, value) if both else value
    return merged


class Reply(_Message):
    """What is said to the engine: by a fork server which module it imports ahead now, or why one must not
    be, that it is ready (no pid), or that it has forked a supervising process, with its pidfd and
    socket, or why it could not; by a supervising process (job id) that a start or exit record is made,
    or why it could not begin."""

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
        self.refused = refused  # why what it imports must not be imported ahead
        self.errno = errno
        self.record = record  # the exit record that was made, unless it is large
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
            self.record = ExitRecord.of(self.record).fields()


class StartRecord(_Message):
    """`start.<attempt>`: the fence. Whoever creates it decides: a supervisor that the attempt runs,
    an engine (`fenced`) that it never will. The records of one supervising process share a file, which
    holds that of its latest job: `job_id` and `attempt` say which, and are empty in records of old."""

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
        checks.start(self)


class ExitRecord(_Message):
    """In `exit.<attempt>`: how it ended; `ending` is one of engines.base.Ending, or "lost". The file holds
    this record alone, or is a journal with a line for each of several jobs: `job_id` and `attempt` say
    which, and are empty in records of old."""

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
        self.measures = measures or []  # what its task counted and measured
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
        checks.end(self)


class LogCut(_Message):
    """`log.cut`: the bytes from `start` up to `end` are gone from the log, for it was over `limit`."""

    __slots__ = ("end", "limit", "start")

    def __init__(self, *, start: int, end: int, limit: int) -> None:
        self.start = start
        self.end = end
        self.limit = limit

    def check(self) -> None:
        checks.cut(self)


class Outcome(_Message):
    """What a job's process says of itself in its outcome file, once."""

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
        self.measures = measures  # what the task counted and measured
        self.loading = loading  # seconds, and the modules that took them
        self.message = message
        self.result = result
        self.has_result = has_result
        self.lost = lost  # the platform could not even make the process what it must be

    def check(self) -> None:
        checks.outcome(self)


def size(amount: int) -> str:
    """Bytes as people write them, rounded down: "512 MiB", "31.2 GiB"."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if amount >= unit:
            return f"{amount * 10 // unit / 10:g} {name}"
    return f"{amount} B"
