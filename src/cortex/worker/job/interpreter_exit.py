"""The end of a job's interpreter: everything that Python flushes, closes and runs at its exit. Called by `task`
when the task is over.

The job was forked from the middle of a fork server. A full finalization is exact, and takes apart an
interpreter that the job shares with all others: the kernel copies each page of it. So a job that has
loaded nothing but Python code goes the steps of `Py_FinalizeEx` itself, for what it has made alone; one with
threads or extension modules of its own is finalized in full.
"""

from __future__ import annotations

import _thread
import _warnings
import atexit
import ctypes
import gc
import io
import os
import sys
import types
from _weakref import ref  # the module around it would be pages that each fork copies

from cortex.worker import standard
from cortex.worker.syscalls import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn, ParamSpec

    P = ParamSpec("P")

globals()["__builtins__"] = standard.BUILTINS

INTERRUPTED = -2
"""Of `end`: a KeyboardInterrupt that nothing has caught, after which Python ends itself by SIGINT."""
FLUSH_FAILED = 120
"""The exit code of a Python that could not flush its standard streams (`Py_RunMain`)."""
# With the interpreter's lock, as Python itself calls them: a daemon thread runs no more.
_libc = ctypes.PyDLL(None)
_fflush, _libc_exit = _libc.fflush, _libc.exit
_finalize_and_exit = ctypes.pythonapi.Py_Exit
# By names of their own: a task may put others in their places, and Python ends as ever.
_count_threads, _run_exit_handlers = _thread._count, atexit._run_exitfuncs
_exit, _getpid, _kill, _listdir = os._exit, os.getpid, os.kill, os.listdir
_get_objects, _is_finalized = gc.get_objects, gc.is_finalized
_callbacks, _garbage = gc.callbacks, gc.garbage
_set_trace, _set_profile = sys.settrace, sys.setprofile
_get_trace, _get_profile = sys.gettrace, sys.getprofile
_modules, _filters, _FILTERS = sys.modules, _warnings.filters, len(_warnings.filters)
_dict_of: Any = vars(types.ModuleType)["__dict__"]
_STREAMS = (("stdin", "__stdin__"), ("stdout", "__stdout__"), ("stderr", "__stderr__"))


_INERT = frozenset(
    {
        classmethod,
        dict,
        frozenset,
        list,
        property,
        set,
        staticmethod,
        tuple,
        type,
        types.BuiltinFunctionType,
        types.CellType,
        types.FrameType,
        types.FunctionType,
        types.GetSetDescriptorType,
        types.MemberDescriptorType,
        types.MethodType,
        types.ModuleType,
        types.WrapperDescriptorType,
    }
)


def _from_nowhere(function: Callable[P, object]) -> Callable[P, object]:
    """What runs at the end has no line of the user's program: a warning names this one, as in a finalization."""
    file, line = ("<sys>", 0) if sys.version_info >= (3, 13) else ("sys", 1)
    code = function.__code__.replace(co_filename=file, co_firstlineno=line, co_name="<module>")
    names = {
        "__name__": "sys",
        "__builtins__": standard.BUILTINS,
        "gc": types.SimpleNamespace(collect=gc.collect),  # a task may change the module's
        "dict": dict,
    }
    return types.FunctionType(code, names)


_collect = _from_nowhere(lambda: gc.collect())  # noqa: PLW0108  # it has no code to name otherwise
_update = _from_nowhere(lambda names, others: dict.update(names, others))  # noqa: PLW0108


class _Shared:
    """Where in `sys.modules` the job's own begin: after this one."""

    last = ""
    modules: dict[int, object] = {}  # noqa: RUF012
    """By their addresses."""


class Watchers:
    """What the task has set by `sys.settrace` and `sys.setprofile` and left so: it sees the code of the user's that runs
    at the end, and none of this package's."""

    trace: Any = None
    profile: Any = None


def mark() -> None:
    """What is loaded now is shared by all jobs."""
    _Shared.last = next(reversed(_modules))
    _Shared.modules = {id(each): each for each in _modules.values()}


