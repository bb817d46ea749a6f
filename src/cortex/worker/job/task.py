"""Runs the user's Task in the job's process: import, call, result, and an exit like Python's own.

Called by `job.process` in a process forked for this one job. All imports are at the top: a later
import would find the user's modules first.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
import types

from cortex.worker import json_encoder, standard
from cortex.worker.checks import MAX_DIGITS, NOT_KEPT, why_no_result
from cortex.worker.job import import_times, interpreter_exit, metrics
from cortex.worker.messages import Outcome, encode, shorten

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn, TextIO

    from cortex.worker.messages import Setup

    Task = Callable[[object], object]
    WriteOutcome = Callable[[bytes], None]

globals()["__builtins__"] = standard.BUILTINS

_encode = json_encoder.encoder(for_one=True, allow_nan=False)
_traceback = BaseException.__dict__["__traceback__"]
_PACKAGE = "cortex"
STAND_IN = "cortex_task"
_WARM_UP_MODULE = "cortex_rehearsed"
_clock = time.perf_counter
# Bound to names of this module: a task may replace the attributes.
_exit, _write_to, _modules = os._exit, os.write, sys.modules
_get_profile, _set_profile = sys.getprofile, sys.setprofile
_get_trace, _set_trace = sys.gettrace, sys.settrace
_USUAL = frozenset({type(None), bool, int, float, str, list, dict})
_IMPORTLIB = os.path.dirname(os.path.abspath(importlib.__file__)) + os.sep
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


class _Unusable(Exception):
    """The file defines no usable task. The message says why; a traceback would not help."""


class CompiledTask:
    """The user's module, compiled but not run."""

    __slots__ = ("_names", "_next_module", "code", "file_version", "name", "roots")

    def __init__(
        self, module: types.ModuleType, code: types.CodeType, file_version: object, roots: list[str]
    ) -> None:
        self.roots = roots
        self._next_module: types.ModuleType | None = None
        self._names = module.__dict__
        self.name = module.__name__
        self.code = code
        self.file_version = file_version

    def make_module(self) -> None:
        """Make the module object for the next fork, as `module_from_spec` does."""
        self._next_module = types.ModuleType(self.name)
        self._next_module.__dict__.update(self._names)

    def pop_module(self) -> types.ModuleType:
        """Take the module object. The caller has the only reference: it ends with the job."""
        if self._next_module is None:
            self.make_module()
        module, self._next_module = self._next_module, None
        assert module is not None
        return module


class _Warm:
    """State of the fork server that all jobs share."""

    modules: frozenset[str] = frozenset()
    """The names of the modules that the fork server had loaded."""
    has_imported: bool = False
    """Whether the fork server has imported modules of `definition.preload`."""
    output: bytes = b""
    """What the preloaded modules have printed."""
    generators: Sequence[object] = ()
    """Generators of random numbers that each job has to seed."""
    digits: int = 0
    """The user's limit for the digits of a number (`sys.set_int_max_str_digits`), if it is lower
    than what this package needs; else 0."""


def compile_task(setup: Setup, path: str, before: CompiledTask | None) -> CompiledTask | None:
    """Compile the task's module before the jobs are forked, once for all jobs of a version.

    Args:
        before: the previous result, which is returned if the file has not changed.

    Returns:
        None if there is no module that can be compiled: then the job itself shows the error.
    """
    try:
        return if_unchanged(before, path) or _compile(setup, path)
    except Exception:  # noqa: BLE001, RUF100  # of whatever kind
        return None


def if_unchanged(compiled: CompiledTask | None, path: str | None) -> CompiledTask | None:
    """The compiled task, if the file has not changed since; else None."""
    is_same = (
        compiled is not None and path is not None and compiled.file_version == _file_version(path)
    )
    return compiled if is_same else None


