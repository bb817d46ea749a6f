"""The contract holds on a PostgreSQL store: runs some tests of the other modules on one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import psycopg
import pytest

from contract import (
    test_deploy,
    test_durability,
    test_limits,
    test_retention,
    test_status,
    test_stop,
    test_submit,
    test_tokens,
)
from operator_harness import PROBE, Operator, operator, probe_yaml
from postgresql_server import PostgreSQLServer

PROMISES: list[Callable[..., None]] = [
    test_submit.test_an_empty_object_submits_a_job_with_every_field_present,
    test_submit.test_config_is_returned_unchanged,
    test_submit.test_a_repeated_key_gives_the_same_job,
    test_status.test_both_forms_of_the_url_give_the_same_answer,
    test_status.test_a_waiting_job_says_what_it_waits_for,
    test_status.test_worker_error_raised,
    test_status.test_timed_out,
    test_status.test_jobs_are_listed_newest_first_in_pages,
    test_stop.test_a_repeated_stop_gets_the_same_answer,
    test_stop.test_a_finished_job_cannot_be_stopped,
    test_deploy.test_a_changed_api_makes_a_version_and_running_jobs_keep_theirs,
    test_deploy.test_an_endpoint_belongs_to_one_api,
    test_deploy.test_a_deleted_api_can_be_deployed_again,
    test_durability.test_a_running_job_outlives_the_operator,
    test_durability.test_waiting_jobs_start_after_a_crash_each_once,
    test_durability.test_a_stop_is_final_across_a_crash,
    test_durability.test_a_repeated_key_holds_across_a_crash,
    test_limits.test_max_running_holds_across_a_crash_of_the_operator,
    test_limits.test_concurrent_submits_do_not_exceed_max_waiting,
    test_retention.test_old_jobs_are_removed_but_no_running_ones,
    test_retention.test_of_many_jobs_the_newest_are_kept,
    test_retention.test_unused_versions_projects_and_environments_are_removed,
    test_tokens.test_a_revoked_token_is_refused_from_the_next_request_on,
]


@pytest.fixture(scope="module")
def shared_operator(
    tmp_path_factory: pytest.TempPathFactory, postgresql: PostgreSQLServer, migrated_database: str
) -> Iterator[Operator]:
    """Replaces the fixture `shared_operator` by an operator on PostgreSQL."""
    name = postgresql.create(template=migrated_database)
    with operator(tmp_path_factory.mktemp("shared"), "--store", postgresql.url(name)) as running:
        yield running
    postgresql.drop(name)


@pytest.fixture(scope="module")
def probe(shared_operator: Operator) -> str:
    return shared_operator.deployed(probe_yaml(), {"probe.py": PROBE})


@pytest.fixture
def own_database(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test's operators and commands use a database of its own."""
    monkeypatch.setenv("CORTEX_SERVE_STORE", database)
    yield
    with psycopg.connect(database) as connection:
        used = connection.execute("SELECT count(*) FROM operators").fetchone()
    assert used is not None and used[0] > 0, "an operator has used this database"


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_the_contract_holds_on_postgresql(
    promise: Callable[..., None], request: pytest.FixtureRequest
) -> None:
    names = list(inspect.signature(promise).parameters)
    if "shared_operator" not in names:
        request.getfixturevalue("own_database")
    promise(**{name: request.getfixturevalue(name) for name in names})
