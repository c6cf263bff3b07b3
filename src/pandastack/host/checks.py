"""What a host must have, one function per fact, found out by doing it and undoing it. Called by `doctor`.

Nothing stays behind: a cgroup, a small disk and a namespace are made and removed. Each function answers with one
`Check` or raises the error whose sentence and hint become one (`doctor` does that), so none of them catches much.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from ctypes.util import find_library
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pandastack.errors import HostUnfit
from pandastack.host.runtimes import cgroups
from pandastack.host.storage import mirrors, space
from pandastack.host.storage.disks import Disks
from pandastack.host.storage.pool import Pool
from pandastack.host.storage.recipes import Distribution

OLDEST_LINUX = (5, 8)  # LOOP_CONFIGURE; pidfds are of 5.3.
OLDEST_PYTHON = (3, 11)
_DISK_MIB = 16
_PROGRAM_TIMEOUT_S = 30.0
# What runsc, mounts, loop devices and template builds need of root; containers often run without some of them.
_CAPABILITIES = {0: "CHOWN", 1: "DAC_OVERRIDE", 6: "SETGID", 7: "SETUID", 18: "SYS_CHROOT", 19: "SYS_PTRACE", 21: "SYS_ADMIN", 27: "MKNOD"}
_DEBIAN = Distribution(name="debian", version="12", suite="bookworm")


class Check(BaseModel):
    """`ok` is None for what could not be tried or is not needed by this version; the detail says which."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    ok: bool | None
    detail: str
    hint: str | None = None


def passed(name: str, detail: str) -> Check:
    return Check(name=name, ok=True, detail=detail)


def failed(name: str, detail: str, hint: str) -> Check:
    return Check(name=name, ok=False, detail=detail, hint=hint)


def unsure(name: str, detail: str, hint: str | None = None) -> Check:
    return Check(name=name, ok=None, detail=detail, hint=hint)


def architecture(machine: str | None = None) -> Check:
    name = machine or platform.machine()
    if name in ("x86_64", "aarch64"):
        return passed("architecture", name)
    return failed("architecture", f"no runtime supports the architecture {name}", hint="use a machine with x86-64 or arm64")


def root(uid: int | None = None, status: str | None = None) -> Check:
    """Root, and with the powers that containers like to take away. `status` is the text of /proc/self/status."""
    if (os.geteuid() if uid is None else uid) != 0:
        detail = "this user is not root, so cgroups, disks and runtimes were not tried"
        return failed("root", detail, hint="run it with sudo: `pandastack up` needs root")
    text = Path("/proc/self/status").read_text() if status is None else status
    line = next((line for line in text.splitlines() if line.startswith("CapEff:")), "CapEff: 0")
    effective = int(line.split()[1], 16)
    missing = [name for bit, name in _CAPABILITIES.items() if not effective >> bit & 1]
    if missing:
        detail = f"this process is root but lacks the capabilities {', '.join(missing)}"
        return failed("root", detail, hint="run it outside of a container, or in a privileged one (docker run --privileged)")
    return passed("root", "root with all capabilities that are needed")


def linux(release: str | None = None) -> Check:
    shown = release or platform.release()
    numbers = tuple(int(part) if part.isdigit() else 0 for part in shown.split("-")[0].split(".")[:2])
    if numbers >= OLDEST_LINUX:
        return passed("linux", f"Linux {shown}")
    wanted = ".".join(map(str, OLDEST_LINUX))
    return failed("linux", f"Linux {shown} is too old, {wanted} is needed", hint="use a newer distribution or its newer kernel")


def python(version: tuple[int, ...] = sys.version_info[:3]) -> Check:
    shown = ".".join(map(str, version))
    if version >= OLDEST_PYTHON:
        return passed("python", f"Python {shown}")
    return failed("python", f"Python {shown} is too old, 3.11 is needed", hint="install Python 3.11 or newer")


def user_namespaces() -> Check:
    if (problem := _unshare("--user", "--map-root-user")) is None:
        return passed("user namespaces", "one was made and left")
    if problem == "":
        return unsure("user namespaces", "not tried: the program unshare is missing", hint="install the package util-linux")
    hint = "raise user.max_user_namespaces, and allow them where kernel.unprivileged_userns_clone or AppArmor restricts them (sysctl)"
    return failed("user namespaces", f"no user namespace can be made: {problem}", hint=hint)


