"""What the host may rely on, asked of the real daemon: the warm interpreter."""

# Looking at /proc or a directory of three names does not block a loop.
# ruff: noqa: ASYNC221

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pandastack.host.guest import Guest, ProcessSpec

from .daemons import Daemon, below, run, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]


class TestWarm:
    @pytest.fixture
    async def warm(self, daemon: Daemon, guest: Guest) -> AsyncIterator[Guest]:
        if os.geteuid() != 0:
            pytest.skip("the warm interpreter's directory needs root")
        started = await guest.warm(["pandastack:python", "json"], env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"})
        assert len(daemon.warm_folders()) == 1
        yield guest
        # Only the daemon dies with the test; the interpreter would live on, and keep its socket.
        await guest.signal(started.id, signal.SIGKILL)
        await until(lambda: not daemon.warm_folders())

    CODES = (
        "import sys; print(sys.argv, __name__, sys.path[0] == '')",
        "print(sorted(globals()))",
        "1/0",
        "def f(:",
        "import sys; sys.exit('bye')",
        "import sys; sys.exit(300)",
        "raise SystemExit",
        "import os; os.kill(os.getpid(), 15)",
        "raise KeyboardInterrupt",
        "import os; os.write(1, b'a'); print('b', end=''); os._exit(3)",
        "import atexit; atexit.register(print, 'last'); print('first')",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(.1), print('t'))).start(); print('m')",
        "import sys; print(sys.stdin.read().upper()); print('e', file=sys.stderr)",
        "import signal; print(signal.getsignal(signal.SIGINT).__name__, signal.getsignal(signal.SIGCHLD))",
        "import os; print(os.getsid(0) == os.getpid(), os.getcwd(), os.environ['X'], sorted(os.listdir('/proc/self/fd')))",
        "try:\n    {}['a']\nexcept KeyError:\n    raise ValueError('b')",
        "class A:\n    def __del__(self): print('gone', json)\nimport json\na = A()\nprint('end')",
        "class A:\n    def __del__(self): print('gone')\na = [A()]; a.append(a)",
        "import os, threading, time\ndef f():\n    time.sleep(.1); os.write(1, b'late')\nthreading.Thread(target=f).start()",
        "import atexit\nclass F:\n    def __call__(self): 1/0\n    def __repr__(self): return 'F'\n"
        "atexit.register(print, 'after'); atexit.register(F())",
        "import sys, atexit; atexit.register(lambda: print('x', file=sys.stderr)); sys.exit(['a'])",
        "import sys; sys.exit(-1)",
        "import sys; sys.exit(1 << 70)",
        "import os; print('x'); os.close(1)",
        "import sys; sys.excepthook = lambda *a: print('mine', a[0]); 1/0",
        "import sys\ndef f(*a): raise KeyError('second')\nsys.excepthook = f\n1/0",
        "import multiprocessing as m\nif __name__ == '__main__':\n    p = m.get_context('fork').Process(target=print, args=('c',))\n"
        "    p.start(); p.join(); print(p.exitcode)",
        "import subprocess; print(subprocess.run(['echo', 'a'], capture_output=True).stdout); subprocess.Popen(['sleep', '0'])",
        "from concurrent.futures import ThreadPoolExecutor as T; T(2).submit(lambda: print('pool'))",
        "import os\nif os.fork() == 0:\n    print('child')\nelse:\n    os.wait(); print('parent')",
        "import ctypes; ctypes.CDLL(None).printf(b'from C')",
        "import logging, sys; logging.basicConfig(stream=sys.stdout); logging.warning('w')",
        "import time; print(time.tzname, time.localtime(0)[:6])",
        "f = open(1, 'w', closefd=False); f.write('kept')",
        "import sys; f = open(1, 'w', closefd=False); f.write('by another'); sys.kept = f",
        "import tempfile; d = tempfile.TemporaryDirectory(); t = tempfile.NamedTemporaryFile('w'); t.write('a')",
    )

    async def test_a_fork_behaves_as_a_fresh_python(self, warm: Guest) -> None:
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        for code in self.CODES:
            common = {"env": {"PATH": path, "X": "1", "TZ": "Asia/Tokyo"}, "stdin": b"in", "cwd": "/tmp"}
            forked = await run(warm, python=code, **common)
            fresh = await run(warm, argv=["python3", "-c", code], **common)
            assert forked[2].id in {entry.id for entry in await warm.list_processes() if entry.warm}, code
            assert forked[:2] == fresh[:2], code
            assert (forked[2].exit_code, forked[2].signal) == (fresh[2].exit_code, fresh[2].signal), code
        assert (await warm.health()).baked == 1

    async def test_forks_differ_in_random_numbers_and_can_be_killed(self, warm: Guest) -> None:
        path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
        outs = [await run(warm, python="import random; print(random.random())", env=path) for _ in range(3)]
        assert len({out for out, _, _ in outs}) == 3
        _, _, end = await run(warm, python="import time; time.sleep(60)", env=path, timeout_s=0.2)
        assert end.reason == "timeout"
        assert (await run(warm, python="print(1)", env=path))[0] == b"1\n"

    async def test_a_fork_that_left_its_session_is_killed_with_its_tree(self, warm: Guest) -> None:
        path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
        mark = f"left-{os.getpid()}-{id(self)}"
        leave = "import os, time, ctypes\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        leave += f"        ctypes.CDLL(None).prctl(15, b'{mark[:15]}')\n        time.sleep(60)\n    os._exit(0)\n"
        leave += "os.wait()\nprint('left', flush=True)\ntime.sleep(60)"
        async with await warm.run(ProcessSpec(python=leave, env=path)) as stream:
            assert (await anext(stream)).data.startswith(b"left")
            assert await warm.signal(stream.id, signal.SIGKILL) >= 2
            assert (await stream.wait()).reason == "killed"
        assert mark[:15] not in subprocess.run(["ps", "axo", "comm"], capture_output=True, text=True, check=True).stdout
        assert (await run(warm, python="print(1)", env=path))[0] == b"1\n"

    async def test_it_is_frozen_with_its_spare_and_serves_on(self, daemon: Daemon, warm: Guest) -> None:
        path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
        for _ in range(3):
            assert (await warm.seal(freeze=True)).frozen == 2
            await until(lambda: set(below(daemon.pid).values()) == {"T"})
            waiting = asyncio.create_task(run(warm, python="print(1)", env=path))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            assert await warm.unseal() == 2
            out, _, end = await waiting
            assert out == b"1\n"
            assert end.id in {entry.id for entry in await warm.list_processes() if entry.warm}
            await asyncio.sleep(0.3)  # The next spare.

    async def test_the_spare_is_nobodys_process_and_is_replaced(self, warm: Guest) -> None:
        path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
        health = await warm.health()
        assert (health.live, health.baked) == (0, 1)
        parent = int((await run(warm, python="import os; print(os.getppid())", env=path))[0])
        for _ in range(3):
            out, _, _ = await run(warm, python="import os, time; time.sleep(.3); print(os.getppid())", env=path)
            assert int(out) == parent
        outs = await asyncio.gather(*(run(warm, python=f"print({n})", env=path) for n in range(20)))
        assert [out for out, _, _ in outs] == [b"%d\n" % n for n in range(20)]
        assert (await warm.health()).live == 0
