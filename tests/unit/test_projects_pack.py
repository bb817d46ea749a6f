"""Packing a project's folder, and unpacking it again."""

from __future__ import annotations

import gc
import io
import os
import socket
import tarfile
import venv
from collections.abc import Mapping
from pathlib import Path

import pytest

from cortex.errors import InvalidProject
from cortex.projects import pack as packing
from cortex.projects.ignored import UploadFiles
from cortex.projects.pack import PackSummary, pack, pack_stored
from cortex.projects.unpack import project_id, unpack


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
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


def test_packing_and_unpacking_preserve_a_project(tmp_path: Path) -> None:
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


def test_cortexignore_can_exclude_dotenv(tmp_path: Path) -> None:
    assert names(write(tmp_path, {".env": "A=1", "a": "", ".cortexignore": "\ufeff.env\r\n"})) == [
        "a"
    ]


def left_out(folder: Path) -> str | None:
    return pack(folder, io.BytesIO()).left_out


ENVIRONMENTS = {
    "my env/pyvenv.cfg": "home = /usr/bin\n",
    "my env/lib/python3.11/site-packages/x.py": "",
    ".env/pyvenv.cfg": "",
    "conda/conda-meta/history": "",
    "web/node_modules/x/index.js": "",
    "old/bin/activate": "",
    ".tox/py311/x": "",
}


def test_environments_and_caches_of_tools_are_left_out_and_named(tmp_path: Path) -> None:
    venv.create(tmp_path / "p/made", with_pip=False)  # its links lead out of the project
    project = write(tmp_path / "p", {**ENVIRONMENTS, "a.py": "", "lib/b.py": "", ".git/config": ""})
    (project / "linked").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "elsewhere", {"pyvenv.cfg": ""})
    assert names(project) == ["a.py", "lib/b.py"]
    warning = left_out(project) or ""
    assert warning.startswith(
        "left out of the upload: .env/ (a virtual environment), conda/ (a conda environment), "
        "linked (a virtual environment), made/ (a virtual environment), my env/ (a virtual environment) "
        "and 3 more; if jobs need it, add a line such as !.env/ to .cortexignore"
    )
    assert (
        left_out(write(tmp_path / "q", {"a.py": "", ".git/x": "", "__pycache__/a.pyc": ""})) is None
    )


def test_a_negated_line_that_names_a_left_out_folder_includes_it(tmp_path: Path) -> None:
    ignore = "!/my env/\n!node_modules\n!.streamlit/\n"
    more = {"web/node_modules/.bin/y": "", ".streamlit/config.toml": "", ".git/config": ""}
    project = write(tmp_path, {**ENVIRONMENTS, **more, "a.py": "", ".cortexignore": ignore})
    assert sorted(names(project)) == [
        ".streamlit/config.toml",
        "a.py",
        "my env/lib/python3.11/site-packages/x.py",
        "my env/pyvenv.cfg",
        "web/node_modules/.bin/y",
        "web/node_modules/x/index.js",
    ]
    warning = left_out(project) or ""
    assert "my env" not in warning
    assert "conda/ (a conda environment)" in warning


def test_a_pattern_includes_no_folder_that_it_does_not_name(tmp_path: Path) -> None:
    ignore = "*\n!*/\n!*.py\n"
    more = {"a.py": "", "src/b.py": "", "src/data.bin": "", ".git/hooks/c.py": "", "src/.d.py": ""}
    project = write(tmp_path, {**ENVIRONMENTS, **more, ".cortexignore": ignore})
    assert names(project) == ["a.py", "src/b.py"]


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ("*\n!src/\n!src/**", ["src/a.py", "src/b.bin", "src/deep/c.py"]),
        ("/*\n!/src/", ["src/a.py", "src/b.bin", "src/deep/c.py"]),
        ("src/*\n!src/deep/", ["a.py", "src/deep/c.py"]),
        ("src/\n!src/a.py", ["a.py"]),
        ("*.py\n!src/deep/", ["src/b.bin"]),
        ("!src/deep/\nsrc/deep/", ["a.py", "src/a.py", "src/b.bin"]),
    ],
)
def test_the_last_line_that_names_a_path_decides_as_in_git(
    rules: str, kept: list[str], tmp_path: Path
) -> None:
    files = dict.fromkeys(["a.py", "src/a.py", "src/b.bin", "src/deep/c.py"], "")
    assert sorted(names(write(tmp_path, {**files, ".cortexignore": rules}))) == kept


def test_a_project_folder_that_is_an_environment_is_packed_without_the_parts_of_it(
    tmp_path: Path,
) -> None:
    venv.create(tmp_path / "p", with_pip=False)
    project = write(tmp_path / "p", {"a.py": "", "src/b.py": "", "src/bin/c": ""})
    assert names(project) == ["a.py", "pyvenv.cfg", "src/b.py", "src/bin/c"]
    warning = left_out(project) or ""
    assert "bin/ (part of a virtual environment: the project's own folder is one)" in warning


