"""No answer, line of the operator's log, metric or output of the command shows a secret.

Secrets are the values of `definition.env` and `.env`, tokens, the password of the store, and the
keys of the object store.
"""

from __future__ import annotations

import json
import os
import pty
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

import preloaded_cli
from operator_harness import PROBE, Operator, operator, probe_yaml
from postgresql_server import PASSWORD, PostgreSQLServer
from s3_server import S3Server

pytestmark = pytest.mark.xdist_group("s3")  # the S3 server starts slowly

MASK = "********"
OF_ENV, OF_FILE, OF_OLD = "marked-of-env-4f1c", "marked-of-dotenv-77ab", "marked-of-old-90de"
KEYS = {"AWS_ACCESS_KEY_ID": "AKIAMARKED0", "AWS_SECRET_ACCESS_KEY": "marked/of+s3/31bd"}
SCOPES = ("read", "submit", "deploy")
FILES = {"probe.py": PROBE, ".env": f"IN_FILE={OF_FILE}\n"}


def yaml(value: str) -> str:
    entry = probe_yaml()
    line = "    path: probe.py\n"
    return entry.replace(line, f"{line}    env: {{SECRET: {value}, TWICE: {value}}}\n")


@dataclass
class SecretsOperator:
    """An operator that knows many secrets, and a search for them in texts."""

    running: Operator
    tokens: dict[str, str]
    options: list[str]
    configured: dict[str, str]
    endpoint: str
    job_id: str
    answers: list[httpx.Response]

    def send(self, method: str, path: str, scope: str, **more: object) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.tokens[scope]}"}
        answer = httpx.request(method, self.running.url + path, headers=headers, timeout=60, **more)  # type: ignore[arg-type]
        self.answers.append(answer)
        return answer

    def check(self, text: str, where: str) -> None:
        secrets = [OF_ENV, OF_FILE, OF_OLD, *KEYS.values(), PASSWORD, quote(PASSWORD, safe="")]
        for secret in [*secrets, *self.tokens.values()]:
            assert secret not in text, where
            assert json.dumps(secret)[1:-1] not in text, where


