"""What every host promises to the control plane. FakeHost keeps the routes' tests honest by passing this as well.

A host is added to HOSTS as a context manager that yields it, ready to create sandboxes from the template `base`.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from hosts import World
from pandastack.control.fake_host import FakeHost
from pandastack.control.hosts import Host, closing
from pandastack.errors import (
    Conflict,
    FileConflict,
    FileNotFound,
    InvalidRequest,
    PandastackError,
    ProcessNotFound,
    RuntimeUnavailable,
    SandboxNotFound,
    SnapshotNotFound,
    TemplateNotFound,
)
from pandastack.wire.diff import HostPoint
from pandastack.wire.files import ChangeMode
from pandastack.wire.host import HostChild, HostCreate, HostFork, HostRewind, Output, ProcessExit
from pandastack.wire.ids import ProcessId, SandboxId, new_process_id, new_sandbox_id, new_snapshot_id
from pandastack.wire.processes import ExecRequest, ProcessStart, ProcessView, SignalRequest

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def fake() -> AsyncIterator[Host]:
    host = FakeHost()
    yield host
    await host.aclose()


@asynccontextmanager
async def service() -> AsyncIterator[Host]:
    """The real host, on the fake runtime."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        async with world.opened() as host:
            yield host
            for left in await host.list():
                await host.delete(left.id)
        assert world.left() == {}


HOSTS: dict[str, Callable[[], AbstractAsyncContextManager[Host]]] = {"fake": fake, "service": service}


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=HOSTS)
async def host(request: pytest.FixtureRequest) -> AsyncIterator[Host]:
    async with HOSTS[request.param]() as made:
        yield made
        for left in await made.list():
            await made.delete(left.id)


def wanted(**values: Any) -> HostCreate:
    return HostCreate(**{"id": new_sandbox_id(), "template": "base", "hostname": "sandbox", "memory_mb": 256} | values)


@pytest.fixture
async def box(host: Host) -> SandboxId:
    return (await host.create(wanted())).id


class Told:
    """What a followed command said, and how it ended."""

    def __init__(self) -> None:
        self.view: ProcessView
        self.out = b""
        self.err = b""
        self.first_offset: int | None = None
        self.exit: ProcessExit


async def follow(items: AsyncIterator[ProcessView | Output | ProcessExit]) -> Told:
    told, seen = Told(), []
    async with asyncio.timeout(30), closing(items):
        async for item in items:
            seen.append(type(item))
            if isinstance(item, ProcessView):
                told.view = item
            elif isinstance(item, ProcessExit):
                told.exit = item
            else:
                if told.first_offset is None:
                    told.first_offset = item.offset
                if item.channel == "stdout":
                    told.out += item.data
                else:
                    told.err += item.data
    assert seen[0] is ProcessView
    assert seen[-1] is ProcessExit
    assert seen.count(ProcessView) == seen.count(ProcessExit) == 1
    return told


async def run(host: Host, box: SandboxId, cmd: str, **values: Any) -> Told:
    return await follow(host.run(box, ExecRequest(cmd=cmd, **values), new_process_id()))


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


async def content(host: Host, box: SandboxId, path: bytes, **values: Any) -> bytes:
    _, data = await host.read_file(box, path, **values)
    async with closing(data):
        return b"".join([piece async for piece in data])


# Sandboxes


async def test_a_sandbox_is_made_once_per_id_and_deleted_for_good(host: Host) -> None:
    request = wanted()
    first, again = await asyncio.gather(host.create(request), host.create(request))
    assert first.id == again.id == request.id
    assert (first.status, first.template, first.memory_mb) == ("running", "base", 256)
    assert [state.id for state in await host.list()] == [request.id]
    assert (await host.get(request.id)).status == "running"
    await host.delete(request.id)
    await host.delete(request.id)
    assert await host.list() == []
    with pytest.raises(SandboxNotFound):
        await host.get(request.id)
    with pytest.raises(SandboxNotFound):
        await run(host, request.id, "true")


