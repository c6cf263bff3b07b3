"""What can be done with a sandbox as a whole: stop and go on, keep its state, copy it. Both kinds of sandbox inherit it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self, overload

from pandastack.sdk import branches
from pandastack.sdk import explore as explorer
from pandastack.sdk.branches import AsyncScore, Candidate, ExploreResult, OnOutcome, Score, Select
from pandastack.sdk.calls import diff as diff_calls
from pandastack.sdk.calls import sandboxes as calls
from pandastack.sdk.calls import snapshots as snapshot_calls
from pandastack.sdk.calls.call import PathLike
from pandastack.sdk.calls.diff import Point
from pandastack.sdk.facts import Facts
from pandastack.sdk.results import FileChange, Lifecycle, Promoted, Snapshot

if TYPE_CHECKING:
    from pandastack.sdk.async_sandboxes import AsyncSandbox
    from pandastack.sdk.client import AsyncClient, CancelEvent, Client
    from pandastack.sdk.sandboxes import Sandbox


class States(Facts):
    """The part of Sandbox about its state."""

    _client: Client

    def refresh(self) -> Self:
        """Ask again, and return itself."""
        self._take(self._client._call(calls.get(self.id)))
        return self

    def pause(self) -> None:
        """Stop everything inside; memory stays where it is, and no CPU is used until `resume`, or until a request needs it.

        One that is hibernated stays hibernated.
        """
        self._client._call(calls.pause(self.id))
        self.refresh()

    def resume(self) -> None:
        self._client._call(calls.resume(self.id))
        self.refresh()

    def hibernate(self) -> None:
        """Write memory and files to disk and free the machine. The next request to it wakes it; so does `wake`."""
        self._is_now(self._client._call(calls.hibernate(self.id)))

    def wake(self) -> None:
        """Continue where it was hibernated. No harm when it runs."""
        self._is_now(self._client._call(calls.wake(self.id)))

    def keep_awake(self, seconds: int) -> Lifecycle:
        """Neither hibernate nor delete it for being idle during the next `seconds`; 0 ends that."""
        return self._client._call(calls.set_lifecycle(self.id, keep_awake_seconds=seconds))

    def snapshot(self, *, idempotency_key: str | None = None) -> str:
        """Keep memory and files as they are now; the id of the snapshot, once all of it is on disk.

        The sandbox goes on. `create(from_snapshot=...)` continues from there, as often as you like. It carries a key, so a
        lost answer never makes a second snapshot.
        """
        return self._client._call(snapshot_calls.take(self.id, idempotency_key))

    def checkpoints(
        self,
        *,
        every_execs: int | None = None,
        every_seconds: int | None = None,
        keep: int | None = None,
        max_mb: int | None = None,
        off: bool = False,
    ) -> Lifecycle:
        """From now on take points by itself: after every n-th command, or every so many seconds in which something happened.

        At most `keep` (default 20) of together `max_mb` MiB (default 4096) are kept, older ones sparser; `off` ends it.
        """
        call = calls.set_checkpoints(self.id, every_execs, every_seconds, keep, max_mb, off)
        return self._client._call(call)

    def history(self, limit: int | None = None) -> list[Snapshot]:
        """Its points, newest first: the snapshots you took, and those it took by itself (`cause`, `label`)."""
        return self._client._call(snapshot_calls.history(self.id, limit))

    def restore(self, point: str | Snapshot, *, undo: bool = True) -> str | None:
        """Make memory, processes and files those of one of its points; it runs then, also if it had failed.

        The answer is the id of a new point with what it was before (`restore` that to undo this); None where it had failed, or
        without `undo`. When it fails nothing has changed. Raises Conflict for the point of another sandbox.
        """
        restored = self._client._call(snapshot_calls.restore(self.id, snapshot_calls.id_of(point), undo))
        self._take(restored)
        return restored.undo_point

    @overload
    def fork_at(
        self,
        point: str | Snapshot,
        metadata: Mapping[str, str] | None = None,
        *,
        count: None = None,
        cancel: CancelEvent | None = None,
        idempotency_key: str | None = None,
    ) -> Sandbox: ...

    @overload
    def fork_at(
        self,
        point: str | Snapshot,
        metadata: Mapping[str, str] | None = None,
        *,
        count: int,
        cancel: CancelEvent | None = None,
        idempotency_key: str | None = None,
    ) -> list[Sandbox]: ...

    def fork_at(
        self,
        point: str | Snapshot,
        metadata: Mapping[str, str] | None = None,
        *,
        count: int | None = None,
        cancel: CancelEvent | None = None,
        idempotency_key: str | None = None,
    ) -> Sandbox | list[Sandbox]:
        """`fork` at one of its points instead of now. This sandbox is not touched, and need not run."""
        children = self._client.sandboxes.fork(
            self.id, metadata, count=1 if count is None else count, cancel=cancel, idempotency_key=idempotency_key,
            at=snapshot_calls.id_of(point),
        )  # fmt: skip
        return children[0] if count is None else children

    def diff(self, since: Point | None = None, *, path: PathLike = "/") -> list[FileChange]:
        """What became of its files below `path` since `since`: a snapshot or another sandbox; None: its newest snapshot.

        It is read while it runs, and it is not woken if it is hibernated. Sorted by the parts of the paths.
        """
        if since is None:
            since = diff_calls.newest(self._client.snapshots.list(self.id))
        return self._client.diff(since, self, path=path)

    def diff_patch(self, since: Point | None = None, *, path: PathLike = "/") -> bytes:
        """The same as a patch for `git apply`, with names relative to `path`."""
        if since is None:
            since = diff_calls.newest(self._client.snapshots.list(self.id))
        return self._client.diff_patch(since, self, path=path)

    @overload
    def fork(
        self,
        metadata: Mapping[str, str] | None = None,
        *,
        count: None = None,
        cancel: CancelEvent | None = None,
        idempotency_key: str | None = None,
    ) -> Sandbox: ...

    @overload
    def fork(
        self,
        metadata: Mapping[str, str] | None = None,
        *,
        count: int,
        cancel: CancelEvent | None = None,
        idempotency_key: str | None = None,
    ) -> list[Sandbox]: ...

    def fork(
        self,
        metadata: Mapping[str, str] | None = None,
        *,
        count: int | None = None,
        cancel: CancelEvent | None = None,
        idempotency_key: str | None = None,
    ) -> Sandbox | list[Sandbox]:
        """A running copy, processes and memory included; with `count` a list of so many copies of the same moment.

        A copy has its own id, name, clock and randomness, and this one's metadata under `metadata`. Repeated and
        cancelled as a create is.
        """
        if count is None:
            return self._client.sandboxes.fork(self.id, metadata, cancel=cancel, idempotency_key=idempotency_key)
        return self._client.sandboxes.fork(self.id, metadata, count=count, cancel=cancel, idempotency_key=idempotency_key)

    def fork_tree(
        self,
        count: int,
        metadata: Mapping[str, str] | None = None,
        *,
        cancel: CancelEvent | None = None,
        idempotency_key: str | None = None,
    ) -> list[Sandbox]:
        """`count` copies of the same moment, at most 16; they share `fork_tree_id`, by which `promote` knows siblings."""
        return self._client.sandboxes.fork_tree(self.id, count, metadata, cancel=cancel, idempotency_key=idempotency_key)

    def promote(self, *, cleanup_siblings: bool = False, tree_id: str | None = None) -> Promoted:
        """Make this fork a sandbox of its own; `cleanup_siblings` deletes the others of its tree."""
        return self._client.sandboxes.promote(self.id, cleanup_siblings=cleanup_siblings, tree_id=tree_id)

    def explore(
        self,
        candidates: Sequence[Candidate | str],
        *,
        score_fn: Score | None = None,
        select: Select = "max",
        require_success: bool = True,
        max_concurrency: int | None = None,
        cleanup_losers: bool = True,
        promote_winner: bool = True,
        capture_files: bool | str = True,
        ttl_seconds: int = branches.TTL_S,
        on_outcome: OnOutcome | None = None,
    ) -> ExploreResult[Sandbox]:
        """Try every candidate in a copy of this sandbox, keep the best copy: `pandastack.explore`."""
        return explorer.explore(
            self,  # type: ignore[arg-type]  # It is a Sandbox: nothing else inherits this part.
            candidates, score_fn=score_fn, select=select, require_success=require_success, max_concurrency=max_concurrency,
            cleanup_losers=cleanup_losers, promote_winner=promote_winner, capture_files=capture_files, ttl_seconds=ttl_seconds,
            on_outcome=on_outcome,
        )  # fmt: skip


class AsyncStates(Facts):
    """The part of AsyncSandbox about its state."""

    _client: AsyncClient

    async def refresh(self) -> Self:
        """Ask again, and return itself."""
        self._take(await self._client._call(calls.get(self.id)))
        return self

    async def pause(self) -> None:
        """Stop everything inside; memory stays where it is, and no CPU is used until `resume`, or until a request needs it.

        One that is hibernated stays hibernated.
        """
        await self._client._call(calls.pause(self.id))
        await self.refresh()

    async def resume(self) -> None:
        await self._client._call(calls.resume(self.id))
        await self.refresh()

    async def hibernate(self) -> None:
        """Write memory and files to disk and free the machine. The next request to it wakes it; so does `wake`."""
        self._is_now(await self._client._call(calls.hibernate(self.id)))

    async def wake(self) -> None:
        """Continue where it was hibernated. No harm when it runs."""
        self._is_now(await self._client._call(calls.wake(self.id)))

    async def keep_awake(self, seconds: int) -> Lifecycle:
        """Neither hibernate nor delete it for being idle during the next `seconds`; 0 ends that."""
        return await self._client._call(calls.set_lifecycle(self.id, keep_awake_seconds=seconds))

    async def snapshot(self, *, idempotency_key: str | None = None) -> str:
        """Keep memory and files as they are now; the id of the snapshot, once all of it is on disk.

        The sandbox goes on. `create(from_snapshot=...)` continues from there, as often as you like. It carries a key, so a
        lost answer never makes a second snapshot.
        """
        return await self._client._call(snapshot_calls.take(self.id, idempotency_key))

    async def checkpoints(
        self,
        *,
        every_execs: int | None = None,
        every_seconds: int | None = None,
        keep: int | None = None,
        max_mb: int | None = None,
        off: bool = False,
    ) -> Lifecycle:
        """From now on take points by itself: after every n-th command, or every so many seconds in which something happened.

        At most `keep` (default 20) of together `max_mb` MiB (default 4096) are kept, older ones sparser; `off` ends it.
        """
        call = calls.set_checkpoints(self.id, every_execs, every_seconds, keep, max_mb, off)
        return await self._client._call(call)

    async def history(self, limit: int | None = None) -> list[Snapshot]:
        """Its points, newest first: the snapshots you took, and those it took by itself (`cause`, `label`)."""
        return await self._client._call(snapshot_calls.history(self.id, limit))

    async def restore(self, point: str | Snapshot, *, undo: bool = True) -> str | None:
        """Make memory, processes and files those of one of its points; it runs then, also if it had failed.

        The answer is the id of a new point with what it was before (`restore` that to undo this); None where it had failed, or
        without `undo`. When it fails nothing has changed. Raises Conflict for the point of another sandbox.
        """
        restored = await self._client._call(snapshot_calls.restore(self.id, snapshot_calls.id_of(point), undo))
        self._take(restored)
        return restored.undo_point

    @overload
    async def fork_at(
        self,
        point: str | Snapshot,
        metadata: Mapping[str, str] | None = None,
        *,
        count: None = None,
        cancel: CancelEvent | None = None,
        idempotency_key: str | None = None,
    ) -> AsyncSandbox: ...

    @overload
    async def fork_at(
        self,
        point: str | Snapshot,
        metadata: Mapping[str, str] | None = None,
        *,
        count: int,
        cancel: CancelEvent | None = None,
        idempotency_key: str | None = None,
    ) -> list[AsyncSandbox]: ...

    async def fork_at(
        self,
        point: str | Snapshot,
        metadata: Mapping[str, str] | None = None,
        *,
        count: int | None = None,
        cancel: CancelEvent | None = None,
        idempotency_key: str | None = None,
    ) -> AsyncSandbox | list[AsyncSandbox]:
        """`fork` at one of its points instead of now. This sandbox is not touched, and need not run."""
        children = await self._client.sandboxes.fork(
            self.id, metadata, count=1 if count is None else count, cancel=cancel, idempotency_key=idempotency_key,
            at=snapshot_calls.id_of(point),
        )  # fmt: skip
        return children[0] if count is None else children

    async def diff(self, since: Point | None = None, *, path: PathLike = "/") -> list[FileChange]:
        """What became of its files below `path` since `since`: a snapshot or another sandbox; None: its newest snapshot.

        It is read while it runs, and it is not woken if it is hibernated. Sorted by the parts of the paths.
        """
        if since is None:
            since = diff_calls.newest(await self._client.snapshots.list(self.id))
        return await self._client.diff(since, self, path=path)

    async def diff_patch(self, since: Point | None = None, *, path: PathLike = "/") -> bytes:
        """The same as a patch for `git apply`, with names relative to `path`."""
        if since is None:
            since = diff_calls.newest(await self._client.snapshots.list(self.id))
        return await self._client.diff_patch(since, self, path=path)

    @overload
    async def fork(
        self,
        metadata: Mapping[str, str] | None = None,
        *,
        count: None = None,
        cancel: CancelEvent | None = None,
        idempotency_key: str | None = None,
    ) -> AsyncSandbox: ...

    @overload
    async def fork(
        self,
        metadata: Mapping[str, str] | None = None,
        *,
        count: int,
        cancel: CancelEvent | None = None,
        idempotency_key: str | None = None,
    ) -> list[AsyncSandbox]: ...

    async def fork(
        self,
        metadata: Mapping[str, str] | None = None,
        *,
        count: int | None = None,
        cancel: CancelEvent | None = None,
        idempotency_key: str | None = None,
    ) -> AsyncSandbox | list[AsyncSandbox]:
        """A running copy, processes and memory included; with `count` a list of so many copies of the same moment.

        A copy has its own id, name, clock and randomness, and this one's metadata under `metadata`. Repeated and
        cancelled as a create is.
        """
        if count is None:
            return await self._client.sandboxes.fork(self.id, metadata, cancel=cancel, idempotency_key=idempotency_key)
        return await self._client.sandboxes.fork(self.id, metadata, count=count, cancel=cancel, idempotency_key=idempotency_key)

    async def fork_tree(
        self,
        count: int,
        metadata: Mapping[str, str] | None = None,
        *,
        cancel: CancelEvent | None = None,
        idempotency_key: str | None = None,
    ) -> list[AsyncSandbox]:
        """`count` copies of the same moment, at most 16; they share `fork_tree_id`, by which `promote` knows siblings."""
        return await self._client.sandboxes.fork_tree(self.id, count, metadata, cancel=cancel, idempotency_key=idempotency_key)

    async def promote(self, *, cleanup_siblings: bool = False, tree_id: str | None = None) -> Promoted:
        """Make this fork a sandbox of its own; `cleanup_siblings` deletes the others of its tree."""
        return await self._client.sandboxes.promote(self.id, cleanup_siblings=cleanup_siblings, tree_id=tree_id)

    async def explore(
        self,
        candidates: Sequence[Candidate | str],
        *,
        score_fn: AsyncScore | None = None,
        select: Select = "max",
        require_success: bool = True,
        max_concurrency: int | None = None,
        cleanup_losers: bool = True,
        promote_winner: bool = True,
        capture_files: bool | str = True,
        ttl_seconds: int = branches.TTL_S,
        on_outcome: OnOutcome | None = None,
    ) -> ExploreResult[AsyncSandbox]:
        """Try every candidate in a copy of this sandbox, keep the best copy: `pandastack.async_explore`."""
        return await explorer.async_explore(
            self,  # type: ignore[arg-type]  # It is an AsyncSandbox: nothing else inherits this part.
            candidates, score_fn=score_fn, select=select, require_success=require_success, max_concurrency=max_concurrency,
            cleanup_losers=cleanup_losers, promote_winner=promote_winner, capture_files=capture_files, ttl_seconds=ttl_seconds,
            on_outcome=on_outcome,
        )  # fmt: skip
