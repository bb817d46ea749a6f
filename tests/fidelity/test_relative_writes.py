"""Files that a job writes by a relative path are its own: each job of a version finds the
project as it was deployed, whatever other jobs have written."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

GIVEN = {
    "given.txt": "given\n",
    "data/rows.csv": "1,2\n",
    "helper.py": "X = 1\n",
    "data/deep/a.txt": "a\n",
}

RENAMED = (
    "where a job renamed a folder of the project, its own folder contains only the changed files"
)


def writes(name: str, code: str, **about: object) -> object:
    body = "".join(f"    {line}\n" for line in code.splitlines())
    head = "import glob, os, pathlib, shutil\ndef tree():\n    return sorted(p for p in glob.glob('**', recursive=True) if '__pycache__' not in p)\n"
    return program(
        name,
        f"{head}def task(config):\n    before = tree()\n{body}    return [before, tree()]\n",
        files=GIVEN,
        jobs=2,
        **about,
    )


PROGRAMS = [
    writes("new-file", "open('new', 'w').write('x')"),
    writes("new-file-that-must-not-exist", "open('new', 'x').write('x')"),
    writes("append-to-a-new-file", "open('log.txt', 'a').write('row\\n')"),
    writes("append-to-a-given-file", "open('given.txt', 'a').write('more\\n')"),
    writes("replace-a-given-file", "open('given.txt', 'w').write('new\\n')"),
    writes("replace-by-rename", "open('t', 'w').write('new\\n')\nos.replace('t', 'given.txt')"),
    writes(
        "update-in-place", "with open('given.txt', 'r+') as f:\n    f.seek(2)\n    f.write('X')"
    ),
    writes("new-file-in-a-given-folder", "open('data/new.csv', 'w').write('3\\n')"),
    writes("new-folder", "os.makedirs('out/deep')\nopen('out/deep/f', 'w').write('x')"),
    writes("folder-that-must-not-exist", "os.mkdir('out')"),
    writes("delete-a-file", "os.remove('given.txt')"),
    writes("delete-a-folder", "shutil.rmtree('data')"),
    writes(
        "delete-and-recreate",
        "shutil.rmtree('data')\nos.mkdir('data')\nopen('data/new', 'w').write('x')",
    ),
    writes("rename-a-file", "os.rename('given.txt', 'renamed.txt')"),
    writes(
        "rename-a-folder", "os.rename('data', 'renamed')", differences={"files": {}}, reason=RENAMED
    ),
    writes(
        "rename-a-folder-into-another",
        "os.mkdir('to')\nos.rename('data/deep', 'to/deep')",
        differences={"files": {}},
        reason=RENAMED,
    ),
    writes(
        "rename-a-folder-and-write-in-it",
        "os.rename('data', 'renamed')\nopen('renamed/new', 'w').write('x')\nprint(open('renamed/rows.csv').read())",
        differences={"files": {"renamed/new": b"x"}},
        reason=RENAMED,
    ),
    writes(
        "by-the-path-of-the-code",
        "here = pathlib.Path(__file__).parent\n(here / 'model.pkl').write_bytes(b'x')\n(here / 'given.txt').unlink()",
    ),
    writes(
        "by-an-absolute-path",
        "open(os.path.abspath('new'), 'w').write('x')\nos.remove(os.path.join(os.getcwd(), 'given.txt'))",
    ),
    writes("mode", "os.chmod('given.txt', 0o600)\nprint(oct(os.stat('given.txt').st_mode))"),
    writes(
        "link",
        "os.symlink('given.txt', 'link')\nopen('link', 'a').write('more')\nprint(os.readlink('link'))",
    ),
    writes(
        "hard-link",
        "os.link('given.txt', 'hard')\nopen('hard', 'a').write('more')\nprint(open('hard').read())",
    ),
    writes("time", "os.utime('given.txt', (1, 1))\nprint(os.stat('given.txt').st_mtime)"),
    writes("truncate", "os.truncate('given.txt', 2)\nprint(open('given.txt').read())"),
    writes(
        "memory-map",
        "import mmap\nwith open('given.txt', 'r+b') as f:\n    m = mmap.mmap(f.fileno(), 0)\n    m[:1] = b'G'\n    m.flush()",
    ),
    writes(
        "database",
        "import sqlite3\ndb = sqlite3.connect('db')\ndb.execute('CREATE TABLE t (x)')\ndb.execute('INSERT INTO t VALUES (1)')\ndb.commit()\nprint(list(db.execute('SELECT count(*) FROM t')))\ndb.close()",
    ),
    writes("own-code", "import helper\nopen('helper.py', 'w').write('X = 2\\n')\nprint(helper.X)"),
    writes(
        "code-that-is-written-and-imported",
        "open('made.py', 'w').write('X = 1\\n')\nimport importlib, made\nprint(made.X)",
    ),
    writes("own-task-file", "open(__file__, 'a').write('raise ValueError\\n')"),
    writes("pipe", "os.mkfifo('pipe')\nos.remove('pipe')"),
    writes(
        "empty-the-folder",
        "for p in os.listdir():\n    shutil.rmtree(p) if os.path.isdir(p) else os.remove(p)",
    ),
    writes(
        "many-files",
        "os.mkdir('many')\nfor n in range(200):\n    open(f'many/{n}', 'w').write(str(n))",
    ),
    writes(
        "in-a-child", "import subprocess\nsubprocess.run('echo x > new; rm given.txt', shell=True)"
    ),
    writes(
        "job-folder", "open(os.path.join(os.environ['CORTEX_JOB_DIR'], 'kept'), 'w').write('x')"
    ),
    writes(
        "lock-file",
        "import fcntl\nf = open('lock', 'w')\nfcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\nf.write('mine')",
    ),
    writes("as-it-fails", "open('new', 'w').write('x')\nraise ValueError('x')"),
    writes("as-it-is-killed", "open('new', 'w').write('x')\nos.kill(os.getpid(), 9)"),
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_relative_writes_agree_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)


@pytest.mark.parametrize("program", PROGRAMS)
def test_relative_writes_in_a_copy_agree_with_plain_python(
    program: Program, copying_runner: Runner
) -> None:
    copying_runner.check(replace(program, differences={}, reason=None))
