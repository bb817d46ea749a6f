"""Deploying, changing and deleting APIs over HTTP. A refused deploy leaves nothing behind."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterator

import pytest

from cortex.projects.pack import pack
from operator_harness import PROBE, Operator, probe_yaml


def entry(shared_operator: Operator, name: str) -> object:
    return shared_operator.http.get(f"{shared_operator.url}/-/apis/{name}").json()[0]


def test_a_new_api_is_created(shared_operator: Operator) -> None:
    (done,) = shared_operator.deploy(probe_yaml("new"), {"probe.py": PROBE}).json()
    assert (done["message"], done["error"]) == ("created new", "")
    assert done["api"] == entry(shared_operator, "new")
    assert done["api"]["endpoint"] == f"{shared_operator.url}/new"
    assert done["api"]["task_job_statuses"] == []
    (version,) = done["api"]["api_versions"]
    assert version == {
        "api_id": done["api"]["spec"]["api_id"],
        "last_updated": done["api"]["spec"]["last_updated"],
    }


def test_an_unchanged_api_makes_no_new_version(shared_operator: Operator) -> None:
    (first,) = shared_operator.deploy(probe_yaml("same"), {"probe.py": PROBE}).json()
    commented = "# a comment is no change\n" + probe_yaml("same")
    (second,) = shared_operator.deploy(commented, {"probe.py": PROBE}).json()
    assert second["message"] == "same is unchanged"
    assert second["api"] == first["api"]


def test_a_changed_api_makes_a_version_and_running_jobs_keep_theirs(
    shared_operator: Operator,
) -> None:
    code = "import time\n\n\ndef task(config):\n    time.sleep(config['s'])\n    return {}\n"
    endpoint = shared_operator.deployed(probe_yaml("moving"), {"probe.py": code.format(1)})
    old = shared_operator.submit(endpoint, config={"s": 2})
    (done,) = shared_operator.deploy(probe_yaml("moving"), {"probe.py": code.format(2)}).json()
    assert done["message"] == "updated moving"
    new = shared_operator.submit(endpoint, config={"s": 0})
    assert old["api_id"] != new["api_id"] == done["api"]["spec"]["api_id"]
    assert shared_operator.finished(endpoint, new)["result"] == 2
    assert shared_operator.finished(endpoint, old)["result"] == 1
    assert shared_operator.get(endpoint, old)["api_spec"]["api_id"] == old["api_id"]
    versions = entry(shared_operator, "moving")["api_versions"]  # type: ignore[index]
    assert [version["api_id"] for version in versions] == [new["api_id"], old["api_id"]]


def test_without_force_a_changed_api_is_not_replaced(shared_operator: Operator) -> None:
    shared_operator.deployed(probe_yaml("kept"), {"probe.py": PROBE})
    changed = shared_operator.deploy(probe_yaml("kept"), {"probe.py": PROBE + "\n"}, force="false")
    assert changed.status_code == 409
    same = shared_operator.deploy(probe_yaml("kept"), {"probe.py": PROBE}, force="false")
    assert same.status_code == 200


def test_all_mistakes_are_reported_at_once_and_nothing_is_deployed(
    shared_operator: Operator,
) -> None:
    yaml = probe_yaml("good") + (
        "- name: Bad_Name\n  kind: RealtimeAPI\n  definiton: {path: probe.py}\n"
    )
    response = shared_operator.deploy(yaml, {"probe.py": PROBE})
    assert (response.status_code, response.json()["kind"]) == (400, "spec.invalid")
    message = response.json()["message"]
    for expected in ("Bad_Name", "RealtimeAPI", "definiton", "definition", "cortex.yaml:7"):
        assert expected in message
    assert shared_operator.http.get(f"{shared_operator.url}/-/apis/good").status_code == 404


def test_a_warning_belongs_to_the_first_api_that_it_concerns(
    shared_operator: Operator,
) -> None:
    command = "- {name: %s, kind: TaskAPI, definition: {command: [%s]}}\n"
    yaml = probe_yaml("warned") + command % ("crlf", "./run.sh") + command % ("fine", "sh, -c, ls")
    files = {"probe.py": PROBE, "Pipfile": "", "run.sh": "#!/bin/bash\r\necho hi\r\n"}
    for done in ("created", "warned is unchanged"):
        first, second, third = shared_operator.deploy(yaml, files).json()
        (about_pipfile,) = first["warnings"]
        assert about_pipfile.startswith(
            "Pipfile is not read; list the packages that jobs need in requirements"
        )
        lines = first["message"].split("\n")
        assert lines[0].startswith(done)
        assert lines[1:] == [f"warning: {about_pipfile}"]
        (about_script,) = second["warnings"]
        assert '"./run.sh" would not run: it is not executable' in about_script
        assert third["warnings"] == []
        assert "warning" not in third["message"]


def test_a_script_with_windows_line_ends_fails_with_a_reason(shared_operator: Operator) -> None:
    yaml = (
        "- {name: windows, kind: TaskAPI, definition: {command: [./run.sh]}, compute: {cpu: 1m}}\n"
    )
    folder = shared_operator.folder / "windows"
    folder.mkdir()
    (folder / "cortex.yaml").write_text(yaml)
    (folder / "run.sh").write_bytes(b"#!/bin/bash\r\necho hello\r\n")
    (folder / "run.sh").chmod(0o755)
    archive = io.BytesIO()
    pack(folder, archive)
    (done,) = shared_operator.upload(yaml, archive.getvalue()).json()
    assert "its lines end as on Windows" in done["message"]
    job = shared_operator.run(done["api"]["endpoint"])
    assert (job["status"], job["exit_code"]) == ("status_worker_error", 127)
    assert (
        r"names the interpreter '/bin/bash\r'; save it with the line ends of Unix" in job["message"]
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [("yield 1", "is a generator (line 2 has yield)"), ("await x()", "is async; define def task")],
)
def test_a_task_that_no_job_can_call_is_refused(
    shared_operator: Operator, source: str, message: str
) -> None:
    kind = "async def" if "await" in source else "def"
    code = f"{kind} task(config):\n    {source}\n"
    response = shared_operator.deploy(probe_yaml("uncalled"), {"probe.py": code})
    assert response.status_code == 400
    assert (
        f'cortex.yaml:4: definition.path: the task in "probe.py" {message}'
        in response.json()["message"]
    )


def test_a_missing_file_is_reported_with_its_line(shared_operator: Operator) -> None:
    response = shared_operator.deploy(probe_yaml("pathless"), {"prob.py": PROBE})
    assert response.status_code == 400
    assert "cortex.yaml:4" in response.json()["message"]
    assert "prob.py" in response.json()["message"]


def test_an_endpoint_belongs_to_one_api(shared_operator: Operator) -> None:
    shared_operator.deployed(probe_yaml("owner"), {"probe.py": PROBE})
    taker = probe_yaml("taker", more="  networking: {endpoint: /owner}\n")
    response = shared_operator.deploy(taker, {"probe.py": PROBE})
    assert (response.status_code, response.json()["kind"]) == (409, "conflict")
    assert "'owner'" in response.json()["message"]


def test_an_api_can_have_an_endpoint_other_than_its_name(shared_operator: Operator) -> None:
    yaml = probe_yaml("elsewhere", more="  networking: {endpoint: /else.where}\n")
    endpoint = shared_operator.deployed(yaml, {"probe.py": PROBE})
    assert endpoint == f"{shared_operator.url}/else.where"
    assert shared_operator.run(endpoint)["status"] == "status_succeeded"
    assert shared_operator.http.post(f"{shared_operator.url}/elsewhere", json={}).status_code == 404


def malicious(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        tar.addfile(member)
    return out.getvalue()


@pytest.mark.parametrize(
    "archive",
    [
        malicious("../outside"),
        malicious("/outside"),
        malicious("link", tarfile.SYMTYPE, "/etc/passwd"),
        malicious("link", tarfile.SYMTYPE, "../../outside"),
        malicious("device", tarfile.CHRTYPE),
        malicious("pipe", tarfile.FIFOTYPE),
        b"not an archive",
        b"",
    ],
    # Without ids, the time in each gzip header would make the test names differ between processes.
    ids=["up", "root", "link", "link-up", "device", "pipe", "text", "empty"],
)
def test_an_archive_that_is_no_project_is_refused(
    shared_operator: Operator, archive: bytes
) -> None:
    before = sorted((shared_operator.data_dir / "projects").iterdir())
    response = shared_operator.upload(probe_yaml("trap"), archive)
    assert (response.status_code, response.json()["kind"]) == (400, "project.invalid")
    assert sorted((shared_operator.data_dir / "projects").iterdir()) == before


def test_an_upload_that_lacks_a_part_is_refused(shared_operator: Operator) -> None:
    response = shared_operator.http.post(
        f"{shared_operator.url}/-/apis", files={"config": ("c.yaml", b"[]")}
    )
    assert response.status_code == 400
    assert "project" in response.json()["message"]


def test_a_config_that_is_no_text_is_refused(shared_operator: Operator) -> None:
    response = shared_operator.http.post(
        f"{shared_operator.url}/-/apis",
        files={"config": ("c.yaml", b"\xff\xfe\x00"), "project": ("p", b"")},
    )
    assert (response.status_code, response.json()["kind"]) == (400, "spec.invalid")


def test_a_config_over_the_limit_is_refused(shared_operator: Operator) -> None:
    response = shared_operator.http.post(
        f"{shared_operator.url}/-/apis",
        files={"config": ("c.yaml", b"#" * (1024**2 + 1)), "project": ("p", b"")},
    )
    assert (response.status_code, response.json()["kind"]) == (400, "spec.invalid")


def test_a_deleted_api_can_be_deployed_again(shared_operator: Operator) -> None:
    endpoint = shared_operator.deployed(probe_yaml("back"), {"probe.py": PROBE})
    before = shared_operator.run(endpoint)
    answer = shared_operator.http.delete(f"{shared_operator.url}/-/apis/back").json()
    assert answer == {"message": "deleted API back"}
    assert shared_operator.status(endpoint, before)["status"] == "status_succeeded"
    shared_operator.deployed(probe_yaml("back"), {"probe.py": PROBE})
    assert shared_operator.run(endpoint)["status"] == "status_succeeded"


def test_a_job_gets_its_files_variables_and_spec(shared_operator: Operator) -> None:
    yaml = (
        "- name: around\n  kind: TaskAPI\n"
        "  definition: {path: probe.py, python_path: lib, env: {FROM_YAML: here, BOTH: yaml}}\n"
        "  compute: {cpu: 1m}\n"
    )
    files = {
        "probe.py": "import helper\n" + PROBE,
        "lib/helper.py": "",
        ".env": "FROM_DOTENV=there\nBOTH=dotenv\n",
        ".secret": "",
        "ignored.txt": "",
        ".cortexignore": "ignored.*\n",
        "data/kept.txt": "",
    }
    endpoint = shared_operator.deployed(yaml, files)
    job = shared_operator.submit(endpoint, config={"do": "surroundings"})
    found = shared_operator.finished(endpoint, job)["result"]
    assert {"data", "lib", "probe.py"} <= set(found["files"])
    assert not {".secret", "ignored.txt"} & set(found["files"])
    env = found["env"]
    assert (env["FROM_YAML"], env["FROM_DOTENV"], env["BOTH"]) == ("here", "there", "yaml")
    assert (env["CORTEX_API_NAME"], env["CORTEX_JOB_ID"]) == ("around", job["job_id"])
    assert "CORTEX_CLI_CONFIG_DIR" not in env
    assert found["spec"]["job_id"] == job["job_id"]
    assert found["spec"]["config"] == {"do": "surroundings"}


def test_a_large_project_is_accepted_and_one_over_the_limit_refused(
    shared_operator: Operator,
) -> None:
    noise = "".join(random.Random(1).choices("0123456789abcdef", k=1024 * 1024))
    large = {f"data/{n}.txt": str(n) + noise for n in range(30)}
    endpoint = shared_operator.deployed(probe_yaml("large"), {"probe.py": PROBE, **large})
    assert shared_operator.run(endpoint)["status"] == "status_succeeded"
    response = shared_operator.upload(probe_yaml("larger"), b"\0" * (133 * 1024 * 1024))
    assert (response.status_code, response.json()["kind"]) == (413, "request.too_large")


@pytest.mark.parametrize(
    "name", ["..", "data", "a\0b", "n" * 300, "a\nb", "\u2028", "/", ""], ids=range(8)
)
def test_the_name_of_an_uploaded_file_has_no_effect(shared_operator: Operator, name: str) -> None:
    yaml = probe_yaml("called").encode()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for path, content in (("probe.py", PROBE.encode()), ("data/x", b"")):
            info = tarfile.TarInfo(path)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    body = (
        b'--b\r\nContent-Disposition: form-data; name="config"; filename="'
        + name.encode() + b'"\r\n\r\n' + yaml + b'\r\n--b\r\nContent-Disposition: form-data; '
        b'name="project"; filename="p"\r\n\r\n' + archive.getvalue() + b"\r\n--b--\r\n"
    )  # fmt: skip
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    response = shared_operator.http.post(
        f"{shared_operator.url}/-/apis", content=body, headers=headers
    )
    assert response.status_code == 200, response.text


def test_an_impossible_path_is_reported(shared_operator: Operator) -> None:
    yaml = probe_yaml("pathless").replace("probe.py", "n" * 300 + ".py")
    response = shared_operator.deploy(yaml, {"probe.py": PROBE})
    assert (response.status_code, response.json()["kind"]) == (400, "spec.invalid")
    assert "is not in the project" in response.json()["message"]


def test_a_chunked_upload_over_the_limit_is_refused(shared_operator: Operator) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="project"; filename="p"\r\n\r\n'
        for _ in range(134):
            yield bytes(1024**2)

    response = shared_operator.http.post(
        f"{shared_operator.url}/-/apis",
        content=chunks(),
        headers={"Content-Type": "multipart/form-data; boundary=b"},
    )
    assert (response.status_code, response.json()["kind"]) == (413, "request.too_large")
