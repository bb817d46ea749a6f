"""The address on which an operator listens."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from operator_harness import PROBE, operator, probe_yaml

# A mount namespace with a resolver that resolves no name.
NAMELESS = (
    "mount --bind /dev/null /etc/hosts && mount --bind /dev/null /etc/resolv.conf "
    '&& mount --bind "$1" /etc/nsswitch.conf && shift && exec "$@"'
)


@pytest.fixture
def nameless(tmp_path: Path) -> list[str]:
    """The prefix of a command that runs without a working resolver."""
    (tmp_path / "nsswitch.conf").write_text("hosts: files\npasswd: files\ngroup: files\n")
    return ["unshare", "-rm", "sh", "-c", NAMELESS, "sh", str(tmp_path / "nsswitch.conf")]


def test_an_operator_serves_where_the_resolver_does_not_know_localhost(
    tmp_path: Path, nameless: list[str]
) -> None:
    with operator(tmp_path / "own", command_prefix=nameless) as running:
        assert urlsplit(running.url).hostname == "127.0.0.1"
        endpoint = running.deployed(probe_yaml(), {"probe.py": PROBE})
        assert endpoint.startswith(running.url)
        assert running.run(endpoint)["status"] == "status_succeeded"
        lookup = "import socket; socket.getaddrinfo('localhost', None)"
        yaml = (
            f'- name: look\n  kind: TaskAPI\n  definition: {{command: [python, -c, "{lookup}"]}}\n'
        )
        found = running.run(running.deployed(yaml, {}))
        assert "gaierror" in found["message"]  # the resolver really fails


def loopbacks() -> list[str]:
    """The loopback addresses of this machine."""
    of_ipv6 = Path("/proc/net/if_inet6")
    has_ipv6 = of_ipv6.exists() and " lo\n" in of_ipv6.read_text()
    return ["localhost", "127.0.0.1", *(["::1"] if has_ipv6 else [])]


@pytest.mark.parametrize("host", loopbacks())
def test_the_printed_url_is_reachable(tmp_path: Path, host: str) -> None:
    with operator(tmp_path, "--host", host) as running:
        assert urlsplit(running.url).hostname == host
        assert running.http.get(f"{running.url}/healthz").status_code == 200
