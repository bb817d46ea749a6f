"""The certificate authorities that a connection to an operator trusts.

$SSL_CERT_FILE and $SSL_CERT_DIR name them. Standard library alone: a task's client uses it in the
user's environment.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from cortex.errors import CortexError


def environment_context() -> ssl.SSLContext | None:
    """A context that trusts the authorities of $SSL_CERT_FILE and $SSL_CERT_DIR.

    Returns:
        The context; None where neither variable is set.

    Raises:
        CortexError: a variable names something without certificates.
    """
    file = os.environ.get("SSL_CERT_FILE") or None
    folder = os.environ.get("SSL_CERT_DIR") or None
    if file is None and folder is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # As in OpenSSL, the folders are separated as in $PATH, and missing ones are ignored.
    folders = [each for each in (folder or "").split(os.pathsep) if each and Path(each).is_dir()]
    for each in folders:
        context.load_verify_locations(capath=each)
    if file is not None:
        try:
            context.load_verify_locations(cafile=file)
        except OSError as error:  # ssl.SSLError is one
            raise _no_certificates("SSL_CERT_FILE", file, error.strerror or str(error)) from error
    elif not folders:
        raise _no_certificates("SSL_CERT_DIR", folder or "", "it is not a folder")
    return context


def empty_context() -> ssl.SSLContext:
    """A context that trusts no authority, for connections without encryption.

    Loading the default authorities takes longer than many requests.
    """
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _no_certificates(variable: str, value: str, why: str) -> CortexError:
    return CortexError(
        f"${variable} is {value!r}, which holds no certificates ({why}). Set $SSL_CERT_FILE to a "
        "file of certificates in PEM format, or $SSL_CERT_DIR to a folder of them, or unset it",
        kind="client.certificates",
    )
