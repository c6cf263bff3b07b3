"""An outer machine with a /dev/kvm that works, on any x86-64: QEMU emulates a CPU of AMD with its virtualisation, in software.

It runs Debian's general kernel (the one for clouds lacks 9p) and sees the files of this host, read-only below a layer in memory, so
the same Python, tests and QEMU run in it as here. `/tmp` is an XFS on a disk of its own. Nothing of it has a name here: files
are unlinked, sockets are pairs, and the process dies with this one. It is slow, some twenty times.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import selectors
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from pandastack.errors import HostUnfit
from pandastack.host import cpio, debian, kernels

PROJECT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BEAT_S = 3.0
# Between two beats of a machine that lives; garbage collection of a busy one was seen to take ten.
SILENT_S = 60.0
# Its only CPU was seen to sleep with nothing that would ever wake it. Something to read is an interrupt.
POKE_S = 20.0
BOOT_S = 120.0
_PACKAGE = "linux-image-amd64"
_MODULES = (
    *("virtio_mmio", "virtio_blk", "virtio_console", "virtio-rng"),
    *("crc32c_generic", "9pnet_virtio", "9p", "overlay", "xfs", "ext4", "loop", "fuse", "tun", "kvm-amd"),
)
_DISK_BYTES = 24 << 30
# Covered inside, so what is needed there must be elsewhere.
_COVERED = ("/tmp", "/run", "/proc", "/sys", "/dev")
_NEEDED = ("qemu-system-x86_64", "mkfs.xfs", "setpriv")
_MONITOR_S = 10.0
_OFF_S = 5.0
_INTERVIEW = ("status", "registers -a", "lapic", "pic", "registers -a")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What an outer machine is made of, fetched once."""

    vmlinux: Path
    modules: list[tuple[str, bytes]]
    busybox: bytes


@dataclass(kw_only=True)
class Run:
    """What came of one: `code` is that of the job, or None where the machine did not live to say it, and then `why`."""

    code: int | None = None
    why: str = ""
    boot_s: float = 0.0
    took_s: float = 0.0
    console: bytes = b""
    report: bytes = b""
    monitor: str = ""
    beats: int = field(default=0)
    pokes: int = 0


async def parts(cache: Path) -> Parts:
    """Fetched into `cache` the first time (70 MB, seconds). Raises HostUnfit."""
    absent = [name for name in _NEEDED if shutil.which(name) is None]
    if absent:
        raise HostUnfit(f"{', '.join(absent)} is not installed", hint="apt install qemu-system-x86 xfsprogs util-linux")
    if covered := [path for path in (PROJECT, Path(sys.prefix), Path(sys.base_prefix), cache) if str(path).startswith(_COVERED)]:
        raise HostUnfit(f"{covered[0]} cannot be seen in the outer machine", hint=f"have it outside of {' '.join(_COVERED)}")
    prefix = cache / "nested" / hashlib.sha256(" ".join((_PACKAGE, *_MODULES)).encode()).hexdigest()[:12]
    folder = await kernels.unpacked(prefix, debian_mirror=None, say=say, package=_PACKAGE, modules=_MODULES)
    busybox = prefix / "busybox"
    if not busybox.exists():
        what, remedy = "busybox", "use a Debian system with network"
        async with debian.opened(prefix, kernels.SUITE, debian_mirror=None, what=what, remedy=remedy) as packages:
            tree = await debian.unpack(await packages.download("busybox-static"), packages.work / "tree", what=what, remedy=remedy)
            (tree / "bin/busybox").replace(busybox)
    files = {path.stem: path.read_bytes() for path in (folder / "modules").iterdir()}
    modules = [(name, files[name]) for name in kernels.order(files, _MODULES)]
    return Parts(vmlinux=folder / "vmlinux", modules=modules, busybox=busybox.read_bytes())


def say(text: str) -> None:
    sys.stderr.write(f"nested: {text}\n")
    sys.stderr.flush()