def end(code: int, *, has_imported: bool) -> NoReturn:
    """End this process as Python ends.

    Args:
        code: its exit code, unless the standard streams cannot be flushed; or `INTERRUPTED`.
        has_imported: whether the fork server has loaded more than what is Python's own.
    """
    _run(getattr(_modules.get("threading"), "_shutdown", None))
    new = _own_modules()
    has_threads = _count_threads() > 0 or (has_imported and _has_threads_of_c())
    uses_c = has_imported
    # The collector calls and tells of these in a finalization.
    is_asked = bool(_callbacks or _garbage)
    if has_threads or is_asked or len(new) > 1:  # beside the task's own
        is_full = has_threads or is_asked or any(map(_is_foreign_extension, new))
        if code != INTERRUPTED and is_full:
            if Watchers.trace is not None or Watchers.profile is not None:
                _set_profile(Watchers.profile)
                _set_trace(Watchers.trace)
            _finalize_and_exit(code)
        uses_c = uses_c or "ctypes" in new or any(map(_is_extension, new))
    _run(_run_exit_handlers, tells=sys.version_info >= (3, 10))  # before that it has told of each
    is_flushed = _flush_streams()
    # With warnings asked for, also of objects that the collector does not know.
    try:
        if len(new) > 1 or sys.warnoptions or len(_filters) != _FILTERS or not _is_inert():
            _take_apart(new)
    except _Refused:
        if code != INTERRUPTED:
            _finalize_and_exit(code)
    if code == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _kill(_getpid(), signal.SIGINT)
    code = code if is_flushed else FLUSH_FAILED
    if uses_c:
        _fflush(None)
        _libc_exit(code)  # destructors of C++ objects and exit handlers of C libraries run in here
    _exit(code)


def rehearse() -> None:
    """Go the way of `end` for a program that has left nothing, and do not end (`child.rehearse`)."""
    _run(None)
    _own_modules()
    _count_threads()
    _flush_streams()
    _is_inert()


def _has_threads_of_c() -> bool:
    try:
        return len(_listdir("/proc/self/task")) > 1
    except OSError:  # there is no descriptor to ask with: a full finalization is right for all
        return True


def _own_modules() -> list[str]:
    """The names of the modules that the job has loaded, in their order. From the end: to look at each name of
    those that are shared would copy their pages."""
    found = []
    for name in reversed(_modules):
        if name == _Shared.last:
            break
        found.append(name)
    found.reverse()
    if len(found) > 1:  # a program may take a shared one out, and put it in again behind its own
        found = [name for name in found if id(_modules[name]) not in _Shared.modules]
    return found


def _run(step: object, *, tells: bool = True) -> None:
    """One that fails does not keep the others from being done.

    Args:
        tells: whether its failure is told of.
    """
    try:
        if callable(step):
            # In here: a watcher sees the functions that are called, and is not to see any of these.
            watched = Watchers.trace is not None or Watchers.profile is not None
            try:
                if watched:
                    _set_profile(Watchers.profile)
                    _set_trace(Watchers.trace)
                step()
            finally:
                if watched:
                    Watchers.trace, Watchers.profile = _get_trace(), _get_profile()
                    _set_trace(None)
                    _set_profile(None)
    except BaseException as error:  # noqa: BLE001, RUF100
        if tells:
            _ignored(error, step)


def names_in(module: object) -> dict[str, object]:
    """The names in a module; none of what else there may be in its place. One that loads itself when it is asked for
    an attribute is not asked."""
    if not issubclass(type(module), types.ModuleType):
        return {}
    names: dict[str, object] = _dict_of.__get__(module)
    return names


def _is_extension(name: str) -> bool:
    spec = names_in(_modules[name]).get("__spec__")
    return type(getattr(spec, "loader", None)).__name__ == "ExtensionFileLoader"


def _is_foreign_extension(name: str) -> bool:
    """Whether it is machine code that does not belong to Python: what that does at its end is known to
    nobody here."""
    return _is_extension(name) and name.partition(".")[0] not in standard.NAMES


def _flush_streams() -> bool:
    """As `flush_std_files` of CPython does: whether it could."""
    is_flushed = True
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name, None)
        if stream is None or _is_closed(stream):
            continue
        try:
            stream.flush()
        except BaseException as error:  # noqa: BLE001, RUF100
            is_flushed = False
            if name == "stdout":  # of the other there is nowhere to say so
                _ignored(error, stream)
    return is_flushed


