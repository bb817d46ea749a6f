"""The database file of a running operator is removed, replaced, moved, or locked by a process."""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from operator_harness import PROBE, Operator, probe_yaml, startup_error


def _remove(data: Path) -> None:
    (data / "operator.db").unlink()


def _remove_all(data: Path) -> None:
    for path in data.glob("operator.db*"):
        path.unlink()


def _remove_wal(data: Path) -> None:
    (data / "operator.db-wal").unlink()


def _remove_shm(data: Path) -> None:
    (data / "operator.db-shm").unlink()


def _replace(data: Path) -> None:
    with closing(sqlite3.connect(data / "new")) as other:
        other.execute("CREATE TABLE odd (a)")
    (data / "new").rename(data / "operator.db")


def _move(data: Path) -> None:
    (data / "operator.db").rename(data / "moved")


def _refusal(own_operator: Operator, endpoint: str) -> str:
    """The reason why the operator is not ready. It must refuse a submit."""
    submit = own_operator.http.post(endpoint, json={})
    ready = own_operator.http.get(f"{own_operator.url}/readyz")
    assert (submit.status_code, ready.status_code) == (503, 503)
    assert submit.json()["kind"] in ("storage.unavailable", "operator.outcome_unknown")
    assert own_operator.http.get(f"{own_operator.url}/healthz").status_code == 200
    return str(ready.json()["message"])


@pytest.mark.parametrize("harm", [_remove, _remove_all, _remove_wal, _remove_shm, _replace, _move])
def test_no_change_that_would_be_lost_is_acknowledged_and_the_data_is_saved(
    own_operator: Operator, harm: Callable[[Path], None]
) -> None:
    endpoint = own_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    path = endpoint.removeprefix(own_operator.url)
    done = own_operator.submit(endpoint, config={"a": 1})
    assert own_operator.finished(endpoint, done)["status"] == "status_succeeded"
    runs = own_operator.submit(endpoint, config={"do": "sleep", "s": 300})
    own_operator.await_log(endpoint, runs, "asleep")
    harm(own_operator.data_dir)
    message = _refusal(own_operator, endpoint)
    assert "operator.db" in message
    assert own_operator.status(endpoint, done)["status"] == "status_succeeded"  # reads still work
    (saved,) = own_operator.data_dir.glob("operator.db.saved-*")
    assert str(saved) in message
    assert saved.stat().st_mode & 0o777 == 0o600
    assert _refusal(own_operator, endpoint) == message  # the data is saved once
    own_operator.kill()
    # It does not start with an empty database, or with less data.
    assert str(saved) in startup_error(own_operator.data_dir)
    for end in ("-wal", "-shm"):
        (own_operator.data_dir / f"operator.db{end}").unlink(missing_ok=True)
    saved.rename(own_operator.data_dir / "operator.db")
    own_operator.start()
    endpoint = own_operator.url + path
    assert own_operator.status(endpoint, done)["result"] == {
        "base": 1,
        "nested": {"kept": True, "replaced": "no"},
        "a": 1,
    }
    assert own_operator.status(endpoint, runs)["status"] == "status_running"
    assert own_operator.delete(endpoint, runs).status_code == 200
    assert own_operator.run(endpoint)["status"] == "status_succeeded"


def test_work_continues_when_the_file_is_back(own_operator: Operator) -> None:
    endpoint = own_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    _move(own_operator.data_dir)
    _refusal(own_operator, endpoint)
    (own_operator.data_dir / "moved").rename(own_operator.data_dir / "operator.db")
    assert own_operator.run(endpoint)["status"] == "status_succeeded"
    assert list(own_operator.data_dir.glob("*saved*")) == []
    assert own_operator.http.get(f"{own_operator.url}/readyz").status_code == 200
    assert own_operator.run(endpoint)["status"] == "status_succeeded"


def test_a_moved_data_folder_refuses_changes_until_it_is_back(
    own_operator: Operator,
) -> None:
    endpoint = own_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    own_operator.run(endpoint)  # its environment is built before the move
    moved = own_operator.data_dir.with_name("away")
    own_operator.data_dir.rename(moved)
    try:
        assert "could not be saved" in _refusal(own_operator, endpoint)
        assert not own_operator.data_dir.exists()
    finally:
        shutil.rmtree(own_operator.data_dir, ignore_errors=True)
        moved.rename(own_operator.data_dir)
    end = own_operator.run(endpoint)
    assert end["status"] == "status_succeeded", str(end)


@contextmanager
def _locked(own_operator: Operator) -> Iterator[None]:
    with closing(
        sqlite3.connect(own_operator.data_dir / "operator.db", isolation_level=None)
    ) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


def test_behind_a_locked_database_changes_fail_in_time_and_reads_continue(
    own_operator: Operator,
) -> None:
    endpoint = own_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    done = own_operator.submit(endpoint)
    own_operator.finished(endpoint, done)
    durations_s: list[float] = []

    def submit(number: int) -> int:
        time.sleep(number)  # each submit arrives while the previous ones wait
        began = time.monotonic()
        code = own_operator.http.post(endpoint, json={}).status_code
        durations_s.append(time.monotonic() - began)
        return code

    with _locked(own_operator), ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(submit, number) for number in range(4)]
        began = time.monotonic()
        assert own_operator.status(endpoint, done)["status"] == "status_succeeded"
        assert time.monotonic() - began < 9  # the submits wait for 10 s
        assert [answer.result() for answer in answers] == [503] * 4
    assert max(durations_s) < 30  # not 10 s for each, one after another
    assert own_operator.run(endpoint)["status"] == "status_succeeded"


def test_a_submit_that_waits_for_a_locked_database_is_stored_after_its_release(
    own_operator: Operator,
) -> None:
    endpoint = own_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    with _locked(own_operator):
        answers: list[int] = []
        thread = threading.Thread(
            target=lambda: answers.append(own_operator.http.post(endpoint, json={}).status_code)
        )
        thread.start()
        time.sleep(2)
        assert answers == []
    thread.join()
    assert answers == [200]
