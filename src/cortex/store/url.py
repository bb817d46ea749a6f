"""The URLs of databases: how users write them, and how messages show them without secrets.

Called by the store, and by `operator.config`.
"""

from __future__ import annotations

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

FORM = "postgresql://USER@HOST:PORT/DATABASE"

# Parameters of libpq that are secrets.
_SECRETS = frozenset(
    {"password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"}
)
_UNREADABLE = f"not a valid URL; write {FORM}, with special characters of the password as %XX"
_POSTGRESQL = frozenset({"postgres", "postgresql", "postgresql+psycopg"})


def read(text: str) -> URL:
    """The URL of a PostgreSQL database, as a user writes it.

    Raises:
        ValueError: what is wrong. The message does not repeat the URL, which may have a password.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        raise ValueError(_UNREADABLE) from error
    if url.drivername not in _POSTGRESQL:
        raise ValueError(
            f"{url.drivername!r} is not a supported database; write {FORM}, or leave the setting "
            "out to use a file in the data folder"
        )
    if "@" in f"{url.host}{url.database if url.password is not None else ''}":
        raise ValueError(_UNREADABLE)  # part of a password, which messages would show
    if not url.database:
        raise ValueError(f"the name of the database is missing; write {FORM}")
    return url.set(drivername="postgresql+psycopg")


def shown(url: URL) -> str:
    """The URL for messages: as users write it, with all secrets masked."""
    if "password" in url.query:
        url = url.difference_update_query(["password"]).set(password="***")
    url = url.update_query_dict(dict.fromkeys(_SECRETS & url.query.keys(), "***"))
    name = url.drivername.partition("+")[0]
    return url.set(drivername=name).render_as_string(hide_password=True)