def cgroup() -> Check:
    """Make a cgroup with limits of memory, CPU and tasks, and take it away again."""
    hierarchy = cgroups.detect()
    group = cgroups.MachineCgroup(hierarchy, f"pandastack-doctor-{os.getpid()}", "probe")
    try:
        group.create(memory_mib=64, cpu=0.5, tasks=32)
    finally:
        group.remove()
    return passed("cgroups", f"v{hierarchy.version}: limits of memory, cpu and pids were set")


def disks(data_dir: Path) -> Check:
    """Make a small disk as a sandbox gets it, and fill it: the promise is that it, and nothing else, runs full."""
    # A loop of its own in a worker thread: an impatient caller cannot cancel it between a mount and its removal.
    return asyncio.run(_disks(data_dir))


async def _disks(data_dir: Path) -> Check:
    with beside(data_dir) as directory:
        store = Disks(directory, low_water_mib=0)
        try:
            mounted = await store.create("probe", _DISK_MIB)
            written_mib = await asyncio.to_thread(_fill, mounted / "fill", _DISK_MIB * 2)
        finally:
            await store.delete("probe")
    if written_mib >= _DISK_MIB:
        detail = f"a disk of {_DISK_MIB} MiB took {written_mib} MiB, so disk limits are not enforced"
        return failed("disks", detail, hint="check the loop module and ext4 of this kernel")
    return passed("disks", f"a loop device with ext4 of {_DISK_MIB} MiB was full after {written_mib} MiB")


def disk_space(data_dir: Path, low_water_mib: int) -> Check:
    free_mib = shutil.disk_usage(existing(data_dir)).free >> 20
    # A template build needs about 2 GiB and leaves most of it.
    wanted_mib = low_water_mib + 2048
    if free_mib >= wanted_mib:
        return passed("disk space", f"{free_mib} MiB free for {data_dir}")
    hint = "free some space, or move the directory (PANDASTACK_DATA_DIR)"
    return failed("disk space", f"only {free_mib} MiB are free for {data_dir}, {wanted_mib} are needed", hint=hint)


def reflink(data_dir: Path) -> Check:
    """Whether copies share blocks where sandboxes' data is: in the storage pool, if there is one."""
    pool = Pool(data_dir)
    if problem := pool.problem():
        return failed("reflink", f"the storage pool cannot be used: {problem}", hint="bring the file back: the data is in no other place")
    if pool.file is not None and not pool.mounted:
        return unsure("reflink", f"not tried: the storage pool {pool.file} is mounted when the server starts")
    place = pool.root if pool.file is not None else data_dir
    with beside(place) as directory:
        shares = space.shares_blocks(directory)
    if shares:
        return passed("reflink", f"files below {place} can share their blocks")
    if shares is None:
        return unsure("reflink", f"not tried: no file can be written below {place}", hint="free some space")
    detail = f"the file system of {data_dir} cannot share blocks, so disk images are copied (only the parts in use)"
    return unsure("reflink", detail, hint="not needed; `pandastack storage init` makes a pool in which copies are cheaper")


def pool_tools() -> Check:
    """What `storage init` takes."""
    if not _which("mkfs.xfs"):
        return unsure("pool tools", "mkfs.xfs is missing, so no storage pool can be made", hint="apt-get install xfsprogs, if you want one")
    return passed("pool tools", "mkfs.xfs is there: `pandastack storage init` can make a storage pool")


def lazy_memory() -> Check:
    """What it takes to run a microVM before its memory is here."""
    without = "else all memory of an offloaded snapshot is fetched first"
    if find_library("fuse3") is None:
        return unsure("lazy memory", "libfuse3 is missing", hint=f"apt-get install libfuse3-3 (or libfuse3-4): {without}")
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return unsure("lazy memory", f"/dev/fuse cannot be opened ({error.strerror})", hint=f"modprobe fuse: {without}")
    return passed("lazy memory", "FUSE is there: memory of offloaded snapshots comes when it is touched")


