"""What connections to an operator trust."""

from __future__ import annotations

import ssl

import pytest

from cortex.client.endpoint import Endpoint

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("url", ["http://localhost:8888", "http://127.0.0.1", "http://jobs.lan"])
def test_where_nothing_is_encrypted_nobody_is_trusted(url: str) -> None:
    verify = Endpoint.checked(url, "", None).settings()["verify"]
    assert isinstance(verify, ssl.SSLContext)
    assert verify.verify_mode == ssl.CERT_REQUIRED
    assert verify.check_hostname
    assert verify.get_ca_certs() == []


def test_certificates_are_checked_by_the_authorities_that_httpx_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for url in ("https://jobs.lan", "HTTPS://jobs.lan"):
        assert Endpoint.checked(url, "", None).settings()["verify"] is True
    monkeypatch.setenv("http_proxy", "https://proxy.lan:3128")
    assert Endpoint.checked("http://jobs.lan", "", None).settings()["verify"] is True


def test_a_proxy_is_not_asked_after_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "https://proxy.lan:3128")
    settings = Endpoint.checked("http://localhost:8888", "", None).settings()
    assert settings["trust_env"] is False
    assert isinstance(settings["verify"], ssl.SSLContext)
