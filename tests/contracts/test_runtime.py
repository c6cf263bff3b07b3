"""The promises of `host/runtimes/base.py`, over every runtime of this machine: the fake, gVisor with each runsc, QEMU, Firecracker.

What is real needs root and the image of the template `base`, which is built (minutes) if the cache directory
(PANDASTACK_TEST_CACHE, else the default one) has none. A newer runsc is named by PANDASTACK_TEST_RUNSC_NEW. QEMU needs a guest
kernel (fetched if the cache has none), and its files are on an XFS made for the tests, so that copies share blocks; most of its
machines are restored from one state that is made once, because emulated a boot takes seconds. `qemu` emulates; `qemu-kvm` is for
machines whose /dev/kvm runs guests, or for the outer machine of tests/nested: that one names a folder with the finished root
(PANDASTACK_TEST_ROOTS), is slow (PANDASTACK_TEST_PATIENCE: how many times), and must have KVM (PANDASTACK_TEST_KVM=required).
`firecracker-kvm` is for machines of that kind, too, where PANDASTACK_FIRECRACKER names a Firecracker with its jailer beside it.
After each test nothing may be left: no process, cgroup, mount, loop device, state file or descriptor.
"""

# ruff: noqa: ASYNC240, S604 - `shell` is a field of ProcessSpec and runs inside a sandbox
from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest

from hosts import until
from pandastack.errors import GuestError, HookFailed, HostUnfit, PandastackError, RuntimeFailed
from pandastack.host import app, identity, kernels
from pandastack.host.guest import Guest, ProcessSpec
from pandastack.host.keeper import Keeper
from pandastack.host.runtimes.base import Limits, Machine, MachineId, MachineSpec, Runtime
from pandastack.host.runtimes.fake import FakeRuntime
from pandastack.host.runtimes.firecracker import driver
from pandastack.host.runtimes.firecracker.command import Binaries
from pandastack.host.runtimes.firecracker.driver import FirecrackerRuntime
from pandastack.host.runtimes.firecracker.machine import FirecrackerMachine
from pandastack.host.runtimes.gvisor.driver import GvisorRuntime
from pandastack.host.runtimes.qemu.command import Jail
from pandastack.host.runtimes.qemu.driver import QemuRuntime
from pandastack.host.runtimes.qemu.machine import BOOT_TIMEOUT_S, QemuMachine
from pandastack.host.storage import lazy, space
from pandastack.host.storage.depot import Depot
from pandastack.host.storage.disks import Disks
from pandastack.host.storage.images import Image, Images
from pandastack.host.storage.lazy import LazyMemory
from pandastack.host.storage.objects import Objects
from pandastack.host.storage.roots import Roots
from pandastack.wire.guest import Sealed

PATIENCE = float(os.environ.get("PANDASTACK_TEST_PATIENCE", "1"))

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300 * PATIENCE)]

T = TypeVar("T")

CACHE = Path(os.environ.get("PANDASTACK_TEST_CACHE", "/var/cache/pandastack"))
LIMITS = Limits(cpu=1, memory_mib=256, disk_mib=256)
# The accelerators of microVMs.
ACCELERATORS: dict[str, Literal["kvm", "tcg"]] = {"qemu": "tcg", "qemu-kvm": "kvm", "firecracker-kvm": "kvm"}
NAMES = ["fake", "gvisor", "gvisor-new", *ACCELERATORS]


def _runsc(name: str) -> Path:
    if os.geteuid() != 0:
        pytest.skip("gVisor needs root")
    if name == "gvisor-new":
        newer = Path(os.environ.get("PANDASTACK_TEST_RUNSC_NEW", Path(__file__).parents[2] / ".cache/runsc-new/runsc"))
        if not newer.exists():
            pytest.skip("no newer runsc: PANDASTACK_TEST_RUNSC_NEW does not name one")
        return newer
    found = [path for path in (CACHE / "runsc" / "runsc", Path("/usr/bin/runsc")) if path.exists()]
    if not found:
        pytest.skip(f"no runsc in {CACHE / 'runsc'} and none installed: run `pandastack setup`")
    return found[0]


