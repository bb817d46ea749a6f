"""An operator that requires tokens, for tests of their scopes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from typer.testing import CliRunner

import preloaded_cli
from cortex.cli.main import app
from operator_harness import Operator, operator

SCOPES = ("read", "submit", "deploy")


def cortex(*arguments: str, code: int = 0, **variables: str) -> str:
    variables = {"CORTEX_CLI_CONFIG_DIR": "/nowhere", **variables}
    done = preloaded_cli.run(*arguments, env={**os.environ, **variables})
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


def token(data: Path, name: str, scope: str) -> str:
    """Create a token. The command runs in this process: starting an interpreter takes longer."""
    arguments = ["token", "create", name, "--scope", scope, "--data-dir", str(data)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


@contextmanager
def operator_with_tokens(folder: Path, *options: str) -> Iterator[tuple[Operator, dict[str, str]]]:
    """An operator that requires tokens, and one token of each scope. `Operator.http` may deploy."""
    tokens = {scope: token(folder / "data", scope, scope) for scope in SCOPES}
    with operator(folder, *options, token=tokens["deploy"]) as running:
        yield running, tokens
