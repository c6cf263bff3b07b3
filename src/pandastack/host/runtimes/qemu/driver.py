"""Drives QEMU: one process for each machine, that nobody but this host speaks with.

prepare: cgroup, a confined QEMU that waits for a state. restore: disk, memory, device state over QMP. start: another QEMU that boots.
stop: kill the cgroup, remove files. Machines outlive this daemon without help: their sockets are paths below `root`.
Probing boots the guest kernel, with KVM if there is any, to see what works; the answer is kept for as long as this host is up.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pandastack.errors import HostUnfit, RuntimeFailed
from pandastack.host.runtimes import cgroups, launch, microvms
from pandastack.host.runtimes.base import Capabilities, MachineSpec, Probe
from pandastack.host.runtimes.hypervisors import HypervisorRuntime
from pandastack.host.runtimes.launch import Process
from pandastack.host.runtimes.microvms import KVM
from pandastack.host.runtimes.qemu import capture, command
from pandastack.host.runtimes.qemu.command import Acceleration
from pandastack.host.runtimes.qemu.machine import Kept, QemuMachine

_NAME = "QEMU"
_WAYS: tuple[Acceleration, ...] = ("kvm", "tcg")
_ASK_TIMEOUT_S = 20.0
# A kernel on real KVM is in user space after a third of a second.
_TRIAL_TIMEOUT_S = {"kvm": 5.0, "tcg": 90.0}
_TRIAL_SIZE = microvms.Size(cpus=1, memory_mib=128)
_REMEDY = "install QEMU 7.2 or newer (apt install qemu-system-x86), or use gVisor"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What booting showed. `why` says why not, or why it is not KVM."""

    acceleration: Acceleration | None
    why: str | None = None


