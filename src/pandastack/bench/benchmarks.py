"""What is measured. Each benchmark takes its own samples and the bare tool's turn by turn, so that noise meets both."""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pandastack.bench import memory, server
from pandastack.bench.figures import Row, quantity, timing
from pandastack.bench.setting import Setting
from pandastack.errors import PandastackError
from pandastack.sdk.async_sandboxes import AsyncSandbox
from pandastack.sdk.client import AsyncClient
from pandastack.sdk.sandboxes import Sandbox

_GIB = 1 << 30
_MIB = 1 << 20


def create(setting: Setting, n: int, slots: int, blanks: int) -> list[Row]:
    """From the call to the result of the first command: from slots, from blank machines, and with nothing made ahead of time."""
    rows = []
    for case, pool, blank in (("with slots", slots, 0), ("blank machines", 0, blanks), ("without slots", 0, 0)):
        with setting.running(slots=pool, blanks=blank) as running:
            first_exec(running, setting.template)  # The first one pays for what is loaded once.
            ours, theirs = [], []
            for turn in range(n):
                setting.say(f"create {case}: {turn + 1} of {n}")
                if pool:
                    running.wait_for_slots()
                ours.append(first_exec(running, setting.template))
                if pool:
                    running.wait_for_slots()  # The bare tool has the machine to itself, too.
                theirs.append(setting.bare.create_and_exec())
            rows.append(timing("create", case, setting.runtime, ours, theirs, promise=setting.promise("create", case)))
    return rows


def first_exec(running: server.Server, template: str) -> float:
    began = time.perf_counter()
    sandbox = running.client.sandboxes.create(template)
    try:
        sandbox.exec(["/bin/true"], check=True)
        return time.perf_counter() - began
    finally:
        sandbox.kill()


def exec_(setting: Setting, n: int) -> list[Row]:
    """One command after another, and many side by side, in one sandbox."""
    runtime = setting.runtime
    with setting.running() as running, running.client.sandboxes.create(setting.template) as sandbox, setting.bare.session() as by_hand:
        for _ in range(3):
            sandbox.exec(["/bin/true"], check=True)
            by_hand()
        ours, theirs = [], []
        for turn in range(n):
            setting.say(f"exec: {turn + 1} of {n}")
            ours.append(_timed(lambda: sandbox.exec(["/bin/true"], check=True)))
            theirs.append(by_hand())
        rows = [timing("exec", "/bin/true", runtime, ours, theirs, promise=setting.promise("exec", "/bin/true"))]
        setting.say("exec: 200 side by side")
        took, errors = asyncio.run(_parallel_execs(running, sandbox.id, 200))
        none = setting.promise("exec", "errors in parallel")
        rows.append(quantity("exec", "200 in parallel: errors", runtime, 200, errors, "errors", promise=none))
        rows.append(quantity("exec", "200 in parallel: rate", runtime, 200, 200 / took, "1/s"))
    return rows


async def _parallel_execs(running: server.Server, sandbox_id: str, count: int) -> tuple[float, int]:
    async with AsyncClient(api_url=running.url, api_key=running.token) as client:
        sandbox = await AsyncSandbox.get(sandbox_id, client=client)

        async def one(number: int) -> bool:
            try:
                return (await sandbox.exec(f"echo {number}")).stdout == f"{number}\n"
            except PandastackError:
                return False

        began = time.perf_counter()
        right = await asyncio.gather(*(one(number) for number in range(count)))
        return time.perf_counter() - began, count - sum(right)


def burst(setting: Setting, n: int, slots: int) -> list[Row]:
    """`n` creates at once: how many a second, and how long each took."""
    rows, runtime = [], setting.runtime
    for case, pool in ((f"{n} at once, {slots} slots", slots), (f"{n} at once, no slots", 0)):
        with setting.running(slots=pool) as running:
            first_exec(running, setting.template)
            if pool:
                setting.say("burst: filling the pool")
                running.wait_for_slots()
            setting.say(f"burst: {case}")
            took, each, failed = asyncio.run(_burst(running, setting.template, n))
            none, rate = setting.promise("burst", "failed"), setting.promise("burst", "rate with slots", if_=pool > 0)
            rows.append(timing("burst", case, runtime, each))
            rows.append(quantity("burst", f"{case}: failed", runtime, n, failed, "failed", promise=none))
            rows.append(quantity("burst", f"{case}: rate", runtime, n, (n - failed) / took, "1/s", promise=rate))
    return rows


