"""The local engine's folders, laid out when it opens; called by it, in a thread."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cortex
from cortex.errors import StartupError
from cortex.system.account import Account, identity


def lay_out(root: Path, import_dir: Path, account: Account | None) -> None:
    """Make the folder of all jobs, and one in which workers find this package, and the one with the names
    that Cortex gave it, and nothing else.

    Raises:
        StartupError: the folder cannot be written, or jobs could not start there as `account`.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        import_dir.mkdir(exist_ok=True)
        package = Path(cortex.__file__).parent
        for each in (package, package.with_name("cortex_internal")):
            _link(import_dir / each.name, each)
        _link(import_dir / "cortex_task.py", package / "worker" / "job" / "stand_in.py")
    except OSError as error:
        raise StartupError(
            f"the data folder {root} cannot be written: {error}; choose another one"
        ) from error
    if account is not None:
        _check_reach(account, import_dir)


def _link(link: Path, to: Path) -> None:
    # Jobs of an operator that has just handed over may be importing from there.
    if not (link.is_symlink() and link.readlink() == to):
        link.unlink(missing_ok=True)
        link.symlink_to(to)


def _check_reach(account: Account, import_dir: Path) -> None:
    """Whether jobs of another user could start here at all: better told now than by each of them.

    Raises:
        StartupError: that user cannot run this Python, or cannot reach Cortex or the data folder.
    """
    code = "import sys; open(sys.argv[1]).close(); import ctypes, json, socket"
    script = import_dir / "cortex" / "worker" / "forkserver" / "main.py"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", code, str(script)],
            cwd="/",
            env={},
            capture_output=True,
            text=True,
            check=False,
            **identity(account),
        )
        words = done.stderr.strip().rpartition("\n")[2] if done.returncode else ""
    except OSError as error:
        words = str(error)
    if words:
        raise StartupError(
            f"jobs cannot run as {account.name!r}: {words}. Install Python and Cortex where that user "
            "can read them, and give it the right to pass through the folders above the data folder."
        )