def _await(work: Coroutine[Any, Any, T]) -> T:
    """What a fixture of the session waits for; it may be asked for while a loop runs in this thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


@pytest.fixture(scope="session")
def image() -> Image:
    """The image of `base`; built once."""
    images = Images(CACHE / "images", [app.shipped_templates()])
    return images.cached("base") or _await(images.ensure("base", lambda _: None))


@pytest.fixture(scope="session")
def rootfs(image: Image) -> Path:
    return image.rootfs


@pytest.fixture(scope="session")
def guest_directory() -> Path:
    try:
        return app.guest_directory(CACHE / "guest")[0]
    except HostUnfit as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def kernel(guest_directory: Path) -> kernels.Kernel:
    try:
        return _await(kernels.ensure(CACHE / "kernels", guest_directory, debian_mirror=None, say=print))
    except HostUnfit as error:
        pytest.skip(str(error))


@dataclass(frozen=True, kw_only=True)
class Microvms:
    """What microVMs are made of. `template` is a saved state of a machine with `LIMITS`; `verdicts` what a probe found."""

    binary: Path
    name: str
    kernel: kernels.Kernel
    accelerator: Literal["kvm", "tcg"]
    root: Path
    template: Path
    verdicts: Path

    def runtime(self, root: Path, group: str) -> Runtime:
        """One that was never probed, but knows what the others found."""
        root.mkdir(mode=0o700)
        shutil.copytree(self.verdicts, root / "cache")
        return self.again(root, group)

    def again(self, root: Path, group: str) -> Runtime:
        if self.name == "firecracker-kvm":
            return FirecrackerRuntime(
                Binaries(firecracker=self.binary, jailer=self.binary.with_name("jailer")),
                vmlinux=self.kernel.vmlinux,
                initramfs=self.kernel.initramfs,
                digest=self.kernel.digest,
                root=root,
                group=group,
                clone=space.clone,
                patience=PATIENCE,
                # One that was built here, for glibc, has none.
                unfiltered=True,
            )
        return QemuRuntime(
            self.binary,
            vmlinux=self.kernel.vmlinux,
            initramfs=self.kernel.initramfs,
            digest=self.kernel.digest,
            root=root,
            group=group,
            clone=space.clone,
            accelerator=self.accelerator,
            patience=PATIENCE,
        )


@pytest.fixture(scope="session")
def microvms(kernel: kernels.Kernel, guest_directory: Path, image: Image, xfs: Path) -> Callable[[str], Microvms]:
    """By the name of the runtime; made when first asked for."""
    found: dict[str, Microvms | str] = {}

    def of(name: str) -> Microvms:
        if name not in found:
            found[name] = _await(_make_microvms(name, kernel, guest_directory, image, xfs))
        made = found[name]
        if isinstance(made, str):
            if os.environ.get("PANDASTACK_TEST_KVM") == "required":
                pytest.fail(made)
            pytest.skip(made)
        return made

    return of


async def _make_microvms(name: str, kernel: kernels.Kernel, guest_directory: Path, image: Image, xfs: Path) -> Microvms | str:
    """Or why this machine has no KVM that runs guests."""
    binary = _firecracker_binary() if name == "firecracker-kvm" else _qemu_binary()  # Skips, each time, where there is none.
    folder = xfs / name
    for part in ("machine", "disk", "saved"):
        (folder / part).mkdir(parents=True)
    unfinished = Microvms(
        binary=binary,
        name=name,
        kernel=kernel,
        accelerator=ACCELERATORS[name],
        root=folder / "root",
        template=folder / "saved",
        verdicts=folder / "q" / "cache",
    )
    runtime = unfinished.again(folder / "q", f"pandastack-test-{xfs.name}")
    probe = await runtime.probe()
    if not probe.works and ACCELERATORS[name] == "kvm":
        return f"no KVM: {probe.reason} ({probe.hint})"
    assert probe.works, f"{probe.reason} {probe.hint}"
    root = await Roots(Path(os.environ.get("PANDASTACK_TEST_ROOTS", xfs / "roots"))).ensure(image)
    made = replace(unfinished, root=xfs / root.name)
    if not made.root.exists():
        space.clone(root, made.root)
        made.root.chmod(0o444)
    spec = MachineSpec(
        id=MachineId("template"), rootfs=made.root, guest=guest_directory, disk=folder / "disk", state=folder / "machine", limits=LIMITS
    )
    machine = await runtime.prepare(spec)
    try:
        await machine.start()
        guest = await Guest.open(await machine.connect(), timeout_s=30 * PATIENCE)
        assert await say(guest, "echo hi") == ("hi\n", 0)
        await guest.close()
        await machine.snapshot(made.template, resume=False)
    finally:
        await machine.stop()
    return made


def _firecracker_binary() -> Path:
    """The one that PANDASTACK_FIRECRACKER names, with the jailer beside it."""
    named = os.environ.get("PANDASTACK_FIRECRACKER")
    if not named:
        pytest.skip("no Firecracker: PANDASTACK_FIRECRACKER does not name one")
    if not Path(named).exists():
        pytest.fail(f"there is no {named}, which PANDASTACK_FIRECRACKER names")
    if os.geteuid() != 0 or shutil.which("mkfs.xfs") is None:
        pytest.skip("microVMs need root and xfsprogs")
    return Path(named)


def _qemu_binary() -> Path:
    found = shutil.which("qemu-system-x86_64")
    if os.geteuid() != 0 or found is None or shutil.which("mkfs.xfs") is None:
        pytest.skip("microVMs need root, qemu-system-x86 and xfsprogs")
    return Path(found)


@dataclass
class Bench:
    """A runtime and what its machines need. `spec` makes the folders of one, `end_by` brings a machine to its end."""

    name: str
    runtime: Runtime
    root: Path
    rootfs: Path
    guest: Path
    disks: Disks | None
    keeper: Keeper | None
    group: str
    microvms: Microvms | None = None
    made: list[Machine] = field(default_factory=list)
    forgotten: set[str] = field(default_factory=set)

    @property
    def real(self) -> bool:
        return self.name != "fake"

    @property
    def run(self) -> Path:
        """Where the runtime has its sockets and records."""
        return self.root / "run"

    async def spec(self, limits: Limits = LIMITS) -> MachineSpec:
        machine = MachineId("m" + secrets.token_hex(8))
        disk = self.root / "disks" / machine
        if self.disks is not None:
            await self.disks.create(machine, limits.disk_mib)
        else:
            disk.mkdir(parents=True)
        state = self.root / "machines" / machine
        state.mkdir(parents=True)
        return MachineSpec(id=machine, rootfs=self.rootfs, guest=self.guest, disk=disk, state=state, limits=limits)

    async def prepared(self, limits: Limits = LIMITS) -> Machine:
        machine = await self.runtime.prepare(await self.spec(limits))
        self.made.append(machine)
        return machine

    @asynccontextmanager
    async def guest_of(self, machine: Machine) -> AsyncIterator[Guest]:
        guest = await Guest.open(await machine.connect(), timeout_s=30 * PATIENCE)
        try:
            yield guest
        finally:
            await guest.close()

    @asynccontextmanager
    async def started(self, limits: Limits = LIMITS, *, cold: bool = False) -> AsyncIterator[tuple[Machine, Guest]]:
        """A running machine. Unless it must be a `cold` start, one of QEMU goes on from where the template was saved."""
        machine = await self.prepared(limits)
        if self.microvms is not None and not cold:
            await machine.restore(self.microvms.template)
        else:
            await machine.start()
        async with self.guest_of(machine) as guest:
            yield machine, guest

    async def end_by(self, machine: Machine, guest: Guest, reason: str) -> None:
        if isinstance(self.runtime, FakeRuntime):
            self.runtime.machines[machine.spec.id].end(reason)  # type: ignore[arg-type]
        elif reason == "oom":
            await guest.start(ProcessSpec(shell="tail /dev/zero"))
        elif self.microvms is not None:
            await guest.start(ProcessSpec(shell="echo c >/proc/sysrq-trigger"))  # Its kernel panics.
        else:
            os.kill((await machine.usage()).pid, signal.SIGKILL)

    async def use_memory(self, machine: Machine, guest: Guest, size: int) -> None:
        if isinstance(self.runtime, FakeRuntime):
            self.runtime.machines[machine.spec.id].share += size / (machine.spec.limits.memory_mib << 20)
        else:
            # What has no line feed `tail` keeps whole.
            await guest.start(ProcessSpec(shell=f"(head -c {size} /dev/zero; sleep 60) | tail"))

    def left(self) -> dict[str, list[str]]:
        """What there is of this bench outside its own objects."""
        cgroups = {str(path) for path in Path("/sys/fs/cgroup").glob(f"{self.group}*")}
        cgroups |= {str(path) for path in Path("/sys/fs/cgroup").glob(f"*/{self.group}*")}
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(self.root) in line]
        loops = subprocess.run(["losetup", "-a"], capture_output=True, text=True, check=False).stdout.splitlines() if self.disks else []
        processes = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = entry.read_bytes().decode("utf-8", "replace").replace("\0", " ")
            except OSError:
                continue
            if str(self.root) in words and "keeper" not in words:
                processes.append(words[:200])
        files = [str(path) for path in self.run.glob("*") if path.name != "cache"]
        # The folders of machines that were swept are cleared by whoever made them (`Machines.sweep`).
        marks = [str(path) for path in (self.root / "machines").glob("*/*machine*") if path.parent.name not in self.forgotten]
        found = {
            "cgroups": sorted(cgroups),
            "mounts": mounts,
            "loops": [line for line in loops if str(self.root) in line],
            "processes": processes,
            "files": files + marks,
        }
        return {kind: what for kind, what in found.items() if what}


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short name: the path of a socket has at most 107 bytes."""
    folder = Path("/tmp") / f"pd-{secrets.token_hex(4)}"
    folder.mkdir()
    yield folder
    subprocess.run(["rm", "-rf", str(folder)], check=True)


