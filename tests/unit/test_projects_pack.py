"""Packing a project's folder, and unpacking it again."""

from __future__ import annotations

import io
import os
import socket
import tarfile
from pathlib import Path

import pytest

from cortex.errors import InvalidProject
from cortex.projects import pack as packing
from cortex.projects.pack import PackSummary, pack
from cortex.projects.unpack import project_id, unpack


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def packed(folder: Path) -> bytes:
    out = io.BytesIO()
    pack(folder, out)
    return out.getvalue()


def names(folder: Path) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(packed(folder))) as tar:
        return [m.name for m in tar if not m.isdir()]


def refused(folder: Path) -> str:
    with pytest.raises(InvalidProject) as raised:
        packed(folder)
    return raised.value.message


def test_a_project_comes_out_as_it_went_in(tmp_path: Path) -> None:
    project = write(tmp_path / "p", {"cortex.yaml": "- a", "src/a.py": "x", "run.sh": "#!/bin/sh"})
    (project / "run.sh").chmod(0o750)
    (project / "empty").mkdir()
    (project / "link").symlink_to("src/a.py")
    (project / "src/up").symlink_to("../run.sh")
    (project / "dangling").symlink_to("later")
    (project / os.fsdecode(b"not-utf8-\xff")).write_bytes(b"")
    out = io.BytesIO()
    assert pack(project, out) == PackSummary(files=7, bytes=3 + 1 + 9)
    out.seek(0)
    target = tmp_path / "t"
    unpack(out, target)
    assert (target / "src/a.py").read_text() == "x"
    assert (target / "empty").is_dir()
    assert (target / "link").readlink() == Path("src/a.py")
    assert (target / "src/up").read_text() == "#!/bin/sh"
    assert (target / "run.sh").stat().st_mode & 0o777 == 0o755
    assert (target / "src/a.py").stat().st_mode & 0o777 == 0o644
    assert project_id(target) == project_id(project)


def test_dot_files_byte_code_and_ignored_files_are_left_out(tmp_path: Path) -> None:
    left_out = [".git/config", ".hidden", "a/.env", "a/__pycache__/m.pyc", "m.pyc", "m.pyo"]
    ignored = ["data/big.bin", "a/notes.log", "build/keep.txt", "only-top"]
    kept = [".env", "cortex.yaml", "a/m.py", "a/keep.log", "a/only-top"]
    project = write(tmp_path, dict.fromkeys([*left_out, *ignored, *kept], "x"))
    rules = "# comment\ndata/\n*.log\n!keep.log\nbuild\n!build/keep.txt\n/only-top\n"
    write(project, {".cortexignore": rules})
    assert sorted(names(project)) == sorted(kept)


def test_a_file_that_excludes_env_is_obeyed(tmp_path: Path) -> None:
    assert names(write(tmp_path, {".env": "A=1", "a": "", ".cortexignore": "\ufeff.env\r\n"})) == [
        "a"
    ]


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    files = {"b": "1", "a/c": "2", "a.py": "3"}
    one = write(tmp_path / "one", files)
    other = write(tmp_path / "other", dict(reversed(files.items())))
    os.utime(other / "b", (1, 1))
    assert packed(one) == packed(other)
    assert names(one) == ["a.py", "b", "a/c"]


def test_an_absolute_link_inside_becomes_relative(tmp_path: Path) -> None:
    project = write(tmp_path / "p", {"src/a": "x"})
    (project / "abs").symlink_to(project / "src/a")
    (project / "round").symlink_to("../p/src/a")
    unpack(io.BytesIO(packed(project)), tmp_path / "t")
    assert {(tmp_path / "t" / n).readlink() for n in ("abs", "round")} == {Path("src/a")}


def test_links_that_leave_and_special_files_are_all_named(tmp_path: Path) -> None:
    project = write(tmp_path / "p", {"a": ""})
    write(tmp_path, {"secret": ""})
    (project / "out").symlink_to("../secret")
    (project / "etc").symlink_to("/etc")
    (project / "chain").symlink_to("out")
    os.mkfifo(project / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(project)  # a socket's path is short
        try:
            server.bind("sock")
        finally:
            os.chdir(here)
        message = refused(project)
    assert "out: a link to ../secret, outside of the project" in message
    assert "etc: a link to /etc, outside" in message
    assert "chain: a link to out, outside" in message
    assert "pipe: a named pipe, which cannot be packed" in message
    assert "sock: a socket, which cannot be packed" in message
    assert ".cortexignore" in message
    write(project, {".cortexignore": "out\netc\nchain\npipe\nsock\n"})
    assert names(project) == ["a"]


def test_a_device_is_refused() -> None:
    assert packing._kind(Path("/dev/null").stat().st_mode) == "a device"
    assert "a device, which cannot be packed" in refused(Path("/dev"))


def test_too_large_names_the_largest_and_reads_nothing(tmp_path: Path) -> None:
    for number in range(8):
        with (tmp_path / f"f{number}.bin").open("wb") as sparse:
            sparse.truncate((10 + number) << 20)
    out = io.BytesIO()
    with pytest.raises(InvalidProject) as raised:
        pack(tmp_path, out)
    message = raised.value.message
    assert "over 100 MiB or 20,000 files" in message
    # f0 to f7 hold 108 MiB: f7 is the first over.
    for number in range(3, 8):
        assert f"f{number}.bin ({10 + number}.0 MiB)" in message
    assert "f2.bin" not in message
    assert ".cortexignore" in message
    assert out.getvalue() == b""


def test_too_many_files_stop_the_walk_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "MAX_PROJECT_FILES", 5)
    write(tmp_path, {f"f{n}": "" for n in range(9)})
    assert "over 100 MiB or 5 files" in refused(tmp_path)


def test_the_root_of_the_machine_is_refused_at_once() -> None:
    assert refused(Path("/"))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "is not a folder" in refused(tmp_path / "nowhere")
    assert ".cortexignore is not UTF-8" in refused(
        write(tmp_path / "b", {".cortexignore": b"\xff"})
    )
    message = refused(write(tmp_path / "c", {".cortexignore": "ok\n!\n"}))
    assert message.startswith(".cortexignore:2: found '!'")


def test_a_file_that_vanishes_or_changes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = write(tmp_path, {"a": "12"})
    seen = packing._entries(project)
    monkeypatch.setattr(packing, "_entries", lambda _: seen)
    (project / "a").write_text("123")
    assert "a changed while it was packed" in refused(project)
    (project / "a").unlink()
    assert "No such file" in refused(project)


def test_a_full_disk_is_not_the_project_s_fault(tmp_path: Path) -> None:
    with (
        Path("/dev/full").open("wb", buffering=0) as full,
        pytest.raises(OSError, match="No space"),
    ):
        pack(write(tmp_path, {"a": os.urandom(1 << 20)}), full)
