"""Runs the user's Task in the job's process: import, call, result, and an exit as Python's own.

Called by `child` in a process forked for this one job. Everything is imported at the top: later
imports would find the user's modules first.
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
from cortex.worker.checks import MOST_DIGITS, NOT_KEPT, unfit
from cortex.worker.forkserver import preload
from cortex.worker.job import import_times, interpreter_exit, metrics
from cortex.worker.messages import Outcome, encode, shorten

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn, TextIO

    from cortex.worker.messages import Setup

    Task = Callable[[object], object]
    Tell = Callable[[bytes], None]

globals()["__builtins__"] = standard.BUILTINS

_encode = json_encoder.encoder(for_one=True, allow_nan=False)
_traceback = BaseException.__dict__["__traceback__"]
_PACKAGE = "cortex"
STAND_IN = "cortex_task"
_REHEARSED = "cortex_rehearsed"
_clock = time.perf_counter
# By names of their own: a task may put others in their places.
_exit, _write_to, _modules = os._exit, os.write, sys.modules
_get_profile, _set_profile = sys.getprofile, sys.setprofile
_get_trace, _set_trace = sys.gettrace, sys.settrace
_USUAL = frozenset({type(None), bool, int, float, str, list, dict})
_IMPORTLIB = os.path.dirname(os.path.abspath(importlib.__file__)) + os.sep
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


class _Unusable(Exception):
    """The file holds nothing to run; there is no traceback worth showing."""


class CompiledTask:
    """The user's module, compiled, and no line of it run yet."""

    __slots__ = ("_fresh", "_names", "code", "made_of", "name", "roots")

    def __init__(
        self, module: types.ModuleType, code: types.CodeType, made_of: object, roots: list[str]
    ) -> None:
        self.roots = roots
        self._fresh: types.ModuleType | None = None
        self._names = module.__dict__
        self.name = module.__name__
        self.code = code
        self.made_of = made_of

    def renew(self) -> None:
        """Make a module, as `module_from_spec` makes one, for the process that is forked next."""
        self._fresh = types.ModuleType(self.name)
        self._fresh.__dict__.update(self._names)

    def take(self) -> types.ModuleType:
        """The module, which nothing else in this process keeps from then on: it ends with the job."""
        if self._fresh is None:
            self.renew()
        module, self._fresh = self._fresh, None
        assert module is not None
        return module


class _Warm:
    """What the fork server has that all jobs share."""

    modules: frozenset[str] = frozenset()
    """The names of the modules that it had loaded."""
    has_imported: bool = False
    """Whether that are any that the user asked for."""
    words: bytes = b""
    """What the modules that it imported ahead have printed."""
    generators: Sequence[object] = ()
    """Generators of random numbers that each job has to seed."""
    digits: int = 0
    """The most of a number that a job may read and write, where this process needs more; 0 where not."""


def find(setup: Setup, path: str, before: CompiledTask | None) -> CompiledTask | None:
    """What all jobs of a version can be spared, done before they are forked: the module, if there is one
    that can be compiled. If not, the job shows what is wrong with it.

    Args:
        before: what was found last, which still holds if the file is as it was.
    """
    try:
        return still(before, path) or _find(setup, path)
    except Exception:  # noqa: BLE001, RUF100  # of whatever kind
        return None


def still(found: CompiledTask | None, path: str | None) -> CompiledTask | None:
    """What was found, if the file is as it was then."""
    is_same = found is not None and path is not None and found.made_of == _made_of(path)
    return found if is_same else None


def run(
    setup: Setup, path: str, found: CompiledTask | None, job: dict[str, object], tell: Tell
) -> NoReturn:
    """Run the task and everything that Python does before it exits, and exit.

    Args:
        job: the content of job.json; its config is taken out, so that nothing here keeps it.
    """
    if _Warm.words:
        _write(_Warm.words)
    # The standard library reseeds `random` after a fork; numpy does not.
    if _Warm.generators:
        preload.reseed(_Warm.generators)
    if _Warm.digits:
        sys.set_int_max_str_digits(_Warm.digits)
    # Not before: a module that this package's own processes came to need would be the user's, of that name.
    sys.path[0:0] = user_roots(setup) if found is None else found.roots
    try:
        code = _call(setup, path, found, job, tell)
    except BaseException as error:  # noqa: BLE001, RUF100  # of the user's making, whatever it is
        code = _show(error)
    found = None
    try:
        interpreter_exit.end(code, has_imported=_Warm.has_imported)
    except BaseException as error:  # noqa: BLE001, RUF100  # the user's program has broken the interpreter
        _write_to(2, f"cortex: the interpreter cannot end as Python does: {error!r}\n".encode())
    finally:
        _exit(1)


