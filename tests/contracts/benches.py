"""Runtimes as the contract suites have them: with what their machines need, and the oracle that says what such a machine left."""

# ruff: noqa: ASYNC240, S604 - `shell` is a field of ProcessSpec and runs inside a sandbox
from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from pandastack.host import kernels
from pandastack.host.guest import Guest, ProcessSpec
from pandastack.host.keeper import Keeper
from pandastack.host.runtimes.base import Limits, Machine, MachineId, MachineSpec, Runtime
from pandastack.host.runtimes.fake import FakeRuntime
from pandastack.host.runtimes.firecracker.command import Binaries
from pandastack.host.runtimes.firecracker.driver import FirecrackerRuntime
from pandastack.host.runtimes.gvisor.driver import GvisorRuntime
from pandastack.host.runtimes.qemu.driver import QemuRuntime
from pandastack.host.storage import space
from pandastack.host.storage.disks import Disks
from pandastack.host.storage.images import Image
from pandastack.host.storage.roots import Roots

PATIENCE = float(os.environ.get("PANDASTACK_TEST_PATIENCE", "1"))
CACHE = Path(os.environ.get("PANDASTACK_TEST_CACHE", "/var/cache/pandastack"))
LIMITS = Limits(cpu=1, memory_mib=256, disk_mib=512)
# The accelerators of microVMs.
ACCELERATORS: dict[str, Literal["kvm", "tcg"]] = {"qemu": "tcg", "qemu-kvm": "kvm", "firecracker-kvm": "kvm"}
NAMES = ["fake", "gvisor", "gvisor-new", *ACCELERATORS]


def runsc(name: str) -> Path:
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


def firecracker_binary() -> Path:
    """The one that PANDASTACK_FIRECRACKER names, with the jailer beside it."""
    named = os.environ.get("PANDASTACK_FIRECRACKER")
    if not named:
        pytest.skip("no Firecracker: PANDASTACK_FIRECRACKER does not name one")
    if not Path(named).exists():
        pytest.fail(f"there is no {named}, which PANDASTACK_FIRECRACKER names")
    if os.geteuid() != 0 or shutil.which("mkfs.xfs") is None:
        pytest.skip("microVMs need root and xfsprogs")
    return Path(named)


def qemu_binary() -> Path:
    found = shutil.which("qemu-system-x86_64")
    if os.geteuid() != 0 or found is None or shutil.which("mkfs.xfs") is None:
        pytest.skip("microVMs need root, qemu-system-x86 and xfsprogs")
    return Path(found)


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
        kernel = {"vmlinux": self.kernel.vmlinux, "initramfs": self.kernel.initramfs, "digest": self.kernel.digest}
        common: dict[str, Any] = kernel | {"root": root, "group": group, "clone": space.clone, "patience": PATIENCE}
        if self.name == "firecracker-kvm":
            # One that was built here, for glibc, has no filters.
            return FirecrackerRuntime(Binaries(firecracker=self.binary, jailer=self.binary.with_name("jailer")), unfiltered=True, **common)
        return QemuRuntime(self.binary, accelerator=self.accelerator, **common)


async def make_microvms(name: str, kernel: kernels.Kernel, guest_directory: Path, image: Image, xfs: Path) -> Microvms | str:
    """Or why this machine has no KVM that runs guests."""
    binary = firecracker_binary() if name == "firecracker-kvm" else qemu_binary()  # Skips, each time, where there is none.
    folder = xfs / name
    made_folder(folder / "saved")
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
    await _save_template(runtime, made, guest_directory, Path(tempfile.mkdtemp(dir=folder)))
    return made


async def _save_template(runtime: Runtime, made: Microvms, guest_directory: Path, folder: Path) -> None:
    machine_folder, disk = made_folder(folder / "machine"), made_folder(folder / "disk")
    machine = await runtime.prepare(
        MachineSpec(id=MachineId("template"), rootfs=made.root, guest=guest_directory, disk=disk, state=machine_folder, limits=LIMITS)
    )
    try:
        await machine.start()
        guest = await Guest.open(await machine.connect(), timeout_s=30 * PATIENCE)
        assert await say(guest, "echo hi") == ("hi\n", 0)
        await guest.close()
        await machine.snapshot(made.template, resume=False)
    finally:
        await machine.stop()


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


def made_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


async def say(guest: Guest, shell: str) -> tuple[str, int]:
    """stdout and exit code of a line of shell."""
    out = b""
    async with asyncio.timeout(60 * PATIENCE), await guest.run(ProcessSpec(shell=shell)) as stream:
        async for _channel, _offset, data in stream:
            out += data
    return out.decode(), stream.exit.code


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


async def check_jail(machine: Machine) -> None:
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
