"""The contract that every runtime keeps, and the plain values that cross it. `tests/contracts/test_runtime.py` checks it.

A machine goes `prepared` -> `running` -> gone. `prepare` does what is slow and the same for all sandboxes (processes,
namespaces, cgroup) and may be done ahead of time; `start` or `restore` makes the machine run. A runtime never
looks at the database, never opens a network port, and is handed every path it may touch.
"""

from __future__ import annotations

import socket
from collections.abc import Collection
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NewType, Protocol

MachineId = NewType("MachineId", str)

EndReason = Literal["exited", "oom", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """Constant for the life of the process; reported upward with the host.

    `fixed_size`: a saved state is restored only with the CPUs and memory that it was saved with. `image`: a machine's root is a
    raw ext4 image and not a directory. `memory_file` is the file of a saved state that machines map, and so read where they touch
    it only; empty where a restore reads all of it.
    """

    snapshot: bool
    fork_memory: bool
    own_kernel: bool
    fixed_size: bool = False
    image: bool = False
    memory_file: str = ""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Enforced from outside the sandbox. MiB, cores; `processes` bounds tasks of the guest."""

    cpu: float
    memory_mib: int
    disk_mib: int
    processes: int = 1024


@dataclass(frozen=True, kw_only=True)
class MachineSpec:
    """All a driver needs to know of one machine.

    `rootfs` is shared and never written to: a directory, or a raw ext4 image where `Capabilities.image` is set. `disk` is a
    directory of this machine; everything that the guest writes ends there. Its file system has the size of the disk limit,
    but for images: they are cloned into it, and have that size themselves. `state` is a private directory for the driver's
    own files. `guest` is a directory that holds the guest binary, which the sandbox sees read-only at `/.pandastack`.
    """

    id: MachineId
    rootfs: Path
    guest: Path
    disk: Path
    state: Path
    limits: Limits
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Channel:
    """A byte stream to the guest daemon, as owned file descriptors (equal for a socket). Whoever takes it closes it.

    `fresh` is false where bytes of an older session may still be under way, so that the session must resynchronise.
    """

    read_fd: int
    write_fd: int
    fresh: bool = True


@dataclass(frozen=True, kw_only=True)
class MemorySource:
    """The file that a machine has as its memory, under the name it had then, and the user as whom it reads it."""

    file: Path
    user: int


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a machine costs its host now. `cpu_s` and `uptime_s` only grow."""

    pid: int
    cpu_s: float
    memory_bytes: int
    resident_bytes: int
    virtual_bytes: int
    threads: int
    uptime_s: float


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a machine has in memory: its own, and what others may have mapped too."""

    own_bytes: int = 0
    shared_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Whether a runtime works on this machine, found out by using it.

    `key` changes when old states do not restore any more, `boots` when machines boot something else, for which nothing that was
    saved is lost.
    """

    works: bool
    version: str | None = None
    key: str = ""
    boots: str = ""
    reason: str | None = None
    hint: str | None = None

    @property
    def bakes(self) -> str:
        """Changes when what is baked does, by booting it."""
        return f"{self.key} {self.boots}"


class Keeper(Protocol):
    """Keeps file descriptors open under a name while this process is away; see `host.keeper`. Calls block briefly."""

    def put(self, name: str, fds: list[int]) -> None: ...

    def get(self, name: str) -> list[int]: ...

    def drop(self, name: str) -> None: ...


class Pager(Protocol):
    """Serves the pages of a saved memory that is not here yet, to machines that hand over a userfaultfd; see `storage.lazy`."""

    def page(self, file: Path, listener: socket.socket, user: int) -> None:
        """Serve the one that will connect to `listener`, of which the caller then needs nothing more, for as long as it lives.

        `file` and `user` are what its `memory_source` says. Blocks briefly. Raises HostUnfit.
        """
        ...


class Machine(Protocol):
    """One machine. Calls after its end raise RuntimeFailed; `stop` is idempotent and the only way to give back what it holds."""

    spec: MachineSpec

    async def start(self) -> None:
        """Boot the prepared machine with the guest daemon as its first process."""
        ...

    async def restore(self, snapshot: Path) -> None:
        """Bring the prepared machine to the state saved in `snapshot` (a directory made by `snapshot` of the same runtime)."""
        ...

    async def connect(self) -> Channel:
        """A channel to the guest daemon of a running machine, also after a restart of this process. One at a time."""
        ...

    async def snapshot(
        self, into: Path, *, resume: bool, still: AbstractAsyncContextManager[Any] | None = None, copies: int | None = None
    ) -> None:
        """Save memory, processes and disk of one instant into the empty directory `into`; then go on, or stay stopped.

        That instant is in `still`, which is entered and left once: what can be done ahead of it and afterwards is done outside.
        Whoever leaves it may freeze the machine then. With `copies` it is no state to keep: at most so many machines are restored
        from it, by this process, until `Runtime.forget`; a part of it may be in memory only.
        """
        ...

    async def freeze(self) -> None:
        """Use no CPU until `thaw`. Milliseconds; idempotent."""
        ...

    async def thaw(self) -> None: ...

    async def usage(self) -> Usage: ...

    def memory_share(self) -> float:
        """How much of its memory limit it needs now, 0 to 1: at 1 it is ended. Costs microseconds."""
        ...

    async def memory(self) -> Memory:
        """Takes longer than `usage`, and tells own memory from shared. Thaws nothing."""
        ...

    async def ended(self) -> EndReason:
        """Wait until the machine is over, however long that takes, and say why. Cancel it freely."""
        ...

    @property
    def over(self) -> bool:
        """Whether it has ended, as of now."""
        ...

    @property
    def memory_source(self) -> MemorySource | None:
        """Where memory comes from that it has not touched yet; None where it has all of its own. Also after its end."""
        ...

    def let_go(self) -> None:
        """Close what this process holds of it. It runs on, for a later `adopt`; this object is of no more use."""
        ...

    async def stop(self) -> None:
        """Kill it and remove every process, cgroup, socket and state file of it. The disk directory is the caller's."""
        ...


class Runtime(Protocol):
    """`isolation` is what stands between guest and host: `none`, `gvisor` or `microvm`. `acceleration` is what runs the code of a
    microVM, `kvm` or `tcg` (emulation); None where there is no machine to run. Both hold from the first `probe` on.
    """

    name: str
    isolation: str
    acceleration: str | None
    capabilities: Capabilities

    async def probe(self) -> Probe: ...

    async def prepare(self, spec: MachineSpec) -> Machine:
        """Everything short of running. All or nothing: when it raises, nothing is left. Raises RuntimeFailed, HostUnfit."""
        ...

    def forget(self, copied: Path) -> None:
        """Give back what is in memory of a state that was saved to be copied. Nothing restores it any more. Idempotent; does not block."""
        ...

    async def adopt(self, spec: MachineSpec) -> Machine | None:
        """The running machine of that spec after a restart of this daemon, or None when it is not running any more."""
        ...

    async def sweep(self, keep: Collection[MachineId]) -> list[MachineId]:
        """Remove what is left of this runtime's machines other than `keep`, and say which those were."""
        ...
