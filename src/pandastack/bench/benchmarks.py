"""What is measured. Each benchmark takes its own samples and the bare tool's turn by turn, so that noise meets both."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from pandastack.bench import bare, memory, server
from pandastack.bench.figures import Row, quantity, timing
from pandastack.errors import PandastackError
from pandastack.sdk.async_sandboxes import AsyncSandbox
from pandastack.sdk.client import AsyncClient
from pandastack.sdk.sandboxes import Sandbox

Say = Callable[[str], None]
_GIB = 1 << 30
_MIB = 1 << 20


def create(template: str, n: int, slots: int, blanks: int, say: Say) -> list[Row]:
    """From the call to the result of the first command: from slots, from blank machines, and with nothing made ahead of time."""
    rows = []
    with bare.work() as work:
        for case, pool, blank, promise in (
            ("with slots", slots, 0, 0.5),
            ("blank machines", 0, blanks, None),
            ("without slots", 0, 0, 1.0),
        ):
            with server.running(slots=pool, blanks=blank, template=template) as running:
                by_hand = bare.bare(template)
                _first_exec(running, template)  # The first one pays for what is loaded once.
                ours, theirs = [], []
                for turn in range(n):
                    say(f"create {case}: {turn + 1} of {n}")
                    if pool:
                        running.wait_for_slots()
                    ours.append(_first_exec(running, template))
                    with by_hand.sandbox(work) as (name, prefix, took):
                        theirs.append(took + by_hand.exec_true(name, prefix))
                rows.append(timing("create", case, "gvisor", ours, theirs, at_most=promise))
    return rows


def _first_exec(running: server.Server, template: str) -> float:
    began = time.perf_counter()
    sandbox = running.client.sandboxes.create(template)
    try:
        sandbox.exec(["/bin/true"], check=True)
        return time.perf_counter() - began
    finally:
        sandbox.kill()


def exec_(template: str, n: int, say: Say) -> list[Row]:
    """One command after another, and many side by side, in one sandbox."""
    with bare.work() as work, server.running(slots=0, template=template) as running:
        by_hand = bare.bare(template)
        with running.client.sandboxes.create(template) as sandbox, by_hand.sandbox(work) as (name, prefix, _):
            for _ in range(3):
                sandbox.exec(["/bin/true"], check=True)
                by_hand.exec_true(name, prefix)
            ours, theirs = [], []
            for turn in range(n):
                say(f"exec: {turn + 1} of {n}")
                began = time.perf_counter()
                sandbox.exec(["/bin/true"], check=True)
                ours.append(time.perf_counter() - began)
                theirs.append(by_hand.exec_true(name, prefix))
            rows = [timing("exec", "/bin/true", "gvisor", ours, theirs, at_most=0.6)]
            say("exec: 200 side by side")
            took, errors = asyncio.run(_parallel_execs(running, sandbox.id, 200))
            rows.append(quantity("exec", "200 in parallel: errors", "gvisor", 200, errors, "errors", at_most=0))
            rows.append(quantity("exec", "200 in parallel: rate", "gvisor", 200, 200 / took, "1/s"))
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


def burst(template: str, n: int, slots: int, say: Say) -> list[Row]:
    """`n` creates at once: how many a second, and how long each took."""
    rows = []
    for case, pool, promise in ((f"{n} at once, {slots} slots", slots, 20.0), (f"{n} at once, no slots", 0, None)):
        with server.running(slots=pool, template=template) as running:
            _first_exec(running, template)
            if pool:
                say("burst: filling the pool")
                running.wait_for_slots()
            say(f"burst: {case}")
            took, each, failed = asyncio.run(_burst(running, template, n))
            rows.append(timing("burst", case, "gvisor", each))
            rows.append(quantity("burst", f"{case}: failed", "gvisor", n, failed, "failed", at_most=0))
            rows.append(quantity("burst", f"{case}: rate", "gvisor", n, (n - failed) / took, "1/s", at_least=promise))
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


def files(template: str, size_mib: int, n: int, say: Say) -> list[Row]:
    """A large file up and down against a plain copy of it, and what that and a flood of output cost the server's memory."""
    with bare.work() as work, server.running(slots=0, template=template) as running:
        source, copy, back = work / "source", work / "copy", work / "back"
        _random_file(source, size_mib)
        disk_mb = 3 * size_mib + 512
        with running.client.sandboxes.create(template, disk_mb=disk_mb) as sandbox:
            sandbox.filesystem.write("/work/small", b"x")
            plain: list[float] = []
            ups: list[float] = []
            downs: list[float] = []
            base = running.forget_peak()
            for turn in range(n):
                say(f"files: {size_mib} MiB, {turn + 1} of {n}")
                plain.append(_timed(lambda: subprocess.run(["/bin/cp", str(source), str(copy)], check=True)))
                copy.unlink()
                ups.append(_timed(lambda: sandbox.filesystem.upload(str(source), "/work/large")))
                downs.append(_timed(lambda: sandbox.filesystem.download("/work/large", str(back))))
                if _differ(source, back):
                    raise PandastackError("the file came back different")
                back.unlink()
            grown = (running.memory_peak_bytes() - base) / _MIB
            rows = [
                timing("files", f"upload {size_mib} MiB", "gvisor", ups, plain, at_most=1 / 0.3),
                timing("files", f"download {size_mib} MiB", "gvisor", downs, plain, at_most=1 / 0.3),
                quantity("files", "server memory growth", "gvisor", n, grown, "MiB", at_most=64),
            ]
            say("files: a command that prints 1 GiB")
            base = running.forget_peak()
            with sandbox.stream(f"head -c {_GIB} /dev/zero") as output:
                seen = sum(len(event.data) for event in output)
            grown = (running.memory_peak_bytes() - base) / _MIB
            rows.append(quantity("files", "1 GiB of output: lost", "gvisor", 1, _GIB - seen, "bytes", at_most=0))
            rows.append(quantity("files", "1 GiB of output: server memory growth", "gvisor", 1, grown, "MiB", at_most=32))
    return rows


def idle(template: str, n: int, say: Say) -> list[Row]:
    """What sandboxes cost that do nothing: memory (shared pages counted once) and CPU."""
    with server.running(slots=0, template=template) as running:
        made: list[Sandbox] = []
        try:
            for turn in range(n):
                say(f"idle: {turn + 1} of {n}")
                made.append(running.client.sandboxes.create(template))
            time.sleep(6)  # Until they count as idle.
            before = [sandbox.metrics().host_cpu_seconds for sandbox in made]
            time.sleep(10)
            used = sum(sandbox.metrics().host_cpu_seconds for sandbox in made) - sum(before)
            share = memory.proportional_bytes([sandbox.metrics().pid for sandbox in made]) / n / _MIB
        finally:
            for sandbox in made:
                sandbox.kill()
    return [
        quantity("idle", f"memory of each of {n}", "gvisor", n, share, "MiB PSS", at_most=30),
        quantity("idle", f"CPU of each of {n}", "gvisor", n, 100 * used / 10 / n, "% of a core", at_most=0.1),
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
