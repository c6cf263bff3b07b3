"""Drives Firecracker: one jailed process for each machine, that nobody but this host speaks with.

prepare: cgroup, a jailed Firecracker that waits. restore: disk, memory and devices by one call. start: another one that boots.
stop: kill the cgroup, remove the jail. Machines outlive this daemon without help: their sockets are in their jails.
Probing boots the guest kernel to see that all of it works; the answer is kept for as long as this host is up.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pandastack.errors import HostUnfit, RuntimeFailed
from pandastack.host.runtimes import cgroups, microvms
from pandastack.host.runtimes.base import Capabilities, Limits, MachineId, MachineSpec, Pager, Probe
from pandastack.host.runtimes.firecracker import command
from pandastack.host.runtimes.firecracker.command import Binaries
from pandastack.host.runtimes.firecracker.machine import FirecrackerMachine
from pandastack.host.runtimes.hypervisors import HypervisorRuntime
from pandastack.host.runtimes.microvms import KVM

_ASK_TIMEOUT_S = 20.0
_TRIAL = Limits(cpu=1, memory_mib=128, disk_mib=1)
_REMEDY = "run `pandastack host install firecracker`, or name one in PANDASTACK_FIRECRACKER"


class FirecrackerRuntime(HypervisorRuntime[FirecrackerMachine]):
    """See `base.Runtime`. `root` is private to this install.

    `vmlinux`, `initramfs` and `digest` are those of a guest kernel as `host.kernels` makes it. `group` is the parent of the machines'
    cgroups and of no others. `clone` makes a new file with the content of another one, sharing its blocks where it can. `cache` is a
    folder for what probing found out. A boot may take `patience` times as long as on a CPU of today. With a `pager`, and a kernel that
    has userfaultfd, a memory that is not here yet is had from that; else it is mapped as the file that it is. `unfiltered` takes a
    Firecracker without seccomp filters, too: for tests only.
    """

    name = "firecracker"
    isolation = "microvm"
    acceleration: str | None = "kvm"
    capabilities = Capabilities(snapshot=True, fork_memory=True, own_kernel=True, fixed_size=True, image=True, memory_file=microvms.MEMORY)

    def __init__(
        self,
        binaries: Binaries,
        *,
        vmlinux: Path,
        initramfs: Path,
        digest: str,
        root: Path,
        group: str,
        clone: Callable[[Path, Path], None],
        cache: Path | None = None,
        patience: float = 1.0,
        pager: Pager | None = None,
        unfiltered: bool = False,
    ) -> None:
        super().__init__(root=root, group=group, clone=clone, cache=cache, patience=patience)
        self.binaries = binaries
        self.pager = pager if pager is not None and has_userfaultfd() else None
        self._remarks = ["there is no userfaultfd here, so memory that is not here yet is mapped"] if pager is not self.pager else []
        self._vmlinux, self._initramfs, self._digest = vmlinux, initramfs, digest
        self._unfiltered = unfiltered

    def jailed(self, jail: command.Jail, cgroup: cgroups.MachineCgroup, memory_mib: int, kernel: command.Kernel | None) -> list[str]:
        return command.jailed(
            self.binaries,
            jail,
            uid=self.users.of(jail.machine),
            joins=cgroup.joins(),
            cgroup_version=self._group.hierarchy.version,
            cgroup=cgroup.path,
            memory_mib=memory_mib,
            kernel=kernel,
        )

    @contextmanager
    def kernel(self) -> Iterator[command.Kernel]:
        """As descriptors, which the process must inherit while this is open."""
        with self._vmlinux.open("rb") as vmlinux, self._initramfs.open("rb") as initramfs:
            yield command.Kernel(vmlinux_fd=vmlinux.fileno(), initramfs_fd=initramfs.fileno())

    # Probing.

    async def probe(self) -> Probe:
        """Boot the guest kernel. A second or so the first time since this host is up. `reason` also says what is not as it should be."""
        try:
            self.version, number = await self._versions()
            if number < command.OLDEST_VERSION:
                reason = f"Firecracker {self.version} is too old, the oldest that can be used is {command.dotted(command.OLDEST_VERSION)}"
                return Probe(works=False, version=self.version, reason=reason, hint=_REMEDY)
            remarks = await asyncio.to_thread(self._judge)
        except (RuntimeFailed, HostUnfit) as error:
            return Probe(
                works=False, version=self.version or None, reason=error.message, hint=error.hint or error.fields.get("detail") or _REMEDY
            )
        except OSError as error:
            reason = f"the guest kernel or the run directory cannot be used ({error})"
            return Probe(works=False, version=self.version, reason=reason, hint="run `pandastack setup`")
        if number[:2] > command.NEWEST_TESTED:
            remarks.append(f"newer than what was tested, {command.dotted(command.NEWEST_TESTED)}")
        parts = (self.version, command.template(), microvms.cpu())
        self.key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return Probe(works=True, version=self.version, key=self.key, boots=self._digest, reason="; ".join(remarks) or None)

    async def _versions(self) -> tuple[str, tuple[int, int, int]]:
        found = await self._version(self.binaries.firecracker, "Firecracker")
        jailer, _ = await self._version(self.binaries.jailer, "the jailer")
        if jailer != found[0]:
            raise HostUnfit(f"the jailer is of version {jailer}, and Firecracker of {found[0]}", hint="take both from one release")
        return found

    async def _version(self, binary: Path, what: str) -> tuple[str, tuple[int, int, int]]:
        try:
            process = await asyncio.create_subprocess_exec(
                binary, "--version", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, stdin=asyncio.subprocess.DEVNULL
            )
        except OSError as error:
            raise HostUnfit(f"{what} cannot be started ({error.strerror})", hint=_REMEDY) from error
        try:
            async with asyncio.timeout(_ASK_TIMEOUT_S):
                output, _ = await process.communicate()
        except TimeoutError as error:
            raise HostUnfit(f"{binary} --version does not end", hint=_REMEDY) from error
        finally:
            if process.returncode is None:
                process.kill()
        found = command.version(output.decode("utf-8", "replace"))
        if found is None:
            raise HostUnfit(f"{binary} is no {what.removeprefix('the ')} that could be used", hint=_REMEDY)
        return found

    def _judge(self) -> list[str]:
        """What is to be said of one that works. Raises RuntimeFailed or HostUnfit where it does not."""
        remarks = [*self._remarks]
        if not command.has_filters(self.binaries.firecracker.read_bytes()):
            if not self._unfiltered:
                raise HostUnfit(
                    "this Firecracker has no seccomp filters, because it was built for glibc",
                    hint="use a release of Firecracker, or build it for musl",
                )
            remarks.append("without seccomp filters, for tests only")
        if not KVM.exists():
            raise HostUnfit(f"there is no {KVM}", hint="use a machine with KVM, or another runtime")
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        changed = [str(path.stat().st_mtime_ns) for path in (self.binaries.firecracker, self.binaries.jailer)]
        identity = [microvms.boot_id(), self.version, *changed, self._digest, command.template()]
        if (self._verdicts.get(identity) or {}).get("boots") is not True:
            self._try()
            self._verdicts.put(identity, {"boots": True})
        return remarks

    def _try(self) -> None:
        """Boot to the guest daemon, which finds no disk that it knows. Raises RuntimeFailed with what it said before that."""
        place = self.root / f"probe-{os.getpid()}"
        place.mkdir(mode=0o700)
        empty = place / "empty"
        empty.touch()
        os.truncate(empty, _TRIAL.disk_mib << 20)
        spec = MachineSpec(id=MachineId(place.name), rootfs=empty, guest=place, disk=place, state=place, limits=_TRIAL)
        machine = FirecrackerMachine(self, spec, self.cgroup(spec.id))
        try:
            machine.limit()
            came, console = machine.boot(lambda said: microvms.ARRIVED in said)
            if not came:
                raise RuntimeFailed("a guest kernel does not boot with Firecracker", detail=microvms.telling(console))
        finally:
            machine.end_process()
            self.cgroup(spec.id).remove()
            self.users.forget(spec.id)
            shutil.rmtree(place, ignore_errors=True)

    # Machines.

    def _machine(self, spec: MachineSpec) -> FirecrackerMachine:
        return FirecrackerMachine(self, spec, self.cgroup(spec.id))

    def remove_files(self, machine: str) -> None:
        """Of a probe, by a daemon that died meanwhile. The jail of any other is in the folder of its disk, which is the caller's."""
        shutil.rmtree(self.root / machine, ignore_errors=True)


def has_userfaultfd(misc: Path = Path("/proc/misc"), allowed: Path = Path("/proc/sys/vm/unprivileged_userfaultfd")) -> bool:
    """Whether a process without rights can have one that serves faults of a guest: the jailer makes a device for it where there is one."""
    try:
        if any(line.split()[1:] == ["userfaultfd"] for line in misc.read_text().splitlines()):
            return True
        return allowed.read_text().strip() == "1"
    except OSError:
        return False
