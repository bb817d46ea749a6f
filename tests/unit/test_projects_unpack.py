"""Harmful and incomplete archives are refused, and leave nothing."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest

from cortex.errors import InvalidProject
from cortex.projects import pack as packing
from cortex.projects import unpack as unpacking
from cortex.projects.pack import pack_stored
from cortex.projects.unpack import project_id, unpack

Member = tuple[str, bytes | str | tarfile.TarInfo]


def member(name: str, kind: bytes = tarfile.REGTYPE, linkname: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    return info


def archive(*members: Member) -> io.BytesIO:
    """A gzip tar: bytes are a file's content, a string is a link's target."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            elif isinstance(content, str):
                tar.addfile(member(name, tarfile.SYMTYPE, content))
            else:
                info = member(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    out.seek(0)
    return out


def refused(stream: io.BytesIO, folder: Path, *, is_upload: bool = False) -> str:
    """The message of the refusal. Nothing of the archive may remain, in its folder or beside it."""
    folder.mkdir(exist_ok=True)
    before = sorted(folder.rglob("*"))
    with pytest.raises(InvalidProject) as raised:
        unpack(stream, folder / "target", is_upload=is_upload)
    assert sorted(folder.rglob("*")) == before
    stream.seek(0)
    (folder / "existing").mkdir()
    with pytest.raises(InvalidProject):
        unpack(stream, folder / "existing", is_upload=is_upload)
    assert list((folder / "existing").iterdir()) == []
    return raised.value.message


@pytest.mark.parametrize(
    "members",
    [
        [("../out", b"x")],
        [("a/../../out", b"x")],
        [("/tmp/cortex-probe-absolute", b"x")],
        [("a/..", b"x")],
        [("out", "../secret")],
        [("out", "/etc/passwd")],
        [("a/out", "../../secret")],
        [("out", "x" * 5000)],
        [("d", ".."), ("d/x", b"x")],
        [("a/b", ""), ("a", b"")],
        [("one", "two/../.."), ("two", "d/e"), ("d/e/f", b"")],
        [("d/deep/x", b""), ("s", "d/deep"), ("out", "s/../../..")],
        [("loop", "loop")],
        [("hard", member("hard", tarfile.LNKTYPE, "/etc/passwd"))],
        [("a", b"x"), ("hard", member("hard", tarfile.LNKTYPE, "a"))],
        [("fifo", member("fifo", tarfile.FIFOTYPE))],
        [("dev", member("dev", tarfile.CHRTYPE))],
        [("dev", member("dev", tarfile.BLKTYPE))],
        [("a", b"1"), ("a", b"2")],
        [("a", b"1"), ("a/b", b"2")],
        [("a/b", b"1"), ("a", b"2")],
        [("a", b"1"), ("a", "b")],
        [("n" * 300, b"")],
        [("d/" * 101, b"")],
        [("d/" * 1990 + "x", b"")],
        [("d/" * 1990 + "x", "x")],
        [("", b"x")],
    ],
)
def test_harmful_members_are_refused_and_leave_nothing(
    members: list[Member], tmp_path: Path
) -> None:
    assert refused(archive(*members), tmp_path / "in")
    assert not Path("/tmp/cortex-probe-absolute").exists()


def test_unpacking_needs_no_filters_of_tarfile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The `tarfile` of Python 3.11.2, which is Debian 12's, has none."""
    for name in ("FilterError", "data_filter", "fully_trusted_filter", "tar_filter"):
        monkeypatch.delattr(tarfile, name, raising=False)
    unpack(archive(("a/b", b"text")), tmp_path / "good")
    assert (tmp_path / "good" / "a" / "b").read_bytes() == b"text"
    assert "leaves the project" in refused(archive(("../b", b"text")), tmp_path)


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    stream = archive(("inside/x", b""), ("d", "inside"), ("d/file", b"x"))
    assert refused(stream, tmp_path / "in")


def test_set_uid_and_foreign_owners_are_dropped(tmp_path: Path) -> None:
    info = member("a")
    info.mode, info.uid, info.uname = 0o6777, 12345, "nobody"
    unpack(archive(("a", info)), tmp_path / "t")
    found = (tmp_path / "t/a").stat()
    assert (found.st_mode & 0o7777, found.st_uid) == (0o755, os.getuid())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an archive",
        gzip.compress(b""),
        gzip.compress(b"not a tar" * 1000),
        archive(("a", os.urandom(50_000))).getvalue()[:-20_000],
        archive(("a", b"x" * 50_000)).getvalue()[:-8] + b"\0" * 8,
        gzip.compress(gzip.decompress(archive(("a", b"x" * 50_000)).getvalue())[:30_000]),
    ],
    ids=range(7),
)
def test_an_incomplete_or_invalid_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    assert refused(io.BytesIO(content), tmp_path / "in")


