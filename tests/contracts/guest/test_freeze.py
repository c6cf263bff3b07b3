"""What the host may rely on, asked of the real daemon: standing still and going on."""

# `shell=` is a field of ProcessSpec here, and looking at /proc or a directory of three names does not block a loop.
# ruff: noqa: ASYNC240, S604

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from pandastack import errors
from pandastack.host.guest import Guest, ProcessSpec
from pandastack.wire import guest as wire

from .daemons import COUNTING, MIB, Daemon, Follower, become, below, pieces, run, running, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]


class TestFreeze:
    async def test_nothing_moves_and_nothing_is_missing_afterwards(self, daemon: Daemon, guest: Guest) -> None:
        counting = Follower(await guest.run(ProcessSpec(shell=COUNTING, id="counting")))
        await counting.shows(b"20\n")
        sealed = await guest.seal(freeze=True)
        assert sealed.live == 1
        assert sealed.frozen in (1, 2)  # The shell, and a `sleep` unless one had just ended.
        await asyncio.sleep(0.1)
        states, size = below(daemon.pid), len(counting.seen)
        assert states
        assert set(states.values()) <= {"T", "Z"}
        await asyncio.sleep(0.3)
        assert below(daemon.pid) == states
        assert len(counting.seen) == size
        health = await guest.health()
        assert (health.sealed, health.frozen, health.live) == (True, True, 1)
        assert await guest.seal(freeze=True) == sealed
        assert await guest.unseal() == sealed.frozen
        assert await guest.unseal() == 0
        health = await guest.health()
        assert (health.sealed, health.frozen) == (False, False)
        await until(lambda: len(counting.seen) > size + 100)
        await guest.signal("counting", 9)
        await counting.task
        lines = bytes(counting.seen).split()
        assert lines == [b"%d" % n for n in range(1, len(lines) + 1)]

    async def test_a_seal_without_freeze_refuses_until_it_is_taken_back(self, guest: Guest) -> None:
        counting = Follower(await guest.run(ProcessSpec(shell=COUNTING, id="counting")))
        assert await guest.seal() == wire.Sealed(live=1, frozen=0)
        with pytest.raises(errors.GuestError) as refused:
            await run(guest, argv=["true"])
        assert refused.value.guest_code == "sealed"
        size = len(counting.seen)
        await until(lambda: len(counting.seen) > size)
        # A seal may become a freeze, and a freeze no mere seal.
        assert (await guest.seal(freeze=True)).frozen > 0
        assert (await guest.seal()).frozen > 0
        assert await guest.unseal() > 0
        assert (await run(guest, argv=["echo", "on"]))[0] == b"on\n"
        await guest.seal()
        assert await guest.unseal() == 0
        assert (await run(guest, argv=["echo", "on"]))[0] == b"on\n"

    async def test_what_its_user_had_stopped_stays_stopped(self, daemon: Daemon, guest: Guest) -> None:
        await guest.start(ProcessSpec(argv=["sleep", "60"], id="stopped"))
        await guest.signal("stopped", signal.SIGSTOP)
        await until(lambda: list(below(daemon.pid).values()) == ["T"])
        await guest.start(ProcessSpec(argv=["sleep", "60"], id="free"))
        assert (await guest.seal(freeze=True)).frozen == 1
        await until(lambda: set(below(daemon.pid).values()) == {"T"})
        assert await guest.unseal() == 1
        await until(lambda: sorted(below(daemon.pid).values()) == ["S", "T"])
        await guest.signal("stopped", signal.SIGCONT)
        await until(lambda: sorted(below(daemon.pid).values()) == ["S", "S"])

    @pytest.mark.parametrize(
        "foreground",
        ["cat", "python3 -uc 'import sys; [print(line.strip()) for line in sys.stdin]'", "bash --norc -ic cat", "(cat; true) | cat"],
        ids=["cat", "python", "shell in shell", "pipeline"],
    )
    async def test_a_shell_with_job_control_does_not_notice(self, guest: Guest, foreground: str) -> None:
        shell = await guest.run(ProcessSpec(argv=["bash", "--norc", "--noprofile", "-i"], stdin=True, pty=(24, 80), id="shell"))
        screen = Follower(shell)
        await shell.write(b"PS1='pro''mpt> '; sleep 60 &\n")
        await screen.shows(b"prompt> ")
        await shell.write(b"echo rea''dy; " + foreground.encode() + b"; echo st''atus $?\n")
        await screen.shows(b"ready\r\n")  # What is typed earlier may be taken by the shell.
        for turn in range(8):
            at = len(screen.seen)
            await shell.write(b"line %d\n" % turn)
            await screen.shows(b"line %d\r\nline %d\r\n" % (turn, turn), at)
            assert (await guest.seal(freeze=True)).frozen >= 3
            await asyncio.sleep(0.02 * (turn % 3))
            await guest.unseal()
        await shell.write(b"\x04")
        await screen.shows(b"status 0\r\n")
        await shell.write(b"jobs; exit\n")
        await screen.shows(b"\r\nexit\r\n")
        assert b"Stopped" not in screen.seen
        assert b"Running" in screen.seen
        await guest.signal("shell", 9)

    async def test_who_spawns_without_end_is_frozen_completely(self, daemon: Daemon, guest: Guest) -> None:
        spawning = "import os, time\nwhile True:\n    if os.fork() == 0:\n        time.sleep(.02); os._exit(0)\n"
        spawning += "    try:\n        while os.waitpid(-1, os.WNOHANG)[0]: pass\n    except OSError: pass\n"
        # One that is never there for two looks: each process lives for a moment only, and leaves another.
        hopping = "import os\nwhile True:\n    if os.fork(): os._exit(0)\n"
        await guest.start(ProcessSpec(argv=["python3", "-c", spawning], id="spawning"))
        if guest.connection.greeting.pid == 1:
            await guest.start(ProcessSpec(argv=["python3", "-c", hopping], id="hopping"))
        await asyncio.sleep(0.3)
        for _ in range(5):
            assert (await guest.seal(freeze=True)).frozen >= 1
            for _ in range(3):
                assert set(below(daemon.pid).values()) <= {"T", "Z"}
                await asyncio.sleep(0.05)
            assert await guest.unseal() >= 1
            await asyncio.sleep(0.05)
        if guest.connection.greeting.pid != 1:
            await guest.signal("spawning", 9)

    async def test_every_thread_stops_even_without_the_first(self, daemon: Daemon, guest: Guest) -> None:
        headless = "import ctypes, threading, time\ndef spin():\n    while True: pass\n"
        headless += (
            "for _ in range(4): threading.Thread(target=spin).start()\nprint('up', flush=True)\nctypes.CDLL(None).pthread_exit(None)\n"
        )
        stream = await guest.run(ProcessSpec(argv=["python3", "-c", headless], id="headless"))
        await anext(stream)
        waiting = "import ctypes, time\nif ctypes.CDLL(None).syscall(56, 0x4000 | 17, 0, 0, 0, 0) == 0:\n    time.sleep(60)\n"
        if os.uname().machine == "x86_64":  # The parent of a vfork cannot be stopped before its child lets it go.
            await guest.start(ProcessSpec(argv=["python3", "-c", waiting], id="vfork"))
            await until(lambda: "D" in below(daemon.pid).values())
        assert (await guest.seal(freeze=True)).frozen == (3 if os.uname().machine == "x86_64" else 1)
        assert "R" not in below(daemon.pid).values()
        assert "S" not in below(daemon.pid).values()
        await guest.unseal()
        await until(lambda: "R" in below(daemon.pid).values())
        # Nor does the end of the first thread save the others from being killed.
        assert await guest.signal("headless", 9) == 1
        await until(lambda: "R" not in below(daemon.pid).values())

    async def test_a_call_waits_for_the_end_of_the_freeze(self, guest: Guest, tmp_path: Path) -> None:
        await guest.seal(freeze=True)
        data = os.urandom(3 * MIB)
        calls = [
            asyncio.create_task(run(guest, argv=["cat"], stdin=b"in")),
            asyncio.create_task(guest.write_file(str(tmp_path / "file"), pieces(data))),
            asyncio.create_task(guest.resources()),
        ]
        gone = asyncio.create_task(run(guest, argv=["touch", str(tmp_path / "never")]))
        await asyncio.sleep(0.3)
        assert not any(call.done() for call in calls)
        assert not (tmp_path / "file").exists()
        gone.cancel()
        await guest.health()
        await guest.unseal()
        out, written, _ = await asyncio.gather(*calls)
        assert (out[0], written, (tmp_path / "file").read_bytes()) == (b"in", len(data), data)
        assert (await guest.health()).live == 0
        assert not (tmp_path / "never").exists()

    async def test_a_call_of_a_session_that_ended_meanwhile_never_runs(self, daemon: Daemon, tmp_path: Path) -> None:
        old = await daemon.open()
        await old.seal(freeze=True)
        calls = [
            asyncio.create_task(old.start(ProcessSpec(argv=["touch", str(tmp_path / "process")]))),
            asyncio.create_task(old.write_file(str(tmp_path / "file"), b"x")),
            asyncio.create_task(old.mkdir(str(tmp_path / "directory"))),
        ]
        await old.health()  # They have arrived before it.
        old.connection._shut(errors.GuestGone("the host died"))
        new = await daemon.open(fresh=False)
        await asyncio.gather(*calls, return_exceptions=True)
        await new.unseal()
        await run(new, argv=["sleep", "0.2"])
        assert {path.name for path in tmp_path.iterdir()} & {"process", "file", "directory"} == set()
        assert (await new.health()).live == 0
        await new.close()

    async def test_time_in_a_freeze_is_not_a_processs_own(self, guest: Guest) -> None:
        begun = time.monotonic()
        limited = asyncio.create_task(run(guest, argv=["sleep", "60"], timeout_s=1))
        await asyncio.sleep(0.3)
        await guest.seal(freeze=True)
        await asyncio.sleep(1.2)
        await guest.unseal()
        await asyncio.sleep(0.2)
        assert not limited.done()
        assert (await limited)[2].reason == "timeout"
        assert 2.1 < time.monotonic() - begun < 6

    async def test_an_identity_continues_and_ends_the_sessions_of_the_machine_before(self, binary: Path, tmp_path: Path) -> None:
        with running(binary, "pid1", tmp_path) as daemon:
            guest, other = await daemon.open(), await daemon.connect()
            counting = Follower(await guest.run(ProcessSpec(shell=COUNTING, id="counting")))
            await counting.shows(b"20\n")
            stopped = (await guest.seal(freeze=True)).frozen
            foreign = asyncio.create_task(other.write_file(str(tmp_path / "foreign"), b"x"))
            ours = asyncio.create_task(run(guest, shell="echo $NEW; hostname"))
            await other.health()
            report = await become(guest, env={"NEW": "1"}, late_s=10)
            assert not report.steps["clock"].ok
            assert report.steps["processes"] == wire.IdentityStep(ok=False, detail="not continued: clock failed")
            health = await guest.health()
            assert (health.sealed, health.frozen) == (True, True)
            assert set(below(daemon.pid).values()) <= {"T", "Z"}
            assert not ours.done()
            report = await become(guest, env={"NEW": "1"})
            assert all(step.ok for step in report.steps.values())
            assert report.steps["processes"].detail == f"{stopped} continued"
            with pytest.raises(errors.GuestGone):
                await foreign
            assert (await ours)[0] == b"1\nbox-2\n"
            size = len(counting.seen)
            await until(lambda: len(counting.seen) > size)
            assert not (tmp_path / "foreign").exists()
            again = await daemon.connect("new")
            assert not (await again.health()).sealed
            await again.close()
            await guest.close()

    async def test_a_host_over_tcp_takes_over_from_stdin_and_back(self, binary: Path, tmp_path: Path) -> None:
        with running(binary, "pid1", tmp_path) as daemon:
            old, other = await daemon.open(), await daemon.connect()
            await old.seal(freeze=True)
            assert all(step.ok for step in (await become(other)).steps.values())
            with contextlib.suppress(errors.PandastackError):
                await old.health(timeout_s=0.2)
            old.connection._shut(errors.GuestGone("the host died"))
            new = await daemon.open(fresh=False)
            assert (await run(new, argv=["echo", "on"]))[0] == b"on\n"
            await other.close()
            await new.close()

    @pytest.mark.parametrize(
        ("method", "params"),
        [
            ("machine.seal", {"freeze": 1}),
            ("machine.seal", {"freeze": True, "reason": "a b"}),
            ("machine.seal", {"freeze": True, "reason": "x" * 33}),
            ("machine.seal", {"freeze": True, "reason": ""}),
            ("machine.seal", {"freeze": True, "hook_timeout_ms": 0}),
            ("machine.seal", {"freeze": True, "hook_timeout_ms": 120_001}),
            ("machine.seal", {"freeze": True, "hook_timeout_ms": 1.5}),
            ("machine.seal", {"freeze": True, "now": True}),
            ("machine.unseal", {"force": True}),
            ("machine.identity", {"hook_timeout_ms": -1}),
        ],
    )
    async def test_wrong_params_change_nothing(self, one: Guest, method: str, params: dict[str, object]) -> None:
        with pytest.raises(errors.InvalidRequest) as refused:
            await one.connection.request(method, params, wire.Empty, timeout_s=5)
        assert refused.value.guest_code == "invalid"
        health = await one.health()
        assert (health.sealed, health.frozen) == (False, False)
