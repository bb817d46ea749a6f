"""The object store, on a folder and on a real S3 server."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import s3_server
from cortex.errors import StartupError, StorageUnavailable
from cortex.objects import ObjectStore, check_url
from operator_harness import until
from s3_server import S3Server

pytestmark = pytest.mark.xdist_group("s3")  # one process runs them: the S3 server is slow to start


@pytest.fixture(params=["file", "s3"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "file":
        (tmp_path / "files").mkdir()
        return ObjectStore(f"file://{tmp_path}/files")
    server: S3Server = request.getfixturevalue("at_s3")
    return ObjectStore(f"s3://{server.bucket()}/some/prefix")


@pytest.fixture
def at_s3(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.mark.parametrize("size", [0, 1, 9 << 20])
def test_stored_content_is_read_back_unchanged(
    files: ObjectStore, tmp_path: Path, size: int
) -> None:
    content = os.urandom(size)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(content)
    files.put("a/bytes", content)
    files.put("a/file", source)
    assert files.read("a/bytes") == files.read("a/file") == content
    assert files.get("a/file", target)
    assert target.read_bytes() == content
    files.put("a/file", b"another")
    assert files.read("a/file") == b"another"


def test_a_missing_file_reads_as_none_and_leaves_no_file(
    files: ObjectStore, tmp_path: Path
) -> None:
    assert files.read("none") is None
    assert not files.get("none/of/it", tmp_path / "target")
    assert not (tmp_path / "target").exists()
    assert files.listed("none") == {}
    files.delete(["none", "none/of/it"])


def test_a_folder_whose_last_file_was_just_deleted_is_empty(
    files: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s3fs answers this if a deletion comes between its requests, which a test cannot time."""
    left = {f"{files._root}/a": {"type": "directory", "size": 0, "LastModified": None}}
    monkeypatch.setattr(files._fs, "find", lambda *_, **__: left)
    assert files.listed("a") == {}


def test_files_are_listed_with_their_age_and_deleted(files: ObjectStore) -> None:
    for name in ("a/1", "a/2", "b/1"):
        files.put(name, b"x")
    found = files.listed("a")
    assert set(found) == {"a/1", "a/2"}
    assert all(-60 < age < 60 for age in found.values())
    files.delete(["a/1", "b/1", "none"])
    assert set(files.listed("a")) == {"a/2"}
    assert files.read("b/1") is None


def test_a_reader_gets_one_content_or_the_other(files: ObjectStore, tmp_path: Path) -> None:
    contents = [bytes([number]) * (1 << 20) for number in range(4)]
    files.put("name", contents[0])
    done = threading.Event()
    contents_read = []

    def read() -> None:
        contents_read.append(files.read("name"))  # at least once, even if all puts are faster
        while not done.is_set():
            contents_read.append(files.read("name"))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for content in contents * 3:
        files.put("name", content)
    done.set()
    for reader in readers:
        reader.join()
    assert contents_read
    assert set(contents_read) <= set(contents)


def test_a_store_has_one_owner(files: ObjectStore) -> None:
    assert files.owner() is None
    files.set_owner("one")
    assert files.owner() == "one"
    assert ObjectStore(files.url).owner() == "one"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("bucket/prefix", "write s3://BUCKET/PREFIX"),
        ("gs://bucket", "write s3://BUCKET/PREFIX"),
        ("s3://", "are allowed in it"),
        ("s3:///prefix", "write s3://"),
        ("file://folder", "write s3://"),
        ("s3://key:secret@bucket/prefix", "credentials are not allowed in the URL"),
        ("s3://bucket/a*", "are allowed in it"),
        ("s3://bucket/../other", "are allowed in it"),
        ("s3://bucket/a\n", "are allowed in it"),
    ],
)
def test_an_invalid_url_is_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        check_url(url)
    assert "secret" not in str(error.value)


