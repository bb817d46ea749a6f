"""Harmful archives."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
import zlib
from collections.abc import Callable

from fuzz import odd_values

BLOCK = 512
# The name of a file that archives try to create outside the project.
PLANTED = "cortex-fuzz-planted"

_NAMES = [
    "../" + PLANTED, "/tmp/" + PLANTED, "a/../../" + PLANTED, "../../../../../../tmp/" + PLANTED, "a/..", "..", ".",
    "", "./", "/", "//", "a//b", "a/./b", "./a", "a/", "a\nb", "a\rb", "\x1b[31m", "-rf", "a" * 255, "a" * 256,
    "a" * 5000, "a/" * 100 + "x", "a/" * 1000 + "x", "a/" * 1990 + "x", "a/" * 4000 + "x", "cortex.yaml", ".env",
    "task.py", "task.py/x", "lib/x.py", "requirements.txt", "pyproject.toml", "uv.toml", "conda-packages.txt",
    "\u00e4", "\u2603" * 60, "\udcff", "\udc80\udc81", "\\..\\" + PLANTED, "C:\\" + PLANTED, "CON", "a ", " a", "~",
    "..\u2215x", "a\0b", "\0", "__pycache__/task.cpython-311.pyc", "sitecustomize.py",
]  # fmt: skip
_LINKS = [
    "", ".", "..", "../" + PLANTED, "/etc/passwd", "/tmp/" + PLANTED, "task.py", "a", "lib", "loop", "../..", "a/../..",
    "/proc/self/root", "x" * 2000, "lib/../../" + PLANTED, "./", "a\0b", "\udcff", "//", "lib/..", "task.py/..",
]  # fmt: skip
_SIZES = [
    b"-1\0", b"777777777777", b"00000000010\0", b"99999999999\0", b"           \0", b"0x10\0", b"\x80" + b"\0" * 10 + b"\xff",
    b"\xff" * 12, b"\xff" * 11 + b"\x00", b"\x80" + b"\x7f" * 11, b"\x80" + b"\0" * 6 + b"\x01" + b"\0" * 4, b"\xff\x00" * 6,
    b"\0" * 12, b"1_0\0", b"+5\0",
]  # fmt: skip
_KINDS = b"0123456789\x00ALKDMNSVXxg7\xff"
_PAX = [
    ("path", "../" + PLANTED), ("path", "/tmp/" + PLANTED), ("path", ""), ("path", "a\0b"), ("linkpath", "/etc"),
    ("size", "-1"), ("size", "1" * 30), ("size", "x"), ("size", "0"), ("mtime", "nan"), ("mtime", "1e400"), ("uid", "-1"),
    ("uid", "9" * 5000), ("hdrcharset", "BINARY"), ("hdrcharset", "x"), ("GNU.sparse.map", "0,0"), ("GNU.sparse.map", "x"),
    ("GNU.sparse.size", str(1 << 60)), ("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.name", "/x"),
    ("GNU.sparse.realsize", "-5"), ("GNU.sparse.offset", "x"), ("GNU.sparse.numblocks", "9" * 20), ("comment", "x" * 3000),
    ("SCHILY.xattr.user.x", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")), ("", "x"), ("a=b", "c"),
]  # fmt: skip
_FILES = [
    ("task.py", b"def task(config):\n    return config\n"),
    ("lib/helper.py", b"X = 1\n"),
    (".env", b"A=b\n"),
    ("requirements.txt", b"-r nowhere.txt\n"),
    ("pyproject.toml", b'[project]\nname = "x"\nversion = "1"\n'),
    ("conda-packages.txt", b"python=3.11\n"),
]


def archive(rng: random.Random) -> bytes:
    """A project's tar.gz, valid, broken or harmful."""
    return rng.choices(_ARCHIVES, [10, 10, 10, 10, 1, 10, 50])[0](rng)


def _cut(rng: random.Random) -> bytes:
    whole = packed(project(rng))
    return whole[: rng.randrange(len(whole))] + rng.choice([b"", b"\0" * 100, whole])


def _bomb(rng: random.Random) -> bytes:
    bomb = zlib.compressobj(9, wbits=31)
    zeros = b"".join(bomb.compress(bytes(1 << 20)) for _ in range(rng.choice([20, 170])))
    return zeros + bomb.flush()


