"""What microVMs promise beside the contract of every runtime: what they share, what they see of the host, what they say."""

# ruff: noqa: ASYNC240 - what is read is short, and in /proc or a folder of the test
from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from pandastack.errors import RuntimeFailed
from pandastack.host import identity
from pandastack.host.guest import Guest, ProcessSpec
from pandastack.host.runtimes.base import Machine
from pandastack.host.runtimes.firecracker.machine import FirecrackerMachine
from pandastack.host.runtimes.qemu.command import Jail
from pandastack.host.runtimes.qemu.driver import QemuRuntime
from pandastack.host.runtimes.qemu.machine import BOOT_TIMEOUT_S, QemuMachine
from pandastack.host.storage import space

from .benches import (
    ACCELERATORS,
    LIMITS,
    PATIENCE,
    Bench,
    check_jail,
    forget,
    made_folder,
    qemu_binary,
    reborn,
    say,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300 * PATIENCE)]


async def _turned(guest: Guest, times: int) -> None:
    """Wait until the program that counts has gone round so often again, or has ended."""
    line = f"until read t </dev/shm/turn; do sleep 0.1; done 2>/dev/null; until read now </dev/shm/turn && [ $((now - t)) -ge {times} ]"
    line += "; do pgrep -x python3 >/dev/null || exit 1; sleep 0.1; done"
    assert (await say(guest, line))[1] == 0, "a page was not as it was left"


async def _disk_mib(guest: Guest) -> int:
    """How large its file system is, with what it keeps for itself."""
    blocks, _ = await say(guest, "od -An -tu4 -j 1028 -N 4 /dev/vda")
    return int(blocks) * 4096 >> 20


