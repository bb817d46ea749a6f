"""No answer, no line of the operator's log, no metric and no output of the command shows a secret: the values
of `definition.env` and `.env`, tokens, the password of the store, the keys of the store of files."""

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

pytestmark = pytest.mark.xdist_group("s3")  # whose server is slow to start

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
class Kept:
    """An operator that knows many secrets, and a way to look for them."""

    running: Operator
    tokens: dict[str, str]
    options: list[str]
    configured: dict[str, str]
    endpoint: str
    job_id: str
    answers: list[httpx.Response]

    def ask(self, method: str, path: str, scope: str, **more: object) -> httpx.Response:
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
def kept(
    s3: S3Server,
    postgresql: PostgreSQLServer,
    migrated_database: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Kept]:
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
            made = Kept(running, tokens, options, config, endpoint, job["job_id"], answers)
            yield made
    postgresql.drop(database)


def test_jobs_get_the_values(kept: Kept) -> None:
    """Else nothing that follows would say anything: they are there to be found."""
    endpoint = kept.running.deployed(yaml(OF_ENV).replace("name: probe", "name: other"), FILES)
    env = kept.running.run(endpoint, config={"do": "surroundings"})["result"]["env"]
    assert (env["SECRET"], env["TWICE"], env["IN_FILE"]) == (OF_ENV, OF_ENV, OF_FILE)
    kept.running.http.delete(f"{kept.running.url}/-/apis/other")


def test_the_names_are_shown_and_a_mask(kept: Kept) -> None:
    for scope in SCOPES:
        answer = kept.ask("GET", f"/probe/{kept.job_id}", scope).json()
        (api,) = kept.ask("GET", "/-/apis/probe", scope).json()
        for spec in (answer["api_spec"], api["spec"]):
            assert spec["definition"]["env"] == {"SECRET": MASK, "TWICE": MASK}
            assert spec["submitted_api_spec"]["definition"]["env"] == {
                "SECRET": MASK,
                "TWICE": MASK,
            }


def test_no_route_shows_a_secret_to_any_scope(kept: Kept) -> None:
    described = kept.running.http.get(f"{kept.running.url}/-/openapi.json").json()
    parts = {"name": "probe", "endpoint": "probe", "job_id": kept.job_id}
    paths = [*described["paths"], "/-/openapi.json", "/nothing", "/probe?jobID={job_id}"]
    streamed = {"Accept": "text/event-stream"}
    seen = set()
    for path in paths:
        for method in ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"):
            if (path, method) == ("/-/apis/{name}", "DELETE"):
                continue
            for scope in SCOPES:
                at = re.sub(r"\{(\w+)\}", lambda found: parts[found[1]], path)
                answer = kept.ask(method, at, scope, json={} if method == "POST" else None)
                seen.add((path, method, answer.status_code))
    kept.ask("DELETE", "/probe/nothing", "deploy")
    for given in (FILES, {**FILES, ".env": f"1WRONG={OF_FILE}\n= {OF_FILE}\n"}, {}):
        kept.answers.append(kept.running.deploy(yaml(OF_ENV), given))
    assert {answer.status_code for answer in kept.answers} >= {200, 204, 400, 403, 404, 405, 409}
    with httpx.Client(headers={"Authorization": f"Bearer {kept.tokens['read']}"}) as client:
        kept.answers.append(
            client.get(f"{kept.endpoint}/{kept.job_id}/logs", headers=streamed, timeout=60)
        )
    assert kept.answers[-1].headers["content-type"].startswith("text/event-stream")
    for answer in kept.answers:
        kept.check(f"{answer.headers}{answer.text}", str(answer.url))
    for path in ("/-/apis", "/-/apis/{name}", "/{endpoint}", "/{endpoint}/{job_id}", "/metrics"):
        assert (path, "GET", 200) in seen


def test_the_same_file_makes_no_version_and_another_value_does(kept: Kept) -> None:
    (same,) = kept.running.deploy(yaml(OF_ENV), FILES).json()
    assert same["message"] == "probe is unchanged"
    (changed,) = kept.running.deploy(yaml(OF_OLD), FILES).json()
    assert changed["message"] == "updated probe"
    kept.check(json.dumps(changed), "deploy")
    (back,) = kept.running.deploy(yaml(OF_ENV), FILES).json()
    assert back["message"] == "updated probe"


