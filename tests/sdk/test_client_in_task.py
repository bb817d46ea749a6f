"""The client in the process of a task: an interpreter of the user without installed packages.

On its path is a folder with links to our packages alone.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cortex
from cortex.engines.local import workspaces
from operator_stub import SUBMITTED, SUCCEEDED, VIEW, OperatorStub, answer, events, job_view

PACKAGE = Path(cortex.__file__).parent
LOG = b'event: log\nid: 2\ndata: "x\\n"\n\nevent: end\ndata: {}\n\n'


@pytest.fixture
def operator() -> Iterator[OperatorStub]:
    with OperatorStub(
        {
            "GET /-/apis": answer([VIEW]),
            "POST /-/apis": answer([{"api": VIEW, "message": "created iris", "error": ""}]),
            "DELETE /-/apis/iris": answer({"message": "deleted iris"}),
            "POST /-/apis/iris/jobs": answer(SUBMITTED),
            "GET /-/apis/iris/jobs/j1?wait=20.0": answer(job_view(SUCCEEDED)),
            "GET /-/apis/iris/jobs/j1/logs": events(LOG),
        }
    ) as stub:
        yield stub


@pytest.fixture
def import_dir(tmp_path: Path) -> Path:
    workspaces.prepare_jobs(tmp_path / "jobs", tmp_path / "jobs" / ".import", None)
    return tmp_path / "jobs" / ".import"


def in_task(code: str, import_dir: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    begin = f"import sys; sys.path.append({str(import_dir)!r})\n"
    return subprocess.run(
        [getattr(sys, "_base_executable", sys.executable), "-I", "-S", "-c", begin + code],
        env={"HOME": str(import_dir), "CORTEX_JOB_ID": "j0", **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_client_in_a_task_loads_the_standard_library_alone(
    operator: OperatorStub, import_dir: Path
) -> None:
    code = """
import json, cortex
client = cortex.client()
before = [client.list_apis(), client.submit_job("iris", {"C": 0.5}), client.delete_api("iris"),
          client.get_job("iris", "j1", wait=60), "".join(client.stream_job_logs("iris", "j1"))]
print(json.dumps([before, sorted({name.partition(".")[0] for name in sys.modules})]))
"""
    done = in_task(code, import_dir, CORTEX_OPERATOR_ENDPOINT=operator.url, CORTEX_TOKEN="secret")
    assert done.returncode == 0, done.stderr
    answers, loaded = json.loads(done.stdout)
    deleted = {"message": "deleted iris"}
    assert answers == [[VIEW], SUBMITTED, deleted, job_view(SUCCEEDED), "x\n"]
    assert set(loaded) - sys.stdlib_module_names == {"__main__", "cortex"}
    assert {r.headers["authorization"] for r in operator.requests} == {"Bearer secret"}


def test_a_task_finds_the_environments_of_its_user(
    operator: OperatorStub, import_dir: Path
) -> None:
    folder = import_dir / ".config" / "cortex"
    folder.mkdir(parents=True)
    entry = {"name": "mine", "operator_endpoint": operator.url}
    content = {"default_environment": "mine", "environments": [entry]}
    (folder / "environments.json").write_text(json.dumps(content))
    code = """
import cortex
print(cortex.client().list_apis()[0]["spec"]["name"], cortex.client("mine").name)
"""
    done = in_task(code, import_dir)
    assert (done.stdout, done.stderr) == ("iris mine\n", "")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "cortex.client().create_api({'name': 'a'}, project_dir='.')",
            "pathspec to requirements.txt",
        ),
        (
            "cortex.client().create_api({'name': 'a'}, task=print)",
            "cloudpickle to requirements.txt",
        ),
        (
            "cortex.AsyncClient('http://localhost')",
            "httpx to requirements.txt, or use cortex.client()",
        ),
    ],
)
def test_a_call_that_needs_a_package_names_it(code: str, words: str, import_dir: Path) -> None:
    done = in_task(f"import cortex; {code}", import_dir)
    assert words in done.stderr.splitlines()[-1]


def test_a_task_deploys_if_the_package_is_installed(
    operator: OperatorStub, import_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "task.py").write_text("def task(config): ...\n")
    (tmp_path / "site").mkdir()
    pathspec = __import__("pathspec")
    assert pathspec.__file__ is not None
    (tmp_path / "site" / "pathspec").symlink_to(Path(pathspec.__file__).parent)
    code = f"""
sys.path.append({str(tmp_path / "site")!r})
import cortex
spec = {{"name": "iris", "kind": "TaskAPI", "definition": {{"path": "task.py"}}}}
print(cortex.client().create_api(spec, project_dir={str(tmp_path / "p")!r})[0]["message"])
"""
    done = in_task(code, import_dir, CORTEX_OPERATOR_ENDPOINT=operator.url)
    assert (done.stdout, done.stderr) == ("created iris\n", "")


def test_the_logger_by_its_name_in_cortex_works_in_a_task(import_dir: Path) -> None:
    code = """
from cortex_internal.lib.log import logger
logger.info("here", extra={"loss": float("nan")})
"""
    done = in_task(code, import_dir)
    record = json.loads(done.stdout)
    assert (record["message"], record["loss"], record["job_id"]) == ("here", "NaN", "j0")


def test_files_that_tasks_load_run_on_the_minimum_python_of_an_environment() -> None:
    files = [PACKAGE / "__init__.py", PACKAGE / "errors.py", PACKAGE / "logger.py"]
    files += [f for f in (PACKAGE / "sdk").glob("*.py") if "transport" not in f.name]
    files += [PACKAGE / "sdk" / "transport_plain.py", PACKAGE / "projects" / "pack.py"]
    for file in files:
        tree = ast.parse(file.read_text(), str(file), feature_version=(3, 9))
        later = {"Self", "NotRequired", "StrEnum", "assert_never", "pairwise", "slots", "strict"}
        at_load = [node for node in tree.body if not _is_for_type_checkers(node)]
        for node in (below for top in at_load for below in ast.walk(top)):
            if isinstance(node, ast.ImportFrom):
                found = {alias.name for alias in node.names} & later
                assert not found, f"{file}:{node.lineno}"
            if isinstance(node, ast.Assign):
                assert not _is_union(node.value), f"{file}:{node.lineno}"


def _is_for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _is_union(node: ast.expr) -> bool:
    """Whether a type is a union with |, which Python 3.9 cannot evaluate."""
    return any(
        isinstance(each, ast.BinOp)
        and isinstance(each.op, ast.BitOr)
        and "None" in ast.unparse(each)
        for each in ast.walk(node)
    )
