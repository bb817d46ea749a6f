"""`definition.preload`: which modules are imported ahead, which are refused as harmful, and the
hint that gives the reason."""

from __future__ import annotations

import asyncio

import pytest

from cortex.engines.base import Ended, Engine
from cortex.engines.local import LocalEngine, fork_server
from engines.engine_harness import EngineHarness

IMPORTED_HERE = """
    import os, lib
    def task(config): return lib.pid == os.getpid()
"""
PID = "import os\npid = os.getpid()\n"


pytestmark = pytest.mark.parametrize("local_harness", ["local"], indirect=True)


@pytest.fixture
def harness(local_harness: EngineHarness) -> EngineHarness:
    return local_harness


HARMFUL = {
    "a thread of Python": (
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n",
        "it starts threads",
    ),
    "a thread that Python does not know": (
        "import _thread, time\n_thread.start_new_thread(time.sleep, (60,))\n",
        "it starts threads",
    ),
    "an open file": ("kept = open('/dev/null')\n", "it leaves files or sockets open"),
    "a socket": ("import socket\nkept = socket.socketpair()\n", "it leaves files or sockets open"),
    "a process": (
        "import subprocess\nkept = subprocess.Popen(['sleep', '600'])\n",
        "it starts processes",
    ),
    "a lock of multiprocessing": (
        "import multiprocessing\nkept = multiprocessing.Lock()\n",
        "it maps memory that would be shared",
    ),
    "anonymous shared memory": (
        "import mmap\nkept = mmap.mmap(-1, 4096)\n",
        "it maps memory that would be shared",
    ),
    "a temporary folder": (
        "import atexit, shutil, tempfile\nkept = tempfile.mkdtemp()\nos.rmdir(kept)\n",
        "it makes a temporary file or folder",
    ),
    "an exit handler of Python's own": (
        "import atexit, shutil\natexit.register(shutil.rmtree, '/nowhere', True)\n",
        "it registers the exit handler shutil.rmtree",
    ),
    "a finalizer": (
        "import shutil, weakref\nclass Cache: ...\nkept = Cache()\n"
        "weakref.finalize(kept, shutil.rmtree, '/nowhere', True)\n",
        "it registers the exit handler shutil.rmtree",
    ),
    "an exit handler": (
        "import atexit\ndef bye(): pass\natexit.register(bye)\n",
        "it registers the exit handler lib.bye",
    ),
    "a generator of random numbers": (
        "import random\nkept = random.Random()\n",
        "it keeps a generator of random numbers (random.Random)",
    ),
    "a seed": ("import random\nrandom.seed(7)\n", "it draws from or seeds the random numbers"),
    "a number drawn once": (
        "import random\nsession = random.random()\n",
        "it draws from or seeds the random numbers",
    ),
    "a signal handler": (
        "import signal\nsignal.signal(signal.SIGUSR1, lambda *_: None)\n",
        "it sets a handler for SIGUSR1",
    ),
    "another current folder": ("os.chdir('/')\n", "it changes the current folder"),
    "a file in the project": (
        "open('cache.bin', 'w').close()\n",
        "it writes into the project (cache.bin)",
    ),
    "a folder in the project": (
        "os.makedirs('data/cache')\nopen('data/cache/x', 'w').close()\n",
        "it writes into the project (data)",
    ),
    "an error": ("raise ValueError('no such device')\n", "ValueError: no such device"),
    "an exit": ("raise SystemExit(3)\n", "it cannot be imported: SystemExit: 3"),
    "a crash": ("os.abort()\n", "the interpreter exited during its import"),
}


@pytest.mark.parametrize("kind", HARMFUL)
def test_a_module_that_a_fork_does_not_copy_is_not_imported_ahead(
    harness: EngineHarness, kind: str
) -> None:
    code, why = HARMFUL[kind]
    # The module fails only while it is imported ahead: a job imports it normally.
    harness.bare_environment(
        {"lib": f"{PID}if 'CORTEX_JOB_ID' not in os.environ:\n" + indented(code)}
    )

    async def scenario(engine: Engine) -> None:
        ended = await harness.outcome(engine, harness.attempt(IMPORTED_HERE, preload=("lib",)))
        assert ended.result is True
        [hint] = hints_of_refusals(ended)
        assert hint.startswith("lib is not imported ahead: ")
        assert why in hint

    harness.run(scenario)