@pytest.fixture(params=NAMES)
async def bench(request: pytest.FixtureRequest, short: Path, no_leaks: None) -> AsyncIterator[Bench]:
    """A runtime that was probed; after the test its machines are stopped and nothing may be left of them."""
    group = f"pandastack-test-{short.name}"
    if request.param == "fake":
        made = Bench("fake", FakeRuntime(), short, short, short, None, None, group)
    elif request.param in ACCELERATORS:
        guest, microvms = request.getfixturevalue("guest_directory"), request.getfixturevalue("microvms")(request.param)
        root = request.getfixturevalue("xfs") / short.name
        runtime = microvms.runtime(_made(root) / "run", group)
        made = Bench(request.param, runtime, root, microvms.root, guest, None, None, group, microvms)
    else:
        runsc = _runsc(request.param)
        guest, rootfs = request.getfixturevalue("guest_directory"), request.getfixturevalue("rootfs")
        keeper = Keeper(short / "k" / "keeper.sock")
        gvisor = GvisorRuntime(runsc, root=short / "run", group=group, guest=guest, keeper=keeper)
        made = Bench(request.param, gvisor, short, rootfs, guest, Disks(short / "disks", low_water_mib=0), keeper, group)
    _made(made.root / "machines")
    probe = await made.runtime.probe()
    assert probe.works, f"{probe.reason} {probe.hint}"
    assert made.left() == {}, "the probe left something"
    yield made
    for machine in made.made:
        await machine.stop()
    if made.disks is not None:
        await made.disks.sweep([])
    for _ in range(200):
        if not made.left():
            break
        await asyncio.sleep(0.02)
    assert made.left() == {}
    if made.keeper is not None:
        assert set(made.keeper._call({"op": "names"}, [])[0]["names"]) <= made.forgotten
        made.keeper.retain(set())
        made.keeper.close()
        await until(lambda: not (short / "k").exists())
    if made.root != short:
        await asyncio.to_thread(shutil.rmtree, made.root)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


async def _turned(guest: Guest, times: int) -> None:
    """Wait until the program that counts has gone round so often again, or has ended."""
    line = f"until read t </root/turn; do sleep 0.1; done 2>/dev/null; until read now </root/turn && [ $((now - t)) -ge {times} ]"
    line += "; do pgrep -x python3 >/dev/null || exit 1; sleep 0.1; done"
    assert (await say(guest, line))[1] == 0, "a page was not as it was left"


async def say(guest: Guest, shell: str) -> tuple[str, int]:
    """stdout and exit code of a line of shell."""
    out = b""
    async with asyncio.timeout(60 * PATIENCE), await guest.run(ProcessSpec(shell=shell)) as stream:
        async for _channel, _offset, data in stream:
            out += data
    return out.decode(), stream.exit.code


async def frozen(guest: Guest, *, reason: str = "snapshot") -> Sealed:
    """A seal with a freeze. It has five seconds and is all or nothing, so where everything is slow it may be asked for again."""
    for _ in range(4 if PATIENCE > 1 else 0):
        try:
            return await guest.seal(freeze=True, reason=reason)
        except GuestError as error:
            if error.guest_code != "not_frozen":
                raise
    return await guest.seal(freeze=True, reason=reason)


async def test_a_probe_names_version_and_key(bench: Bench) -> None:
    probe = await bench.runtime.probe()
    assert probe.works
    assert probe.version
    assert probe.key
    assert probe.key == (await bench.runtime.probe()).key


async def test_a_started_machine_has_a_guest_that_answers(bench: Bench) -> None:
    async with bench.started(cold=True) as (_, guest):
        assert not (await guest.health()).sealed
        assert await say(guest, "echo hi; exit 3") == ("hi\n", 3)


async def test_what_is_written_stays_inside(bench: Bench) -> None:
    before = bench.rootfs.stat().st_mtime_ns
    async with bench.started() as (one, guest):
        await guest.write_file("/root/secret", b"x" * 1000)
        async with bench.started() as (_, other):
            with pytest.raises(FileNotFoundError):
                await other.stat("/root/secret")
        if one.spec.rootfs.is_dir():
            assert not (one.spec.rootfs / "root/secret").exists()
        else:
            assert one.spec.rootfs.stat().st_mtime_ns == before


async def test_a_machine_stopped_before_it_started_leaves_nothing(bench: Bench) -> None:
    machine = await bench.prepared()
    await machine.stop()
    await machine.stop()


async def test_a_prepare_that_fails_leaves_nothing(bench: Bench) -> None:
    spec = await bench.spec()
    if isinstance(bench.runtime, FakeRuntime):
        bench.runtime.fail("prepared")
        broken = spec
    else:
        broken = MachineSpec(id=spec.id, rootfs=bench.root / "nothing", guest=spec.guest, disk=spec.disk, state=spec.state, limits=LIMITS)
    with pytest.raises((RuntimeFailed, HostUnfit)):
        await bench.runtime.prepare(broken)
    (spec.state / "runsc.log").unlink(missing_ok=True)
    assert {kind: what for kind, what in bench.left().items() if kind not in ("mounts", "loops")} == {}


@pytest.mark.parametrize("after_s", [0.0, 0.002, 0.01, 0.03, 0.1])
async def test_a_prepare_that_is_cancelled_leaves_nothing(bench: Bench, after_s: float) -> None:
    preparing = asyncio.create_task(bench.runtime.prepare(await bench.spec()))
    await asyncio.sleep(after_s)
    if preparing.done():
        bench.made.append(preparing.result())
        return
    preparing.cancel()
    await asyncio.gather(preparing, return_exceptions=True)
    if not preparing.cancelled():
        bench.made.append(preparing.result())
        return
    await until(lambda: not set(bench.left()) - {"mounts", "loops"}, 10)


async def test_a_restored_machine_goes_on_where_the_saved_one_was(bench: Bench) -> None:
    into = bench.root / "saved"
    into.mkdir()
    async with bench.started(cold=True) as (machine, guest):
        await guest.write_file("/root/file", b"content")
        await guest.start(ProcessSpec(shell="echo before; cat", stdin=True, id="p"))
        await asyncio.sleep(0.3)
        await guest.close()
        await machine.snapshot(into, resume=False)
        await machine.stop()
    copies = [await bench.prepared(), await bench.prepared()]
    for copy in copies:
        await copy.restore(into)
        async with bench.guest_of(copy) as guest:
            _, body = await guest.read_file("/root/file")
            assert b"".join([piece async for piece in body]) == b"content"
            assert "p" in [one.id for one in await guest.list_processes() if one.running]
            assert await guest.write_stdin("p", b"after\n", close=True) == 6
            async with asyncio.timeout(60 * PATIENCE), await guest.attach("p") as stream:
                assert b"".join([data async for _, _, data in stream]) == b"before\nafter\n"
            await guest.write_file("/root/file", b"of this copy")
        # What it has not touched yet comes from there, if it says so.
        mapped, source = bench.runtime.capabilities.memory_file, copy.memory_source
        assert (None if source is None else source.file) == ((into / mapped).resolve() if mapped else None)


