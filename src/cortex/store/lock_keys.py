"""The keys of all advisory locks of a PostgreSQL database."""

from __future__ import annotations

_CORTEX = int.from_bytes(b"cortex", "big")

# Keys of one database must differ; operators of other versions use the same values. PostgreSQL
# distinguishes a key of one bigint from a key of two integers.
LEADER_LOCK = _CORTEX
"""Held by the leader, on its own session."""
DEPLOY_LOCK = _CORTEX << 4
"""`Store.deploy_lock`."""
JOIN_LOCK = DEPLOY_LOCK + 1
"""`Store.join_lock`."""
MIGRATION_LOCK = _CORTEX << 8
"""Held while the schema is migrated."""
WAITING_JOBS_LOCK = _CORTEX >> 16
"""Held while an API's waiting jobs are counted: the first of two integers; the second is the hash
of the API's name."""
WAITING_BYTES_LOCK = WAITING_JOBS_LOCK + 1
"""Held while the configs of all waiting jobs are added up."""
