"""The only package with SQL: the schema, its migrations, and the guarded transitions.

Only the operator and `cortex token` call `Store`.
"""

from cortex.store.apis import Deployment
from cortex.store.group.election import LeaderCallbacks
from cortex.store.group.locks import DatabaseLock
from cortex.store.group.notifications import ChangeListener
from cortex.store.sqlite import SAVED, restore_instructions
from cortex.store.store import JobPage, Store
from cortex.store.submissions import InitialClaim, Replay
from cortex.store.transitions import Outcome

__all__ = [
    "SAVED",
    "ChangeListener",
    "DatabaseLock",
    "Deployment",
    "InitialClaim",
    "JobPage",
    "LeaderCallbacks",
    "Outcome",
    "Replay",
    "Store",
    "restore_instructions",
]
