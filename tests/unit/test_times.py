"""Times and identifiers, as `spec/times.py` writes them."""

from __future__ import annotations

from cortex.spec.times import new_id, parse_rfc3339, rfc3339


def test_times_are_written_as_the_contract_says() -> None:
    assert rfc3339(1_594_911_370_276_007_415) == "2020-07-16T14:56:10.276007415Z"
    assert rfc3339(0) == "1970-01-01T00:00:00.000000000Z"
    assert parse_rfc3339("2020-07-16T14:56:10.276007415Z").microsecond == 276007


def test_identifiers_sort_by_time_and_differ() -> None:
    ids = [new_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert [i[:10] for i in ids] == sorted(i[:10] for i in ids)
