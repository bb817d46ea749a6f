"""How clients connect to an operator: the proxy, and the certificates that they trust."""

from __future__ import annotations

import gc
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
from socksio.exceptions import ProtocolError

from client_variants import Connect
from cortex.cli.main import run
from cortex.errors import CortexError, OperatorUnreachable
from cortex.sdk import Client, environments, pool
from cortex.sdk.endpoint import Endpoint
from cortex.sdk.proxies import Proxy, proxy_of
from operator_stub import VIEW, Answer, OperatorStub, answer

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
PROXY = Proxy("http", "proxy.lan", 3128)


@pytest.fixture(autouse=True)
def no_proxy_and_no_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)


def verifier(url: str) -> ssl.SSLContext:
    return pool.settings(Endpoint.checked(url, "", None))["verify"]


@pytest.mark.parametrize(
    ("url", "connect_url"),
    [
        ("http://localhost:8888", "http://127.0.0.1:8888"),
        ("http://localhost/cortex", "http://127.0.0.1/cortex"),
        ("https://localhost:8888", "https://localhost:8888"),
        ("http://jobs.lan", "http://jobs.lan"),
    ],
)
def test_localhost_is_this_machine_where_the_resolver_does_not_know_it(
    monkeypatch: pytest.MonkeyPatch, url: str, connect_url: str
) -> None:
    def resolve(*_: object) -> NoReturn:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    assert Endpoint.checked(url, "", None).url == url
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert Endpoint.checked(url, "", None).url == connect_url


@pytest.mark.parametrize("url", ["http://localhost:8888", "http://127.0.0.1", "http://jobs.lan"])
def test_without_tls_no_authority_is_trusted(url: str) -> None:
    verify = verifier(url)
    assert verify.verify_mode == ssl.CERT_REQUIRED
    assert verify.check_hostname
    assert verify.get_ca_certs() == []