def rehearse(setup: Setup, path: str, tell: Tell) -> None:
    """Run a task that does nothing, as `run` does, up to its end (`child.rehearse`)."""
    before = list(sys.path)
    module = types.ModuleType(_REHEARSED)
    found = CompiledTask(module, _rehearsed.__code__, _made_of(path), user_roots(setup))
    found.renew()
    sys.path[0:0] = found.roots
    _call(setup, path, still(found, path) or found, {"config": {}}, tell)
    interpreter_exit.rehearse()
    del sys.modules[_REHEARSED]
    sys.path[:] = before


def _rehearsed() -> None:
    global task  # noqa: PLW0603  # its code is a module's: no global of this one

    def task(config: object) -> object:
        return config


def user_roots(setup: Setup) -> list[str]:
    """Where the user's own modules lie, as `sys.path` names them first."""
    there = [setup.project] + ([setup.python_path] if setup.python_path else [])
    listed = setup.env.get("PYTHONPATH", "")
    return there + [os.path.join(setup.project, each) for each in listed.split(os.pathsep) if each]


def prepare(setup: Setup, path: str, words: bytes = b"", generators: Sequence[object] = ()) -> None:
    """Make the interpreter what a task expects, once for all that are forked from this process, but for where
    it looks first for modules.

    Args:
        words: what was printed by the modules that were imported ahead.
        generators: what these modules have that each job has to seed.
    """
    # Last, so that they shadow nothing. A process that multiprocessing spawns gets this path, and
    # must find the task's module to unpickle its functions, and cortex.logger.
    there = [*user_roots(setup), *sys.path]
    for folder in (_root(path), os.path.dirname(path), setup.import_dir):
        if folder not in there:
            there.append(folder)
            sys.path.append(folder)
    sys.argv = [path]
    # multiprocessing would run the file of __main__ again in each spawned process: not ours.
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    for stream in (sys.stdout, sys.stderr):
        # Where the user has chosen no other: a log is UTF-8, whatever the locale.
        if "PYTHONIOENCODING" not in setup.env:
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]  # nobody has replaced them yet
    if any(_is_own(root, _PACKAGE) for root in user_roots(setup)):
        for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
            del sys.modules[name]
    # Of what a library of C does at the end of a process, only those who load one have to think.
    for name in [name for name in sys.modules if name.partition(".")[0] == "ctypes"]:
        if not setup.preload:
            del sys.modules[name]
    _Warm.has_imported = bool(setup.preload)
    _Warm.words = words
    _Warm.generators = generators
    _Warm.modules = frozenset(sys.modules)
    _Warm.digits = raise_digits()
    interpreter_exit.mark()


def raise_digits() -> int:
    """Let this process and the supervising ones read what an operator has read, whatever the user's limit is; that,
    if it is lower."""
    limit: int = getattr(sys, "get_int_max_str_digits", int)()  # 0 is none
    if not 0 < limit < MOST_DIGITS:
        return 0
    sys.set_int_max_str_digits(MOST_DIGITS)
    return limit


def _is_own(root: str, name: str) -> bool:
    """Whether the project has a module or package of this name there."""
    stem = os.path.join(root, name)
    return os.path.isfile(f"{stem}.py") or os.path.isfile(os.path.join(stem, "__init__.py"))


