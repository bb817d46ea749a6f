"""Makes a project of a function or class of the running program, for `create_api(task=…)`.

The task is pickled by value, together with the code that it uses from the caller's own modules. The
job imports installed packages where it runs: `requirements` lists them.
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

# cloudpickle's registry of modules to pickle by value is global.
_REGISTRY_LOCK = Lock()
_LOADER = '''"""Loads the task, which was deployed from Python, from `task.pkl`."""

import pickle
from pathlib import Path

{name} = pickle.loads(Path(__file__).with_name("task.pkl").read_bytes())
'''


@contextmanager
def project_of(
    task: Task, requirements: Sequence[str], conda_packages: Sequence[str] = ()
) -> Iterator[Path]:
    """Make a temporary project folder that contains the task. Its Python file is `MODULE`.

    Args:
        task: a function `task(config)`, or a class with `__call__(self, config)`.
        requirements: lines for the requirements.txt.
        conda_packages: lines for the conda-packages.txt.

    Raises:
        InvalidProject: the task cannot be called by a job or cannot be pickled, or the lines are
            invalid.
    """
    _check_task(task)
    pip_lines = _requirements_lines(requirements)
    conda_lines = _conda_lines(conda_packages)
    pickled = _pickle(task)
    name = "Task" if inspect.isclass(task) else "task"
    with tempfile.TemporaryDirectory(prefix="cortex-task-") as folder:
        project = Path(folder)
        (project / "task.pkl").write_bytes(pickled)
        (project / MODULE).write_text(_LOADER.format(name=name), "utf-8")
        (project / "requirements.txt").write_text("".join(f"{r}\n" for r in pip_lines), "utf-8")
        (project / "conda-packages.txt").write_text("".join(f"{c}\n" for c in conda_lines), "utf-8")
        yield project


def _check_task(task: Task) -> None:
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
            raise InvalidProject(
                f"class {task.__name__} needs arguments; a job creates it without any"
            )
        if not _accepts(call, None, {}):
            raise InvalidProject(f"{task.__name__}.__call__ must take (self, config)")
    elif not _accepts(task, {}):
        raise InvalidProject(f"{_name(task)} must take one argument, the job's config")


def _accepts(function: Task, *arguments: object) -> bool:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True  # written in C, without a signature: only a call can show it
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def _requirements_lines(requirements: Sequence[str]) -> list[str]:
    _check_lines("requirements", requirements, '["scikit-learn==1.8.0"]')
    if any(re.match(r"cloudpickle\b", r.strip(), re.IGNORECASE) for r in requirements):
        return list(requirements)
    return [*requirements, f"cloudpickle=={cloudpickle.__version__}"]


def _conda_lines(packages: Sequence[str]) -> list[str]:
    """The lines of conda-packages.txt, with this version of Python.

    A pickle of a function contains byte code, which no other version runs.
    """
    _check_lines("conda_packages", packages, '["python=3.11"]')
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    pins = [match for line in packages if (match := _PYTHON.fullmatch(line.strip()))]
    other = next((match[0] for match in pins if match[1] != own), None)
    if other is not None:
        raise InvalidProject(
            f"conda_packages asks for {other!r}, but the task comes from Python {own}, and "
            "no other version runs its byte code. Call create_api with that Python, or deploy a "
            "folder with project_dir="
        )
    return [*packages] if pins else [f"python={own}", *packages]


def _check_lines(name: str, lines: Sequence[str], example: str) -> None:
    if isinstance(lines, str) or not all(isinstance(line, str) for line in lines):
        raise InvalidProject(f"{name} is {lines!r}; it must be a list of strings, as in {example}")


def _pickle(task: Task) -> bytes:
    with _REGISTRY_LOCK:
        return _pickle_by_value(task)


def _pickle_by_value(task: Task) -> bytes:
    registered = cloudpickle.list_registry_pickle_by_value()
    own = [module for module in _own_modules(task) if module.__name__ not in registered]
    for module in own:
        cloudpickle.register_pickle_by_value(module)
    try:
        pickled: bytes = cloudpickle.dumps(task)
    except Exception as error:  # an object that the task refers to may raise any exception
        raise InvalidProject(
            f"{_name(task)} refers to an object that cannot be sent to another process "
            f"({type(error).__name__}: {error}); create the object inside the task"
        ) from error
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)
    return pickled


def _own_modules(task: Task) -> list[ModuleType]:
    """The loaded modules in the import folder of the task's module, without installed packages."""
    task_module = inspect.getmodule(task if hasattr(task, "__module__") else type(task))
    file = getattr(task_module, "__file__", None)
    if task_module is None or file is None:
        folder = Path.cwd()
    else:
        folder = Path(file).resolve().parents[_depth(task_module)]
    return [
        module
        for name, module in list(sys.modules.items())
        if isinstance(module, ModuleType)
        and module.__name__ == name
        and name not in ("__main__", "__mp_main__")
        and name.partition(".")[0] != "cortex"
        and _is_in(module, folder)
        and not _is_installed(module)
    ]


def _depth(module: ModuleType) -> int:
    return module.__name__.count(".") + hasattr(module, "__path__")


def _is_in(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve().is_relative_to(folder)


def _is_installed(module: ModuleType) -> bool:
    file = Path(module.__file__ or "").resolve()
    folders = [sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    return any(file.is_relative_to(Path(folder).resolve()) for folder in folders)


def _name(task: Task) -> str:
    return f"task {getattr(task, '__qualname__', type(task).__qualname__)!r}"