async def test_a_machine_saved_on_the_way_goes_on(bench: Bench) -> None:
    into = bench.root / "saved"
    into.mkdir()
    async with bench.started() as (machine, guest):
        await guest.start(ProcessSpec(shell="sleep 0.5; echo done", id="p"))
        await machine.snapshot(into, resume=True)
        assert (await guest.wait("p", timeout_s=60 * PATIENCE)).code == 0
        assert await say(guest, "echo on") == ("on\n", 0)


async def test_a_sealed_machine_gets_an_identity_when_it_is_restored(bench: Bench) -> None:
    into = bench.root / "saved"
    into.mkdir()
    async with bench.started() as (machine, guest):
        assert (await guest.seal()).live == 0
        await guest.close()
        await machine.snapshot(into, resume=False)
    copy = await bench.prepared()
    await copy.restore(into)
    async with bench.guest_of(copy) as guest:
        with pytest.raises(PandastackError):
            await say(guest, "true")
        await identity.confirm(guest, identity.fresh("00000000-0000-4000-8000-000000000001", "mine", {"NAME": "value"}))
        assert await say(guest, "hostname; echo $NAME") == ("mine\nvalue\n", 0)


async def test_who_wants_it_still_for_that_instant_is_asked_once(bench: Bench) -> None:
    into, seen = _made(bench.root / "saved"), []

    @asynccontextmanager
    async def still(refuse: bool) -> AsyncIterator[None]:
        seen.append("entered")
        if refuse:
            raise RuntimeFailed("not now")
        yield
        seen.append("left")

    async with bench.started() as (machine, guest):
        with pytest.raises(RuntimeFailed, match="not now"):
            await machine.snapshot(into, resume=True, still=still(refuse=True))
        assert not list(into.iterdir())
        assert not (await guest.health()).frozen, "it runs as if nobody had asked"
        seen.clear()
        await machine.snapshot(into, resume=True, still=still(refuse=False))
        assert seen == ["entered", "left"]
        assert not (await guest.health()).frozen
    copy = await bench.prepared()
    await copy.restore(into)
    async with bench.guest_of(copy) as guest:
        assert not (await guest.health()).frozen


async def test_a_machine_can_be_frozen_by_who_wanted_it_still(bench: Bench) -> None:
    """As one that was paused is, when it has been saved."""
    into = _made(bench.root / "saved")

    @asynccontextmanager
    async def still(machine: Machine) -> AsyncIterator[None]:
        yield
        await machine.freeze()

    async with bench.started() as (machine, guest):
        async with asyncio.timeout(30 * PATIENCE):
            await machine.snapshot(into, resume=True, still=still(machine))
        answer = asyncio.create_task(guest.health())
        await asyncio.sleep(0.3)
        assert not answer.done(), "it is frozen again"
        await machine.thaw()
        await answer


async def test_a_frozen_machine_is_saved_on_the_way_and_its_copies_are_others(bench: Bench) -> None:
    """A live fork: the parent loses nothing, a copy does nothing before it is itself, and nothing asked of the parent."""
    into = bench.root / "saved"
    into.mkdir()
    counting = (
        "i=0; while :; do i=$((i+1)); echo $i >> /root/count; sleep 0.01; done" if bench.real else "sleep 0.6; echo late >> /root/count"
    )
    async with bench.started() as (machine, guest):
        await guest.start(ProcessSpec(shell=counting, id="counting"))
        await guest.start(ProcessSpec(argv=["cat"], stdin=True, id="cat"))
        await asyncio.sleep(0.3)
        sealed = await frozen(guest, reason="fork")
        assert sealed.live == 2
        assert sealed.frozen >= 2
        asked = asyncio.create_task(guest.write_file("/root/asked", b"of the parent"))
        assert (await guest.health()).frozen
        await machine.snapshot(into, resume=True)
        assert not asked.done()
        assert await guest.unseal() == sealed.frozen
        assert await asked == 13
        assert await guest.write_stdin("cat", b"parent\n", close=True) == 7
        assert (await guest.wait("cat", timeout_s=60 * PATIENCE)).stdout_bytes == 7
        await asyncio.sleep(0.5)
        lines = (await say(guest, "cat /root/count"))[0].split()
        assert lines == ([str(n) for n in range(1, len(lines) + 1)] if bench.real else ["late"])
    copies = [await bench.prepared(), await bench.prepared()]
    for number, copy in enumerate(copies):
        await copy.restore(into)
        async with bench.guest_of(copy) as guest:
            health = await guest.health()
            assert (health.sealed, health.frozen, health.live) == (True, True, 2)
            waiting = asyncio.create_task(say(guest, "hostname; echo $NAME"))
            await asyncio.sleep(0.3)
            assert not waiting.done()
            await identity.confirm(guest, identity.fresh("00000000-0000-4000-8000-000000000001", f"copy{number}", {"NAME": "value"}))
            assert await waiting == (f"copy{number}\nvalue\n", 0)
            health = await guest.health()
            assert (health.sealed, health.frozen) == (False, False)
            with pytest.raises(FileNotFoundError):
                await guest.stat("/root/asked")
            assert await guest.write_stdin("cat", b"copy\n", close=True) == 5
            assert (await guest.wait("cat", timeout_s=60 * PATIENCE)).stdout_bytes == 5
            await asyncio.sleep(0.7)
            lines = (await say(guest, "cat /root/count"))[0].split()
            assert lines == ([str(n) for n in range(1, len(lines) + 1)] if bench.real else ["late"])


async def test_a_machine_that_waited_frozen_is_as_good_as_a_new_one(bench: Bench) -> None:
    into = bench.root / "saved"
    into.mkdir()
    async with bench.started() as (machine, guest):
        await guest.close()
        await machine.snapshot(into, resume=False)
    copy = await bench.prepared()
    await copy.freeze()
    await copy.thaw()
    await copy.restore(into)
    async with bench.guest_of(copy) as guest:
        await guest.write_file("/root/file", b"content")
        assert await say(guest, "cat /root/file") == ("content", 0)


async def test_a_freeze_holds_and_can_be_taken_back(bench: Bench) -> None:
    slow = 4 if PATIENCE > 1 else 1  # It must still run when it is frozen.
    async with bench.started() as (_, guest):
        await guest.start(ProcessSpec(shell=f"sleep {0.3 * slow}; echo done", timeout_s=2 * slow, id="p"))
        assert (await guest.seal()).frozen == 0
        with pytest.raises(GuestError) as refused:
            await say(guest, "true")
        assert refused.value.guest_code == "sealed"
        assert await guest.unseal() == 0
        sealed = await frozen(guest)
        assert sealed == await guest.seal(freeze=True)
        gone = asyncio.create_task(guest.write_file("/root/never", b"x" * (2 << 20)))
        kept = asyncio.create_task(guest.write_file("/root/kept", b"x" * (2 << 20)))
        await asyncio.sleep(2.5 * slow)
        assert not kept.done()
        gone.cancel()
        assert await guest.unseal() == sealed.frozen
        assert await guest.unseal() == 0
        end = await guest.wait("p", timeout_s=30 * PATIENCE)
        assert (end.code, end.reason) == (0, "exited")
        assert await kept == 2 << 20
        with pytest.raises(FileNotFoundError):
            await guest.stat("/root/never")
        for wrong in ({"reason": "A"}, {"hook_timeout_ms": 120_001}):
            with pytest.raises(PandastackError):
                await guest.connection.request("machine.seal", wrong, Sealed, timeout_s=10)
        assert not (await guest.health()).sealed


