"""Fuzzes the readers of users' texts and archives in process: they may raise only the errors that
they document."""

from __future__ import annotations

import asyncio
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from starlette.requests import Request

from cortex.errors import CortexError, InvalidProject, InvalidSpec
from cortex.operator.http.answers import read_submission
from cortex.operator.http.bodies import ParsedSubmission
from cortex.operator.http.body_reader import BodyReader
from cortex.projects.check import check_files
from cortex.projects.dotenv import read_variables
from cortex.projects.unpack import project_id, unpack
from cortex.spec.cortex_yaml import field_lines, read_apis
from cortex.spec.quantities import near_size, read_bytes, read_cpu_m
from fuzz import odd_values
from fuzz.archives import archive
from fuzz.uploads import yaml_text

_FILES = {
    ".env": b"A=b\nexport B='c d'\n# x\nC=\"e\\n\"\n",
    "requirements.txt": b"-r more.txt\nnumpy==1.0; python_version < '3'\n./local\n-e .\n\\\n--hash=x\n",
    "more.txt": b"-c requirements.txt\nx @ file:///x\n",
    "pyproject.toml": b'[project]\nname = "x"\nversion = "1"\ndependencies = ["a"]\nrequires-python = ">=3"\n[tool.uv]\nx = 1\n',
    "conda-packages.txt": b"python=3.11\npip==24\n",
    "uv.toml": b'index-url = "x"\n',
    "task.py": b"import x\nif x:\n    def task(config):\n        return config\nelif y:\n    pass\n",
}  # fmt: skip
_INSERTS: dict[str, list[bytes]] = {
    "requirements.txt": [
        b"-r " + b"a" * 300 + b"\n", b"-r a\0b\n", b"-r ../x\n", b"-r " + b"a/" * 3000 + b"\n", b"-c /etc/passwd\n", b"-r .\n",
        b"-r\n", b"-r \xe2\x98\x83\n",
    ],
    "pyproject.toml": [
        b"a = " + b"[" * 5000, b"a = " + b"9" * 5000 + b"\n", b"a = " + b"[" * 300 + b"]" * 300 + b"\n", b"project = 1\n",
        b"a" + b".a" * 3000 + b" = 1\n", b"tool = 1\n", b"[tool]\nuv = [1]\n", b"a = 1979-99-99\n", b"a = {" * 2000, b'a = "\\ud800"\n',
    ],
    "task.py": [
        b"x = " + b"(" * 5000, b"x = " + b"-" * 30_000 + b"1\n", b"if 1: pass\n" + b"elif 1: pass\n" * 3000, b"\0", b"x = '\\N{x}'\n",
        b"# coding: x\n", b"# coding: rot13\n", b"x = " + b"1+" * 20_000 + b"1\n", b"x = " + b"9" * 5000 + b"\n", b"x = 1" + b".a" * 5000 + b"\n",
        b"def f" + b"(a=lambda" * 200, b"match x:\n case 1: pass\n", b"\xff", b"\x0c",
    ],
    ".env": [b"A=\0\n", b"=x\n", b"A='\n", b'A="\\x"\n', b"\xff", b"A" * 5000 + b"=b\n", b"CORTEX_X=1\n", b"A\n"],
}  # fmt: skip


def fuzz_readers(folder: Path, seed: int, rounds: int) -> int:
    """Feed every reader, and return the number of calls. Fails at the first undocumented error."""
    total = 0
    for name, (share, feed) in _READERS.items():
        for index in range(max(1, rounds // share)):
            rng = random.Random(f"{seed}/{name}/{index}")
            try:
                feed(rng, folder)
            except Exception as error:
                raise AssertionError(
                    f"{name} {index} of seed {seed}: {type(error).__name__}: {str(error)[:300]}"
                ) from error
            total += 1
    return total


def _yaml(rng: random.Random, _: Path) -> None:
    text = yaml_text(rng).decode("utf-8", rng.choice(["replace", "surrogateescape", "ignore"]))
    field_lines(text)
    try:
        apis = read_apis(text, "cortex.yaml")
    except InvalidSpec as error:
        assert error.message
        return
    for api in apis:
        api.model_dump_json()


def _archive(rng: random.Random, folder: Path) -> None:
    target = folder / "around" / "target"
    target.parent.mkdir(exist_ok=True)
    try:
        unpack(io.BytesIO(archive(rng)), target)
        project_id(target)
        _assert_only_files_inside(target)
    except InvalidProject as error:
        assert error.message
        assert str(folder) not in error.message, error.message
        assert not target.exists()
    assert {path.name for path in target.parent.iterdir()} <= {"target"}
    assert not list(folder.glob("*planted*"))
    shutil.rmtree(target, ignore_errors=True)


def _assert_only_files_inside(target: Path) -> None:
    root = target.resolve()
    for path in target.rglob("*"):
        assert path.is_symlink() or path.is_file() or path.is_dir(), path
        assert path.resolve().is_relative_to(root), path
        if not path.is_symlink():
            assert path.lstat().st_mode & 0o7000 == 0, path


def _quantities(rng: random.Random, _: Path) -> None:
    text = odd_values.word(rng) if rng.random() < 0.3 else rng.choice(odd_values.NUMBERS)
    if rng.random() < 0.5:
        text += rng.choice(["m", "Mi", "K", "GiB", "e9", "E+99", " Gi", "\u0663", "\n"])
    for read in (read_cpu_m, read_bytes):
        found = read(text)
        assert found is None or found >= 0
    near = near_size(text)
    assert near is None or read_bytes(near) is not None


def _submission(rng: random.Random, _: Path) -> None:
    body = odd_values.submission(rng)

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {"type": "http", "headers": [(b"content-type", b"application/json")], "method": "POST"}

    async def read() -> ParsedSubmission:
        reader = BodyReader()
        try:
            return await read_submission(Request(scope, receive), reader)
        finally:
            reader.close()

    try:
        found = asyncio.run(read())
    except CortexError as error:
        assert 400 <= error.http_status < 500, error.message
        return
    json.loads(found.config)


def _project(rng: random.Random, folder: Path) -> None:
    project = folder / "project"
    shutil.rmtree(project, ignore_errors=True)
    project.mkdir()
    for name, usual in _FILES.items():
        content = usual
        if rng.random() < 0.6:
            continue
        if name in _INSERTS and rng.random() < 0.6:
            content = rng.choice(_INSERTS[name]) + usual
        if rng.random() < 0.7:
            content = odd_values.mutated(rng, content)
        (project / name).write_bytes(content)
    path = rng.choice(
        ["task.py", "x.py", "a" * 300, "a" * 300 + ".py", "task.py/x.py", "a/" * 2500 + "x.py", "."]
    )
    text = f"- name: up\n  kind: TaskAPI\n  definition: {{path: {path}, python_path: {path}}}\n"
    try:
        check_files(read_apis(text, "cortex.yaml"), project, "cortex.yaml", text)
    except InvalidSpec as error:
        assert str(folder) not in error.message, error.message
    try:
        read_variables(project)
    except InvalidProject as error:
        assert error.message


_Feed = Callable[[random.Random, Path], None]
# Each reader, and the number of rounds for one call: some readers take longer than others.
_READERS: dict[str, tuple[int, _Feed]] = {
    "yaml": (8, _yaml),
    "archive": (1, _archive),
    "quantities": (1, _quantities),
    "submission": (1, _submission),
    "project": (3, _project),
}
