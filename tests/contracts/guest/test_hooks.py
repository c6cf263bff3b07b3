"""What the host may rely on, asked of the real daemon: hooks of a template."""

# `shell=` is a field of ProcessSpec here.
# ruff: noqa: S604

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from pathlib import Path

import pytest

from pandastack import errors
from pandastack.host import identity
from pandastack.host.guest import Guest, ProcessSpec
from pandastack.wire import guest as wire

from .daemons import COUNTING, Daemon, Follower, become, below, run, running, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]


class TestHooks:
    def write(self, tmp_path: Path, name: str, script: str, mode: int = 0o755) -> None:
        (tmp_path / "hooks").mkdir(exist_ok=True)
        (tmp_path / "hooks" / name).write_text("#!/bin/sh\n" + script)
        (tmp_path / "hooks" / name).chmod(mode)

    async def test_before_snapshot_runs_first_and_is_nobodys_process(self, guest: Guest, tmp_path: Path) -> None:
        said = tmp_path / "said"
        self.write(
            tmp_path, "before-snapshot", f'echo "$0 $# $PANDASTACK_REASON $PWD $USER $HOME" > {said}; sleep 0.5; echo done >> {said}\n'
        )
        await asyncio.sleep(0.1)
        sealing = asyncio.create_task(guest.seal(freeze=True, reason="fork"))
        await until(lambda: said.exists() and said.read_text())
        health = await guest.health()
        assert (health.sealed, health.live) == (False, 0)
        assert health.idle_ms >= 100
        assert await guest.list_processes() == []
        assert await sealing == wire.Sealed(live=0, frozen=0)
        user = (await asyncio.to_thread(subprocess.run, ["id", "-un"], capture_output=True, text=True, check=True)).stdout.strip()
        assert said.read_text().splitlines()[0] == f"{tmp_path}/hooks/before-snapshot 0 fork / {user} {os.environ.get('HOME', '/root')}"
        assert said.read_text().endswith("done\n")
        said.write_text("")
        await guest.seal(freeze=True)  # It is sealed already: there is nothing before it.
        assert said.read_text() == ""
        await guest.unseal()

    @pytest.mark.parametrize(
        ("script", "told"),
        [
            ("echo one; echo two >&2; exit 3\n", "ended with exit code 3: one\ntwo"),
            ("kill -9 $$\n", "was ended by signal 9"),
            ("echo slow; sleep 61.25 & sleep 61.25\n", "did not end within 300ms: slow"),
            ("echo slow; setsid sleep 61.25 & trap '' TERM INT; sleep 61.25\n", "did not end within 300ms: slow"),
        ],
        ids=["code", "signal", "slow", "slow tree"],
    )
    async def test_a_before_snapshot_that_fails_leaves_all_as_it_was(
        self, daemon: Daemon, guest: Guest, tmp_path: Path, script: str, told: str
    ) -> None:
        counting = Follower(await guest.run(ProcessSpec(shell=COUNTING, id="counting")))
        self.write(tmp_path, "before-snapshot", script)
        begun = time.monotonic()
        with pytest.raises(errors.HookFailed) as refused:
            await guest.seal(freeze=True, hook_timeout_s=0.3)
        assert time.monotonic() - begun < 5
        assert told in refused.value.message
        assert refused.value.guest_code == "hook_failed"
        health = await guest.health()
        assert (health.sealed, health.frozen) == (False, False)
        size = len(counting.seen)
        await until(lambda: len(counting.seen) > size)
        await guest.signal("counting", 9)
        await until(lambda: not below(daemon.pid))

    async def test_what_cannot_be_started_fails_and_what_may_not_is_none(self, one: Guest, tmp_path: Path) -> None:
        self.write(tmp_path, "before-snapshot", "exit 1\n", mode=0o644)
        await one.seal()
        await one.unseal()
        (tmp_path / "hooks/before-snapshot").write_text("no interpreter")
        (tmp_path / "hooks/before-snapshot").chmod(0o755)
        with pytest.raises(errors.HookFailed, match="exec format error"):
            await one.seal()
        assert not (await one.health()).sealed

    async def test_a_host_that_hangs_up_stops_the_hook_and_nothing_else(self, plain: Daemon, one: Guest, tmp_path: Path) -> None:
        self.write(tmp_path, "before-snapshot", "sleep 61.5 & sleep 61.5\n")
        sealing = asyncio.create_task(one.seal(freeze=True))
        await until(lambda: len(below(plain.pid)) == 3)
        sealing.cancel()
        await until(lambda: not below(plain.pid))
        (tmp_path / "hooks/before-snapshot").unlink()
        health = await one.health()
        assert (health.sealed, health.frozen) == (False, False)
        assert (await run(one, argv=["echo", "on"]))[0] == b"on\n"

    async def test_what_a_hook_leaves_behind_lives_on(self, daemon: Daemon, guest: Guest, tmp_path: Path) -> None:
        self.write(tmp_path, "before-snapshot", "sleep 60 &\n")
        begun = time.monotonic()
        assert await guest.seal(freeze=True) == wire.Sealed(live=0, frozen=1)
        assert time.monotonic() - begun < 2
        await guest.unseal()
        await until(lambda: list(below(daemon.pid).values()) == ["S"])
        assert (await guest.health()).live == 1

    async def test_after_restore_runs_as_the_new_machine_before_anything_else(self, binary: Path, tmp_path: Path) -> None:
        said = tmp_path / "said"
        self.write(
            tmp_path,
            "after-restore",
            f'echo "$PANDASTACK_REASON $NEW $PANDASTACK_SANDBOX_ID $(hostname)" > {said}; wc -c < {tmp_path}/count >> {said}\n',
        )
        with running(binary, "pid1", tmp_path) as daemon:
            guest = await daemon.open()
            await guest.start(ProcessSpec(shell=f"while :; do printf x >> {tmp_path}/count; done", id="counting"))
            await until(lambda: (tmp_path / "count").exists())
            stopped = (await guest.seal(freeze=True)).frozen
            size = (tmp_path / "count").stat().st_size
            report = await become(guest, env={"NEW": "yes"})
            assert said.read_text() == f"restore yes s box-2\n{size}\n"
            assert report.steps["hooks"] == wire.IdentityStep(ok=True, detail="run")
            assert report.steps["processes"].detail == f"{stopped} continued"
            await until(lambda: (tmp_path / "count").stat().st_size > size)
            await guest.close()

    @pytest.mark.parametrize(
        ("script", "told"), [("echo no; exit 4\n", "ended with exit code 4: no"), ("sleep 60 & sleep 60\n", "did not end within 300ms")]
    )
    async def test_an_after_restore_that_fails_leaves_it_frozen(self, binary: Path, tmp_path: Path, script: str, told: str) -> None:
        self.write(tmp_path, "after-restore", script)
        with running(binary, "pid1", tmp_path) as daemon:
            guest = await daemon.open()
            await guest.start(ProcessSpec(shell=COUNTING, id="counting"))
            await guest.seal(freeze=True)
            with pytest.raises(errors.HookFailed, match=told):
                await identity.confirm(guest, identity.fresh("s", "box-2", {}), hook_timeout_s=0.3)
            health = await guest.health()
            assert (health.sealed, health.frozen) == (True, True)
            await until(lambda: set(below(daemon.pid).values()) <= {"T", "Z"})
            # Nobody is told to run a hook on a machine that is not itself.
            (tmp_path / "hooks/after-restore").write_text(f"#!/bin/sh\ntouch {tmp_path}/run\n")
            report = await become(guest, late_s=10)
            assert report.steps["hooks"] == wire.IdentityStep(ok=False, detail="not run: clock failed")
            assert not (tmp_path / "run").exists()
            await identity.confirm(guest, identity.fresh("s", "box-2", {}))
            assert (tmp_path / "run").exists()
            await guest.close()
