"""Which errors of the operating system may pass by themselves.

The operator, the engines and the agent of a Ray node call this to decide whether to retry.
"""

from __future__ import annotations

import errno

# The disk is full, over a quota, read-only or failing.
_STORAGE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})
# The machine is out of processes and threads, descriptors or memory.
_SHORTAGE = frozenset({errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def is_shortage(error: OSError) -> bool:
    """Whether the machine is short of a resource that may become free later."""
    return error.errno in _SHORTAGE


def is_storage(error: OSError) -> bool:
    """Whether a disk refuses writes now and may accept them later."""
    return error.errno in _STORAGE
