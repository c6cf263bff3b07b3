"""Baking: one bake per template, proved before it is published, published whole, and damaged ones made again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from hosts import OneImage, World
from pandastack.control.hosts import closing
from pandastack.errors import GuestError, PandastackError, RuntimeFailed, TemplateBuildError, TemplateNotFound, TemplateNotReady
from pandastack.host.bakery import Bakery

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


class Kitchen:
    """A bakery and what it works with."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.bakery = self.again()

    def again(self, **key: str) -> Bakery:
        """A bakery as after a restart, perhaps with another runtime or guest."""
        host = self.world.build()
        self.images: OneImage = self.world.images
        backend = self.world.joined(host)
        self.bakery = self.world.bakery(backend.machines, None, **{"runtime_key": "r", "guest_digest": "g"} | key)
        return self.bakery

    def states(self) -> list[str]:
        root = self.world.root / "states"
        return sorted(path.name for path in root.iterdir()) if root.exists() else []


@pytest.fixture
async def kitchen(world: World) -> AsyncIterator[Kitchen]:
    made = Kitchen(world)
    yield made
    await made.bakery.close()
    assert world.left() == {}
    assert [name for name in made.states() if name.startswith(".")] == []


async def said(bakery: Bakery) -> list[str]:
    async with closing(bakery.follow("base")) as items:
        return [item.step async for item in items]


async def test_a_bake_boots_saves_proves_and_says_so(kitchen: Kitchen) -> None:
    assert kitchen.bakery.ready("base") is None
    assert kitchen.bakery.view("base").state == "built"
    assert await said(kitchen.bakery) == ["build", "boot", "save", "verify", "ready"]
    baked = kitchen.bakery.ready("base")
    assert baked is not None
    assert kitchen.bakery.view("base").state == "ready"
    steps = kitchen.world.runtime.steps
    assert steps.index("machine.seal") < steps.index("snapshot") < steps.index("restore") < steps.index("machine.identity")
    assert await said(kitchen.bakery) == ["ready"]


async def test_a_state_is_found_again_and_not_made_twice(kitchen: Kitchen) -> None:
    await kitchen.bakery.wait("base", patience_s=20)
    kitchen.world.runtime.steps.clear()
    again = kitchen.again()
    assert again.ready("base") is not None
    assert kitchen.world.runtime.steps == []


@pytest.mark.parametrize("changed", [{"runtime_key": "other"}, {"guest_digest": "other"}], ids=["runtime", "guest"])
async def test_another_runtime_or_guest_bakes_anew(kitchen: Kitchen, changed: dict[str, str]) -> None:
    await kitchen.bakery.wait("base", patience_s=20)
    assert kitchen.again(**changed).ready("base") is None
    await kitchen.bakery.wait("base", patience_s=20)
    assert len(kitchen.states()) == 2


async def test_many_at_once_share_one_bake(kitchen: Kitchen) -> None:
    await asyncio.gather(*(kitchen.bakery.wait("base", patience_s=20) for _ in range(10)), said(kitchen.bakery))
    assert kitchen.world.runtime.steps.count("snapshot") == 1


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("disk.create", RuntimeFailed),
        ("prepare", RuntimeFailed),
        ("start", RuntimeFailed),
        ("connect", RuntimeFailed),
        ("machine.seal", GuestError),
        ("snapshot", RuntimeFailed),
        ("restore", RuntimeFailed),
        ("identity", GuestError),
        ("stop", RuntimeFailed),
    ],
)
async def test_a_step_that_fails_publishes_nothing_and_can_be_tried_again(
    kitchen: Kitchen, step: str, expected: type[PandastackError]
) -> None:
    kitchen.world.runtime.fail(step)
    with pytest.raises(expected):
        await kitchen.bakery.wait("base", patience_s=20)
    assert kitchen.states() == []
    assert kitchen.bakery.ready("base") is None
    view = kitchen.bakery.view("base")
    assert (view.state, bool(view.error)) == ("failed", True)
    await kitchen.bakery.wait("base", patience_s=20)
    assert kitchen.bakery.view("base").state == "ready"
    kitchen.world.clear()  # What a failed stop left would be swept at the next start.


async def test_a_build_that_fails_is_told_to_every_follower(kitchen: Kitchen) -> None:
    kitchen.images.error = TemplateBuildError("apt failed")
    results = await asyncio.gather(said(kitchen.bakery), kitchen.bakery.wait("base", patience_s=20), return_exceptions=True)
    assert [type(one) for one in results] == [TemplateBuildError] * 2


async def test_a_bake_that_takes_long_goes_on_behind_a_clear_answer(kitchen: Kitchen) -> None:
    kitchen.images.building.clear()
    with pytest.raises(TemplateNotReady) as later:
        await kitchen.bakery.wait("base", patience_s=0.05)
    assert later.value.retry_after_s
    assert kitchen.bakery.view("base").state == "baking"
    kitchen.images.building.set()
    await kitchen.bakery.wait("base", patience_s=20)


async def test_a_follower_that_leaves_does_not_end_the_bake(kitchen: Kitchen) -> None:
    kitchen.images.building.clear()
    async with closing(kitchen.bakery.follow("base")) as items:
        assert (await anext(items)).step == "build"
    kitchen.images.building.set()
    await kitchen.bakery.wait("base", patience_s=20)


@pytest.mark.parametrize("damage", ["cut", "gone", "manifest", "empty manifest"])
async def test_a_damaged_state_is_made_again(kitchen: Kitchen, damage: str) -> None:
    baked = await kitchen.bakery.wait("base", patience_s=20)
    file = baked.snapshot / ("state" if damage in ("cut", "gone") else "manifest.json")
    if damage == "gone":
        file.unlink()
    else:
        file.write_text({"cut": "x", "manifest": "{", "empty manifest": "{}"}[damage])
    assert kitchen.again().ready("base") is None
    assert (await kitchen.bakery.wait("base", patience_s=20)).snapshot == baked.snapshot


async def test_a_bake_cut_off_by_the_end_of_the_host_is_undone(kitchen: Kitchen) -> None:
    for step in ("disk.create", "prepare", "start", "snapshot", "restore"):
        hang = kitchen.world.runtime.hang(step)
        waiting = asyncio.create_task(kitchen.bakery.wait("base", patience_s=20))
        while not hang.reached.is_set():  # noqa: ASYNC110 - it is set by another thread
            await asyncio.sleep(0.001)
        await kitchen.bakery.close()
        await asyncio.gather(waiting, return_exceptions=True)
        assert (kitchen.states(), kitchen.world.left()) == ([], {}), step


async def test_an_unknown_template_is_not_found_anywhere(kitchen: Kitchen) -> None:
    bakery: Any = kitchen.bakery
    for call in (bakery.ready, bakery.view):
        with pytest.raises(TemplateNotFound):
            call("nothing")
    with pytest.raises(TemplateNotFound):
        await bakery.wait("nothing", patience_s=1)
    with pytest.raises(TemplateNotFound):
        await anext(bakery.follow("nothing"))
