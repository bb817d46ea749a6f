"""Imports the modules of `definition.preload` into a fork server, and checks that each import is
harmless: a job that is forked afterwards must find the same state as if it had imported the module
itself.

A fork does not copy state outside the memory of the process, or shares it among all jobs: threads,
open files, child processes, temporary folders, shared memory and its locks. Random numbers that
were drawn once would be the same in all jobs. AWS Lambda SnapStart and Android's zygote list the
same kinds of state.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys

from cortex.worker import processes, standard, trees
from cortex.worker.syscalls import signal, signal_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_OUTPUT = 1 << 16
"""Bytes of the output of imports that are kept."""
_HARMLESS = frozenset(
    {
        "PIL._imaging.clear_cache",
        "certifi.core.exit_cacert_ctx",
        "matplotlib._pylab_helpers.Gcf.destroy_all",
        "pyarrow._s3fs.ensure_s3_finalized",
    }
)
"""Exit handlers of libraries whose code was reviewed: they change only the memory of their process.
Handlers of Python itself do the same in every process that imports their modules."""


_FORK_AWARE = frozenset({"jemalloc_bg_thd"})
"""Threads that their library starts again in a forked process (jemalloc:
`background_thread_postfork_child`)."""


class Refused(Exception):
    """A module must not be imported ahead; the message says why."""


class ImportWatch:
    """Finds state that an import has left and that a fork does not copy. Made before any module is
    imported ahead, and before modules of the project can replace those that this class imports."""

    def __init__(self, project: str) -> None:
        import random
        import tempfile

        self._project = project
        self._random = random
        self._tempfile = tempfile
        self._names = _NameCounter()
        tempfile._name_sequence = self._names  # type: ignore[attr-defined]  # tempfile takes all names from it
        self._handlers: list[str] = []
        """Exit handlers that are not Python's own."""
        self.generators: list[object] = []
        """Generators of numpy seeded from the system's entropy: each job seeds them anew."""
        self._real_register = atexit.register
        self._threading_register: Callable[..., object] | None = None
        self._before = self._state()
        atexit.register = self._register  # type: ignore[assignment]  # it has the same signature

    def find_problem(self) -> str | None:
        """Why the last import must not be shared; None if it may be."""
        # Libraries with fork handlers, such as OpenBLAS, end their threads before a fork and start
        # them again when needed.
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        threads = [name for name in map(_thread_name, _threads()) if name not in _FORK_AWARE]
        if threads:
            return f"it starts threads, {len(threads)} here, which a fork does not copy"
        if processes.children(os.getpid()):
            return "it starts processes, which would be shared by all jobs"
        after = self._state()
        written = self._written_path(after)
        if written is not None:
            return f"it writes into the project ({written}), which would be shared by all jobs"
        for words, change in (
            ("it leaves files or sockets open, which would be shared by all jobs", "files"),
            (
                "it maps memory that would be shared by all jobs (a lock of multiprocessing does)",
                "maps",
            ),
            ("it makes a temporary file or folder, which would be shared by all jobs", "names"),
            ("it changes the current folder", "folder"),
            (
                "it draws from or seeds the random numbers of Python: all jobs would have the same",
                "random",
            ),
        ):
            if after[change] != self._before[change]:
                return words
        return self._signal_problem(after) or self._handler_problem() or self._generator_problem()

    def close(self) -> None:
        """Restore what this class has patched."""
        atexit.register = self._real_register
        self._tempfile._name_sequence = None  # type: ignore[attr-defined]

    def _state(self) -> dict[str, object]:
        return {
            "files": set(os.listdir("/proc/self/fd")),
            "maps": set(_shared_maps()),
            "names": self._names.count,
            "folder": os.getcwd(),
            "project": trees.snapshot(self._project),
            "random": self._random.getstate(),
            "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        }

    def _register(self, function: Callable[..., object], *args: object, **named: object) -> object:
        # Handlers that Python itself registers do the same in every process. A library may register
        # a function of Python, such as shutil.rmtree: the caller decides. A caller compiled to C
        # has no frame: then the frame is that of the import, and importlib itself registers
        # nothing.
        name, caller = _full_name(function), str(sys._getframe(1).f_globals.get("__name__"))
        roots = {name.partition(".")[0], caller.partition(".")[0]}
        if name not in _HARMLESS and (not roots <= standard.NAMES or "importlib" in roots):
            self._handlers.append(name)
        return self._real_register(function, *args, **named)

    def _written_path(self, after: dict[str, object]) -> str | None:
        """A path below the project that has changed. New files are removed again."""
        old, new = self._before["project"], after["project"]
        assert isinstance(old, dict) and isinstance(new, dict)
        changed = sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))
        for path in changed:
            if path not in old:
                trees.remove(os.path.join(self._project, path))
        return changed[0] if changed else None

    def _signal_problem(self, after: dict[str, object]) -> str | None:
        old, new = self._before["signals"], after["signals"]
        assert isinstance(old, dict) and isinstance(new, dict)
        changed = [signal_name(number) for number in old if old[number] is not new[number]]
        return f"it sets a handler for {', '.join(changed)}" if changed else None

    def _handler_problem(self) -> str | None:
        import weakref

        finalizers = [each for each in list(weakref.finalize._registry) if each.atexit]  # type: ignore[attr-defined]
        called = [found[1] for each in finalizers if (found := each.peek()) is not None]
        for name in [*self._handlers, *map(_full_name, called)]:
            return f"it registers the exit handler {name}, which would run at the end of every job"
        return None

    def _generator_problem(self) -> str | None:
        shared = getattr(sys.modules.get("numpy.random.mtrand"), "_rand", None)
        if shared is not None and _was_used(shared):
            return (
                "it draws from or seeds the random numbers of numpy: all jobs would have the same"
            )
        self.generators = [] if shared is None else [shared]
        # It makes a new generator in each forked process.
        pid_aware = self._tempfile._RandomNameSequence  # type: ignore[attr-defined]
        known = {id(vars(e).get("_rng")) for e in gc.get_objects() if isinstance(e, pid_aware)}
        known |= {id(self._random._inst), id(shared)}
        for each in gc.get_objects():
            if id(each) in known or isinstance(each, self._random.SystemRandom):
                continue
            if isinstance(each, self._random.Random):
                kind = _full_name(type(each))
                return (
                    f"it keeps a generator of random numbers ({kind}): all jobs would draw the same"
                )
            module = type(each).__module__
            is_of_numpy = isinstance(module, str) and module.startswith("numpy.random")
            if is_of_numpy and _is_unseeded(each):
                self.generators.append(each)
        return None