def test_the_libraries_of_s3_are_loaded_only_for_a_store() -> None:
    code = (
        "import sys, cortex.operator.app, cortex.operator.config.sources\n"
        "print([n for n in ('fsspec', 's3fs', 'botocore', 'aiohttp') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_missing_s3_library_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(StartupError, match=r"pip install 'cortex-tasks\[s3\]'"):
        ObjectStore("s3://bucket")


def test_a_missing_bucket_is_reported(at_s3: S3Server, tmp_path: Path) -> None:
    files = ObjectStore("s3://nothere-1/prefix")
    for attempt in (files.owner, lambda: files.set_owner("x")):
        with pytest.raises(StartupError, match=r"no bucket 'nothere-1'. Create it"):
            attempt()
    # The bucket may have existed before: its files are unavailable, and not missing.
    for later in (
        lambda: files.read("x"),
        lambda: files.get("x", tmp_path / "x"),
        lambda: files.put("x", b""),
    ):
        with pytest.raises(StorageUnavailable, match="no bucket"):
            later()
    assert not (tmp_path / "x").exists()


def test_a_folder_that_is_not_mounted_is_reported(tmp_path: Path) -> None:
    files = ObjectStore(f"file://{tmp_path}/away")
    attempts: list[Callable[[], object]] = [lambda: files.read("x"), lambda: files.put("x", b"")]
    for attempt in attempts:
        with pytest.raises(StorageUnavailable, match="away"):
            attempt()
    assert not (tmp_path / "away").exists()


def test_missing_credentials_are_reported(at_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = at_s3.bucket()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(StartupError, match="Set AWS_ACCESS_KEY_ID"):
        ObjectStore(f"s3://{bucket}").set_owner("x")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StartupError, match="nobody"):
        ObjectStore(f"s3://{bucket}").set_owner("x")


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[S3Server, str]]:
    """A server that checks credentials, and its bucket."""
    with s3_server.server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        bucket = server.bucket()
        iam = server.client("iam")
        iam.create_user(UserName="limited")
        key = iam.create_access_key(UserName="limited")["AccessKey"]
        server.enforce_credentials()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        yield server, bucket


def test_refused_credentials_are_reported(
    strict: tuple[S3Server, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{strict[1]}/prefix"
    with pytest.raises(StartupError, match=r"access denied .* s3:PutObject"):
        ObjectStore(url).set_owner("x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StartupError, match=r"refuses the credentials .SignatureDoesNotMatch"):
        ObjectStore(url).set_owner("x")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIANOBODY")
    with pytest.raises(StartupError, match=r"refuses the credentials .InvalidAccessKeyId"):
        ObjectStore(url).set_owner("x")


def test_an_unreachable_server_is_reported(
    at_s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    with pytest.raises(StartupError, match=r"does not answer .* AWS_ENDPOINT_URL_S3"):
        ObjectStore("s3://bucket").owner()


def test_a_server_that_hangs_is_given_up_and_used_again_when_it_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with s3_server.server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        bucket = f"s3://{server.bucket()}"
        ObjectStore(bucket).put("x", b"x")
        for name in ("_READ_TIMEOUT_S", "_CONNECT_TIMEOUT_S"):
            monkeypatch.setattr(f"cortex.objects.{name}", 1)
        files = ObjectStore(bucket)
        server.freeze()
        for attempt in (
            lambda: files.put("y", b"y"),
            lambda: files.read("x"),
            lambda: files.get("x", tmp_path / "x"),
            lambda: files.listed(""),
            lambda: files.delete(["x"]),
        ):
            with pytest.raises(StorageUnavailable, match=r"does not answer"):
                attempt()
        server.thaw()

        def answers_again() -> bool:  # within a second, or later on a loaded machine
            try:
                # The server may still carry out the deletion after the thaw.
                assert files.read("x") in (b"x", b"z", None)
                files.put("x", b"z")
                return files.read("x") == b"z"
            except StorageUnavailable:
                return False

        until(answers_again, "the server answers again")
