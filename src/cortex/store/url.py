"""The URLs of databases: how users write them, and how they are shown without their secrets. Called by
the store, and by whoever reads an operator's configuration.
"""

from __future__ import annotations

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

FORM = "postgresql://USER@HOST:PORT/DATABASE"

# Parameters of libpq that are secrets.
_SECRETS = frozenset(
    {"password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"}
)
_UNREADABLE = f"no URL that can be read; write {FORM}, with %XX for what is special in a password"
_POSTGRESQL = frozenset({"postgres", "postgresql", "postgresql+psycopg"})


def read(text: str) -> URL:
    """The PostgreSQL database that a user means.

    Raises:
        ValueError: it is none, and what is wrong. The message does not repeat the URL, in which a
            password may be.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        raise ValueError(_UNREADABLE) from error
    if url.drivername not in _POSTGRESQL:
        raise ValueError(
            f"no database of that kind: {url.drivername!r}; write {FORM}, or leave it out for a file "
            "in the data folder"
        )
    if "@" in f"{url.host}{url.database if url.password is not None else ''}":
        raise ValueError(_UNREADABLE)  # the rest of a password, which would be shown
    if not url.database:
        raise ValueError(f"no database is named; write {FORM}")
    return url.set(drivername="postgresql+psycopg")


def shown(url: URL) -> str:
    """The URL for messages: as users write it, without a password."""
    if "password" in url.query:
        url = url.difference_update_query(["password"]).set(password="***")
    url = url.update_query_dict(dict.fromkeys(_SECRETS & url.query.keys(), "***"))
    name = url.drivername.partition("+")[0]
    return url.set(drivername=name).render_as_string(hide_password=True)
