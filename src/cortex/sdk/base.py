"""What both clients are: of one operator."""

from __future__ import annotations

from cortex.sdk.endpoint import Endpoint


class OfOperator:
    """An operator's URL and the name of its environment."""

    def __init__(self, operator_endpoint: str, *, name: str = "", token: str | None = None) -> None:
        self._endpoint = Endpoint.checked(operator_endpoint, name, token)

    @property
    def name(self) -> str:
        """The environment's name; empty when it was made without one."""
        return self._endpoint.name

    @property
    def operator_endpoint(self) -> str:
        """The operator's URL."""
        return self._endpoint.url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.operator_endpoint!r}, name={self.name!r})"
