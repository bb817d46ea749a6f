"""Explains why the kernel does not run a program. Called by `job.process` after a failed exec, and
by `projects.programs` at deploy.
"""

from __future__ import annotations

import errno
import os

_HEAD = 4096
_ELF = b"\x7fELF"
_BEGINNINGS = (
    (b"\xef\xbb\xbf", "it begins with a byte order mark; save it as UTF-8 without one"),
    (b"\xff\xfe", "it is text in UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "it is text in UTF-16; save it as UTF-8"),
    (b"MZ", "it is a program for Windows"),
)
_EXAMPLE = "put its interpreter first, as in [sh, {}]"


def why_not(command: list[str], error: OSError) -> str:
    """Why a command failed to start, and what to do."""
    program = command[0]
    found = program if "/" in program else _on_path(program)
    if found is not None and os.path.exists(found):
        words = file_problem(found) or _errno_message(error)
        return words if found == program else f"{found}: {words}"
    if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
        return _errno_message(error)
    return not_found(program, os.path.isfile(program))


def not_found(program: str, is_in_project: bool) -> str:
    """Why no program of this name was found, and what to do."""
    if len(program.split()) > 1:
        return (
            "no program has that name; "
            "write each word as an element of the list, as in [sh, run.sh]"
        )
    if program.startswith("~") or "$" in program:
        return "it is no path: no shell expands ~ and $ in a command; use [sh, -c, ...]"
    if "/" in program:
        return "there is no such file"
    return (
        f"it is not on PATH, but in the project: write ./{program}"
        if is_in_project
        else "it is not on PATH"
    )


def file_problem(path: str) -> str | None:
    """Why a file would not run as a program, and what to do; None if the file shows no reason."""
    if os.path.isdir(path):
        return "it is a folder"
    example = _EXAMPLE.format(os.path.basename(path))
    if not os.access(path, os.X_OK):
        return f"it is not executable; chmod +x it before the deploy, or {example}"
    head = _head(path)
    if head is None or head.startswith(_ELF):
        return None
    if head.startswith(b"#!"):
        return _first_line(head.split(b"\n", 1)[0], os.path.basename(path))
    return _not_a_program(head) or (
        f"it has no first line that names its interpreter, such as #!/bin/sh; add one, or {example}"
    )


def has_windows_lines(path: str) -> bool:
    """Whether the first line of a script ends with a carriage return. The kernel and `env` take it
    for a part of the interpreter's name. The kernel does start `env`, which finds no such
    interpreter."""
    line = (_head(path) or b"").split(b"\n", 1)[0]
    return line.startswith(b"#!") and line.endswith(b"\r") and not _splits(line)


def _on_path(program: str) -> str | None:
    """The first file of this name on PATH. It may be no program."""
    files = (os.path.join(folder, program) for folder in os.get_exec_path())
    return next((file for file in files if os.path.isfile(file)), None)


def _head(path: str) -> bytes | None:
    if not os.path.isfile(path):  # opening a pipe would block
        return None
    try:
        with open(path, "rb") as file:
            return file.read(_HEAD)
    except OSError:
        return None


def _not_a_program(head: bytes) -> str | None:
    for beginning, words in _BEGINNINGS:
        if head.startswith(beginning):
            return words
    if not head:
        return "it is empty"
    return "it is no program for this machine" if b"\0" in head else None


def _splits(line: bytes) -> bool:
    """Whether `env` splits the line at white space, to which a carriage return belongs."""
    return b"env -S" in line or b"env --split-string" in line


def _first_line(line: bytes, name: str) -> str | None:
    rest = os.fsdecode(line[2:]).strip(" \t")
    if "\r" in rest and not _splits(line):
        shown = rest.partition("\r")[0] + "\r"
        return (
            f"its lines end as on Windows, and the first one names the interpreter {shown!r}; "
            f"save it with the line ends of Unix, as dos2unix {name} does"
        )
    interpreter = rest.split()[0] if rest else ""
    if not interpreter:
        return "its first line names no interpreter; write one, such as #!/bin/sh"
    if not os.path.exists(interpreter):
        return f"its first line names the interpreter {interpreter!r}, which is not on this machine"
    if not os.access(interpreter, os.X_OK) or os.path.isdir(interpreter):
        return f"its first line names the interpreter {interpreter!r}, which is no program"
    return None


def _errno_message(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "the loader that it names is not on this machine: it was built for another system"
    if error.errno == errno.ENOEXEC:
        return "it was built for another kind of machine"
    return os.strerror(error.errno or 0)
