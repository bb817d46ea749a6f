"""The `cortex` command against a real operator, as users and scripts run it."""

from __future__ import annotations

import json
import os
import pty
import selectors
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import preloaded_cli
from operator_harness import PROBE, WAIT_TIMEOUT_S, Operator, probe_yaml, until
from operator_proxy import OperatorProxy

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cortex(shared_operator: Operator, tmp_path: Path) -> Run:
    """Runs the command in the test's folder, with an environment for the shared operator."""

    def run(*arguments: str, code: int = 0, answer: str = "") -> subprocess.CompletedProcess[str]:
        config = {"CORTEX_CLI_CONFIG_DIR": str(tmp_path / "config")}
        environment = {**os.environ, **config}
        done = preloaded_cli.run(*arguments, cwd=tmp_path, env=environment, answer=answer)
        assert done.returncode == code, (arguments, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert "\x1b[" not in done.stdout + done.stderr, "no colours when not on a terminal"
        return done

    run("env", "configure", "test", "--operator-endpoint", shared_operator.url)
    return run


def project(folder: Path, name: str, file: str = "cortex.yaml") -> Path:
    (folder / "probe.py").write_text(PROBE)
    (folder / file).write_text(probe_yaml(name))
    return folder / file


def test_the_cluster_of_a_local_operator_is_its_machine(
    cortex: Run, shared_operator: Operator
) -> None:
    cluster = json.loads(cortex("cluster", "info", "-o", "json").stdout)
    capacity = shared_operator.http.get(f"{shared_operator.url}/-/info").json()["capacity"]
    assert (cluster["engine"], len(cluster["nodes"])) == ("local", 1)
    node = cluster["nodes"][0]
    assert (node["total"], node["is_ready"], node["problem"]) == (capacity, True, None)
    heading, line = cortex("cluster", "info").stdout.splitlines()
    assert heading.split()[:2] == ["node", "state"]
    assert line.split()[:2] == [node["name"], "ready"]
    assert f"of {capacity['cpu']:g}" in line


def test_an_api_is_deployed_shown_and_deleted(
    cortex: Run, shared_operator: Operator, tmp_path: Path
) -> None:
    project(tmp_path, "cli-life")
    (done,) = json.loads(cortex("deploy", "-o", "json").stdout)
    assert (done["message"], done["error"]) == ("created cli-life", "")
    endpoint = done["api"]["endpoint"]
    job = shared_operator.submit(endpoint, config={"do": "say", "lines": 3})
    assert cortex("logs", "cli-life", job["job_id"]).stdout == "line 0\nline 1\nline 2\n"
    shared_operator.finished(endpoint, job)

    read_terminal = json.loads(cortex("get", "cli-life", job["job_id"], "-o", "json").stdout)
    assert read_terminal == shared_operator.http.get(f"{endpoint}/{job['job_id']}").json()
    listed = json.loads(cortex("get", "--output", "json", "cli-life").stdout)
    assert listed == shared_operator.http.get(f"{shared_operator.url}/-/apis/cli-life").json()
    assert "cli-life" in {
        api["spec"]["name"] for api in json.loads(cortex("get", "-o", "json").stdout)
    }

    table = cortex("get", "cli-life").stdout
    assert job["job_id"] in table
    assert endpoint in table
    assert "succeeded" in cortex("get", "cli-life", job["job_id"]).stdout
    assert "cli-life" in cortex("get").stdout

    running = shared_operator.submit(endpoint, config={"do": "sleep", "s": 300})
    stopped = json.loads(cortex("delete", "cli-life", running["job_id"], "-o", "json").stdout)
    assert stopped == {"message": f"stopped job {running['job_id']}"}
    refused = cortex("delete", "cli-life", code=2)
    assert "--force" in refused.stderr
    deleted = json.loads(cortex("delete", "cli-life", "--force", "-o", "json").stdout)
    assert deleted == {"message": "deleted API cli-life"}
    missing = cortex("get", "cli-life", "-o", "json", code=1)
    assert missing.stdout == ""
    assert "cli-life" in missing.stderr


@pytest.fixture
def proxy_environment(operator_proxy: OperatorProxy, tmp_path: Path) -> dict[str, str]:
    """The environment variables of a command that uses an operator through a proxy."""
    variables = {**os.environ, "CORTEX_CLI_CONFIG_DIR": str(tmp_path / "cli")}
    done = preloaded_cli.run(
        "env", "configure", "w", "--operator-endpoint", operator_proxy.url, env=variables
    )
    assert done.returncode == 0, done.stderr
    return variables


def test_a_wait_continues_after_the_operator_was_killed(
    own_operator: Operator,
    operator_proxy: OperatorProxy,
    proxy_environment: dict[str, str],
    tmp_path: Path,
) -> None:
    out, err = (tmp_path / "out").open("w+"), (tmp_path / "err").open("w+")
    config = json.dumps({"do": "sleep", "s": 300})
    with out, err:
        waiting_command = preloaded_cli.start(
            "submit", "probe", "--wait", "--config", config, "-o", "json",
            stdin=0, stdout=out.fileno(), stderr=err.fileno(), env=proxy_environment,
        )  # fmt: skip
        try:
            assert operator_proxy.long_poll_arrived.wait(WAIT_TIMEOUT_S)
            own_operator.kill()
            until(
                lambda: operator_proxy.refused_connections,
                "the command retried while no operator ran",
            )
            own_operator.start()
            (job,) = own_operator.http.get(f"{own_operator.url}/probe").json()["job_statuses"]
            own_operator.delete(f"{own_operator.url}/probe", job)
            assert waiting_command.wait(WAIT_TIMEOUT_S) == 3
        finally:
            waiting_command.kill()
        out.seek(0)
        read_terminal = json.load(out)["job_status"]
        assert (read_terminal["job_id"], read_terminal["status"]) == (
            job["job_id"],
            "status_stopped",
        )


def test_watch_on_a_terminal_reports_a_killed_operator_once_and_continues(
    own_operator: Operator, operator_proxy: OperatorProxy, proxy_environment: dict[str, str]
) -> None:
    job = own_operator.submit(f"{own_operator.url}/probe", config={"do": "sleep", "s": 300})
    own_operator.await_log(f"{own_operator.url}/probe", job, "asleep")
    mine, terminal = pty.openpty()
    watching = preloaded_cli.start(
        "get", "probe", job["job_id"], "--watch",
        stdin=terminal, stdout=terminal, stderr=terminal, env=proxy_environment,
    )  # fmt: skip
    os.close(terminal)
    try:
        output = read_terminal(mine, "running")
        own_operator.kill()
        output += read_terminal(mine, "until the operator answers")
        refused_before = operator_proxy.refused_connections
        until(
            lambda: operator_proxy.refused_connections > refused_before,
            "the command retried while no operator ran",
        )
        own_operator.start()
        output += read_terminal(mine, "The operator answers again")
        own_operator.delete(f"{own_operator.url}/probe", job)
        output += read_terminal(mine, "stopped")
        assert watching.wait(WAIT_TIMEOUT_S) == 0
    finally:
        watching.kill()
        os.close(mine)
    assert output.count("until the operator answers") == 1


def read_terminal(terminal: int, words: str) -> str:
    """The output on a terminal until these words appear."""
    output = b""
    with selectors.DefaultSelector() as selector:
        selector.register(terminal, selectors.EVENT_READ)
        while words.encode() not in output:
            assert selector.select(WAIT_TIMEOUT_S), f"never: {words!r} after {output!r}"
            output += os.read(terminal, 4096)
    return output.decode(errors="replace")


def test_no_follow_prints_the_log_written_until_now(
    cortex: Run, shared_operator: Operator, probe: str
) -> None:
    job = shared_operator.submit(probe, config={"do": "sleep", "s": 300})
    shared_operator.await_log(probe, job, "asleep")
    assert cortex("logs", "--no-follow", "probe", job["job_id"]).stdout == "asleep\n"
    assert shared_operator.status(probe, job)["status"] == "status_running"
    shared_operator.delete(probe, job)


def test_submit_prints_what_the_operator_answers(
    cortex: Run, shared_operator: Operator, tmp_path: Path
) -> None:
    project(tmp_path, "cli-submit")
    cortex("deploy")
    out = cortex("submit", "cli-submit", "--config", '{"a": 1}', "--timeout", "60", "-o", "json")
    job = json.loads(out.stdout)
    assert (job["config"], job["timeout"]) == ({"a": 1}, 60)


def test_a_repeated_submit_with_its_key_waits_for_the_same_job(
    cortex: Run, shared_operator: Operator, probe: str
) -> None:
    step = ("submit", "probe", "--wait", "--idempotency-key", "step 1", "-o", "json")
    read_terminal = json.loads(cortex(*step).stdout)
    assert read_terminal["job_status"]["status"] == "status_succeeded"
    assert json.loads(cortex(*step).stdout) == read_terminal
    failed = cortex("submit", "probe", "--wait", "--config", '{"do": "leave", "code": 7}', code=3)
    assert "exit code  7" in failed.stdout


def test_a_file_of_any_name_is_deployed(cortex: Run, tmp_path: Path) -> None:
    file = project(tmp_path, "cli-dot", ".cortex-generated.yaml")
    (done,) = json.loads(cortex("deploy", str(file), "-e", "test", "-o", "json", "-y").stdout)
    assert done["message"] == "created cli-dot"


def test_mistakes_in_cortex_yaml_are_printed_with_their_lines(cortex: Run, tmp_path: Path) -> None:
    project(tmp_path, "Cli_Bad")
    failed = cortex("deploy", code=1)
    assert "cortex.yaml:1" in failed.stderr
    assert "Cli_Bad" in failed.stderr


def test_an_unreachable_operator_is_an_error_with_its_address(cortex: Run) -> None:
    cortex("env", "configure", "gone", "--operator-endpoint", "http://127.0.0.1:1")
    failed = cortex("get", "-e", "gone", "-o", "json", code=1)
    assert "127.0.0.1:1" in failed.stderr
    assert failed.stdout == ""


def test_environments_are_configured_listed_and_deleted(
    cortex: Run, shared_operator: Operator
) -> None:
    cortex("env", "configure", "other", "--operator-endpoint", "http://127.0.0.1:1")
    cortex("env", "default", "other")
    listed = json.loads(cortex("env", "list", "-o", "json").stdout)
    assert listed["default_environment"] == "other"
    assert {"name": "test", "operator_endpoint": shared_operator.url} in listed["environments"]
    cortex("env", "delete", "other")
    assert "other" not in cortex("env", "list").stdout


def test_usage_errors_exit_with_2(cortex: Run) -> None:
    cortex("no-such-command", code=2)
    cortex("get", "-o", "xml", code=2)


def test_version_prints_the_version(cortex: Run) -> None:
    import cortex as package

    assert package.__version__ in cortex("version").stdout
