"""The only place that knows SQL: the schema, its migrations, and the guarded transitions.

The operator and `cortex token` call `Store`; nobody else does.
"""

from cortex.store.changes import Hearer
from cortex.store.deployments import Deployment
from cortex.store.lease import Candidate
from cortex.store.sqlite import SAVED, put_back
from cortex.store.store import JobPage, Store
from cortex.store.submits import Claim, Replay
from cortex.store.transitions import Facts, Outcome
from cortex.store.turns import Turn

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
