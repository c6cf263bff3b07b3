"""The pool: what is ready, for whom, and that nothing of it is ever lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from hosts import until
from pandastack.errors import RuntimeFailed
from pandastack.host import slots as slots_module
from pandastack.host.slots import Refills, Slots

pytestmark = pytest.mark.anyio


class Maker:
    """Makes slots named after their key and remembers which exist."""

    def __init__(self) -> None:
        self.alive: set[str] = set()
        self.made = 0
        self.failures = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def prepare(self, key: str) -> str:
        await self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise RuntimeFailed("no luck")
        self.made += 1
        slot = f"{key}{self.made}"
        self.alive.add(slot)
        return slot

    async def discard(self, slot: str) -> None:
        await asyncio.sleep(0)
        self.alive.remove(slot)


@asynccontextmanager
async def running(maker: Maker, *, size: int = 2, keys: int = 2, refills: Refills | None = None) -> AsyncIterator[Slots[str, str]]:
    slots: Slots[str, str] = Slots(maker.prepare, maker.discard, refills or Refills(), size=size, keys=keys)
    task = asyncio.create_task(slots.run())
    try:
        yield slots
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert maker.alive == set(), "every slot is given back at the end"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "_REST_S", 0.01)
    monkeypatch.setattr(slots_module, "_RETRY_FIRST_S", 0.01)


def full(slots: Slots[str, str]) -> Callable[[], bool]:
    return lambda: slots.ready == slots.wanted


async def test_the_first_take_finds_nothing_and_the_next_a_slot() -> None:
    maker = Maker()
    async with running(maker) as slots:
        assert slots.take("a") is None
        await until(full(slots))
        slot = slots.take("a")
        assert slot in maker.alive
        await until(full(slots))
        assert slots.ready == 2
        await maker.discard(slot)


async def test_a_slot_is_given_out_once() -> None:
    maker = Maker()
    async with running(maker, size=4) as slots:
        slots.want("a")
        await until(lambda: slots.ready == 4)
        taken = [slots.take("a") for _ in range(6)]
        assert len({slot for slot in taken if slot}) == 4
        assert taken.count(None) == 2
        for slot in filter(None, taken):
            await maker.discard(slot)


async def test_keys_unused_for_longest_lose_their_slots() -> None:
    maker = Maker()
    async with running(maker, size=1, keys=2) as slots:
        for key in "abc":
            slots.want(key)
            await until(full(slots))
        await until(lambda: {slot[0] for slot in maker.alive} == {"b", "c"})
        slots.want("b")
        slots.want("d")
        await until(lambda: {slot[0] for slot in maker.alive} == {"b", "d"})


async def test_a_slot_for_a_key_no_longer_wanted_is_given_back() -> None:
    maker = Maker()
    maker.gate.clear()
    async with running(maker, size=1, keys=1) as slots:
        slots.want("a")
        await asyncio.sleep(0.01)
        slots.want("b")
        maker.gate.set()
        await until(lambda: {slot[0] for slot in maker.alive} == {"b"})


async def test_a_failure_is_tried_again() -> None:
    maker = Maker()
    maker.failures = 3
    async with running(maker, size=1) as slots:
        slots.want("a")
        await until(lambda: slots.ready == 1)


async def test_no_refill_begins_while_something_is_made_for_somebody() -> None:
    maker, refills = Maker(), Refills()
    async with running(maker, size=1, refills=refills) as slots:
        with refills.paused():
            with refills.paused():
                slots.want("a")
            await asyncio.sleep(0.05)
            assert maker.made == 0
        await until(lambda: slots.ready == 1)


async def test_pools_refill_one_at_a_time() -> None:
    first, second, refills = Maker(), Maker(), Refills()
    first.gate.clear()
    async with running(first, size=1, refills=refills) as slots, running(second, size=1, refills=refills) as others:
        slots.want("a")
        await asyncio.sleep(0.01)
        others.want("b")
        await asyncio.sleep(0.05)
        assert (first.made, second.made) == (0, 0)
        first.gate.set()
        await until(lambda: slots.ready == others.ready == 1)


async def test_a_pool_of_size_nothing_is_off() -> None:
    maker = Maker()
    async with running(maker, size=0) as slots:
        assert slots.take("a") is None
        await asyncio.sleep(0.02)
        assert (maker.made, slots.wanted) == (0, 0)


async def test_an_end_in_the_middle_of_a_refill_loses_nothing() -> None:
    maker = Maker()
    maker.gate.clear()
    async with running(maker, size=1) as slots:
        slots.want("a")
        await asyncio.sleep(0.01)
