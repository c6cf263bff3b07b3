"""Drives gVisor: runsc creates a sandbox, its control socket does the rest. See `client` for why.

A machine is a runsc sandbox with the guest daemon as PID 1. The daemon's stdin and stdout are two socket pairs; their
host ends are the channel. The keeper holds copies of them, so that a restarted host finds its sandboxes usable. (runsc
can also forward a port to a listener inside, but that loses wake-ups under load, and an exec'd bridge spoils snapshots.)

prepare: bundle, cgroup, `runsc create`. start / restore: loopback, one call. stop: kill the cgroup, remove files.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import select
import shutil
import socket
from collections.abc import Collection, Sequence
from pathlib import Path

from pandastack.errors import HostUnfit, RuntimeFailed
from pandastack.host.runtimes import cgroups
from pandastack.host.runtimes.base import (
    Capabilities,
    Keeper,
    Limits,
    MachineId,
    MachineSpec,
    Probe,
)
from pandastack.host.runtimes.gvisor import command
from pandastack.host.runtimes.gvisor.cli import CliControl
from pandastack.host.runtimes.gvisor.client import CALL_TIMEOUT_S, Control, Dialect, SocketControl
from pandastack.host.runtimes.gvisor.machine import GvisorMachine
from pandastack.host.runtimes.waiting import to_the_end

OLDEST_RELEASE = 20240729
_CREATE_TIMEOUT_S = 30.0
_STDIO_BUFFER_BYTES = 1 << 20
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33


class GvisorRuntime:
    """See `base.Runtime`. `root` must be short (a socket path is at most 107 bytes) and private to this install."""

    name = "gvisor"
    isolation = "gvisor"
    acceleration: str | None = None
    capabilities = Capabilities(snapshot=True, fork_memory=True, own_kernel=False)

    def __init__(self, runsc: Path, *, root: Path, group: str, guest: Path, keeper: Keeper, dialect: Dialect | None = None) -> None:
        self.runsc = runsc
        self.keeper = keeper
        self.root = root
        self._group = cgroups.Group(group)
        self._guest = guest
        self._dialect = dialect
        self._known_flags: frozenset[str] = frozenset()

    @property
    def dialect(self) -> Dialect:
        if self._dialect is None:
            raise RuntimeFailed("gVisor was used before it was probed")
        return self._dialect

    def control(self, spec: MachineSpec) -> Control:
        if self.dialect == "cli":
            return CliControl(self.prefix(spec), spec.id)
        return SocketControl(self.root / f"runsc-{spec.id}.sock", spec.id, self.dialect)

    def prefix(self, spec: MachineSpec) -> list[str]:
        """runsc with the global flags of a machine."""
        return [str(self.runsc), *command.flags(self.root, self.dialect, self._known_flags, spec.disk)]

    def cgroup(self, machine: str) -> cgroups.MachineCgroup:
        return self._group.of(machine)

    async def probe(self) -> Probe:
        """Run a real sandbox that prints the guest daemon's version, and learn which control dialect this runsc speaks."""
        try:
            version = await self._version()
            release = re.search(r"(20\d{6})", version)
            if release and int(release.group(1)) < OLDEST_RELEASE:
                return Probe(
                    works=False,
                    version=version,
                    reason=f"runsc {version} is too old",
                    hint=f"use a release of {OLDEST_RELEASE} or newer: remove it from PATH, or set PANDASTACK_RUNSC",
                )
            self._known_flags = command.known_flags(await self._ask("flags"))
            await asyncio.to_thread(self._make_root)
            await self._learn_dialect()
            digest = await asyncio.to_thread(_digest_file, self.runsc)
        except (RuntimeFailed, HostUnfit) as error:
            return Probe(works=False, reason=error.message, hint=error.hint or error.fields.get("detail"))
        key = hashlib.sha256("\n".join((digest, _cpu_flags(), command.SHAPE, self.dialect)).encode()).hexdigest()
        shown = version if release else f"unreleased build {digest[:12]}"
        return Probe(works=True, version=shown, key=key)

    async def _version(self) -> str:
        found = re.search(r"runsc version (\S+)", await self._ask("--version"))
        return found.group(1) if found else "unknown"

    async def _ask(self, word: str) -> str:
        """What runsc prints when it is given one word."""
        try:
            process = await asyncio.create_subprocess_exec(
                self.runsc, word, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, stdin=asyncio.subprocess.DEVNULL
            )
        except OSError as error:
            raise HostUnfit(
                f"runsc cannot be started ({error.strerror})", hint="run `pandastack setup`, or name one in PANDASTACK_RUNSC"
            ) from error
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                output, _ = await process.communicate()
        except TimeoutError as error:
            raise HostUnfit(f"{self.runsc} {word} does not end", hint="name another runsc in PANDASTACK_RUNSC") from error
        finally:
            if process.returncode is None:
                process.kill()
        return output.decode("utf-8", "replace")

    def _make_root(self) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def _learn_dialect(self) -> None:
        state = self.root / "probe"
        failures: list[str] = []
        for dialect in [self._dialect] if self._dialect else list[Dialect](["2026", "2024", "cli"]):
            self._dialect = dialect
            machine_id = MachineId(f"probe-{os.getpid()}-{dialect}")
            directory = state / machine_id
            (directory / "rootfs" / ".pandastack").mkdir(parents=True, exist_ok=True)
            (directory / "disk").mkdir(exist_ok=True)
            spec = MachineSpec(
                id=machine_id,
                rootfs=directory / "rootfs",
                guest=self._guest,
                disk=directory / "disk",
                state=directory,
                limits=Limits(cpu=1, memory_mib=128, disk_mib=1),
            )
            try:
                machine = await self._prepare(spec, [command.GUEST_PATH, "-version"])
                try:
                    await machine.start()
                    channel = await machine.connect()
                    try:
                        answer = await asyncio.to_thread(_read_some, channel.read_fd, CALL_TIMEOUT_S)
                    finally:
                        os.close(channel.read_fd)
                        os.close(channel.write_fd)
                    if not answer.strip():
                        raise RuntimeFailed("a gVisor sandbox started but its first process said nothing")
                    return
                finally:
                    await machine.stop()
            except RuntimeFailed as error:
                failures.append(f"{dialect}: {error.message} {error.fields.get('detail') or ''}".strip())
            finally:
                shutil.rmtree(state, ignore_errors=True)
        self._dialect = None
        raise RuntimeFailed("no control dialect of this runsc brings a sandbox to life", detail="; ".join(failures))

    async def prepare(self, spec: MachineSpec) -> GvisorMachine:
        return await self._prepare(spec, None)

    async def _prepare(self, spec: MachineSpec, arguments: Sequence[str] | None) -> GvisorMachine:
        async with contextlib.AsyncExitStack() as undo:
            cgroup = self.cgroup(spec.id)
            machine = GvisorMachine(self, spec, cgroup)
            undo.push_async_callback(machine.stop)
            # The guest must see its own limit as the machine's memory, and runsc reads it while it creates; what
            # runsc itself needs is added afterwards.
            await to_the_end(self._before_create, spec, cgroup, arguments)
            log = spec.state / "runsc.log"
            # Closed here and not by whoever collects them: an error may keep this frame, and all that it holds, for a while.
            with contextlib.ExitStack() as ends:
                stdin_ours, stdin_guest = _socketpair()
                stdout_ours, stdout_guest = _socketpair()
                machine.stdio = (stdin_ours, stdout_ours)
                for end in (stdin_guest, stdout_guest):
                    ends.enter_context(end)
                await to_the_end(self.keeper.put, spec.id, [stdin_ours.fileno(), stdout_ours.fileno()])
                log_file = ends.enter_context(log.open("ab"))
                process = await asyncio.create_subprocess_exec(
                    *command.create(self.prefix(spec), spec),
                    stdin=stdin_guest.fileno(),
                    stdout=stdout_guest.fileno(),
                    stderr=log_file,
                    env={"PATH": os.defpath},
                    start_new_session=True,
                )
                try:
                    async with asyncio.timeout(_CREATE_TIMEOUT_S):
                        code = await process.wait()
                except BaseException as error:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                    if isinstance(error, TimeoutError):
                        raise RuntimeFailed(f"runsc create did not finish within {_CREATE_TIMEOUT_S:g} s") from error
                    raise
            if code != 0:
                raise RuntimeFailed("runsc could not create the sandbox", detail=_last_line(log))
            await to_the_end(machine.created)
            undo.pop_all()
            return machine

    def _before_create(self, spec: MachineSpec, cgroup: cgroups.MachineCgroup, arguments: Sequence[str] | None) -> None:
        bundle = command.bundle(spec, cgroup.path)
        if arguments is not None:
            bundle["process"]["args"] = list(arguments)
        (spec.state / "config.json").write_text(json.dumps(bundle))
        cgroup.create(memory_mib=spec.limits.memory_mib, cpu=spec.limits.cpu, tasks=2 * spec.limits.processes + 256)

    def forget(self, copied: Path) -> None:
        """Nothing is in memory."""

    async def adopt(self, spec: MachineSpec) -> GvisorMachine | None:
        machine = GvisorMachine(self, spec, self.cgroup(spec.id))
        alive = await asyncio.to_thread(machine.find_again)
        return machine if alive else None

    async def sweep(self, keep: Collection[MachineId]) -> list[MachineId]:
        return await asyncio.to_thread(self._sweep, frozenset(keep))

    def _sweep(self, keep: frozenset[MachineId]) -> list[MachineId]:
        found = self._group.machines()
        for file in self.root.glob("*_sandbox:*.state"):
            found.add(file.name.split("_sandbox:", 1)[0])
        gone = sorted(found - keep)
        for machine in gone:
            self.cgroup(machine).remove()
            self.remove_files(machine)
        return [MachineId(machine) for machine in gone]

    def remove_files(self, machine: str) -> None:
        for pattern in (f"{machine}_sandbox:*", f"{machine}.*", f"runsc-{machine}.sock"):
            for file in self.root.glob(pattern):
                file.unlink(missing_ok=True)


def _socketpair() -> tuple[socket.socket, socket.socket]:
    # Two pairs, never one for both directions: the sentry makes each description non-blocking, and a shared
    # one would give the guest EAGAIN on its other end.
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in (ours, theirs):
        for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, option, _STDIO_BUFFER_BYTES)
    return ours, theirs


def _read_some(fd: int, timeout_s: float) -> bytes:
    ready, _, _ = select.select([fd], [], [], timeout_s)
    return os.read(fd, 4096) if ready else b""


def _cpu_flags() -> str:
    """The CPU features; a saved state is refused on a machine that lacks one it was made with."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return line.partition(":")[2].strip()
    return ""


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 2000))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""
