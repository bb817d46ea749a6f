"""Checks a task's file: it must define a task that a job can call. The file is parsed and never
run. Called by `check`.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path

from cortex.spec.yaml_lines import did_you_mean, quoted

_MAX_PARSED_BYTES = 4 << 20
_EVERYTHING = "*"
_Function = ast.FunctionDef | ast.AsyncFunctionDef
# With these a module can rebind any of its names.
_REBIND = {"exec", "globals", "setattr", "vars"}


def parse(file: Path) -> ast.Module | SyntaxError | None:
    """The syntax tree of a Python file, or its error; None for a file that is too large or too deep
    to parse."""
    if file.stat().st_size > _MAX_PARSED_BYTES:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(file.read_bytes())
    except SyntaxError as error:
        return error
    except ValueError as error:
        return SyntaxError(str(error))
    except (RecursionError, MemoryError):
        return None


def task_errors(module: ast.Module, path: str) -> Iterator[str]:
    """The reasons why no job could call the task of a file, as far as the source shows them."""
    names = list(_names(module.body))
    if not {"Task", "task", _EVERYTHING} & set(names):
        hint = did_you_mean("Task", names)
        yield (
            f"{quoted(path)} defines neither a class Task nor a function task(config) "
            f"at its top level{hint}"
        )
        return
    called = _called(module, names)
    if called is None:
        return
    name = "task" if called.name == "task" else "__call__ of the class Task"
    generator = next(
        (node for node in _own_nodes(called) if isinstance(node, ast.Yield | ast.YieldFrom)), None
    )
    if generator is not None:
        yield (
            f"the {name} in {quoted(path)} is a generator (line {generator.lineno} has yield), and "
            "calling a generator runs none of its code; return the result, and print progress"
        )
    elif isinstance(called, ast.AsyncFunctionDef):
        signature = "task(config)" if called.name == "task" else "__call__(self, config)"
        yield f"the {name} in {quoted(path)} is async; define def {signature} and call asyncio.run"


def _called(module: ast.Module, names: list[str]) -> _Function | None:
    """The function that a job calls; None unless the source makes it certain: one def, without
    decorators, and no other binding of its name. The kind of a decorated, inherited or assigned
    function is known at run time only."""
    name = "Task" if "Task" in names else "task"
    if _EVERYTHING in names or names.count(name) != 1 or _may_rebind(module, name):
        return None
    kind = ast.ClassDef if name == "Task" else _Function
    node = _defined(module.body, name, kind)
    if not isinstance(node, ast.ClassDef):
        return node if isinstance(node, _Function) else None
    if node.bases or node.keywords or list(_names(node.body)).count("__call__") != 1:
        return None
    method = _defined(node.body, "__call__", _Function)
    return method if isinstance(method, _Function) else None


def _defined(body: list[ast.stmt], name: str, kind: object) -> ast.stmt | None:
    for node in body:
        if isinstance(node, kind) and node.name == name:  # type: ignore[arg-type,attr-defined]  # kinds of nodes
            return None if node.decorator_list else node  # type: ignore[attr-defined]
    return None


def _may_rebind(module: ast.Module, name: str) -> bool:
    for node in ast.walk(module):
        if isinstance(node, ast.Global) and name in node.names:
            return True
        if isinstance(node, ast.Name) and node.id in _REBIND:
            return True
        if isinstance(node, ast.Attribute) and node.attr in {"__call__", "modules"}:
            return True
    return False


def _own_nodes(function: _Function) -> Iterator[ast.AST]:
    """The nodes of a function, without the nodes of functions and classes inside it."""
    pending: list[ast.AST] = list(function.body)
    while pending:
        node = pending.pop()
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield node
            pending += ast.iter_child_nodes(node)


def _names(body: list[ast.stmt]) -> Iterator[str]:
    """The names that statements define, including the statements inside if, try, with and match."""
    pending = list(body)  # no recursion: of a thousand elifs each is inside the one before
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))
        for field in ("body", "orelse", "finalbody"):
            pending += getattr(node, field, [])
        for inner in (*getattr(node, "handlers", []), *getattr(node, "cases", [])):
            pending += inner.body
