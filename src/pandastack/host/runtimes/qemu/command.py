"""The QEMU command lines, as pure functions: same input, same words, easy to test.

Devices, their order, CPUs and memory must be the same where a state is saved and where it is restored. So there is one
machine here, and `template` names it: it is part of the key under which saved states are kept.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pandastack.host.runtimes import launch
from pandastack.host.runtimes.microvms import Size

Acceleration = Literal["kvm", "tcg"]

OLDEST_VERSION = (7, 2)
# QEMU calls the memory by this name, the disk by that one, and the port of the guest daemon by the third.
MEMORY, DISK, PORT = "ram0", "d0", "port0"
CHANNEL = "c0"
# What QEMU itself needs beside the guest's memory: its heap and stacks, and under TCG the translated code.
OVERHEAD_MIB = {"kvm": 96, "tcg": 160}
TRANSLATED_MIB = 32
# vCPUs, threads that wait for the disk, and a handful of QEMU's own.
TASKS = 128
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_FORMAT = "1"  # of saved states: raise it when old ones shall not be used any more

# What a boot reads, by its name in the jail.
_KERNEL, _INITRAMFS = "vmlinux", "initramfs"


@dataclass(frozen=True, kw_only=True)
class Boot:
    """What a cold start needs. Descriptors of the kernel, the initramfs and the serial console (a connected socket).

    QEMU opens the first two by name, so `confined` puts them where it finds them.
    """

    vmlinux_fd: int
    initramfs_fd: int
    serial_fd: int
    arguments: str


def qemu(
    binary: Path,
    acceleration: Acceleration,
    size: Size,
    *,
    channel_fd: int,
    control_fd: int,
    disk_fd: int | None = None,
    boot: Boot | None = None,
) -> list[str]:
    """The machine. Without `boot` it waits for a saved state; without `disk_fd` its disk holds 1 MiB of nothing.

    `channel_fd` and `control_fd` are listening sockets. All files are descriptors that QEMU inherits, so that its user needs no
    right to any path.
    """
    accelerator = "kvm" if acceleration == "kvm" else f"tcg,thread={'single' if size.cpus == 1 else 'multi'},tb-size={TRANSLATED_MIB}"
    words = [
        str(binary),
        *("-M", f"microvm,acpi=on,rtc=on,suppress-vmdesc=on,memory-backend={MEMORY}"),
        *("-accel", accelerator),
        *("-cpu", "host" if acceleration == "kvm" else "max"),
        *("-m", f"{size.memory_mib}M"),
        *("-smp", str(size.cpus)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-sandbox", _SANDBOX),
        *("-global", "migration.send-configuration=off"),
        # Anonymous memory, also for a restore: the driver lays the saved memory over it, see `mapping`.
        *("-object", f"memory-backend-ram,id={MEMORY},size={size.memory_mib}M"),
        *("-chardev", f"socket,id={CHANNEL},fd={channel_fd},server=on,wait=off"),
        *("-device", "virtio-serial-device"),
        *("-device", f"virtserialport,chardev={CHANNEL},name=pandastack,id={PORT}"),
        *_disk(disk_fd),
        *("-device", f"virtio-blk-device,drive={DISK}"),
        *("-object", "rng-builtin,id=r0", "-device", "virtio-rng-device,rng=r0"),
        *("-chardev", f"socket,id=q0,fd={control_fd},server=on,wait=off"),
        *("-mon", "chardev=q0,mode=control"),
    ]
    if boot is None:
        return [*words, "-serial", "null", "-incoming", "defer"]
    return [
        *words,
        *("-chardev", f"socket,id=s0,fd={boot.serial_fd}", "-serial", "chardev:s0"),
        *("-kernel", f"/{_KERNEL}", "-initrd", f"/{_INITRAMFS}"),
        *("-append", boot.arguments),
    ]


def _disk(fd: int | None) -> list[str]:
    if fd is None:
        return [
            "-blockdev",
            f"driver=null-co,node-name=f0,size={1 << 20},read-zeroes=on",
            "-blockdev",
            f"driver=raw,node-name={DISK},file=f0",
        ]
    return [
        *("-add-fd", f"fd={fd},set=1"),
        *("-blockdev", json.dumps(file_node("f0", 1))),
        *("-blockdev", f"driver=raw,node-name={DISK},discard=unmap,file=f0"),
    ]


def file_node(name: str, fd_set: int) -> dict[str, Any]:
    """The lower half of the disk, for `-blockdev` or `blockdev-add`.

    A machine does not outlive its host, so there is nothing that a flush could save, and a guest that syncs needs not wait for
    the host's disk. What is to be kept is synced by whoever keeps it, see `QemuMachine.snapshot`.
    """
    file = f"/dev/fdset/{fd_set}"
    return {"driver": "file", "node-name": name, "filename": file, "discard": "unmap", "locking": "off", "cache": {"no-flush": True}}


def kernel_arguments(acceleration: Acceleration, tsc_khz: int, processes: int) -> str:
    """The guest kernel's command line.

    Emulated code is as slow without mitigations as with them, and nothing speculates, so they are off there. Programs are at the
    same addresses each time, because code at new ones is translated anew, and that is more than half of what it takes to start one.
    A kernel under TCG would measure its clock against an emulated timer, and hang where the host is busy: it is told.
    """
    emulated = f"nokaslr norandmaps mitigations=off tsc=reliable tsc_early_khz={tsc_khz} " if acceleration == "tcg" else ""
    return f"console=ttyS0 reboot=t panic=-1 quiet {emulated}pandastack.processes={processes}"


@dataclass(frozen=True, kw_only=True)
class Jail:
    """The root that QEMU has: made in its own mount namespace, over the folder `place`, and gone with it.

    `folders` are seen as they are on the host, read-only; `links` are below one of them, and linked to from the top.
    """

    place: Path
    folders: Sequence[Path]
    links: Sequence[Path] = ()

    @classmethod
    def of(cls, place: Path, binary: Path) -> Jail:
        """What `binary` needs to be loaded, and the firmware beside it."""
        top = [Path("/", name) for name in ("usr", "bin", "sbin", "lib", "lib64") if Path("/", name).exists()]
        folders = [path for path in top if not path.is_symlink()]
        own = binary.resolve().parent
        if not any(own.is_relative_to(folder) for folder in folders):
            folders.append(own.parent if own.parent != Path("/") else own)
        return cls(place=place, folders=folders, links=[Path("usr", path.name) for path in top if path.is_symlink()])

    def script(self, *, kvm: bool, boot: Boot | None) -> str:
        """For a root shell that is in namespaces of its own. It becomes its arguments, with nothing above the jail in reach."""
        folders = [(shlex.quote(str(folder)), shlex.quote(f".{folder}")) for folder in self.folders]
        steps = [
            "umask 022",
            f"mount -t tmpfs -o size=64k,mode=755,nosuid,noexec jail {shlex.quote(str(self.place))}",
            f"cd {shlex.quote(str(self.place))}",
            " ".join(("mkdir -p ./dev", *(inside for _, inside in folders))),
        ]
        if self.links:
            steps.append(" ".join(("ln -s", *map(str, self.links), ".")))
        steps += [f"mount -o bind,ro {folder} {inside}" for folder, inside in folders]
        if kvm:
            # Who may open the host's differs from host to host, and no group shall be needed for it.
            steps.append("mknod -m 666 dev/kvm c 10 232")
        if boot is not None:
            for name, fd in ((_KERNEL, boot.vmlinux_fd), (_INITRAMFS, boot.initramfs_fd)):
                steps.append(f": >{name} && mount -o bind,ro /proc/self/fd/{fd} {name}")
        return " && ".join((*steps, "mount -o remount,ro .", 'exec chroot . "$@"'))


def confined(
    argv: Sequence[str], *, joins: Collection[Path], uid: int, jail: Jail, kvm: bool = False, boot: Boot | None = None
) -> list[str]:
    """Start `argv` inside the cgroups of the files `joins`, in namespaces and a root of its own, as a user who may do nothing.

    With `kvm` it has a device node that this user may open; with `boot` it finds the kernel that its command line names.
    """
    argv = [
        *("unshare", "--mount", "--ipc", "--uts", "--net", "--"),
        *("sh", "-c", jail.script(kvm=kvm, boot=boot), "sh"),
        *("setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups"),
        *("--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--"),
        *argv,
    ]
    return launch.inside(joins, argv)


def template(acceleration: Acceleration) -> str:
    """The hash of all that is the same for every machine; states do not fit another one."""
    words = qemu(Path("qemu"), acceleration, Size(cpus=1, memory_mib=1), channel_fd=0, control_fd=0, disk_fd=0)
    return hashlib.sha256("\n".join((_FORMAT, *words)).encode()).hexdigest()


def version(text: str) -> tuple[str, tuple[int, int]] | None:
    """From the output of `--version`: all of it that tells builds apart, and major and minor."""
    found = re.search(r"QEMU emulator version ((\d+)\.(\d+)[^\n]*)", text)
    return (found[1].strip(), (int(found[2]), int(found[3]))) if found else None
