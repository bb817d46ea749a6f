"""Projects whose environment takes a build that runs code of theirs: a package, with its backend, that lies in the
project. Nothing is downloaded.
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
    '''Leave a process of another session, which ignores signals and has no environment; its pid is in a file.'''
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
            for number in (0, 1, 2):  # uv waits for the end of its output
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


def files(setup: str, name: str = "made") -> dict[str, str]:
    """A project that is built by this code, which may use what is in `DAEMON`.

    Args:
        name: another one where two builds shall have nothing in common.
    """
    return {
        "requirements.txt": f"./{name}\n",
        f"{name}/pyproject.toml": '[project]\nname = "made"\nversion = "1.0"\n'
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        f"{name}/backend.py": BACKEND,
        f"{name}/setup.py": f"{DAEMON}\n{setup}",
    }


def laid_out(folder: Path, setup: str) -> Path:
    """The same in a folder."""
    for name, text in files(setup).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder
