"""Runs the user's Task in the job's process: import, call, result, and an exit as Python's own.

Called by `child` in a process forked for this one job. Everything is imported at the top: later
imports would find the user's modules first.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.machinery
import importlib.util
import json
import os
import sys
import types

from cortex.worker import plain
from cortex.worker.messages import Outcome, shorten

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

    from cortex.worker.messages import Setup

    Task = Callable[[object], object]
    Tell = Callable[[bytes], None]

MOST_RESULT = 1 << 20
MOST_LEVELS = 250
"""As many as a config may have: whoever reads a result comes to the end of its stack at some more."""
_encode = plain.encoder(for_one=True, allow_nan=False)
_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep


class _Unusable(Exception):
    """The file holds nothing to run; there is no traceback worth showing."""


class Found:
    """The user's module, compiled, and no line of it run yet."""

    __slots__ = ("code", "made_of", "module")

    def __init__(self, module: types.ModuleType, code: types.CodeType, made_of: object) -> None:
        self.module = module
        self.code = code
        self.made_of = made_of


def find(setup: Setup, path: str, before: Found | None) -> Found | None:
    """What all jobs of a version can be spared, done before they are forked: the module, if there is one
    that can be compiled. If not, the job shows what is wrong with it.

    Args:
        before: what was found last, which still holds if the file is as it was.
    """
    try:
        return still(before, path) or _find(setup, path)
    except Exception:  # noqa: BLE001, RUF100  # of whatever kind
        return None


def still(found: Found | None, path: str | None) -> Found | None:
    """What was found, if the file is as it was then."""
    is_same = found is not None and path is not None and found.made_of == _made_of(path)
    return found if is_same else None


def run(setup: Setup, path: str, found: Found | None, config: object, tell: Tell) -> int:
    """Run the task and everything that Python does before it exits; the exit code."""
    # The standard library reseeds `random` after a fork; numpy does not, and every job would draw
    # the same numbers.
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
    # Not before: a module that this package's own processes came to need would be the user's, of that name.
    sys.path[0:0] = user_roots(setup)
    code = _call(setup, path, found, config, tell)
    _finish()
    return code


def user_roots(setup: Setup) -> list[str]:
    """Where the user's own modules lie, as `sys.path` names them first."""
    return [setup.project] + ([setup.python_path] if setup.python_path else [])


def prepare(setup: Setup, path: str) -> None:
    """Make the interpreter what a task expects, once for all that are forked from this process, but for where
    it looks first for modules."""
    # Last, so that they shadow nothing. A process that multiprocessing spawns gets this path, and
    # must find the task's module to unpickle its functions, and cortex.logger.
    there = [*user_roots(setup), *sys.path]
    sys.path += [p for p in (os.path.dirname(path), setup.import_dir) if p not in there]
    sys.argv = [path]
    # multiprocessing would run the file of __main__ again in each spawned process: not ours.
    sys.modules["__main__"] = types.ModuleType("__main__")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(  # type: ignore[union-attr]  # nobody has replaced them yet
            encoding="utf-8", errors="backslashreplace", line_buffering=True
        )


def _call(setup: Setup, path: str, found: Found | None, config: object, tell: Tell) -> int:
    try:
        task = _load(setup, path, found)
        value = task(config)
        if hasattr(value, "__await__"):
            getattr(value, "close", bool)()  # or Python warns that nobody awaited it
            raise _Unusable("the task is async; call asyncio.run in it")
    except SystemExit as error:
        return _exit_code(error.code, tell)
    except _Unusable as error:
        _print(f"cortex: {error}", sys.stderr)
        _tell_why(str(error), tell)
        return 1
    except BaseException as error:  # noqa: BLE001, RUF100  # KeyboardInterrupt fails a task too
        _show(error)
        _tell_why(_last_line(error), tell)
        return 1
    _keep(value, tell)
    return 0