def run(
    setup: Setup,
    path: str,
    compiled: CompiledTask | None,
    job: dict[str, object],
    write_outcome: WriteOutcome,
) -> NoReturn:
    """Run the task and all that Python does before it exits, and exit.

    Args:
        job: the content of job.json. `run` removes the config, so that only the task refers to it.
    """
    if _Warm.output:
        _write(_Warm.output)
    # The standard library reseeds `random` after a fork; numpy does not.
    if _Warm.generators:
        _reseed(_Warm.generators)
    if _Warm.digits:
        sys.set_int_max_str_digits(_Warm.digits)
    # Not earlier: an import in the processes of this package could find a user's module.
    sys.path[0:0] = user_roots(setup) if compiled is None else compiled.roots
    try:
        code = _call(setup, path, compiled, job, write_outcome)
    except BaseException as error:  # noqa: BLE001, RUF100  # code of the user can raise anything
        code = _show(error)
    compiled = None
    try:
        interpreter_exit.exit_interpreter(code, has_imported=_Warm.has_imported)
    except BaseException as error:  # noqa: BLE001, RUF100  # the program has broken the interpreter
        _write_to(2, f"cortex: the interpreter cannot end as Python does: {error!r}\n".encode())
    finally:
        _exit(1)


def warm_up(setup: Setup, path: str, write_outcome: WriteOutcome) -> None:
    """Run a task that does nothing, as `run` does, but do not exit (see `process.warm_up`)."""
    before = list(sys.path)
    module = types.ModuleType(_WARM_UP_MODULE)
    compiled = CompiledTask(module, _warm_up_task.__code__, _file_version(path), user_roots(setup))
    compiled.make_module()
    sys.path[0:0] = compiled.roots
    _call(setup, path, if_unchanged(compiled, path) or compiled, {"config": {}}, write_outcome)
    interpreter_exit.warm_up()
    del sys.modules[_WARM_UP_MODULE]
    sys.path[:] = before


def _warm_up_task() -> None:
    global task  # noqa: PLW0603  # runs as the code of another module

    def task(config: object) -> object:
        return config


def _reseed(generators: Sequence[object]) -> None:
    """Seed these generators anew: each process that is forked must draw other numbers."""
    for each in generators:
        if hasattr(each, "seed"):
            each.seed()
        else:
            source = each.bit_generator  # type: ignore[attr-defined]  # a Generator of numpy
            source.state = type(source)().state


def user_roots(setup: Setup) -> list[str]:
    """The folders of the user's own modules: the first entries of `sys.path`."""
    folders = [setup.project] + ([setup.python_path] if setup.python_path else [])
    listed = setup.env.get("PYTHONPATH", "")
    return folders + [
        os.path.join(setup.project, each) for each in listed.split(os.pathsep) if each
    ]


def prepare_interpreter(
    setup: Setup, path: str, output: bytes = b"", generators: Sequence[object] = ()
) -> None:
    """Prepare the interpreter for tasks, once for all jobs that are forked from this process. Only
    the first entries of `sys.path` are left for `run`.

    Args:
        output: what the preloaded modules have printed.
        generators: random generators of these modules, which each job has to seed.
    """
    # At the end of the path, where they shadow nothing. A process that multiprocessing spawns gets
    # this path. It must find the task's module to unpickle its functions, and cortex.logger.
    folders = [*user_roots(setup), *sys.path]
    for folder in (_root(path), os.path.dirname(path), setup.import_dir):
        if folder not in folders:
            folders.append(folder)
            sys.path.append(folder)
    sys.argv = [path]
    # multiprocessing runs the file of __main__ again in each spawned process: it must not be ours.
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    for stream in (sys.stdout, sys.stderr):
        # A log is UTF-8 in any locale, unless the user has chosen another encoding.
        if "PYTHONIOENCODING" not in setup.env:
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]  # they are TextIOWrappers
    if any(_is_own(root, _PACKAGE) for root in user_roots(setup)):
        for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
            del sys.modules[name]
    # Not loaded for a task that does not import it: only then does the job's end have to run what C
    # libraries run at the end of a process.
    for name in [name for name in sys.modules if name.partition(".")[0] == "ctypes"]:
        if not setup.preload:
            del sys.modules[name]
    _Warm.has_imported = bool(setup.preload)
    _Warm.output = output
    _Warm.generators = generators
    _Warm.modules = frozenset(sys.modules)
    _Warm.digits = raise_digits()
    interpreter_exit.mark_shared_modules()


