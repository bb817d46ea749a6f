"""The Python SDK: `cortex.client()`, the clients, and the types of their results."""

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
    """Make a client of a configured environment.

    $CORTEX_TOKEN overrides the environment's token. Without any configured environment, the client
    is one of the operator on this machine, http://localhost:8888.

    Args:
        env: the environment's name; by default the operator of $CORTEX_OPERATOR_ENDPOINT, or else
            the default environment.

    Raises:
        UnknownEnvironment: there is no such environment, or no default.
        CortexError: the environments file, or the environment's proxy or certificates are invalid.
    """
    return _new_client(environments.resolve(env))


def new_client(name: str, operator_endpoint: str, token: str | None = None) -> Client:
    """Add or change the environment `name`, and make a client of it.

    Args:
        name: the environment's name. The first environment becomes the default one.
        operator_endpoint: the operator's URL.
        token: stored with the environment; without it, the stored token stays if the URL is the
            same.

    Raises:
        InvalidRequest: the name, the URL or the token is invalid.
        CortexError: the environments file cannot be read or written.
    """
    return _new_client(environments.configure(name, operator_endpoint, token))


def env_list() -> EnvironmentList:
    """List the configured environments, without their tokens, as `cortex env list -o json` does.

    Returns:
        The environments, and the name of the default one.

    Raises:
        CortexError: the environments file cannot be read.
    """
    return environments.load().as_json()


def env_delete(name: str) -> None:
    """Remove the environment `name` from the configuration; its operator is not changed.

    Raises:
        UnknownEnvironment: there is no such environment.
        CortexError: the environments file cannot be read or written.
    """
    environments.delete(name)


def _new_client(environment: environments.Environment) -> Client:
    token = environments.token_of(environment)
    return Client(environment.operator_endpoint, name=environment.name, token=token)