def test_a_stored_project_is_packed_again_completely(tmp_path: Path) -> None:
    project = write(
        tmp_path / "p", {**ENVIRONMENTS, "a.py": "", ".cortexignore": "!.tox/\n!conda/"}
    )
    unpack(io.BytesIO(packed(project)), tmp_path / "t")
    identity = project_id(tmp_path / "t")
    write(tmp_path / "t", {"__pycache__/a.pyc": ""})
    os.mkfifo(tmp_path / "t/pipe")
    out = io.BytesIO()
    pack_stored(tmp_path / "t", out)
    out.seek(0)
    unpack(out, tmp_path / "again")
    assert project_id(tmp_path / "again") == identity


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


def test_links_out_of_the_project_and_special_files_are_all_named(tmp_path: Path) -> None:
    project = write(tmp_path / "p", {"a": ""})
    write(tmp_path, {"secret": ""})
    (project / "out").symlink_to("../secret")
    (project / "etc").symlink_to("/etc")
    (project / "chain").symlink_to("out")
    os.mkfifo(project / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(project)  # the path of a socket must be short
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


def test_the_error_for_a_large_project_names_the_largest_files_and_reads_none(
    tmp_path: Path,
) -> None:
    for number in range(8):
        with (tmp_path / f"f{number}.bin").open("wb") as sparse:
            sparse.truncate((10 + number) << 20)
    out = io.BytesIO()
    with pytest.raises(InvalidProject) as raised:
        pack(tmp_path, out)
    message = raised.value.message
    assert "over 100 MiB or 20,000 files" in message
    # f0 to f7 have 108 MiB: f7 is the first file over the limit.
    for number in range(3, 8):
        assert f"f{number}.bin ({10 + number}.0 MiB)" in message
    assert "f2.bin" not in message
    assert ".cortexignore" in message
    assert out.getvalue() == b""


def sparse_file(path: Path, mebibytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as sparse:
        sparse.truncate(mebibytes << 20)


def test_the_error_for_a_large_project_names_folders_and_the_lines_that_exclude_them(
    tmp_path: Path,
) -> None:
    for number in range(30):
        sparse_file(tmp_path / f"app/data/images/{number:02}.png", 2)
    for number in range(10):
        sparse_file(tmp_path / f"app/out/run{number}/model.bin", 5)
    sparse_file(tmp_path / "app/weights.bin", 40)
    sparse_file(tmp_path / "small.bin", 1)
    message = refused(tmp_path)
    assert (
        "the largest in it:\n"
        "  app/data/ (60.0 MiB, 30 files)\n"
        "  app/out/ (50.0 MiB, 10 files)\n"
        "  app/weights.bin (40.0 MiB)\n"
        "  small.bin (1.0 MiB)\n"
    ) in message
    assert "for example:\n  /app/data/\n  /app/out/\n  /app/weights.bin\n" in message
    write(tmp_path, {".cortexignore": "/app/data/\n/app/out/\n"})
    assert names(tmp_path) == ["small.bin", "app/weights.bin"]


def test_the_error_for_too_many_files_names_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "MAX_PROJECT_FILES", 5)
    monkeypatch.setattr(packing, "_MAX_MEASURED", 7)
    sparse_file(tmp_path / "z.bin", 1)
    write(tmp_path, {f"data/f{n}": "" for n in range(9)})
    message = refused(tmp_path)
    assert "over 100 MiB or 5 files" in message
    assert "  data/ (0.0 MiB, 9 files)\n  z.bin (1.0 MiB)\n" in message


def test_an_unreadable_folder_causes_no_error_while_sizes_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "MAX_PROJECT_FILES", 2)
    write(tmp_path, {**{f"f{n}": "" for n in range(3)}, "z/x": ""})
    scandir = os.scandir

    def failing(path: Path) -> object:
        if path.name == "z":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    assert "over 100 MiB or 2 files" in refused(tmp_path)


def test_the_root_of_the_machine_is_refused_at_once() -> None:
    assert refused(Path("/"))


def test_an_unreadable_file_or_folder_is_named(tmp_path: Path) -> None:
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
    entries = packing._entries(project, UploadFiles(project))
    monkeypatch.setattr(packing, "_entries", lambda *_: entries)
    (project / "a").write_text("123")
    assert "a changed while it was packed" in refused(project)
    (project / "a").unlink()
    assert "No such file" in refused(project)


def test_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    with (
        Path("/dev/full").open("wb", buffering=0) as full,
        pytest.raises(OSError, match="No space"),
    ):
        pack(write(tmp_path, {"a": os.urandom(1 << 20)}), full)
    gc.collect()  # Python 3.13 would print an error of a finalizer


def test_a_link_to_itself_is_packed_as_a_link(tmp_path: Path) -> None:
    project = write(tmp_path / "p", {"a": ""})
    (project / "loop").symlink_to("loop")
    assert names(project) == ["a", "loop"]