def _call(
    setup: Setup, path: str, found: CompiledTask | None, job: dict[str, object], tell: Tell
) -> int:
    said = Outcome()
    raised: BaseException | None = None
    try:
        task = _load(setup, path, found, said)
        value = task(job.pop("config"))
    except BaseException as error:  # noqa: BLE001, RUF100  # KeyboardInterrupt fails a task too
        raised = error  # told of below: what is raised there has not come of it
    try:
        # Before any other function of this package: a watcher of the user's may raise, and Python calls none of these.
        if _get_profile() is not None or _get_trace() is not None:
            interpreter_exit.Watchers.profile, interpreter_exit.Watchers.trace = (
                _get_profile(),
                _get_trace(),
            )
            _set_profile(None)
            _set_trace(None)
    except BaseException:  # noqa: BLE001, RUF100  # a watcher's, which Python has then put away
        pass
    if raised is None:
        raised = _not_run(value)
    if raised is None:
        _keep(value, said, tell)
        return 0
    # By the type: the error's own class may forbid to read its attributes, __class__ included.
    if issubclass(type(raised), SystemExit):
        code = _exit_code(raised, said)  # type: ignore[arg-type]  # it is one
    elif type(raised) is _Unusable:
        code = 1
        said.message = str(raised)
        _print(f"cortex: {raised}", sys.stderr)
    else:
        code = _show(raised)
        said.message = _last_line(raised)
    _tell(said, tell)
    return code


def _not_run(value: object) -> BaseException | None:
    """The error of a task of which nothing has run."""
    unusable = _why_unusable(value)
    if unusable is None:
        return None
    try:
        getattr(value, "close", bool)()  # or Python warns that nobody awaited it
    except BaseException as error:  # noqa: BLE001, RUF100  # of the user's
        return error
    return _Unusable(unusable)


def _why_unusable(value: object) -> str | None:
    """Why nothing of the task has run, where calling it has only made an object that would run it."""
    kind = type(value)  # an instance may have every attribute that one asks it for
    if kind in _USUAL:
        return None
    if kind is types.AsyncGeneratorType or hasattr(kind, "__await__"):
        return "the task is async: nothing of it has run. Define def task(config), and call asyncio.run in it"
    if kind is types.GeneratorType:
        is_over = value.gi_frame is None  # type: ignore[attr-defined]  # the kind has it
        has_run = getattr(value, "gi_suspended", False)  # before 3.11 there is no such attribute
        is_expression = value.gi_code.co_name == "<genexpr>"  # type: ignore[attr-defined]
        if not (is_over or has_run or is_expression):
            return "the task is a generator: nothing of it has run. Take yield out of it, and return a value"
    return None