class QemuRuntime(HypervisorRuntime[QemuMachine]):
    """See `base.Runtime`. `root` must be short (a socket path is at most 107 bytes) and private to this install.

    `vmlinux`, `initramfs` and `digest` are those of a guest kernel as `host.kernels` makes it. `group` is the parent of the machines'
    cgroups and of no others. `clone` makes a new file with the content of another one, sharing its blocks where it can. `cache` is a
    folder for what probing found out; others may use it too. A boot may take `patience` times as long as on a CPU of today.
    """

    name = "qemu"
    isolation = "microvm"
    capabilities = Capabilities(snapshot=True, fork_memory=True, own_kernel=True, fixed_size=True, image=True, memory_file=microvms.MEMORY)

    def __init__(
        self,
        binary: Path,
        *,
        vmlinux: Path,
        initramfs: Path,
        digest: str,
        root: Path,
        group: str,
        clone: Callable[[Path, Path], None],
        cache: Path | None = None,
        accelerator: Literal["auto", "kvm", "tcg"] = "auto",
        patience: float = 1.0,
    ) -> None:
        super().__init__(root=root, group=group, clone=clone, cache=cache, patience=patience)
        self.acceleration: str | None = None
        self.arenas = capture.Arenas()
        self.kept: dict[Path, Kept] = {}
        # By its own name: links to it may lead through folders that the jail has not.
        self._binary = binary.resolve()
        self._jail = command.Jail.of(root, binary)
        self._vmlinux, self._initramfs, self._digest = vmlinux, initramfs, digest
        self._accelerator = accelerator
        self._tsc_khz = 0

    @property
    def accelerated(self) -> Acceleration:
        if self.acceleration == "kvm":
            return "kvm"
        if self.acceleration == "tcg":
            return "tcg"
        raise RuntimeFailed("QEMU was used before it was probed")

    def confined(self, argv: list[str], machine: str, cgroup: cgroups.MachineCgroup, boot: command.Boot | None) -> list[str]:
        kvm = self.accelerated == "kvm"
        return command.confined(argv, joins=cgroup.joins(), uid=self.users.of(machine), jail=self._jail, kvm=kvm, boot=boot)

    def argv(
        self, size: microvms.Size, channel_fd: int, control_fd: int, *, disk_fd: int | None = None, boot: command.Boot | None = None
    ) -> list[str]:
        return command.qemu(
            self._binary,
            self.accelerated,
            size,
            channel_fd=channel_fd,
            control_fd=control_fd,
            disk_fd=disk_fd,
            boot=boot,
        )

    @contextmanager
    def booting(self, serial_fd: int, processes: int) -> Iterator[command.Boot]:
        """The kernel as descriptors, which QEMU must inherit while this is open."""
        with self._vmlinux.open("rb") as vmlinux, self._initramfs.open("rb") as initramfs:
            yield command.Boot(
                vmlinux_fd=vmlinux.fileno(),
                initramfs_fd=initramfs.fileno(),
                serial_fd=serial_fd,
                arguments=command.kernel_arguments(self.accelerated, self._tsc_khz, processes),
            )

    # Probing.

    async def probe(self) -> Probe:
        """Boot the guest kernel. Seconds the first time since this host is up. `reason` also says why there is no KVM."""
        try:
            self.version, number = await self._version()
            if number < command.OLDEST_VERSION:
                return Probe(works=False, version=self.version, reason=f"QEMU {self.version} is too old", hint=_REMEDY)
            verdict = await asyncio.to_thread(self._judge)
        except (RuntimeFailed, HostUnfit) as error:
            return Probe(works=False, reason=error.message, hint=error.hint or error.fields.get("detail"))
        except OSError as error:
            return Probe(
                works=False, reason=f"the guest kernel or the run directory cannot be used ({error})", hint="run `pandastack setup`"
            )
        if verdict.acceleration is None:
            hint = "choose the accelerator auto or tcg, or a machine with KVM" if self._accelerator == "kvm" else _REMEDY
            return Probe(works=False, version=self.version, reason=verdict.why, hint=hint)
        self.acceleration = verdict.acceleration
        tied_to = microvms.cpu() if verdict.acceleration == "kvm" else str(self._tsc_khz)
        # Within a series, as 7.2, what QEMU saves stays the same: an update that mends it loses nothing.
        parts = (str(number), command.template(verdict.acceleration), verdict.acceleration, tied_to)
        self.key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        boots = f"{self.version} {self._digest} {command.kernel_arguments(verdict.acceleration, 0, 0)}"
        return Probe(works=True, version=self.version, key=self.key, boots=boots, reason=verdict.why)

    async def _version(self) -> tuple[str, tuple[int, int]]:
        try:
            process = await asyncio.create_subprocess_exec(
                self._binary,
                "--version",
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                stdin=asyncio.subprocess.DEVNULL,
            )
        except OSError as error:
            raise HostUnfit(f"QEMU cannot be started ({error.strerror})", hint=_REMEDY) from error
        try:
            async with asyncio.timeout(_ASK_TIMEOUT_S):
                output, _ = await process.communicate()
        except TimeoutError as error:
            raise HostUnfit(f"{self._binary} --version does not end", hint=_REMEDY) from error
        finally:
            if process.returncode is None:
                process.kill()
        found = command.version(output.decode("utf-8", "replace"))
        if found is None:
            raise HostUnfit(f"{self._binary} is no QEMU that could be used", hint=_REMEDY)
        return found

    def _judge(self) -> Verdict:
        """The verdict of an earlier probe if nothing changed, else a new one."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._tsc_khz = self._verdicts.steady_khz(microvms.tsc_khz())
        identity = [microvms.boot_id(), self.version, str(self._binary.stat().st_mtime_ns), self._digest, self._accelerator]
        identity += [f"{command.template(way)} {command.kernel_arguments(way, 0, 0)}" for way in _WAYS]
        with contextlib.suppress(TypeError):
            kept = Verdict(**(self._verdicts.get(identity) or {}))
            if kept.acceleration in ("kvm", "tcg"):
                return kept
        verdict = self._try_all()
        if verdict.acceleration is not None:
            self._verdicts.put(identity, {"acceleration": verdict.acceleration, "why": verdict.why})
        return verdict

    def _try_all(self) -> Verdict:
        reasons = []
        wanted = _WAYS if self._accelerator == "auto" else (self._accelerator,)
        for acceleration in wanted:
            if acceleration == "kvm" and not KVM.exists():
                reasons.append(f"there is no {KVM}")
                continue
            why = self._trial(acceleration)
            if why is None:
                return Verdict(acceleration=acceleration, why="; ".join(reasons) or None)
            reasons.append(f"a guest kernel does not boot with {acceleration}: {why}")
        return Verdict(acceleration=None, why="; ".join(reasons))

    def _trial(self, acceleration: Acceleration) -> str | None:
        """Boot to the guest daemon, which finds no disk that it knows; why it did not come so far, if it did not."""
        machine = f"probe-{os.getpid()}-{acceleration}"
        cgroup = self.cgroup(machine)
        before, self.acceleration = self.acceleration, acceleration
        try:
            memory_mib = _TRIAL_SIZE.memory_mib + command.OVERHEAD_MIB[acceleration]
            cgroup.create(memory_mib=memory_mib, cpu=1, tasks=command.TASKS)
            for _ in range(1 if acceleration == "kvm" else 2):
                why = self._trial_boot(machine, acceleration, cgroup)
                if why is None:
                    break
            return why
        finally:
            self.acceleration = before
            cgroup.remove()
            self.remove_files(machine)
            self.users.forget(machine)

    def _trial_boot(self, machine: str, acceleration: Acceleration, cgroup: cgroups.MachineCgroup) -> str | None:
        ours, theirs = socket.socketpair()
        with ours, contextlib.ExitStack() as inherited:
            inherited.enter_context(theirs)
            channel = inherited.enter_context(launch.listening(self.root / f"{machine}.c"))
            control = inherited.enter_context(launch.listening(self.root / f"{machine}.q"))
            boot = inherited.enter_context(self.booting(theirs.fileno(), 64))
            argv = self.argv(_TRIAL_SIZE, channel.fileno(), control.fileno(), boot=boot)
            fds = [channel.fileno(), control.fileno(), boot.vmlinux_fd, boot.initramfs_fd, boot.serial_fd]
            process = Process.spawn(_NAME, self.confined(argv, machine, cgroup, boot), fds)
            inherited.close()
            try:
                timeout_s = _TRIAL_TIMEOUT_S[acceleration] * self.patience
                came, console = launch.watch(process, ours, lambda said: microvms.ARRIVED in said, timeout_s=timeout_s)
                if came:
                    return None
                ended = "QEMU ended" if process.over else f"it was not in user space after {timeout_s:g} s"
                last = process.last_words() or next(iter(console.strip().splitlines()[-1:]), "")
                return f"{ended} ({last[:300]})" if last else ended
            finally:
                process.kill()
                process.close()

    # Machines.

    def _machine(self, spec: MachineSpec) -> QemuMachine:
        return QemuMachine(self, spec, self.cgroup(spec.id))

    def forget(self, copied: Path) -> None:
        if (kept := self.kept.pop(copied, None)) is not None:
            kept.leave.close()

    def _with_files(self) -> set[str]:
        return {file.stem for suffix in ("c", "q") for file in self.root.glob(f"*.{suffix}")}

    def remove_files(self, machine: str) -> None:
        for suffix in ("c", "q"):
            (self.root / f"{machine}.{suffix}").unlink(missing_ok=True)