def test_a_mask_is_no_value(kept: Kept) -> None:
    before = kept.running.http.get(f"{kept.running.url}/-/apis/probe").json()[0]["spec"]
    text = yaml(OF_ENV).replace(f"TWICE: {OF_ENV}", f'TWICE: "{MASK}"')
    answer = kept.running.deploy(text, FILES)
    assert (answer.status_code, answer.json()["kind"]) == (400, "spec.invalid")
    told = answer.json()["message"]
    assert told.startswith(f'cortex.yaml:5: definition.env.TWICE: found "{MASK}"')
    kept.check(told, "refused")
    # As it was read back, which clients of Cortex do.
    answer = kept.running.deploy(json.dumps([before["submitted_api_spec"]]), FILES)
    assert "definition.env.SECRET" in answer.json()["message"]
    after = kept.running.http.get(f"{kept.running.url}/-/apis/probe").json()[0]["spec"]
    assert after["api_id"] == before["api_id"]


def test_the_command_shows_no_secret(kept: Kept, tmp_path: Path) -> None:
    for name, content in {"cortex.yaml": yaml(OF_ENV), **FILES}.items():
        (tmp_path / name).write_text(content)
    store = kept.options[:2]
    for words in (
        ("get", "-o", "json"),
        ("get", "probe", "-o", "json"),
        ("get", "probe"),
        ("get", "probe", kept.job_id, "-o", "json"),
        ("get", "probe", kept.job_id),
        ("deploy", str(tmp_path / "cortex.yaml"), "-o", "json"),
        ("deploy", str(tmp_path / "cortex.yaml")),
        ("env", "list", "-o", "json"),
        ("cluster", "info", "-o", "json"),
        ("token", "list", *store, "-o", "json"),
        ("serve", *kept.options, "--show-config"),
    ):
        kept.check(cortex(*words), " ".join(words))
    told = cortex("serve", "--show-config", CORTEX_SERVE_STORE=store[1])
    assert "postgresql://cortex:***@" in told
    kept.check(told, "variable")
    wrong = store[1].replace("@/", "@nowhere.invalid/").partition("?")[0]
    for url in (wrong, wrong.replace("postgresql", "mysql"), f"{wrong}:x", store[1] + "&nothing=1"):
        told = cortex("serve", "--data-dir", str(tmp_path / "data"), "--store", url, code=1)
        kept.check(told, url)


def test_the_log_of_the_operator_shows_no_secret(kept: Kept) -> None:
    kept.ask("GET", "/-/apis", "read")
    wrong = {"Authorization": f"Bearer x{OF_ENV}"}
    httpx.get(f"{kept.running.url}/-/apis", headers=wrong, timeout=60)
    kept.running.stop()
    kept.running.start()
    told = kept.running.log.read_text()
    assert "deployed" in told
    kept.check(told, "log")
    files = [p for p in kept.running.data_dir.rglob("*.log") if "jobs" not in p.parts]
    for file in files:
        kept.check(file.read_text(), str(file))


def test_a_crash_shows_no_secret(tmp_path: Path) -> None:
    """As where an error of the database repeats the values that it was given."""
    with operator(tmp_path) as running:
        with closing(sqlite3.connect(running.data_dir / "operator.db")) as database:
            database.execute(
                "CREATE TRIGGER refuse BEFORE INSERT ON versions "
                "BEGIN SELECT RAISE(ABORT, 'refused by the test'); END"
            )
        short = (
            f"- {{name: a, kind: TaskAPI, definition: {{path: probe.py, env: {{S: {OF_ENV}}}}}}}"
        )
        answer = running.deploy(short, FILES)  # of a longer one the error has the ends alone
        assert (answer.status_code, answer.json()["kind"]) == (500, "internal")
        running.stop()
        told = running.log.read_text()
        assert "refused by the test" in told
        for secret in (OF_ENV, OF_FILE):
            assert secret not in told + answer.text
        running.log.write_text("")  # where a traceback would be a mistake of the test


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
        told = b""
        with suppress(OSError):  # a terminal that nobody holds any more
            while piece := os.read(shown.fileno(), 65536):
                told += piece
    assert b"crashed" in told
    assert b"Traceback" in told
    assert b"marked-of-locals" not in told
