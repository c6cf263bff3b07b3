"""A host in each place, a sandbox in it, and a process in that which lives on what is in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hosts import until
from pandastack.host.app import HostService
from pandastack.wire.ids import SandboxId

from .places import FAKES, Memory, Place, fake_place, firecracker_place, gvisor_place, qemu_place, wanted


@pytest.fixture(params=["fake", "fakevm", "gvisor", "gvisor-new", "qemu", "firecracker-kvm"])
async def place(request: pytest.FixtureRequest, tmp_path: Path, no_leaks: None, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    name, get = request.param, request.getfixturevalue
    if name in FAKES:
        made = fake_place(tmp_path, FAKES[name]())
    elif name == "qemu":
        made = qemu_place(get("xfs"), get("microvms"), monkeypatch)
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


@pytest.fixture
async def box(host: HostService) -> SandboxId:
    return (await host.create(wanted(env={"OWN": "value"}))).id


@pytest.fixture
async def memory(host: HostService, box: SandboxId) -> Memory:
    made = Memory(host)
    await made.begin(box)
    await made.say(box, b"before\n")
    await made.heard(box, b"begun\nbefore\n")
    return made
