"""Who drives, for tests of the store: it remembers what it was told."""

from __future__ import annotations

from cortex.store import Store

ADDRESS = "http://operator.invalid"


class Driver:
    """A `store.Candidate`."""

    def __init__(self) -> None:
        self.drives = False
        self.terms = 0
        self.refuses: Exception | None = None
        self.failures: list[Exception] = []

    async def drive(self) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.drives = True
        self.terms += 1

    async def step_down(self) -> None:
        self.drives = False

    def failed(self, error: Exception) -> None:
        self.failures.append(error)


async def driving(store: Store, driver: Driver | None = None, *, lease_s: float = 30) -> Driver:
    """Stand for driving, where the store can be shared; `store.operators.leave` ends it."""
    driver = driver or Driver()
    if store.is_shared:
        store.operators.join("here", "this machine", ADDRESS)
        await store.operators.campaign(driver, lease_s)
    return driver