def _find(setup: Setup, path: str) -> Found:
    name = os.path.splitext(os.path.basename(path))[0]
    if name in sys.modules:
        name = f"cortex_task_{name}"
    if not os.path.isfile(path):
        shown = os.path.relpath(path, setup.project)
        raise _Unusable(f"{shown} is not in the project (definition.path names it)")
    made_of = _made_of(path)
    loader = importlib.machinery.SourceFileLoader(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None  # there is one for every loader
    code = loader.get_code(name)
    assert code is not None  # nor without a source
    return Found(importlib.util.module_from_spec(spec), code, made_of)


def _made_of(path: str) -> object:
    try:
        about = os.stat(path)
    except OSError:
        return None
    return about.st_ino, about.st_size, about.st_mtime_ns


def _load(setup: Setup, path: str, found: Found | None) -> Task:
    found = found or _find(setup, path)
    module = found.module
    sys.modules[module.__name__] = module
    # Asked for below by name: an attribute that is missing makes an exception and its message.
    names = module.__dict__
    exec(found.code, names)
    if "Task" in names:
        task: object = names["Task"]()
        if not callable(task):
            shown = os.path.relpath(path, setup.project)
            raise _Unusable(f"the class Task of {shown} has no method __call__(self, config)")
        return task
    if callable(names.get("task")):
        function: Task = names["task"]
        return function
    shown = os.path.relpath(path, setup.project)
    raise _Unusable(f"{shown} defines neither a class Task nor a function task(config)")


def _exit_code(code: object, tell: Tell) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    text = _text(code)
    _print(text, sys.stderr)
    _tell_why(text, tell)
    return 1


def _show(error: BaseException) -> None:
    trace = error.__traceback__
    while trace is not None and _is_platform(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    error.__traceback__ = trace
    try:
        sys.excepthook(type(error), error, trace)
    except BaseException:  # noqa: BLE001, RUF100  # a hook of the user's
        sys.__excepthook__(type(error), error, trace)


def _is_platform(filename: str) -> bool:
    return filename.startswith((_OURS, "<frozen importlib."))


def _last_line(error: BaseException) -> str:
    kind = type(error)
    name = kind.__qualname__
    if kind.__module__ not in ("builtins", "__main__"):
        name = f"{kind.__module__}.{name}"
    text = _text(error)
    return f"{name}: {text}" if text else name


def _text(value: object) -> str:
    try:
        return str(value)
    except BaseException:  # noqa: BLE001, RUF100  # a __str__ of the user's
        return "<its message cannot be shown>"


def _tell_why(message: str, tell: Tell) -> None:
    with contextlib.suppress(OSError):  # a task may have closed all files: the log has it still
        tell(Outcome(message=shorten(message)).dumps())


def _keep(value: object, tell: Tell) -> None:
    if value is None:
        return
    try:
        data = _encode(value).encode()
        why = _why_not(data)
    except BaseException as error:  # noqa: BLE001, RUF100  # code of the user's runs in there
        why = f"it is not JSON: {shorten(_text(error))}"
    if why is None:
        try:
            tell(b'{"has_result": true, "result": ' + data + b"}")  # an Outcome, not made twice
        except OSError:
            why = "the task has closed the file that it would be kept in"
    if why is not None:
        _print(f"cortex: the task's return value was not kept: {why}", sys.stdout)


def _why_not(data: bytes) -> str | None:
    if len(data) > MOST_RESULT:
        return f"it takes {len(data)} bytes, and {MOST_RESULT} is the most"
    if data.count(b"[") + data.count(b"{") > MOST_LEVELS and _is_deep(json.loads(data)):
        return f"it is nested over {MOST_LEVELS} levels deep"
    return None


def _is_deep(value: object) -> bool:
    held = [value]
    for _ in range(MOST_LEVELS):
        held = [
            below
            for each in held
            if isinstance(each, (dict, list))
            for below in (each.values() if isinstance(each, dict) else each)
        ]
    return any(isinstance(each, (dict, list)) for each in held)


def _print(text: str, stream: TextIO) -> None:
    # What the task has done to its streams, or a full disk, is no failure of its.
    with contextlib.suppress(BaseException):
        print(text, file=stream)


def _finish() -> None:
    """What Python does at exit; the process was forked from within the fork server's own frames and
    must not unwind through them."""
    # Nobody has threads who has not loaded it; the user's own module of that name waits for none.
    shutdown = getattr(sys.modules.get("threading"), "_shutdown", None)
    for step in (shutdown, atexit._run_exitfuncs):
        try:
            if step is not None:
                step()
        except BaseException as error:  # noqa: BLE001, RUF100
            sys.__excepthook__(type(error), error, error.__traceback__)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:  # noqa: BLE001, RUF100
            pass