class _NameCounter:
    """Replaces the name sequence of `tempfile`, and counts the names that it gives."""

    def __init__(self) -> None:
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.count += 1
        return os.urandom(6).hex()


def preload(names: list[str], watch: ImportWatch, report: Callable[[str], None]) -> bytes:
    """Import modules in this order, and check each.

    Args:
        report: called with the name of each module before its import.

    Returns:
        what the modules have printed.

    Raises:
        Refused: a module must not be imported ahead. As its import cannot be undone, this process
            cannot be used any more.
    """
    start = _output_size()
    for name in names:
        report(name)
        try:
            importlib.import_module(name)
        except BaseException as error:  # noqa: BLE001, RUF100  # each job will show the error
            raise Refused(f"it cannot be imported: {type(error).__name__}: {error}") from None
        problem = watch.find_problem()
        if problem is not None:
            raise Refused(problem)
    sys.stdout.flush()
    sys.stderr.flush()
    return (
        os.pread(2, min(_output_size() - start, MAX_OUTPUT), start)
        if _output_size() > start
        else b""
    )


def forget_shadowed(roots: list[str], startup: frozenset[str]) -> None:
    """Drop modules that the fork server has loaded for its own needs, where a plain interpreter
    would load a module of the project instead: the user's `queue.py`, for instance."""
    for root in roots:
        try:
            entries = os.listdir(root)
        except OSError:
            continue
        for entry in entries:
            name, _, suffix = entry.partition(".")
            is_module = suffix == "py" or suffix.endswith("so")
            if not is_module and not os.path.exists(os.path.join(root, entry, "__init__.py")):
                continue
            if name in sys.modules and name not in startup and name != "cortex":
                for loaded in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
                    del sys.modules[loaded]


def _output_size() -> int:
    """The size of the file behind stdout and stderr. The engine has opened it for reading also."""
    return os.fstat(2).st_size


def _shared_maps() -> Iterator[str]:
    with open("/proc/self/maps") as file:
        for line in file:
            fields = line.split(maxsplit=5)
            if fields[1].endswith("s") and "w" in fields[1]:
                yield line


def _was_used(generator: object) -> bool:
    """Whether a RandomState of numpy differs from one that was just seeded from the system's
    entropy: by its position, and by the first word of its MT19937, which such a seed sets to
    0x80000000 (`init_by_array`)."""
    now, new = (each.get_state(legacy=False)["state"] for each in (generator, type(generator)()))  # type: ignore[attr-defined]
    return bool(now["pos"] != new["pos"] or now["key"][0] != new["key"][0])


def _is_unseeded(value: object) -> bool:
    """Whether this is a generator of numpy that was seeded from the system's entropy. A generator
    with a fixed seed is the same in every process that makes it."""
    source = getattr(value, "bit_generator", None)
    if source is not None:
        entropy = getattr(getattr(source, "seed_seq", None), "entropy", None)
        return isinstance(entropy, int) and entropy >= 1 << 64  # it gives 128 bits
    state: object = getattr(value, "get_state", dict)()
    return isinstance(state, tuple) and int(state[1][0]) == 0x80000000


def _threads() -> list[str]:
    """The ids of all threads except the first."""
    own = str(os.getpid())
    return [thread for thread in os.listdir("/proc/self/task") if thread != own]


def _thread_name(thread: str) -> str:
    try:
        with open(f"/proc/self/task/{thread}/comm") as file:
            return file.read().strip()
    except OSError:
        return ""  # it has ended meanwhile


def _full_name(value: object) -> str:
    return f"{getattr(value, '__module__', '?')}.{getattr(value, '__qualname__', '?')}"
