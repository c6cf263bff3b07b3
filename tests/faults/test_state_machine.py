"""Any order of verbs, restarts and kills: every sandbox remembers exactly what it was told, and what is deleted leaves nothing.

Hypothesis makes the orders up. The model is a list of texts for each sandbox and each snapshot.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from hosts import Life, World, settled, wanted
from pandastack.wire.host import HostChild, HostFork
from pandastack.wire.ids import ProcessId, SandboxId, SnapshotId, new_sandbox_id, new_snapshot_id
from pandastack.wire.processes import ProcessStart

MEMORY = ProcessId("memory")


class Memories(RuleBasedStateMachine):
    """`told` is what each sandbox must remember, `saved` what each snapshot must."""

    boxes = Bundle("boxes")
    snapshots = Bundle("snapshots")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.world = World(self.folder)
        self.life = Life(self.world)
        self.told: dict[SandboxId, bytes] = {}
        self.saved: dict[SnapshotId, bytes] = {}
        self.count = 0

    def do(self, work: Any) -> Any:
        return self.life.run(work)

    @initialize(target=boxes)
    def first(self) -> SandboxId:
        return self.create()

    @rule(target=boxes)
    def create(self) -> SandboxId:
        request = wanted()
        self.do(self.life.host.create(request))
        self.do(self.life.host.start_process(request.id, ProcessStart(id=MEMORY, cmd="echo begun; cat", stdin=True)))
        self.told[request.id] = b"begun\n"
        return request.id

    @rule(box=boxes)
    def tell(self, box: SandboxId) -> None:
        self.count += 1
        text = b"%d\n" % self.count

        async def data() -> AsyncIterator[bytes]:
            yield text

        self.do(self.life.host.write_stdin(box, MEMORY, data(), close=False))
        self.told[box] += text

    @rule(box=boxes, verb=st.sampled_from(["pause", "resume", "wake"]))
    def change(self, box: SandboxId, verb: str) -> None:
        before = self.do(self.life.host.get(box)).status
        after = self.do(getattr(self.life.host, verb)(box)).status
        assert after == ("running" if verb != "pause" else "hibernated" if before == "hibernated" else "paused")

    @rule(box=boxes)
    def hibernate(self, box: SandboxId) -> None:
        assert self.do(self.life.host.hibernate(box, reason="request")).status == "hibernated"

    @rule(target=boxes, box=boxes)
    def fork(self, box: SandboxId) -> SandboxId:
        child, status = new_sandbox_id(), self.do(self.life.host.get(box)).status
        self.do(self.life.host.fork(HostFork(parent=box, children=[HostChild(id=child, hostname="child")])))
        assert self.do(self.life.host.get(box)).status == status
        self.told[child] = self.told[box]
        return child

    @rule(target=snapshots, box=boxes)
    def snapshot(self, box: SandboxId) -> SnapshotId:
        made = self.do(self.life.host.snapshot(box, new_snapshot_id()))
        self.saved[made.id] = self.told[box]
        return SnapshotId(made.id)

    @rule(target=boxes, snapshot=snapshots)
    def create_from(self, snapshot: SnapshotId) -> SandboxId:
        request = wanted(snapshot=snapshot)
        self.do(self.life.host.create(request))
        self.told[request.id] = self.saved[snapshot]
        return request.id

    @rule(snapshot=consumes(snapshots))
    def delete_snapshot(self, snapshot: SnapshotId) -> None:
        self.do(self.life.host.delete_snapshot(snapshot))
        del self.saved[snapshot]

    @rule(box=consumes(boxes))
    def delete(self, box: SandboxId) -> None:
        self.do(self.life.host.delete(box))
        del self.told[box]

    @rule()
    def restart(self) -> None:
        self.life.close()
        self.life = Life(self.world)

    @rule()
    def kill(self) -> None:
        self.life.kill()
        self.life = Life(self.world)

    @invariant()
    def the_host_knows_what_the_model_knows(self) -> None:
        assert {one.id for one in self.do(self.life.host.list())} == set(self.told)
        assert {one.id for one in self.do(self.life.host.list_snapshots())} == set(self.saved)
        self.do(settled(self.life.host))
        awake = [one for one in self.do(self.life.host.list()) if one.status != "hibernated"]
        assert len(self.world.runtime.machines) == len(awake)
        assert self.do(self.life.host.describe()).capacity.sandboxes == len(awake)

    async def _remembered(self, box: SandboxId) -> bytes:
        async with asyncio.timeout(10):
            while True:
                piece = await self.life.host.read_output(box, MEMORY, "stdout", offset=0, limit=1 << 20)
                if len(piece.data) >= len(self.told[box]):
                    return piece.data
                await asyncio.sleep(0.002)

    def teardown(self) -> None:
        try:
            for snapshot in list(self.saved):
                self.do(self.life.host.verify_snapshot(snapshot))
            for box in list(self.told):
                assert self.do(self._remembered(box)) == self.told[box]
                self.do(self.life.host.delete(box))
            for snapshot in list(self.saved):
                self.do(self.life.host.delete_snapshot(snapshot))
            assert self.world.left() == {}
            assert [path.name for path in (self.folder / "snapshots").iterdir()] == [".new"]
        finally:
            self.life.close()
            self.world.clear()
            shutil.rmtree(self.folder)


@pytest.mark.usefixtures("no_leaks")
class TestMemories(Memories.TestCase):  # type: ignore[misc,name-defined]
    settings = settings(max_examples=25, stateful_step_count=25, suppress_health_check=list(HealthCheck))