def test_files_that_an_import_ahead_makes_in_the_project_are_removed(
    harness: EngineHarness,
) -> None:
    writes = "if 'CORTEX_JOB_ID' not in os.environ:\n    os.makedirs('a/b')\n    open('a/b/c', 'w').close()\n"
    harness.bare_environment({"lib": f"{PID}{writes}"})

    async def scenario(engine: Engine) -> None:
        code = "import os, lib\ndef task(config): return sorted(os.listdir('.'))"
        ended = await harness.outcome(engine, harness.attempt(code, preload=("lib",)))
        assert isinstance(ended.result, list)
        assert "a" not in ended.result

    harness.run(scenario)


def hints_of_refusals(ended: Ended) -> list[str]:
    """The hints about refused modules. A busy machine may add a hint about a slow import."""
    return [hint for hint in ended.hints if " is not imported ahead" in hint]


def indented(code: str) -> str:
    return "".join(f"    {line}\n" for line in code.splitlines())


def test_only_harmful_modules_are_not_imported_ahead(harness: EngineHarness) -> None:
    harness.bare_environment(
        {"first": PID, "harmful": f"{PID}kept = open('/dev/null')\n", "last": PID}
    )

    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt(
            """
            import os, first, harmful, last
            def task(config): return [each.pid == os.getpid() for each in (first, harmful, last)]
            """,
            preload=("first", "harmful", "last"),
        )
        ended = await harness.outcome(engine, attempt)
        assert ended.result == [False, True, False]
        assert [hint.partition(" is not")[0] for hint in hints_of_refusals(ended)] == ["harmful"]

    harness.run(scenario)


def test_an_import_that_takes_too_long_is_done_by_the_jobs(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "PRELOAD_TIMEOUT_S", 0.5)
    hurry = fork_server.ForkServer._on_preload_timeout

    def hurry_an_import(server: fork_server.ForkServer) -> None:
        if server.importing is None:  # the interpreter may take longer than the timeout to start
            asyncio.get_running_loop().call_later(0.05, hurry_an_import, server)
        else:
            hurry(server)

    monkeypatch.setattr(fork_server.ForkServer, "_on_preload_timeout", hurry_an_import)
    slow = f"{PID}import time\nif 'CORTEX_JOB_ID' not in os.environ: time.sleep(600)\n"
    harness.bare_environment({"lib": slow})

    async def scenario(engine: LocalEngine) -> None:
        ended = await harness.outcome(engine, harness.attempt(IMPORTED_HERE, preload=("lib",)))
        assert ended.result is True
        [hint] = hints_of_refusals(ended)
        assert "takes longer than 0.5 s" in hint

    harness.run(scenario)


def test_a_job_that_waits_for_an_import_has_that_reason(harness: EngineHarness) -> None:
    harness.bare_environment({"lib": f"{PID}import time\ntime.sleep(1)\n"})

    async def scenario(engine: Engine) -> None:
        ended = await harness.outcome(engine, harness.attempt(IMPORTED_HERE, preload=("lib",)))
        assert ended.result is False
        assert "waits for lib to be imported ahead (definition.preload)" in harness.wait_reasons

    harness.run(scenario)


def test_modules_are_imported_in_the_order_of_preload(harness: EngineHarness) -> None:
    harness.bare_environment(
        {
            "order": "seen = []\n",
            "a": "import order\norder.seen.append('a')\n",
            "b": "import order\norder.seen.append('b')\n",
        }
    )

    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt(
            "import a, b, order\ndef task(config): return order.seen", preload=("b", "a")
        )
        assert (await harness.outcome(engine, attempt)).result == ["b", "a"]

    harness.run(scenario)


def test_an_import_ahead_has_the_environment_and_the_project_and_its_changes_stay(
    harness: EngineHarness,
) -> None:
    harness.env = {"MODE": "fast"}
    harness.write("WORD = 'own'\n", "settings_of_lib.py")
    harness.bare_environment(
        {
            "lib": "import os, settings_of_lib\nmode = os.environ['MODE']\n"
            "os.environ['SET_BY_LIB'] = settings_of_lib.WORD\n"
        }
    )

    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt(
            "import lib, os\ndef task(config): return [lib.mode, os.environ['SET_BY_LIB']]",
            preload=("lib",),
        )
        ended = await harness.outcome(engine, attempt)
        assert (ended.result, ended.hints) == (["fast", "own"], ())

    harness.run(scenario)


