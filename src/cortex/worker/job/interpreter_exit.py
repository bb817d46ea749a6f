"""Ends a job's interpreter: everything that Python flushes, closes and runs at its exit. Called by
`task` when the task has ended.

The job was forked from a running fork server. A full finalization is exact, but it destroys an
interpreter whose pages the job shares with all other jobs: the kernel would copy each of them. A
job that has loaded Python code alone therefore runs the steps of `Py_FinalizeEx` here, only for
what the job itself has made. A job with threads or with extension modules of its own is finalized
in full.
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
from _weakref import ref  # importing weakref would add pages that each fork copies

from cortex.worker import standard
from cortex.worker.syscalls import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn, ParamSpec

    P = ParamSpec("P")

globals()["__builtins__"] = standard.BUILTINS

INTERRUPTED = -2
"""For `exit_interpreter`: after an uncaught KeyboardInterrupt, Python kills itself by SIGINT."""
FLUSH_FAILED = 120
"""Python's exit code if it could not flush its standard streams (`Py_RunMain`)."""
# PyDLL keeps the GIL during the call, as Python does: no daemon thread runs any more.
_libc = ctypes.PyDLL(None)
_fflush, _libc_exit = _libc.fflush, _libc.exit
_finalize_and_exit = ctypes.pythonapi.Py_Exit
# Bound to names of this module: a task may replace the attributes, which does not change how Python
# itself ends.
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


def _without_location(function: Callable[P, object]) -> Callable[P, object]:
    """A copy of a function whose warnings name the location that they name in a finalization: at
    that time, no line of the user's program runs."""
    file, line = ("<sys>", 0) if sys.version_info >= (3, 13) else ("sys", 1)
    code = function.__code__.replace(co_filename=file, co_firstlineno=line, co_name="<module>")
    names = {
        "__name__": "sys",
        "__builtins__": standard.BUILTINS,
        "gc": types.SimpleNamespace(collect=gc.collect),  # a task may replace gc.collect
        "dict": dict,
    }
    return types.FunctionType(code, names)


_collect = _without_location(lambda: gc.collect())  # noqa: PLW0108  # a built-in function has no code to copy
_update = _without_location(lambda names, others: dict.update(names, others))  # noqa: PLW0108


class _Shared:
    """The modules that the job shares with the fork server."""

    last = ""
    """The last of them in `sys.modules`: the job's own modules follow."""
    modules: dict[int, object] = {}  # noqa: RUF012
    """By id."""


class Watchers:
    """The trace and profile functions that the task has left set. They observe the user's code that
    runs at the end, but no code of this package."""

    trace: Any = None
    profile: Any = None


def mark_shared_modules() -> None:
    """Note the modules that are loaded now: all jobs share them."""
    _Shared.last = next(reversed(_modules))
    _Shared.modules = {id(each): each for each in _modules.values()}


def exit_interpreter(code: int, *, has_imported: bool) -> NoReturn:
    """End this process as Python does.

    Args:
        code: the exit code, unless the standard streams cannot be flushed; or `INTERRUPTED`.
        has_imported: the fork server has imported modules ahead.
    """
    _run_step(getattr(_modules.get("threading"), "_shutdown", None))
    new = _job_modules()
    has_threads = _count_threads() > 0 or (has_imported and _has_c_threads())
    uses_c = has_imported
    # In a finalization, the collector calls the callbacks and warns of the garbage.
    uses_gc_hooks = bool(_callbacks or _garbage)
    if has_threads or uses_gc_hooks or len(new) > 1:  # one is the task's own module
        is_full = has_threads or uses_gc_hooks or any(map(_is_foreign_extension, new))
        if code != INTERRUPTED and is_full:
            if Watchers.trace is not None or Watchers.profile is not None:
                _set_profile(Watchers.profile)
                _set_trace(Watchers.trace)
            _finalize_and_exit(code)
        uses_c = uses_c or "ctypes" in new or any(map(_is_extension, new))
    _run_step(
        _run_exit_handlers, reports=sys.version_info >= (3, 10)
    )  # before, atexit reported each error
    is_flushed = _flush_streams()
    # If the user has enabled warnings: objects that the collector does not track may also warn.
    try:
        if (
            len(new) > 1
            or sys.warnoptions
            or len(_filters) != _FILTERS
            or not _has_inert_objects_only()
        ):
            _finalize_modules(new)
    except _Refused:
        if code != INTERRUPTED:
            _finalize_and_exit(code)
    if code == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _kill(_getpid(), signal.SIGINT)
    code = code if is_flushed else FLUSH_FAILED
    if uses_c:
        _fflush(None)
        _libc_exit(code)  # runs destructors of C++ objects and exit handlers of C libraries
    _exit(code)


def warm_up() -> None:
    """Run the steps of `exit_interpreter` for a program that has left nothing, without the exit
    (see `process.warm_up`)."""
    _run_step(None)
    _job_modules()
    _count_threads()
    _flush_streams()
    _has_inert_objects_only()


def _has_c_threads() -> bool:
    try:
        return len(_listdir("/proc/self/task")) > 1
    except OSError:  # out of descriptors: a full finalization is right in any case
        return True


def _job_modules() -> list[str]:
    """The names of the modules that the job has loaded, in their order. Iterates from the end:
    reading the names of the shared modules would copy their pages."""
    found = []
    for name in reversed(_modules):
        if name == _Shared.last:
            break
        found.append(name)
    found.reverse()
    if len(found) > 1:  # a program may remove a shared module and add it again at the end
        found = [name for name in found if id(_modules[name]) not in _Shared.modules]
    return found