def test_a_declared_size_over_the_limit_is_refused(tmp_path: Path) -> None:
    info = member("a")
    info.size = (100 << 20) + 1
    assert "over 100 MiB" in refused(io.BytesIO(gzip.compress(info.tobuf())), tmp_path / "in")


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "MAX_PROJECT_FILES", 3)
    assert "over 3 files and folders" in refused(
        archive(*[(f"f{n}", b"") for n in range(4)]), tmp_path / "in", is_upload=True
    )


@pytest.mark.parametrize("content", [b"", "target"], ids=["file", "link"])
def test_folders_that_an_upload_does_not_list_count(
    content: bytes | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ("a/c", member("a/c", tarfile.DIRTYPE))
    members = [("a/b/f", content), folder, ("./a/b/g", content)]
    monkeypatch.setattr(unpacking, "MAX_PROJECT_FILES", 5)
    unpack(archive(*members), tmp_path / "files first", is_upload=True)
    unpack(archive(*members, folder), tmp_path / "a folder twice", is_upload=True)
    assert "over 5 files and folders" in refused(
        archive(*members, ("a/c/h", b"")), tmp_path / "in", is_upload=True
    )


def test_a_stored_project_has_no_limits_of_an_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier version may have stored it, with more than today's limits allow."""
    members = [(f"{name}/{name}", b"x") for name in "abcdef"]
    monkeypatch.setattr(unpacking, "MAX_PROJECT_FILES", 5)
    monkeypatch.setattr(packing, "MAX_PROJECT_FILES", 5)
    unpack(archive(*members), tmp_path / "stored")
    sent = io.BytesIO()
    pack_stored(tmp_path / "stored", sent)
    sent.seek(0)
    unpack(sent, tmp_path / "node")
    assert project_id(tmp_path / "node") == project_id(tmp_path / "stored")


def test_bombs_are_stopped_while_they_are_read(tmp_path: Path) -> None:
    header = member("a", tarfile.XHDTYPE)
    header.size = 80 << 20
    long_header = gzip.compress(header.tobuf() + b"\0" * header.size, 9)
    assert "more data than its headers declare" in refused(
        io.BytesIO(long_header), tmp_path / "header"
    )
    # Folders with content: their sizes count.
    filled = member("d", tarfile.DIRTYPE)
    filled.size = 60 << 20
    stream = io.BytesIO(gzip.compress((filled.tobuf() + b"\0" * filled.size) * 2, 1))
    assert refused(stream, tmp_path / "folders")


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    info = member("a")
    info.pax_headers = {
        "GNU.sparse.map": "0,0",
        "GNU.sparse.size": str(1 << 50),
        "GNU.sparse.major": "0",
    }
    assert refused(archive(("a", info)), tmp_path / "in")


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(FileExistsError):
        unpack(archive(("a", b"")), tmp_path)
    assert (tmp_path / "mine").exists()


def test_a_full_disk_is_an_os_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unpacking, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        unpack(archive(("a", b"x")), tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_the_project_id_depends_on_names_executable_bits_links_and_contents(tmp_path: Path) -> None:
    def id_of(name: str, content: str = "x", *, mode: int = 0o644, link: str = "a") -> str:
        folder = tmp_path / os.urandom(4).hex()
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / name).write_text(content)
        (folder / "sub" / name).chmod(mode)
        (folder / "link").symlink_to(link)
        return project_id(folder)

    same = id_of("a")
    assert same == id_of("a", mode=0o600)
    changed = [id_of("b"), id_of("a", "y"), id_of("a", mode=0o755), id_of("a", link="b")]
    assert len({same, *changed}) == 5
