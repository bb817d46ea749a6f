"""The Python SDK: `cortex.client()` and what it returns."""

from __future__ import annotations

from cortex.sdk import environments
from cortex.sdk.sync import Client
from cortex.sdk.types import (
    ApiVersion,
    ApiView,
    DeployResult,
    EnvironmentEntry,
    EnvironmentList,
    JobOutline,
    JobPage,
    JobStatus,
    JobView,
    ListedJob,
    Message,
    SubmittedJob,
)

__all__ = [
    "ApiVersion",
    "ApiView",
    "Client",
    "DeployResult",
    "EnvironmentEntry",
    "EnvironmentList",
    "JobOutline",
    "JobPage",
    "JobStatus",
    "JobView",
    "ListedJob",
    "Message",
    "SubmittedJob",
    "client",
    "env_delete",
    "env_list",
    "new_client",
]


def client(env: str | None = None) -> Client:
    """A client of the named environment; of the default one when no name is given.

    Where no environment is configured at all, it is the operator of this machine,
    http://localhost:8888. A token in $CORTEX_TOKEN goes before the environment's own.
    """
    return _client_of(environments.resolve(env))


def new_client(name: str, operator_endpoint: str, token: str | None = None) -> Client:
    """Configure the environment `name` (or point it elsewhere), and return a client of it."""
    return _client_of(environments.configure(name, operator_endpoint, token))


def _client_of(environment: environments.Environment) -> Client:
    token = environments.token_of(environment)
    return Client(environment.operator_endpoint, name=environment.name, token=token)


def env_list() -> EnvironmentList:
    """The configured environments and which one is the default, as `cortex env list -o json`."""
    return environments.load().as_json()


def env_delete(name: str) -> None:
    """Forget the environment `name`. Its operator and what is deployed there stay as they are."""
    environments.delete(name)
