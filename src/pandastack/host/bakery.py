"""Bakes templates: a template's saved state holds the running guest daemon, and its warm interpreter where it has one.

Every create restores that state, so nothing boots at create time. A state is kept under a key of everything it depends
on (image, runtime build, CPU features, guest daemon), is proved by one restore before it is published, and appears
by one rename. Part of the conductor. One bake at a time runs per template; later callers follow it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from pandastack.errors import PandastackError, RuntimeFailed, TemplateError, TemplateNotReady
from pandastack.host import identity
from pandastack.host.guest import Guest
from pandastack.host.machines import Machines, SlotKey
from pandastack.host.runtimes.base import Limits
from pandastack.host.storage.images import Image, Images, Progress
from pandastack.wire.templates import BakeProgress, TemplateState, TemplateView

log = structlog.get_logger(__name__)

WARM_TIMEOUT_S = 120.0
_STEP_TIMEOUT_S = 60.0
_MANIFEST = "manifest.json"
_STATES_KEPT = 4
# What a sandbox needs beside the memory that its template's state brings with it.
_ROOM_TO_WORK_MIB = 32

Tell = Callable[[BakeProgress], None]


@dataclass(frozen=True, kw_only=True)
class Baked:
    """A template that is ready: `snapshot` restores on a machine made with `image.rootfs`."""

    image: Image
    snapshot: Path
    limits: Limits
    memory_floor_mib: int
    warm: bool


class _Job:
    """A bake under way and everything it has said; followers read from the beginning."""

    def __init__(self) -> None:
        self.said: list[BakeProgress] = []
        self.changed = asyncio.Condition()
        self.task: asyncio.Task[Baked]

    async def tell(self, progress: BakeProgress) -> None:
        async with self.changed:
            # Byte counters speak often; a follower only needs the latest of each step.
            if self.said and self.said[-1].step == progress.step:
                self.said[-1] = progress
            else:
                self.said.append(progress)
            self.changed.notify_all()


class Bakery:
    """`root` keeps the states. `runtime_key` changes when old states do not restore any more."""

    def __init__(self, images: Images, machines: Machines, *, root: Path, runtime_key: str, guest_digest: str) -> None:
        self._images = images
        self._machines = machines
        self._root = root
        self._runtime_key = runtime_key
        self._guest_digest = guest_digest
        self._jobs: dict[str, _Job] = {}
        self._ready: dict[str, Baked] = {}
        self._errors: dict[str, str] = {}

    def names(self) -> list[str]:
        return self._images.names()

    def ready(self, name: str) -> Baked | None:
        """The baked template, without waiting. Raises TemplateNotFound."""
        known = self._ready.get(name)
        if known is None:
            image = self._images.cached(name)
            known = self._read(image) if image else None
            if known:
                self._ready[name] = known
        return known

    async def wait(self, name: str, *, patience_s: float) -> Baked:
        """The baked template; starts the bake if need be and waits up to `patience_s` for it.

        Raises TemplateNotFound, TemplateNotReady (it goes on in the background; `retry_after_s`), or why it failed.
        """
        if baked := self.ready(name):
            return baked
        job = self._start(name)
        try:
            async with asyncio.timeout(patience_s):
                return await asyncio.shield(job.task)
        except TimeoutError as error:
            latest = job.said[-1].message if job.said else "starting"
            raise TemplateNotReady(
                f"template {name} is being prepared on this machine ({latest})",
                hint="try again in a few seconds, or watch `pandastack template bake`",
                retry_after_s=5,
            ) from error

    async def follow(self, name: str) -> AsyncGenerator[BakeProgress, None]:
        """What the bake of `name` says until it is ready; starts it if need be. Raises why it failed."""
        if self.ready(name):
            yield BakeProgress(step="ready", message=f"template {name} is ready", elapsed_s=0)
            return
        job = self._start(name)
        seen: tuple[int, BakeProgress | None] = (0, None)
        while True:
            async with job.changed:
                while not job.task.done() and (len(job.said), job.said[-1] if job.said else None) == seen:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(1.0):
                            await job.changed.wait()
                fresh = [progress for progress in job.said[max(0, seen[0] - 1) :] if progress is not seen[1]]
                seen = (len(job.said), job.said[-1] if job.said else None)
            for progress in fresh:
                yield progress
            if job.task.done():
                await job.task
                return

    def view(self, name: str) -> TemplateView:
        """The template as the API shows it. Raises TemplateNotFound, TemplateError."""
        recipe = self._images.recipe(name)
        image = self._images.cached(name)
        state: TemplateState = "built" if image else "missing"
        if name in self._jobs:
            state = "baking" if image else "building"
        elif self.ready(name):
            state = "ready"
        elif name in self._errors:
            state = "failed"
        effective = image.recipe if image else recipe
        return TemplateView(
            name=name,
            actual=image.name if image else recipe.name,
            note=image.note if image else None,
            label=recipe.label,
            description=recipe.description,
            category=recipe.category,
            base=recipe.base,
            tools=effective.tools,
            cpu=effective.cpu or 1,
            memory_mb=effective.memory_mb or 512,
            disk_mb=effective.disk_mb or 2048,
            size_bytes=image.size_bytes if image else 0,
            state=state,
            error=self._errors.get(name),
            digest=image.digest if image else None,
            distribution=image.distribution if image else None,
        )

    async def close(self) -> None:
        """Cancel what is being baked and wait until it is undone."""
        tasks = [job.task for job in self._jobs.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, name: str) -> _Job:
        job = self._jobs.get(name)
        if job is None:
            self._images.recipe(name)  # An unknown name fails here, not in the background.
            job = self._jobs[name] = _Job()
            self._errors.pop(name, None)
            job.task = asyncio.create_task(self._bake(name, job), name=f"bake {name}")
            job.task.add_done_callback(lambda task: self._finished(name, task))
        return job

    def _finished(self, name: str, task: asyncio.Task[Baked]) -> None:
        del self._jobs[name]
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._ready[name] = task.result()
            return
        self._errors[name] = error.message if isinstance(error, PandastackError) else "internal error"
        log.error("bake failed", template=name, error=str(error), detail=getattr(error, "fields", {}).get("detail"), exc_info=error)

    def _key(self, image: Image) -> str:
        parts = (image.digest, self._runtime_key, self._guest_digest)
        return f"{image.name}-{hashlib.sha256('/'.join(parts).encode()).hexdigest()[:12]}"

    def _read(self, image: Image) -> Baked | None:
        folder = self._root / self._key(image)
        try:
            manifest = json.loads((folder / _MANIFEST).read_text())
            for name, size in manifest["files"].items():
                if (folder / name).stat().st_size != size:
                    raise ValueError(name)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("a baked state is damaged and will be made again", template=image.name, error=str(error))
            shutil.rmtree(folder, ignore_errors=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(folder / _MANIFEST)  # When it was last of use; see _remove_stale.
        saved_bytes = sum(manifest["files"].values())
        return Baked(
            image=image,
            snapshot=folder,
            limits=default_limits(image),
            memory_floor_mib=_ROOM_TO_WORK_MIB + (saved_bytes >> 20),
            warm=bool(manifest.get("warm")),
        )

    def _remove_stale(self, image: Image) -> None:
        """Of all states ever baked for a template keep the few used last: each upgrade of anything makes a new one."""
        states = sorted(self._root.glob(f"{image.name}-{12 * '?'}/{_MANIFEST}"), key=lambda file: file.stat().st_mtime, reverse=True)
        for manifest in states[_STATES_KEPT:]:
            shutil.rmtree(manifest.parent, ignore_errors=True)

    async def _bake(self, name: str, job: _Job) -> Baked:
        started = time.monotonic()
        loop = asyncio.get_running_loop()
        tells: set[asyncio.Task[None]] = set()

        def say(step: str, message: str) -> None:
            tell(BakeProgress(step=step, message=message, elapsed_s=round(time.monotonic() - started, 1)))

        def tell(progress: BakeProgress) -> None:
            task = loop.create_task(job.tell(progress))
            tells.add(task)
            task.add_done_callback(tells.discard)

        def from_build(progress: Progress) -> None:
            tell(
                BakeProgress(
                    step=progress.step,
                    message=progress.message,
                    done=progress.done,
                    total=progress.total,
                    unit=progress.unit,
                    elapsed_s=round(time.monotonic() - started, 1),
                )
            )

        image = await self._images.ensure(name, from_build)
        if baked := self._read(image):
            return baked
        temporary = self._root / f".{self._key(image)}.{os.getpid()}"
        try:
            await asyncio.to_thread(_fresh_directory, temporary)
            say("boot", f"booting {image.name} once")
            warm = await self._save(image, temporary, say)
            say("verify", "proving the saved state by restoring it")
            await self._prove(image, temporary)
            await asyncio.to_thread(_publish, temporary, self._root / self._key(image), warm)
        finally:
            await asyncio.to_thread(shutil.rmtree, temporary, True)
        baked = self._read(image)
        if baked is None:
            raise TemplateError(f"the baked state of {name} vanished while it was published")
        await asyncio.to_thread(self._remove_stale, image)
        say("ready", f"template {name} is ready")
        return baked

    async def _save(self, image: Image, into: Path, say: Callable[[str, str], None]) -> bool:
        machine = await self._machines.prepare(image.rootfs, default_limits(image))
        try:
            async with asyncio.timeout(WARM_TIMEOUT_S + _STEP_TIMEOUT_S):
                await machine.start()
                guest = await Guest.open(await machine.connect(), timeout_s=_STEP_TIMEOUT_S)
                try:
                    warm = image.recipe.warm
                    if warm:
                        say("warm", f"loading {', '.join(warm.python_modules) or 'Python'}")
                        await guest.warm(["pandastack:python", *warm.python_modules], ready_timeout_s=WARM_TIMEOUT_S)
                    await guest.seal(reason="bake")
                finally:
                    await guest.close()
                say("save", "saving memory and processes")
                await machine.snapshot(into, resume=False)
        except TimeoutError as error:
            raise RuntimeFailed(f"template {image.name} did not become ready to be saved in time") from error
        finally:
            await self._machines.discard(machine)
        return bool(warm)

    async def _prove(self, image: Image, state: Path) -> None:
        ready = await self._machines.restored(SlotKey(image.rootfs, default_limits(image), state))
        try:
            await identity.confirm(ready.guest, identity.fresh("00000000-0000-4000-8000-000000000000", "bake", {}))
        finally:
            await self._machines.discard_ready(ready)


def default_limits(image: Image) -> Limits:
    """The limits of a sandbox that asked for none."""
    recipe = image.recipe
    return Limits(cpu=recipe.cpu or 1, memory_mib=recipe.memory_mb or 512, disk_mib=recipe.disk_mb or 2048)


def _fresh_directory(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700, parents=True)


def _publish(temporary: Path, final: Path, warm: bool) -> None:
    files = {path.name: path.stat().st_size for path in temporary.iterdir()}
    (temporary / _MANIFEST).write_text(json.dumps({"files": files, "warm": warm}))
    for path in [*temporary.iterdir(), temporary]:
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
