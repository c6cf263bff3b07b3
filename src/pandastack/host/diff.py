"""What differs between the files of two points: the saved state of a snapshot, or a sandbox as it is.

    views opened -> both trees walked side by side -> digests of what may still be equal -> changes, with their contents for a patch

The files of a saved state can only be read by restoring it. So a *view* is a hidden machine restored from it, which never gets an
identity: its guest stays sealed and its processes stay stopped, and it is discarded at the end, however that comes. A hibernated
sandbox is read the same way and sleeps on. One that is in memory is read as it is, while it runs: its changes meanwhile may
or may not be seen. Part of the conductor.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import posixpath
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pandastack.errors import Conflict, FileConflict, FileNotFound, GuestError, GuestTimeout, PandastackError, TooLarge
from pandastack.host.guest import Guest
from pandastack.host.machines import Machines, SlotKey
from pandastack.host.sandboxes import Sandboxes
from pandastack.host.storage.snapshots import Saved
from pandastack.wire import patches
from pandastack.wire.diff import MAX_ENTRIES, ChangeKind, FileChange, FileSide, HostChange, HostPoint
from pandastack.wire.guest import Scanned
from pandastack.wire.ids import SandboxId
from pandastack.wire.patches import Blob

MAX_PATCH_BYTES = 256 << 20  # Of all contents that go into one patch.
_DIGESTS_AT_ONCE = 500
# Any digest is of one file at most; a large one takes its time.
_DIGEST_TIMEOUT_S = 300.0
_SCAN_TIMEOUT_S = 60.0
_CONTENT_TIMEOUT_S = 120.0

Reach = Callable[[], AbstractAsyncContextManager[Guest]]


class _Gone(Exception):
    """A file of a running sandbox went away, or became something else, between the walk and the look at its content."""


@dataclass(frozen=True)
class View:
    """A way to the files of one point. `rootfs` is the image below them; each call uses `reach` on its own, so that what
    goes wrong on one side is never told of the other.
    """

    reach: Reach
    rootfs: Path

    async def scan(self, path: bytes) -> AsyncGenerator[Scanned, None]:
        """The tree below a path; nothing where there is none."""
        async with self.reach() as guest:
            try:
                async with contextlib.aclosing(guest.scan(path, MAX_ENTRIES, timeout_s=_SCAN_TIMEOUT_S)) as found:
                    async for entry in found:
                        yield entry
            except (FileNotFound, FileConflict):
                return
            except TooLarge as error:
                raise TooLarge(
                    f"there are more than {MAX_ENTRIES} files and directories", hint="give a narrower path", maximum=MAX_ENTRIES
                ) from error

    async def digests(self, paths: Sequence[bytes]) -> list[str | None]:
        async with self.reach() as guest:
            return await guest.digests(paths, timeout_s=_DIGEST_TIMEOUT_S)

    async def content(self, path: bytes, size: int) -> bytes:
        """Of a file of at most `size` bytes. Raises _Gone where it is none any more, or has grown."""
        data = bytearray()
        async with self.reach() as guest:
            try:
                stat, body = await guest.read_file(path, length=size + 1)
            except (FileNotFound, FileConflict) as error:
                raise _Gone from error
            closing: Any = body
            async with contextlib.aclosing(closing):
                if stat.type != "file":
                    raise _Gone
                while (piece := await _within(_SCAN_TIMEOUT_S, body)) is not None:
                    data += piece
                    if len(data) > size:
                        raise _Gone
        return bytes(data)


Pair = tuple[Scanned | None, Scanned | None]


class Diffs:
    """See `control.hosts.Host.diff`."""

    def __init__(self, sandboxes: Sandboxes) -> None:
        self._sandboxes = sandboxes
        self._registry = sandboxes.registry
        self._states = sandboxes.states

    async def diff(self, a: HostPoint, b: HostPoint, path: bytes, *, patch: bool) -> AsyncGenerator[HostChange, None]:
        path = _clean(path)
        async with contextlib.AsyncExitStack() as stack:
            one = await stack.enter_async_context(self._view(a))
            if a == b:
                return
            two = await stack.enter_async_context(self._view(b))
            left = MAX_PATCH_BYTES
            pairs = _joined(one.scan(path), two.scan(path), alike=one.rootfs == two.rootfs)
            async with contextlib.aclosing(_portions(pairs)) as portions:
                async for portion in portions:
                    for pair, differ in await _looked_into(one, two, path, portion):
                        change = _change(path, pair, differ)
                        if change is None:
                            continue
                        name = _name(path, pair)
                        if change.kind == "metadata":
                            yield HostChange(change, _modes(name, pair) if patch else b"")
                            continue
                        if (why := _why_omitted(pair, left)) is not None:
                            yield _omitted(change, name, why)
                            continue
                        left -= _content_bytes(pair)
                        text = await self._patch(one, two, path, pair, name) if patch else b""
                        yield _omitted(change, name, "it changed while it was read") if text is None else HostChange(change, text)

    # Views

    @contextlib.asynccontextmanager
    async def _view(self, point: HostPoint) -> AsyncIterator[View]:
        async with contextlib.AsyncExitStack() as stack:
            if point.kind == "snapshot":
                saved = await self._states.snapshots.check(point.id)
                yield await stack.enter_async_context(self._restored(saved))
                return
            sandbox = self._registry.get(SandboxId(point.id))
            async with contextlib.AsyncExitStack() as held:
                await held.enter_async_context(sandbox.lock)
                if sandbox.status == "hibernated":
                    # The lock keeps a wake from giving the saved state back before the view has read it.
                    saved = await self._states.snapshots.check(sandbox.entry.snapshot)
                    view = await stack.enter_async_context(self._restored(saved))
                    await held.aclose()
                    yield view
                    return
            yield View(lambda: self._sandboxes.use(sandbox.id), Path(sandbox.entry.rootfs))

    @contextlib.asynccontextmanager
    async def _restored(self, saved: Saved) -> AsyncIterator[View]:
        """A view of a saved state. It takes room like a sandbox, under a name that no sandbox has."""
        machines = (await self._registry.backends.reach(saved.manifest.origin.runtime)).machines
        async with self._states.opened(saved) as there, self._in(machines, self._states.key(there)) as view:
            yield view

    @contextlib.asynccontextmanager
    async def _in(self, machines: Machines, key: SlotKey) -> AsyncIterator[View]:
        name = SandboxId(f"view-{uuid.uuid4()}")
        self._registry.admission.reserve(name, key.limits)
        try:
            async with self._registry.starts:
                ready = await machines.restored(key, quiet=False, blank=True)
            try:
                yield View(lambda: _hidden(ready.guest), key.rootfs)
            finally:
                await machines.discard_ready(ready)
        finally:
            self._registry.admission.release(name)

    # Patches

    async def _patch(self, one: View, two: View, root: bytes, pair: Pair, name: bytes) -> bytes | None:
        """The patch of one name; None where a running sandbox took it away meanwhile."""
        try:
            # All of it: a daemon that sends a byte now and then must not keep what was read so far for long.
            async with asyncio.timeout(_CONTENT_TIMEOUT_S):
                before, after = await _blob(one, root, pair[0]), await _blob(two, root, pair[1])
        except _Gone:
            return None
        except TimeoutError as error:
            if isinstance(error, PandastackError):
                raise
            raise GuestTimeout("the files could not be read in time", after_s=_CONTENT_TIMEOUT_S) from error
        return await asyncio.to_thread(patches.render, name, before, after)


@contextlib.asynccontextmanager
async def _hidden(guest: Guest) -> AsyncIterator[Guest]:
    try:
        yield guest
    except GuestTimeout as error:
        # A daemon from before these calls lets them wait for the end of the freeze, which never comes.
        raise _too_old() from error
    except GuestError as error:
        if error.fields.get("guest_code") == "unknown_method":
            raise _too_old() from error
        raise


def _too_old() -> Conflict:
    return Conflict(
        "the daemon in the saved state did not answer; one of an older version cannot be looked into", hint="take a new snapshot"
    )


async def _within(timeout_s: float, body: AsyncIterator[bytes]) -> bytes | None:
    try:
        async with asyncio.timeout(timeout_s):
            return await anext(body, None)
    except TimeoutError as error:
        raise GuestTimeout("the sandbox's daemon gave no answer", after_s=timeout_s) from error


# Comparing


async def _joined(one: AsyncGenerator[Scanned, None], two: AsyncGenerator[Scanned, None], *, alike: bool) -> AsyncGenerator[Pair, None]:
    """Names of two trees side by side, those left out that are certainly equal. `alike`: both are made of the same image.

    Raises FileNotFound where neither has anything.
    """
    async with contextlib.aclosing(one) as first, contextlib.aclosing(two) as second:
        a, b = await anext(first, None), await anext(second, None)
        if a is None and b is None:
            raise FileNotFound("neither side has this path")
        while a is not None or b is not None:
            if b is None or (a is not None and _order(a) < _order(b)):
                yield a, None
                a = await anext(first, None)
            elif a is None or _order(b) < _order(a):
                yield None, b
                b = await anext(second, None)
            else:
                if not _surely_equal(a, b, alike):
                    yield a, b
                a, b = await anext(first, None), await anext(second, None)


async def _portions(pairs: AsyncGenerator[Pair, None]) -> AsyncGenerator[list[Pair], None]:
    async with contextlib.aclosing(pairs):
        portion: list[Pair] = []
        async for pair in pairs:
            portion.append(pair)
            if len(portion) >= _DIGESTS_AT_ONCE:
                yield portion
                portion = []
        if portion:
            yield portion


def _order(entry: Scanned) -> list[bytes]:
    path = entry.path_bytes
    return path.split(b"/") if path else []


def _owned(entry: Scanned) -> tuple[int, int, int]:
    return entry.mode, entry.uid, entry.gid


def _surely_equal(a: Scanned, b: Scanned, alike: bool) -> bool:
    if a.type != b.type or _owned(a) != _owned(b):
        return False
    if a.type != "file":
        return a.target_bytes == b.target_bytes
    # Not the times of a file that was ever written to: writing through shared memory leaves them as they are.
    times = (a.size, a.mtime_ns, a.ctime_ns) == (b.size, b.mtime_ns, b.ctime_ns)
    return times and alike and a.pristine and b.pristine


async def _looked_into(one: View, two: View, root: bytes, pairs: Sequence[Pair]) -> list[tuple[Pair, bool]]:
    """Each pair with whether its contents differ."""
    asked = [a.path_bytes for a, b in pairs if a and b and a.type == b.type == "file" and a.size == b.size and a.size > 0]
    differ: set[bytes] = set()
    if asked:
        paths = [_below(root, path) for path in asked]
        try:
            async with asyncio.TaskGroup() as both:
                left, right = both.create_task(one.digests(paths)), both.create_task(two.digests(paths))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        # Without a digest it went away: a look at it must not say that it is as before.
        differ = {path for path, x, y in zip(asked, left.result(), right.result(), strict=True) if x is None or x != y}
    return [((a, b), bool(a and b and _content_differs(a, b, differ))) for a, b in pairs]


def _content_differs(a: Scanned, b: Scanned, differ: Collection[bytes]) -> bool:
    if a.type == "symlink":
        return a.target_bytes != b.target_bytes
    return a.type == "file" and (a.size != b.size or a.path_bytes in differ)


def _change(root: bytes, pair: Pair, differ: bool) -> FileChange | None:
    a, b = pair
    kind: ChangeKind
    if a is None or b is None:
        kind = "added" if a is None else "removed"
    elif a.type != b.type:
        kind = "type"
    elif differ:
        kind = "modified"
    elif _owned(a) != _owned(b):
        kind = "metadata"
    else:
        return None
    entry = a if a is not None else b
    assert entry is not None  # noqa: S101
    path = _below(root, entry.path_bytes)
    text = path.decode("utf-8", "replace")
    exact = None if text.encode() == path else base64.b64encode(path).decode()
    return FileChange(path=text, path_b64=exact, kind=kind, before=_side(a), after=_side(b))


def _side(entry: Scanned | None) -> FileSide | None:
    if entry is None:
        return None
    return FileSide(
        type=entry.type,
        size=0 if entry.type == "directory" else entry.size,
        mode=f"{entry.mode:04o}",
        uid=entry.uid,
        gid=entry.gid,
        target=entry.target,
        target_b64=entry.target_b64,
    )


def _clean(path: bytes) -> bytes:
    clean = posixpath.normpath(path)
    return clean[1:] if clean.startswith(b"//") else clean


def _below(root: bytes, relative: bytes) -> bytes:
    return root.rstrip(b"/") + b"/" + relative if relative else root


# Patches


async def _blob(view: View, root: bytes, entry: Scanned | None) -> Blob | None:
    if entry is None or entry.type == "directory":
        return None
    if entry.type == "symlink":
        return Blob(b"120000", entry.target_bytes)
    return Blob(patches.file_mode(entry.mode), await view.content(_below(root, entry.path_bytes), entry.size))


def _name(root: bytes, pair: Pair) -> bytes:
    """What a patch calls it: its path below the root, or the last name of the root itself."""
    return next(entry.path_bytes for entry in pair if entry is not None) or posixpath.basename(root)


def _modes(name: bytes, pair: Pair) -> bytes:
    """The patch of a name whose content is the same, whatever that is."""
    blobs = [Blob(patches.file_mode(entry.mode), b"") for entry in pair if entry is not None and entry.type == "file"]
    return patches.render(name, *blobs) if len(blobs) == 2 else b""


def _content_bytes(pair: Pair) -> int:
    """How much of both sides a patch is made of, at most."""
    return sum(entry.size for entry in pair if entry is not None and entry.type == "file")


def _why_omitted(pair: Pair, left: int) -> str | None:
    if any(entry is not None and entry.type == "other" for entry in pair):
        return "it is neither a file nor a link"
    if any(entry is not None and entry.type == "file" and entry.size > patches.MAX_FILE_BYTES for entry in pair):
        return f"it is larger than {patches.MAX_FILE_BYTES} bytes"
    return "the patch would be too large" if _content_bytes(pair) > left else None


def _omitted(change: FileChange, name: bytes, why: str) -> HostChange:
    return HostChange(change.model_copy(update={"omitted": True}), patches.left_out(name, why))