def memory(meminfo: str | None = None) -> Check:
    text = Path("/proc/meminfo").read_text() if meminfo is None else meminfo
    mib = {line.split(":")[0]: int(line.split()[1]) >> 10 for line in text.splitlines() if ":" in line}
    free_mib = mib.get("MemAvailable", 0)
    swap = f"{mib['SwapTotal']} MiB swap, which sandboxes do not use" if mib.get("SwapTotal") else "no swap"
    if free_mib >= 512:
        return passed("memory", f"{free_mib} of {mib.get('MemTotal', 0)} MiB available, {swap}")
    detail = f"only {free_mib} MiB of memory are available, {swap}"
    return failed("memory", detail, hint="stop something, or use a machine with at least 1 GiB")


def open_files(hard: int | None = None) -> Check:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1] if hard is None else hard
    if limit == resource.RLIM_INFINITY or limit >= 65536:
        return passed("open files", "up to any number" if limit == resource.RLIM_INFINITY else f"up to {limit}")
    hint = "raise it: ulimit -Hn 1048576, or LimitNOFILE=1048576 in the systemd unit"
    detail = f"a process may open {limit} files, which limits the number of sandboxes"
    return unsure("open files", detail, hint) if limit >= 4096 else failed("open files", detail, hint)


def network_tools() -> Check:
    missing = [f"{program} (package {package})" for program, package in (("ip", "iproute2"), ("nft", "nftables")) if not _which(program)]
    if missing:
        hint = "not needed by this version: its sandboxes have no network outside of themselves; later ones will"
        return unsure("network tools", f"missing: {', '.join(missing)}", hint=hint)
    # By unshare and not by `ip netns add`, which would leave a mount point in /run for good.
    if problem := _unshare("--net"):
        return unsure("network tools", f"no network namespace can be made: {problem}", hint="gVisor needs it; run as root on the host")
    return passed("network tools", "ip and nft are there, and a network namespace was made and left (for later versions)")


def template_tools(debian_mirror: str | None, ubuntu_mirror: str | None) -> Check:
    """What building a template from packages takes; the mirror is only looked up, not asked."""
    if not _which("mmdebstrap"):
        return failed("template tools", "mmdebstrap is missing, so templates cannot be built", hint="apt-get install mmdebstrap")
    mirrors.keyring(_DEBIAN)
    mirrors.find(_DEBIAN, debian_mirror=debian_mirror, ubuntu_mirror=ubuntu_mirror)
    return passed("template tools", "mmdebstrap, Debian's keyring and a mirror are known")


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there already: they will share a file system."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


@contextlib.contextmanager
def beside(data_dir: Path) -> Iterator[Path]:
    """A directory that is removed again, on the file system that `data_dir` is or will be on."""
    parent = existing(data_dir)
    try:
        directory = tempfile.TemporaryDirectory(dir=parent, prefix=".pandastack-doctor-")
    except OSError as error:
        raise HostUnfit(f"nothing can be written in {parent} ({error.strerror})", hint="run as root, or set PANDASTACK_DATA_DIR") from error
    with directory as name:
        yield Path(name)


def _fill(file: Path, most_mib: int) -> int:
    """Write until the disk is full, at most `most_mib`; how many MiB it took."""
    piece = bytes(1 << 20)
    with file.open("wb", buffering=0) as stream:
        for written_mib in range(most_mib):
            try:
                if stream.write(piece) < len(piece):
                    return written_mib
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                return written_mib
    return most_mib


def _which(program: str) -> str | None:
    # An ordinary user's PATH leaves out the folders where ip and nft are.
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin:/usr/local/sbin")


def _unshare(*options: str) -> str | None:
    """None when a process could be started in a new namespace, "" without the tool, else the reason."""
    program = _which("unshare")
    if program is None:
        return ""
    try:
        done = subprocess.run([program, *options, "true"], capture_output=True, timeout=_PROGRAM_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return "unshare did not end"
    words = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return None if done.returncode == 0 else (words[-1] if words else f"unshare ended with code {done.returncode}")
