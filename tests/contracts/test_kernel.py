"""What the guest daemon promises on a kernel of its own: a real one, Debian's, in QEMU without hardware acceleration.

Needs the image of the template `base` and the guest kernel, which are made (minutes) if the cache directory has none.
"""

# ruff: noqa: S604 - `shell` is a field of ProcessSpec and runs inside a sandbox
from __future__ import annotations

import asyncio
import os
import platform
import re
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pandastack.errors import GuestError, HostUnfit
from pandastack.host import app, identity, kernels
from pandastack.host.guest import Guest, ProcessSpec
from pandastack.host.kernels import Kernel
from pandastack.host.runtimes import microvms
from pandastack.host.runtimes.base import Channel
from pandastack.host.runtimes.qemu import command
from pandastack.host.storage.images import Images
from pandastack.host.storage.roots import Roots
from pandastack.wire import guest as wire

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="microVMs need x86-64"),
]

CACHE = Path(os.environ.get("PANDASTACK_TEST_CACHE", "/var/cache/pandastack"))
BOOT_S = 90.0
DISK_BYTES = 3 << 30


class Machine:
    """QEMU with one guest. Its socket is there before QEMU is, so it can be connected to at once."""

    def __init__(self, folder: Path, kernel: Kernel, disk: Path | None) -> None:
        self.socket, self.console = folder / "socket", folder / "console"
        listener = socket.socket(socket.AF_UNIX)
        with listener:
            listener.bind(str(self.socket))
            listener.listen()
            argv = _command(kernel, disk, listener.fileno(), self.console)
            self.process = subprocess.Popen(argv, pass_fds=[listener.fileno()])

    async def raw(self) -> socket.socket:
        """A connection to the port's other end. QEMU takes one at a time."""
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, str(self.socket))
        return connection

    @asynccontextmanager
    async def session(self, *, fresh: bool = False) -> AsyncIterator[Guest]:
        descriptor = (await self.raw()).detach()
        guest = await Guest.open(Channel(read_fd=descriptor, write_fd=descriptor, fresh=fresh), timeout_s=BOOT_S)
        try:
            yield guest
        finally:
            await guest.close()

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)


