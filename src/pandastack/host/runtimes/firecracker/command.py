"""The command lines of jailer and Firecracker, and what a version and a binary say, as pure functions.

Devices, CPUs and memory must be the same where a state is saved and where it is restored. So there is one machine here, and
`template` names it: it is part of the key under which saved states are kept.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pandastack.host.runtimes import launch
from pandastack.host.runtimes.firecracker import client
from pandastack.host.runtimes.microvms import DISK, Size

# Before it a guest that was restored could not send: see its changelog, vsock.
OLDEST_VERSION = (1, 16, 1)
# A newer one is used, and said to be newer.
NEWEST_TESTED = (1, 17)
# What Firecracker itself needs beside the guest's memory.
OVERHEAD_MIB = 64
# vCPUs, its own threads, and what starts it.
TASKS = 64
# By their names in the jail.
API, VSOCK, PAGES, SCRATCH, KERNEL, INITRAMFS = "api.sock", "v.sock", "pages.sock", "s", "vmlinux", "initramfs"
DRIVE = "d0"
GUEST_CID, GUEST_PORT = 3, 1024
_FORMAT = "1"  # of saved states: raise it when old ones shall not be used any more
_STATE_MIB = 16  # Room beside memory in the scratch space, for the state of the devices.
# What the jailer needs until it has become somebody without any.
_JAILER_MAY = ("chown", "dac_override", "fowner", "mknod", "setgid", "setuid", "sys_admin", "sys_chroot", "sys_resource")
_PT_NOTE, _NT_GNU_ABI_TAG = 4, 1


@dataclass(frozen=True, kw_only=True)
class Binaries:
    """A Firecracker and the jailer of the same version."""

    firecracker: Path
    jailer: Path


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Descriptors of what a boot reads. They are put into the jail as files that cannot be written."""

    vmlinux_fd: int
    initramfs_fd: int


@dataclass(frozen=True, kw_only=True)
class Jail:
    """The root of one Firecracker, as the jailer makes it: a folder with what it may see, and nothing else of the host."""

    base: Path
    machine: str
    binary: str

    @classmethod
    def of(cls, base: Path, machine: str, binaries: Binaries) -> Jail:
        return cls(base=base, machine=machine, binary=binaries.firecracker.resolve().name)

    @property
    def root(self) -> Path:
        return self.base / self.binary / self.machine / "root"


def jailed(
    binaries: Binaries,
    jail: Jail,
    *,
    uid: int,
    joins: Collection[Path],
    cgroup_version: int,
    cgroup: str,
    memory_mib: int,
    kernel: Kernel | None = None,
) -> list[str]:
    """Start a Firecracker that waits for calls, inside of the cgroups of the files `joins`, in namespaces of its own, as `uid`.

    What the machine saves is written into a tmpfs of its own mount namespace: nothing of it touches a disk while the guest waits.
    With `kernel` it finds that in its root.
    """
    root = shlex.quote(str(jail.root))
    size = f"size={memory_mib + _STATE_MIB}m,mode=700,uid={uid},gid={uid},nosuid,nodev,noexec"
    steps = [f"mount -t tmpfs -o {size} scratch {root}/{SCRATCH}"]
    if kernel is not None:
        for name, fd in ((KERNEL, kernel.vmlinux_fd), (INITRAMFS, kernel.initramfs_fd)):
            steps.append(f": >{root}/{name} && mount -o bind,ro /proc/self/fd/{fd} {root}/{name}")
    may = ",".join(("-all", *(f"+{name}" for name in _JAILER_MAY)))
    argv = [
        *("unshare", "--mount", "--ipc", "--uts", "--net", "--"),
        *("sh", "-c", " && ".join((*steps, 'exec "$@"')), "sh"),
        *("setpriv", "--no-new-privs", "--bounding-set", may, "--"),
        *(str(binaries.jailer), "--id", jail.machine, "--exec-file", str(binaries.firecracker)),
        *("--uid", str(uid), "--gid", str(uid), "--chroot-base-dir", str(jail.base)),
        *("--cgroup-version", str(cgroup_version), "--parent-cgroup", cgroup.strip("/")),
        *("--", "--api-sock", API, "--level", "Error"),
    ]
    return launch.inside(joins, argv)


def kernel_arguments(processes: int) -> str:
    return f"console=ttyS0 reboot=k panic=-1 quiet pandastack.processes={processes}"


def machine(size: Size, processes: int) -> tuple[client.MachineConfig, client.BootSource, client.Drive, client.Vsock]:
    """The one machine there is. Writes are tracked, so that what is saved of it is what it wrote."""
    return (
        client.MachineConfig(vcpu_count=size.cpus, mem_size_mib=size.memory_mib, track_dirty_pages=True),
        client.BootSource(kernel_image_path=KERNEL, initrd_path=INITRAMFS, boot_args=kernel_arguments(processes)),
        client.Drive(drive_id=DRIVE, path_on_host=DISK),
        client.Vsock(guest_cid=GUEST_CID, uds_path=VSOCK),
    )


def template() -> str:
    """The hash of all that is the same for every machine; states do not fit another one."""
    parts = [client.plain(part) for part in machine(Size(cpus=1, memory_mib=1), 0)]
    return hashlib.sha256("\n".join((_FORMAT, json.dumps(parts))).encode()).hexdigest()


def version(text: str) -> tuple[str, tuple[int, int, int]] | None:
    """From the output of `--version` of Firecracker or its jailer: all of it, and the number."""
    found = re.search(r"^(?:Firecracker|Jailer) v((\d+)\.(\d+)\.(\d+)\S*)", text, re.MULTILINE)
    return (found[1], (int(found[2]), int(found[3]), int(found[4]))) if found else None


def has_filters(binary: bytes) -> bool:
    """Whether this is a build with seccomp filters. Firecracker has them for musl only, and lets builds for glibc do everything.

    A program of glibc has a note that names the kernel it needs, one of musl has none. Source: Firecracker docs/seccomp.md.
    """
    if binary[:5] != b"\x7fELF\x02":
        return False
    (offset,) = struct.unpack_from("<Q", binary, 32)
    size, count = struct.unpack_from("<HH", binary, 54)
    for index in range(count):
        kind, _, at, _, _, length = struct.unpack_from("<IIQQQQ", binary, offset + index * size)
        if kind == _PT_NOTE and _has_abi_tag(binary[at : at + length]):
            return False
    return True


def _has_abi_tag(notes: bytes) -> bool:
    at = 0
    while at + 12 <= len(notes):
        name, content, kind = struct.unpack_from("<III", notes, at)
        if kind == _NT_GNU_ABI_TAG and notes[at + 12 : at + 12 + name] == b"GNU\0":
            return True
        at += 12 + -(-name // 4) * 4 + -(-content // 4) * 4
    return False


def dotted(number: Sequence[int]) -> str:
    return ".".join(map(str, number))
