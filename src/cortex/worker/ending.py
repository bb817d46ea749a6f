"""The end of a job's interpreter: everything that Python flushes, closes and runs at its exit. Called by `task`
when the task is over.

The job was forked from the middle of a fork server. A full finalization is exact, and takes apart an
interpreter that the job shares with all others: the kernel copies each page of it. So a job that has
loaded nothing but Python code goes the steps of `Py_FinalizeEx` itself, for what it has made alone; one with
threads or extension modules of its own is finalized in full.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import io
import os
import sys
import weakref

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import NoReturn

    Dying = list[tuple[str, weakref.ref[ModuleType]]]

FLUSH_FAILED = 120
"""The exit code of a Python that could not flush its standard streams (`Py_RunMain`)."""
# With the interpreter's lock, as Python itself calls them: a daemon thread runs no more.
_libc = ctypes.PyDLL(None)
_fflush, _libc_exit = _libc.fflush, _libc.exit
_finalize_and_exit = ctypes.pythonapi.Py_Exit
_SPECIAL = (
    "path",
    "argv",
    "ps1",
    "ps2",
    "last_type",
    "last_value",
    "last_traceback",
    "last_exc",
    "path_hooks",
    "path_importer_cache",
    "meta_path",
)
_STREAMS = (("stdin", "__stdin__"), ("stdout", "__stdout__"), ("stderr", "__stderr__"))


def end(code: int, known: frozenset[str]) -> NoReturn:
    """End this process as Python ends.

    Args:
        code: its exit code, unless the standard streams cannot be flushed.
        known: the modules that the fork server had loaded.
    """
    _run(getattr(sys.modules.get("threading"), "_shutdown", None))
    new = [name for name in sys.modules if name not in known]
    if len(os.listdir("/proc/self/task")) > 1 or any(map(_is_foreign_extension, new)):
        _finalize_and_exit(code)
    _run(atexit._run_exitfuncs)
    is_flushed = _flush_streams()
    _take_apart(new)
    is_flushed = _flush_streams() and is_flushed
    _fflush(None)
    # The destructors of C++ objects and the exit handlers of C libraries run in here.
    _libc_exit(code if is_flushed else FLUSH_FAILED)
    os._exit(code)  # not reached


def _run(step: object) -> None:
    """One that fails does not keep the others from being done."""
    try:
        if callable(step):
            step()
    except BaseException as error:  # noqa: BLE001, RUF100
        sys.__excepthook__(type(error), error, error.__traceback__)


def _is_foreign_extension(name: str) -> bool:
    """Whether it is machine code that does not belong to Python: what that does at its end is known to
    nobody here."""
    spec = getattr(sys.modules[name], "__spec__", None)
    loader = type(getattr(spec, "loader", None)).__name__
    return loader == "ExtensionFileLoader" and name.partition(".")[0] not in sys.stdlib_module_names


def _flush_streams() -> bool:
    is_flushed = True
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name, None)
        try:
            if stream is None or stream.closed:
                continue
            stream.flush()
        except BaseException as error:  # noqa: BLE001, RUF100
            # Where standard error itself fails there is nowhere to say so.
            if name == "stdout":
                is_flushed = False
                _run(lambda error=error: sys.__excepthook__(type(error), error, None))
    return is_flushed


def _take_apart(new: list[str]) -> None:
    """As `finalize_modules` of CPython does, for the modules that the job has loaded."""
    gc.collect()
    modules = sys.modules
    for name in _SPECIAL:
        if hasattr(sys, name):
            setattr(sys, name, None)
    for name, original in _STREAMS:
        setattr(sys, name, getattr(sys, original, None))
    dying: Dying = []
    for name in new:
        module = modules.pop(name, None)
        try:
            dying.append((name, weakref.ref(module)))  # type: ignore[arg-type]  # the error is handled
        except TypeError:
            pass  # an object of the user's in a module's place, or nothing
    module = None
    # Most modules end with this, with their globals whole for the code that runs at their end.
    gc.collect()
    for _, found in reversed(dying):
        left = found()
        if left is not None:
            _clear(vars(left))
    left = None
    gc.collect()
    _close_files()


def _clear(names: dict[str, object]) -> None:
    """As `_PyModule_ClearDict` does: those with one underscore first."""
    for name in list(names):
        if name[:1] == "_" and name[1:2] != "_":
            names[name] = None
    for name in list(names):
        if name != "__builtins__":
            names[name] = None


def _close_files() -> None:
    """Files that something else than a module of the job's keeps, an attribute of a module that all share:
    outer layers first, which write into the inner ones."""
    # Of the job's own: those of the fork server are frozen.
    files = [each for each in gc.get_objects() if isinstance(each, io.IOBase)]
    for each in sorted(files, key=_layer):
        try:
            each.close()
        except BaseException:  # noqa: BLE001, RUF100  # of the user's, or a full disk
            pass


def _layer(file: io.IOBase) -> int:
    if type(file).__module__ != "_io":
        return 0  # written in Python: GzipFile and its like
    return 1 if isinstance(file, io.TextIOBase) else 2