def _is_closed(stream: object) -> bool:
    try:
        return bool(stream.closed)  # type: ignore[attr-defined]  # the error is handled
    except BaseException:  # noqa: BLE001, RUF100  # a stream of the user's that cannot tell
        return False


def _ignored(error: BaseException, where: object) -> None:
    """Tell of an error that nothing can catch, as Python does."""
    trace = error.__traceback__
    told = _hook_arguments()((type(error), error, trace and trace.tb_next, None, where))
    try:
        sys.unraisablehook(told)
    except BaseException:  # noqa: BLE001, RUF100  # a hook of the user's
        sys.__unraisablehook__(told)


def _hook_arguments() -> type:
    """The class of what `sys.unraisablehook` takes, which has no name: from an error in the end of an object."""
    seen: list[type] = []
    hook = sys.unraisablehook
    sys.unraisablehook = lambda told: seen.append(type(told))
    try:
        thing = _Thing()
        reference = ref(thing, lambda _: 1 // 0)
        del thing  # it is called with this, while the reference is there
        del reference
    finally:
        sys.unraisablehook = hook
    return seen[0]


class _Refused(Exception):
    """An audit hook of the user's does not let anybody look at all objects."""


class _Thing:
    """Something that a weak reference can be made to."""


def _is_inert() -> bool:
    """Whether all that the job has left is such that nothing happens at its end: functions and plain data."""
    for each in _objects():  # those of the fork server are frozen
        kind = type(each)
        if kind not in _INERT or (kind is type and "__del__" in each.__dict__):
            return False
    return True


def _objects() -> list[object]:
    try:
        return _get_objects()
    except BaseException as error:
        raise _Refused from error


def _take_apart(new: list[str]) -> None:
    """As `finalize_modules` of CPython does, for the modules that the job has loaded."""
    # While all names are there: what ends in one collection ends in a good order, a text file before its buffer.
    _collect()
    # Without the first, what runs at the end imports nothing, as in a finalization.
    for name in ("meta_path", "last_type", "last_value", "last_traceback", "last_exc"):
        if hasattr(sys, name):
            setattr(sys, name, None)
    for name, original in _STREAMS:
        stream = getattr(sys, original, None)
        if getattr(sys, name, None) is not stream:
            setattr(sys, name, stream)
    stream = None
    dying: list[ref[Any]] = []
    for name in new:
        module = _modules.pop(name, None)
        # In its place may be any object of the user's.
        if issubclass(type(module), types.ModuleType):
            dying.append(ref(module))
    module = None
    # Most modules end with this, with their globals whole for the code that runs at their end.
    _collect()
    is_any_left = False
    for found in reversed(dying):  # each in its turn: one may go with the one before
        left = found()
        if left is not None:
            is_any_left = True
            _clear(names_in(left))
            left = None
    if is_any_left:
        # What ends now has no streams in Python, where the module sys has ended before.
        streams = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = None
        _collect()
        sys.stdout, sys.stderr = streams
    _end_what_is_left()


def _clear(names: dict[str, object]) -> None:
    """As `_PyModule_ClearDict` does: those with one underscore first."""
    first = [name for name in names if name[:1] == "_" and name[1:2] != "_"]
    _update(names, dict.fromkeys(first))
    others = [name for name in names if name != "__builtins__"]
    _update(names, dict.fromkeys(others))


def _end_what_is_left() -> None:
    """What something else than a module of the job's keeps: an attribute of a module that all share. Of files the
    outer layers first, which write into the inner ones."""
    # Of the job's own: those of the fork server are frozen.
    left = [
        each for each in _objects() if hasattr(type(each), "__del__") and not _is_finalized(each)
    ]
    for each in sorted(left, key=_layer):
        try:
            if isinstance(each, io.IOBase):
                each.close()
            else:
                type(each).__del__(each)  # type: ignore[attr-defined]  # they were chosen by that
        except BaseException:  # noqa: BLE001, RUF100  # of the user's, or a full disk
            pass


def _layer(thing: object) -> int:
    if type(thing).__module__ != "_io":
        return 0  # written in Python: GzipFile and its like
    return 1 if isinstance(thing, io.TextIOBase) else 2