def test_the_output_of_an_import_is_in_the_log_of_each_job(harness: EngineHarness) -> None:
    prints = "import sys, warnings\nprint('no GPU')\nprint('really', file=sys.stderr)\n"
    harness.bare_environment({"lib": f"{prints}warnings.warn('old', UserWarning)\n"})

    async def scenario(engine: Engine) -> None:
        attempts = [
            harness.attempt("import lib\ndef task(config): print('here')", preload=("lib",))
            for _ in range(2)
        ]
        for attempt in attempts:
            await harness.outcome(engine, attempt)
            log = harness.log(attempt)
            assert log.startswith("no GPU\nreally\n")
            assert "UserWarning: old" in log
            assert log.endswith("here\n")

    harness.run(scenario)


def test_random_numbers_of_python_differ_from_job_to_job(harness: EngineHarness) -> None:
    harness.bare_environment({"lib": "import random\nrandom_number = random.random\n"})

    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt("import lib\ndef task(config): ...", preload=("lib",))
        assert (await harness.outcome(engine, attempt)).hints == ()
        code = "import lib, uuid\ndef task(config): return [lib.random_number(), uuid.uuid4().hex]"
        numbers = set()
        for _ in range(3):
            ended = await harness.outcome(engine, harness.attempt(code, preload=("lib",)))
            assert isinstance(ended.result, list)
            numbers.update(ended.result)
        assert len(numbers) == 6

    harness.run(scenario)


def test_threads_that_end_before_a_fork_are_allowed(harness: EngineHarness) -> None:
    """The threads of OpenBLAS end before a fork, and start again when a process uses them."""
    harness.bare_environment(
        {
            "lib": f"""{PID}
import threading
stop = threading.Event()
thread = threading.Thread(target=stop.wait, daemon=True)
thread.start()
def before():
    stop.set()
    thread.join()
os.register_at_fork(before=before)
"""
        }
    )

    async def scenario(engine: Engine) -> None:
        ended = await harness.outcome(engine, harness.attempt(IMPORTED_HERE, preload=("lib",)))
        assert (ended.result, ended.hints) == (False, ())

    harness.run(scenario)


def test_a_job_with_slow_imports_gets_a_hint_to_preload_them(
    harness: EngineHarness,
) -> None:
    harness.bare_environment({"lib": "import time\ntime.sleep(0.4)\nclass Model: ...\n"})
    harness.write("from lib import Model\n", "own.py")

    async def scenario(engine: Engine) -> None:
        ended: Ended = await harness.outcome(
            engine, harness.attempt("import own\ndef task(config): return 1")
        )
        [hint] = ended.hints
        assert " s importing lib: `preload: [lib]`" in hint
        ended = await harness.outcome(
            engine, harness.attempt("import own\ndef task(config): return 1", preload=("lib",))
        )
        assert ended.hints == ()

    harness.run(scenario)


def test_a_program_that_patches_the_standard_library_gets_no_hint_to_preload(
    harness: EngineHarness,
) -> None:
    harness.bare_environment(
        {
            "lib": "import time\ntime.sleep(0.4)\n",
            "gevent": "import sys, types\nmonkey = types.ModuleType('gevent.monkey')\nmonkey.saved = {}\n"
            "sys.modules['gevent.monkey'] = monkey\n",
        }
    )
    code = "from gevent import monkey\nPATCH\nimport lib\ndef task(config): return 1"

    async def scenario(engine: Engine) -> None:
        ended: Ended = await harness.outcome(engine, harness.attempt(code.replace("PATCH", "")))
        assert len(ended.hints) == 1
        patched = code.replace("PATCH", "monkey.saved['socket'] = {}")
        assert (await harness.outcome(engine, harness.attempt(patched))).hints == ()

    harness.run(scenario)


def test_time_of_the_users_own_code_does_not_count_as_an_import(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        code = "import json, time\ntime.sleep(0.4)\ndef task(config): return 1"
        assert (await harness.outcome(engine, harness.attempt(code))).hints == ()

    harness.run(scenario)