def run(
    made: Parts,
    argv: Sequence[str],
    environment: Mapping[str, str],
    *,
    output: Callable[[bytes], None],
    deadline_s: float,
    memory_mib: int = 6144,
) -> Run:
    """Boot, run `argv` in the folder of the project, and wait until it is over; what it says goes to `output` at once.

    A report that it leaves in /run/report.xml comes back. The machine is gone when this returns.
    """
    token = f"@{secrets.token_hex(8)}"
    result = Run()
    began = time.monotonic()
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        channels: dict[str, socket.socket] = {}
        fds: dict[str, int] = {}
        for name in ("console", "lines", "report", "monitor"):
            here, there = socket.socketpair()
            channels[name], fds[name] = ours.enter_context(here), theirs.enter_context(there).fileno()
        fds["initramfs"] = theirs.enter_context(_nameless(_initramfs(made, _job(token, argv, environment)))).fileno()
        fds["disk"] = theirs.enter_context(_disk()).fileno()
        command = _qemu(made.vmlinux, fds, memory_mib=memory_mib)
        process = subprocess.Popen(command, pass_fds=tuple(fds.values()), stdin=subprocess.DEVNULL)
        theirs.close()
        try:
            _follow(process, channels, token, result, output, began, deadline_s)
            if result.code is None:
                result.monitor = _interview(channels["monitor"])
        finally:
            process.kill()
            process.wait()
        result.took_s = time.monotonic() - began
    return result


def _follow(
    process: subprocess.Popen[bytes],
    channels: Mapping[str, socket.socket],
    token: str,
    result: Run,
    output: Callable[[bytes], None],
    began: float,
    deadline_s: float,
) -> None:
    mark, rest = token.encode(), b""
    heard = poked = began
    with selectors.DefaultSelector() as selector:
        for name in ("console", "lines", "report"):
            channels[name].setblocking(False)
            selector.register(channels[name], selectors.EVENT_READ, name)
        while selector.get_map():
            now = time.monotonic()
            if result.code is not None and now - heard > _OFF_S:
                return  # It said how it ended, and need not be waited for any longer.
            patience_s = SILENT_S if result.boot_s else BOOT_S
            if now - began > deadline_s:
                result.why = f"it was not finished after {deadline_s:.0f} s"
                return
            if now - heard > patience_s:
                result.why = f"it gave no sign of life for {patience_s:.0f} s, {now - began:.0f} s after its start"
                return
            if result.boot_s and now - max(heard, poked) > POKE_S:
                poked, result.pokes = now, result.pokes + 1
                with contextlib.suppress(OSError):
                    channels["lines"].send(b"\n")
            for key, _ in selector.select(1.0):
                piece = _received(channels[key.data])
                if not piece:
                    selector.unregister(channels[key.data])
                elif key.data == "console":
                    result.console = (result.console + piece)[-1_000_000:]
                elif key.data == "report":
                    result.report += piece
                else:
                    *lines, rest = (rest + piece).split(b"\n")
                    for line in lines:
                        before, found, said = line.partition(mark)
                        if before or not found:
                            output(before if found else line + b"\n")
                        if found:
                            heard = time.monotonic()
                            _told(said.decode("utf-8", "replace").split(), result, began)
    if result.code is None:
        result.why = f"QEMU ended by itself ({process.wait(30)}); the last of its console: {_last(result.console)}"


def _told(words: list[str], result: Run, began: float) -> None:
    match words:
        case ["up", uptime]:
            result.boot_s = time.monotonic() - began
            say(f"the outer machine is up after {result.boot_s:.0f} s ({uptime} by its own clock)")
        case ["beat", _]:
            result.beats += 1
        case ["exit", code]:
            result.code = int(code)


def _received(channel: socket.socket) -> bytes:
    try:
        return channel.recv(65536)
    except OSError:
        return b""


def _last(console: bytes) -> str:
    return " / ".join(console.decode("utf-8", "replace").strip().splitlines()[-3:])[:500]


def _interview(monitor: socket.socket) -> str:
    """Where the CPU of a machine stands that says nothing any more: looked at twice, to see whether it moves."""
    monitor.settimeout(1.0)
    questions = [{"execute": "qmp_capabilities"}]
    questions += [{"execute": "human-monitor-command", "arguments": {"command-line": f"info {what}"}} for what in _INTERVIEW]
    ends, said = time.monotonic() + _MONITOR_S, b""
    with contextlib.suppress(OSError):
        for question in questions:
            monitor.sendall(json.dumps(question).encode() + b"\n")
            with contextlib.suppress(TimeoutError):
                while time.monotonic() < ends and (piece := monitor.recv(65536)):
                    said += piece
    return said.decode("utf-8", "replace").replace("\\r\\n", "\n")


