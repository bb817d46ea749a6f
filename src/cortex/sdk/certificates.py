"""The certificate authorities that a connection to an operator trusts: those of $SSL_CERT_FILE and
$SSL_CERT_DIR where they are set. Standard library alone.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from cortex.errors import CortexError


def trusted() -> ssl.SSLContext | None:
    """A context that checks certificates by the authorities of the environment; None where it names none.

    Raises:
        CortexError: what the environment names holds no certificates.
    """
    file = os.environ.get("SSL_CERT_FILE") or None
    folder = os.environ.get("SSL_CERT_DIR") or None
    if file is None and folder is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Several folders are separated as in $PATH, and those that are missing are passed over, as OpenSSL does.
    folders = [each for each in (folder or "").split(os.pathsep) if each and Path(each).is_dir()]
    for each in folders:
        context.load_verify_locations(capath=each)
    if file is not None:
        try:
            context.load_verify_locations(cafile=file)
        except OSError as error:  # ssl.SSLError is one
            raise _mistake("SSL_CERT_FILE", file, error.strerror or str(error)) from error
    elif not folders:
        raise _mistake("SSL_CERT_DIR", folder or "", "it is no folder")
    return context


def unused() -> ssl.SSLContext:
    """A context for connections that are not encrypted: to load all authorities takes longer than many a
    request."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _mistake(variable: str, value: str, why: str) -> CortexError:
    return CortexError(
        f"${variable} is {value!r}, which holds no certificates ({why}). Name a file of certificates in "
        "PEM format, or a folder of them with $SSL_CERT_DIR, or unset it",
        kind="client.certificates",
    )
