"""The commands of Cortex, which scripts and its Python clients run, still work."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cortex import __version__
from cortex.cli.main import run
from cortex.sdk import environments
from operator_stub import (
    RUNNING,
    SUBMITTED,
    SUCCEEDED,
    VIEW,
    OperatorStub,
    answer,
    events,
    job_view,
)

JOB = str(SUBMITTED["job_id"])
LOG = b'event: log\nid: 2\ndata: "x\\n"\n\nevent: end\ndata: {}\n\n'
YAML = "- {name: iris, kind: TaskAPI, definition: {path: task.py}}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CORTEX_CLI_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("CORTEX_CLI_INVOKER", "python")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "task.py").write_text("def task(config): ...\n")
    (tmp_path / "p" / ".cortex-0a1b.yaml").write_text(YAML)
    return tmp_path


@pytest.fixture
def stub() -> Iterator[OperatorStub]:
    with OperatorStub(
        {
            "GET /-/apis": answer([VIEW]),
            "POST /-/apis": answer([{"api": VIEW, "message": "created iris", "error": ""}]),
            "GET /-/apis/iris": answer([VIEW]),
            "DELETE /-/apis/iris": answer({"message": "deleted iris"}),
            "GET /-/apis/iris/jobs?limit=1": answer(
                {"job_statuses": [RUNNING], "next_cursor": None}
            ),
            f"GET /-/apis/iris/jobs/{JOB}": answer(job_view(SUCCEEDED)),
            f"GET /-/apis/iris/jobs/{JOB}/logs": events(LOG),
            f"DELETE /-/apis/iris/jobs/{JOB}": answer({"message": f"stopped job {JOB}"}),
            "GET /-/info": answer({"version": "9.9"}),
        }
    ) as started:
        environments.configure("prod", started.url)
        yield started


def output_of(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """Run a command as Cortex's Python clients do, which parse the whole output as JSON."""
    assert run([*words]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out.strip()) if printed.out else None