def _find(setup: Setup, path: str) -> CompiledTask:
    if not os.path.isfile(path):
        shown = os.path.relpath(path, setup.project)
        raise _Unusable(f"{shown} is not in the project (definition.path names it)")
    made_of = _made_of(path)
    name = _module_name(path)
    loader = importlib.machinery.SourceFileLoader(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None  # there is one for every loader
    code = loader.get_code(name)
    assert code is not None  # nor without a source
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__builtins__"] = vars(builtins)
    return CompiledTask(module, code, made_of, user_roots(setup))


def _module_name(path: str) -> str:
    """What the task's file is called where it is imported: within its package, if it lies in one.

    The name says to a process that multiprocessing spawns where the task's functions are. A name that
    `import` cannot find there is one that `cortex_task` stands for.
    """
    name = os.path.splitext(os.path.relpath(path, _root(path)))[0].replace(os.sep, ".")
    own = os.path.splitext(os.path.basename(path))[0]
    if "." in own or name in sys.modules or name.partition(".")[0] in standard.NAMES:
        os.environ["CORTEX_TASK_FILE"] = path
        return STAND_IN
    return name


def _root(path: str) -> str:
    """The folder from which the file is imported: the one above its packages."""
    folder = os.path.dirname(path)
    while os.path.isfile(os.path.join(folder, "__init__.py")) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    return folder


def _made_of(path: str) -> object:
    try:
        about = os.stat(path)
    except OSError:
        return None
    return about.st_ino, about.st_size, about.st_mtime_ns


def _load(setup: Setup, path: str, found: CompiledTask | None, said: Outcome) -> Task:
    found = found or _find(setup, path)
    begun = _clock()
    package = found.name.rpartition(".")[0]
    if package:
        importlib.import_module(package)
    module = _modules[found.name] = found.take()
    # Asked for below by name: an attribute that is missing makes an exception and its message.
    names = module.__dict__
    exec(found.code, names)
    # As an import ends: the last of all modules, and whatever it has put in its own place.
    loaded = _modules[found.name] = _modules.pop(found.name)
    if loaded is not module:
        names = {name: getattr(loaded, name) for name in ("Task", "task") if hasattr(loaded, name)}
    if package:
        setattr(_modules[package], found.name.rpartition(".")[2], loaded)
    took_s = _clock() - begun
    if took_s > import_times.LEAST_S:
        said.loading = import_times.measured(took_s, _Warm.modules, user_roots(setup))
    if "Task" in names:
        task: object = _made(names["Task"], said)
        if not callable(task):
            shown = os.path.relpath(path, setup.project)
            raise _Unusable(f"the class Task of {shown} has no method __call__(self, config)")
        return task
    if callable(names.get("task")):
        function: Task = names["task"]
        return function
    shown = os.path.relpath(path, setup.project)
    raise _Unusable(f"{shown} defines neither a class Task nor a function task(config)")


def _made(kind: Callable[..., object], said: Outcome) -> object:
    """The Task; one that asks for it gets an object that counts and measures, as in Cortex."""
    code = getattr(getattr(kind, "__init__", None), "__code__", None)
    arguments = (
        () if code is None else code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    )
    if "metrics_client" not in arguments:
        return kind()
    client = metrics.MetricsClient()
    said.measures = client  # told at the job's end
    return kind(metrics_client=client)


def _exit_code(error: SystemExit, said: Outcome) -> int:
    """As `handle_system_exit` of CPython has it."""
    try:
        code = error.code
    except BaseException:  # noqa: BLE001, RUF100  # a property of the user's
        code = error  # type: ignore[assignment]  # which is then shown itself
    if code is None:
        return 0
    if isinstance(code, int):
        return int(code) & 0xFF if -(1 << 63) <= code < 1 << 63 else 0xFF
    text = _text(code)
    _print(text, sys.stderr)
    said.message = text
    return 1


def _show(error: BaseException) -> int:
    """Print the traceback as `PyErr_PrintEx` does, without the frames of this package; the exit code."""
    # By the slots of the base class: the error's own class may forbid to set attributes, or do anything else.
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
    except BaseException as other:  # noqa: BLE001, RUF100  # a hook of the user's
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
    except BaseException:  # noqa: BLE001, RUF100  # a __str__ of the user's
        return "<its message cannot be shown>"


def _tell(said: Outcome, tell: Tell, result: bytes | None = None) -> None:
    """
    Args:
        result: the JSON of the task's return value, which is not made twice.
    """
    if said.message is not None:
        said.message = shorten(said.message)
    if isinstance(said.measures, metrics.MetricsClient):
        said.measures = said.measures.told()
    if result is None:
        data = said.dumps()
    else:
        data = b'{"has_result": true, "result": ' + result
        if said.loading is not None or said.measures is not None:
            others = encode({"loading": said.loading, "measures": said.measures})
            data += b", " + others[1:].encode()
        else:
            data += b"}"
    try:
        tell(data)
    except OSError:  # a task may have closed all files: the log alone can tell then
        if result is not None:
            why = "the task has closed the file that it would be kept in"
            _print(f"cortex: {NOT_KEPT}: {why}", sys.stdout)


def _keep(value: object, said: Outcome, tell: Tell) -> None:
    if value is None:
        if said.loading is not None or said.measures is not None:
            _tell(said, tell)
        return
    data = None
    try:
        data = _encode(value).encode()
        why = _why_not(data)
    except BaseException as error:  # noqa: BLE001, RUF100  # code of the user's runs in there
        why = f"it is not JSON: {shorten(_text(error))}"
    if why is not None:
        data = None
        said.message = f"{NOT_KEPT}: {why}"
    _tell(said, tell, data)


class _Twice(Exception):
    pass


def _once(pairs: list[tuple[str, object]]) -> None:
    """Two keys of Python, such as 1 and "1", may be one of JSON, and whoever reads it drops a value."""
    seen = set()
    for key, _ in pairs:
        if key in seen:
            raise _Twice(key)
        seen.add(key)


_decode_once = json.JSONDecoder(object_pairs_hook=_once).decode


def _why_not(data: bytes) -> str | None:
    why = unfit(data)
    try:
        if why is None and b"{" in data:
            _decode_once(data.decode())
    except _Twice as error:
        return f"several keys of a dictionary are {shorten(repr(str(error)))} in JSON"
    return why


def _write(data: bytes) -> None:
    with contextlib.suppress(OSError):  # a full disk is no reason not to run
        _write_to(1, data)


def _print(text: str, stream: TextIO) -> None:
    # What the task has done to its streams, or a full disk, is no failure of its.
    with contextlib.suppress(BaseException):
        print(text, file=stream)
