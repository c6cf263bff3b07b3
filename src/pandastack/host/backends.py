"""The runtimes of this host: which may be here, which really work, and which one a sandbox gets.

    offered -> being tried -> here (a `Backend`: the runtime with its machines and its bakery)
                           -> does not work here, and why; tried again later and ever more seldom, because that may have been
                              a busy machine, or is put right while the host runs

What is tried `at_once` is known before the host serves requests, and so is every runtime whose machines of an earlier life may still
run. The others, which boot a kernel to be tried, follow in the background; who needs one of them waits for it. Part of the
conductor, below `registry`. The order of strength is in `wire.isolation`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import structlog

from pandastack.errors import HostUnfit, InvalidRequest, IsolationTooWeak, PandastackError, RuntimeUnavailable
from pandastack.host.bakery import Bakery
from pandastack.host.machines import Machines
from pandastack.host.runtimes.base import MachineId, Probe, Runtime
from pandastack.host.slots import Refills
from pandastack.host.storage.images import Image
from pandastack.wire.host import RuntimeInfo
from pandastack.wire.isolation import AUTO, MICROVM, MINIMUMS, RUNTIMES, Level, Minimum, level

log = structlog.get_logger(__name__)

TRY_TIMEOUT_S = 300.0  # A kernel that boots under emulation on a busy machine.
AGAIN_FIRST_S, AGAIN_MOST_S = 60.0, 3600.0  # Between two tries of a runtime that does not work; doubled each time.
PATIENCE_S = 20.0  # How long a request waits for a runtime that is being tried.
SWEEP_TIMEOUT_S = 30.0
_DOCTOR = "run `pandastack doctor`"

Found = tuple[Runtime | None, Probe]


class Facts(TypedDict):
    """What a sandbox tells of the runtime it is on."""

    runtime: str
    isolation: str
    acceleration: str | None
    own_kernel: bool


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A runtime that this host may have. `find` tries it: a runtime that was probed, and what the probe said.

    `isolation`, `own_kernel` and `acceleration` are what it has at best if it works. `rootfs` turns an image of a template into
    what its machines are made of, where that is not the folder itself.
    """

    name: str
    isolation: str
    own_kernel: bool
    find: Callable[[], Awaitable[Found]]
    acceleration: str | None = None
    at_once: bool = False
    rootfs: Callable[[Image], Awaitable[Path]] | None = None

    @property
    def level(self) -> Level:
        return level(self.name, self.isolation, self.acceleration)


class Backend:
    """A runtime that works here, with everything that is its own."""

    def __init__(self, probe: Probe, machines: Machines, bakery: Bakery) -> None:
        self.runtime = machines.runtime
        self.probe = probe
        self.machines = machines
        self.bakery = bakery

    @property
    def name(self) -> str:
        return self.runtime.name

    @property
    def level(self) -> Level:
        return level(self.name, self.runtime.isolation, self.runtime.acceleration)

    @property
    def facts(self) -> Facts:
        runtime = self.runtime
        return Facts(
            runtime=runtime.name,
            isolation=runtime.isolation,
            acceleration=runtime.acceleration,
            own_kernel=runtime.capabilities.own_kernel,
        )

    def info(self) -> RuntimeInfo:
        capabilities = self.runtime.capabilities
        return RuntimeInfo(
            name=self.name,
            works=True,
            version=self.probe.version,
            isolation=self.runtime.isolation,
            acceleration=self.runtime.acceleration,
            capabilities={
                "snapshot": capabilities.snapshot,
                "fork_memory": capabilities.fork_memory,
                "own_kernel": capabilities.own_kernel,
            },
        )


Join = Callable[[Offer, Runtime, Probe], Backend]