def _no_archive(rng: random.Random) -> bytes:
    zipped = b"PK\x03\x04" + rng.randbytes(100)
    return rng.choice([b"", b"\x1f\x8b", project(rng), zipped, rng.randbytes(500)])


def _by_hand(rng: random.Random) -> bytes:
    members = [_member(rng) for _ in range(rng.randrange(1, 6))]
    if rng.random() < 0.5:
        members.insert(rng.randrange(len(members) + 1), project(rng)[: -2 * BLOCK])
    return packed(b"".join(members) + b"\0" * BLOCK * rng.choice([0, 1, 2, 2, 2, 30]))


_ARCHIVES: list[Callable[[random.Random], bytes]] = [
    lambda rng: packed(project(rng)),
    lambda rng: odd_values.mutated(rng, packed(project(rng)), 3),
    lambda rng: packed(odd_values.mutated(rng, project(rng), 6)),
    _cut,
    _bomb,
    _no_archive,
    _by_hand,
]


def packed(tar: bytes) -> bytes:
    """The archive of a tar, as a client sends it."""
    return gzip.compress(tar, 1, mtime=0)


def project(rng: random.Random) -> bytes:
    """A valid tar, in which a file may have odd content."""
    out = io.BytesIO()
    style = rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
    files = [file for file in _FILES[:3] if rng.random() < 0.8]
    files += [file for file in _FILES[3:] if rng.random() < 0.1]
    with tarfile.open(fileobj=out, mode="w", format=style) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            body = odd_values.mutated(rng, content) if rng.random() < 0.3 else content
            if name == "requirements.txt":  # fails before uv fetches anything
                body = b"-r nowhere.txt\n" + body
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return out.getvalue()


def _member(rng: random.Random) -> bytes:
    """A header made by hand, and content that may not fit it."""
    name = rng.choice(_NAMES) if rng.random() < 0.8 else odd_values.word(rng)
    before = b""
    if rng.random() < 0.25:
        records = [_record(*rng.choice(_PAX), rng) for _ in range(rng.randrange(1, 4))]
        before = _header("pax", b"".join(records), rng.choice([b"x", b"x", b"g", b"X"]))
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > 100:
        before += _header("././@LongLink", encoded + b"\0", b"L")
    content = rng.choice([b"", b"x", b"y" * 1000, rng.randbytes(513)])
    kind = bytes([rng.choice(_KINDS)]) if rng.random() < 0.6 else b"0"
    link = rng.choice(_LINKS).encode("utf-8", "surrogateescape")
    if len(link) > 100:
        before += _header("././@LongLink", link + b"\0", b"K")
    size = rng.choice(_SIZES) if rng.random() < 0.2 else None
    mode = rng.choice([b"0000644\0", b"0006777\0", b"0000000\0", b"xxxxxxx\0", b"\xff" * 8])
    return before + _header(
        name, content, kind, link=link[:100], size=size, mode=mode, is_valid=rng.random() < 0.95
    )


def _header(
    name: str,
    content: bytes,
    kind: bytes,
    *,
    link: bytes = b"",
    size: bytes | None = None,
    mode: bytes = b"0000644\0",
    is_valid: bool = True,
) -> bytes:
    size_field = b"%011o\0" % len(content) if size is None else size
    head = (
        name.encode("utf-8", "surrogateescape")[:100].ljust(100, b"\0") + mode + b"0000000\0" * 2
        + size_field[:12].ljust(12, b"\0") + b"00000000000\0" + b" " * 8 + kind + link.ljust(100, b"\0") + b"ustar\x0000"
    ).ljust(BLOCK, b"\0")  # fmt: skip
    checksum = sum(head) if is_valid else 1
    head = head[:148] + b"%06o\0 " % checksum + head[156:]
    return head + content + b"\0" * (-len(content) % BLOCK)


def _record(key: str, value: str, rng: random.Random) -> bytes:
    text = b" %s=%s\n" % (key.encode(), value.encode("latin-1", "replace"))
    length = len(text) + len(str(len(text) + 2))
    return b"%d%s" % (rng.choice([length, length, length, length, 0, 5, 10**9]), text)
