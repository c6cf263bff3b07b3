"""`client.snapshots`: kept moments of sandboxes, from which new ones can be made."""

from __future__ import annotations

import asyncio
import builtins
import time
from typing import TYPE_CHECKING

from pandastack.sdk.calls import snapshots as calls
from pandastack.sdk.results import Snapshot

if TYPE_CHECKING:
    from pandastack.sdk.client import AsyncClient, Client


class Snapshots:
    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self, sandbox_id: str | None = None, *, automatic: bool = False) -> builtins.list[Snapshot]:
        """The newest first; of one sandbox, or all. A snapshot outlives its sandbox; those that `automatic` adds do not."""
        return self._client._call(calls.list_snapshots(sandbox_id, automatic))

    def get(self, snapshot_id: str) -> Snapshot:
        """Raises SnapshotNotFound."""
        return self._client._call(calls.get(snapshot_id))

    def delete(self, snapshot_id: str) -> None:
        """Sandboxes that were made from it live on. Raises SnapshotNotFound."""
        self._client._call(calls.delete(snapshot_id))

    def offload(self, snapshot_id: str) -> Snapshot:
        """Move its memory and its disk to the object store of the server; what can be done with it stays the same.

        Returns when they are there. Raises SnapshotNotFound, SnapshotUnusable, ObjectStoreUnavailable; then it is where it was.
        """
        return self._client._call(calls.offload(snapshot_id))

    def wait_verified(self, snapshot_id: str, timeout_s: float = 300.0) -> Snapshot:
        """Wait until the server has tried to restore it, which it does by itself.

        Raises SnapshotUnusable when that failed, SandboxTimeout (a TimeoutError) after `timeout_s` seconds.
        """
        end, delay_s = time.monotonic() + timeout_s, calls.FIRST_LOOK_S
        while not calls.verified(snapshot := self.get(snapshot_id)):
            if (left_s := end - time.monotonic()) <= 0:
                raise calls.not_verified(snapshot, timeout_s)
            time.sleep(min(delay_s, left_s))
            delay_s = min(delay_s * 1.5, calls.LAST_LOOK_S)
        return snapshot


class AsyncSnapshots:
    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self, sandbox_id: str | None = None, *, automatic: bool = False) -> builtins.list[Snapshot]:
        """The newest first; of one sandbox, or all. A snapshot outlives its sandbox; those that `automatic` adds do not."""
        return await self._client._call(calls.list_snapshots(sandbox_id, automatic))

    async def get(self, snapshot_id: str) -> Snapshot:
        """Raises SnapshotNotFound."""
        return await self._client._call(calls.get(snapshot_id))

    async def delete(self, snapshot_id: str) -> None:
        """Sandboxes that were made from it live on. Raises SnapshotNotFound."""
        await self._client._call(calls.delete(snapshot_id))

    async def offload(self, snapshot_id: str) -> Snapshot:
        """Move its memory and its disk to the object store of the server; what can be done with it stays the same.

        Returns when they are there. Raises SnapshotNotFound, SnapshotUnusable, ObjectStoreUnavailable; then it is where it was.
        """
        return await self._client._call(calls.offload(snapshot_id))

    async def wait_verified(self, snapshot_id: str, timeout_s: float = 300.0) -> Snapshot:
        """Wait until the server has tried to restore it, which it does by itself.

        Raises SnapshotUnusable when that failed, SandboxTimeout (a TimeoutError) after `timeout_s` seconds.
        """
        end, delay_s = time.monotonic() + timeout_s, calls.FIRST_LOOK_S
        while not calls.verified(snapshot := await self.get(snapshot_id)):
            if (left_s := end - time.monotonic()) <= 0:
                raise calls.not_verified(snapshot, timeout_s)
            await asyncio.sleep(min(delay_s, left_s))
            delay_s = min(delay_s * 1.5, calls.LAST_LOOK_S)
        return snapshot