async def _burst(running: server.Server, template: str, n: int) -> tuple[float, list[float], int]:
    async with AsyncClient(api_url=running.url, api_key=running.token) as client:
        made: list[AsyncSandbox] = []

        async def one() -> float:
            began = time.perf_counter()
            made.append(await client.sandboxes.create(template))
            return time.perf_counter() - began

        began = time.perf_counter()
        outcomes = await asyncio.gather(*(one() for _ in range(n)), return_exceptions=True)
        took = time.perf_counter() - began
        await asyncio.gather(*(sandbox.kill() for sandbox in made))
        each = [outcome for outcome in outcomes if isinstance(outcome, float)]
        return took, each, n - len(each)


def files(setting: Setting, size_mib: int, n: int) -> list[Row]:
    """A large file up and down against a plain copy of it, and what that and a flood of output cost the server's memory."""
    runtime, promise = setting.runtime, setting.promise
    with tempfile.TemporaryDirectory(prefix="pandastack-bench-", dir="/var/tmp") as folder, setting.running() as running:
        work = Path(folder)
        source, copy, back = work / "source", work / "copy", work / "back"
        _random_file(source, size_mib)
        disk_mb = 3 * size_mib + 512
        with running.client.sandboxes.create(setting.template, disk_mb=disk_mb) as sandbox:
            sandbox.filesystem.write("/work/small", b"x")
            plain: list[float] = []
            ups: list[float] = []
            downs: list[float] = []
            base = running.forget_peak()
            for turn in range(n):
                setting.say(f"files: {size_mib} MiB, {turn + 1} of {n}")
                plain.append(_timed(lambda: subprocess.run(["/bin/cp", str(source), str(copy)], check=True)))
                copy.unlink()
                ups.append(_timed(lambda: sandbox.filesystem.upload(str(source), "/work/large")))
                downs.append(_timed(lambda: sandbox.filesystem.download("/work/large", str(back))))
                if _differ(source, back):
                    raise PandastackError("the file came back different")
                back.unlink()
            grown = (running.memory_peak_bytes() - base) / _MIB
            rows = [
                timing("files", f"upload {size_mib} MiB", runtime, ups, plain, promise=promise("files", "upload")),
                timing("files", f"download {size_mib} MiB", runtime, downs, plain, promise=promise("files", "download")),
                quantity("files", "server memory growth", runtime, n, grown, "MiB", promise=promise("files", "server memory growth")),
            ]
            setting.say("files: a command that prints 1 GiB")
            base = running.forget_peak()
            with sandbox.stream(f"head -c {_GIB} /dev/zero") as output:
                seen = sum(len(event.data) for event in output)
            grown = (running.memory_peak_bytes() - base) / _MIB
            lost, growth = promise("files", "output lost"), promise("files", "server memory growth for output")
            rows.append(quantity("files", "1 GiB of output: lost", runtime, 1, _GIB - seen, "bytes", promise=lost))
            rows.append(quantity("files", "1 GiB of output: server memory growth", runtime, 1, grown, "MiB", promise=growth))
    return rows


def idle(setting: Setting, n: int) -> list[Row]:
    """What sandboxes cost that do nothing: memory (shared pages counted once; and what of it is their own) and CPU."""
    runtime = setting.runtime
    with setting.running() as running:
        made: list[Sandbox] = []
        try:
            for turn in range(n):
                setting.say(f"idle: {turn + 1} of {n}")
                made.append(running.client.sandboxes.create(setting.template))
            time.sleep(6)  # Until they count as idle.
            before = [sandbox.metrics().host_cpu_seconds for sandbox in made]
            time.sleep(10)
            used = sum(sandbox.metrics().host_cpu_seconds for sandbox in made) - sum(before)
            cost = memory.cost(made)
        finally:
            for sandbox in made:
                sandbox.kill()
    return [
        *memory.rows("idle", f"memory of each of {n}", runtime, n, cost, promise=setting.promise("idle", "memory")),
        quantity("idle", f"CPU of each of {n}", runtime, n, 100 * used / 10 / n, "% of a core", promise=setting.promise("idle", "CPU")),
    ]


def _timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _random_file(path: Path, size_mib: int) -> None:
    with Path("/dev/urandom").open("rb") as source, path.open("wb") as target:
        for _ in range(size_mib):
            target.write(source.read(_MIB))


def _differ(one: Path, other: Path) -> bool:
    return subprocess.run(["/usr/bin/cmp", "--silent", str(one), str(other)], check=False).returncode != 0