def _command(kernel: Kernel, disk: Path | None, listener: int, console: Path) -> list[str]:
    arguments = command.kernel_arguments("tcg", microvms.tsc_khz(), processes=500)
    drive = [
        "-blockdev", f"driver=raw,node-name=d0,discard=unmap,file.driver=file,file.filename={disk},file.locking=off",
        "-device", "virtio-blk-device,drive=d0",
    ]  # fmt: skip
    return [
        "qemu-system-x86_64", "-M", "microvm,acpi=on,rtc=on", "-accel", "tcg", "-cpu", "max", "-m", "512", "-smp", "1",
        "-kernel", str(kernel.vmlinux), "-initrd", str(kernel.initramfs), "-append", arguments,
        "-no-reboot", "-nodefaults", "-no-user-config", "-display", "none", "-serial", f"file:{console}",
        "-chardev", f"socket,id=c0,fd={listener},server=on,wait=off",
        "-device", "virtio-serial-device", "-device", "virtserialport,chardev=c0,name=pandastack",
        "-object", "rng-random,id=r0,filename=/dev/urandom", "-device", "virtio-rng-device,rng=r0",
        *(drive if disk is not None else []),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    try:
        guest = app.guest_directory(CACHE / "guest")[0]
        return asyncio.run(kernels.ensure(CACHE / "kernels", guest, debian_mirror=None, say=print))
    except HostUnfit as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = Images(CACHE / "images", [app.shipped_templates()])

    async def make() -> Path:
        image = images.cached("base") or await images.ensure("base", lambda _: None)
        return await Roots(tmp_path_factory.mktemp("roots")).ensure(image)

    return asyncio.run(make())


@pytest.fixture(scope="module")
def machine(kernel: Kernel, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("machine")
    disk = folder / "disk"
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", str(root), str(disk)], check=True)
    disk.chmod(0o600)
    os.truncate(disk, DISK_BYTES)
    made = Machine(folder, kernel, disk)
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
async def guest(machine: Machine) -> AsyncIterator[Guest]:
    async with machine.session() as opened:
        yield opened


async def say(guest: Guest, shell: str, *, within_s: float = 60) -> str:
    """stdout and stderr of a line of shell that succeeds."""
    out = b""
    async with asyncio.timeout(within_s), await guest.run(ProcessSpec(shell=f"exec 2>&1; {shell}")) as stream:
        async for _channel, _offset, data in stream:
            out += data
        assert stream.exit is not None
        assert stream.exit.exit_code == 0, out
    return out.decode()


def called(body: bytes, tag: int) -> bytes:
    """The frame of a call, as a host writes it."""
    return b"".join(wire.encode(wire.Kind.CALL, 1, body, tag, flags=1))


async def become(guest: Guest, *, ahead_s: float = 0.0) -> wire.IdentityReport:
    who = identity.fresh("sb-1", "box-1", {"COLOUR": "green"})
    return await guest.identity(
        sandbox_id=who.sandbox_id, hostname=who.hostname, unix_ns=time.time_ns() + round(ahead_s * 1e9), entropy=who.entropy,
        token=who.token, env=who.env, machine_id=who.machine_id,
    )  # fmt: skip


async def test_the_view_is_that_of_other_runtimes(machine: Machine, guest: Guest) -> None:
    assert guest.connection.greeting.pid == 1
    mounts = {line.split()[1]: line.split() for line in (await say(guest, "cat /proc/mounts")).splitlines()}
    assert {place: row[2] for place, row in mounts.items()} == {
        "/": "ext4", "/dev": "devtmpfs", "/proc": "proc", "/dev/pts": "devpts", "/dev/shm": "tmpfs", "/sys": "sysfs",
        "/sys/fs/cgroup": "cgroup2", "/.pandastack": "tmpfs", "/proc/sys/kernel/random/boot_id": "tmpfs",
    }  # fmt: skip
    assert {place for place, row in mounts.items() if "ro" in row[3].split(",")} == {
        "/sys", "/.pandastack", "/proc/sys/kernel/random/boot_id",
    }  # fmt: skip
    assert "size=262144k" in mounts["/dev/shm"][3]
    assert await say(guest, "ulimit -n; ulimit -Hn; ulimit -u; ulimit -c; umask") == "65536\n65536\n500\n0\n0022\n"
    assert (await say(guest, "cat /proc/1/cmdline")).split("\0")[0] == "/.pandastack/pandastack-guest"
    # Its memory and what it has open are its own, although everybody here is root.
    await say(guest, "! readlink /proc/1/fd/0 && ! cat /proc/1/environ")
    environment = dict(line.split("=", 1) for line in (await say(guest, "/usr/bin/env")).splitlines())
    assert {name: environment[name] for name in ("PATH", "HOME", "LANG")} == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8",
    }  # fmt: skip
    # `lo` answers, and nothing listens on it.
    await say(guest, "(exec 3<>/dev/tcp/127.0.0.1/9) 2>&1 | grep refused")
    assert await guest.ports() == []
    assert await say(guest, "cat <(echo through /dev/fd); test -c /dev/ptmx; ls /modules /init 2>&1 | wc -l") == "through /dev/fd\n2\n"
    await say(guest, "! touch /.pandastack/x && ! rm /.pandastack/pandastack-guest && ! umount /.pandastack")
    async with asyncio.timeout(30), await guest.run(ProcessSpec(argv=["tty"], pty=(24, 80))) as stream:
        assert b"".join([data async for _, _, data in stream]).startswith(b"/dev/pts/")
    # The port belongs to the daemon: nobody else speaks with the host.
    assert "busy" in await say(guest, "cat /dev/vport*p* || true")
    # Orphans are reaped.
    await say(guest, "for n in 1 2 3; do (true &) ; done")
    assert await say(guest, "sleep 0.2; grep -l '^State:.Z' /proc/[0-9]*/status | wc -l") == "0\n"
    health = await guest.health()
    assert (health.live, health.sealed) == (0, False)


FORKS = """
import os, time
for count in range(2000):
    try:
        if os.fork() == 0:
            time.sleep(600)
            os._exit(0)
    except OSError as error:
        print(count, error.errno, flush=True)
        break
time.sleep(600)
"""


async def test_more_processes_than_allowed_are_refused_and_the_daemon_lives_on(guest: Guest) -> None:
    async with asyncio.timeout(120), await guest.run(ProcessSpec(argv=["python3", "-c", FORKS], id="forks")) as stream:
        _, _, line = await anext(aiter(stream))
        count, errno = (int(word) for word in line.split())
        assert (450 < count <= 500, errno) == (True, 11)
        assert (await guest.health()).live == 1
        with pytest.raises(GuestError) as refused:
            await guest.start(ProcessSpec(argv=["true"]))
        assert refused.value.guest_code == "spawn_failed"
        assert await guest.signal("forks", 9) > 450
    assert await say(guest, "cat /proc/self/cgroup") == "0::/sandbox\n"


async def test_an_identity_makes_the_machine_itself(machine: Machine, guest: Guest, tmp_path: Path) -> None:
    disk = machine.console.parent / "disk"
    before = (await say(guest, "cat /proc/sys/kernel/random/boot_id")).strip()
    started = await guest.start(ProcessSpec(shell="while :; do date +%s >> /root/times; sleep 0.05; done"))
    await say(guest, "while ! test -s /root/times; do sleep 0.05; done")
    sealed = await guest.seal(freeze=True)
    assert sealed.frozen >= 1
    report = await become(guest, ahead_s=3600)
    details = {name: step.detail for name, step in report.steps.items()}
    assert all(step.ok for step in report.steps.values()), report
    assert set(details) == {*identity.REQUIRED_STEPS, *identity.LATER_STEPS}
    assert (details["entropy"], details["clock"], details["boot_id"], details["hooks"]) == ("kernel", "stepped", "set", "none")
    assert details["disk"] == "kept"  # It was filled when the daemon started.
    assert details["processes"] == f"{sealed.frozen} continued"
    assert -3602 < report.offset_ns / 1e9 < -3590
    told = await say(guest, "cat /proc/sys/kernel/random/boot_id; hostname; cat /etc/hostname; cat /etc/machine-id; echo $COLOUR; date +%s")
    boot_id, hostname, etc, machine_id, colour, now = told.split()
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}", boot_id)
    assert boot_id != before
    assert (hostname, etc, colour) == ("box-1", "box-1", "green")
    assert re.fullmatch(r"[0-9a-f]{32}", machine_id)
    assert 3590 < int(now) - time.time() < 3610
    # What was frozen never saw the old time afterwards.
    times = [int(line) for line in (await say(guest, "sleep 1; cat /root/times")).split()]
    assert times[-1] - times[0] > 3500
    await guest.signal(started.id, 9)
    blocks, free = (int(one) for one in (await say(guest, "stat -f -c '%b %f' /")).split())
    assert DISK_BYTES * 0.95 < blocks * 4096 < DISK_BYTES
    assert free * 4096 > 2 << 30
    # Growing wrote next to nothing to the host's disk.
    assert disk.stat().st_blocks * 512 < 500 << 20
    assert "noinit_itable" in await say(guest, "grep ' / ' /proc/mounts")
    # All of it goes to the host's disk, which others may keep busy.
    await say(guest, "head -c 800M /dev/zero > /root/large && sync && rm /root/large /root/times", within_s=200)
    again = await become(guest)
    assert (again.steps["disk"].detail, again.steps["clock"].detail) == ("kept", "stepped")
    third = await become(guest)
    assert third.steps["clock"].detail == "kept"
    assert (await say(guest, "cat /proc/sys/kernel/random/boot_id")).strip() not in (before, boot_id)
    assert (await say(guest, "grep -c boot_id /proc/mounts")).strip() == "1"


