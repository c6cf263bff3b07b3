"""What the host may rely on, asked of the real daemon: programs, their input, output, signals and ends."""

# `shell=` is a field of ProcessSpec here, and looking at /proc or a directory of three names does not block a loop.
# ruff: noqa: ASYNC110, ASYNC221, S604

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pandastack import errors
from pandastack.host.guest import Guest, ProcessSpec

from .daemons import MIB, Daemon, collect, pieces, run, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]


class TestProcesses:
    async def test_run_separates_outputs_and_reports_the_code(self, guest: Guest) -> None:
        out, err, end = await run(guest, shell="printf out; printf err >&2; exit 7")
        assert (out, err, end.exit_code, end.reason, end.code) == (b"out", b"err", 7, "exited", 7)
        assert (end.stdout_bytes, end.stderr_bytes) == (3, 3)

    async def test_signal_is_no_exit_code(self, guest: Guest) -> None:
        _, _, end = await run(guest, shell="kill -TERM $$")
        assert (end.exit_code, end.signal, end.reason, end.code) == (None, 15, "signaled", 143)

    async def test_signals_are_not_ignored_by_inheritance(self, guest: Guest) -> None:
        out, _, _ = await run(guest, argv=["grep", "-E", "^Sig(Ign|Blk)", "/proc/self/status"])
        assert all(int(line.split()[1], 16) == 0 for line in out.splitlines()), out

    async def test_environment_directory_and_user(self, guest: Guest) -> None:
        out, _, _ = await run(guest, shell='echo "$A $HOME $USER $PWD"', env={"A": "ä b"}, cwd="/tmp")
        assert out.decode().split("\n")[0] == "ä b /root root /tmp"

    @pytest.mark.skipif(os.geteuid() != 0, reason="another user needs root")
    async def test_another_user_has_its_ids_and_groups(self, guest: Guest) -> None:
        out, _, _ = await run(guest, argv=["id", "-un"], user="nobody")
        assert out == b"nobody\n"

    async def test_capabilities_are_bounded(self, guest: Guest) -> None:
        out, _, _ = await run(guest, argv=["grep", "CapBnd", "/proc/self/status"])
        assert int(out.split()[1], 16) & ~0xA80405FB == 0

    @pytest.mark.parametrize(
        ("spec", "code", "errno"),
        [
            ({"argv": ["no-such-program"]}, "not_executable", 2),
            ({"argv": ["/etc/passwd"]}, "not_executable", 13),
            ({"argv": ["true"], "cwd": "/nowhere"}, "bad_cwd", 2),
            ({"argv": ["true"], "user": "nobody-like-this"}, "unknown_user", None),
            ({"argv": ["true"], "shell": "true"}, "invalid", None),
            ({"argv": ["a\0b"]}, "invalid", None),
        ],
    )
    async def test_what_cannot_start_is_a_typed_error(self, one: Guest, spec: dict[str, object], code: str, errno: int | None) -> None:
        with pytest.raises(errors.InvalidRequest) as caught:
            await run(one, **spec)
        assert (caught.value.guest_code, caught.value.guest_errno) == (code, errno)
        assert (await one.health()).live == 0

    async def test_stdin_at_once_and_streamed(self, guest: Guest) -> None:
        assert (await run(guest, argv=["cat"], stdin=b"\0\xff" * 30_000))[0] == b"\0\xff" * 30_000
        data = os.urandom(5 * MIB)
        async with await guest.run(ProcessSpec(argv=["cat"], stdin=True)) as stream, asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(collect(stream))
            async for piece in pieces(data):
                await stream.write(piece)
            stream.end_input()
        assert reader.result()[0] == data

    async def test_stdin_of_a_started_process(self, one: Guest) -> None:
        started = await one.start(ProcessSpec(argv=["cat"], stdin=True))
        assert await one.write_stdin(started.id, b"one ") == 4
        await one.write_stdin(started.id, b"two", close=True)
        assert (await collect(await one.attach(started.id)))[0] == b"one two"

    async def test_pty_is_a_terminal_of_the_given_size(self, guest: Guest) -> None:
        async with await guest.run(ProcessSpec(shell="tty; stty size; read x; stty size; echo $TERM", stdin=True, pty=(40, 90))) as stream:
            seen = b""
            async for piece in stream:
                seen += piece.data
                if b"40 90\r\n" in seen and b"go" not in seen:
                    await guest.resize(stream.id, 50, 100)
                    await stream.write(b"go\n")
        assert b"/dev/pts/" in seen
        assert b"50 100\r\nxterm-256color\r\n" in seen
        assert stream.exit.exit_code == 0

    async def test_background_child_delays_the_end_only_briefly(self, guest: Guest) -> None:
        started = time.monotonic()
        out, _, end = await run(guest, shell="echo now; sleep 30 &")
        assert (out, end.exit_code) == (b"now\n", 0)
        assert time.monotonic() - started < 5
        await guest.signal(end.id, signal.SIGKILL)

    async def test_timeout_kills_the_tree(self, guest: Guest, tmp_path: Path) -> None:
        mark = f"31{os.getpid()}.5"
        _, _, end = await run(guest, shell=f"sleep {mark} & sleep {mark}", timeout_s=0.3)
        assert (end.reason, end.signal) == ("timeout", 9)
        assert mark not in subprocess.run(["ps", "axo", "args"], capture_output=True, text=True, check=True).stdout

    async def test_kill_reaches_a_daemon_that_left_the_session(self, guest: Guest) -> None:
        mark = f"32{os.getpid()}.5"
        leave = f"setsid sh -c '(setsid sleep {mark} </dev/null >/dev/null 2>&1 &)' & wait; echo left; sleep 60"
        async with await guest.run(ProcessSpec(shell=leave)) as stream:
            assert (await anext(stream)).data == b"left\n"
            assert await guest.signal(stream.id, signal.SIGKILL) >= 2
            assert (await stream.wait()).reason == "killed"
        assert mark not in subprocess.run(["ps", "axo", "args"], capture_output=True, text=True, check=True).stdout

    async def test_orphans_are_reaped(self, daemon: Daemon, guest: Guest) -> None:
        await run(guest, shell="for i in 1 2 3 4 5; do (true &) ; done")
        children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children")
        await until(lambda: not children.read_text().split())

    async def test_two_hundred_at_once(self, guest: Guest) -> None:
        ends = await asyncio.gather(*(run(guest, shell=f"echo {n}; exit {n % 100}") for n in range(200)))
        assert [(out, end.exit_code) for out, _, end in ends] == [(f"{n}\n".encode(), n % 100) for n in range(200)]
        assert (await guest.health()).live == 0

    async def test_ids_are_the_callers_and_unique(self, one: Guest) -> None:
        await one.start(ProcessSpec(argv=["sleep", "30"], id="mine-1"))
        with pytest.raises(errors.Conflict):
            await one.start(ProcessSpec(argv=["true"], id="mine-1"))
        listed = {entry.id: entry for entry in await one.list_processes()}
        assert (listed["mine-1"].running, listed["mine-1"].argv) == (True, ["sleep", "30"])
        await one.signal("mine-1", signal.SIGTERM)
        assert (await one.wait("mine-1")).signal == 15
        with pytest.raises(errors.ProcessNotFound):
            await one.wait("unknown")

    async def test_finished_processes_stay_for_a_while(self, one: Guest) -> None:
        for n in range(80):
            await run(one, argv=["echo", str(n)])
        async with asyncio.timeout(10):
            while len(kept := await one.list_processes()) > 66:
                await asyncio.sleep(0.05)
        assert len(kept) >= 60
        assert (await collect(await one.attach(kept[-1].id)))[0] == b"79\n"

    async def test_activity_is_announced(self, one: Guest) -> None:
        seen: list[int] = []
        one.connection.on_activity = seen.append
        started = await one.start(ProcessSpec(argv=["sleep", "30"]))
        await until(lambda: seen == [1])
        await one.signal(started.id, signal.SIGKILL)
        await until(lambda: seen == [1, 0])


