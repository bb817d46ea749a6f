"""asyncio: loops that the program closes, and loops that it does not close."""

from __future__ import annotations

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

ASYNC = [
    program(
        "run",
        "import asyncio\nasync def main():\n    await asyncio.sleep(0.01)\n    return 1\ndef task(config):\n    return asyncio.run(main())\n",
    ),
    program(
        "loop-left-open",
        "import asyncio\nloop = asyncio.new_event_loop()\nasync def main():\n    return 1\ndef task(config):\n    return loop.run_until_complete(main())\n",
    ),
    program(
        "tasks-left-pending",
        """
        import asyncio
        async def wait():
            try:
                await asyncio.sleep(60)
            finally:
                print('cancelled')
        async def main():
            asyncio.create_task(wait(), name='waiting')
            await asyncio.sleep(0)
            return 1
        def task(config):
            return asyncio.run(main())
        """,
    ),
    program(
        "tasks-left-pending-in-an-open-loop",
        """
        import asyncio
        loop = asyncio.new_event_loop()
        async def wait():
            await asyncio.sleep(60)
        async def main():
            loop.kept = asyncio.create_task(wait(), name='waiting')
            await asyncio.sleep(0)
        def task(config):
            loop.run_until_complete(main())
        """,
    ),
    program(
        "error-never-retrieved",
        """
        import asyncio
        async def fail():
            raise ValueError('nobody asks')
        async def main():
            asyncio.create_task(fail(), name='failing')
            await asyncio.sleep(0.01)
        def task(config):
            asyncio.run(main())
        """,
    ),
    program(
        "subprocess",
        """
        import asyncio
        async def main():
            p = await asyncio.create_subprocess_exec('sh', '-c', 'echo words; exit 3', stdout=-1)
            out, _ = await p.communicate()
            return [out.decode(), p.returncode]
        def task(config):
            return asyncio.run(main())
        """,
    ),
    program(
        "subprocess-that-runs-at-exit",
        """
        import asyncio
        async def main():
            p = await asyncio.create_subprocess_exec('sleep', '0.2')
            return p.returncode
        def task(config):
            return asyncio.run(main())
        """,
    ),
    program(
        "in-a-thread",
        """
        import asyncio, time
        async def main():
            return await asyncio.to_thread(sum, [1, 2])
        def task(config):
            return asyncio.run(main())
        """,
    ),
    program(
        "in-processes",
        """
        import asyncio
        from concurrent.futures import ProcessPoolExecutor
        async def main():
            with ProcessPoolExecutor(1) as pool:
                return await asyncio.get_running_loop().run_in_executor(pool, abs, -3)
        def task(config):
            return asyncio.run(main())
        """,
    ),
    program(
        "server-and-client",
        """
        import asyncio
        async def answer(reader, writer):
            writer.write((await reader.readline()).upper())
            writer.close()
        async def main():
            server = await asyncio.start_server(answer, '127.0.0.1', 0)
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b'words\\n')
            found = (await reader.read()).decode()
            writer.close()
            return found
        def task(config):
            return asyncio.run(main())
        """,
    ),
    program(
        "signals",
        """
        import asyncio, os, signal
        async def main():
            stop = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, stop.set)
            os.kill(os.getpid(), signal.SIGUSR1)
            await stop.wait()
            return 'stopped'
        def task(config):
            return asyncio.run(main())
        """,
    ),
    program(
        "interrupt",
        """
        import asyncio, os, signal
        async def main():
            try:
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(60)
            finally:
                print('cleaned up')
        def task(config):
            asyncio.run(main())
        """,
    ),
    program(
        "debug-mode",
        "import asyncio\nasync def main():\n    return asyncio.get_running_loop().get_debug()\ndef task(config):\n    return asyncio.run(main(), debug=True)\n",
    ),
    program(
        "is-there-a-loop",
        """
        import asyncio
        def task(config):
            try:
                asyncio.get_running_loop()
            except RuntimeError as error:
                return str(error)
        """,
    ),
]


@pytest.mark.parametrize("program", ASYNC)
def test_asyncio_agrees_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)
