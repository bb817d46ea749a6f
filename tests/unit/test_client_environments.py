"""The environments of the clients: the file with the URLs and tokens of operators."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import cortex
from cortex.errors import CortexError, InvalidRequest, UnknownEnvironment
from cortex.sdk import Client, environments


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CORTEX_CLI_CONFIG_DIR", str(tmp_path / "config"))
    return tmp_path / "config"


def test_nothing_configured_means_the_operator_of_this_machine(folder: Path) -> None:
    assert environments.resolve(None).operator_endpoint == "http://localhost:8888"
    assert environments.resolve("local").name == "local"
    assert cortex.env_list() == {"default_environment": None, "environments": []}
    assert not folder.exists()


def test_the_first_environment_becomes_the_default_and_stays_the_default() -> None:
    environments.configure("one", "http://one:1/")
    environments.configure("two", "https://two/prefix")
    environments.configure("one", "http://one:2")

    assert environments.resolve(None).operator_endpoint == "http://one:2"
    assert environments.resolve("two").operator_endpoint == "https://two/prefix"
    assert cortex.env_list() == {
        "default_environment": "one",
        "environments": [
            {"name": "two", "operator_endpoint": "https://two/prefix"},
            {"name": "one", "operator_endpoint": "http://one:2"},
        ],
    }


def test_deleting_the_default_leaves_none_and_says_how_to_choose() -> None:
    environments.configure("one", "http://one")
    environments.configure("two", "http://two")
    cortex.env_delete("one")

    assert cortex.env_list()["default_environment"] is None
    with pytest.raises(UnknownEnvironment, match="cortex env default NAME"):
        environments.resolve(None)
    environments.set_default("two")
    assert environments.resolve(None).name == "two"


@pytest.mark.parametrize("act", [environments.resolve, environments.set_default, cortex.env_delete])
def test_the_error_for_an_unknown_name_lists_the_known_ones(act: Callable[[str], object]) -> None:
    environments.configure("prod", "http://prod")
    with pytest.raises(UnknownEnvironment, match=r"'prdo' \(configured: prod\)"):
        act("prdo")


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8888",
        "ftp://host",
        "http://",
        "http:/host",
        "http://host:port",
        "http://h ost",
        "http://user:secret@host",
        "ftp://user:p/@secret@host",
        "http://host?x=1",
        "",
    ],
)
def test_an_endpoint_must_be_a_url(url: str, folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="is not an operator's URL") as raised:
        environments.configure("x", url)
    assert "secret" not in raised.value.message
    assert not folder.exists()


@pytest.mark.parametrize("name", ["", "-x", "a b", "a/b", "a\n"])
def test_an_invalid_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="not a valid name for an environment"):
        environments.configure(name, "http://host")


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"\xff",
        b'"text"',
        b'{"default_environment": null}',
        b'{"default_environment": "x", "environments": []}',
        b'{"default_environment": null, "environments": [{"name": 1}]}',
        b'{"default_environment": null, "environments": [{"name": "a", "operator_endpoint": "b"}]}',
    ],
)
def test_an_unreadable_file_is_reported_and_never_overwritten(content: bytes, folder: Path) -> None:
    folder.mkdir()
    environments.path().write_bytes(content)
    for act in (
        environments.load,
        lambda: environments.configure("x", "http://x"),
        lambda: environments.delete("x"),
    ):
        with pytest.raises(CortexError, match=r"environments\.json cannot be read"):
            act()
    assert environments.path().read_bytes() == content


def test_a_save_leaves_one_file_and_keeps_a_link(folder: Path, tmp_path: Path) -> None:
    folder.mkdir()
    environments.path().symlink_to(tmp_path / "target.json")
    environments.configure("one", "http://one")

    assert [p.name for p in folder.iterdir()] == ["environments.json"]
    assert environments.path().is_symlink()
    assert json.loads((tmp_path / "target.json").read_text())["default_environment"] == "one"


def test_a_folder_that_cannot_be_written_is_reported(folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    with pytest.raises(CortexError, match="cannot be saved in"):
        environments.configure("one", "http://one")


def test_cortex_client_stays_a_function_after_imports_and_calls() -> None:
    for _ in range(2):
        with cortex.client() as opened:
            assert (opened.name, opened.operator_endpoint) == ("local", "http://localhost:8888")
    with cortex.new_client("here", "http://127.0.0.1:9"), cortex.client("here") as opened:
        assert opened.operator_endpoint == "http://127.0.0.1:9"
        assert isinstance(opened, Client)


def test_cortex_token_overrides_the_token_of_an_environment_in_both_clients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environments.configure("far", "https://one.example", "ctx_own")
    monkeypatch.delenv("CORTEX_TOKEN", raising=False)

    def made() -> set[tuple[str, str, str | None]]:
        asynchronous = cortex.AsyncClient.of_environment("far")
        with cortex.client("far") as client:
            return {
                (c.name, c.operator_endpoint, c._endpoint.token) for c in (client, asynchronous)
            }

    assert made() == {("far", "https://one.example", "ctx_own")}
    monkeypatch.setenv("CORTEX_TOKEN", "ctx_first")
    assert made() == {("far", "https://one.example", "ctx_first")}
    assert "ctx_first" not in repr(cortex.AsyncClient.of_environment())


def test_a_token_is_stored_for_one_endpoint_and_readable_by_its_owner_alone(folder: Path) -> None:
    environments.configure("far", "https://one.example", "ctx_secret")
    file = environments.path()
    assert file.stat().st_mode & 0o077 == 0
    file.chmod(0o644)  # as an earlier version may have left it
    assert environments.configure("far", "https://one.example").token == "ctx_secret"
    assert file.stat().st_mode & 0o077 == 0
    assert environments.load().named("far").token == "ctx_secret"
    assert "ctx_secret" not in repr(environments.load())
    assert "ctx_secret" not in json.dumps(environments.load().as_json())
    # Sent to another host, the token would be revealed.
    assert environments.configure("far", "https://two.example").token is None


@pytest.mark.parametrize("token", ["", "two words", "new\nline", "é", "x" * 513])
def test_an_invalid_token_is_refused(folder: Path, token: str) -> None:
    with pytest.raises(InvalidRequest, match="token is invalid") as raised:
        environments.configure("far", "https://one.example", token)
    assert not token or token not in raised.value.message


def test_the_operator_of_the_variable_is_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CORTEX_CLI_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("CORTEX_TOKEN", raising=False)
    environments.configure("prod", "http://prod:1", "secret")
    environments.configure("test", "http://test:1")
    monkeypatch.setenv("CORTEX_OPERATOR_ENDPOINT", "http://jobs:8888/")
    found = environments.resolve(None)
    assert (found.operator_endpoint, environments.token_of(found)) == ("http://jobs:8888", None)
    assert environments.resolve("test").operator_endpoint == "http://test:1"
    # A URL that is configured comes with its token.
    monkeypatch.setenv("CORTEX_OPERATOR_ENDPOINT", "http://prod:1")
    assert environments.token_of(environments.resolve(None)) == "secret"
    monkeypatch.setenv("CORTEX_OPERATOR_ENDPOINT", "jobs:8888")
    with pytest.raises(InvalidRequest, match=r"\$CORTEX_OPERATOR_ENDPOINT: 'jobs:8888' is not"):
        environments.resolve(None)
    monkeypatch.setenv("CORTEX_OPERATOR_ENDPOINT", "")
    assert environments.resolve(None).name == "prod"


def test_the_file_has_the_same_path_without_platformdirs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CORTEX_CLI_CONFIG_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (None, str(tmp_path / "x")):
        if folder is not None:
            monkeypatch.setenv("XDG_CONFIG_HOME", folder)
        else:
            monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "platformdirs", None)
            missing = environments.path()
        assert missing == environments.path()