class Backends:
    """`join` makes a Backend of what was found. `minimum` is the least isolation that a sandbox may have here."""

    def __init__(self, offers: Sequence[Offer], join: Join, refills: Refills, *, minimum: Minimum = "none") -> None:
        # The strongest first, in every answer.
        self._offers = {offer.name: offer for offer in sorted(offers, key=lambda offer: -offer.level)}
        self._join = join
        self.refills = refills
        self.minimum = minimum
        self._here: dict[str, Backend] = {}
        self._failed: dict[str, Found] = {}
        self._turns = {name: asyncio.Lock() for name in self._offers}
        self._news = asyncio.Event()

    # Trying

    async def open(self, needed: Collection[str]) -> None:
        """Try what is to be known before the first request: what is offered at once, and `needed`; more if none of that will do.

        Raises HostUnfit with the reasons where nothing works that may be used.
        """
        first = [offer for offer in self._offers.values() if offer.at_once or offer.name in needed]
        await asyncio.gather(*(self._try(offer) for offer in first))
        for offer in self._offers.values():
            if self.best() is None:
                await self._try(offer)
        if self.best() is not None:
            # Else the error says it.
            for name, (_, probe) in self._failed.items():
                _tell(name, probe)
            return
        if self._here:
            raise HostUnfit(
                f"PANDASTACK_MIN_ISOLATION is {self.minimum}, and only {_names(self._here)} works on this machine",
                hint=f"{_DOCTOR}, or ask for less",
            )
        reasons = "; ".join(f"{name}: {_why(probe)}" for name, (_, probe) in self._failed.items())
        raise HostUnfit(f"no runtime works on this machine: {reasons or 'none is to be tried'}", hint=_DOCTOR)

    async def run(self) -> None:
        """Try what is left, and keep the pools of each runtime filled. Runs for ever; owned by the host."""
        async with asyncio.TaskGroup() as tasks:
            for offer in self._offers.values():
                tasks.create_task(self._serve(offer), name=f"runtime {offer.name}")

    async def _serve(self, offer: Offer) -> None:
        await self._try(offer, late=True)
        wait_s = AGAIN_FIRST_S
        while (backend := self._here.get(offer.name)) is None:
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, AGAIN_MOST_S)
            await self._try(offer, late=True, again=True)
        await backend.machines.run()

    async def _try(self, offer: Offer, *, late: bool = False, again: bool = False) -> None:
        async with self._turns[offer.name]:
            before = self._failed.get(offer.name)
            if offer.name in self._here or (before is not None and not again):
                return
            runtime, probe = await self._find(offer)
            if runtime is None or not probe.works:
                self._failed[offer.name] = (runtime, probe)
                if late and (before is None or before[1] != probe):
                    _tell(offer.name, probe)
            else:
                backend = self._join(offer, runtime, probe)
                if late:
                    # Recovery went by without it, because none of its machines was of a sandbox: all there are, are left over.
                    await self._sweep(backend)
                log.info("runtime works", runtime=offer.name, version=probe.version, acceleration=runtime.acceleration)
                self._here[offer.name] = backend
                self._failed.pop(offer.name, None)
            news, self._news = self._news, asyncio.Event()
            news.set()

    async def _sweep(self, backend: Backend) -> None:
        try:
            await backend.machines.sweep(())
        except (PandastackError, OSError) as error:
            log.error("what machines of an earlier life left could not be removed", runtime=backend.name, error=str(error))

    async def _find(self, offer: Offer) -> Found:
        try:
            async with asyncio.timeout(TRY_TIMEOUT_S):
                return await offer.find()
        except TimeoutError:
            return None, Probe(works=False, reason=f"it could not be tried in {TRY_TIMEOUT_S:g} s", hint="try again on a less busy machine")
        except PandastackError as error:
            return None, Probe(works=False, reason=error.message, hint=error.hint)
        except Exception as error:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise asyncio.CancelledError from error  # What failed was the undoing.
            # One that fails in a way nobody thought of must not take the others down.
            log.exception("runtime could not be tried", runtime=offer.name)
            return None, Probe(works=False, reason=f"trying it failed: {type(error).__name__}", hint="see the log; please report it")

    # Looking

    def list(self) -> Sequence[Backend]:
        return list(self._here.values())

    def find(self, name: str) -> Backend | None:
        return self._here.get(name)

    def best(self) -> Backend | None:
        """What `auto` means as far as is known now."""
        return self._strongest(self._offers)

    def infos(self) -> Sequence[RuntimeInfo]:
        return [self._info(offer) for offer in self._offers.values()]

    def _info(self, offer: Offer) -> RuntimeInfo:
        if (backend := self._here.get(offer.name)) is not None:
            return backend.info()
        probe = self._failed[offer.name][1] if offer.name in self._failed else Probe(works=False, reason="it is still being tried")
        return RuntimeInfo(
            name=offer.name,
            works=False,
            version=probe.version,
            reason=probe.reason,
            hint=probe.hint,
            isolation=offer.isolation,
            acceleration=offer.acceleration,
            capabilities={"own_kernel": offer.own_kernel},
        )

    def _strongest(self, names: Collection[str]) -> Backend | None:
        fit = [backend for name, backend in self._here.items() if name in names and backend.level >= MINIMUMS[self.minimum]]
        return max(fit, key=lambda backend: backend.level, default=None)

    # Choosing

    async def choose(self, wanted: str) -> Backend:
        """The runtime for a new sandbox: the strongest of those that `wanted` means (`auto`, `microvm`, or the name of one).

        Waits a while for those that are being tried and could win. Raises InvalidRequest for an unknown word, RuntimeUnavailable
        with the reason where none of them works, IsolationTooWeak where those that work are not strong enough for this host.
        """
        names = self._meant(wanted)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while self._could_win(names):
                    await self._news.wait()
        backend = self._strongest(names)
        if backend is not None:
            return backend
        weak = [self._here[name] for name in names if name in self._here]
        if weak:
            raise self._too_weak(weak[0])
        raise self._unavailable(wanted, names)

    def meets(self, wanted: str, backend: Backend) -> bool:
        """Whether a sandbox on this runtime is what was asked for. Raises InvalidRequest for an unknown word."""
        return backend.name in self._meant(wanted)

    def of(self, name: str) -> Backend:
        """The runtime of a sandbox or a saved state. Raises RuntimeUnavailable where it does not work here, or is not known yet."""
        backend = self._here.get(name)
        if backend is None:
            raise self._unavailable(name, [name])
        return backend

    async def reach(self, name: str) -> Backend:
        """As `of`; waits a while for one that is being tried."""
        if name in self._offers:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    while self._pending(name):
                        await self._news.wait()
        return self.of(name)

    async def usable(self, name: str) -> Backend:
        """As `reach`, for something that is going to run: raises IsolationTooWeak too."""
        backend = await self.reach(name)
        if backend.level < MINIMUMS[self.minimum]:
            raise self._too_weak(backend)
        return backend

    def _meant(self, wanted: str) -> Sequence[str]:
        if wanted == AUTO:
            return list(self._offers)
        if wanted == MICROVM:
            return [offer.name for offer in self._offers.values() if offer.own_kernel]
        if wanted in self._offers or wanted in RUNTIMES:
            return [wanted]
        choices = [AUTO, MICROVM, *self._offers]
        raise InvalidRequest(
            f"isolation: {wanted[:64]!r} is unknown; this machine has {', '.join(choices)}", field="isolation", choices=choices
        )

    def _pending(self, name: str) -> bool:
        return name in self._offers and name not in self._here and name not in self._failed

    def _could_win(self, names: Collection[str]) -> bool:
        best = self._strongest(names)
        least = MINIMUMS[self.minimum] if best is None else best.level + 1
        return any(self._pending(name) and self._offers[name].level >= least for name in names)

    def _too_weak(self, backend: Backend) -> IsolationTooWeak:
        how = f" ({backend.runtime.acceleration})" if backend.runtime.acceleration else ""
        return IsolationTooWeak(
            f"the runtime {backend.name}{how} isolates less than this machine asks for ({self.minimum})",
            hint="ask for another isolation, or have PANDASTACK_MIN_ISOLATION changed",
            field="isolation",
            runtime=backend.name,
            minimum=self.minimum,
        )

    def _unavailable(self, wanted: str, names: Sequence[str]) -> RuntimeUnavailable:
        if any(self._pending(name) for name in names):
            return RuntimeUnavailable(
                f"the runtime {wanted} is still being tried on this machine", hint="ask again in a moment", retry_after_s=5, runtime=wanted
            )
        reasons = "; ".join(f"{name}: {_why(self._failed[name][1])}" for name in names if name in self._failed)
        what = "no runtime with a kernel of its own works" if wanted == MICROVM else f"the runtime {wanted} does not work"
        subject = "none" if wanted == MICROVM else "it"
        untried = f"{subject} is tried here: PANDASTACK_RUNTIMES leaves it out, or this version has it not"
        return RuntimeUnavailable(f"{what} on this machine ({reasons or untried})", hint=_DOCTOR, runtime=wanted)

    # Ending

    async def sweep(self, keep: Mapping[str, Collection[MachineId]]) -> int:
        """Remove what machines other than `keep`, by runtime, left behind; returns how many. Of runtimes that are not here nothing."""
        return sum([await backend.machines.sweep(keep.get(name, ())) for name, backend in self._here.items()])

    async def give_up(self, name: str) -> None:
        """End the machines of a runtime that does not work any more, as far as it still can."""
        runtime = self._failed[name][0] if name in self._failed else None
        if runtime is None:
            return
        try:
            async with asyncio.timeout(SWEEP_TIMEOUT_S):
                await runtime.sweep(())
        except (PandastackError, OSError) as error:
            log.error("machines of a runtime that does not work could not be ended", runtime=name, error=str(error))

    async def close(self) -> None:
        """Cancel what is being baked and wait until it is undone."""
        await asyncio.gather(*(backend.bakery.close() for backend in self._here.values()))


def _names(found: Collection[str]) -> str:
    return ", ".join(found)


def _tell(name: str, probe: Probe) -> None:
    log.warning("runtime does not work here", runtime=name, reason=probe.reason, hint=probe.hint)


def _why(probe: Probe) -> str:
    return (probe.reason or "it does not work here") + (f" ({probe.hint})" if probe.hint else "")
