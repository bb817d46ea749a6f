"""The audit in the store: its order, its pages, and what is removed of it."""

from __future__ import annotations

import pytest

from cortex.spec.audit import Action, Actor, AuditEntry
from cortex.store import Store, audit
from store.store_harness import with_store


def test_refusals_do_not_grow_without_end(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "MAX_REFUSALS", 3)
    kinds = [Action.STOP, *[Action.REFUSE] * 5]
    entries = [AuditEntry(action, Actor(), n) for n, action in enumerate(kinds)]

    async def work(store: Store) -> None:
        await store.trim_audit(2**62)  # of the deploy that `with_store` makes
        await store.add_to_audit(entries)
        assert await store.trim_audit(None) == 2
        assert await store.trim_audit(None) == 0
        assert [entry.time_ns for entry in (await store.audit(10)).entries] == [5, 4, 3, 0]

    with_store(store_url, work)


def test_entries_are_listed_newest_first_in_pages_and_removed_after_their_time(
    store_url: str,
) -> None:
    async def work(store: Store) -> None:
        await store.undeploy("a", "deleted", Actor("ci", "127.0.0.1"))
        page = await store.audit(1)
        [entry] = page.entries
        assert (entry.action, entry.actor) == (Action.DELETE, Actor("ci", "127.0.0.1"))
        last = await store.audit(1, page.next_cursor)
        assert [entry.action for entry in last.entries] == [Action.DEPLOY]
        assert last.next_cursor is None
        assert await store.trim_audit(entry.time_ns) == 1
        assert (await store.audit(10)).entries == [entry]

    with_store(store_url, work)
