"""The store of files: where an operator keeps what outlives its machine, reached by fsspec. Opened by the
app where `files` is set; nothing of it is imported before. All methods block, and may be called in
any thread.

A name is seen with all of its content or not at all: an object appears when its upload is complete, a
file gets its name when it is on the disk.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cortex.errors import CortexError, StartupError, StorageUnavailable
from cortex.spec.times import new_id

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem  # type: ignore[import-untyped]  # it has no types

FORM = "s3://BUCKET/PREFIX or file:///FOLDER"

_URL = re.compile(r"(?P<kind>[a-z0-9+.-]+)://(?P<path>.*)", re.DOTALL)
_OWNER = "cortex.id"
_CONNECT_S, _ANSWER_S, _ATTEMPTS = 5, 15, 2
_SLOWEST = 256 << 10  # bytes in a second; what is slower than that hangs
_AT_A_TIME = 1000  # as many as S3 removes at one request
_NO_BUCKET = "NoSuchBucket"
_REFUSED = {"ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}


def check_url(text: str) -> str:
    """The URL of a store of files, as a user means it.

    Raises:
        ValueError: it is none, and what is wrong.
    """
    found = _URL.fullmatch(text)
    if found is None or found["kind"] not in {"s3", "file"}:
        raise ValueError(f"no store of files that is known; write {FORM}, or leave it out")
    path = found["path"].rstrip("/")
    if "@" in path.partition("/")[0]:
        raise ValueError("credentials do not belong here: they are found where AWS's tools do")
    if not re.fullmatch(r"[\w./-]+", path, re.ASCII) or ".." in path.split("/"):
        raise ValueError(
            f"a name of letters, digits, '.', '_', '-' and '/' is needed; write {FORM}"
        )
    if (found["kind"] == "file") != path.startswith("/"):
        raise ValueError(f"write {FORM}")
    return f"{found['kind']}://{path}"


class ObjectStore:
    """One store of files; names are relative to its URL, with slashes."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            StartupError: what reaches it is not installed.
        """
        self.url = check_url(url)
        self._kind, _, path = self.url.partition("://")
        self._root = path
        self._fs = _local() if self._kind == "file" else _s3()

    def owner(self) -> str | None:
        """The id of the data folder that this store of files belongs with, if any.

        Raises:
            StartupError: it cannot be read, why, and what to do.
        """
        with self._told(StartupError):
            found = self._read(_OWNER)
        return None if found is None else found.decode("ascii", "replace").strip()

    def own(self, identity: str) -> None:
        """Let it belong with a data folder.

        Raises:
            StartupError: it cannot be written, why, and what to do.
        """
        with self._told(StartupError):
            self._put(_OWNER, identity.encode())

    def put(self, name: str, content: bytes | Path) -> None:
        """Store a file, in place of the one of that name; it is durable when this returns.

        Raises:
            StorageUnavailable: it is not stored.
        """
        with self._told():
            self._put(name, content)

    def read(self, name: str) -> bytes | None:
        """A small file, or None.

        Raises:
            StorageUnavailable: that cannot be told now.
        """
        with self._told():
            return self._read(name)

    def get(self, name: str, target: Path) -> bool:
        """Copy a file to a new one on this machine; False where there is none.

        Raises:
            StorageUnavailable: it cannot be had now.
        """
        with self._told():
            try:
                self._fs.get_file(self._path(name), str(target))
            except FileNotFoundError as error:
                target.unlink(missing_ok=True)
                self._check_absence(error)
                return False
            except BaseException:
                target.unlink(missing_ok=True)
                raise
            return True

    def delete(self, names: Iterable[str]) -> None:
        """Remove files; those that are not there are no mistake.

        Raises:
            StorageUnavailable: some may be left.
        """
        paths = [self._path(name) for name in names]
        with self._told():
            if self._kind == "file":
                for path in map(Path, paths):
                    path.unlink(missing_ok=True)
                    with suppress(OSError):  # others are in it; object stores have no empty folders
                        path.parent.rmdir()
                return
            for start in range(0, len(paths), _AT_A_TIME):
                self._fs.rm(paths[start : start + _AT_A_TIME], **self._within())

    def listed(self, folder: str) -> dict[str, float]:
        """The names of all files below a folder, and how many seconds ago each was stored.

        Raises:
            StorageUnavailable: that cannot be told now.
        """
        now = time.time()
        root = self._path("")
        with self._told():
            found = self._fs.find(self._path(folder), detail=True, **self._within())
        # Where the last file goes while s3fs looks, it tells of the folder that it thinks is left.
        files = {path: about for path, about in found.items() if about["type"] == "file"}
        return {path.removeprefix(root): now - _stored(about) for path, about in files.items()}

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _within(self, size: int = 0) -> dict[str, float]:
        """How long a call may take. botocore's own limits do not hold where a server is waited for to
        take an upload ("100 Continue"); a download, of which the size is not known, is not one."""
        if self._kind == "file":
            return {}
        return {"timeout": _ATTEMPTS * (_CONNECT_S + _ANSWER_S) + size / _SLOWEST}

    def _read(self, name: str) -> bytes | None:
        try:
            return bytes(self._fs.cat_file(self._path(name), **self._within()))
        except FileNotFoundError as error:
            self._check_absence(error)
            return None

    def _check_absence(self, error: FileNotFoundError) -> None:
        """A store that is not there tells nothing of what it holds."""
        is_there = Path(self._root).is_dir() if self._kind == "file" else _code(error) != _NO_BUCKET
        if not is_there:
            raise error

    def _put(self, name: str, content: bytes | Path) -> None:
        path = self._path(name)
        if self._kind == "s3":
            if isinstance(content, bytes):
                self._fs.pipe_file(path, content, **self._within(len(content)))
            else:
                size = content.stat().st_size
                self._fs.put_file(str(content), path, **self._within(size))
            return
        if not Path(self._root).is_dir():  # a network's folder that is not mounted
            raise FileNotFoundError(f"there is no folder {self._root}. Make or mount it.")
        part = f"{path}.{new_id()}.part"
        self._fs.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH120  # fsspec's paths are text
        try:
            if isinstance(content, bytes):
                self._fs.pipe_file(part, content)
            else:
                self._fs.put_file(str(content), part)
            _sync(part)
            os.replace(part, path)  # noqa: PTH105
            _sync(os.path.dirname(path))  # noqa: PTH120
        finally:
            with suppress(FileNotFoundError):
                os.unlink(part)  # noqa: PTH108

    @contextmanager
    def _told(self, kind: type[CortexError] = StorageUnavailable) -> Iterator[None]:
        """What its libraries raise, as errors of ours: fsspec, botocore and aiohttp have no common one."""
        try:
            yield
        except Exception as error:
            raise kind(
                f"the store of files {self.url} cannot be used: {self._why(error)}"
            ) from error

    def _why(self, error: Exception) -> str:
        names = {each.__name__ for each in type(error).__mro__}
        code = _code(error)
        if names & {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}:
            return (
                f"{error}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE for one of "
                "~/.aws/credentials, or run where a role gives them."
            )
        if code == _NO_BUCKET:
            bucket = self._root.partition("/")[0]
            return f"there is no bucket {bucket!r}. Make it, or name another one with --files."
        if code in _REFUSED:
            return (
                f"its server refuses the credentials ({code}: {error}). Correct AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or the profile."
            )
        if isinstance(error, PermissionError):
            return (
                f"not allowed ({error}). It has to be readable and writable; on S3 the credentials need "
                "s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject there."
            )
        if names & {"HTTPClientError", "ClientError", "TimeoutError", "ConnectionError"}:
            return (
                f"its server does not answer ({error}). Is it up, can this machine reach it, and is "
                "AWS_ENDPOINT_URL_S3 right where it is not Amazon's?"
            )
        return str(error) or type(error).__name__


def _local() -> AbstractFileSystem:
    from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]  # it has no types

    return LocalFileSystem(skip_instance_cache=True)


def _s3() -> AbstractFileSystem:
    try:
        from s3fs import S3FileSystem  # type: ignore[import-untyped]  # it has no types
    except ImportError as error:
        raise StartupError(
            f"a store of files on S3 needs s3fs, which is not installed ({error}): "
            "pip install 'cortex-tasks[s3]'"
        ) from error
    fs = S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": _CONNECT_S,
            "read_timeout": _ANSWER_S,
            "retries": {"mode": "standard", "total_max_attempts": _ATTEMPTS},
        },
    )
    # What is left over of a request that failed, and was told, is nothing to tell.
    fs.loop.call_soon_threadsafe(fs.loop.set_exception_handler, lambda *_: None)
    fs.retries = 1  # botocore's own are enough: both together would be their product
    return fs


def _code(error: BaseException) -> str | None:
    """What S3 calls an error, which s3fs keeps as the cause of its own."""
    response = getattr(error.__cause__, "response", None)
    return response["Error"].get("Code") if isinstance(response, dict) else None


def _stored(about: dict[str, object]) -> float:
    when = about.get("LastModified", about.get("mtime"))
    timestamp = getattr(when, "timestamp", None)
    return float(when if timestamp is None else timestamp())  # type: ignore[arg-type]  # a datetime or a number


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
