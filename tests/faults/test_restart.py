"""A host is killed in each step of its work, and a new one starts on the same folders and machines.

Killed means that nothing of it runs any further: no undo, no `finally`. `Life` gives each host an event loop of its own
and then stops it for good, while the guests, which live in another thread, go on.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hosts import Life, World, run, slots, until, wanted
from pandastack.control.hosts import closing
from pandastack.errors import GuestProtocolError, GuestTimeout, RuntimeFailed, SandboxNotRunning
from pandastack.host import registry, sandboxes
from pandastack.host.keeper import Keeper
from pandastack.wire.host import Output
from pandastack.wire.ids import ProcessId
from pandastack.wire.processes import ProcessStart

from .test_create import FAILURES

SLOW = [step for step in FAILURES if not step.startswith(("ledger", "hello", "machine."))]


@pytest.fixture
def born(world: World) -> Iterator[list[Life]]:
    """Lives to be closed; the last one is closed after the test."""
    lives: list[Life] = []
    yield lives
    for life in lives[-1:]:
        life.close()


def begin(world: World, born: list[Life]) -> Life:
    born.append(Life(world))
    return born[-1]


@pytest.mark.parametrize("step", SLOW)
def test_a_create_cut_off_in_any_step_is_cleared(world: World, born: list[Life], step: str) -> None:
    first = begin(world, born)
    kept, lost = wanted(), wanted()
    first.run(first.host.create(kept))
    hang = world.runtime.hang(step)
    first.begin(first.host.create(lost))
    first.until(hang)
    first.kill()
    second = begin(world, born)
    assert [(one.id, one.status) for one in second.run(second.host.list())] == [(kept.id, "running")]
    assert {len(names) for names in world.left().values()} == {1}
    assert second.run(run(second.host, kept.id, "echo hi")) == (b"hi\n", 0)
    events = second.run(second.host.events(0, timeout_s=0))
    assert sorted((event.kind, event.sandbox_id) for event in events) == sorted([("adopted", kept.id), ("gone", lost.id)])
    assert second.host._registry.admission.capacity().sandboxes == 1
    # The same id can be made again.
    assert second.run(second.host.create(lost)).status == "running"


def test_a_running_sandbox_keeps_files_processes_and_output(world: World, born: list[Life]) -> None:
    first = begin(world, born)
    request = wanted()
    first.run(first.host.create(request))
    first.run(run(first.host, request.id, "echo kept > /root/file"))
    first.run(first.host.start_process(request.id, ProcessStart(cmd="echo one; sleep 0.2; echo two; cat", stdin=True, id="p")))
    reading = first.begin(run(first.host, request.id, "echo begun; sleep 100"))
    first.run(until(lambda: world.runtime.steps.count("process.run") == 2))
    assert not reading.done()
    first.kill()
    second = begin(world, born)
    assert second.run(run(second.host, request.id, "cat /root/file; hostname; echo $FROM_TEMPLATE")) == (b"kept\nsandbox\nyes\n", 0)

    async def more(data: bytes) -> bytes:
        async def pieces() -> object:
            yield data

        await second.host.write_stdin(request.id, ProcessId("p"), pieces(), close=True)  # type: ignore[arg-type]
        out = b""
        async with closing(second.host.attach(request.id, ProcessId("p"))) as items:
            async for item in items:
                if isinstance(item, Output):
                    out += item.data
        return out

    assert second.run(more(b"three\n")) == b"one\ntwo\nthree\n"
    assert second.run(second.host.get(request.id)).busy, "the command whose reader died goes on"


def test_a_sandbox_survives_ten_restarts(world: World, born: list[Life]) -> None:
    life = begin(world, born)
    request = wanted()
    made = life.run(life.host.create(request))
    for number in range(10):
        life.run(run(life.host, request.id, f"echo {number} >> /root/count"))
        life.kill()
        life = begin(world, born)
    out, _ = life.run(run(life.host, request.id, "cat /root/count"))
    assert out == b"".join(b"%d\n" % number for number in range(10))
    again = life.run(life.host.get(request.id))
    assert (again.boot_mode, again.boot_ms, again.template_actual) == (made.boot_mode, made.boot_ms, "base")


def test_an_orderly_end_keeps_sandboxes_and_gives_back_the_pool(world: World, born: list[Life]) -> None:
    world.slots = 1
    life = begin(world, born)
    request = wanted()
    life.run(life.host.create(request))
    life.run(until(lambda: slots(life.host).ready == 1))
    life.close()
    assert len(world.runtime.machines) == 1
    world.slots = 0
    again = begin(world, born)
    assert again.run(run(again.host, request.id, "echo hi")) == (b"hi\n", 0)


def test_a_pool_is_cleared_not_adopted(world: World, born: list[Life]) -> None:
    world.slots = 1
    life = begin(world, born)
    request = wanted()
    life.run(life.host.create(request))
    life.run(until(lambda: slots(life.host).ready == 1))
    life.kill()
    world.slots = 0
    begin(world, born)
    assert {kind: len(names) for kind, names in world.left().items()} == {"runtime": 1, "disks": 1, "machines": 1, "ledger": 1}


def test_a_create_from_the_pool_cut_off_is_cleared(world: World, born: list[Life]) -> None:
    world.slots = 1
    life = begin(world, born)
    first = wanted()
    life.run(life.host.create(first))
    life.run(until(lambda: slots(life.host).ready == 1))
    life.run(life.host.delete(first.id))
    hang = world.runtime.hang("thaw")
    life.begin(life.host.create(wanted()))
    life.until(hang)
    life.kill()
    world.slots = 0
    begin(world, born)
    assert world.left() == {}


@pytest.mark.parametrize("step", ["stop", "disk.delete"])
def test_a_delete_cut_off_can_be_repeated(world: World, born: list[Life], step: str) -> None:
    life = begin(world, born)
    request = wanted()
    life.run(life.host.create(request))
    hang = world.runtime.hang(step)
    life.begin(life.host.delete(request.id))
    life.until(hang)
    life.kill()
    again = begin(world, born)
    again.run(again.host.delete(request.id))
    assert world.left() == {}


def test_a_frozen_sandbox_is_found_and_answers(world: World, born: list[Life], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandboxes, "FREEZE_AFTER_S", 0.05)
    life = begin(world, born)
    request = wanted()
    life.run(life.host.create(request))
    (machine,) = world.runtime.machines.values()
    life.run(until(lambda: machine.frozen))
    life.kill()
    again = begin(world, born)
    assert again.run(run(again.host, request.id, "echo hi")) == (b"hi\n", 0)


def test_a_sandbox_whose_machine_ended_meanwhile_has_failed(world: World, born: list[Life]) -> None:
    life = begin(world, born)
    request = wanted()
    life.run(life.host.create(request))
    life.kill()
    (machine,) = world.runtime.machines.values()
    machine.end("oom")
    again = begin(world, born)
    state = again.run(again.host.get(request.id))
    assert (state.status, state.status_reason) == ("failed", "host_restarted")
    assert list(world.left()) == ["ledger"]
    with pytest.raises(SandboxNotRunning):
        again.run(run(again.host, request.id, "true"))
    again.run(again.host.delete(request.id))
    assert world.left() == {}


def test_a_failed_sandbox_keeps_its_reason(world: World, born: list[Life]) -> None:
    life = begin(world, born)
    request = wanted()
    life.run(life.host.create(request))
    (machine,) = world.runtime.machines.values()
    machine.end("oom")
    life.run(until(lambda: life.host.sandboxes.registry.get(request.id).status == "failed"))
    life.kill()
    again = begin(world, born)
    state = again.run(again.host.get(request.id))
    assert (state.status, state.status_reason) == ("failed", "oom")
    assert again.host._registry.admission.capacity().sandboxes == 0


@pytest.mark.parametrize("step", ["adopt", "connect", "hello", "machine.health"])
def test_one_that_cannot_be_taken_over_costs_no_other(world: World, born: list[Life], step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "CONNECT_TIMEOUT_S", 0.3)
    life = begin(world, born)
    one, other = wanted(), wanted()
    life.run(life.host.create(one))
    life.run(life.host.create(other))
    life.kill()
    error = {"hello": GuestTimeout(), "machine.health": GuestProtocolError()}.get(step, RuntimeFailed("made to fail"))
    world.runtime.fail(step, error)
    world.runtime.fail("stop")
    again = begin(world, born)
    states = sorted(state.status for state in again.run(again.host.list()))
    assert states == ["failed", "running"]
    assert len(world.runtime.machines) == 1


def test_an_entry_that_cannot_be_read_is_set_aside(world: World, born: list[Life]) -> None:
    life = begin(world, born)
    one, other = wanted(), wanted()
    life.run(life.host.create(one))
    life.run(life.host.create(other))
    life.kill()
    file = world.root / "ledger" / f"{one.id}.json"
    file.write_text(file.read_text()[:50])
    again = begin(world, born)
    assert [(state.id, state.status) for state in again.run(again.host.list())] == [(other.id, "running")]
    assert len(world.runtime.machines) == 1, "what no entry vouches for is cleared"
    assert sorted(world.left()["ledger"]) == sorted([f"{one.id}.unreadable", f"{other.id}.json"])


def test_a_host_killed_while_it_recovers_is_followed_by_one_that_does(world: World, born: list[Life]) -> None:
    life = begin(world, born)
    request = wanted()
    life.run(life.host.create(request))
    life.kill()
    for step in ("adopt", "connect", "sweep"):
        hang = world.runtime.hang(step)
        half = Life.__new__(Life)
        half._world = world
        half.loop = asyncio.new_event_loop()
        half.begin(world.start())
        half.until(hang)
        half.kill()
    again = begin(world, born)
    assert again.run(run(again.host, request.id, "echo hi")) == (b"hi\n", 0)


class TestKeeper:
    """The keeper's process, with daemons that come and go."""

    def test_what_is_kept_survives_the_daemon(self, tmp_path: Path) -> None:
        address = tmp_path / "k" / "keeper.sock"
        read, write = os.pipe()
        program = (
            "import sys, time; from pathlib import Path; from pandastack.host.keeper import Keeper;"
            f"Keeper(Path({str(address)!r})).put('one', [{write}]); print('put', flush=True); time.sleep(60)"
        )
        with subprocess.Popen([sys.executable, "-c", program], pass_fds=[write], stdout=subprocess.PIPE) as daemon:
            assert daemon.stdout is not None
            assert daemon.stdout.readline() == b"put\n"
            os.close(write)
            daemon.send_signal(signal.SIGKILL)
        keeper = Keeper(address)
        (kept,) = keeper.get("one")
        os.write(kept, b"still open")
        os.close(kept)
        assert os.read(read, 100) == b"still open"
        keeper.drop("one")
        assert os.read(read, 100) == b"", "nobody else holds it"
        os.close(read)
        keeper.close()
        ends = time.monotonic() + 10
        while address.parent.exists():
            assert time.monotonic() < ends
            time.sleep(0.01)