def raise_digits() -> int:
    """Raise the limit for the digits of a number, so that this process and its supervising
    processes can read all that an operator can read.

    Returns:
        the user's limit if it was lower, else 0.
    """
    limit: int = getattr(sys, "get_int_max_str_digits", int)()  # 0 is none
    if not 0 < limit < MAX_DIGITS:
        return 0
    sys.set_int_max_str_digits(MAX_DIGITS)
    return limit


def _is_own(root: str, name: str) -> bool:
    """Whether a module or package of this name lies in this folder."""
    stem = os.path.join(root, name)
    return os.path.isfile(f"{stem}.py") or os.path.isfile(os.path.join(stem, "__init__.py"))


def _call(
    setup: Setup,
    path: str,
    compiled: CompiledTask | None,
    job: dict[str, object],
    write_outcome: WriteOutcome,
) -> int:
    outcome = Outcome()
    raised: BaseException | None = None
    try:
        task = _load(setup, path, compiled, outcome)
        value = task(job.pop("config"))
    except BaseException as error:  # noqa: BLE001, RUF100  # KeyboardInterrupt also fails a task
        raised = (
            error  # handled below: an exception raised there must not have this one as its context
        )
    try:
        # Before any other function of this package is called: a trace function of the user may
        # raise, and plain Python calls none of these functions.
        if _get_profile() is not None or _get_trace() is not None:
            interpreter_exit.Watchers.profile, interpreter_exit.Watchers.trace = (
                _get_profile(),
                _get_trace(),
            )
            _set_profile(None)
            _set_trace(None)
    except BaseException:  # noqa: BLE001, RUF100  # a trace function raised; Python removes it
        pass
    if raised is None:
        raised = _unrun_error(value)
    if raised is None:
        _write_result(value, outcome, write_outcome)
        return 0
    # By type(): the error's class may refuse access to its attributes, even to __class__.
    if issubclass(type(raised), SystemExit):
        code = _exit_code(raised, outcome)  # type: ignore[arg-type]  # it is one
    elif type(raised) is _Unusable:
        code = 1
        outcome.message = str(raised)
        _print(f"cortex: {raised}", sys.stderr)
    else:
        code = _show(raised)
        outcome.message = _last_line(raised)
    _write_outcome(outcome, write_outcome)
    return code


def _unrun_error(value: object) -> BaseException | None:
    """The error of a task whose code has not run at all: async functions and generators."""
    unusable = _why_unusable(value)
    if unusable is None:
        return None
    try:
        getattr(value, "close", bool)()  # or Python warns that it was never awaited
    except BaseException as error:  # noqa: BLE001, RUF100  # raised by code of the user
        return error
    return _Unusable(unusable)


def _why_unusable(value: object) -> str | None:
    """Why no code of the task has run: the call has only returned an object that would run it."""
    kind = type(value)  # not the instance: it may claim to have any attribute
    if kind in _USUAL:
        return None
    if kind is types.AsyncGeneratorType or hasattr(kind, "__await__"):
        return (
            "the task is async: nothing of it has run. "
            "Define def task(config), and call asyncio.run in it"
        )
    if kind is types.GeneratorType:
        is_over = value.gi_frame is None  # type: ignore[attr-defined]  # the kind has it
        has_run = getattr(value, "gi_suspended", False)  # before 3.11 there is no such attribute
        is_expression = value.gi_code.co_name == "<genexpr>"  # type: ignore[attr-defined]
        if not (is_over or has_run or is_expression):
            return (
                "the task is a generator: nothing of it has run. "
                "Take yield out of it, and return a value"
            )
    return None