async def test_an_unknown_template_makes_nothing(host: Host) -> None:
    with pytest.raises(TemplateNotFound):
        await host.create(wanted(template="no-such-template"))
    assert await host.list() == []


async def test_isolation_is_refused_where_it_cannot_be_had(host: Host) -> None:
    with pytest.raises(InvalidRequest) as unknown:
        await host.create(wanted(isolation="docker"))
    assert (unknown.value.field, {"auto", "microvm"} <= set(unknown.value.choices)) == ("isolation", True)
    with pytest.raises(RuntimeUnavailable) as missing:
        await host.create(wanted(isolation="firecracker"))
    assert (missing.value.runtime, bool(missing.value.hint)) == ("firecracker", True)
    assert await host.list() == []
    refusals: list[tuple[str, type[PandastackError]]] = [("docker", InvalidRequest), ("firecracker", RuntimeUnavailable)]
    for word, error in refusals:
        with pytest.raises(error):
            async for _ in host.bake("base", word):
                pass
    name = (await host.describe()).runtime
    assert name is not None
    made = await host.create(wanted(isolation=name))
    assert (made.runtime, made.own_kernel) == (name, False)
    await host.delete(made.id)


async def test_the_host_describes_itself(host: Host, box: SandboxId) -> None:
    info = await host.describe()
    assert info.id == host.id
    assert info.runtime in [runtime.name for runtime in info.runtimes if runtime.works]
    assert info.capacity.sandboxes == 1
    assert info.capacity.memory_reserved_mb >= 256
    ready = [template for template in info.templates if template.state == "ready"]
    assert "base" in [template.name for template in ready]
    assert all(template.runtimes[info.runtime or ""] == "ready" for template in ready)


async def test_events_are_waited_for_and_not_for_ever(host: Host) -> None:
    known = await host.events(0, timeout_s=0.01)
    async with asyncio.timeout(5):
        assert await host.events(max((event.seq for event in known), default=0), timeout_s=0.05) == []


async def test_work_inside_counts_as_busy(host: Host, box: SandboxId) -> None:
    await host.start_process(box, ProcessStart(cmd="sleep 100", id="s"))
    async with asyncio.timeout(5):  # The guest reports work a moment after it began.
        state = await host.get(box)
        while not state.busy:
            await asyncio.sleep(0)
            state = await host.get(box)
    assert (state.busy, state.idle_s) == (True, 0.0)
    await host.signal_process(box, ProcessId("s"), SignalRequest(signal="KILL"))
    await follow(host.attach(box, ProcessId("s")))
    async with asyncio.timeout(5):
        while (await host.get(box)).busy:  # noqa: ASYNC110 - a host has no event for becoming idle
            await asyncio.sleep(0)
    async with asyncio.timeout(20):  # A host may want to look inside before it calls a sandbox idle.
        while (await host.get(box)).idle_s == 0:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.05)


async def test_metrics_are_numbers(host: Host, box: SandboxId) -> None:
    assert (await host.metrics(box)).memory_limit_bytes >= 256 << 20


# Processes


async def test_use_is_told_in_every_state_and_wakes_nothing(host: Host, box: SandboxId) -> None:
    running = await host.usage(box)
    assert (running.id, running.status, running.stored_own_bytes) == (box, "running", 0)
    assert running.memory_own_bytes > 0
    await host.pause(box)
    assert (await host.usage(box)).memory_own_bytes > 0
    stored = (await host.hibernate(box, reason="request")).stored_bytes
    now = await host.usage(box)
    assert (now.status, now.memory_own_bytes, now.disk_own_bytes, now.disk_shared_bytes) == ("hibernated", 0, 0, 0)
    assert (now.stored_own_bytes, now.stored_shared_bytes) == (stored, 0)
    assert (await host.get(box)).status == "hibernated"
    with pytest.raises(SandboxNotFound):
        await host.usage(new_sandbox_id())
    with pytest.raises(SnapshotNotFound):
        await host.snapshot_usage(new_snapshot_id())


