"""Bakes templates: a template's saved state holds the running guest daemon, and its warm interpreter where it has one.

Every create restores that state, so nothing boots at create time. A state is kept under a key of everything it depends
on (image, runtime build, CPU features, guest daemon), is proved by one restore before it is published, and appears
by one rename. Part of the conductor; each runtime has its own. One bake at a time runs per template; later callers follow it.

A runtime whose states fit one size only needs one for each size in use. That of the template is baked like any other;
the others when somebody asks for them, from then on as long as they are among the few used last.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import os
import shutil
import stat
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from pandastack.errors import PandastackError, RuntimeFailed, TemplateError, TemplateNotReady
from pandastack.host import identity
from pandastack.host.admission import Admission
from pandastack.host.guest import Guest
from pandastack.host.machines import Machines, Size, SlotKey
from pandastack.host.runtimes.base import Limits
from pandastack.host.storage.images import Image, Images, Progress
from pandastack.wire.ids import SandboxId
from pandastack.wire.templates import BakeProgress, TemplateState, TemplateView

log = structlog.get_logger(__name__)

WARM_TIMEOUT_S = 120.0
_STEP_TIMEOUT_S = 60.0
_MANIFEST = "manifest.json"
_STATES_KEPT = 4
SIZES_KEPT = 8  # Of each template, beside its own.
# What a sandbox needs beside the memory that its template's state brings with it.
_ROOM_TO_WORK_MIB = 32

_Key = tuple[str, Size | None]  # A template, and the size if that is not its own.


@dataclass(frozen=True, kw_only=True)
class Baked:
    """A template that is ready: `snapshot` restores on a machine made with `rootfs`.

    `limits` are those of a sandbox that asks for none, and `disk_floor_mib` what the image takes of its disk.
    """

    image: Image
    rootfs: Path
    snapshot: Path
    limits: Limits
    memory_floor_mib: int
    disk_floor_mib: int
    warm: bool

    def other_size(self, limits: Limits) -> Size | None:
        """Of the saved state for these limits on a runtime with `Capabilities.fixed_size`; None where this one will do."""
        disk_mib = self.limits.disk_mib if limits.disk_mib >= self.limits.disk_mib else self.disk_floor_mib
        wanted = Size.of(replace(limits, disk_mib=disk_mib))
        return wanted if wanted != Size.of(self.limits) else None


class _Job:
    """A bake under way and everything it has said; followers read from the beginning."""

    def __init__(self) -> None:
        self.said: list[BakeProgress] = []
        self.changed = asyncio.Condition()
        self.task: asyncio.Task[Baked]
        self._started = time.monotonic()
        self._tells: set[asyncio.Task[None]] = set()

    def say(self, step: str, message: str, *, done: int | None = None, total: int | None = None, unit: str = "") -> None:
        elapsed_s = round(time.monotonic() - self._started, 1)
        progress = BakeProgress(step=step, message=message, done=done, total=total, unit=unit, elapsed_s=elapsed_s)
        task = asyncio.get_running_loop().create_task(self._tell(progress))
        self._tells.add(task)
        task.add_done_callback(self._tells.discard)

    async def _tell(self, progress: BakeProgress) -> None:
        async with self.changed:
            # Byte counters speak often; a follower only needs the latest of each step.
            if self.said and self.said[-1].step == progress.step:
                self.said[-1] = progress
            else:
                self.said.append(progress)
            self.changed.notify_all()


class Bakery:
    """`root` keeps the states, `rootfs` makes of an image what the runtime starts from, `runtime_key` changes when old states do
    not restore any more. What is baked for a size takes the room of a sandbox meanwhile (`admission`).
    """

    def __init__(
        self,
        images: Images,
        machines: Machines,
        *,
        root: Path,
        runtime_key: str,
        guest_digest: str,
        admission: Admission,
        rootfs: Callable[[Image], Awaitable[Path]] | None = None,
    ) -> None:
        self._images = images
        self._machines = machines
        self._root = root
        self._runtime_key = runtime_key
        self._guest_digest = guest_digest
        self._admission = admission
        self._rootfs = rootfs
        self._jobs: dict[_Key, _Job] = {}
        self._ready: dict[_Key, Baked] = {}
        self._one_size = asyncio.Lock()
        self._errors: dict[str, str] = {}

    def names(self) -> list[str]:
        return self._images.names()

    def ready(self, name: str) -> Baked | None:
        """The baked template, without waiting. Raises TemplateNotFound."""
        return self._find(name, None)

    def _find(self, name: str, size: Size | None) -> Baked | None:
        known = self._ready.get((name, size))
        if known is None:
            image = self._images.cached(name)
            known = self._read(image, size) if image else None
            if known:
                self._ready[name, size] = known
        elif size is not None:
            _touch(known.snapshot)
        return known

    async def wait(self, name: str, *, patience_s: float, size: Size | None = None) -> Baked:
        """The baked template, or its state for another `size`; starts the bake if need be and waits up to `patience_s` for it.

        Raises TemplateNotFound, TemplateNotReady (it goes on in the background; `retry_after_s`), or why it failed; for a size
        CapacityError where there is no room to bake it.
        """
        if baked := self._find(name, size):
            return baked
        job = self._start(name, size)
        try:
            async with asyncio.timeout(patience_s):
                return await asyncio.shield(job.task)
        except TimeoutError as error:
            latest = job.said[-1].message if job.said else "starting"
            what = f"template {name}" if size is None else f"template {name} with {size.words}"
            raise TemplateNotReady(
                f"{what} is being prepared on this machine ({latest})",
                hint="try again in a few seconds, or watch `pandastack template bake`",
                retry_after_s=5,
            ) from error

    async def follow(self, name: str) -> AsyncGenerator[BakeProgress, None]:
        """What the bake of `name` says until it is ready; starts it if need be. Raises why it failed."""
        if self.ready(name):
            yield BakeProgress(step="ready", message=f"template {name} is ready", elapsed_s=0)
            return
        job = self._start(name, None)
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
            state=self.state(name),
            error=self._errors.get(name),
            digest=image.digest if image else None,
            distribution=image.distribution if image else None,
        )

    def state(self, name: str) -> TemplateState:
        """How far this runtime is with the template. Raises TemplateNotFound, TemplateError."""
        image = self._images.cached(name)
        if (name, None) in self._jobs:
            return "baking" if image else "building"
        if self.ready(name):
            return "ready"
        if name in self._errors:
            return "failed"
        return "built" if image else "missing"

    async def close(self) -> None:
        """Cancel what is being baked and wait until it is undone."""
        tasks = [job.task for job in self._jobs.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, name: str, size: Size | None) -> _Job:
        job = self._jobs.get((name, size))
        if job is None:
            self._images.recipe(name)  # An unknown name fails here, not in the background.
            job = self._jobs[name, size] = _Job()
            if size is None:
                self._errors.pop(name, None)
            work = self._bake(name, job) if size is None else self._bake_size(name, size, job)
            job.task = asyncio.create_task(work, name=f"bake {name} {size or ''}")
            job.task.add_done_callback(lambda task: self._finished(name, size, task))
        return job

    def _finished(self, name: str, size: Size | None, task: asyncio.Task[Baked]) -> None:
        del self._jobs[name, size]
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._ready[name, size] = task.result()
            return
        if size is None:
            self._errors[name] = error.message if isinstance(error, PandastackError) else "internal error"
        detail = getattr(error, "fields", {}).get("detail")
        log.error("bake failed", template=name, size=str(size or "own"), error=str(error), detail=detail, exc_info=error)

    def _key(self, image: Image, size: Size | None) -> str:
        parts = (image.digest, self._runtime_key, self._guest_digest)
        name = image.name if size is None else f"{image.name}@{size}"
        return f"{name}-{hashlib.sha256('/'.join(parts).encode()).hexdigest()[:12]}"

    def _read(self, image: Image, size: Size | None) -> Baked | None:
        folder = self._root / self._key(image, size)
        try:
            manifest = json.loads((folder / _MANIFEST).read_text())
            rootfs = Path(manifest.get("rootfs", image.rootfs))
            if manifest.get("rootfs_made") != _made(rootfs):
                raise ValueError("its root image is another one by now")
            for name, size in manifest["files"].items():
                if (folder / name).stat().st_size != size:
                    raise ValueError(name)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("a baked state is damaged and will be made again", template=image.name, error=str(error))
            shutil.rmtree(folder, ignore_errors=True)
            return None
        _touch(folder)
        # With a fixed size all of the memory is there, and what is saved is all of it.
        saved_mib = 0 if self._machines.runtime.capabilities.fixed_size else sum(manifest["files"].values()) >> 20
        return Baked(
            image=image,
            rootfs=rootfs,
            snapshot=folder,
            limits=default_limits(image, rootfs),
            memory_floor_mib=_ROOM_TO_WORK_MIB + saved_mib,
            disk_floor_mib=_disk_floor_mib(rootfs),
            warm=bool(manifest.get("warm")),
        )

    def _remove_stale_sizes(self, image: Image) -> None:
        """The same of those for other sizes."""
        states = sorted(self._root.glob(f"{image.name}@*/{_MANIFEST}"), key=lambda file: file.stat().st_mtime, reverse=True)
        for manifest in states[SIZES_KEPT:]:
            for key in [key for key, baked in self._ready.items() if baked.snapshot == manifest.parent]:
                del self._ready[key]
            shutil.rmtree(manifest.parent, ignore_errors=True)

    def _remove_stale(self, image: Image) -> None:
        """Of all states ever baked for a template keep the few used last: each upgrade of anything makes a new one."""
        states = sorted(self._root.glob(f"{image.name}-{12 * '?'}/{_MANIFEST}"), key=lambda file: file.stat().st_mtime, reverse=True)
        for manifest in states[_STATES_KEPT:]:
            shutil.rmtree(manifest.parent, ignore_errors=True)

    async def _bake(self, name: str, job: _Job) -> Baked:
        def from_build(progress: Progress) -> None:
            job.say(progress.step, progress.message, done=progress.done, total=progress.total, unit=progress.unit)

        image = await self._images.ensure(name, from_build)
        rootfs = image.rootfs
        if self._rootfs is not None:
            job.say("root", f"making a disk image of {image.name}")
            rootfs = await self._rootfs(image)
        if baked := self._read(image, None):
            return baked
        baked = await self._make(image, rootfs, None, job)
        await asyncio.to_thread(self._remove_stale, image)
        job.say("ready", f"template {name} is ready")
        return baked

    async def _bake_size(self, name: str, size: Size, job: _Job) -> Baked:
        """One at a time: each takes the CPUs and the memory of a sandbox of that size."""
        job.say("wait", "waiting for its turn")
        own = await asyncio.shield(self._start(name, None).task) if (ready := self.ready(name)) is None else ready
        limits = size.within(own.limits)
        async with self._one_size:
            if baked := self._read(own.image, size):
                return baked
            room = SandboxId(f"bake-{own.image.name}-{size}")
            self._admission.reserve(room, limits)
            try:
                baked = await self._make(own.image, own.rootfs, size, job)
            finally:
                self._admission.release(room)
            self._remove_stale_sizes(own.image)
            return baked

    async def _make(self, image: Image, rootfs: Path, size: Size | None, job: _Job) -> Baked:
        limits = default_limits(image, rootfs)
        if size is not None:
            limits = size.within(limits)
        key = self._key(image, size)
        temporary = self._root / f".{key}.{os.getpid()}"
        manifest: dict[str, Any] = {"rootfs": str(rootfs), "rootfs_made": _made(rootfs)}
        try:
            await asyncio.to_thread(_fresh_directory, temporary)
            job.say("boot", f"booting {image.name} once")
            manifest["warm"] = await self._save(image, rootfs, limits, temporary, job)
            job.say("verify", "proving the saved state by restoring it")
            await self._prove(rootfs, limits, temporary)
            await asyncio.to_thread(_publish, temporary, self._root / key, manifest)
        finally:
            await asyncio.to_thread(shutil.rmtree, temporary, True)
        baked = self._read(image, size)
        if baked is None:
            raise TemplateError(f"the baked state of {image.name} vanished while it was published")
        return baked

    async def _save(self, image: Image, rootfs: Path, limits: Limits, into: Path, job: _Job) -> bool:
        machine = await self._machines.prepare(rootfs, limits)
        try:
            async with asyncio.timeout(WARM_TIMEOUT_S + _STEP_TIMEOUT_S):
                await machine.start()
                guest = await Guest.open(await machine.connect(), timeout_s=_STEP_TIMEOUT_S)
                try:
                    warm = image.recipe.warm
                    if warm:
                        job.say("warm", f"loading {', '.join(warm.python_modules) or 'Python'}")
                        await guest.warm(["pandastack:python", *warm.python_modules], ready_timeout_s=WARM_TIMEOUT_S)
                    await guest.seal(reason="bake")
                finally:
                    await guest.close()
                job.say("save", "saving memory and processes")
                await machine.snapshot(into, resume=False)
        except TimeoutError as error:
            raise RuntimeFailed(f"template {image.name} did not become ready to be saved in time") from error
        finally:
            await self._machines.discard(machine)
        return bool(warm)

    async def _prove(self, rootfs: Path, limits: Limits, state: Path) -> None:
        ready = await self._machines.restored(SlotKey(rootfs, limits, state))
        try:
            await identity.confirm(ready.guest, identity.fresh("00000000-0000-4000-8000-000000000000", "bake", {}))
        finally:
            await self._machines.discard_ready(ready)


def default_limits(image: Image, rootfs: Path) -> Limits:
    """The limits of a sandbox that asked for none."""
    recipe = image.recipe
    disk_mib = max(recipe.disk_mb or 2048, _disk_floor_mib(rootfs))
    return Limits(cpu=recipe.cpu or 1, memory_mib=recipe.memory_mb or 512, disk_mib=disk_mib)


def _disk_floor_mib(rootfs: Path) -> int:
    """The size of a disk image; a folder is no part of a disk."""
    return math.ceil(rootfs.stat().st_size / (1 << 20)) if rootfs.is_file() else 0


def _made(rootfs: Path) -> list[int] | None:
    """What tells a disk image from one that was made again, which has other blocks where a saved state expects its own."""
    try:
        status = rootfs.stat()
    except FileNotFoundError:
        return []
    return [status.st_ino, status.st_size, status.st_mtime_ns] if stat.S_ISREG(status.st_mode) else None


def _touch(state: Path) -> None:
    """It was of use just now; see `_remove_stale`."""
    with contextlib.suppress(OSError):
        os.utime(state / _MANIFEST)


def _fresh_directory(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700, parents=True)


def _publish(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    files = {path.name: path.stat().st_size for path in temporary.iterdir()}
    (temporary / _MANIFEST).write_text(json.dumps({"files": files, **manifest}))
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