def _compile(setup: Setup, path: str) -> CompiledTask:
    if not os.path.isfile(path):
        shown = os.path.relpath(path, setup.project)
        raise _Unusable(f"{shown} is not in the project (definition.path names it)")
    file_version = _file_version(path)
    name = _module_name(path)
    loader = importlib.machinery.SourceFileLoader(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None  # because a loader is given
    code = loader.get_code(name)
    assert code is not None  # because there is a source
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__builtins__"] = vars(builtins)
    return CompiledTask(module, code, file_version, user_roots(setup))


def _module_name(path: str) -> str:
    """The module name of the task's file, with its package if it lies in one.

    A process that multiprocessing spawns imports the task's functions by this name. Where `import`
    cannot find the file by its own name, the module `cortex_task` stands in for it.
    """
    name = os.path.splitext(os.path.relpath(path, _root(path)))[0].replace(os.sep, ".")
    own = os.path.splitext(os.path.basename(path))[0]
    if "." in own or name in sys.modules or name.partition(".")[0] in standard.NAMES:
        os.environ["CORTEX_TASK_FILE"] = path
        return STAND_IN
    return name


def _root(path: str) -> str:
    """The folder from which the file is imported: the folder above its packages."""
    folder = os.path.dirname(path)
    while os.path.isfile(os.path.join(folder, "__init__.py")) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    return folder


def _file_version(path: str) -> object:
    try:
        about = os.stat(path)
    except OSError:
        return None
    return about.st_ino, about.st_size, about.st_mtime_ns


def _load(setup: Setup, path: str, compiled: CompiledTask | None, outcome: Outcome) -> Task:
    compiled = compiled or _compile(setup, path)
    begun = _clock()
    package = compiled.name.rpartition(".")[0]
    if package:
        importlib.import_module(package)
    module = _modules[compiled.name] = compiled.pop_module()
    # Names are looked up in the dict: a missing attribute would cost an exception and its message.
    names = module.__dict__
    exec(compiled.code, names)
    # As at the end of an import: the module is the last of `sys.modules`, and it may have replaced
    # itself there.
    loaded = _modules[compiled.name] = _modules.pop(compiled.name)
    if loaded is not module:
        names = {name: getattr(loaded, name) for name in ("Task", "task") if hasattr(loaded, name)}
    if package:
        setattr(_modules[package], compiled.name.rpartition(".")[2], loaded)
    took_s = _clock() - begun
    if took_s > import_times.MIN_S:
        outcome.loading = import_times.slow_imports(took_s, _Warm.modules, user_roots(setup))
    if "Task" in names:
        task: object = _make_task(names["Task"], outcome)
        if not callable(task):
            shown = os.path.relpath(path, setup.project)
            raise _Unusable(f"the class Task of {shown} has no method __call__(self, config)")
        return task
    if callable(names.get("task")):
        function: Task = names["task"]
        return function
    shown = os.path.relpath(path, setup.project)
    raise _Unusable(f"{shown} defines neither a class Task nor a function task(config)")


def _make_task(kind: Callable[..., object], outcome: Outcome) -> object:
    """Make the Task, with a metrics client if its `__init__` takes one, as in Cortex."""
    code = getattr(getattr(kind, "__init__", None), "__code__", None)
    arguments = (
        () if code is None else code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    )
    if "metrics_client" not in arguments:
        return kind()
    client = metrics.MetricsClient()
    outcome.measures = client  # replaced by its series at the job's end
    return kind(metrics_client=client)


def _exit_code(error: SystemExit, outcome: Outcome) -> int:
    """The exit code of a SystemExit, as in `handle_system_exit` of CPython."""
    try:
        code = error.code
    except BaseException:  # noqa: BLE001, RUF100  # raised by a property of the user
        code = error  # type: ignore[assignment]  # its text is printed
    if code is None:
        return 0
    if isinstance(code, int):
        return int(code) & 0xFF if -(1 << 63) <= code < 1 << 63 else 0xFF
    text = _text(code)
    _print(text, sys.stderr)
    outcome.message = text
    return 1


def _show(error: BaseException) -> int:
    """Print the traceback as `PyErr_PrintEx` does, without the frames of this package.

    Returns:
        the exit code.
    """
    # Through the slots of the base class: the error's class may override attribute access.
    trace = _without_ours(_traceback.__get__(error))
    _traceback.__set__(error, trace)
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, trace
    if sys.version_info >= (3, 12):
        sys.last_exc = error
    if not hasattr(sys, "excepthook"):
        _print("sys.excepthook is missing", sys.stderr)
        sys.__excepthook__(type(error), error, trace)
        return _code_of(error)
    failed: BaseException | None = None
    try:
        sys.excepthook(type(error), error, trace)
    except BaseException as other:  # noqa: BLE001, RUF100  # a hook of the user
        failed = other
    if issubclass(type(failed), SystemExit):
        return _exit_code(failed, Outcome())  # type: ignore[arg-type]  # it is one
    if failed is not None:
        _print("Error in sys.excepthook:", sys.stderr)
        inner = _without_ours(_traceback.__get__(failed))
        _traceback.__set__(failed, inner)
        sys.__excepthook__(type(failed), failed, inner)
        _print("\nOriginal exception was:", sys.stderr)
        sys.__excepthook__(type(error), error, trace)
    return _code_of(error)


def _code_of(error: BaseException) -> int:
    return interpreter_exit.INTERRUPTED if type(error) is KeyboardInterrupt else 1


def _without_ours(trace: types.TracebackType | None) -> types.TracebackType | None:
    while trace is not None and _is_platform(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return trace


def _is_platform(filename: str) -> bool:
    return filename.startswith((_OURS, _IMPORTLIB, "<frozen importlib."))


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
    except BaseException:  # noqa: BLE001, RUF100  # a __str__ of the user
        return "<its message cannot be shown>"


def _write_outcome(
    outcome: Outcome, write_outcome: WriteOutcome, result: bytes | None = None
) -> None:
    """Write the outcome file.

    Args:
        result: the return value as JSON, if there is one; it was encoded to check it.
    """
    if outcome.message is not None:
        outcome.message = shorten(outcome.message)
    if isinstance(outcome.measures, metrics.MetricsClient):
        outcome.measures = outcome.measures.series()
    if result is None:
        data = outcome.dumps()
    else:
        data = b'{"has_result": true, "result": ' + result
        if outcome.loading is not None or outcome.measures is not None:
            others = encode({"loading": outcome.loading, "measures": outcome.measures})
            data += b", " + others[1:].encode()
        else:
            data += b"}"
    try:
        write_outcome(data)
    except OSError:  # the task may have closed all files: then only the log can show it
        if result is not None:
            why = "the task has closed the file of its outcome"
            _print(f"cortex: {NOT_KEPT}: {why}", sys.stdout)


def _write_result(value: object, outcome: Outcome, write_outcome: WriteOutcome) -> None:
    if value is None:
        if outcome.loading is not None or outcome.measures is not None:
            _write_outcome(outcome, write_outcome)
        return
    data = None
    try:
        data = _encode(value).encode()
        why = _why_no_result(data)
    except BaseException as error:  # noqa: BLE001, RUF100  # it runs code of the user
        why = f"it is not JSON: {shorten(_text(error))}"
    if why is not None:
        data = None
        outcome.message = f"{NOT_KEPT}: {why}"
    _write_outcome(outcome, write_outcome, data)


class _DuplicateKey(Exception):
    pass


def _reject_duplicates(pairs: list[tuple[str, object]]) -> None:
    """Two keys of Python, such as 1 and "1", can be one key in JSON: a reader drops a value."""
    keys = set()
    for key, _ in pairs:
        if key in keys:
            raise _DuplicateKey(key)
        keys.add(key)


_decode_unique = json.JSONDecoder(object_pairs_hook=_reject_duplicates).decode


def _why_no_result(data: bytes) -> str | None:
    why = why_no_result(data)
    try:
        if why is None and b"{" in data:
            _decode_unique(data.decode())
    except _DuplicateKey as error:
        return f"several keys of a dictionary are {shorten(repr(str(error)))} in JSON"
    return why


def _write(data: bytes) -> None:
    with contextlib.suppress(OSError):  # a full disk must not prevent the run
        _write_to(1, data)


def _print(text: str, stream: TextIO) -> None:
    # A stream that the task has closed or replaced, or a full disk, must not fail the task.
    with contextlib.suppress(BaseException):
        print(text, file=stream)
