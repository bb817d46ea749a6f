"""The attempts to join a Ray cluster: how long to wait before the next, and what is logged of them.

`cluster` makes the attempts.
"""

from __future__ import annotations

import structlog

log = structlog.get_logger()

MIN_DELAY_S, MAX_DELAY_S = 1.0, 10.0
# The failures 1, 2, 4, 8 ... are logged, and then each 64th: about one in ten minutes.
_MAX_UNLOGGED = 64


class JoinAttempts:
    """Counts the attempts that failed since the cluster was joined last."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._failures = 0
        self._logged = ""

    def failed(self, reason: str) -> float:
        """Count a failure, and log it if its reason is new or it is due to be repeated.

        Returns:
            The seconds until the next attempt.
        """
        delay_s = min(MAX_DELAY_S, MIN_DELAY_S * (1 << min(self._failures, 10)))
        self._failures += 1
        is_due = self._failures.bit_count() == 1 or self._failures % _MAX_UNLOGGED == 0
        if is_due or reason != self._logged:
            self._logged = reason
            log.warning(
                "cannot join the ray cluster; jobs wait, and the operator retries",
                address=self._address,
                error=reason,
                failures=self._failures,
                hint="is it up, and does this machine run a node of it?",
            )
        return delay_s

    def succeeded(self) -> None:
        """The cluster is joined."""
        if self._failures:
            log.info("joined the ray cluster", address=self._address, failures=self._failures)
        self._failures, self._logged = 0, ""
