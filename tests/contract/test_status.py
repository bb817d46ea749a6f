"""The status of a job: the answer of GET, and each of the eight statuses by its own cause."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from operator_harness import PROBE, TIME, Operator, operator, probe_yaml, processes_with, until


def test_both_forms_of_the_url_give_the_same_answer(shared_operator: Operator, probe: str) -> None:
    job = shared_operator.submit(probe)
    done = shared_operator.finished(probe, job)
    by_path = shared_operator.http.get(f"{probe}/{job['job_id']}").json()
    by_query = shared_operator.http.get(probe, params={"jobID": job["job_id"]}).json()
    by_endpoint = shared_operator.http.get(by_path["endpoint"]).json()
    assert by_path == by_query == by_endpoint
    assert by_path["job_status"] == done
    assert by_path.keys() >= {"job_status", "endpoint", "api_spec"}
    assert by_path["api_spec"]["api_id"] == job["api_id"]
    assert by_path["api_spec"]["definition"]["config"]["base"] == 1
    assert by_path["job_status"].items() >= job.items()


def test_a_running_job_is_shown_as_running(shared_operator: Operator, probe: str) -> None:
    job = shared_operator.submit(probe, config={"do": "sleep", "s": 300})
    shared_operator.await_log(probe, job, "asleep")
    until(lambda: shared_operator.status(probe, job)["worker_counts"]["running"], "running")
    status = shared_operator.status(probe, job)
    assert status["status"] == "status_running"
    assert status["worker_counts"] == {"pending": 0, "running": 1}
    assert "end_time" not in status
    assert job["created_time"] <= status["start_time"]
    shared_operator.delete(probe, job)


def test_a_waiting_job_says_what_it_waits_for(own_operator: Operator) -> None:
    endpoint = own_operator.deployed(probe_yaml().replace("1m", '"1"'), {"probe.py": PROBE})
    first = own_operator.submit(endpoint, config={"do": "sleep", "s": 300})
    own_operator.await_log(endpoint, first, "asleep")
    second, third = own_operator.submit(endpoint), own_operator.submit(endpoint)
    status = own_operator.status(endpoint, second)
    assert status["status"] == "status_running"
    assert status["worker_counts"] == {"pending": 1, "running": 0}
    assert status["start_time"] == status["created_time"]
    assert status["message"] == "needs 1 CPU, 0 free"
    assert "behind" in own_operator.status(endpoint, third)["message"]
    assert own_operator.delete(endpoint, second).status_code == 200
    assert own_operator.status(endpoint, second)["status"] == "status_stopped"
    assert own_operator.delete(endpoint, first).status_code == 200
    assert own_operator.finished(endpoint, third)["status"] == "status_succeeded"


def test_behind_a_job_that_waits_for_a_gpu_jobs_start_on_the_cores_that_it_leaves(
    tmp_path: Path,
) -> None:
    sleep = {"do": "sleep", "s": 300}
    with operator(tmp_path, "--cpu", "3", "--gpu", "1") as own_operator:
        gpu = own_operator.deployed(
            probe_yaml("gpu").replace("1m", '"1", gpu: 1'), {"probe.py": PROBE}
        )
        cpu = own_operator.deployed(probe_yaml("cpu").replace("1m", '"1"'), {"probe.py": PROBE})
        first = own_operator.submit(gpu, config=sleep)
        own_operator.await_log(gpu, first, "asleep")
        second = own_operator.submit(gpu)
        beside = own_operator.submit(cpu, config=sleep)
        own_operator.await_log(cpu, beside, "asleep")
        behind = own_operator.submit(cpu)
        reason = "needs 1 GPU, 0 free"
        assert own_operator.status(gpu, second)["message"] == reason
        message = f"waits behind earlier jobs, the first of which {reason}"
        assert own_operator.status(cpu, behind)["message"] == message
        assert own_operator.delete(gpu, first).status_code == 200
        assert own_operator.finished(gpu, second)["status"] == "status_succeeded"
        assert own_operator.finished(cpu, behind)["status"] == "status_succeeded"
        own_operator.delete(cpu, beside)


def test_times_are_ordered_and_written_to_the_nanosecond(
    shared_operator: Operator, probe: str
) -> None:
    done = shared_operator.run(probe)
    times = [done["created_time"], done["start_time"], done["end_time"]]
    assert all(TIME.match(time) for time in times)
    assert times == sorted(times)


def test_succeeded(shared_operator: Operator, probe: str) -> None:
    done = shared_operator.run(probe, config={"do": "sleep", "s": 0})
    assert done["status"] == "status_succeeded"
    assert (done["result"], done["exit_code"]) == ("rested", 0)
    assert "worker_counts" not in done


def test_succeeded_without_a_result_that_is_json(shared_operator: Operator, probe: str) -> None:
    job = shared_operator.submit(probe, config={"do": "unserialisable"})
    done = shared_operator.finished(probe, job)
    assert done["status"] == "status_succeeded"
    assert "result" not in done
    assert "not kept" in done["message"]
    assert shared_operator.log_of(probe, job) == f"cortex: {done['message']}\n"


TOO_LARGE = (
    "the task's return value was not kept: it takes 3 MiB (3145730 bytes), more than the limit of "
    "1 MiB (1048576 bytes)"
)


@pytest.mark.parametrize(("printed", "before"), [("", ""), ("a", "a\n"), ("a\\n", "a\n")])
def test_a_result_over_the_limit_is_dropped_with_a_word_in_the_status_and_in_the_log(
    shared_operator: Operator, printed: str, before: str
) -> None:
    task = f"def task(config):\n    print('{printed}', end='')\n    return 'x' * config['length']\n"
    endpoint = shared_operator.deployed(probe_yaml("returns"), {"probe.py": task})
    job = shared_operator.submit(endpoint, config={"length": 3 << 20})
    done = shared_operator.finished(endpoint, job)
    assert (done["status"], done["exit_code"]) == ("status_succeeded", 0)
    assert "result" not in done
    assert done["message"] == TOO_LARGE
    assert shared_operator.log_of(endpoint, job) == f"{before}cortex: {TOO_LARGE}\n"
    job = shared_operator.submit(endpoint, config={"length": (1 << 20) - 2})
    done = shared_operator.finished(endpoint, job)
    assert len(done["result"]) == (1 << 20) - 2
    assert "message" not in done
    assert shared_operator.log_of(endpoint, job) == before.removesuffix("\n" * (printed == "a"))


def test_worker_error_about_a_file_whose_name_is_not_utf_8(shared_operator: Operator) -> None:
    code = "import os\ndef task(config): raise OSError(os.fsdecode(b'\\xff'))"
    done = shared_operator.run(shared_operator.deployed(probe_yaml("misnamed"), {"probe.py": code}))
    assert (done["status"], done["message"]) == ("status_worker_error", r"OSError: \udcff")


def test_worker_error_raised(shared_operator: Operator, probe: str) -> None:
    job = shared_operator.submit(probe, config={"do": "fail", "message": "bad C"})
    done = shared_operator.finished(probe, job)
    assert (done["status"], done["exit_code"]) == ("status_worker_error", 1)
    assert done["message"] == "ValueError: bad C"
    log = shared_operator.log_of(probe, job)
    assert "ValueError: bad C" in log
    assert 'probe.py", line' in log
    assert "/cortex/" not in log


def test_worker_error_exit_code(shared_operator: Operator, probe: str) -> None:
    done = shared_operator.run(probe, config={"do": "leave", "code": 7})
    assert (done["status"], done["exit_code"]) == ("status_worker_error", 7)
    assert "7" in done["message"]


def test_worker_error_by_a_signal_of_its_own(shared_operator: Operator, probe: str) -> None:
    done = shared_operator.run(probe, config={"do": "die", "signal": int(signal.SIGSEGV)})
    assert (done["status"], done["exit_code"]) == ("status_worker_error", -signal.SIGSEGV)
    assert "SIGSEGV" in done["message"]


def test_worker_error_killed(shared_operator: Operator, probe: str) -> None:
    done = shared_operator.run(probe, config={"do": "die", "signal": int(signal.SIGKILL)})
    assert (done["status"], done["exit_code"]) == ("status_worker_error", -signal.SIGKILL)


def test_worker_error_cannot_be_imported(shared_operator: Operator) -> None:
    endpoint = shared_operator.deployed(
        probe_yaml("no-import"), {"probe.py": "import no_such_module\n\n\nclass Task: ...\n"}
    )
    job = shared_operator.submit(endpoint)
    done = shared_operator.finished(endpoint, job)
    assert done["status"] == "status_worker_error"
    assert "no_such_module" in done["message"]
    assert "no_such_module" in shared_operator.log_of(endpoint, job)


@pytest.mark.parametrize("command", ["[python, probe.py]", '[sh, -c, "python probe.py; true"]'])
def test_worker_oom(shared_operator: Operator, command: str) -> None:
    name = "hungry" if "sh" not in command else "hungry-shell"
    yaml = (
        f"- name: {name}\n  kind: TaskAPI\n  definition: {{command: {command}}}\n"
        "  compute: {cpu: 1m, mem: 64Mi}\n"
    )
    code = "hoard = []\nwhile True: hoard.append(bytearray(b'x') * 4 * 1024 * 1024)\n"
    endpoint = shared_operator.deployed(yaml, {"probe.py": code})
    done = shared_operator.run(endpoint)
    assert done["status"] == "status_worker_oom"
    assert "64 MiB" in done["message"]


def test_timed_out(shared_operator: Operator, probe: str) -> None:
    done = shared_operator.run(probe, config={"do": "sleep", "s": 300}, timeout=1)
    assert done["status"] == "status_timed_out"
    assert "1 s" in done["message"]


def test_timed_out_ignoring_sigterm(shared_operator: Operator, probe: str) -> None:
    done = shared_operator.run(probe, config={"do": "stubborn"}, timeout=1)
    assert done["status"] == "status_timed_out"


def test_timed_out_while_waiting(own_operator: Operator) -> None:
    endpoint = own_operator.deployed(probe_yaml().replace("1m", '"1"'), {"probe.py": PROBE})
    first = own_operator.submit(endpoint, config={"do": "sleep", "s": 300})
    own_operator.await_log(endpoint, first, "asleep")
    done = own_operator.run(endpoint, timeout=1)
    assert done["status"] == "status_timed_out"
    assert "waited" in done["message"]
    assert done["start_time"] == done["created_time"]


def test_stopped(shared_operator: Operator, probe: str) -> None:
    job = shared_operator.submit(probe, config={"do": "sleep", "s": 300})
    assert shared_operator.delete(probe, job).status_code == 200
    done = shared_operator.status(probe, job)
    assert done["status"] == "status_stopped"
    assert "end_time" in done
    until(lambda: not processes_with(job["job_id"]), "its processes have exited")
    later = shared_operator.status(probe, job)
    assert (later["status"], later["end_time"]) == (done["status"], done["end_time"])


def test_stopped_because_the_api_was_deleted(shared_operator: Operator) -> None:
    endpoint = shared_operator.deployed(probe_yaml("doomed"), {"probe.py": PROBE})
    job = shared_operator.submit(endpoint, config={"do": "sleep", "s": 300})
    assert shared_operator.http.delete(f"{shared_operator.url}/-/apis/doomed").status_code == 200
    assert shared_operator.http.post(endpoint, json={}).status_code == 404
    done = shared_operator.status(endpoint, job)
    assert done["status"] == "status_stopped"
    assert "deleted" in done["message"]
    until(lambda: not processes_with(job["job_id"]), "its processes have exited")


def test_unexpected_error_environment_cannot_be_built(shared_operator: Operator) -> None:
    endpoint = shared_operator.deployed(
        probe_yaml("unbuildable"),
        {"probe.py": PROBE, "requirements.txt": "no-such-package-cortex-probe==9\n"},
    )
    job = shared_operator.submit(endpoint)
    done = shared_operator.finished(endpoint, job)
    assert done["status"] == "status_unexpected_error"
    assert "environment" in done["message"]
    assert "no-such-package-cortex-probe" in shared_operator.log_of(endpoint, job)


def test_unexpected_error_supervisor_killed(shared_operator: Operator, probe: str) -> None:
    job = shared_operator.submit(probe, config={"do": "sleep", "s": 300})
    shared_operator.await_log(probe, job, "asleep")
    (worker,) = processes_with(f"CORTEX_JOB_ID={job['job_id']}")
    stat = Path(f"/proc/{worker}/stat").read_text()
    os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)
    done = shared_operator.finished(probe, job)
    assert done["status"] == "status_unexpected_error"
    until(lambda: not processes_with(job["job_id"]), "its processes have exited")


def test_unknown_while_the_engine_cannot_read_the_folder_then_the_final_status(
    own_operator: Operator,
) -> None:
    endpoint = own_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    job = own_operator.submit(endpoint, config={"do": "sleep", "s": 300})
    own_operator.await_log(endpoint, job, "asleep")
    jobs, moved = own_operator.data_dir / "jobs", own_operator.data_dir / "away"
    jobs.rename(moved)
    [worker] = processes_with(f"CORTEX_JOB_ID={job['job_id']}")
    supervisor = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(supervisor, signal.SIGKILL)
    until(lambda: own_operator.status(endpoint, job)["status"] == "status_unknown", "unknown")
    assert "end_time" not in own_operator.status(endpoint, job)
    if jobs.exists():
        shutil.rmtree(jobs)
    moved.rename(jobs)
    assert own_operator.finished(endpoint, job)["status"] == "status_unexpected_error"


def test_wait_returns_when_the_job_completes_and_at_the_deadline(
    shared_operator: Operator, probe: str
) -> None:
    job = shared_operator.submit(probe, config={"do": "sleep", "s": 300})
    early = shared_operator.get(probe, job, wait=0.2)["job_status"]
    assert early["status"] == "status_running"
    shared_operator.delete(probe, job)
    assert shared_operator.get(probe, job, wait=60)["job_status"]["status"] == "status_stopped"


def test_jobs_are_listed_newest_first_in_pages(shared_operator: Operator) -> None:
    endpoint = shared_operator.deployed(probe_yaml("listed"), {"probe.py": PROBE})
    jobs = [shared_operator.submit(endpoint)["job_id"] for _ in range(5)]
    failed = shared_operator.run(endpoint, config={"do": "fail", "message": "x"})["job_id"]
    for job in jobs:
        shared_operator.finished(endpoint, {"job_id": job})
    listed, query = [], {"limit": 4}
    while True:
        page = shared_operator.http.get(endpoint, params=query).json()
        listed += [job["job_id"] for job in page["job_statuses"]]
        if page["next_cursor"] is None:
            break
        query["cursor"] = page["next_cursor"]
    assert listed == [failed, *reversed(jobs)]
    only = shared_operator.http.get(endpoint, params={"status": "status_worker_error"}).json()
    assert [job["job_id"] for job in only["job_statuses"]] == [failed]
    by_name = f"{shared_operator.url}/-/apis/listed/jobs"
    queries: list[dict[str, Any]] = [{}, {"limit": 2}, {"status": "status_worker_error"}]
    for each in queries:
        at_endpoint = shared_operator.http.get(endpoint, params=each).json()
        assert shared_operator.http.get(by_name, params=each).json() == at_endpoint
    assert shared_operator.http.get(f"{shared_operator.url}/-/apis/nothing/jobs").status_code == 404


@pytest.mark.parametrize(
    "query", [{"status": "fine"}, {"limit": 0}, {"limit": 1001}, {"cursor": "x"}, {"cursor": 2**63}]
)
def test_an_invalid_listing_query_is_refused_by_name(
    shared_operator: Operator, probe: str, query: dict[str, str]
) -> None:
    response = shared_operator.http.get(probe, params=query)
    assert response.status_code == 400
    assert next(iter(query)) in response.json()["message"]


@pytest.mark.parametrize("wait", ["-1", "x", "3601", "nan"])
def test_an_invalid_wait_is_refused(shared_operator: Operator, probe: str, wait: str) -> None:
    job = shared_operator.submit(probe)
    assert shared_operator.http.get(f"{probe}/{job['job_id']}?wait={wait}").status_code == 400