def cortex(*arguments: str, code: int = 0, **variables: str) -> str:
    done = preloaded_cli.run(*arguments, env={**os.environ, **variables})
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def secret_operator(
    s3: S3Server,
    postgresql: PostgreSQLServer,
    migrated_database: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[SecretsOperator]:
    folder = tmp_path_factory.mktemp("kept")
    database, bucket = postgresql.create(template=migrated_database), s3.bucket()
    store = ["--store", postgresql.url(database)]
    options = [*store, "--files", f"s3://{bucket}/some", "--require-token"]
    config = {"CORTEX_CLI_CONFIG_DIR": str(folder / "cli")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**s3.environment, **KEYS, **config}.items():
            patch.setenv(name, value)
        tokens = {
            scope: cortex("token", "create", scope, "--scope", scope, *store).split()[0]
            for scope in SCOPES
        }
        with operator(folder, *options, token=tokens["deploy"]) as running:
            answers = [running.deploy(yaml(OF_OLD), FILES), running.deploy(yaml(OF_ENV), FILES)]
            endpoint = answers[1].json()[0]["api"]["endpoint"]
            job = running.submit(endpoint, config={"do": "say", "lines": 2})
            running.finished(endpoint, job)
            configure = ("env", "configure", "far", "--operator-endpoint", running.url)
            cortex(*configure, "--token", tokens["deploy"])
            made = SecretsOperator(
                running, tokens, options, config, endpoint, job["job_id"], answers
            )
            yield made
    postgresql.drop(database)


def test_jobs_get_the_secret_values(secret_operator: SecretsOperator) -> None:
    """The other tests can only find secrets that the operator really has."""
    endpoint = secret_operator.running.deployed(
        yaml(OF_ENV).replace("name: probe", "name: other"), FILES
    )
    env = secret_operator.running.run(endpoint, config={"do": "surroundings"})["result"]["env"]
    assert (env["SECRET"], env["TWICE"], env["IN_FILE"]) == (OF_ENV, OF_ENV, OF_FILE)
    secret_operator.running.http.delete(f"{secret_operator.running.url}/-/apis/other")


def test_specs_show_names_and_masks(secret_operator: SecretsOperator) -> None:
    for scope in SCOPES:
        answer = secret_operator.send("GET", f"/probe/{secret_operator.job_id}", scope).json()
        (api,) = secret_operator.send("GET", "/-/apis/probe", scope).json()
        for spec in (answer["api_spec"], api["spec"]):
            assert spec["definition"]["env"] == {"SECRET": MASK, "TWICE": MASK}
            assert spec["submitted_api_spec"]["definition"]["env"] == {
                "SECRET": MASK,
                "TWICE": MASK,
            }


def test_no_route_shows_a_secret_to_any_scope(secret_operator: SecretsOperator) -> None:
    described = secret_operator.running.http.get(
        f"{secret_operator.running.url}/-/openapi.json"
    ).json()
    parts = {"name": "probe", "endpoint": "probe", "job_id": secret_operator.job_id}
    paths = [*described["paths"], "/-/openapi.json", "/nothing", "/probe?jobID={job_id}"]
    streamed = {"Accept": "text/event-stream"}
    answered = set()
    for path in paths:
        for method in ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"):
            if (path, method) == ("/-/apis/{name}", "DELETE"):
                continue
            for scope in SCOPES:
                at = re.sub(r"\{(\w+)\}", lambda found: parts[found[1]], path)
                answer = secret_operator.send(
                    method, at, scope, json={} if method == "POST" else None
                )
                answered.add((path, method, answer.status_code))
    secret_operator.send("DELETE", "/probe/nothing", "deploy")
    for files in (FILES, {**FILES, ".env": f"1WRONG={OF_FILE}\n= {OF_FILE}\n"}, {}):
        secret_operator.answers.append(secret_operator.running.deploy(yaml(OF_ENV), files))
    assert {answer.status_code for answer in secret_operator.answers} >= {
        200,
        204,
        400,
        403,
        404,
        405,
        409,
    }
    with httpx.Client(
        headers={"Authorization": f"Bearer {secret_operator.tokens['read']}"}
    ) as client:
        secret_operator.answers.append(
            client.get(
                f"{secret_operator.endpoint}/{secret_operator.job_id}/logs",
                headers=streamed,
                timeout=60,
            )
        )
    assert secret_operator.answers[-1].headers["content-type"].startswith("text/event-stream")
    for answer in secret_operator.answers:
        secret_operator.check(f"{answer.headers}{answer.text}", str(answer.url))
    for path in ("/-/apis", "/-/apis/{name}", "/{endpoint}", "/{endpoint}/{job_id}", "/metrics"):
        assert (path, "GET", 200) in answered


def test_only_a_changed_secret_makes_a_new_version(secret_operator: SecretsOperator) -> None:
    (same,) = secret_operator.running.deploy(yaml(OF_ENV), FILES).json()
    assert same["message"] == "probe is unchanged"
    (changed,) = secret_operator.running.deploy(yaml(OF_OLD), FILES).json()
    assert changed["message"] == "updated probe"
    secret_operator.check(json.dumps(changed), "deploy")
    (back,) = secret_operator.running.deploy(yaml(OF_ENV), FILES).json()
    assert back["message"] == "updated probe"


def test_a_mask_is_refused_as_a_value(secret_operator: SecretsOperator) -> None:
    before = secret_operator.running.http.get(f"{secret_operator.running.url}/-/apis/probe").json()[
        0
    ]["spec"]
    text = yaml(OF_ENV).replace(f"TWICE: {OF_ENV}", f'TWICE: "{MASK}"')
    answer = secret_operator.running.deploy(text, FILES)
    assert (answer.status_code, answer.json()["kind"]) == (400, "spec.invalid")
    output = answer.json()["message"]
    assert output.startswith(f'cortex.yaml:5: definition.env.TWICE: found "{MASK}"')
    secret_operator.check(output, "refused")
    # Clients of Cortex deploy a spec that they have read from the operator.
    answer = secret_operator.running.deploy(json.dumps([before["submitted_api_spec"]]), FILES)
    assert "definition.env.SECRET" in answer.json()["message"]
    after = secret_operator.running.http.get(f"{secret_operator.running.url}/-/apis/probe").json()[
        0
    ]["spec"]
    assert after["api_id"] == before["api_id"]


def test_the_command_shows_no_secret(secret_operator: SecretsOperator, tmp_path: Path) -> None:
    for name, content in {"cortex.yaml": yaml(OF_ENV), **FILES}.items():
        (tmp_path / name).write_text(content)
    store = secret_operator.options[:2]
    for words in (
        ("get", "-o", "json"),
        ("get", "probe", "-o", "json"),
        ("get", "probe"),
        ("get", "probe", secret_operator.job_id, "-o", "json"),
        ("get", "probe", secret_operator.job_id),
        ("deploy", str(tmp_path / "cortex.yaml"), "-o", "json"),
        ("deploy", str(tmp_path / "cortex.yaml")),
        ("env", "list", "-o", "json"),
        ("cluster", "info", "-o", "json"),
        ("token", "list", *store, "-o", "json"),
        ("serve", *secret_operator.options, "--show-config"),
    ):
        secret_operator.check(cortex(*words), " ".join(words))
    output = cortex("serve", "--show-config", CORTEX_SERVE_STORE=store[1])
    assert "postgresql://cortex:***@" in output
    secret_operator.check(output, "variable")
    wrong = store[1].replace("@/", "@nowhere.invalid/").partition("?")[0]
    for url in (wrong, wrong.replace("postgresql", "mysql"), f"{wrong}:x", store[1] + "&nothing=1"):
        output = cortex("serve", "--data-dir", str(tmp_path / "data"), "--store", url, code=1)
        secret_operator.check(output, url)


def test_the_log_of_the_operator_shows_no_secret(secret_operator: SecretsOperator) -> None:
    secret_operator.send("GET", "/-/apis", "read")
    wrong = {"Authorization": f"Bearer x{OF_ENV}"}
    httpx.get(f"{secret_operator.running.url}/-/apis", headers=wrong, timeout=60)
    secret_operator.running.stop()
    secret_operator.running.start()
    output = secret_operator.running.log.read_text()
    assert "deployed" in output
    secret_operator.check(output, "log")
    files = [p for p in secret_operator.running.data_dir.rglob("*.log") if "jobs" not in p.parts]
    for file in files:
        secret_operator.check(file.read_text(), str(file))


def test_a_crash_shows_no_secret(tmp_path: Path) -> None:
    """An error of the database may repeat the values of its statement."""
    with operator(tmp_path) as running:
        with closing(sqlite3.connect(running.data_dir / "operator.db")) as database:
            database.execute(
                "CREATE TRIGGER refuse BEFORE INSERT ON versions "
                "BEGIN SELECT RAISE(ABORT, 'refused by the test'); END"
            )
        short = (
            f"- {{name: a, kind: TaskAPI, definition: {{path: probe.py, env: {{S: {OF_ENV}}}}}}}"
        )
        answer = running.deploy(short, FILES)  # the error shortens longer values
        assert (answer.status_code, answer.json()["kind"]) == (500, "internal")
        running.stop()
        output = running.log.read_text()
        assert "refused by the test" in output
        for secret in (OF_ENV, OF_FILE):
            assert secret not in output + answer.text
        running.log.write_text("")  # `operator` would report the expected traceback


CRASHING = """
import structlog
from cortex.operator.app import configure_logging
from cortex.spec.api import ApiSpec

def crash(secret):
    ApiSpec.model_validate({"definition": {"env": {"SECRET": secret}}})

configure_logging()
try:
    crash("marked-" + "of-locals")
except ValueError as error:
    structlog.get_logger().error("crashed", exc_info=error)
"""


def test_a_crash_on_a_terminal_shows_no_secret() -> None:
    main, terminal = pty.openpty()
    with os.fdopen(main, "rb") as shown:
        subprocess.run([sys.executable, "-c", CRASHING], stderr=terminal, check=True)
        os.close(terminal)
        output = b""
        with suppress(OSError):  # the other end of the terminal is closed
            while piece := os.read(shown.fileno(), 65536):
                output += piece
    assert b"crashed" in output
    assert b"Traceback" in output
    assert b"marked-of-locals" not in output
