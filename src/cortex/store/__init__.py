"""The only place that knows SQL: the schema, its migrations, and the guarded transitions.

The operator and `cortex token` call `Store`; nobody else does.
"""

from cortex.store.apis import Deployment
from cortex.store.group.election import Candidate
from cortex.store.group.locks import Turn
from cortex.store.group.notifications import Hearer
from cortex.store.sqlite import SAVED, put_back
from cortex.store.store import JobPage, Store
from cortex.store.submissions import Claim, Replay
from cortex.store.transitions import Facts, Outcome

__all__ = [
    "SAVED",
    "Candidate",
    "Claim",
    "Deployment",
    "Facts",
    "Hearer",
    "JobPage",
    "Outcome",
    "Replay",
    "Store",
    "Turn",
    "put_back",
]