def _job(token: str, argv: Sequence[str], environment: Mapping[str, str]) -> bytes:
    lines = [f"TOKEN={token}", f"BEAT_S={BEAT_S:g}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    lines += [f"job() {{ cd {shlex.quote(str(PROJECT))} && exec {shlex.join(argv)}; }}", (HERE / "inside").read_text()]
    return "\n".join(lines).encode()


def _initramfs(made: Parts, job: bytes) -> bytes:
    order = "".join(f"{name}.ko\n" for name, _ in made.modules).encode()
    direct = "".join(f"{folder}\n" for folder in ("/usr", Path(sys.base_prefix).resolve(), PROJECT)).encode()
    return cpio.archive(
        [
            *(cpio.folder("bin"), cpio.folder("dev"), cpio.folder("modules")),
            *(cpio.character_device("dev/console", 5, 1), cpio.character_device("dev/null", 1, 3)),
            cpio.file("bin/busybox", made.busybox, 0o755),
            *(cpio.file(f"modules/{name}.ko", content) for name, content in made.modules),
            *(cpio.file("modules/order", order), cpio.file("direct", direct), cpio.file("job", job)),
            cpio.file("init", (HERE / "init").read_bytes(), 0o755),
        ]
    )


@contextmanager
def _nameless(content: bytes) -> Iterator[BinaryIO]:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        yield file


@contextmanager
def _disk() -> Iterator[BinaryIO]:
    """An empty XFS, of which only what is written takes space."""
    with tempfile.TemporaryFile() as file:
        file.truncate(_DISK_BYTES)
        name = f"/proc/self/fd/{file.fileno()}"
        subprocess.run(["mkfs.xfs", "-q", "-f", "-m", "reflink=1", name], pass_fds=[file.fileno()], check=True)
        yield file


def _qemu(vmlinux: Path, fds: Mapping[str, int], *, memory_mib: int) -> list[str]:
    # One CPU: where two run at the same time, an instruction that the kernel patches (as KVM makes it do with each first machine) may
    # stay what it was for the other one, which then meets the same breakpoint for ever, and holds its scheduler's lock.
    words = ["setpriv", "--pdeathsig", "KILL", "--", "qemu-system-x86_64"]
    words += ["-M", "microvm,acpi=on,rtc=on", "-accel", "tcg,thread=single", "-cpu", "max"]
    words += ["-m", f"{memory_mib}M", "-smp", "1", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    words += ["-kernel", str(vmlinux), "-initrd", f"/proc/self/fd/{fds['initramfs']}", "-append", _arguments()]
    for name in ("console", "lines", "report", "monitor"):
        words += ["-chardev", f"socket,id={name},fd={fds[name]}"]
    words += ["-serial", "chardev:console", "-mon", "chardev=monitor,mode=control", "-device", "virtio-serial-device"]
    words += ["-device", "virtserialport,chardev=lines,nr=1", "-device", "virtserialport,chardev=report,nr=2"]
    words += ["-add-fd", f"fd={fds['disk']},set=1"]
    words += ["-blockdev", "driver=file,node-name=file,filename=/dev/fdset/1,locking=off,discard=unmap,cache.no-flush=on"]
    words += ["-blockdev", "driver=raw,node-name=disk,file=file,discard=unmap,cache.no-flush=on"]
    words += ["-device", "virtio-blk-device,drive=disk", "-object", "rng-builtin,id=rng", "-device", "virtio-rng-device,rng=rng"]
    words += ["-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"]
    return [*words, "-device", "virtio-9p-device,fsdev=host,mount_tag=host"]


def _arguments() -> str:
    """A kernel that is emulated on a busy host cannot measure how fast its clock runs, so it is told."""
    found = re.search(r"^bogomips\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    clock = f" tsc_early_khz={round(float(found[1]) * 500)}" if found else ""
    # Programs at the same addresses each time need not be translated anew each time.
    return f"console=ttyS0 reboot=t panic=-1 loglevel=4 nokaslr norandmaps mitigations=off{clock}"


def environment() -> dict[str, str]:
    """What of this process's environment counts inside."""
    return {name: os.environ[name] for name in ("PANDASTACK_FIRECRACKER",) if name in os.environ}
