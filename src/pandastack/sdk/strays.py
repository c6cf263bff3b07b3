"""Forks that leave nothing behind: either the caller holds every child, or no child is left.

`forked` is what programs use that make copies only for a while (`explore`, `pandastack selftest fork`). It keeps that promise
also when the interruption (Ctrl-C, a cancelled task) comes while the server is still making the children: the request is not
abandoned but waited for, so its answer says what to delete. Where the answer is lost, the children are found by a mark in
their metadata.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from pandastack import errors

if TYPE_CHECKING:
    from pandastack.sdk.async_sandboxes import AsyncSandbox
    from pandastack.sdk.client import AsyncClient, Client
    from pandastack.sdk.sandboxes import Sandbox

MARK = "fork_request"
"""The metadata key that says which request a child comes from."""

DELETES_AT_ONCE = 8


def _note(error: BaseException, failures: Mapping[str, str]) -> None:
    for sandbox_id, failure in failures.items():
        error.add_note(f"sandbox {sandbox_id} could not be deleted: {failure}")


def _made_nothing(error: BaseException) -> bool:
    """Refusals: the contract says that nothing exists after them."""
    refused = isinstance(error, errors.PandastackError) and 400 <= error.http_status < 500
    return refused or isinstance(error, (errors.CreateCancelled, errors.CapacityError, errors.DiskFull))


def _lost(mark: str, failure: Exception) -> dict[str, str]:
    return {f"with the metadata {MARK}={mark}": f"could not be looked for: {failure}"}


@contextmanager
def forked(parent: Sandbox, count: int, metadata: Mapping[str, str] | None = None) -> Iterator[list[Sandbox]]:
    """Children of `parent`; leaving the block with an exception, of any kind, deletes all of them. Leaving it well, none."""
    mark, cancel = uuid.uuid4().hex, threading.Event()
    asked = {**(metadata or {}), MARK: mark}
    asking = _Asking(lambda: parent._client.sandboxes.fork_tree(parent.id, count, asked, cancel=cancel))
    try:
        # Ctrl-C reaches the main thread only. The request is on another one, where nothing breaks it off half-way.
        threading.Thread(target=asking.run, name="pandastack-fork").start()
        yield asking.result()
    except BaseException as error:
        cancel.set()
        _note(error, asking.recall(lambda: _sweep(parent._client, mark)))
        raise


class _Asking:
    """One request on a thread of its own, and what becomes of its children when nobody waits for them any more.

    An executor will not do: an interrupt while it starts its thread leaves a request that nobody can wait for.
    """

    def __init__(self, ask: Callable[[], list[Sandbox]]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._begun = self._abandoned = self._orphaned = False
        self._children: list[Sandbox] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        with self._lock:
            if self._abandoned:
                return
            self._begun = True
        try:
            self._children = self._ask()
        except BaseException as error:
            self._error = error
        with self._lock:
            self._ended.set()
        if self._orphaned:
            reap(self._children)

    def result(self) -> list[Sandbox]:
        _wait(self._ended)
        if self._error is not None:
            raise self._error
        return self._children

    def recall(self, sweep: Callable[[], dict[str, str]]) -> dict[str, str]:
        """Delete what the request made or will have made; the failures. What is not sent yet never will be."""
        with self._lock:
            self._abandoned = True
            if not self._begun:
                return {}
        try:
            _wait(self._ended)
        except BaseException:
            # The second interrupt ends the waiting; the thread of the request then deletes what comes of it.
            with self._lock:
                self._orphaned = not self._ended.is_set()
            if self._orphaned:
                raise
        if self._error is not None:
            return {} if _made_nothing(self._error) else sweep()
        return reap(self._children)


def _wait(event: threading.Event) -> None:
    # Again and again, because a signal that comes right before a wait is seen only when the wait is over.
    while not event.wait(0.5):
        pass


def _sweep(client: Client, mark: str) -> dict[str, str]:
    """The answer is lost, but the server may have done its part."""
    try:
        found = client.sandboxes.list(metadata={MARK: mark})
    except errors.PandastackError as failure:
        return _lost(mark, failure)
    # An older server ignores the filter and tells about every sandbox there is.
    return reap([sandbox for sandbox in found if sandbox.metadata.get(MARK) == mark])


def reap(sandboxes: Sequence[Sandbox]) -> dict[str, str]:
    """Delete them, several at once. One that is gone already is no failure; the others are told by id."""
    if not sandboxes:
        return {}

    def delete(sandbox: Sandbox) -> str | None:
        try:
            sandbox.kill()
        except errors.NotFoundError:
            return None
        except errors.PandastackError as failure:
            return str(failure)
        return None

    # A second Ctrl-C ends the waiting below, but not the deleting: Python finishes these threads before it exits.
    with ThreadPoolExecutor(min(DELETES_AT_ONCE, len(sandboxes)), thread_name_prefix="pandastack-reap") as pool:
        deleting = [pool.submit(delete, sandbox) for sandbox in sandboxes]
        results = [deleted.result() for deleted in deleting]
    return {sandbox.id: failure for sandbox, failure in zip(sandboxes, results, strict=True) if failure is not None}


@asynccontextmanager
async def async_forked(parent: AsyncSandbox, count: int, metadata: Mapping[str, str] | None = None) -> AsyncIterator[list[AsyncSandbox]]:
    """`forked` for asyncio; being cancelled is one of the exceptions."""
    children = await _async_fork(parent, count, metadata or {})
    try:
        yield children
    except BaseException as error:
        _note(error, await asyncio.shield(async_reap(children)))
        raise


async def _async_fork(parent: AsyncSandbox, count: int, metadata: Mapping[str, str]) -> list[AsyncSandbox]:
    sandboxes, mark, cancel = parent._client.sandboxes, uuid.uuid4().hex, asyncio.Event()
    asking = asyncio.create_task(sandboxes.fork_tree(parent.id, count, {**metadata, MARK: mark}, cancel=cancel), name="fork")
    try:
        # Cancelling the caller ends the waiting here, never the request.
        return await asyncio.shield(asking)
    except BaseException as error:
        cancel.set()
        _note(error, await asyncio.shield(_async_recall(parent._client, asking, mark)))
        raise


async def _async_recall(client: AsyncClient, asking: asyncio.Task[list[AsyncSandbox]], mark: str) -> dict[str, str]:
    try:
        children = await asking
    except Exception as error:
        return {} if _made_nothing(error) else await _async_sweep(client, mark)
    return await async_reap(children)


async def _async_sweep(client: AsyncClient, mark: str) -> dict[str, str]:
    try:
        found = await client.sandboxes.list(metadata={MARK: mark})
    except errors.PandastackError as failure:
        return _lost(mark, failure)
    return await async_reap([sandbox for sandbox in found if sandbox.metadata.get(MARK) == mark])


async def async_reap(sandboxes: Sequence[AsyncSandbox]) -> dict[str, str]:
    """`reap` for asyncio."""
    slots = asyncio.Semaphore(DELETES_AT_ONCE)

    async def delete(sandbox: AsyncSandbox) -> str | None:
        async with slots:
            try:
                await sandbox.kill()
            except errors.NotFoundError:
                return None
            except errors.PandastackError as failure:
                return str(failure)
            return None

    results = await asyncio.gather(*(delete(sandbox) for sandbox in sandboxes))
    return {sandbox.id: failure for sandbox, failure in zip(sandboxes, results, strict=True) if failure is not None}