def _run_step(step: object, *, reports: bool = True) -> None:
    """Run one step of the exit. Its failure does not prevent the next steps.

    Args:
        reports: whether to report its failure.
    """
    try:
        if callable(step):
            # Inline: a trace function would observe the calls of functions of this module.
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
        if reports:
            _report_unraisable(error, step)


def names_in(module: object) -> dict[str, object]:
    """The names in a module; empty for any other object, which may stand in its place. Reads the
    dict of the module: reading an attribute would load a lazy module."""
    if not issubclass(type(module), types.ModuleType):
        return {}
    names: dict[str, object] = _dict_of.__get__(module)
    return names


def _is_extension(name: str) -> bool:
    spec = names_in(_modules[name]).get("__spec__")
    return type(getattr(spec, "loader", None)).__name__ == "ExtensionFileLoader"


def _is_foreign_extension(name: str) -> bool:
    """Whether a module is machine code of a third party, whose exit behaviour is unknown here."""
    return _is_extension(name) and name.partition(".")[0] not in standard.NAMES


def _flush_streams() -> bool:
    """Flush stdout and stderr, as `flush_std_files` of CPython does; False if that failed."""
    is_flushed = True
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name, None)
        if stream is None or _is_closed(stream):
            continue
        try:
            stream.flush()
        except BaseException as error:  # noqa: BLE001, RUF100
            is_flushed = False
            if name == "stdout":  # for stderr, there is nowhere to report it
                _report_unraisable(error, stream)
    return is_flushed


def _is_closed(stream: object) -> bool:
    try:
        return bool(stream.closed)  # type: ignore[attr-defined]  # the error is handled
    except BaseException:  # noqa: BLE001, RUF100  # a broken stream of the user
        return False


def _report_unraisable(error: BaseException, where: object) -> None:
    """Report an error that nothing can catch, as Python does."""
    trace = error.__traceback__
    arguments = _hook_arguments_class()((type(error), error, trace and trace.tb_next, None, where))
    try:
        sys.unraisablehook(arguments)
    except BaseException:  # noqa: BLE001, RUF100  # a hook of the user
        sys.__unraisablehook__(arguments)


def _hook_arguments_class() -> type:
    """The class of the argument of `sys.unraisablehook`, which has no public name: found by raising
    an error in a weakref callback."""
    classes: list[type] = []
    hook = sys.unraisablehook
    sys.unraisablehook = lambda arguments: classes.append(type(arguments))
    try:
        thing = _Referent()
        reference = ref(thing, lambda _: 1 // 0)
        del thing  # calls the callback, as the reference still exists
        del reference
    finally:
        sys.unraisablehook = hook
    return classes[0]


class _Refused(Exception):
    """An audit hook of the user forbids `gc.get_objects`."""


class _Referent:
    """An object that a weak reference can refer to."""


def _has_inert_objects_only() -> bool:
    """Whether the job has left only objects without finalizers: functions and plain data."""
    for each in _objects():  # without those of the fork server, which are frozen
        kind = type(each)
        if kind not in _INERT or (kind is type and "__del__" in each.__dict__):
            return False
    return True


def _objects() -> list[object]:
    try:
        return _get_objects()
    except BaseException as error:
        raise _Refused from error


def _finalize_modules(new: list[str]) -> None:
    """Destroy the modules that the job has loaded, as `finalize_modules` of CPython does."""
    # While all names exist: a collection ends a text file before its buffer, for instance.
    _collect()
    # Without meta_path, finalizers cannot import anything, as in a finalization.
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
        # The user may have put any object in the module's place.
        if issubclass(type(module), types.ModuleType):
            dying.append(ref(module))
    module = None
    # Most modules end here: their globals are complete while their finalizers run.
    _collect()
    any_left = False
    for found in reversed(dying):  # one by one: a module may end together with the one before
        left = found()
        if left is not None:
            any_left = True
            _clear(names_in(left))
            left = None
    if any_left:
        # In Python, the module sys has ended before: finalizers have no streams from now on.
        streams = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = None
        _collect()
        sys.stdout, sys.stderr = streams
    _finalize_leftovers()


def _clear(names: dict[str, object]) -> None:
    """Set all names to None as `_PyModule_ClearDict` does: those with one underscore first."""
    first = [name for name in names if name[:1] == "_" and name[1:2] != "_"]
    _update(names, dict.fromkeys(first))
    others = [name for name in names if name != "__builtins__"]
    _update(names, dict.fromkeys(others))


def _finalize_leftovers() -> None:
    """Finalize the job's objects that other references keep alive: attributes of shared modules,
    for instance. Outer layers of files come first, because they write into the inner ones."""
    # The job's objects alone: those of the fork server are frozen.
    left = [
        each for each in _objects() if hasattr(type(each), "__del__") and not _is_finalized(each)
    ]
    for each in sorted(left, key=_layer):
        try:
            if isinstance(each, io.IOBase):
                each.close()
            else:
                type(each).__del__(each)  # type: ignore[attr-defined]  # selected by having it
        except BaseException:  # noqa: BLE001, RUF100  # code of the user, or a full disk
            pass


def _layer(thing: object) -> int:
    if type(thing).__module__ != "_io":
        return 0  # written in Python: GzipFile and others
    return 1 if isinstance(thing, io.TextIOBase) else 2
