"""The object store: S3 or a folder, for data that must outlive the operator's machine. Uses fsspec.

The app opens it if the setting `files` is set, and only then imports the libraries. All methods
block and may be called in any thread.

A reader sees an object with all of its content or not at all: S3 shows an object when its upload is
complete, and a file gets its name when it is on the disk.
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
_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S, _MAX_ATTEMPTS = 5, 15, 2
_MIN_BYTES_PER_S = 256 << 10  # a slower upload counts as hanging
_MAX_KEYS_PER_DELETE = 1000  # the limit of S3
_NO_BUCKET = "NoSuchBucket"
_CREDENTIAL_ERRORS = {"ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}


def check_url(text: str) -> str:
    """The normal form of an object store's URL, as a user writes it.

    Raises:
        ValueError: what is wrong with it.
    """
    url = _URL.fullmatch(text)
    if url is None or url["kind"] not in {"s3", "file"}:
        raise ValueError(f"not the URL of an object store; write {FORM}, or leave the setting out")
    path = url["path"].rstrip("/")
    if "@" in path.partition("/")[0]:
        raise ValueError(
            "credentials are not allowed in the URL: they come from where AWS's tools find them"
        )
    if not re.fullmatch(r"[\w./-]+", path, re.ASCII) or ".." in path.split("/"):
        raise ValueError(
            "only letters, digits, '.', '_', '-' and '/' are allowed in it, and no '..'; "
            f"write {FORM}"
        )
    if (url["kind"] == "file") != path.startswith("/"):
        raise ValueError(f"not the URL of an object store; write {FORM}")
    return f"{url['kind']}://{path}"


class ObjectStore:
    """One object store. Names are relative to its URL, and use slashes."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            StartupError: the library for S3 is not installed.
        """
        self.url = check_url(url)
        self._kind, _, path = self.url.partition("://")
        self._root = path
        self._fs = _local() if self._kind == "file" else _s3()
        self._expected_owner: str | None = None
        self._lost_owner: str | None = None

    def owner(self) -> str | None:
        """The id of the data folder to which the object store belongs, or None.

        Raises:
            StartupError: the object store cannot be read, why, and what to do.
        """
        with self._translated_errors(StartupError):
            return self._read_owner()

    def set_owner(self, data_folder_id: str) -> None:
        """Make the object store belong to a data folder.

        Raises:
            StartupError: the object store cannot be written, why, and what to do.
        """
        with self._translated_errors(StartupError):
            self._put(_OWNER, data_folder_id.encode())

    def expect_owner(self, data_folder_id: str, *, instead_of: str | None = None) -> None:
        """Let the first use check that the object store still belongs to a data folder.

        This reads nothing: an operator starts while an object store is away that it has used.

        Args:
            instead_of: the id of a data folder that is lost for good, and that this one replaces.
        """
        self._expected_owner, self._lost_owner = data_folder_id, instead_of

    def check(self) -> None:
        """Check that the object store can be used, if nothing has used it yet.

        Raises:
            StorageUnavailable: it cannot be used now; the message says why.
        """
        with self._translated_errors():
            pass

    def put(self, name: str, content: bytes | Path) -> None:
        """Store a file under a name, replacing any other; it is durable when this returns.

        Raises:
            StorageUnavailable: the file is not stored.
        """
        with self._translated_errors():
            self._put(name, content)

    def read(self, name: str) -> bytes | None:
        """The content of a small file, or None if there is none.

        Raises:
            StorageUnavailable: the object store cannot be read.
        """
        with self._translated_errors():
            return self._read(name)

    def get(self, name: str, target: Path) -> bool:
        """Copy a file to a new one on this machine.

        Returns:
            False if the object store has no such file.

        Raises:
            StorageUnavailable: the file cannot be read.
        """
        with self._translated_errors():
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
        """Remove files; missing ones are no error.

        Raises:
            StorageUnavailable: some files may remain.
        """
        paths = [self._path(name) for name in names]
        with self._translated_errors():
            if self._kind == "file":
                for path in map(Path, paths):
                    path.unlink(missing_ok=True)
                    with suppress(OSError):  # not empty; S3 has no empty folders either
                        path.parent.rmdir()
                return
            for start in range(0, len(paths), _MAX_KEYS_PER_DELETE):
                self._fs.rm(paths[start : start + _MAX_KEYS_PER_DELETE], **self._timeout())

    def listed(self, folder: str) -> dict[str, float]:
        """All files below a folder: their names, and how many seconds ago each was stored.

        Raises:
            StorageUnavailable: the object store cannot be read.
        """
        now = time.time()
        root = self._path("")
        with self._translated_errors():
            found = self._fs.find(self._path(folder), detail=True, **self._timeout())
        # If the last file is deleted while s3fs lists the folder, s3fs lists the folder itself.
        files = {path: info for path, info in found.items() if info["type"] == "file"}
        return {path.removeprefix(root): now - _stored_at(info) for path, info in files.items()}

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _timeout(self, size: int = 0) -> dict[str, float]:
        """The timeout of a call, for fsspec.

        botocore's own timeouts do not cover the wait for "100 Continue" before an upload. A
        download has no timeout for the whole, because its size is not known.
        """
        if self._kind == "file":
            return {}
        attempts_s = _MAX_ATTEMPTS * (_CONNECT_TIMEOUT_S + _READ_TIMEOUT_S)
        return {"timeout": attempts_s + size / _MIN_BYTES_PER_S}

    def _read(self, name: str) -> bytes | None:
        try:
            return bytes(self._fs.cat_file(self._path(name), **self._timeout()))
        except FileNotFoundError as error:
            self._check_absence(error)
            return None

    def _check_absence(self, error: FileNotFoundError) -> None:
        """Raise the error if not the file is missing, but the whole bucket or folder."""
        exists = Path(self._root).is_dir() if self._kind == "file" else _code(error) != _NO_BUCKET
        if not exists:
            raise error

    def _put(self, name: str, content: bytes | Path) -> None:
        path = self._path(name)
        if self._kind == "s3":
            if isinstance(content, bytes):
                self._fs.pipe_file(path, content, **self._timeout(len(content)))
            else:
                size = content.stat().st_size
                self._fs.put_file(str(content), path, **self._timeout(size))
            return
        if not Path(self._root).is_dir():  # a network folder that is not mounted
            raise FileNotFoundError(f"there is no folder {self._root}. Create or mount it.")
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
    def _translated_errors(self, kind: type[CortexError] = StorageUnavailable) -> Iterator[None]:
        """Raise every library error as `kind`: fsspec, botocore and aiohttp share no class."""
        try:
            self._check_expected_owner()
            yield
        except Exception as error:
            raise kind(
                f"the object store {self.url} cannot be used: {self._problem(error)}"
            ) from error

    def _read_owner(self) -> str | None:
        content = self._read(_OWNER)
        return None if content is None else content.decode("ascii", "replace").strip()

    def _check_expected_owner(self) -> None:
        expected = self._expected_owner
        if expected is None:
            return
        owner = self._read_owner()
        if owner not in {None, expected, self._lost_owner}:
            raise ValueError(
                f"it belongs with another data folder now, {owner}. Choose another prefix with "
                f"--files. If that folder is lost for good, use --lost-folder {owner}."
            )
        if owner != expected:
            self._put(_OWNER, expected.encode())
        self._expected_owner = None

    def _problem(self, error: Exception) -> str:
        names = {each.__name__ for each in type(error).__mro__}
        code = _code(error)
        if names & {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}:
            return (
                f"{error}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE to a "
                "profile of ~/.aws/credentials, or run where a role provides credentials."
            )
        if code == _NO_BUCKET:
            bucket = self._root.partition("/")[0]
            return f"there is no bucket {bucket!r}. Create it, or name another one with --files."
        if code in _CREDENTIAL_ERRORS:
            return (
                f"the server refuses the credentials ({code}: {error}). Correct AWS_ACCESS_KEY_ID "
                "and AWS_SECRET_ACCESS_KEY, or the profile."
            )
        if isinstance(error, PermissionError):
            return (
                f"access denied ({error}). The operator must be able to read and write; on S3 the "
                "credentials need s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject."
            )
        if names & {"HTTPClientError", "ClientError", "TimeoutError", "ConnectionError"}:
            return (
                f"the server does not answer ({error}). Check that it is up, that this machine can "
                "reach it, and, if it is not Amazon's, that AWS_ENDPOINT_URL_S3 is right."
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
            f"an object store on S3 needs s3fs, which is not installed ({error}): "
            "pip install 'cortex-tasks[s3]'"
        ) from error
    fs = S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "read_timeout": _READ_TIMEOUT_S,
            "retries": {"mode": "standard", "total_max_attempts": _MAX_ATTEMPTS},
        },
    )
    # The remaining tasks of a request whose failure was already raised would log it again.
    fs.loop.call_soon_threadsafe(fs.loop.set_exception_handler, lambda *_: None)
    fs.retries = 1  # botocore retries itself; both together would multiply
    return fs


def _code(error: BaseException) -> str | None:
    """The error code of S3: s3fs has botocore's error as the cause of its own."""
    response = getattr(error.__cause__, "response", None)
    return response["Error"].get("Code") if isinstance(response, dict) else None


def _stored_at(info: dict[str, object]) -> float:
    when = info.get("LastModified", info.get("mtime"))
    timestamp = getattr(when, "timestamp", None)
    return float(when if timestamp is None else timestamp())  # type: ignore[arg-type]  # a datetime or a number


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
