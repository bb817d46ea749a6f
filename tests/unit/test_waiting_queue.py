"""The waiting queue, compared with a model without a heap and without parked jobs: a sorted list
that is searched from its head."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cortex.operator.dispatch.line import WaitingQueue

APIS = st.sampled_from(["a", "b", "c"])


class Model(RuleBasedStateMachine):
    """Clients submit and withdraw jobs, the queue admits them in order, they end, and limits
    change."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = WaitingQueue()
        self.waiting: dict[str, tuple[int, str]] = {}  # by job: its sequence number and its API
        self.withdrawn: set[str] = set()
        self.running: dict[str, str] = {}
        self.limits: dict[str, int] = {}
        self.pushed = 0

    def count(self, api: str) -> int:
        return sum(each == api for each in self.running.values())

    def may_run(self, api: str) -> bool:
        return api not in self.limits or self.count(api) < self.limits[api]

    def next_job(self) -> str | None:
        """The first waiting job whose API is below its limit."""
        for job, (_, api) in sorted(self.waiting.items(), key=lambda item: item[1]):
            if self.may_run(api):
                return job
        return None

    @rule(api=APIS, later=st.integers(0, 3))
    def push(self, api: str, later: int) -> None:
        # A job whose environment took long to build is pushed after jobs with a higher number.
        self.pushed += 1
        job, seq = f"job {self.pushed}", self.pushed * 4 - later * 5
        self.waiting[job] = (seq, api)
        self.queue.push(seq, job, api)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        """A waiting job is stopped: the caller pops it when it comes to the head."""
        job = data.draw(st.sampled_from(sorted(self.waiting)))
        del self.waiting[job]
        self.withdrawn.add(job)

    @rule(admits=st.integers(1, 3))
    def schedule(self, admits: int) -> None:
        """Admit up to `admits` jobs, as the caller does."""
        while (job := self.queue.first()) is not None:
            if job in self.withdrawn:
                self.queue.pop()
                continue
            _, api = self.waiting[job]
            if self.queue.running_at_limit(api) is not None:
                assert not self.may_run(api)
                self.queue.park()
                continue
            assert job == self.next_job()
            if not admits:
                return
            admits -= 1
            self.queue.admit(api, job)
            self.queue.pop()
            del self.waiting[job]
            self.running[job] = api
        assert self.next_job() is None, "the queue is empty, and a job could run"

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(sorted(self.running)))
        assert self.queue.release(self.running.pop(job), job)

    @rule(api=APIS)
    def release_a_job_that_does_not_run(self, api: str) -> None:
        assert not self.queue.release(api, "no job")

    @rule(api=APIS, limit=st.sampled_from([None, 1, 2, 3]))
    def limit(self, api: str, limit: int | None) -> None:
        self.queue.limit(api, limit)
        if limit is None:
            self.limits.pop(api, None)
        else:
            self.limits[api] = limit

    @invariant()
    def the_count_of_running_jobs_is_reported_at_the_limit_alone(self) -> None:
        for api in ("a", "b", "c"):
            expected = None if self.may_run(api) else self.count(api)
            assert self.queue.running_at_limit(api) == expected


def test_jobs_start_in_order_and_only_those_of_an_api_at_its_limit_are_passed_over() -> None:
    run_state_machine_as_test(
        Model, settings=settings(max_examples=200, stateful_step_count=50, deadline=None)
    )
