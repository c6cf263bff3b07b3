"""Hosts on every runtime of this machine, each in a place of its own, and what the tests of its states ask of a sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hosts import World, fake_vm
from pandastack.control.hosts import closing
from pandastack.host import app, bakery, identity, machines, runtimes_here, sandboxes, states
from pandastack.host.app import HostService
from pandastack.host.runtimes.fake import FakeRuntime
from pandastack.host.runtimes.firecracker.driver import FirecrackerRuntime
from pandastack.host.runtimes.qemu.driver import QemuRuntime
from pandastack.host.settings import HostSettings
from pandastack.wire.host import HostChild, HostCreate, Output, ProcessExit
from pandastack.wire.ids import ProcessId, SandboxId, new_process_id, new_sandbox_id
from pandastack.wire.processes import ExecRequest, ProcessStart

from ..benches import CACHE, PATIENCE, Microvms, qemu_binary, runsc

HOOK = b"/etc/pandastack/hooks/before-snapshot"
# How long a host waits, in seconds; as many times longer as all is slower.
WAITS = [
    *((bakery, name) for name in ("WARM_TIMEOUT_S", "_STEP_TIMEOUT_S")),
    *((sandboxes, name) for name in ("TEMPLATE_PATIENCE_S", "HEALTH_TIMEOUT_S")),
    *((identity, "IDENTITY_TIMEOUT_S"), (machines, "CONNECT_TIMEOUT_S"), (states, "STILL_TIMEOUT_S")),
]


class Place:
    """Where a host lives: it can be opened, closed and opened again, and tells what is left. `shares`: disks, with their template."""

    def __init__(
        self,
        open_: Callable[[], AbstractAsyncContextManager[HostService]],
        left: Callable[[], Any],
        snapshots: Path,
        *,
        shares: bool = False,
    ) -> None:
        self.opened = open_
        self.left = left
        self.snapshots = snapshots
        self.shares = shares


@contextlib.contextmanager
def fake_place(folder: Path, runtime: FakeRuntime) -> Any:
    world = World(folder, runtimes=[runtime])
    yield Place(world.opened, world.left, folder / "snapshots")
    world.clear()


@contextlib.contextmanager
def gvisor_place(folder: Path, name: str) -> Any:
    with real_place(folder, runtimes="gvisor", runsc=runsc(name)) as place:
        yield place


@contextlib.contextmanager
def qemu_place(xfs: Path, find: Callable[[str], Microvms], monkeypatch: pytest.MonkeyPatch) -> Any:
    """With KVM where that runs guests: a host finds that out for itself."""
    qemu_binary()
    monkeypatch.setattr(runtimes_here, "QemuRuntime", functools.partial(QemuRuntime, patience=PATIENCE))
    made = find("qemu-kvm") if PATIENCE > 1 else None
    with microvm_place(xfs, "qemu", made, monkeypatch) as place:
        yield place


@contextlib.contextmanager
def firecracker_place(xfs: Path, made: Microvms, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of the Firecracker that PANDASTACK_FIRECRACKER names, as `made` found it to work here.

    One for glibc has no seccomp filters, and a host takes none such, whatever is set for it: only this test makes it do so.
    """
    monkeypatch.setattr(runtimes_here, "FirecrackerRuntime", functools.partial(FirecrackerRuntime, unfiltered=True, patience=PATIENCE))
    with microvm_place(xfs, "firecracker", made, monkeypatch, firecracker=made.binary) as place:
        yield place


@contextlib.contextmanager
def microvm_place(xfs: Path, runtime: str, made: Microvms | None, monkeypatch: pytest.MonkeyPatch, **chosen: Any) -> Any:
    """On a file system where copies share blocks; images and baked states are made once for all tests, and the root is that of `made`."""
    folder = xfs / "place"
    for module, name in WAITS:
        monkeypatch.setattr(module, name, getattr(module, name) * PATIENCE)
    roots = folder / "data" / "roots"
    if made is not None and not (roots / made.root.name).exists():
        # To make one takes long where everything is slow.
        roots.mkdir(parents=True, exist_ok=True)
        (roots / made.root.name).hardlink_to(made.root)
    with real_place(folder, shares=True, runtimes=runtime, **chosen) as place:
        yield place
    for left in [*folder.glob("data/*")]:
        if left.name != "roots" and not left.name.startswith("states-"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextlib.contextmanager
def real_place(folder: Path, *, shares: bool = False, **chosen: Any) -> Any:
    run = Path("/tmp") / f"pd-{secrets.token_hex(4)}"
    settings = HostSettings(data_dir=folder / "data", cache_dir=CACHE, run_dir=run, slots=0, blanks=0, disk_low_water_mb=0, **chosen)

    @asynccontextmanager
    async def opened() -> AsyncIterator[HostService]:
        async with app.opened(settings, say=lambda _: None) as host:
            async with closing(host.bake("base")) as said:
                async for _ in said:
                    pass
            yield host

    def left() -> dict[str, list[str]]:
        kinds = ["ledger", "captures", *(f"{kind}{of}" for kind in ("machines", "disks") for of in ("-qemu", "-firecracker")), "machines"]
        folders = {kind: folder / "data" / kind for kind in kinds}
        found = {kind: [path.name for path in where.iterdir()] for kind, where in folders.items() if where.exists()}
        found["disks"] = [path.name for path in (folder / "data" / "disks").glob("*.img")]
        return {kind: names for kind, names in found.items() if names}

    yield Place(opened, left, folder / "data" / "snapshots", shares=shares)
    shutil.rmtree(run, ignore_errors=True)


def flip_last(file: Path) -> None:
    """One bit of the last byte; the rest of a sparse file stays as it is."""
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read(1)[0]
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last ^ 1]))


FAKES = {"fake": FakeRuntime, "fakevm": fake_vm}


def wanted(**values: Any) -> HostCreate:
    return HostCreate(**{"id": new_sandbox_id(), "template": "base", "hostname": "parent", "memory_mb": 256, "cpu": 1} | values)


async def run(host: HostService, box: SandboxId, cmd: str) -> str:
    out, code = b"", -1
    async with asyncio.timeout(60 * PATIENCE), closing(host.run(box, ExecRequest(cmd=cmd), new_process_id())) as items:
        async for item in items:
            if isinstance(item, Output) and item.channel == "stdout":
                out += item.data
            elif isinstance(item, ProcessExit):
                code = item.exit_code
    assert code == 0
    return out.decode()


class Memory:
    """A process that lives on what is in memory: `cat` on an open pipe."""

    def __init__(self, host: HostService) -> None:
        self._host = host
        self._name = ProcessId("memory")

    async def begin(self, box: SandboxId) -> None:
        await self._host.start_process(box, ProcessStart(id=self._name, cmd="echo begun; cat", stdin=True))

    async def say(self, box: SandboxId, text: bytes) -> None:
        async def data() -> AsyncIterator[bytes]:
            yield text

        assert await self._host.write_stdin(box, self._name, data(), close=False) == len(text)

    async def heard(self, box: SandboxId, expected: bytes) -> None:
        async with asyncio.timeout(30 * PATIENCE):
            while True:
                piece = await self._host.read_output(box, self._name, "stdout", offset=0, limit=1 << 20)
                if piece.data == expected:
                    return
                assert expected.startswith(piece.data)
                await asyncio.sleep(0.01)


def children(count: int) -> list[HostChild]:
    return [HostChild(id=new_sandbox_id(), hostname=f"child-{number}") for number in range(count)]


def with_room_for(host: HostService, sandboxes: int) -> Any:
    return replace(host._registry.admission._totals, sandboxes=sandboxes)
