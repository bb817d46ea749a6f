"""Where the log, the records and the files of each job lie. The operator, the engines and the nodes
of a cluster share this layout:

<root>/<job_id>/log          what the job writes, and lines of the platform's own
<root>/<job_id>/log.cut      the position of the gap in a log that exceeded `limits.log`
<root>/<job_id>/start.<n>    the start record of attempt n
<root>/<job_id>/exit.<n>     the exit record of attempt n
<root>/<job_id>/files        the job's own folder, `$CORTEX_JOB_DIR`

A name in the root that begins with a dot belongs to an engine, and to no job.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from cortex.joblog.reader import is_own
from cortex.system import folders
from cortex.worker import beneath
from cortex.worker.supervisor import logfile
from cortex.worker.supervisor.reuse import FILES

_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class JobFolders:
    """The folders of all jobs below one root. Only methods that say so touch the disk."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def folder(self, job_id: str) -> Path:
        """The folder of a job."""
        return self.root / job_id

    def folder_name(self, job_id: str) -> str:
        """The same as text, for each start of a job: creating a Path takes as long as mkdir(2)."""
        return f"{self.root}/{job_id}"

    def log(self, job_id: str) -> Path:
        """The job's log. It grows while the job writes, is complete before an engine reports the
        job's end, and does not exist before the first line."""
        return self.root / job_id / logfile.NAME

    def cut(self, job_id: str) -> Path:
        """The record of the gap in the job's log."""
        return self.root / job_id / logfile.CUT

    def files(self, job_id: str) -> Path:
        """The folder that the job finds as `$CORTEX_JOB_DIR`."""
        return self.root / job_id / FILES

    def start_record(self, job_id: str, attempt: int) -> Path:
        """The record that fences an attempt: its creator decides whether the attempt runs."""
        return self.root / job_id / f"start.{attempt}"

    def exit_record(self, job_id: str, attempt: int) -> Path:
        """The record of how an attempt ended."""
        return self.root / job_id / f"exit.{attempt}"

    def job_ids(self) -> list[str]:
        """The jobs that have a folder, in order. Reads the disk.

        Raises:
            OSError: the root cannot be read.
        """
        names = (folder.name for folder in self.root.iterdir())
        return sorted(name for name in names if not name.startswith("."))

    def append_to_log(self, job_id: str, text: str) -> None:
        """Append a line of the platform's own to a job's log, as for a job that never got a worker.
        Creates folder and log if they are missing. Writes to the disk.

        A job can put another file in place of its log. That file is not written to: the operator
        may write where the job may not.

        Raises:
            OSError: the log is not a plain file of the job's alone, or the disk refuses the write.
        """
        path = self.log(job_id)
        path.parent.mkdir(0o700, exist_ok=True)
        with beneath.opened(str(path.parent)) as folder:
            fd = os.open(path.name, _APPEND, 0o644, dir_fd=folder)
            with os.fdopen(fd, "a", encoding="utf-8") as file:
                if not is_own(folder, fd):
                    raise OSError(errno.EINVAL, "not a plain file of the job's alone", str(path))
                file.write(text.rstrip("\n") + "\n")

    def remove(self, job_id: str) -> None:
        """Remove the folder of a job, if it exists, with all that the job left there. Logs a folder
        that cannot be removed, and leaves it. Takes as long as the job left files."""
        folders.remove(self.folder(job_id))
