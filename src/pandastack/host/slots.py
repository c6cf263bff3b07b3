"""Small pools of machines made ahead of time, so that who wants one only has to finish it.

A slot is a machine that exists but does not run: it costs some memory and no CPU. Slots are kept per key (what must be equal
for two of them to be interchangeable), for the few keys used last; all pools together refill one at a time, in the background,
and nothing of them is adopted after a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator
from typing import Generic, TypeVar

import structlog

from pandastack.errors import PandastackError

log = structlog.get_logger(__name__)

Key = TypeVar("Key", bound=Hashable)
Slot = TypeVar("Slot")

_RETRY_FIRST_S, _RETRY_MAX_S = 1.0, 60.0
# A create is nearly always followed by a command; on a small machine a refill in that moment would double its time.
_REST_S = 0.3


class Refills:
    """When the pools of a host may refill: one slot at a time, and not while something is made for somebody who waits."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._waited_for = 0
        self._calm = asyncio.Event()
        self._rest_until = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While the block runs, and a moment longer, no refill begins: on a small machine it would only take its CPU."""
        self._waited_for += 1
        self._calm.clear()
        try:
            yield
        finally:
            self._waited_for -= 1
            self._rest_until = time.monotonic() + _REST_S
            if not self._waited_for:
                self._calm.set()

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """The block may refill. It waits for as long as it takes, and can be cancelled freely."""
        async with self._turn:
            await self.calm()
            yield

    async def calm(self) -> None:
        """Wait until nothing was made for anybody for a moment, however long that takes. Cancel it freely."""
        while True:
            if self._waited_for:
                await self._calm.wait()
            elif (rest_s := self._rest_until - time.monotonic()) > 0:
                await asyncio.sleep(rest_s)
            else:
                return


class Slots(Generic[Key, Slot]):
    """`size` slots for each of the `keys` keys used last; 0 switches the pool off.

    `run` is the owner's task: it fills, and at its end gives every slot back.
    """

    def __init__(
        self,
        prepare: Callable[[Key], Awaitable[Slot]],
        discard: Callable[[Slot], Awaitable[None]],
        refills: Refills,
        *,
        size: int,
        keys: int = 2,
    ) -> None:
        self._prepare = prepare
        self._discard = discard
        self._refills = refills
        self._size = size
        self._keys = keys
        self._ready: OrderedDict[Key, list[Slot]] = OrderedDict()
        self._changed = asyncio.Event()

    @property
    def ready(self) -> int:
        return sum(len(slots) for slots in self._ready.values())

    @property
    def wanted(self) -> int:
        return self._size * len(self._ready)

    def want(self, key: Key) -> None:
        """Keep slots for this key from now on; the key unused for longest loses its own."""
        if self._size == 0:
            return
        self._ready.setdefault(key, [])
        self._ready.move_to_end(key)
        self._changed.set()

    def take(self, key: Key) -> Slot | None:
        """A ready slot, now the caller's, or None."""
        self.want(key)
        slots = self._ready.get(key)
        return slots.pop() if slots else None

    async def run(self) -> None:
        """Refill until cancelled. A failure is logged and tried again, ever more slowly."""
        pause = _RETRY_FIRST_S
        try:
            while True:
                self._changed.clear()
                while len(self._ready) > self._keys:
                    _, surplus = self._ready.popitem(last=False)
                    for slot in surplus:
                        await self._discard(slot)
                key = next((key for key in reversed(self._ready) if len(self._ready[key]) < self._size), None)
                if key is None:
                    await self._changed.wait()
                    continue
                try:
                    async with self._refills.turn():
                        slot = await self._prepare(key)
                except PandastackError as error:
                    log.warning("a slot could not be prepared", error=error.message, detail=error.fields.get("detail"), retry_in_s=pause)
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, _RETRY_MAX_S)
                    continue
                pause = _RETRY_FIRST_S
                if key in self._ready:
                    self._ready[key].append(slot)
                else:
                    await self._discard(slot)
        finally:
            await asyncio.shield(self._give_back())

    async def _give_back(self) -> None:
        for slots in self._ready.values():
            while slots:
                with contextlib.suppress(PandastackError):
                    await self._discard(slots.pop())