@pytest.mark.parametrize("bench", list(ACCELERATORS), indirect=True)
class TestMicrovm:
    """What only a machine with a kernel of its own can promise, or must."""

    @staticmethod
    def _ram(machine: Machine) -> str:
        """The range of addresses at which its process has mapped the saved memory."""
        if isinstance(machine, QemuMachine):
            return f"{machine._address:x}-{machine._address + machine.size.memory_bytes:x}"
        assert isinstance(machine, FirecrackerMachine)
        assert machine._process is not None
        lines = Path(f"/proc/{machine._process.pid}/maps").read_text().splitlines()
        (found,) = [line.split()[0] for line in lines if _bytes(line.split()[0]) == machine.size.memory_bytes]
        return found

    async def test_its_process_may_do_nothing(self, bench: Bench) -> None:
        async with bench.started() as (machine, _):
            pid = (await machine.usage()).pid
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
            (uid,) = set(status["Uid"].split())
            assert int(uid) >= 0x70000000
            assert set(status["Gid"].split()) == {uid}
            assert status["Groups"].strip() == ""
            # What Firecracker's jailer needs stays in the bounding set, of which a process that gains nothing can make no use.
            bounded = () if bench.name == "firecracker-kvm" else ("CapBnd",)
            assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb", *bounded)} == {"0" * 16}
            assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
            for kind in ("mnt", "ipc", "uts", "net"):
                assert Path(f"/proc/{pid}/ns/{kind}").readlink() != Path(f"/proc/self/ns/{kind}").readlink()
            assert f"/{bench.group}/{machine.spec.id}" in Path(f"/proc/{pid}/cgroup").read_text()
            async with bench.started() as (other, _):
                assert Path(f"/proc/{(await other.usage()).pid}").stat().st_uid != int(uid)
            for socket in bench.run.glob("*.[cq]"):
                assert (socket.stat().st_uid, socket.stat().st_mode & 0o777) == (0, 0o600)

    async def test_its_process_sees_no_file_of_the_host(self, bench: Bench) -> None:
        """But the programs that everybody has, which it cannot change; also one that boots, which finds its kernel there."""
        restored, booted = await bench.prepared(), await bench.prepared()
        assert bench.microvms is not None
        await restored.restore(bench.microvms.template)
        await booted.start()
        if bench.name == "firecracker-kvm":
            for machine in (restored, booted):
                await check_jail(machine)
            return
        programs = {name for name in ("usr", "bin", "sbin", "lib", "lib64") if Path("/", name).exists()}
        kvm = {"kvm"} if bench.runtime.acceleration == "kvm" else set()
        for machine, more in ((restored, set()), (booted, {"vmlinux", "initramfs"})):
            pid = (await machine.usage()).pid
            top = Path(f"/proc/{pid}/root")
            assert {path.name for path in top.iterdir()} == programs | more | {"dev"}
            assert {path.name for path in (top / "dev").iterdir()} == kvm
            mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
            assert {words[4] for words in mounts} >= {"/", "/usr"}
            assert all("ro" in words[5].split(",") for words in mounts), mounts
            assert re.search(r"^Max core file size +0 +0 ", Path(f"/proc/{pid}/limits").read_text(), re.MULTILINE)
            opened = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
            files = [Path(target) for target in opened if target.startswith("/") and not target.startswith(("/memfd:", "/dev/"))]
            known = {bench.microvms.kernel.vmlinux, bench.microvms.kernel.initramfs}
            assert all(file in known or file.is_relative_to(bench.root) for file in files), opened

    async def test_its_process_cannot_write_the_memory_that_others_map(self, bench: Bench) -> None:
        assert bench.microvms is not None
        shared = bench.microvms.template / "mem"
        before = await asyncio.to_thread(_digest, shared)
        async with bench.started() as (machine, guest):
            pid = (await machine.usage()).pid
            mapped = f"/proc/{pid}/map_files/{self._ram(machine)}"
            assert os.path.samestat(Path(mapped).stat(), shared.stat())
            look = 'echo $(readlink -f "$f") $(stat -Lc %i "$f")'
            script = f'for f in /proc/{pid}/fd/* {mapped} {shared}; do (exec 3<>"$f") 2>/dev/null && {look}; done; true'

            def opened(*prefix: str) -> str:
                return subprocess.run([*prefix, "sh", "-c", script], capture_output=True, text=True, check=True).stdout

            uid = str(Path(f"/proc/{pid}").stat().st_uid)
            its = opened("setpriv", "--reuid", uid, "--regid", uid, "--clear-groups")
            assert "/dev/null" in its, "it could not look at all"
            assert f" {shared.stat().st_ino}\n" not in its
            assert f" {shared.stat().st_ino}\n" in opened(), "root can, so the question was the right one"
            await say(guest, "head -c 60000000 /dev/urandom >/dev/shm/x; sync")
        assert await asyncio.to_thread(_digest, shared) == before

    async def test_machines_of_one_state_share_what_they_did_not_write(self, bench: Bench) -> None:
        async with bench.started() as (one, guest), bench.started() as (other, second):
            for each in (guest, second):
                assert await say(each, "echo on") == ("on\n", 0)
            alone = await other.memory()
            before = await one.memory()
            assert await say(guest, "head -c 50000000 /dev/urandom | tail -c 50000000 >/dev/shm/x; echo on") == ("on\n", 0)
            after = await one.memory()
            assert after.own_bytes - before.own_bytes > 48 << 20
            assert (await other.memory()).own_bytes - alone.own_bytes < 8 << 20
            # The program of QEMU is among it, and Firecracker's is small.
            least_mib = 12 if bench.name == "firecracker-kvm" else 32
            assert min(alone.shared_bytes, after.shared_bytes) > least_mib << 20
            for machine in (one, other):
                fields = _mapping((await machine.usage()).pid, self._ram(machine))
                assert fields["Shared_Clean"] + fields["Shared_Dirty"] > 8 << 10, "the pages are the same ones"

    @pytest.mark.parametrize("copies", [None, 1], ids=["kept", "for one"])
    async def test_forks_of_forks_need_no_earlier_state(self, bench: Bench, copies: int | None) -> None:
        """Three generations, the second of them adopted after a restart; each state is removed before the next one is made."""
        first, second = made_folder(bench.root / "first"), made_folder(bench.root / "second")
        write = "head -c 20000000 /dev/urandom >/dev/shm/{0}; cp /dev/shm/{0} /root/{0}; sha256sum </dev/shm/{0}"
        async with bench.started() as (machine, guest):
            a, _ = await say(guest, write.format("a"))
            await machine.snapshot(first, resume=True, copies=copies)
            assert await say(guest, "rm /dev/shm/a /root/a; echo gone") == ("gone\n", 0)
        child = await bench.prepared()
        await child.restore(first)
        bench.runtime.forget(first)
        shutil.rmtree(first)
        async with bench.guest_of(child) as guest:
            b, _ = await say(guest, write.format("b"))
        forget(bench, child)
        bench.runtime = reborn(bench)
        await bench.runtime.probe()
        adopted = await bench.runtime.adopt(child.spec)
        assert adopted is not None
        bench.made.append(adopted)
        await adopted.snapshot(second, resume=True, copies=copies)
        async with bench.guest_of(adopted) as guest:
            await say(guest, "rm /dev/shm/* /root/?")
        grandchild = await bench.prepared()
        await grandchild.restore(second)
        await adopted.stop()
        bench.runtime.forget(second)
        shutil.rmtree(second)
        async with bench.guest_of(grandchild) as guest:
            await say(guest, "echo 3 >/proc/sys/vm/drop_caches")
            for name, digest in (("a", a), ("b", b)):
                assert await say(guest, f"sha256sum </dev/shm/{name}; sha256sum </root/{name}") == (digest * 2, 0)

    async def test_a_state_goes_on_where_another_kernel_is_booted_by_now(self, bench: Bench) -> None:
        """As after an update of the guest kernel, or of the daemon beside it: what is saved has its own."""
        assert bench.microvms is not None
        saved, before = made_folder(bench.root / "saved"), await bench.runtime.probe()
        async with bench.started() as (machine, guest):
            await say(guest, "echo kept >/dev/shm/x")
            await machine.snapshot(saved, resume=False)
        bench.runtime = replace(bench.microvms, kernel=replace(bench.microvms.kernel, digest="another")).again(bench.run, bench.group)
        after = await bench.runtime.probe()
        assert (after.key, after.bakes != before.bakes) == (before.key, True)
        child = await bench.prepared()
        await child.restore(saved)
        async with bench.guest_of(child) as guest:
            assert await say(guest, "cat /dev/shm/x") == ("kept\n", 0)

    async def test_pages_that_became_zeros_are_zeros_in_a_copy(self, bench: Bench) -> None:
        """Where the file below has other content, and where it has a hole."""
        kept, copied = made_folder(bench.root / "kept"), made_folder(bench.root / "copied")
        async with bench.started() as (machine, guest):
            await say(guest, "head -c 20000000 /dev/urandom >/dev/shm/x")
            await machine.snapshot(kept, resume=False)
        child = await bench.prepared()
        await child.restore(kept)
        async with bench.guest_of(child) as guest:
            await say(guest, "dd if=/dev/zero of=/dev/shm/x bs=1M count=8 conv=notrunc; head -c 8M /dev/zero >/dev/shm/y")
            digests, _ = await say(guest, "sha256sum /dev/shm/?")
            await child.snapshot(copied, resume=True, copies=1)
        facts = json.loads((copied / "machine.json").read_text())
        if isinstance(child, QemuMachine):
            assert (facts["written_bytes"], (copied / "mem").exists()) == (0, False)
        copy = await bench.prepared()
        await copy.restore(copied)
        bench.runtime.forget(copied)
        async with bench.guest_of(copy) as guest:
            assert await say(guest, "sha256sum /dev/shm/?") == (digests, 0)
        if isinstance(child, QemuMachine):
            with pytest.raises(RuntimeFailed):
                await (await bench.prepared()).restore(copied)

    async def test_a_state_says_how_long_its_machine_stood_still(self, bench: Bench) -> None:
        into = made_folder(bench.root / "saved")
        async with bench.started() as (machine, guest):
            await say(guest, "head -c 50000000 /dev/urandom >/dev/shm/x")
            await machine.snapshot(into, resume=True)
        facts = json.loads((into / "machine.json").read_text())
        own_bytes = facts["ahead_bytes"] + facts["rest_bytes"]
        assert 48 << 20 < own_bytes < 128 << 20
        assert facts["pause_ms"] < 250 * PATIENCE, f"20 ms on a machine that does nothing else: {facts}"
        assert (into / "mem").stat().st_size == LIMITS.memory_mib << 20
        taken = space.of(into / "mem")
        assert taken.own_bytes < 2 * own_bytes
        assert taken.shared_bytes > 16 << 20, "pages of the state before are shared with it"
        assert (into / "disk").stat().st_blocks > 0
        assert space.of(into / "disk").own_bytes < 16 << 20

    async def test_what_is_written_while_memory_is_copied_is_of_one_instant(self, bench: Bench) -> None:
        """A program counts in 24 MB, page after page, and looks whether each page is as it left it: first in the parent, then in a copy.

        It never waits for a disk: a guest that waits writes nothing meanwhile.
        """
        program = (
            "import sys; n, size = 6000, 4096; b = bytearray(n * size); t = 0\n"
            "while True:\n"
            "    for p in range(0, n * size, size):\n"
            "        if b[p : p + 4] != t.to_bytes(4, 'little'): sys.exit(f'page {p // size} is not of turn {t}')\n"
            "        b[p : p + 4] = (t + 1).to_bytes(4, 'little')\n"
            "    t += 1; print(t, file=open('/dev/shm/turn', 'w'))\n"
        )
        into = made_folder(bench.root / "saved")
        async with bench.started() as (machine, guest):
            await guest.start(ProcessSpec(argv=["python3", "-c", program], id="counting"))
            await _turned(guest, 2)
            await machine.snapshot(into, resume=True)
            await _turned(guest, 2)
        facts = json.loads((into / "machine.json").read_text())
        assert facts["ahead_bytes"] == 0 or facts["rest_bytes"] > 0
        child = await bench.prepared()
        await child.restore(into)
        async with bench.guest_of(child) as guest:
            await _turned(guest, 2)
            assert [one.running for one in await guest.list_processes() if one.id == "counting"] == [True]

    async def test_a_restored_machine_says_what_its_restore_took(self, bench: Bench) -> None:
        async with bench.started() as (machine, _):
            record = json.loads((machine.spec.state / "machine.json").read_text())
            assert record["restore_parts_ms"].keys() == {"disk", "memory", "devices"}
            assert all(0 < ms < 2000 * PATIENCE for ms in record["restore_parts_ms"].values()), record

    async def test_a_machine_goes_on_when_it_could_not_be_saved(self, bench: Bench) -> None:
        into = made_folder(bench.root / "saved")
        (into / "disk").touch()
        async with bench.started() as (machine, guest):
            with pytest.raises(RuntimeFailed):
                await machine.snapshot(into, resume=True)
            assert await say(guest, "echo on") == ("on\n", 0)

    async def test_its_disk_is_as_large_as_was_asked_and_never_smaller_than_it_was(self, bench: Bench) -> None:
        larger, smaller = replace(LIMITS, disk_mib=2 * LIMITS.disk_mib), replace(LIMITS, disk_mib=LIMITS.disk_mib // 2)
        saved = made_folder(bench.root / "saved")
        async with bench.started() as (machine, guest):
            assert await _disk_mib(guest) == LIMITS.disk_mib
            await guest.seal()
            await machine.snapshot(saved, resume=False)
        machine = await bench.prepared(larger)
        await machine.restore(saved)
        async with bench.guest_of(machine) as guest:
            await identity.confirm(guest, identity.fresh("00000000-0000-4000-8000-000000000001", "mine", {}))
            assert await _disk_mib(guest) == larger.disk_mib
        await machine.stop()
        machine = await bench.prepared(smaller)
        with pytest.raises(RuntimeFailed) as error:
            await machine.restore(saved)
        assert "larger" in str((error.value.message, error.value.fields))
        await machine.stop()

    async def test_its_clock_needs_no_interrupts(self, bench: Bench) -> None:
        """One that counts them is as coarse as they are, and no processor may rest."""
        async with bench.started() as (_, guest):
            source = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
            assert (await say(guest, f"cat {source}"))[0].strip() in ("tsc", "kvm-clock")
            line = "a=$(grep LOC: /proc/interrupts); sleep 3; echo $a; grep LOC: /proc/interrupts"
            before, after = (int(row.split()[1]) for row in (await say(guest, line))[0].splitlines())
            assert after - before < 300, "the timer runs all the time"

    async def test_one_that_cannot_boot_says_why(self, bench: Bench) -> None:
        spec = await bench.spec()
        garbage = bench.root / "garbage"
        garbage.write_bytes(b"garbage" * 100_000)
        machine = await bench.runtime.prepare(replace(spec, rootfs=garbage))
        bench.made.append(machine)
        with pytest.raises(RuntimeFailed) as failed:
            await machine.start()
        assert "root file system" in failed.value.fields["detail"]

    async def test_one_that_hangs_is_started_again(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        if not isinstance(bench.runtime, QemuRuntime):
            pytest.skip("what stands in for its program here is QEMU's")
        timeout_s = 15 if PATIENCE == 1 else 90
        monkeypatch.setitem(BOOT_TIMEOUT_S, bench.runtime.accelerated, timeout_s / PATIENCE)
        machine = await bench.prepared()
        # Of the QEMUs that are told to boot, the first one does not let its CPU run.
        hangs = made_folder(bench.root / "own") / "bin" / "qemu"
        hangs.parent.mkdir()
        mark = bench.root / "own" / "mark"
        hangs.write_text(f'#!/bin/sh\n[ -e {mark} ] && exec {bench.runtime._binary} "$@"\nexec {bench.runtime._binary} "$@" -S\n')
        hangs.chmod(0o755)
        bench.root.chmod(0o755)
        bench.runtime._binary, bench.runtime._jail = hangs, Jail.of(bench.run, hangs)
        starting = asyncio.create_task(machine.start())
        await asyncio.sleep(timeout_s * 2 / 3)
        assert not starting.done()
        mark.touch()
        await starting
        async with bench.guest_of(machine) as guest:
            assert await say(guest, "echo hi") == ("hi\n", 0)


def _bytes(addresses: str) -> int:
    begin, end = addresses.split("-")
    return int(end, 16) - int(begin, 16)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mapping(pid: int, addresses: str) -> dict[str, int]:
    """KiB of one mapping, by the names of /proc/PID/smaps."""
    _, _, rest = Path(f"/proc/{pid}/smaps").read_text().partition(f"{addresses} ")
    fields = [line.split() for line in rest.splitlines()[1:24]]
    return {words[0].rstrip(":"): int(words[1]) for words in fields if len(words) == 3 and words[2] == "kB"}


class TestQemuProbe:
    """A QEMU or a kernel that is no good is refused with a reason a person can act on."""

    @pytest.fixture
    def probe(self, short: Path, no_leaks: None) -> object:
        if os.geteuid() != 0:
            pytest.skip("cgroups need root")
        group = f"pandastack-test-{short.name}"

        async def of(binary: str | None, kernel: bytes | None = None) -> tuple[bool, str, str]:
            path = Path(binary) if binary and binary.startswith("/") else short / "qemu"
            if binary is not None and path.parent == short:
                path.write_text(binary)
                path.chmod(path.stat().st_mode | stat.S_IXUSR)
            if kernel is not None:
                (short / "kernel").write_bytes(kernel)
            runtime = QemuRuntime(
                path, vmlinux=short / "kernel", initramfs=short / "kernel", digest="0", root=short / "q", group=group, clone=space.clone,
                accelerator="tcg",
            )  # fmt: skip
            probe = await runtime.probe()
            assert not list(Path("/sys/fs/cgroup").glob(f"*/{group}*"))
            return probe.works, probe.reason or "", probe.hint or ""

        return of

    async def test_one_that_is_not_there(self, probe: object) -> None:
        works, reason, hint = await probe(None)  # type: ignore[operator]
        assert not works
        assert "cannot be started" in reason
        assert "qemu-system-x86" in hint

    async def test_one_that_is_too_old(self, probe: object) -> None:
        works, reason, hint = await probe("#!/bin/sh\necho 'QEMU emulator version 6.2.0 (Old 1:6.2)'\n")  # type: ignore[operator]
        assert not works
        assert "6.2.0 (Old 1:6.2) is too old" in reason
        assert "7.2" in hint

    async def test_one_that_is_something_else(self, probe: object) -> None:
        works, reason, _ = await probe("#!/bin/sh\necho something else\n")  # type: ignore[operator]
        assert not works
        assert "no QEMU" in reason

    async def test_a_kernel_that_is_not_there(self, probe: object) -> None:
        works, reason, hint = await probe(str(qemu_binary()))  # type: ignore[operator]
        assert not works
        assert "cannot be used" in reason
        assert "setup" in hint

    async def test_a_kernel_that_is_none(self, probe: object) -> None:
        works, reason, _ = await probe(str(qemu_binary()), b"garbage" * 1000)  # type: ignore[operator]
        assert not works
        assert "does not boot with tcg" in reason
        assert "linux kernel" in reason.lower() or "kernel" in reason.split("tcg:")[1], "QEMU's own last words are in it"