async def test_hooks_decide_whether_a_machine_is_saved_and_handed_out(bench: Bench) -> None:
    hook, fails = "/etc/pandastack/hooks/", b"#!/bin/sh\nexit 1\n"
    async with bench.started() as (_, guest):
        await guest.start(ProcessSpec(argv=["sleep", "60"], id="p"))
        await guest.write_file(hook + "before-snapshot", fails, mode=0o755)
        with pytest.raises(HookFailed):
            await guest.seal(freeze=True)
        health = await guest.health()
        assert (health.sealed, health.frozen) == (False, False)
        await guest.chmod(hook + "before-snapshot", mode=0o644)
        await guest.write_file(hook + "after-restore", fails, mode=0o755)
        assert (await frozen(guest)).frozen == 1
        fresh = identity.fresh("00000000-0000-4000-8000-000000000001", "mine", {})
        with pytest.raises(HookFailed):
            await identity.confirm(guest, fresh)
        health = await guest.health()
        assert (health.sealed, health.frozen) == (True, True)
        assert await guest.unseal() == 1
        await guest.write_file(hook + "after-restore", b"#!/bin/sh\n", mode=0o755)
        await frozen(guest)
        await identity.confirm(guest, fresh)
        assert await say(guest, "hostname") == ("mine\n", 0)


async def test_a_saved_state_that_is_none_is_refused(bench: Bench) -> None:
    into = bench.root / "saved"
    into.mkdir()
    machine = await bench.prepared()
    with pytest.raises((RuntimeFailed, OSError)):
        await machine.restore(into)
    for name in ("state", "checkpoint.img", "pages_meta.img", "pages.img"):
        (into / name).write_bytes(b"garbage" * 1000)
    again = await bench.prepared()
    with pytest.raises(RuntimeFailed):
        await again.restore(into)
    if bench.microvms is not None:
        for name in ("machine.json", "mem", "disk"):
            space.clone(bench.microvms.template / name, into / name)
        third = await bench.prepared()
        with pytest.raises(RuntimeFailed) as refused:
            await third.restore(into)
        assert "cannot be restored" in refused.value.message


async def test_a_state_of_another_size_is_refused(bench: Bench) -> None:
    if bench.microvms is None:
        pytest.skip("its states fit machines of any size")
    machine = await bench.prepared(Limits(cpu=1, memory_mib=128, disk_mib=256))
    with pytest.raises(RuntimeFailed) as refused:
        await machine.restore(bench.microvms.template)
    assert "another memory_mib" in refused.value.message


async def test_a_frozen_machine_uses_no_cpu_and_answers_when_thawed(bench: Bench) -> None:
    async with bench.started() as (machine, guest):
        await guest.start(ProcessSpec(shell="while true; do :; done" if bench.real else "sleep 100", id="busy"))
        await asyncio.sleep(0.2)
        await machine.freeze()
        await machine.freeze()
        await asyncio.sleep(0.1)
        before = (await machine.usage()).cpu_s
        with pytest.raises(PandastackError):
            await guest.health(timeout_s=1)
        assert (await machine.usage()).cpu_s - before < 0.02
        await machine.thaw()
        await machine.thaw()
        assert (await guest.health(timeout_s=30 * PATIENCE)).live == 1
        if bench.real:
            await until_used(machine, before + 0.1)


async def until_used(machine: Machine, cpu_s: float) -> None:
    async with asyncio.timeout(30 * PATIENCE):
        used = (await machine.usage()).cpu_s
        while used < cpu_s:
            await asyncio.sleep(0.05)
            used = (await machine.usage()).cpu_s


async def test_usage_is_of_this_machine_and_only_grows(bench: Bench) -> None:
    async with bench.started() as (machine, guest):
        before = await machine.usage()
        assert before.pid > 1
        assert min(before.memory_bytes, before.resident_bytes, before.virtual_bytes, before.threads) > 0
        await say(guest, "echo 1; echo 2; echo 3")
        after = await machine.usage()
        assert after.cpu_s > before.cpu_s
        assert after.uptime_s > before.uptime_s


async def test_memory_share_follows_what_is_used(bench: Bench) -> None:
    async with bench.started() as (machine, guest):
        if bench.runtime.capabilities.own_kernel:
            # Its kernel ends whoever needs too much: using memory brings the machine no nearer to its end.
            await bench.use_memory(machine, guest, 128 << 20)
            assert machine.memory_share() == 0
            return
        before = machine.memory_share()
        assert 0 < before < 0.5
        await bench.use_memory(machine, guest, 128 << 20)
        await until(lambda: machine.memory_share() > before + 0.3)


@pytest.mark.parametrize("reason", ["oom", "exited"])
async def test_the_end_of_a_machine_says_why(bench: Bench, reason: str) -> None:
    if reason == "oom" and bench.runtime.capabilities.own_kernel:
        pytest.skip("such a machine outlives it: see the next test")
    async with bench.started() as (machine, guest):
        ended = asyncio.create_task(machine.ended())
        cancelled = asyncio.create_task(machine.ended())
        await asyncio.sleep(0.05)
        cancelled.cancel()
        assert not ended.done()
        assert not machine.over
        await bench.end_by(machine, guest, reason)
        async with asyncio.timeout(60 * PATIENCE):
            assert await ended == reason
        assert await machine.ended() == reason
        assert machine.over
        async with asyncio.timeout(10 * PATIENCE):
            await guest.ended()


async def test_who_needs_too_much_memory_is_ended_and_a_machine_with_a_kernel_lives(bench: Bench) -> None:
    if not bench.runtime.capabilities.own_kernel:
        pytest.skip("the host ends such a machine: see the test before")
    async with bench.started() as (machine, guest):
        await guest.start(ProcessSpec(argv=["sleep", "300"], id="other"))
        await guest.start(ProcessSpec(argv=["tail", "/dev/zero"], id="hog"))
        end = await guest.wait("hog", timeout_s=120 * PATIENCE)
        assert end.signal == signal.SIGKILL
        assert await say(guest, "echo on") == ("on\n", 0)
        assert [one.running for one in await guest.list_processes() if one.id == "other"] == [True]
        assert not machine.over


async def test_a_stopped_machine_says_so(bench: Bench) -> None:
    async with bench.started() as (machine, guest):
        ended = asyncio.create_task(machine.ended())
        await asyncio.sleep(0.05)
        await machine.stop()
        async with asyncio.timeout(10 * PATIENCE):
            assert await ended == "stopped"
            await guest.ended()
        assert machine.over
        await machine.stop()
        with pytest.raises(RuntimeFailed):
            await machine.connect()