async def test_what_two_states_share_is_nobodys_own_until_one_of_them_is_gone(host: Host, box: SandboxId) -> None:
    await host.hibernate(box, reason="request")
    made = await host.snapshot(box, new_snapshot_id())
    snapshot, hibernated = await host.snapshot_usage(made.id), await host.usage(box)
    assert snapshot.own_bytes + snapshot.shared_bytes == made.size_bytes
    assert hibernated.stored_shared_bytes == snapshot.shared_bytes > 0
    await host.delete(box)
    alone = await host.snapshot_usage(made.id)
    assert (alone.own_bytes, alone.shared_bytes) == (made.size_bytes, 0)
    await host.delete_snapshot(made.id)


async def test_a_command_is_followed_to_its_exit(host: Host, box: SandboxId) -> None:
    told = await run(host, box, "echo out; echo err >&2; exit 3")
    assert (told.out, told.err, told.exit.exit_code, told.exit.reason) == (b"out\n", b"err\n", 3, "exited")
    assert (told.exit.stdout_bytes, told.exit.stderr_bytes) == (4, 4)


async def test_bytes_arrive_as_they_are(host: Host, box: SandboxId) -> None:
    assert (await run(host, box, "printf '\\377\\000\\303'")).out == b"\xff\x00\xc3"
    assert (await run(host, box, "cat", stdin_b64="/wBhCg==")).out == b"\xff\x00a\n"
    assert (await run(host, box, "cat")).out == b""


async def test_large_output_loses_nothing_for_a_slow_reader(host: Host, box: SandboxId) -> None:
    size, taken = 5_000_000, 0
    async with asyncio.timeout(60), closing(host.run(box, ExecRequest(cmd=f"yes | head -c {size}"), new_process_id())) as items:
        async for item in items:
            if isinstance(item, Output):
                assert item.offset == taken
                taken += len(item.data)
                await asyncio.sleep(0.001)
    assert taken == size


async def test_a_command_over_its_time_is_ended(host: Host, box: SandboxId) -> None:
    told = await run(host, box, "echo before; sleep 100", timeout_seconds=0.3)
    assert (told.out, told.exit.reason) == (b"before\n", "timeout")


async def test_a_command_goes_on_when_its_follower_leaves(host: Host, box: SandboxId) -> None:
    process_id = new_process_id()
    async with closing(host.run(box, ExecRequest(cmd="echo one; sleep 0.2; echo two"), process_id)) as items:
        assert isinstance(await anext(items), ProcessView)
    told = await follow(host.attach(box, process_id, stdout_offset=2))
    assert (told.first_offset, told.out, told.exit.exit_code) == (2, b"e\ntwo\n", 0)
    piece = await host.read_output(box, process_id, "stdout", offset=4, limit=3)
    assert (piece.offset, piece.data, piece.end, piece.running) == (4, b"two", 8, False)


async def test_stdin_is_fed_in_pieces(host: Host, box: SandboxId) -> None:
    started = await host.start_process(box, ProcessStart(cmd="cat", stdin=True, id="cat"))
    assert (started.id, started.running) == ("cat", True)
    assert await host.write_stdin(box, ProcessId("cat"), pieces(b"one ", b"two "), close=False) == 8
    assert await host.write_stdin(box, ProcessId("cat"), pieces(b"three"), close=True) == 5
    assert (await follow(host.attach(box, ProcessId("cat")))).out == b"one two three"
    assert (await host.get_process(box, ProcessId("cat"))).exit_code == 0
    assert "cat" in [view.id for view in await host.list_processes(box)]