class TestOutput:
    async def test_a_gibibyte_passes_in_bounded_memory(self, plain: Daemon, one: Guest) -> None:
        total, expected = 0, 1 << 30
        async for piece in await one.run(ProcessSpec(shell=f"head -c {expected} /dev/zero")):
            assert piece.offset == total
            total += len(piece.data)
        assert total == expected
        assert plain.rss_mib() < 64

    async def test_a_slow_reader_pauses_the_process_and_loses_nothing(self, one: Guest) -> None:
        size = 40 * MIB
        stream = await one.run(ProcessSpec(shell=f"seq 1 100000000 | head -c {size}; echo done >&2", output_limit_bytes=MIB))
        first = await anext(stream)
        await asyncio.sleep(0.5)
        assert (await one.output(stream.id, 1, 0)).next < 10 * MIB
        seen = len(first.data)
        async for piece in stream:
            if piece.channel == 1:
                assert piece.offset == seen
                seen += len(piece.data)
        assert seen == size

    async def test_attach_again_goes_on_at_the_offset(self, plain: Daemon, one: Guest) -> None:
        started = await one.start(ProcessSpec(shell="seq 1 300000; read x; seq 1 10", stdin=True))
        expected = subprocess.run("seq 1 300000; seq 1 10", shell=True, capture_output=True, check=True).stdout  # noqa: S602
        seen = b""
        async for piece in await one.attach(started.id):
            seen += piece.data
            if len(seen) > 500_000:
                break
        await one.close()
        again = await plain.open()
        stream = await again.attach(started.id, stdout_offset=len(seen))
        await again.write_stdin(started.id, b"\n", close=True)
        async for piece in stream:
            assert piece.offset == len(seen)
            seen += piece.data
        assert seen == expected
        await again.close()

    async def test_without_reader_the_oldest_bytes_go(self, one: Guest) -> None:
        started = await one.start(ProcessSpec(shell=f"head -c {5 * MIB} /dev/zero", output_limit_bytes=MIB))
        end = await one.wait(started.id)
        assert end.stdout_bytes == 5 * MIB
        stream = await one.attach(started.id, stdout_offset=0)
        assert stream.started.stdout.first >= 3 * MIB
        offsets = [(piece.offset, len(piece.data)) async for piece in stream]
        assert offsets[0][0] == stream.started.stdout.first
        assert sum(offsets[-1]) == 5 * MIB

    async def test_detached_runs_live_on_or_die_as_asked(self, one: Guest) -> None:
        kept = await one.run(ProcessSpec(argv=["sleep", "30"], id="kept"))
        killed = await one.run(ProcessSpec(argv=["sleep", "30"], id="killed", kill_on_detach=True))
        kept.close()
        killed.close()
        assert (await one.wait("killed", timeout_s=10)).signal == 9
        assert {entry.id: entry.running for entry in await one.list_processes()}["kept"]
