"""The only place that knows SQL: the schema, its migrations, and the guarded transitions.

The operator calls `Store`; nobody else does.
"""

from cortex.store.store import Deployment, JobPage, Replay, Store
from cortex.store.transitions import Facts, Outcome

__all__ = ["Deployment", "Facts", "JobPage", "Outcome", "Replay", "Store"]