async def test_two_sessions_follow_each_other(bench: Bench) -> None:
    async with bench.started() as (machine, guest):
        await guest.start(ProcessSpec(shell="sleep 100", id="p"))
        stream = await guest.run(ProcessSpec(shell="yes | head -c 3000000"))
        await anext(stream)
        await guest.close()  # In the middle of its output.
        async with bench.guest_of(machine) as again:
            assert "p" in [one.id for one in await again.list_processes() if one.running]
            assert await say(again, "echo hi") == ("hi\n", 0)


def reborn(bench: Bench) -> Runtime:
    """The runtime as a restarted daemon has it. The fake is its own kernel, so it stays."""
    if isinstance(bench.runtime, GvisorRuntime):
        old = bench.runtime
        assert bench.keeper is not None
        keeper = bench.keeper = Keeper(bench.root / "k" / "keeper.sock")
        old.keeper.close()  # type: ignore[attr-defined]
        old.keeper = keeper
        return GvisorRuntime(old.runsc, root=old.root, group=bench.group, guest=bench.guest, keeper=keeper)
    if bench.microvms is not None:
        return bench.microvms.again(bench.run, bench.group)
    return bench.runtime


def forget(bench: Bench, machine: Machine) -> None:
    """What the death of a daemon does to a machine's object: its descriptors are closed, nothing else."""
    bench.made.remove(machine)
    bench.forgotten.add(machine.spec.id)
    if bench.real:
        machine.let_go()


@pytest.mark.parametrize("frozen", [False, True], ids=["awake", "frozen"])
async def test_a_running_machine_is_adopted_after_a_restart(bench: Bench, frozen: bool) -> None:
    async with bench.started() as (machine, guest):
        await guest.start(ProcessSpec(shell="sleep 0.5; echo done; sleep 100", id="p"))
        if frozen:
            await guest.close()
            await machine.freeze()
    forget(bench, machine)
    runtime = reborn(bench)
    await runtime.probe()
    adopted = await runtime.adopt(machine.spec)
    assert adopted is not None
    bench.made.append(adopted)
    async with bench.guest_of(adopted) as guest:
        async with asyncio.timeout(60 * PATIENCE), await guest.attach("p") as stream:
            assert (await anext(stream)).data == b"done\n"
        assert await say(guest, "echo hi") == ("hi\n", 0)
        await bench.end_by(adopted, guest, "exited") if bench.name == "fake" else os.kill((await adopted.usage()).pid, signal.SIGKILL)
        async with asyncio.timeout(30 * PATIENCE):
            assert await adopted.ended() == "exited"


async def test_a_machine_that_is_gone_is_not_adopted(bench: Bench) -> None:
    async with bench.started() as (machine, guest):
        await bench.end_by(machine, guest, "exited")
        await machine.ended()
        assert await bench.runtime.adopt(machine.spec) is None
    assert await bench.runtime.adopt(await bench.spec()) is None


async def test_a_sweep_removes_all_but_what_is_kept(bench: Bench) -> None:
    kept, other, third = await bench.prepared(), await bench.prepared(), await bench.prepared()
    await kept.start()
    await other.start()
    forget(bench, other)
    forget(bench, third)
    assert await bench.runtime.sweep([kept.spec.id]) == sorted([other.spec.id, third.spec.id])
    async with bench.guest_of(kept) as guest:
        assert await say(guest, "echo hi") == ("hi\n", 0)
    assert await bench.runtime.sweep([kept.spec.id]) == []


async def test_a_sweep_touches_no_other_install(bench: Bench) -> None:
    other: Runtime = FakeRuntime()
    if isinstance(bench.runtime, GvisorRuntime):
        other = GvisorRuntime(
            bench.runtime.runsc, root=bench.root / "other", group=f"{bench.group}-2", guest=bench.guest, keeper=bench.runtime.keeper
        )
    elif bench.microvms is not None:
        other = bench.microvms.runtime(bench.root / "other", f"{bench.group}-2")
    await other.probe()
    async with bench.started() as (_, guest):
        assert await other.sweep([]) == []
        assert await say(guest, "echo hi") == ("hi\n", 0)


async def test_limits_hold(bench: Bench) -> None:
    if not bench.real:
        pytest.skip("the fake has no kernel to hold limits")
    async with bench.started(Limits(cpu=0.5, memory_mib=256, disk_mib=256)) as (machine, guest):
        before, began = (await machine.usage()).cpu_s, time.monotonic()
        await say(guest, "timeout 2 sh -c 'while :; do :; done'")
        share = ((await machine.usage()).cpu_s - before) / (time.monotonic() - began)
        assert share < 0.8
        _, code = await say(guest, "head -c 400000000 /dev/zero >/root/big")
        assert code != 0, "the disk is larger than its limit"
        assert await say(guest, "rm /root/big; echo on") == ("on\n", 0)


async def test_a_dead_keeper_costs_the_adoption_and_nothing_else(bench: Bench) -> None:
    if bench.keeper is None:
        pytest.skip("its machines need no keeper")
    async with bench.started() as (machine, guest):
        (pid,) = [int(entry.parent.name) for entry in Path("/proc").glob("[0-9]*/cmdline") if _is_keeper(entry, bench.root)]
        os.kill(pid, signal.SIGKILL)
        assert await say(guest, "echo hi") == ("hi\n", 0)
        (await bench.prepared()).spec  # noqa: B018 - a new keeper takes over for what comes
    forget(bench, machine)
    runtime = reborn(bench)
    await runtime.probe()
    assert await runtime.adopt(machine.spec) is None
    assert machine.spec.id in await runtime.sweep([bench.made[-1].spec.id])


def _is_keeper(cmdline: Path, root: Path) -> bool:
    try:
        words = cmdline.read_bytes()
    except OSError:
        return False
    return b"keeper.py" in words and os.fsencode(root) in words


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
                await _check_jail(machine)
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

    async def test_forks_of_forks_need_no_earlier_state(self, bench: Bench) -> None:
        """Three generations, the second of them adopted after a restart; each state is removed before the next one is made."""
        first, second = _made(bench.root / "first"), _made(bench.root / "second")
        write = "head -c 20000000 /dev/urandom >/dev/shm/{0}; cp /dev/shm/{0} /root/{0}; sha256sum </dev/shm/{0}"
        async with bench.started() as (machine, guest):
            a, _ = await say(guest, write.format("a"))
            await machine.snapshot(first, resume=True)
            assert await say(guest, "rm /dev/shm/a /root/a; echo gone") == ("gone\n", 0)
        child = await bench.prepared()
        await child.restore(first)
        shutil.rmtree(first)
        async with bench.guest_of(child) as guest:
            b, _ = await say(guest, write.format("b"))
        forget(bench, child)
        bench.runtime = reborn(bench)
        await bench.runtime.probe()
        adopted = await bench.runtime.adopt(child.spec)
        assert adopted is not None
        bench.made.append(adopted)
        await adopted.snapshot(second, resume=True)
        async with bench.guest_of(adopted) as guest:
            await say(guest, "rm /dev/shm/* /root/?")
        grandchild = await bench.prepared()
        await grandchild.restore(second)
        await adopted.stop()
        shutil.rmtree(second)
        async with bench.guest_of(grandchild) as guest:
            await say(guest, "echo 3 >/proc/sys/vm/drop_caches")
            for name, digest in (("a", a), ("b", b)):
                assert await say(guest, f"sha256sum </dev/shm/{name}; sha256sum </root/{name}") == (digest * 2, 0)

    async def test_a_state_says_how_long_its_machine_stood_still(self, bench: Bench) -> None:
        into = _made(bench.root / "saved")
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
        """A program counts in 24 MB, page after page, and looks whether each page is as it left it: first in the parent, then in a copy."""
        program = (
            "import sys; n, size = 6000, 4096; b = bytearray(n * size); t = 0\n"
            "while True:\n"
            "    for p in range(0, n * size, size):\n"
            "        if b[p : p + 4] != t.to_bytes(4, 'little'): sys.exit(f'page {p // size} is not of turn {t}')\n"
            "        b[p : p + 4] = (t + 1).to_bytes(4, 'little')\n"
            "    t += 1; print(t, file=open('/root/turn', 'w'))\n"
        )
        into = _made(bench.root / "saved")
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
        into = _made(bench.root / "saved")
        (into / "disk").touch()
        async with bench.started() as (machine, guest):
            with pytest.raises(RuntimeFailed):
                await machine.snapshot(into, resume=True)
            assert await say(guest, "echo on") == ("on\n", 0)

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
        hangs = _made(bench.root / "own") / "bin" / "qemu"
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