async def test_a_host_that_died_half_way_is_no_trouble_for_the_next(machine: Machine) -> None:
    tag = 77
    call = called(b'{"method":"process.start","params":{"shell":"touch /root/never"}}', tag)
    for pause_s in (0.0, 0.5):  # The guest notices the change of hosts, or does not.
        dying = await machine.raw()
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(dying, wire.PADDING + wire.hello(tag, "0" * 32, None))
        async with asyncio.timeout(20):
            assert await loop.sock_recv(dying, 4096)
        await loop.sock_sendall(dying, call[:-6])
        dying.close()
        await asyncio.sleep(pause_s)
        async with machine.session() as guest:
            assert await say(guest, "ls -A /root | grep -c never || true") == "0\n"
    # Bytes that nobody read, more than all buffers hold, end with the session that they were for.
    async with machine.session() as guest:
        started = await guest.start(ProcessSpec(shell="yes | head -c 30M; echo done > /root/done; sleep 60"))
    deaf = await machine.raw()
    attach = called(b'{"method":"process.attach","params":{"id":"%s"}}' % started.id.encode(), tag)
    await loop.sock_sendall(deaf, wire.PADDING + wire.hello(tag, "0" * 32, None) + attach)
    await asyncio.sleep(1)
    deaf.close()
    async with machine.session() as guest:
        async with asyncio.timeout(60):
            assert await say(guest, "while ! test -e /root/done; do sleep 0.1; done; rm /root/done") == ""
        resident_kib = int((await say(guest, "grep VmRSS /proc/1/status")).split()[1])
        assert resident_kib < 96 << 10
        assert await guest.signal(started.id, 9) >= 1
        assert [entry.running for entry in await guest.list_processes() if entry.id == started.id] == [False]


async def test_a_guest_without_a_host_rests(machine: Machine) -> None:
    async with machine.session() as guest:
        await guest.health()
    await asyncio.sleep(0.5)
    before = machine.cpu_s()
    await asyncio.sleep(3)
    assert machine.cpu_s() - before < 0.6
    began = time.monotonic()
    async with machine.session() as guest:
        await guest.health()
    assert time.monotonic() - began < 2


async def test_a_machine_without_a_disk_says_so_and_ends(kernel: Kernel, tmp_path: Path) -> None:
    machine = Machine(tmp_path, kernel, None)
    try:
        await asyncio.to_thread(machine.process.wait, BOOT_S)
        assert "this machine cannot start: disk: no /dev/vda after 10s" in machine.console.read_text(errors="replace")
    finally:
        machine.end()