async def test_a_signal_ends_a_process_and_says_so(host: Host, box: SandboxId) -> None:
    await host.start_process(box, ProcessStart(cmd="sleep 100", id="s"))
    with pytest.raises(Conflict):
        await host.start_process(box, ProcessStart(cmd="true", id="s"))
    await host.signal_process(box, ProcessId("s"), SignalRequest(signal="TERM"))
    told = await follow(host.attach(box, ProcessId("s")))
    assert (told.exit.exit_code, told.exit.signal) == (143, "TERM")


async def test_an_unknown_process_is_not_found(host: Host, box: SandboxId) -> None:
    nobody = ProcessId("nobody")
    for call in (
        host.get_process(box, nobody),
        host.read_output(box, nobody, "stdout", offset=0, limit=1),
        host.signal_process(box, nobody, SignalRequest()),
        host.write_stdin(box, nobody, pieces(b"x"), close=True),
    ):
        with pytest.raises(ProcessNotFound):
            await call
    with pytest.raises(ProcessNotFound):
        await follow(host.attach(box, nobody))


# Files


async def test_a_file_is_read_as_it_was_written(host: Host, box: SandboxId) -> None:
    data = bytes(range(256)) * 4000
    assert await host.write_file(box, b"/root/new/f", pieces(data[:1000], data[1000:]), mode=0o600) == len(data)
    entry = await host.stat_file(box, b"/root/new/f")
    assert (entry.name, entry.type, entry.is_dir, entry.size, entry.mode) == ("f", "file", False, len(data), "0600")
    assert await content(host, box, b"/root/new/f") == data
    assert await content(host, box, b"/root/new/f", offset=100, length=50) == data[100:150]
    assert await content(host, box, b"/root/new/f", offset=len(data) - 5) == data[-5:]


async def test_a_name_is_bytes(host: Host, box: SandboxId) -> None:
    await host.write_file(box, b"/tmp/d/\xff\n", pieces(b"x"))
    entries = [entry async for batch in host.list_dir(box, b"/tmp/d") for entry in batch]
    assert [(entry.name, entry.name_b64) for entry in entries] == [("\ufffd\n", "/wo=")]
    assert await content(host, box, b"/tmp/d/\xff\n") == b"x"


async def test_a_write_that_breaks_off_leaves_the_old_file(host: Host, box: SandboxId) -> None:
    await host.write_file(box, b"/tmp/f", pieces(b"old"))

    async def broken() -> AsyncIterator[bytes]:
        yield b"new"
        raise ValueError("the client left")

    with pytest.raises(ValueError, match="the client left"):
        await host.write_file(box, b"/tmp/f", broken())
    assert await content(host, box, b"/tmp/f") == b"old"


async def test_directories_are_made_moved_and_removed(host: Host, box: SandboxId) -> None:
    await host.make_dir(box, b"/tmp/a/b", parents=True, mode=0o755)
    await host.make_dir(box, b"/tmp/a/b", parents=True, mode=0o755)
    with pytest.raises(FileConflict):
        await host.make_dir(box, b"/tmp/a/b", parents=False, mode=0o755)
    with pytest.raises(FileNotFound):
        await host.make_dir(box, b"/tmp/x/y", parents=False, mode=0o755)
    await host.write_file(box, b"/tmp/a/b/f", pieces(b"x"))
    await host.move_file(box, b"/tmp/a", b"/tmp/c", overwrite=False)
    assert await content(host, box, b"/tmp/c/b/f") == b"x"
    await host.write_file(box, b"/tmp/g", pieces(b"y"))
    with pytest.raises(FileConflict):
        await host.move_file(box, b"/tmp/g", b"/tmp/c/b/f", overwrite=False)
    await host.move_file(box, b"/tmp/g", b"/tmp/c/b/f", overwrite=True)
    assert await content(host, box, b"/tmp/c/b/f") == b"y"
    await host.change_mode(box, b"/tmp/c/b/f", ChangeMode(path="/tmp/c/b/f", mode="0700"))
    assert (await host.stat_file(box, b"/tmp/c/b/f")).mode == "0700"
    with pytest.raises(FileConflict):
        await host.remove_file(box, b"/tmp/c", recursive=False)
    await host.remove_file(box, b"/tmp/c", recursive=True)
    with pytest.raises(FileNotFound):
        await host.remove_file(box, b"/tmp/c", recursive=True)


