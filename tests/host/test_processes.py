"""Commands: the public shapes become guest calls, and the guest's answers public shapes again."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator

import pytest

from hosts import run, until, wanted
from pandastack.control.hosts import closing
from pandastack.errors import Conflict, InvalidRequest, ProcessNotFound
from pandastack.host import processes
from pandastack.host.app import HostService
from pandastack.wire.guest import Exit
from pandastack.wire.host import Output, ProcessExit
from pandastack.wire.ids import ProcessId, SandboxId, new_process_id
from pandastack.wire.processes import ExecRequest, ProcessStart, ProcessView, PtySize, SignalRequest

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


@pytest.fixture
async def box(host: HostService) -> SandboxId:
    return (await host.create(wanted())).id


async def test_code_goes_to_the_warm_interpreter(host: HostService, box: SandboxId) -> None:
    items = [item async for item in host.run(box, ExecRequest(code="import math\nprint('hi', 6 * 7)"), new_process_id())]
    assert isinstance(items[0], ProcessView)
    assert isinstance(items[1], Output)
    assert items[1].data == b"hi 42\n"
    bash = ExecRequest(code="echo hi; exit 7", language="bash")
    assert [item.exit_code async for item in host.run(box, bash, new_process_id()) if isinstance(item, ProcessExit)] == [7]


async def test_what_is_given_reaches_the_command(host: HostService, box: SandboxId) -> None:
    assert await run(host, box, "pwd; echo $A", cwd="/tmp", env={"A": "b c"}) == (b"/tmp\nb c\n", 0)
    assert (await run(host, box, "cat", stdin="text \u20ac"))[0].decode() == "text \u20ac"


@pytest.mark.parametrize("size", [0, 1, 64 << 10, (64 << 10) + 1, 900_000])
async def test_stdin_of_any_size_arrives_whole(host: HostService, box: SandboxId, size: int) -> None:
    data = bytes(index % 251 for index in range(size))
    out, code = await run(host, box, "cat", stdin_b64=base64.b64encode(data).decode())
    assert (len(out), out == data, code) == (size, True, 0)


async def test_a_command_that_reads_nothing_of_a_large_stdin_ends(host: HostService, box: SandboxId) -> None:
    assert await run(host, box, "echo done", stdin="x" * 900_000) == (b"done\n", 0)


@pytest.mark.parametrize(("argv", "error"), [(["/no/such/program"], InvalidRequest), (["echo"], None)], ids=["missing", "there"])
async def test_a_program_that_is_not_there_is_a_wrong_request(
    host: HostService, box: SandboxId, argv: list[str], error: type[Exception] | None
) -> None:
    start = host.start_process(box, ProcessStart(argv=argv))
    if error is None:
        assert (await start).running
        return
    with pytest.raises(error) as refused:
        await start
    assert refused.value.fields["guest_errno"] == 2


async def test_a_view_follows_a_process_from_start_to_end(host: HostService, box: SandboxId) -> None:
    view = await host.start_process(box, ProcessStart(cmd="echo abc; sleep 100", id="p", user="root"))
    assert (view.id, view.running, view.command, view.exit_code) == ("p", True, "echo abc; sleep 100", None)
    await host.signal_process(box, ProcessId("p"), SignalRequest(signal="INT"))
    view = await host.get_process(box, ProcessId("p"))
    assert (view.running, view.exit_code, view.signal, view.reason, view.stdout_bytes) == (False, 130, "INT", "signaled", 4)
    assert view.ended_at is not None
    assert view.started_at <= view.ended_at


async def test_a_slice_is_gathered_from_many_answers(host: HostService, box: SandboxId) -> None:
    await host.start_process(box, ProcessStart(cmd="yes | head -c 500000", id="p"))
    async with closing(host.attach(box, ProcessId("p"))) as items:
        async for _ in items:
            pass
    piece = await host.read_output(box, ProcessId("p"), "stdout", offset=1, limit=400_000)
    assert (piece.offset, len(piece.data), piece.end, piece.running) == (1, 400_000, 500_000, False)
    assert piece.data[:4] == b"\ny\ny"
    beyond = await host.read_output(box, ProcessId("p"), "stdout", offset=900_000, limit=10)
    assert (beyond.offset, beyond.data) == (500_000, b"")


async def test_output_older_than_the_ring_is_gone_and_said_so(host: HostService, box: SandboxId) -> None:
    await host.start_process(box, ProcessStart(cmd="yes | head -c 3000000", id="p"))
    await until_ended(host, box, "p")
    piece = await host.read_output(box, ProcessId("p"), "stdout", offset=0, limit=10)
    assert piece.offset > 0
    async with closing(host.attach(box, ProcessId("p"))) as items:
        offsets = [item.offset async for item in items if isinstance(item, Output)]
    assert offsets[0] == piece.offset


async def until_ended(host: HostService, box: SandboxId, name: str) -> None:
    async with asyncio.timeout(20):
        running = True
        while running:
            await asyncio.sleep(0.005)
            running = (await host.get_process(box, ProcessId(name))).running


async def test_a_terminal_can_be_resized_and_a_pipe_cannot(host: HostService, box: SandboxId) -> None:
    await host.start_process(box, ProcessStart(cmd="cat", id="pty", pty=PtySize()))
    await host.resize_process(box, ProcessId("pty"), PtySize(rows=50, cols=100))
    await host.start_process(box, ProcessStart(cmd="sleep 100", id="pipe"))
    with pytest.raises(Conflict):
        await host.resize_process(box, ProcessId("pipe"), PtySize())


async def test_stdin_of_a_process_without_one_is_a_conflict(host: HostService, box: SandboxId) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"x"

    await host.start_process(box, ProcessStart(cmd="sleep 100", id="p"))
    with pytest.raises(Conflict):
        await host.write_stdin(box, ProcessId("p"), pieces(), close=True)


async def test_a_process_of_the_template_is_not_shown(host: HostService, box: SandboxId) -> None:
    async with host.sandboxes.use(box) as guest:
        await guest.warm(["pandastack:python", "json"])
    assert await host.list_processes(box) == []
    with pytest.raises(ProcessNotFound):
        await host.get_process(box, ProcessId("warm"))


async def test_what_a_background_job_writes_later_is_kept(host: HostService, box: SandboxId) -> None:
    process_id = new_process_id()
    items = [item async for item in host.run(box, ExecRequest(cmd="(sleep 0; true); sleep 0.1 && echo late &"), process_id)]
    assert isinstance(items[-1], ProcessExit)


async def test_a_follower_that_leaves_early_frees_its_stream(host: HostService, box: SandboxId) -> None:
    guest = host.sandboxes.registry.get(box).guest
    assert guest is not None
    for _ in range(20):
        async with closing(host.run(box, ExecRequest(cmd="yes | head -c 9000000"), new_process_id())) as items:
            await anext(items)
            await anext(items)
    await until(lambda: not guest.connection._streams)
    assert await run(host, box, "echo on") == (b"on\n", 0)


@pytest.mark.parametrize(
    ("code", "signal", "shown"), [(0, None, (0, None)), (255, None, (255, None)), (None, 9, (137, "KILL")), (None, 64, (192, "RTMAX"))]
)
def test_an_exit_is_shown_as_shells_do(code: int | None, signal: int | None, shown: tuple[int, str | None]) -> None:
    ended = Exit(id="p", exit_code=code, signal=signal, reason="exited", stdout_bytes=0, stderr_bytes=0, duration_ms=1)
    view = processes.exit_view(ended)
    assert (view.exit_code, view.signal) == shown


@pytest.mark.parametrize("ns", [-(2**63), 2**63 - 1, 0])
def test_a_time_beyond_the_calendar_is_no_error_of_ours(ns: int) -> None:
    assert processes._time(ns).endswith("Z")