def test_the_commands_of_the_python_clients_work(
    stub: OperatorStub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env = ["--env", "prod", "-o", "json"]
    file = str(folder / "p" / ".cortex-0a1b.yaml")
    (result,) = output_of(capsys, "deploy", file, *env, "-y", "--force")
    assert (result["api"]["spec"]["name"], result["api"]["spec"]["kind"]) == ("iris", "TaskAPI")
    assert output_of(capsys, "get", "iris", *env)[0] == VIEW
    assert output_of(capsys, "get", "-o", "json", "--env", "prod") == [VIEW]
    assert output_of(capsys, "get", "iris", JOB, *env) == job_view(SUCCEEDED)
    assert "nothing to restart" in output_of(capsys, "refresh", "iris", *env, "--force")["message"]
    assert output_of(capsys, "patch", file, *env, "--force")[0]["message"] == "created iris"
    assert output_of(capsys, "delete", "iris", JOB, *env) == {"message": f"stopped job {JOB}"}
    assert output_of(capsys, "delete", "iris", *env[:2], "--force", *env[2:], "--keep-cache") == {
        "message": "deleted iris"
    }
    assert output_of(capsys, "delete", "-c", "iris", "-f", "-o", "json") == {
        "message": "deleted iris"
    }
    listed = output_of(capsys, "env", "list", "--output", "json")
    assert listed["default_environment"] == "prod"
    assert [each["name"] for each in listed["environments"]] == ["prod"]


@pytest.mark.parametrize("flags", [["-y"], ["--yes"], ["--random-pod"], ["-y", "--random-pod"]])
def test_logs_are_streamed_without_a_question(
    flags: list[str], stub: OperatorStub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["logs", "iris", JOB, "--env", "prod", *flags]) == 0
    assert capsys.readouterr() == ("x\n", "")
    assert run(["logs", "iris", "--env", "prod", *flags]) == 0
    assert capsys.readouterr() == ("x\n", f"the log of job {JOB}\n")
    stub.answers["GET /-/apis/iris/jobs?limit=1"] = answer(
        {"job_statuses": [], "next_cursor": None}
    )
    assert run(["logs", "iris", *flags]) == 1
    assert "iris has no jobs yet; `cortex submit iris`" in capsys.readouterr().err


def test_mixed_output_has_the_markers_of_the_former_clients(
    stub: OperatorStub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(folder / "p" / ".cortex-0a1b.yaml")
    assert run(["deploy", file, "--env", "prod", "-o", "mixed", "-y"]) == 0
    before, encoded, after = capsys.readouterr().out.split("~~cortex~~")
    (result,) = json.loads(base64.b64decode(encoded))
    assert (before, result["message"], after) == ("", "created iris", "\n")


@pytest.mark.parametrize("command", ["get -v", "get iris --verbose", "describe iris"])
def test_the_former_commands_for_people_show_an_api(
    command: str, stub: OperatorStub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command.split()) == 0
    assert "http://127.0.0.1:8888/iris" in capsys.readouterr().out


def test_an_environment_is_configured_and_renamed(
    stub: OperatorStub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["env", "configure", "-o", "http://a:1", "a"]) == 0
    assert capsys.readouterr().out == "configured a: http://a:1\n"
    assert run(["env", "rename", "prod", "live"]) == 0
    assert run(["get"]) == 0
    capsys.readouterr()
    listed = output_of(capsys, "env", "list", "-o", "json")
    assert listed["default_environment"] == "live"
    assert [each["name"] for each in listed["environments"]] == ["live", "a"]
    assert run(["env", "rename", "live", "a"]) == 2
    assert "an environment 'a' already exists" in capsys.readouterr().err
    assert run(["env", "rename", "live", "a b"]) == 2
    assert run(["env", "rename", "nope", "b"]) == 1
    assert "no environment 'nope'" in capsys.readouterr().err


def test_version_prints_the_versions_of_the_command_and_of_the_operator(
    stub: OperatorStub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["version", "-e", "prod"]) == 0
    assert capsys.readouterr().out == f"cli version: {__version__}\noperator version: 9.9\n"


def test_a_patch_needs_a_deployed_api_and_its_project(
    stub: OperatorStub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = folder / "cortex-1.yaml"
    alone.write_text(YAML)
    assert run(["patch", str(alone)]) == 1
    assert "task.py, which iris runs, is not in the folder of cortex-1.yaml" in (
        capsys.readouterr().err
    )
    other = folder / "p" / "cortex.yaml"
    other.write_text(YAML.replace("iris", "other"))
    assert run(["patch", str(other)]) == 1
    assert run(["patch", str(folder / "none.yaml")]) == 1
    assert "cannot be read" in capsys.readouterr().err
    assert [r.method for r in stub.requests] == ["GET", "GET"]


def test_refreshing_a_missing_api_is_an_error(
    stub: OperatorStub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["refresh", "nope"]) == 1
    assert run(["refresh", "iris"]) == 0
    assert "iris has nothing to restart" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("cluster up cluster.yaml -y --configure-env x", "`cortex serve`"),
        ("cluster down -n name -r us-east-1 --keep-aws-resources", "Stop the operator"),
        ("cluster configure cluster.yaml", "docs/configuration.md"),
        ("cluster scale --node-group a --min-instances 1", "docs/ray.md"),
        ("cluster export -n x", "keep cortex.yaml"),
        ("cluster health -o json", "/readyz"),
        ("cluster-gcp up -c cluster.yaml", "`cortex serve`"),
        ("prepare-debug cortex.yaml iris", "A task is plain Python"),
    ],
)
def test_a_command_without_a_meaning_here_says_what_to_do_instead(
    command: str, words: str, stub: OperatorStub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command.split()) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: cortex ")
    assert words in printed.err
    assert stub.requests == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_the_shell(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "cortex" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert run(["completion", "csh"]) == 2


def test_the_operators_hints_are_shown_to_people(
    stub: OperatorStub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    view = {
        **VIEW,
        "hints": ["each job spends 1.4 s importing sklearn:\n`preload: [sklearn]`", "b"],
    }
    stub.answers["GET /-/apis/iris"] = answer([view])
    stub.answers["POST /-/apis"] = answer([{"api": view, "message": "created iris", "error": ""}])
    hint = "each job spends 1.4 s importing sklearn: `preload: [sklearn]`"
    assert run(["get", "iris"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index(hint) + 1] == "b"
    assert run(["deploy", str(folder / "p" / ".cortex-0a1b.yaml")]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [f"  {hint}", "  b"]
    assert output_of(capsys, "get", "iris", "-o", "json") == [view]