async def test_what_is_not_there_and_what_is_no_file(host: Host, box: SandboxId) -> None:
    for call in (host.stat_file(box, b"/no"), host.read_file(box, b"/no"), host.move_file(box, b"/no", b"/tmp/x", overwrite=True)):
        with pytest.raises(FileNotFound):
            await call
    with pytest.raises(FileConflict):
        await host.read_file(box, b"/tmp")
    with pytest.raises(FileNotFound):
        await anext(host.list_dir(box, b"/no"))


async def test_changes_are_seen(host: Host, box: SandboxId) -> None:
    async with asyncio.timeout(10), closing(host.watch_files(box, b"/tmp", recursive=False)) as batches:
        first = await anext(batches)
        if not first:
            await host.write_file(box, b"/tmp/seen", pieces(b"x"))
            first = await anext(batches)
        assert "/tmp/seen" in [event.path for event in first]


# Points


@pytest.mark.parametrize("verb", ["nothing", "pause", "hibernate"])
async def test_a_sandbox_goes_back_to_its_own_point_and_forth_again(host: Host, box: SandboxId, verb: str) -> None:
    await host.write_file(box, b"/tmp/f", pieces(b"then"))
    point = await host.snapshot(box, new_snapshot_id())
    await host.write_file(box, b"/tmp/f", pieces(b"later"))
    if verb == "pause":
        await host.pause(box)
    elif verb == "hibernate":
        await host.hibernate(box, reason="request")
    undo = new_snapshot_id()
    done = await host.rewind(HostRewind(sandbox=box, snapshot=point.id, undo=undo))
    assert (done.sandbox.id, done.sandbox.status, done.sandbox.status_reason, done.sandbox.boot_mode) == (box, "running", None, "rewind")
    assert done.undo is not None
    assert (done.undo.id, done.undo.sandbox_id) == (undo, box)
    assert (await host.get(box)).status == "running"
    assert await content(host, box, b"/tmp/f") == b"then"
    assert {found.id for found in await host.list_snapshots()} == {point.id, undo}
    assert (await host.rewind(HostRewind(sandbox=box, snapshot=undo))).undo is None
    assert await content(host, box, b"/tmp/f") == b"later"
    assert (await host.describe()).capacity.sandboxes == 1
    for found in await host.list_snapshots():
        await host.delete_snapshot(found.id)


async def test_children_of_a_point_are_what_their_parent_was(host: Host, box: SandboxId) -> None:
    await host.write_file(box, b"/tmp/f", pieces(b"then"))
    point = await host.snapshot(box, new_snapshot_id())
    await host.write_file(box, b"/tmp/f", pieces(b"later"))
    await host.hibernate(box, reason="request")
    wanted = [HostChild(id=new_sandbox_id(), hostname=f"child-{number}") for number in range(2)]
    made = await host.fork(HostFork(parent=box, children=wanted, snapshot=point.id))
    assert [(child.id, child.status) for child in made] == [(child.id, "running") for child in wanted]
    assert [await content(host, child.id, b"/tmp/f") for child in wanted] == [b"then"] * 2
    assert (await host.get(box)).status == "hibernated"
    await host.delete_snapshot(point.id)


