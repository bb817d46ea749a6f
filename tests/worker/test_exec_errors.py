"""A command that cannot be started: the message of the job, and the exit code of a shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cortex.worker.job import exec_errors

EXECUTE = (
    "import sys; from cortex.worker.job import process; sys.exit(process._execute(sys.argv[1:]))"
)
WINDOWS = "its lines end as on Windows, and the first one names the interpreter "
FOREIGN_ELF = b"\x7fELF\x02\x01\x01" + b"\0" * 9 + b"\x02\0\xf7\0" + b"\0" * 44


def execute(folder: Path, *command: str) -> tuple[int, str]:
    """The exit code and the standard error of a job process that runs this command."""
    words = [sys.executable, "-c", EXECUTE, *command]
    done = subprocess.run(words, check=False, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stderr


def shell_exit_code(folder: Path, *command: str) -> int:
    words = ["sh", "-c", '"$@"', "sh", *command]
    return subprocess.run(words, check=False, cwd=folder, capture_output=True).returncode


def write(folder: Path, name: str, content: bytes, mode: int = 0o755) -> None:
    (folder / name).write_bytes(content)
    (folder / name).chmod(mode)


@pytest.mark.parametrize(
    ("content", "mode", "code", "message"),
    [
        (b"#!/bin/bash\r\necho hi\r\n", 0o755, 127, WINDOWS + r"'/bin/bash\r'; save it with"),
        (b"#!/usr/bin/env bash\r\necho\r\n", 0o755, 127, WINDOWS + r"'/usr/bin/env bash\r'; save"),
        (b"#!/bin/sh\recho hi\r", 0o755, 127, WINDOWS + r"'/bin/sh\r'; save it with the line ends"),
        (b"#! /no/such -x\necho\n", 0o755, 127, "its first line names the interpreter '/no/such',"),
        (
            b"#!/etc/passwd\necho\n",
            0o755,
            126,
            "its first line names the interpreter '/etc/passwd'",
        ),
        (
            b"#!/bin/sh\necho\n",
            0o644,
            126,
            "it is not executable; chmod +x it before the deploy, or",
        ),
    ],
)
def test_a_script_without_a_usable_interpreter_is_explained(
    content: bytes, mode: int, code: int, message: str, tmp_path: Path
) -> None:
    write(tmp_path, "run.sh", content, mode)
    assert shell_exit_code(tmp_path, "./run.sh") == code
    exit_code, err = execute(tmp_path, "./run.sh")
    assert exit_code == code
    assert err.startswith(f"cortex: cannot run './run.sh': {message}")
    assert (exec_errors.file_problem(str(tmp_path / "run.sh")) or "").startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"echo hi\n",
            "it has no first line that names its interpreter, such as #!/bin/sh; add one",
        ),
        (b"", "it is empty"),
        (b"\xef\xbb\xbf#!/bin/sh\n", "it begins with a byte order mark; save it as UTF-8 without"),
        ("#!/bin/sh\n".encode("utf-16"), "it is text in UTF-16; save it as UTF-8"),
        (b"#!\necho\n", "its first line names no interpreter; write one, such as #!/bin/sh"),
        (b"MZ\x90\0", "it is a program for Windows"),
        (b"\xcf\xfa\xed\xfe\0\0", "it is no program for this machine"),
        (FOREIGN_ELF, "it was built for another kind of machine"),
    ],
)
def test_a_file_that_the_kernel_does_not_execute_is_explained(
    content: bytes, message: str, tmp_path: Path
) -> None:
    write(tmp_path, "run", content)
    code, err = execute(tmp_path, "./run")
    assert code == 126
    assert err.startswith(f"cortex: cannot run './run': {message}")


@pytest.mark.parametrize(
    ("program", "code", "message"),
    [
        ("run.sh", 127, "it is not on PATH, but in the project: write ./run.sh"),
        ("no-such-program", 127, "it is not on PATH"),
        ("./no-such", 127, "there is no such file"),
        ("./run.sh/x", 127, "there is no such file"),
        ("./folder", 126, "it is a folder"),
    ],
)
def test_a_missing_program_is_explained(
    program: str, code: int, message: str, tmp_path: Path
) -> None:
    write(tmp_path, "run.sh", b"#!/bin/sh\n")
    (tmp_path / "folder").mkdir()
    assert execute(tmp_path, program) == (code, f"cortex: cannot run '{program}': {message}\n")
    assert program == "./run.sh/x" or shell_exit_code(tmp_path, program) == code


@pytest.mark.parametrize(
    ("content", "mode", "code", "message"),
    [
        (b"#!/no/such/python\n", 0o755, 127, "its first line names the interpreter '/no/such/pyth"),
        (
            b"#!/bin/sh\r\n",
            0o755,
            127,
            WINDOWS + r"'/bin/sh\r'; save it with the line ends of Unix",
        ),
        (b"#!/bin/sh\n", 0o644, 126, "it is not executable; chmod +x it before the deploy, or put"),
    ],
)
def test_a_script_on_path_without_a_usable_interpreter_is_explained(
    content: bytes,
    mode: int,
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path, "tool", content, mode)
    monkeypatch.setenv("PATH", f"/no/such:{tmp_path}:/bin:/usr/bin")
    # For a file on PATH without an execute bit, dash exits with 127 and bash with 126.
    assert shell_exit_code(tmp_path, "tool") in {code, 127}
    exit_code, err = execute(tmp_path, "tool")
    assert exit_code == code
    assert err.startswith(f"cortex: cannot run 'tool': {tmp_path}/tool: {message}")


def test_a_pipe_is_no_program_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "pipe").chmod(0o755)
    message = "cortex: cannot run './pipe': Permission denied\n"
    assert execute(tmp_path, "./pipe") == (shell_exit_code(tmp_path, "./pipe"), message)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("./run.sh --fast", "no program has that name; write each word as an element of the list"),
        ("cd x && ls", "no program has that name; write each word as an element of the list"),
        ("~/run.sh", "it is no path: no shell expands ~ and $ in a command; use [sh, -c, ...]"),
        ("$HOME/run.sh", "it is no path: no shell expands ~ and $ in a command; use [sh, -c, ...]"),
    ],
)
def test_a_shell_line_is_no_program(program: str, message: str, tmp_path: Path) -> None:
    code, err = execute(tmp_path, program)
    assert code == 127
    assert err.startswith(f"cortex: cannot run '{program}': {message}")


def test_a_missing_loader_is_explained(tmp_path: Path) -> None:
    loader = b"/no/such/loader.so\0"
    header = Path("/proc/self/exe").read_bytes()[
        :64
    ]  # an ELF header of this machine's architecture
    program = bytearray(header + b"\0" * 56 + loader)
    program[16:18] = b"\x02\0"  # ET_EXEC
    program[32:40] = (64).to_bytes(8, "little")  # one program header, which follows: PT_INTERP
    program[54:58] = (56).to_bytes(2, "little") + (1).to_bytes(2, "little")
    program[64:68] = (3).to_bytes(4, "little")
    program[72:80] = (120).to_bytes(8, "little")
    program[96:104] = program[104:112] = len(loader).to_bytes(8, "little")
    write(tmp_path, "built-elsewhere", bytes(program))
    code, err = execute(tmp_path, "./built-elsewhere")
    assert code == 127 == shell_exit_code(tmp_path, "./built-elsewhere")
    assert "the loader that it names is not on this machine" in err


@pytest.mark.parametrize("first", ["#!/bin/sh", "#! /usr/bin/env sh", "#!/usr/bin/env -S sh\r"])
def test_an_executable_program_is_run(first: str, tmp_path: Path) -> None:
    write(tmp_path, "run.sh", f"{first}\necho $1 >&2\nexit 3\n".encode())
    assert execute(tmp_path, "./run.sh", "hi") == (3, "hi\n")
    assert exec_errors.file_problem(str(tmp_path / "run.sh")) is None
    assert exec_errors.file_problem("/bin/sh") is None
