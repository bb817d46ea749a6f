"""APIs and their versions in the database.

Called by `Store`; each function is one short read or write.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select, update

from cortex.errors import Conflict, NotFound
from cortex.spec.api import ApiSpec
from cortex.spec.audit import Action, Actor, AuditEntry
from cortex.spec.job import JobRecord
from cortex.spec.times import now_ns
from cortex.store import audit
from cortex.store.schema import apis, versions
from cortex.store.transitions import STOP_ALL, record


@dataclass(frozen=True)
class Deployment:
    """A deployed API and its current version."""

    name: str
    endpoint: str
    spec: ApiSpec


def deploy(connection: Connection, specs: Iterable[ApiSpec], actor: Actor) -> None:
    """Make these the current versions of their APIs.

    Raises:
        Conflict: another API has the endpoint.
    """
    for spec in specs:
        endpoint = spec.networking.endpoint
        owner = connection.execute(select(apis.c.name).where(apis.c.endpoint == endpoint)).scalar()
        if owner not in (None, spec.name):
            raise Conflict(
                f"the endpoint {endpoint!r} belongs to the API {owner!r}; choose another "
                f"networking.endpoint for {spec.name!r}"
            )
        created_ns = now_ns()
        connection.execute(
            insert(versions).values(
                api_id=spec.api_id,
                api_name=spec.name,
                spec=spec.model_dump_json(),
                created_ns=created_ns,
            )
        )
        values = {"endpoint": endpoint, "api_id": spec.api_id}
        # Updated in place: a submit that waits for this row's lock then finds it.
        changed = connection.execute(update(apis).where(apis.c.name == spec.name).values(values))
        if changed.rowcount == 0:
            connection.execute(insert(apis).values(name=spec.name, **values))
        message = f"version {spec.api_id}"
        entry = AuditEntry(Action.DEPLOY, actor, created_ns, api_name=spec.name, message=message)
        audit.add(connection, [entry])


def undeploy(connection: Connection, name: str, why: str, actor: Actor) -> list[JobRecord]:
    """Delete an API and stop its jobs; the stopped jobs.

    Raises:
        NotFound: the API is not deployed.
    """
    if connection.execute(delete(apis).where(apis.c.name == name)).rowcount == 0:
        raise NotFound(f"there is no API {name!r}; see `cortex get`")
    end_ns = now_ns()
    rows = connection.execute(STOP_ALL, {"of_api": name, "end_ns": end_ns, "message": why})
    stopped = sorted(map(record, rows), key=lambda job: job.seq)
    message = f"stopped {len(stopped)} of its jobs"
    entry = AuditEntry(Action.DELETE, actor, end_ns, api_name=name, message=message)
    audit.add(connection, [entry])
    return stopped


def deployed(connection: Connection) -> list[Deployment]:
    """All deployed APIs, by name."""
    query = select(apis, versions.c.spec).join(versions, versions.c.api_id == apis.c.api_id)
    rows = connection.execute(query.order_by(apis.c.name)).mappings()
    return [
        Deployment(row["name"], row["endpoint"], ApiSpec.model_validate_json(row["spec"]))
        for row in rows
    ]


def version(connection: Connection, api_id: str) -> ApiSpec | None:
    """A version that was ever deployed, or None."""
    query = select(versions.c.spec).where(versions.c.api_id == api_id)
    found = connection.execute(query).scalar()
    return None if found is None else ApiSpec.model_validate_json(found)


def versions_of(connection: Connection, name: str) -> list[ApiSpec]:
    """All versions of an API, newest first."""
    query = select(versions.c.spec).where(versions.c.api_name == name)
    found = connection.execute(query.order_by(versions.c.created_ns.desc())).scalars()
    return [ApiSpec.model_validate_json(text) for text in found]


def all_versions(connection: Connection) -> list[ApiSpec]:
    """Every version of every API."""
    found = connection.execute(select(versions.c.spec)).scalars()
    return [ApiSpec.model_validate_json(text) for text in found]
