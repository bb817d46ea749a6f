"""A project made of a function or class that lives in the caller's Python, for `create_api(task=…)`.

The task travels by value: with it goes what it uses of the caller's own modules. What it uses of
installed packages is imported where it runs, so those belong into `requirements`.
"""

from __future__ import annotations

import inspect
import re
import site
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from types import ModuleType

import cloudpickle  # type: ignore[import-untyped]  # it ships no types

from cortex.errors import InvalidProject

Task = Callable[..., object]

MODULE = "task.py"
_PYTHON = re.compile(r"(?:\S+::)?python\s*={1,2}\s*(\d+\.\d+)\S*")

# What is pickled by value is one list for the whole process.
_REGISTRY = Lock()
_LOADER = '''"""The task that was deployed from Python, as `task.pkl` holds it."""

import pickle
from pathlib import Path

{name} = pickle.loads(Path(__file__).with_name("task.pkl").read_bytes())
'''


@contextmanager
def project_of(
    task: Task, requirements: Sequence[str], conda_packages: Sequence[str] = ()
) -> Iterator[Path]:
    """A temporary folder that holds the task as a project, its Python file named `MODULE`."""
    _check(task)
    wanted = _requirements(requirements)
    conda = _conda(conda_packages)
    pickled = _pickle(task)
    name = "Task" if inspect.isclass(task) else "task"
    with tempfile.TemporaryDirectory(prefix="cortex-task-") as folder:
        project = Path(folder)
        (project / "task.pkl").write_bytes(pickled)
        (project / MODULE).write_text(_LOADER.format(name=name), "utf-8")
        (project / "requirements.txt").write_text("".join(f"{r}\n" for r in wanted), "utf-8")
        (project / "conda-packages.txt").write_text("".join(f"{c}\n" for c in conda), "utf-8")
        yield project


def _check(task: Task) -> None:
    if not callable(task):
        raise InvalidProject(
            f"task is {task!r}; it must be a function task(config), "
            "or a class with __call__(self, config)"
        )
    if inspect.isclass(task):
        call = getattr(task, "__call__", None)  # noqa: B004  # of the class, not its metaclass
        if not inspect.isfunction(call):
            raise InvalidProject(f"class {task.__name__} has no method __call__(self, config)")
        if not _accepts(task):
            raise InvalidProject(f"class {task.__name__} cannot be made without arguments")
        if not _accepts(call, None, {}):
            raise InvalidProject(f"{task.__name__}.__call__ must take (self, config)")
    elif not _accepts(task, {}):
        raise InvalidProject(f"{_name(task)} must take one argument, the job's config")


def _accepts(function: Task, *arguments: object) -> bool:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True  # written in C, without a signature: calling it will tell
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def _requirements(requirements: Sequence[str]) -> list[str]:
    _check_lines("requirements", requirements, '["scikit-learn==1.8.0"]')
    if any(re.match(r"cloudpickle\b", r.strip(), re.IGNORECASE) for r in requirements):
        return list(requirements)
    return [*requirements, f"cloudpickle=={cloudpickle.__version__}"]


def _conda(packages: Sequence[str]) -> list[str]:
    """The lines of conda-packages.txt. A pickle holds byte code, which only the same version of Python
    runs."""
    _check_lines("conda_packages", packages, '["python=3.11"]')
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    asked = [found for line in packages if (found := _PYTHON.fullmatch(line.strip()))]
    other = next((found[0] for found in asked if found[1] != own), None)
    if other is not None:
        raise InvalidProject(
            f"conda_packages asks for {other!r}, and the task is sent from Python {own}, whose byte code no "
            "other version runs. Call create_api with that Python, or deploy a folder with project_dir="
        )
    return [*packages] if asked else [f"python={own}", *packages]


def _check_lines(name: str, lines: Sequence[str], example: str) -> None:
    if isinstance(lines, str) or not all(isinstance(line, str) for line in lines):
        raise InvalidProject(f"{name} is {lines!r}; it must be a list of strings, as in {example}")


def _pickle(task: Task) -> bytes:
    with _REGISTRY:
        return _pickle_by_value(task)


def _pickle_by_value(task: Task) -> bytes:
    known = cloudpickle.list_registry_pickle_by_value()
    own = [module for module in _own_modules(task) if module.__name__ not in known]
    for module in own:
        cloudpickle.register_pickle_by_value(module)
    try:
        pickled: bytes = cloudpickle.dumps(task)
    except Exception as error:  # whatever the objects that the task refers to raise
        raise InvalidProject(
            f"{_name(task)} refers to something that cannot be sent to another process "
            f"({type(error).__name__}: {error}); make it inside the task instead"
        ) from error
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)
    return pickled


def _own_modules(task: Task) -> list[ModuleType]:
    """The loaded modules of the folder that the task's module comes from, but for installed ones."""
    module = inspect.getmodule(task if hasattr(task, "__module__") else type(task))
    file = getattr(module, "__file__", None)
    if module is None or file is None:
        home = Path.cwd()
    else:
        home = Path(file).resolve().parents[_depth(module)]
    return [
        found
        for name, found in list(sys.modules.items())
        if isinstance(found, ModuleType)
        and found.__name__ == name
        and name not in ("__main__", "__mp_main__")
        and name.partition(".")[0] != "cortex"
        and _lies_in(found, home)
        and not _is_installed(found)
    ]


def _depth(module: ModuleType) -> int:
    return module.__name__.count(".") + hasattr(module, "__path__")


def _lies_in(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve().is_relative_to(folder)


def _is_installed(module: ModuleType) -> bool:
    file = Path(module.__file__ or "").resolve()
    places = [sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    places += [*site.getsitepackages(), site.getusersitepackages()]
    return any(file.is_relative_to(Path(place).resolve()) for place in places)


def _name(task: Task) -> str:
    return f"task {getattr(task, '__qualname__', type(task).__qualname__)!r}"
