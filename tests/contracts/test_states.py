"""The promises about state (pause, hibernate, wake, snapshot, fork), over the real host on every runtime of this machine.

Every runtime inherits this text: a line here that only one of them can keep is wrong. What each of them needs is said in
`test_runtime`. What only a real kernel can show (randomness, clocks, listeners) is in `tests/system`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from hosts import World, fake_vm, settled, until
from pandastack.control.hosts import closing
from pandastack.errors import (
    CapacityError,
    Conflict,
    HookFailed,
    InvalidRequest,
    SandboxNotFound,
    SnapshotNotFound,
    SnapshotUnusable,
)
from pandastack.host import app, bakery, identity, machines, runtimes_here, sandboxes, states
from pandastack.host.app import HostService
from pandastack.host.runtimes.fake import FakeRuntime
from pandastack.host.runtimes.firecracker.driver import FirecrackerRuntime
from pandastack.host.settings import HostSettings
from pandastack.wire.host import HostChild, HostCreate, HostFork, HostRewind, Output, ProcessExit
from pandastack.wire.ids import ProcessId, SandboxId, SnapshotId, new_process_id, new_sandbox_id, new_snapshot_id
from pandastack.wire.processes import ExecRequest, ProcessStart, SignalRequest

from .benches import CACHE, PATIENCE, Microvms, qemu_binary, runsc

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300 * PATIENCE)]

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
def qemu_place(xfs: Path) -> Any:
    qemu_binary()
    with microvm_place(xfs, "qemu") as place:
        yield place


@contextlib.contextmanager
def firecracker_place(xfs: Path, made: Microvms, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of the Firecracker that PANDASTACK_FIRECRACKER names, as `made` found it to work here.

    One for glibc has no seccomp filters, and a host takes none such, whatever is set for it: only this test makes it do so.
    """
    monkeypatch.setattr(runtimes_here, "FirecrackerRuntime", functools.partial(FirecrackerRuntime, unfiltered=True, patience=PATIENCE))
    for module, name in WAITS:
        monkeypatch.setattr(module, name, getattr(module, name) * PATIENCE)
    # To make a root takes long where everything is slow.
    roots = xfs / "place" / "data" / "roots"
    if not (roots / made.root.name).exists():
        roots.mkdir(parents=True, exist_ok=True)
        (roots / made.root.name).hardlink_to(made.root)
    with microvm_place(xfs, "firecracker", firecracker=made.binary) as place:
        yield place


@contextlib.contextmanager
def microvm_place(xfs: Path, runtime: str, **chosen: Any) -> Any:
    """On a file system where copies share blocks; images and baked states are made once for all tests."""
    folder = xfs / "place"
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