async def test_an_offloaded_snapshot_takes_no_place_and_can_do_all_it_could(host: Host, box: SandboxId) -> None:
    await host.write_file(box, b"/tmp/f", pieces(b"then"))
    made = await host.snapshot(box, new_snapshot_id())
    assert (await host.snapshot_usage(made.id)).location == "local"
    gone = await host.offload_snapshot(made.id)
    again = await host.offload_snapshot(made.id)
    assert gone.id == again.id == made.id
    usage = await host.snapshot_usage(made.id)
    assert usage.location == "store"
    assert usage.own_bytes + usage.shared_bytes < made.size_bytes
    await host.verify_snapshot(made.id)
    other = (await host.create(wanted(snapshot=made.id))).id
    assert await content(host, other, b"/tmp/f") == b"then"
    await host.write_file(box, b"/tmp/f", pieces(b"later"))
    await host.rewind(HostRewind(sandbox=box, snapshot=made.id))
    assert await content(host, box, b"/tmp/f") == b"then"
    (child,) = await host.fork(HostFork(parent=box, children=[HostChild(id=new_sandbox_id(), hostname="c")], snapshot=made.id))
    assert await content(host, child.id, b"/tmp/f") == b"then"
    await host.delete_snapshot(made.id)
    with pytest.raises(SnapshotNotFound):
        await host.offload_snapshot(made.id)


async def test_only_its_own_point_will_do(host: Host, box: SandboxId) -> None:
    other = await host.create(wanted())
    foreign = await host.snapshot(other.id, new_snapshot_id())
    child = HostChild(id=new_sandbox_id(), hostname="child")
    with pytest.raises(Conflict):
        await host.rewind(HostRewind(sandbox=box, snapshot=foreign.id, undo=new_snapshot_id()))
    with pytest.raises(Conflict):
        await host.fork(HostFork(parent=box, children=[child], snapshot=foreign.id))
    with pytest.raises(SnapshotNotFound):
        await host.rewind(HostRewind(sandbox=box, snapshot=new_snapshot_id()))
    with pytest.raises(SandboxNotFound):
        await host.rewind(HostRewind(sandbox=new_sandbox_id(), snapshot=foreign.id))
    assert await host.list_snapshots() == [foreign]
    assert len(await host.list()) == 2
    await host.delete_snapshot(foreign.id)


class TestDifferences:
    async def test_of_a_snapshot_and_what_became_of_it(self, host: Host, box: SandboxId) -> None:
        await host.write_file(box, b"/w/kept", pieces(b"as it is\n"))
        await host.write_file(box, b"/w/text", pieces(b"one\n"))
        await host.write_file(box, b"/w/gone/file", pieces(b"x\n"))
        name = new_snapshot_id()
        await host.snapshot(box, name)
        await host.write_file(box, b"/w/text", pieces(b"two\n"))
        await host.write_file(box, b"/w/\xff", pieces(b"new\n"))
        await host.remove_file(box, b"/w/gone", recursive=True)
        await host.change_mode(box, b"/w/kept", ChangeMode(path="/w/kept", mode="0755"))
        await host.hibernate(box, reason="request")
        one, two = HostPoint(kind="snapshot", id=name), HostPoint(kind="sandbox", id=box)

        async with closing(host.diff(one, two, b"/w", patch=True)) as items:
            found = [item async for item in items]
        assert [(change.path, change.kind) for change, _ in found] == [
            ("/w/gone", "removed"), ("/w/gone/file", "removed"), ("/w/kept", "metadata"), ("/w/text", "modified"), ("/w/\ufffd", "added"),
        ]  # fmt: skip
        assert found[-1].change.path_b64
        assert b"diff --git a/text b/text\n" in found[3].patch
        assert b"-one\n+two\n" in found[3].patch
        assert (await host.get(box)).status == "hibernated"

        async with closing(host.diff(one, two, b"/w/text", patch=False)) as items:
            assert [(change.path, patch) async for change, patch in items] == [("/w/text", b"")]
        async with closing(host.diff(one, one, b"/", patch=False)) as items:
            assert [item async for item in items] == []
        with pytest.raises(FileNotFound):
            async with closing(host.diff(one, two, b"/nowhere", patch=False)) as items:
                await anext(items)
        with pytest.raises(SnapshotNotFound):
            async with closing(host.diff(one.model_copy(update={"id": new_snapshot_id()}), two, b"/", patch=False)) as items:
                await anext(items)
        await host.delete_snapshot(name)