@dataclass(kw_only=True)
class Away:
    """A saved state of which the memory is in an object store: what reads it, and what a program in it had kept in memory."""

    bench: Bench
    lazy: LazyMemory
    store: Path
    chunks: Path
    state: Path
    file: Path
    digest: str
    paged: bool

    SUM = "sha256sum </dev/shm/kept"

    async def restored(self) -> Machine:
        machine = await self.bench.prepared()
        await machine.restore(self.state)
        source = machine.memory_source
        assert source is not None
        assert (source.file, source.user) == (self.file, Path(f"/proc/{(await machine.usage()).pid}").stat().st_uid)
        return machine

    async def why(self, machine: Machine) -> str:
        """Why a part of its memory did not come. It may be told so by then, or it waits for that part."""
        source = machine.memory_source
        assert source is not None
        ends = time.monotonic() + 60 * PATIENCE
        while (why := await self.lazy.why(source.file, source.user)) is None:
            assert time.monotonic() < ends, "nobody says so"
            await asyncio.sleep(0.1)
        return why


@pytest.fixture
async def away(bench: Bench, paged: bool, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Away]:
    """Memory is mapped as a file, or `paged`: each page that is touched comes from the pager."""
    if not Path("/dev/fuse").exists():
        pytest.skip("this machine has no FUSE")
    for name in ("START_TIMEOUT_S", "ANSWER_TIMEOUT_S"):
        monkeypatch.setattr(lazy, name, getattr(lazy, name) * PATIENCE)
    state, chunks = bench.root / "saved", bench.root / "chunks"
    # On another file system than the cache: of a store that is near nothing is kept.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as store:
        memory = LazyMemory(bench.root / "lazy", bench.root / "indexes", objects=store, cache=chunks, cache_mb=1024)
        if paged:
            assert isinstance(bench.runtime, FirecrackerRuntime)
            assert driver.has_userfaultfd()
            bench.runtime.pager = memory
        async with bench.started() as (machine, guest):
            digest, _ = await say(guest, f"head -c 48M /dev/urandom >/dev/shm/kept; {Away.SUM}")
            await machine.snapshot(_made(state), resume=False)
        depot = Depot(Objects(store), "here")
        with depot.putting("one"):
            kept = depot.put("one", {"mem": state / "mem"})
        (state / "mem").unlink()
        try:
            file = await memory.file(kept.files["mem"])
            (state / "mem").symlink_to(file)
            yield Away(bench=bench, lazy=memory, store=Path(store), chunks=chunks, state=state, file=file, digest=digest, paged=paged)
        finally:
            for made in bench.made:
                await made.stop()
            memory.close(needed=False)
        assert not (bench.root / "lazy").exists()


@pytest.mark.parametrize(
    ("bench", "paged"),
    [(name, False) for name in ACCELERATORS] + [("firecracker-kvm", True)],
    indirect=["bench"],
    ids=[*(f"{name}-mapped" for name in ACCELERATORS), "firecracker-kvm-paged"],
)
class TestMemoryThatIsNotHere:
    """A machine runs before its memory is here, and one that cannot get it is known, and ended."""

    async def test_it_comes_when_it_is_touched_and_is_saved_with_the_rest(self, away: Away) -> None:
        bench = away.bench
        machine = await away.restored()
        async with bench.guest_of(machine) as guest:
            assert await say(guest, "echo hi") == ("hi\n", 0)
            first = (await away.lazy.status()).fetched
            assert await say(guest, Away.SUM) == (away.digest, 0)
            assert (await away.lazy.status()).fetched > first + 6, "most of twelve chunks of the file"
            own, _ = await say(guest, "head -c 4M /dev/urandom >/dev/shm/own; sha256sum </dev/shm/own")
        forget(bench, machine)
        bench.runtime = reborn(bench)
        await bench.runtime.probe()
        adopted = await bench.runtime.adopt(machine.spec)
        assert adopted is not None
        bench.made.append(adopted)
        assert adopted.memory_source == machine.memory_source
        first_state, second_state = _made(bench.root / "first"), _made(bench.root / "second")
        await adopted.snapshot(first_state, resume=True)
        async with bench.guest_of(adopted) as guest:
            assert await say(guest, f"rm /dev/shm/own; {Away.SUM}") == (away.digest, 0)
        await adopted.snapshot(second_state, resume=True)
        facts = json.loads((second_state / "machine.json").read_text())
        assert not facts.get("whole"), "it is laid over the first one"
        await adopted.stop()
        # From here on nothing is there that could be fetched.
        await away.lazy._lose(away.lazy._server)  # type: ignore[arg-type]
        for state, kept in ((first_state, f"{away.digest}{own}"), (second_state, away.digest)):
            child = await bench.prepared()
            await child.restore(state)
            async with bench.guest_of(child) as guest:
                assert (await say(guest, "cat /dev/shm/kept | sha256sum; [ ! -e /dev/shm/own ] || sha256sum </dev/shm/own"))[0] == kept

    async def test_what_one_has_fetched_the_next_one_has(self, away: Away) -> None:
        one, other = await away.restored(), await away.restored()
        async with away.bench.guest_of(one) as guest:
            assert await say(guest, Away.SUM) == (away.digest, 0)
            fetched = (await away.lazy.status()).fetched
        async with away.bench.guest_of(other) as guest:
            assert await say(guest, Away.SUM) == (away.digest, 0)
            memory = await other.memory()
            assert (await away.lazy.status()).fetched == fetched, "the second time all of it is here"
        # Pages of a file are the same ones for all who map it; those that a pager brings are each machine's own.
        own = memory.own_bytes > 48 << 20
        assert own is away.paged, memory
        assert (memory.shared_bytes > 48 << 20) is not away.paged, memory

    async def test_a_missing_part_is_known_and_fails_nobody_else(self, away: Away) -> None:
        needs, other = await away.restored(), await away.restored()
        async with away.bench.guest_of(other) as guest:
            assert await say(guest, "echo hi") == ("hi\n", 0)
        shutil.rmtree(away.store / "chunks")
        shutil.rmtree(away.chunks)
        guest = await Guest.open(await needs.connect(), timeout_s=30 * PATIENCE)
        with contextlib.suppress(PandastackError):
            await guest.start(ProcessSpec(shell=Away.SUM))
        assert await away.why(needs) == "missing"
        async with asyncio.timeout(30 * PATIENCE):
            await guest.close()
            await needs.stop()  # Also where it still waits.
        source = other.memory_source
        assert source is not None
        assert await away.lazy.why(source.file, source.user) is None
        async with away.bench.guest_of(other) as guest:
            assert await say(guest, "echo hi") == ("hi\n", 0)

    async def test_the_death_of_who_serves_it_is_known(self, away: Away) -> None:
        machine = await away.restored()
        guest = await Guest.open(await machine.connect(), timeout_s=30 * PATIENCE)
        os.kill((await away.lazy.status()).pid, signal.SIGKILL)
        with contextlib.suppress(PandastackError):
            await guest.start(ProcessSpec(shell=Away.SUM))
        assert await away.why(machine) == "server"
        async with asyncio.timeout(30 * PATIENCE):
            await guest.close()
            await machine.stop()
            assert await machine.ended() == "stopped"
        with pytest.raises(PandastackError):
            await (await away.bench.prepared()).restore(away.state)

    async def test_nothing_of_it_is_left_in_the_jail(self, away: Away) -> None:
        machine = await away.restored()
        if away.bench.name == "firecracker-kvm":
            await _check_jail(machine)
        assert isinstance(machine, QemuMachine | FirecrackerMachine)
        process = machine._process
        assert process is not None
        opened = [str(link.readlink()) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
        assert str(away.file) not in opened


async def _check_jail(machine: Machine) -> None:
    """Nothing of the host, and nothing that its user could put there, but a small file system in memory."""
    pid = (await machine.usage()).pid
    top = Path(f"/proc/{pid}/root")
    assert {path.name for path in top.iterdir()} == {"api.sock", "disk", "s", "v.sock"}
    uid = str(Path(f"/proc/{pid}").stat().st_uid)
    lines = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    assert {words[4] for words in lines} == {"/", "/s"}
    script = f"for f in {top} {top}/s; do (: >$f/new) 2>/dev/null && echo $f; done; true"
    argv = ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", "sh", "-c", script]
    wrote = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, check=True)
    assert str(top) not in wrote.stdout.split()
    for name in ("disk", "s"):
        assert (top / name).stat().st_uid == (0 if name == "disk" else int(uid))
    assert re.search(r"^Max core file size +0 +0 ", Path(f"/proc/{pid}/limits").read_text(), re.MULTILINE)


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