# A host finds out for itself whether QEMU has KVM.
@pytest.fixture(params=["fake", "fakevm", "gvisor", "gvisor-new", "qemu", "firecracker-kvm"])
async def place(request: pytest.FixtureRequest, tmp_path: Path, no_leaks: None, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    name, get = request.param, request.getfixturevalue
    if name in FAKES:
        made = fake_place(tmp_path, FAKES[name]())
    elif name == "qemu":
        made = qemu_place(get("xfs"))
    elif name == "firecracker-kvm":
        made = firecracker_place(get("xfs"), get("microvms")(name), monkeypatch)
    else:
        made = gvisor_place(tmp_path, name)
    with made as here:
        yield here
        async with here.opened() as host:
            for left in await host.list():
                await host.delete(left.id)
            for snapshot in await host.list_snapshots():
                await host.delete_snapshot(snapshot.id)
            await until(lambda: here.left() == {})
        assert [path.name for path in here.snapshots.iterdir()] == [".new"]
        assert list((here.snapshots / ".new").iterdir()) == []


@pytest.fixture
async def host(place: Place) -> AsyncIterator[HostService]:
    async with place.opened() as made:
        yield made


def wanted(**values: Any) -> HostCreate:
    return HostCreate(**{"id": new_sandbox_id(), "template": "base", "hostname": "parent", "memory_mb": 256, "cpu": 1} | values)


@pytest.fixture
async def box(host: HostService) -> SandboxId:
    return (await host.create(wanted(env={"OWN": "value"}))).id


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


@pytest.fixture
async def memory(host: HostService, box: SandboxId) -> Memory:
    made = Memory(host)
    await made.begin(box)
    await made.say(box, b"before\n")
    await made.heard(box, b"begun\nbefore\n")
    return made


def children(count: int) -> list[HostChild]:
    return [HostChild(id=new_sandbox_id(), hostname=f"child-{number}") for number in range(count)]


class TestPause:
    async def test_a_paused_sandbox_moves_when_it_is_resumed(self, host: HostService, box: SandboxId) -> None:
        assert (await host.pause(box)).status == "paused"
        assert (await host.pause(box)).status == "paused"
        before = (await host.metrics(box)).host_cpu_seconds
        await asyncio.sleep(0.2)
        assert (await host.metrics(box)).host_cpu_seconds - before < 0.02
        assert (await host.get(box)).status == "paused", "to look resumes nothing"
        assert (await host.resume(box)).status == "running"
        assert (await host.resume(box)).status == "running"
        assert await run(host, box, "echo on") == "on\n"

    async def test_a_request_resumes_it(self, host: HostService, box: SandboxId) -> None:
        await host.pause(box)
        assert await run(host, box, "echo on") == "on\n"
        assert (await host.get(box)).status == "running"
        kinds = [event.kind for event in await host.events(0, timeout_s=0)]
        assert kinds == ["paused", "running"]

    async def test_it_stays_paused_over_a_restart(self, place: Place) -> None:
        async with place.opened() as host:
            box = (await host.create(wanted())).id
            await run(host, box, "echo kept > /root/file")
            await host.pause(box)
        async with place.opened() as host:
            assert (await host.get(box)).status == "paused"
            assert await run(host, box, "cat /root/file") == "kept\n"


class TestHibernate:
    async def test_it_holds_nothing_and_comes_back_as_it_was(self, place: Place, host: HostService, box: SandboxId, memory: Memory) -> None:
        await run(host, box, "echo kept > /root/file")
        asleep = await host.hibernate(box, reason="request")
        assert (asleep.status, asleep.status_reason) == ("hibernated", "request")
        assert asleep.stored_bytes > 0
        await settled(host)
        assert list(place.left()) == ["ledger"]
        assert (await host.describe()).capacity.sandboxes == 0
        assert (await host.hibernate(box, reason="request")).status == "hibernated"
        assert (await host.wake(box)).status == "running"
        assert await run(host, box, "cat /root/file; hostname; echo $OWN") == "kept\nparent\nvalue\n"
        await memory.say(box, b"after\n")
        await memory.heard(box, b"begun\nbefore\nafter\n")
        assert (await host.describe()).capacity.sandboxes == 1
        await settled(host)
        assert [path.name for path in place.snapshots.iterdir()] == [".new"]

    async def test_ten_requests_at_once_wake_it_once(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        await host.hibernate(box, reason="idle")
        said = await asyncio.gather(*(run(host, box, f"echo {number}") for number in range(10)))
        assert said == [f"{number}\n" for number in range(10)]
        assert [event.kind for event in await host.events(0, timeout_s=0)] == ["hibernated", "running"]
        await memory.heard(box, b"begun\nbefore\n")

    async def test_looking_wakes_nothing(self, host: HostService, box: SandboxId) -> None:
        await host.hibernate(box, reason="idle")
        for _ in range(3):
            assert (await host.get(box)).status == "hibernated"
            assert [one.status for one in await host.list()] == ["hibernated"]
        assert not (await host.get(box)).busy

    async def test_five_rounds_lose_nothing(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        heard = b"begun\nbefore\n"
        for number in range(5):
            await run(host, box, f"echo {number} > /root/{number}")
            await memory.say(box, b"round %d\n" % number)
            heard += b"round %d\n" % number
            await host.hibernate(box, reason="request")
        assert await run(host, box, "cat /root/0 /root/1 /root/2 /root/3 /root/4") == "0\n1\n2\n3\n4\n"
        await memory.heard(box, heard)

    async def test_it_survives_a_restart(self, place: Place) -> None:
        async with place.opened() as host:
            box = (await host.create(wanted())).id
            memory = Memory(host)
            await memory.begin(box)
            await host.hibernate(box, reason="shutdown")
        async with place.opened() as host:
            state = await host.get(box)
            assert (state.status, state.status_reason) == ("hibernated", "shutdown")
            memory = Memory(host)
            await memory.say(box, b"after\n")
            await memory.heard(box, b"begun\nafter\n")

    async def test_one_that_is_not_idle_is_left_alone(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        with pytest.raises(Conflict):
            await host.hibernate(box, reason="idle", idle_for_s=0.0)
        assert (await host.get(box)).status == "running"
        await host.signal_process(box, ProcessId("memory"), SignalRequest(signal="KILL"))
        sandbox = host.sandboxes.registry.get(box)
        await until(lambda: sandbox.idle_for(0.1), 30)
        assert (await host.hibernate(box, reason="idle", idle_for_s=0.1)).status == "hibernated"

    async def test_a_paused_one_can_be_hibernated(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        await host.pause(box)
        assert (await host.hibernate(box, reason="request")).status == "hibernated"
        assert (await host.resume(box)).status == "running"
        await memory.heard(box, b"begun\nbefore\n")

    async def test_a_damaged_one_is_refused_and_kept(self, place: Place, host: HostService, box: SandboxId) -> None:
        await host.hibernate(box, reason="request")
        (folder,) = [path for path in place.snapshots.iterdir() if path.name != ".new"]
        victim = max((path for path in folder.iterdir() if path.name != "manifest.json"), key=lambda path: path.stat().st_size)
        flip_last(victim)
        with pytest.raises(SnapshotUnusable) as refused:
            await run(host, box, "echo hi")
        assert refused.value.fields["reason"] == "damaged"
        assert (await host.get(box)).status == "hibernated"
        assert (await host.describe()).capacity.sandboxes == 0
        flip_last(victim)
        assert await run(host, box, "echo hi") == "hi\n"

    async def test_a_deleted_one_leaves_nothing(self, place: Place, host: HostService, box: SandboxId) -> None:
        await host.hibernate(box, reason="request")
        await host.delete(box)
        assert place.left() == {}
        assert [path.name for path in place.snapshots.iterdir()] == [".new"]


class TestSnapshot:
    async def test_sandboxes_made_from_one_go_on_where_it_was_taken(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        await run(host, box, "echo kept > /root/file")
        made = await host.snapshot(box, new_snapshot_id())
        assert (made.sandbox_id, made.template, made.memory_mb) == (box, "base", 256)
        assert made.size_bytes > 0
        assert await host.list_snapshots() == [made]
        assert await host.snapshot(box, made.id) == made
        await run(host, box, "echo later > /root/file")
        await memory.say(box, b"later\n")
        await memory.heard(box, b"begun\nbefore\nlater\n")
        await host.delete(box)
        one = await host.create(wanted(snapshot=made.id, hostname="one", env={"MORE": "yes"}, memory_mb=None))
        other = await host.create(wanted(snapshot=made.id, hostname="other"))
        assert (one.memory_mb, one.template_actual) == (256, "base")
        assert await run(host, one.id, "cat /root/file; hostname; echo $OWN $MORE") == "kept\none\nvalue yes\n"
        assert await run(host, other.id, "cat /root/file; hostname") == "kept\nother\n"
        for copy in (one.id, other.id):
            await memory.say(copy, copy.encode())
            await memory.heard(copy, b"begun\nbefore\n" + copy.encode())

    async def test_it_is_proved_by_a_restore_in_which_nothing_runs(self, place: Place, host: HostService, box: SandboxId) -> None:
        made = await host.snapshot(box, new_snapshot_id())
        before = place.left()
        await host.verify_snapshot(made.id)
        assert place.left() == before
        assert (await host.describe()).capacity.sandboxes == 1

    async def test_one_that_was_tampered_with_proves_nothing(self, place: Place, host: HostService, box: SandboxId) -> None:
        made = await host.snapshot(box, new_snapshot_id())
        for path in (place.snapshots / made.id).iterdir():
            if path.name != "manifest.json":
                os.truncate(path, path.stat().st_size - 1)
        for attempt in (host.verify_snapshot(made.id), host.create(wanted(snapshot=made.id))):
            with pytest.raises(SnapshotUnusable) as refused:
                await attempt
            assert refused.value.fields["reason"] == "truncated"
        assert len(await host.list()) == 1

    async def test_an_unknown_one_is_not_found(self, host: HostService, box: SandboxId) -> None:
        unknown = SnapshotId("00000000-0000-4000-8000-00000000000f")
        await host.delete_snapshot(unknown)
        for attempt in (host.verify_snapshot(unknown), host.create(wanted(snapshot=unknown))):
            with pytest.raises(SnapshotNotFound):
                await attempt
        with pytest.raises(SandboxNotFound):
            await host.snapshot(new_sandbox_id(), new_snapshot_id())

    async def test_less_than_it_has_is_refused(self, host: HostService, box: SandboxId) -> None:
        made = await host.snapshot(box, new_snapshot_id())
        with pytest.raises(InvalidRequest) as refused:
            await host.create(wanted(snapshot=made.id, memory_mb=128))
        assert refused.value.fields["field"] == "memory_mb"

    async def test_of_a_hibernated_sandbox_it_wakes_nobody(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        await host.hibernate(box, reason="request")
        made = await host.snapshot(box, new_snapshot_id())
        assert (await host.get(box)).status == "hibernated"
        await host.delete(box)
        copy = (await host.create(wanted(snapshot=made.id))).id
        await memory.heard(copy, b"begun\nbefore\n")

    async def test_a_hibernated_sandboxes_own_state_is_none(self, place: Place, host: HostService, box: SandboxId) -> None:
        await host.hibernate(box, reason="request")
        assert await host.list_snapshots() == []
        (folder,) = [path for path in place.snapshots.iterdir() if path.name != ".new"]
        await host.delete_snapshot(SnapshotId(folder.name))
        assert await run(host, box, "echo there") == "there\n"

    async def test_a_hook_that_refuses_stops_it_and_harms_nothing(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        async def script() -> AsyncIterator[bytes]:
            yield b"#!/bin/sh\nexit 1\n"

        await host.write_file(box, HOOK, script(), mode=0o755)
        with pytest.raises(HookFailed):
            await host.snapshot(box, new_snapshot_id())
        with pytest.raises(HookFailed):
            await host.hibernate(box, reason="request")
        with pytest.raises(HookFailed):
            await host.fork(HostFork(parent=box, children=children(2)))
        assert [one.status for one in await host.list()] == ["running"]
        assert await host.list_snapshots() == []
        await memory.say(box, b"on\n")
        await memory.heard(box, b"begun\nbefore\non\n")


class TestFork:
    async def test_children_have_what_the_parent_had_and_go_their_own_ways(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        await run(host, box, "echo kept > /root/file")
        request = HostFork(parent=box, children=children(3))
        made = await host.fork(request)
        assert [child.id for child in made] == [child.id for child in request.children]
        parent = await host.get(box)
        for child in made:
            assert (child.status, child.template_actual, child.memory_mb, child.disk_mb) == (
                "running", parent.template_actual, parent.memory_mb, parent.disk_mb,
            )  # fmt: skip
        assert await host.fork(request) == [await host.get(child.id) for child in made]
        for number, child in enumerate(made):
            assert await run(host, child.id, "cat /root/file; hostname; echo $OWN") == f"kept\nchild-{number}\nvalue\n"
        everyone = [box, *(child.id for child in made)]
        for one in everyone:
            await memory.say(one, one.encode())
            await run(host, one, f"echo {one} > /root/file")
        for one in everyone:
            await memory.heard(one, b"begun\nbefore\n" + one.encode())
            assert await run(host, one, "cat /root/file") == f"{one}\n"

    async def test_a_fork_can_be_forked_and_outlives_its_parent(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        (child,) = await host.fork(HostFork(parent=box, children=children(1)))
        await memory.say(child.id, b"child\n")
        (grandchild,) = await host.fork(HostFork(parent=child.id, children=children(1)))
        await host.delete(box)
        await host.delete(child.id)
        await memory.say(grandchild.id, b"grandchild\n")
        await memory.heard(grandchild.id, b"begun\nbefore\nchild\ngrandchild\n")

    async def test_a_hibernated_parent_is_forked_without_waking(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        await host.hibernate(box, reason="request")
        made = await host.fork(HostFork(parent=box, children=children(2)))
        assert (await host.get(box)).status == "hibernated"
        for child in made:
            await memory.heard(child.id, b"begun\nbefore\n")
        await memory.heard(box, b"begun\nbefore\n")

    async def test_a_paused_parent_stays_paused(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        await host.pause(box)
        (child,) = await host.fork(HostFork(parent=box, children=children(1)))
        assert (await host.get(box)).status == "paused"
        assert child.status == "running"
        await memory.heard(child.id, b"begun\nbefore\n")

    async def test_a_request_that_is_under_way_goes_on_in_the_parent(self, host: HostService, box: SandboxId) -> None:
        running = asyncio.create_task(run(host, box, "echo one; sleep 1; echo two"))
        await asyncio.sleep(0.3)
        await host.fork(HostFork(parent=box, children=children(1)))
        assert await running == "one\ntwo\n"

    async def test_requests_meanwhile_are_answered(self, host: HostService, box: SandboxId) -> None:
        forking = asyncio.create_task(host.fork(HostFork(parent=box, children=children(2))))
        said = []
        while not forking.done():
            said.append(await run(host, box, "echo hi"))
        await forking
        assert set(said) == {"hi\n"}

    async def test_an_unknown_parent_is_not_found(self, place: Place, host: HostService) -> None:
        with pytest.raises(SandboxNotFound):
            await host.fork(HostFork(parent=new_sandbox_id(), children=children(1)))
        assert place.left() == {}

    async def test_all_or_none_where_there_is_no_room(self, place: Place, host: HostService, box: SandboxId, memory: Memory) -> None:
        before = place.left()
        host._registry.admission._totals = _with_room_for(host, 3)
        with pytest.raises(CapacityError):
            await host.fork(HostFork(parent=box, children=children(3)))
        assert [one.id for one in await host.list()] == [box]
        assert place.left() == before
        assert len(await host.fork(HostFork(parent=box, children=children(2)))) == 2
        await memory.heard(box, b"begun\nbefore\n")

    async def test_sixteen_at_once(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        made = await host.fork(HostFork(parent=box, children=children(16)))
        assert len({child.id for child in made}) == 16
        for child in made:
            await memory.heard(child.id, b"begun\nbefore\n")
        await asyncio.gather(*(host.delete(child.id) for child in made))
        assert [one.id for one in await host.list()] == [box]


async def test_use_follows_a_sandbox_through_its_states(place: Place, host: HostService, box: SandboxId) -> None:
    before = await host.usage(box)
    assert before.memory_own_bytes > 1 << 19
    kept = await host.hibernate(box, reason="request")
    now = await host.usage(box)
    assert (now.status, now.memory_own_bytes, now.disk_own_bytes) == ("hibernated", 0, 0)
    assert now.stored_own_bytes + now.stored_shared_bytes == kept.stored_bytes
    assert (now.stored_own_bytes > 0, now.stored_shared_bytes > 0) == (True, place.shares)
    snapshot = await host.snapshot(box, new_snapshot_id())
    shared = await host.usage(box)
    assert shared.stored_shared_bytes > now.stored_shared_bytes
    assert shared.stored_own_bytes + shared.stored_shared_bytes == kept.stored_bytes
    assert (await host.get(box)).status == "hibernated", "looking wakes nothing"
    await host.wake(box)
    await settled(host)
    # The sandbox has given its saved state back, so what both had is the snapshot's alone.
    alone = await host.snapshot_usage(snapshot.id)
    assert alone.own_bytes + alone.shared_bytes == snapshot.size_bytes
    assert (alone.own_bytes > 0, alone.shared_bytes > 0) == (True, place.shares)
    assert (await host.usage(box)).stored_shared_bytes == 0


class TestRewind:
    async def test_memory_processes_and_files_are_back_and_the_way_forth_is_kept(
        self, place: Place, host: HostService, box: SandboxId, memory: Memory
    ) -> None:
        await run(host, box, "echo then > /root/file")
        point, undo = new_snapshot_id(), new_snapshot_id()
        await host.snapshot(box, point)
        await run(host, box, "echo later > /root/file; echo more > /root/more")
        await memory.say(box, b"later\n")
        await memory.heard(box, b"begun\nbefore\nlater\n")
        before = await host.get(box)
        there = place.left()
        done = await host.rewind(HostRewind(sandbox=box, snapshot=point, undo=undo))
        assert (done.sandbox.id, done.sandbox.status, done.sandbox.boot_mode) == (box, "running", "rewind")
        assert done.undo is not None
        assert (done.undo.id, done.undo.sandbox_id) == (undo, box)
        assert (done.sandbox.memory_mb, done.sandbox.template_actual) == (before.memory_mb, before.template_actual)
        assert {kind: len(names) for kind, names in place.left().items()} == {kind: len(names) for kind, names in there.items()}
        assert await run(host, box, "cat /root/file; hostname; echo $OWN") == "then\nparent\nvalue\n"
        await memory.heard(box, b"begun\nbefore\n")
        await memory.say(box, b"again\n")
        await memory.heard(box, b"begun\nbefore\nagain\n")
        # The same point a second time, and then forth again.
        again = await host.rewind(HostRewind(sandbox=box, snapshot=point))
        assert again.undo is None
        await memory.heard(box, b"begun\nbefore\n")
        await host.rewind(HostRewind(sandbox=box, snapshot=undo))
        await memory.heard(box, b"begun\nbefore\nlater\n")
        assert await run(host, box, "cat /root/file /root/more") == "later\nmore\n"
        assert (await host.describe()).capacity.sandboxes == 1
        assert {found.id for found in await host.list_snapshots()} == {point, undo}
        assert [event.kind for event in await host.events(0, timeout_s=0)] == ["running"] * 3

    @pytest.mark.parametrize("verb", ["pause", "hibernate"])
    async def test_one_that_does_not_run_is_brought_back_as_it_was_then(
        self, place: Place, host: HostService, box: SandboxId, memory: Memory, verb: str
    ) -> None:
        point, undo = new_snapshot_id(), new_snapshot_id()
        await host.snapshot(box, point)
        await memory.say(box, b"later\n")
        await memory.heard(box, b"begun\nbefore\nlater\n")
        await (host.pause(box) if verb == "pause" else host.hibernate(box, reason="request"))
        done = await host.rewind(HostRewind(sandbox=box, snapshot=point, undo=undo))
        assert (done.sandbox.status, done.sandbox.stored_bytes) == ("running", 0)
        await memory.heard(box, b"begun\nbefore\n")
        await host.rewind(HostRewind(sandbox=box, snapshot=undo))
        await memory.heard(box, b"begun\nbefore\nlater\n")
        assert sorted(path.name for path in place.snapshots.iterdir()) == sorted([".new", point, undo])

    async def test_a_failed_one_comes_back(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        point = new_snapshot_id()
        await host.snapshot(box, point)
        await host.sandboxes.registry.fail(host.sandboxes.registry.get(box), "guest")
        assert (await host.describe()).capacity.sandboxes == 0
        done = await host.rewind(HostRewind(sandbox=box, snapshot=point, undo=new_snapshot_id()))
        assert (done.sandbox.status, done.sandbox.status_reason, done.undo) == ("running", None, None)
        assert (await host.describe()).capacity.sandboxes == 1
        await memory.say(box, b"on\n")
        await memory.heard(box, b"begun\nbefore\non\n")
        # And it can fail, and be noticed, a second time.
        await host.sandboxes.registry.fail(host.sandboxes.registry.get(box), "guest")
        assert (await host.get(box)).status == "failed"

    async def test_another_sandboxs_point_is_refused(self, host: HostService, box: SandboxId) -> None:
        (child,) = await host.fork(HostFork(parent=box, children=children(1)))
        point = await host.snapshot(child.id, new_snapshot_id())
        with pytest.raises(Conflict):
            await host.rewind(HostRewind(sandbox=box, snapshot=point.id))
        with pytest.raises(Conflict):
            await host.fork(HostFork(parent=box, children=children(1), snapshot=point.id))
        with pytest.raises(SnapshotNotFound):
            await host.rewind(HostRewind(sandbox=box, snapshot=new_snapshot_id()))
        assert await run(host, box, "echo on") == "on\n"

    async def test_without_room_for_both_it_goes_on_and_can_be_hibernated_first(
        self, place: Place, host: HostService, box: SandboxId, memory: Memory
    ) -> None:
        point = await host.snapshot(box, new_snapshot_id())
        before = place.left()
        host._registry.admission._totals = _with_room_for(host, 1)
        with pytest.raises(CapacityError) as refused:
            await host.rewind(HostRewind(sandbox=box, snapshot=point.id, undo=new_snapshot_id()))
        assert "hibernate" in (refused.value.hint or "")
        assert place.left() == before
        assert await host.list_snapshots() == [point]
        await memory.say(box, b"on\n")
        await memory.heard(box, b"begun\nbefore\non\n")
        await host.hibernate(box, reason="request")
        assert (await host.rewind(HostRewind(sandbox=box, snapshot=point.id))).sandbox.status == "running"
        await memory.heard(box, b"begun\nbefore\n")

    async def test_a_request_that_was_under_way_learns_what_happened(self, host: HostService, box: SandboxId) -> None:
        point = await host.snapshot(box, new_snapshot_id())
        running = asyncio.create_task(run(host, box, "echo one; sleep 60"))
        await asyncio.sleep(0.3)
        await host.rewind(HostRewind(sandbox=box, snapshot=point.id))
        with pytest.raises(Conflict, match="earlier point"):
            await running

    async def test_it_survives_a_restart(self, place: Place) -> None:
        async with place.opened() as host:
            box = (await host.create(wanted())).id
            memory = Memory(host)
            await memory.begin(box)
            point = await host.snapshot(box, new_snapshot_id())
            await host.rewind(HostRewind(sandbox=box, snapshot=point.id))
        async with place.opened() as host:
            memory = Memory(host)
            await memory.say(box, b"after\n")
            await memory.heard(box, b"begun\nafter\n")
            assert (await host.describe()).capacity.sandboxes == 1


class TestForkAtAPoint:
    @pytest.mark.parametrize("parent_is", ["running", "hibernated", "failed"])
    async def test_children_are_what_the_parent_was_and_it_is_not_touched(
        self, host: HostService, box: SandboxId, memory: Memory, parent_is: str
    ) -> None:
        point = await host.snapshot(box, new_snapshot_id())
        await memory.say(box, b"later\n")
        await memory.heard(box, b"begun\nbefore\nlater\n")
        if parent_is == "hibernated":
            await host.hibernate(box, reason="request")
        elif parent_is == "failed":
            await host.sandboxes.registry.fail(host.sandboxes.registry.get(box), "guest")
        made = await host.fork(HostFork(parent=box, children=children(2), snapshot=point.id))
        assert (await host.get(box)).status == parent_is
        assert [child.status for child in made] == ["running", "running"]
        for number, child in enumerate(made):
            await memory.heard(child.id, b"begun\nbefore\n")
            assert await run(host, child.id, "hostname") == f"child-{number}\n"
        if parent_is != "failed":
            await memory.heard(box, b"begun\nbefore\nlater\n")


def _with_room_for(host: HostService, sandboxes: int) -> Any:
    from dataclasses import replace

    return replace(host._registry.admission._totals, sandboxes=sandboxes)


def test_the_tests_run_on_what_is_there() -> None:
    """A skip for a runtime that this machine has would be a defect."""
    if os.geteuid() == 0:
        assert runsc("gvisor").exists()
