"""The bodies of requests: compressed, over the limit while the client still sends, or JSON with the
content type of a form.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import io
import json
import os
import re
import socket
import subprocess
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from cortex.operator.http.wire import MAX_DISCARDED_BYTES
from cortex.projects.pack import pack
from operator_harness import PROBE, Operator, probe_yaml, until

CONFIG = {"config": {"kept": "ä" * 5000}}
BODY = json.dumps(CONFIG, ensure_ascii=False).encode()
MIB = 1024**2
JSON = {"Content-Type": "application/json"}


def raw_deflate(data: bytes) -> bytes:
    """A raw deflate stream, without the header of zlib."""
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def post(endpoint: str, body: bytes | Iterator[bytes], coding: str, **more: str) -> httpx.Response:
    headers = {**JSON, "Content-Encoding": coding, **more}
    return httpx.post(endpoint, content=body, headers=headers, timeout=60)


def in_pieces(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", gzip.compress(BODY)),
        ("GZIP", gzip.compress(BODY)),
        ("x-gzip", gzip.compress(BODY)),
        ("identity, gzip", gzip.compress(BODY)),
        ("gzip", gzip.compress(BODY[:70]) + gzip.compress(b"") + gzip.compress(BODY[70:])),
        ("gzip", gzip.compress(BODY) + b"\0" * 512),
        ("deflate", zlib.compress(BODY)),
        ("deflate", raw_deflate(BODY)),
        ("identity", BODY),
        ("", BODY),
    ],
    ids=range(10),
)
def test_a_compressed_body_is_decompressed(probe: str, coding: str, body: bytes) -> None:
    for content in (body, in_pieces(body, 7), in_pieces(body, 1)):
        answer = post(probe, content, coding)
        assert (answer.status_code, answer.json().get("config")) == (200, CONFIG["config"]), coding


def test_a_compressed_body_may_be_as_long_as_a_plain_one(probe: str) -> None:
    text = os.urandom(5 * MIB - 50).hex()
    body = json.dumps({"config": {"x": text}}).encode()
    assert post(probe, gzip.compress(body, 1), "gzip").json()["config"] == {"x": text}


def test_the_same_key_with_the_same_body_in_another_coding_is_the_same_job(probe: str) -> None:
    packed, plain = gzip.compress(BODY), BODY
    key = {"Idempotency-Key": "packed once"}
    first = post(probe, packed, "gzip", **key).json()
    assert post(probe, plain, "identity", **key).json() == first


@pytest.mark.parametrize(
    "coding",
    [
        "br",
        "zstd",
        "compress",
        "gzip, gzip",
        "deflate, gzip",
        "gzip;q=1",
        "\xe4",
        "br+gzip",
        "gzip+gzip",
    ],
)
def test_an_unknown_coding_is_refused_by_name(probe: str, coding: str) -> None:
    headers = [(b"Content-Type", b"application/json")]
    headers += [(b"Content-Encoding", each.encode()) for each in coding.split("+")]
    answer = httpx.post(probe, content=BODY, headers=headers, timeout=60)
    assert (answer.status_code, answer.json()["kind"]) == (415, "request.unsupported_media_type")
    shown = coding.replace("+", ",").encode().decode("latin-1")
    assert repr(shown) in answer.json()["message"]
    assert "gzip, deflate" in answer.json()["message"]
    assert answer.headers["accept-encoding"] == "gzip, deflate"


@pytest.mark.parametrize(
    ("coding", "body", "named"),
    [
        ("gzip", BODY, "gzip"),
        ("gzip", gzip.compress(BODY)[:-9], "in the middle"),
        ("gzip", gzip.compress(BODY)[:5], "in the middle"),
        ("gzip", gzip.compress(BODY) + b"more", "gzip"),
        ("gzip", gzip.compress(BODY)[:-8] + bytes(8), "gzip"),
        ("deflate", zlib.compress(BODY) + b"more", "follows"),
        ("deflate", b"\xff" + BODY, "deflate"),
        ("gzip", gzip.compress(b"{"), "JSON"),
        ("gzip", b"", "empty"),
        ("gzip", gzip.compress(b""), "empty"),
    ],
    ids=range(10),
)
def test_a_body_that_does_not_match_its_coding_is_refused(
    shared_operator: Operator, probe: str, coding: str, body: bytes, named: str
) -> None:
    by_key = {"Idempotency-Key": "broken"}  # the framework handles requests with a key
    for headers in ({}, by_key):
        answer = post(probe, body, coding, **headers)
        assert (answer.status_code, answer.json()["kind"]) == (400, "request.invalid")
        assert named in answer.json()["message"]
    assert "crashed" not in shared_operator.log.read_text()


def test_a_decompression_bomb_is_refused_in_bounded_memory(own_operator: Operator) -> None:
    endpoint = own_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    bomb = gzip.compress(bytes(256 * MIB), 1)
    assert len(bomb) < 2 * MIB
    before = peak_kib(own_operator.process.pid)
    for coding, body in (("gzip", bomb), ("gzip", in_pieces(bomb, 65536))):
        answer = post(endpoint, body, coding)
        assert (answer.status_code, answer.json()["kind"]) == (413, "request.too_large")
        assert "10 MiB" in answer.json()["message"]
    empty = gzip.compress(b"")
    answer = post(endpoint, empty * (10 * MIB // len(empty) + 2), "gzip")
    assert answer.status_code == 413
    assert peak_kib(own_operator.process.pid) - before < 64 * 1024


def peak_kib(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1])


def test_a_compressed_upload_is_decompressed_and_bounded(
    shared_operator: Operator, tmp_path: Path
) -> None:
    yaml = probe_yaml("packed")
    (tmp_path / "probe.py").write_text(PROBE)
    archive = io.BytesIO()
    pack(tmp_path, archive)
    form = httpx.Request(
        "POST",
        f"{shared_operator.url}/-/apis",
        files={"config": ("cortex.yaml", yaml.encode()), "project": ("p", archive.getvalue())},
    )
    of_form = {"Content-Type": form.headers["content-type"]}
    answer = post(str(form.url), gzip.compress(form.read()), "gzip", **of_form)
    assert answer.json()[0]["message"] == "created packed"
    broken = gzip.compress(form.read())[:-20]
    answer = post(str(form.url), broken, "gzip", **of_form)
    assert (answer.status_code, answer.json()["kind"]) == (400, "request.invalid")
    assert "in the middle" in answer.json()["message"]
    head = b'--b\r\nContent-Disposition: form-data; name="project"; filename="p"\r\n\r\n'
    bomb = gzip.compress(head + bytes(140 * MIB), 1)
    of_form = {"Content-Type": "multipart/form-data; boundary=b"}
    assert post(str(form.url), bomb, "gzip", **of_form).status_code == 413


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Path]]:
    folder = tmp_path_factory.mktemp("large")

    def made(mib: int) -> Path:
        file = folder / str(mib)
        with file.open("wb") as sparse:
            sparse.truncate(mib * MIB)
        return file

    yield made


CURL = ["curl", "-sS", "-w", "\n%{http_code}", "-H", "Content-Type: application/json"]


@pytest.mark.parametrize("mib", [11, 200])
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["-H", "Expect:"],
        ["-H", "Expect:", "-H", "Connection: close"],
        ["-H", "Expect:", "-H", "Transfer-Encoding: chunked"],
        ["-H", "Expect:", "-H", "Transfer-Encoding: chunked", "-H", "Connection: close"],
        ["-H", "Transfer-Encoding: chunked"],
        ["--http1.0"],
    ],
    ids=["plain", "at-once", "close", "chunked", "chunked-close", "chunked-expect", "1.0"],
)
def test_curl_reads_the_413(
    probe: str, large: Callable[[int], Path], mib: int, options: list[str]
) -> None:
    command = [*CURL, *options, "--data-binary", f"@{large(mib)}", probe]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    body, _, status = done.stdout.rpartition("\n")
    assert (done.returncode, done.stderr, status) == (0, "", "413")
    assert json.loads(body)["kind"] == "request.too_large"


@pytest.mark.parametrize("mib", [11, 200])
def test_clients_that_send_all_before_they_read_get_the_413(
    probe: str, large: Callable[[int], Path], mib: int
) -> None:
    data = large(mib).read_bytes()
    with pytest.raises(urllib.error.HTTPError) as refused:  # urllib sends Connection: close
        urllib.request.urlopen(urllib.request.Request(probe, data, JSON), timeout=60)
    with refused.value as answer:
        assert (answer.code, json.load(answer)["kind"]) == (413, "request.too_large")
    pieces = in_pieces(data, MIB)
    assert httpx.post(probe, content=pieces, headers=JSON, timeout=60).status_code == 413


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_connection_stays_usable_after_a_413(probe: str, is_chunked: bool) -> None:
    at = urlsplit(probe)
    with contextlib.closing(http.client.HTTPConnection(at.netloc, timeout=60)) as connection:
        for _ in range(3):
            body = in_pieces(bytes(11 * MIB), 65536) if is_chunked else bytes(11 * MIB)
            connection.request("POST", at.path, body, JSON, encode_chunked=is_chunked)
            with connection.getresponse() as answer:
                assert (answer.status, json.load(answer)["kind"]) == (413, "request.too_large")
            its_socket = connection.sock
            connection.request("POST", at.path, b"{}", JSON)
            with connection.getresponse() as answer:
                assert answer.status == 200
                answer.read()
            assert connection.sock is its_socket


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/nothing", {}, 404),
        ("/probe", {"Content-Type": "text/plain"}, 415),
        ("/probe", {"Content-Encoding": "br"}, 415),
        ("/probe", {"Origin": "http://evil.example"}, 403),
        ("/healthz", {}, 405),
    ],
)
def test_every_early_answer_reaches_a_client_that_still_sends(
    shared_operator: Operator, probe: str, path: str, headers: dict[str, str], status: int
) -> None:
    request = urllib.request.Request(
        shared_operator.url + path, bytes(9 * MIB), {**JSON, **headers}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    with refused.value as answer:
        assert answer.code == status


@pytest.mark.parametrize("form", [b"Content-Length: 536870912", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("keeps", [b"keep-alive", b"close"])
def test_the_discarded_rest_of_a_body_is_bounded(
    shared_operator: Operator, probe: str, form: bytes, keeps: bytes
) -> None:
    parts = urlsplit(shared_operator.url)
    length = 2 * MAX_DISCARDED_BYTES
    piece = bytes(MIB)
    if b"chunked" in form:
        piece = b"%x\r\n%s\r\n" % (MIB, piece)
    with socket.create_connection((parts.hostname, parts.port), 60) as connection:
        head = b"POST /probe HTTP/1.1\r\nHost: localhost\r\nConnection: %s\r\n%s\r\n\r\n"
        connection.sendall(head % (keeps, form))
        sent_bytes = 0
        with contextlib.suppress(ConnectionError):
            while sent_bytes < length:
                connection.sendall(piece)
                sent_bytes += MIB
    assert MAX_DISCARDED_BYTES <= sent_bytes < length
    until(
        lambda: shared_operator.http.get(f"{shared_operator.url}/healthz").status_code == 200,
        "the operator answers",
    )


def newest_job_ids(shared_operator: Operator, probe: str) -> list[str]:
    """The ids of the newest jobs. Jobs of earlier tests may still run; no new job may appear."""
    return [job["job_id"] for job in shared_operator.http.get(probe).json()["job_statuses"]]


def test_bytes_after_an_answer_that_closes_are_no_request(
    shared_operator: Operator, probe: str
) -> None:
    """The operator acts on no request that a client hides behind a refused body."""
    parts = urlsplit(shared_operator.url)
    before = newest_job_ids(shared_operator, probe)
    behind = b"POST /probe HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
    with socket.create_connection((parts.hostname, parts.port), 60) as connection:
        head = b"POST /probe HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        connection.sendall(head % (11 * MIB))
        received = connection.recv(65536)
        with contextlib.suppress(ConnectionError):
            connection.sendall(bytes(11 * MIB) + behind)
            while piece := connection.recv(65536):
                received += piece
    assert received.startswith(b"HTTP/1.1 413 ")
    assert received.count(b"HTTP/1.1") == 1
    assert newest_job_ids(shared_operator, probe) == before


FORM = "application/x-www-form-urlencoded"


def test_json_with_the_form_type_of_plain_curl_is_accepted(probe: str) -> None:
    for data in ('{"config": {"a": 1}}', ' {"config": {"a": 1}}', '\ufeff{"config": {"a": 1}}'):
        command = ["curl", "-sS", "-d", data, probe]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert json.loads(done.stdout).get("config") == {"a": 1}, done.stdout


@pytest.mark.parametrize(
    "name",
    ["Origin", "Sec-Fetch-Site", "Sec-Fetch-Mode", "Sec-Fetch-Dest", "sec-fetch-user"],
)
def test_json_with_the_form_type_is_refused_from_a_web_page(
    shared_operator: Operator, probe: str, name: str
) -> None:
    value = shared_operator.url if name == "Origin" else "same-origin"
    for path in (probe, f"{shared_operator.url}/-/apis/probe/jobs"):
        answer = httpx.post(
            path, content=b"{}", headers={"Content-Type": FORM, name: value}, timeout=60
        )
        assert (answer.status_code, answer.json()["kind"]) == (
            415,
            "request.unsupported_media_type",
        )


@pytest.mark.parametrize("body", [b"config=1", b"a=1&b=2", b"%7B%7D", b"timeout"])
def test_a_form_is_refused_with_the_type_to_send(probe: str, body: bytes) -> None:
    answer = httpx.post(
        probe, content=body, headers={"Content-Type": f"{FORM}; charset=utf-8"}, timeout=60
    )
    assert (answer.status_code, answer.json()["kind"]) == (415, "request.unsupported_media_type")
    assert "Content-Type: application/json" in answer.json()["message"]


@pytest.mark.parametrize(
    ("body", "named"), [(b"{config: 1}", "JSON"), (b"[]", "object"), (b"5", "object"), (b"", "{}")]
)
def test_mistakes_in_json_with_the_form_type_are_named(probe: str, body: bytes, named: str) -> None:
    answer = httpx.post(probe, content=body, headers={"Content-Type": FORM}, timeout=60)
    assert (answer.status_code, answer.json()["kind"]) == (400, "request.invalid")
    assert named in answer.json()["message"]