class TestGvisorProbe:
    """A runsc that is no good is refused with a reason a person can act on."""

    @pytest.fixture
    def probe(self, short: Path, guest_directory: Path, no_leaks: None) -> Iterator[object]:
        keeper = Keeper(short / "k" / "keeper.sock")

        async def of(text: str | None) -> tuple[bool, str, str]:
            runsc = short / "runsc"
            if text is not None:
                runsc.write_text(text)
                runsc.chmod(runsc.stat().st_mode | stat.S_IXUSR)
            runtime = GvisorRuntime(runsc, root=short / "gv", group=f"pandastack-test-{short.name}", guest=guest_directory, keeper=keeper)
            probe = await runtime.probe()
            return probe.works, probe.reason or "", probe.hint or ""

        yield of
        keeper.close()

    async def test_one_that_is_not_there(self, probe: object) -> None:
        works, reason, hint = await probe(None)  # type: ignore[operator]
        assert not works
        assert "cannot be started" in reason
        assert "PANDASTACK_RUNSC" in hint

    async def test_one_that_is_too_old(self, probe: object) -> None:
        works, reason, hint = await probe("#!/bin/sh\necho runsc version release-20230101.0\n")  # type: ignore[operator]
        assert not works
        assert "too old" in reason
        assert "20240729" in hint

    async def test_one_that_is_no_program(self, probe: object) -> None:
        works, reason, _ = await probe("\x7fELFgarbage")  # type: ignore[operator]
        assert not works
        assert "cannot be started" in reason

    async def test_one_that_fails_at_everything(self, probe: object) -> None:
        if os.geteuid() != 0:
            pytest.skip("cgroups need root")
        works, reason, hint = await probe("#!/bin/sh\necho no luck >&2; exit 1\n")  # type: ignore[operator]
        assert not works
        assert "no control dialect" in reason
        assert "no luck" in hint, "runsc's own last words are in it"


async def test_a_cancelled_prepare_closes_what_it_opened_although_its_error_is_kept(
    short: Path, guest_directory: Path, rootfs: Path, no_leaks: None
) -> None:
    """Whoever keeps the error keeps the frames in it, so nothing may wait there for the collector."""
    putting, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    class SlowKeeper:
        def put(self, name: str, fds: list[int]) -> None:
            loop.call_soon_threadsafe(putting.set)
            assert go_on.wait(20)

        def get(self, name: str) -> list[int]:
            return []

        def drop(self, name: str) -> None:
            pass

    runtime = GvisorRuntime(
        _runsc("gvisor"), root=short / "gv", group=f"pandastack-test-{short.name}", guest=guest_directory, keeper=SlowKeeper()
    )
    machine, (disk, state) = MachineId("m" + secrets.token_hex(8)), (short / "disk", short / "state")
    disk.mkdir()
    state.mkdir()
    spec = MachineSpec(id=machine, rootfs=rootfs, guest=guest_directory, disk=disk, state=state, limits=LIMITS)
    go_on.set()
    assert (await runtime.probe()).works
    go_on.clear()
    putting.clear()
    preparing = asyncio.create_task(runtime.prepare(spec))
    async with asyncio.timeout(20):
        await putting.wait()
    before = _sockets()
    preparing.cancel()
    go_on.set()
    (error,) = await asyncio.gather(preparing, return_exceptions=True)
    assert isinstance(error, asyncio.CancelledError)
    assert len(before - _sockets()) == 4, "both ends of stdin and of stdout"
    assert await runtime.sweep([]) == []


def _sockets() -> set[str]:
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(str(fd.readlink()))
    return {what for what in found if what.startswith("socket:")}


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
        works, reason, hint = await probe(str(_qemu_binary()))  # type: ignore[operator]
        assert not works
        assert "cannot be used" in reason
        assert "setup" in hint

    async def test_a_kernel_that_is_none(self, probe: object) -> None:
        works, reason, _ = await probe(str(_qemu_binary()), b"garbage" * 1000)  # type: ignore[operator]
        assert not works
        assert "does not boot with tcg" in reason
        assert "linux kernel" in reason.lower() or "kernel" in reason.split("tcg:")[1], "QEMU's own last words are in it"