def test_certificates_are_checked_against_the_known_authorities(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for url in ("https://jobs.lan", "HTTPS://jobs.lan"):
        verify = verifier(url)
        assert verify.verify_mode == ssl.CERT_REQUIRED
        assert len(verify.get_ca_certs()) > 50
    monkeypatch.setenv("http_proxy", "https://proxy.lan:3128")
    assert len(verifier("http://jobs.lan").get_ca_certs()) > 50


@pytest.mark.parametrize(
    ("variables", "url", "proxy"),
    [
        ({"HTTP_PROXY": "http://proxy.lan:3128"}, "http://jobs.lan:8888", PROXY),
        ({"http_proxy": "http://proxy.lan:3128"}, "http://jobs.lan:8888", PROXY),
        ({"http_proxy": "proxy.lan:3128"}, "http://jobs.lan:8888", PROXY),
        ({"http_proxy": " http://proxy.lan:3128/ "}, "http://jobs.lan", PROXY),
        ({"http_proxy": "http://proxy.lan:3128", "HTTP_PROXY": "http://no"}, "http://jobs", PROXY),
        ({"http_proxy": "", "HTTP_PROXY": "http://proxy.lan:3128"}, "http://jobs.lan", None),
        ({"http_proxy": " "}, "http://jobs.lan", None),
        ({"HTTPS_PROXY": "http://proxy.lan:3128"}, "http://jobs.lan", None),
        ({"HTTPS_PROXY": "http://proxy.lan:3128"}, "https://jobs.lan", PROXY),
        ({"ALL_PROXY": "http://proxy.lan:3128"}, "http://jobs.lan", PROXY),
        ({"all_proxy": "http://no", "https_proxy": "proxy.lan:3128"}, "https://jobs.lan", PROXY),
        (
            {"all_proxy": "socks5://proxy.lan"},
            "http://jobs.lan",
            Proxy("socks5", "proxy.lan", 1080),
        ),
        ({"all_proxy": "socks5h://[::1]:9"}, "http://jobs.lan", Proxy("socks5h", "::1", 9)),
        (
            {"http_proxy": "http://me%40lan:p%3Ass@proxy.lan"},
            "http://jobs.lan",
            Proxy("http", "proxy.lan", 80, "me@lan", "p:ss"),
        ),
        ({"http_proxy": "http://proxy.lan:3128"}, "http://localhost:8888", None),
        ({"http_proxy": "http://proxy.lan:3128"}, "http://a.localhost:8888", None),
        ({"http_proxy": "http://proxy.lan:3128"}, "http://127.0.0.9:8888", None),
        ({"http_proxy": "http://proxy.lan:3128"}, "http://[::1]:8888", None),
        ({"http_proxy": "http://proxy.lan:3128"}, "http://0.0.0.0:8888", None),
        ({"HTTP_PROXY": "http://proxy.lan", "REQUEST_METHOD": "GET"}, "http://jobs.lan", None),
    ],
)
def test_the_proxy_is_the_one_that_other_programs_use(
    variables: dict[str, str], url: str, proxy: Proxy | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert proxy_of(url) == proxy


@pytest.mark.parametrize(
    ("no_proxy", "url", "is_exempt"),
    [
        ("localhost,127.0.0.1,fd00::/8", "http://jobs.lan:8888", False),
        ("localhost,127.0.0.1,fd00::/8", "http://[fd12::7]:8888", True),
        ("[fd00::]/8", "http://[fd12::7]:8888", True),
        ("fd12::7", "http://[fd12:0::7]:8888", True),
        ("[fd12::7]:8888", "http://[fd12::7]:8888", True),
        ("[fd12::7]:1", "http://[fd12::7]:8888", False),
        ("10.0.0.0/8", "http://10.1.2.3:8888", True),
        ("10.0.0.1/8", "http://10.1.2.3:8888", True),
        ("10.0.0.0/8", "http://11.1.2.3:8888", False),
        ("10.0.0.0/8", "http://10.example.org", False),
        ("10.0.0.0/99,fd00::/999,/,::/x", "http://10.1.2.3", False),
        ("*", "http://jobs.lan", True),
        ("a, *", "http://jobs.lan", True),
        ("lan", "http://jobs.lan", True),
        (".lan", "http://jobs.lan", True),
        ("*.lan", "http://jobs.lan", True),
        ("JOBS.lan", "http://jobs.LAN", True),
        ("jobs.lan", "http://jobs.lan.", True),
        ("obs.lan", "http://jobs.lan", False),
        ("jobs.lan.example.org", "http://jobs.lan", False),
        ("jobs.lan:8888", "http://jobs.lan:8888", True),
        ("jobs.lan:80", "http://jobs.lan", True),
        ("jobs.lan:8888", "http://jobs.lan:9", False),
        ("a b\tjobs.lan\n", "http://jobs.lan", True),
        (",, ,", "http://jobs.lan", False),
        ("[", "http://jobs.lan", False),
        ("]:,:,:80,a:b:c,%,\u00e9", "http://jobs.lan", False),
        ("10.1.2", "http://10.1.2.3", False),
        ("1.2.3", "http://10.1.2.3", False),
    ],
)
@pytest.mark.parametrize("variable", ["NO_PROXY", "no_proxy"])
def test_no_proxy_names_hosts_domains_and_networks(
    variable: str, no_proxy: str, url: str, is_exempt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.lan:3128")
    monkeypatch.setenv(variable, no_proxy)
    assert proxy_of(url) == (None if is_exempt else PROXY)
    monkeypatch.delenv("http_proxy")
    assert proxy_of(url) is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("http://proxy.lan:port", "port"),
        ("http://proxy.lan:99999", "ort out of range"),
        ("socks4://proxy.lan", "socks4:// is not supported; use http, https, socks5, socks5h"),
        ("ftp://proxy.lan", "ftp:// is not supported"),
        ("http://", "it has no host"),
        ("http://[::1", "IPv6"),
        ("http://a proxy", "it has no host"),
        (":3128", "it has no host"),
        ("http://me:geheim@proxy.lan:port", "'proxy.lan:port'"),
    ],
)
def test_an_invalid_proxy_is_reported_with_its_variable(
    value: str,
    words: str,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("HTTP_PROXY", value)
    with pytest.raises(CortexError) as caught:
        connect("http://jobs.lan:8888")
    for each in (words, "$HTTP_PROXY", "NO_PROXY"):
        assert each in caught.value.message
    assert "geheim" not in caught.value.message
    monkeypatch.setenv("CORTEX_CLI_CONFIG_DIR", str(tmp_path))
    environments.configure("x", "http://jobs.lan:8888")
    assert run(["get"]) == 1
    assert capsys.readouterr() == ("", f"error: {caught.value.message}\n")


def test_an_operator_is_reached_through_a_proxy(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OperatorStub({"GET http://jobs.lan:8888/-/apis": answer([VIEW])}) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.replace("http://", "http://me:p%3Ass@"))
        with connect("http://jobs.lan:8888") as client:
            assert client.list_apis() == [VIEW]
            proxy.answers["GET http://jobs.lan:8888/-/apis/iris/jobs/j1"] = Answer(
                407, (b"<html>",), "text/html"
            )
            with pytest.raises(CortexError, match=f"through the proxy {proxy.url}"):
                client.get_job("iris", "j1", wait=0)
    assert proxy.requests[0].headers["proxy-authorization"] == "Basic bWU6cDpzcw=="
    assert proxy.requests[0].headers["host"] == "jobs.lan:8888"


def test_an_unreachable_proxy_is_named(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setenv("HTTP_PROXY", f"127.0.0.1:{port}")
        with (
            connect("http://jobs.lan:8888") as client,
            pytest.raises(
                OperatorUnreachable, match=f"the proxy http://127.0.0.1:{port}.*NO_PROXY"
            ),
        ):
            client.list_apis()


@contextmanager
def refusing_proxy(refusal: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """A server that answers one request with `refusal`: its port and the request."""
    requests: list[bytes] = []

    def serve() -> None:
        with listener.accept()[0] as connection:
            requests.append(connection.recv(4096))
            connection.sendall(refusal)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1], requests
        thread.join()


def test_an_operator_with_tls_is_reached_through_a_tunnel(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"
    with refusing_proxy(refusal) as (port, requests):
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        with (
            connect("https://jobs.lan:8888") as client,
            pytest.raises(OperatorUnreachable, match="407"),
        ):
            client.list_apis()
    assert requests[0].startswith(b"CONNECT jobs.lan:8888 HTTP/1.")


# httpcore does not close a connection that a SOCKS proxy has refused.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_socks_proxy_gets_a_socks_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_refused() -> bool:
        with Client("http://jobs.lan:8888") as client:
            try:
                client.list_apis()
            except OperatorUnreachable:
                return True
        return False

    with refusing_proxy(b"\x05\xff") as (port, requests):
        monkeypatch.setenv("ALL_PROXY", f"socks5h://127.0.0.1:{port}")
        assert is_refused()
    gc.collect()  # no frame refers to the connection any longer
    assert requests[0][0] == 5


def test_a_proxy_that_does_not_speak_socks_is_reported() -> None:
    endpoint = Endpoint("http://jobs.lan:8888", proxy=Proxy("socks5", "proxy.lan", 1080))
    with (
        pytest.raises(OperatorUnreachable, match=r"socks5://proxy.lan:1080.*does not speak SOCKS"),
        pool.translated_errors(endpoint, 1.0),
    ):
        raise ProtocolError("Malformed reply")


def test_in_a_task_a_socks_proxy_is_refused_with_the_supported_kinds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5h://127.0.0.1:9")
    monkeypatch.setenv("CORTEX_JOB_ID", "j1")
    with pytest.raises(CortexError, match="cannot be used in a task; use an http:// proxy"):
        Client("http://jobs.lan:8888")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for localhost. Its key is beside it, under the same name and `.key`."""
    file = tmp_path_factory.mktemp("tls") / "own.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", f"{file}.key",
         "-out", str(file)],
        check=True, capture_output=True,
    )  # fmt: skip
    return file


@contextmanager
def encrypted(certificate: Path) -> Iterator[str]:
    """The URL of a stub with TLS and this certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, f"{certificate}.key")
    with OperatorStub({"GET /-/apis": answer([VIEW])}, tls=context) as stub:
        yield stub.url


def test_certificates_named_in_the_environment_are_trusted(
    certificate: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with encrypted(certificate) as url:
        with connect(url) as client, pytest.raises(OperatorUnreachable, match="CERTIFICATE"):
            client.list_apis()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
        with connect(url) as client:
            assert client.list_apis() == [VIEW]
        hashed = subprocess.run(
            ["openssl", "x509", "-hash", "-noout", "-in", str(certificate)],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        (tmp_path / f"{hashed}.0").write_bytes(certificate.read_bytes())
        monkeypatch.delenv("SSL_CERT_FILE")
        monkeypatch.setenv("SSL_CERT_DIR", f"{tmp_path}/none:{tmp_path}")
        with connect(url) as client:
            assert client.list_apis() == [VIEW]


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_missing_certificates_are_reported(
    variable: str, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "none"))
    with pytest.raises(CortexError, match=f"{variable} is .*none', which holds no certificates"):
        connect("https://jobs.lan")
    with connect("http://jobs.lan"):
        pass
    (tmp_path / "none").write_text("no certificate")
    with pytest.raises(CortexError, match=f"{variable} is .*none', which holds no certificates"):
        connect("https://jobs.lan")
