"""Projects whose environment needs a build that runs the project's own code.

Each project contains a package and the build backend for it. Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

BACKEND = """
import os, pathlib, zipfile
HERE = pathlib.Path(__file__).resolve().parent


def get_requires_for_build_wheel(config_settings=None):
    return []


def build_wheel(directory, config_settings=None, metadata_directory=None):
    exec(compile((HERE / "setup.py").read_text(), "setup.py", "exec"), {"HERE": HERE})
    name, info = "made-1.0-py3-none-any.whl", "made-1.0.dist-info"
    with zipfile.ZipFile(os.path.join(directory, name), "w") as zipped:
        zipped.writestr("made.py", "VALUE = 7")
        zipped.writestr(info + "/METADATA", "Metadata-Version: 2.1\\nName: made\\nVersion: 1.0\\n")
        zipped.writestr(info + "/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        zipped.writestr(info + "/RECORD", "")
    return name
"""
DAEMON = """
import os, pathlib, signal, sys, time


def daemonise(own, *, until="/"):
    '''Start a process in another session, which ignores signals and has no environment.

    The file `own` gets its pid.'''
    own = pathlib.Path(own)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            code = (
                "import os, signal, time\\n"
                "for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):\\n"
                "    signal.signal(number, signal.SIG_IGN)\\n"
                f"open({str(own)!r} + '.new', 'w').write(os.readlink('/proc/self'))\\n"
                f"os.rename({str(own)!r} + '.new', {str(own)!r})\\n"
                "time.sleep(600)\\n"
            )
            for number in (0, 1, 2):  # uv waits until its output is closed
                os.dup2(os.open("/dev/null", os.O_RDWR), number)
            os.chdir("/")
            os.execve(sys.executable, [sys.executable, "-c", code], {})
        os._exit(0)
    while not own.exists():
        time.sleep(0.01)


def hang():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(1)
"""


def project_files(setup: str, name: str = "made") -> dict[str, str]:
    """The files of a project whose package is built by this code.

    Args:
        setup: code that may use the functions of `DAEMON`.
        name: the name of the package; two builds share nothing if their names differ.
    """
    return {
        "requirements.txt": f"./{name}\n",
        f"{name}/pyproject.toml": '[project]\nname = "made"\nversion = "1.0"\n'
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        f"{name}/backend.py": BACKEND,
        f"{name}/setup.py": f"{DAEMON}\n{setup}",
    }


def make_project(folder: Path, setup: str) -> Path:
    """Write such a project into a folder; the folder."""
    for name, text in project_files(setup).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder
