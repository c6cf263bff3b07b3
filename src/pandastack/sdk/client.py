"""Client and AsyncClient: the key, the address, the connections, the retries. They differ only in how they send.

Everything a client can do hangs on its namespaces (`sandboxes`, `snapshots`, `templates`, `tokens`). One client serves many threads
(or one event loop) and should be made once.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol, Self, TypeVar

from pandastack import errors
from pandastack.sdk import config, retry
from pandastack.sdk import transport as transports
from pandastack.sdk.async_sandboxes import AsyncSandboxes
from pandastack.sdk.calls import call as calls
from pandastack.sdk.calls import diff as diff_calls
from pandastack.sdk.calls import tokens as token_calls
from pandastack.sdk.calls import usage as usage_calls
from pandastack.sdk.calls.call import Answer, Call, PathLike, Request
from pandastack.sdk.calls.diff import Point
from pandastack.sdk.results import FileChange, Me
from pandastack.sdk.retry import CreateRetryEvent
from pandastack.sdk.sandboxes import Sandboxes
from pandastack.sdk.snapshots import AsyncSnapshots, Snapshots
from pandastack.sdk.templates import AsyncTemplates, Templates
from pandastack.sdk.tokens import AsyncTokens, Tokens
from pandastack.wire.usage import WorkspaceUsage

T = TypeVar("T")
OnCreateRetry = Callable[[CreateRetryEvent], None]


class CancelEvent(Protocol):
    """What `cancel=` takes: a threading.Event or multiprocessing.Event; with the async client also an asyncio.Event."""

    def is_set(self) -> bool: ...


class _Base:
    """Settings and decisions that both clients share."""

    def __init__(
        self,
        api_url: str | None,
        api_key: str | None,
        timeout: float,
        api_base: str | None,
        max_create_retry_seconds: float | None,
        on_create_retry: OnCreateRetry | None,
    ) -> None:
        self._settings = config.load(
            api_url if api_url is not None else api_base, api_key, timeout_s=timeout, max_create_retry_seconds=max_create_retry_seconds
        )
        self.on_create_retry = on_create_retry

    @property
    def api_url(self) -> str:
        return self._settings.api_url

    @property
    def api_base(self) -> str:
        """The older name of `api_url`."""
        return self._settings.api_url

    @property
    def api_key(self) -> str | None:
        return self._settings.api_key

    @property
    def timeout(self) -> float:
        """Seconds that a request may wait for its answer, unless the call says otherwise."""
        return self._settings.timeout_s

    @property
    def max_create_retry_seconds(self) -> float:
        return self._settings.max_create_retry_seconds

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._settings.api_url!r})"

    def _headers(self) -> dict[str, str]:
        return {
            "authorization": f"Bearer {self._settings.key()}",
            "accept": "application/json",
            "user-agent": f"pandastack-py/{config.version()}",
        }

    def _attempts(self, request: Request) -> retry.Attempts:
        return retry.Attempts(request, self._settings.max_create_retry_seconds)

    def _pause(self, attempts: retry.Attempts, outcome: Answer | errors.ConnectionError, begun: float) -> retry.Pause | None:
        pause = attempts.after(outcome, time.monotonic() - begun)
        if pause is not None and pause.event is not None and self.on_create_retry is not None:
            self.on_create_retry(pause.event)
        return pause


def _settle(outcome: Answer | errors.ConnectionError, request: Request, attempts: retry.Attempts) -> Answer:
    """The last outcome as an answer, or the error it means."""
    if isinstance(outcome, errors.ConnectionError):
        raise outcome
    if outcome.status >= 400:
        if outcome.status == 404 and request.method == "DELETE" and attempts.may_have_arrived:
            # The first DELETE did its work and only its answer was lost.
            return Answer(204, outcome.headers)
        raise calls.error_of(outcome)
    if outcome.status >= 300:
        raise errors.ServerError(
            f"the API answered with a redirect to {outcome.headers.get('location', 'nowhere')}",
            hint="use that address as api_url",
            http_status=outcome.status,
        )
    return outcome


def _cancelled(outcome: Answer | errors.ConnectionError | None) -> errors.CreateCancelled:
    error = errors.CreateCancelled("the create was cancelled", hint="the last refusal is its cause" if outcome is not None else None)
    error.__cause__ = calls.error_of(outcome) if isinstance(outcome, Answer) else outcome
    return error


class Client(_Base):
    """The blocking client. Leaving `with` closes its connections; sandboxes live on."""

    def __init__(
        self,
        api_url: str | None = None,
        api_key: str | None = None,
        timeout: float = config.DEFAULT_TIMEOUT_S,
        api_base: str | None = None,
        max_create_retry_seconds: float | None = None,
        on_create_retry: OnCreateRetry | None = None,
        *,
        transport: transports.Transport | None = None,
    ) -> None:
        """`timeout` is seconds per request; commands wait as long as they run. `transport` replaces the network in tests."""
        super().__init__(api_url, api_key, timeout, api_base, max_create_retry_seconds, on_create_retry)
        self._given = transport
        self._lock = threading.Lock()
        self.sandboxes = Sandboxes(self)
        self.snapshots = Snapshots(self)
        self.templates = Templates(self)
        self.tokens = Tokens(self)

    def me(self) -> Me:
        """Who the key belongs to."""
        return self._call(token_calls.me())

    def usage(self) -> WorkspaceUsage:
        """What the key's workspace has and stores, and what its quotas leave."""
        return self._call(usage_calls.of_workspace())

    def diff(self, a: Point, b: Point, *, path: PathLike = "/") -> list[FileChange]:
        """What became of the files below `path` from `a` to `b`: snapshots or sandboxes, or ids of them.

        Hibernated sandboxes are not woken, running ones are read while they run. Sorted by the parts of the paths.
        Raises NotFoundError, FileNotFound (neither has the path), CapacityError (a snapshot is restored for it), TooLarge.
        """
        return self._call(diff_calls.changes(a, b, path))

    def diff_patch(self, a: Point, b: Point, *, path: PathLike = "/") -> bytes:
        """The same as a patch for `git apply`, with names relative to `path`. What cannot be in it is named in lines with `#`."""
        return self._call(diff_calls.patch(a, b, path))

    def close(self) -> None:
        """Close every connection. The client may be used again and then opens new ones."""
        with self._lock:
            transport, self._given = self._given, None
        if transport is not None:
            transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _transport(self) -> transports.Transport:
        self._settings.key()
        with self._lock:
            if self._given is None:
                self._given = transports.HttpTransport(self.api_url, self._headers(), self.timeout)
            return self._given

    def _call(self, call: Call[T], cancel: CancelEvent | None = None) -> T:
        return call.read(self._send(call.request, cancel))

    def _send(self, request: Request, cancel: CancelEvent | None = None) -> Answer:
        if cancel is not None:
            _check_blocking(cancel)
        transport, attempts, begun = self._transport(), self._attempts(request), time.monotonic()
        outcome: Answer | errors.ConnectionError | None = None
        while True:
            if cancel is not None and cancel.is_set():
                raise _cancelled(outcome)
            try:
                outcome = transport.send(request)
            except errors.ConnectionError as error:
                outcome = error
            if isinstance(outcome, Answer) and outcome.status < 400:
                return _settle(outcome, request, attempts)
            pause = self._pause(attempts, outcome, begun)
            if pause is None:
                return _settle(outcome, request, attempts)
            if cancel is not None:
                cancel.wait(pause.delay_s)  # type: ignore[attr-defined]
            else:
                time.sleep(pause.delay_s)

    @contextmanager
    def _open(self, request: Request) -> Iterator[transports.Opened]:
        """An answer to be read while it arrives. Retries end with its first byte; a failed status is raised here."""
        transport, attempts, begun = self._transport(), self._attempts(request), time.monotonic()
        while True:
            try:
                opening = transport.open(request)
                opened = opening.__enter__()
                break
            except errors.ConnectionError as error:
                pause = self._pause(attempts, error, begun)
                if pause is None:
                    raise
                time.sleep(pause.delay_s)
        try:
            if opened.status >= 300:
                _settle(Answer(opened.status, opened.headers, b"".join(opened)), request, attempts)
            yield opened
        finally:
            opening.__exit__(None, None, None)


class AsyncClient(_Base):
    """The asyncio client; it belongs to the event loop that uses it first."""

    def __init__(
        self,
        api_url: str | None = None,
        api_key: str | None = None,
        timeout: float = config.DEFAULT_TIMEOUT_S,
        api_base: str | None = None,
        max_create_retry_seconds: float | None = None,
        on_create_retry: OnCreateRetry | None = None,
        *,
        transport: transports.AsyncTransport | None = None,
    ) -> None:
        """As Client."""
        super().__init__(api_url, api_key, timeout, api_base, max_create_retry_seconds, on_create_retry)
        self._given = transport
        self.sandboxes = AsyncSandboxes(self)
        self.snapshots = AsyncSnapshots(self)
        self.templates = AsyncTemplates(self)
        self.tokens = AsyncTokens(self)

    async def me(self) -> Me:
        """Who the key belongs to."""
        return await self._call(token_calls.me())

    async def usage(self) -> WorkspaceUsage:
        """What the key's workspace has and stores, and what its quotas leave."""
        return await self._call(usage_calls.of_workspace())

    async def diff(self, a: Point, b: Point, *, path: PathLike = "/") -> list[FileChange]:
        """What became of the files below `path` from `a` to `b`: snapshots or sandboxes, or ids of them.

        Hibernated sandboxes are not woken, running ones are read while they run. Sorted by the parts of the paths.
        Raises NotFoundError, FileNotFound (neither has the path), CapacityError (a snapshot is restored for it), TooLarge.
        """
        return await self._call(diff_calls.changes(a, b, path))

    async def diff_patch(self, a: Point, b: Point, *, path: PathLike = "/") -> bytes:
        """The same as a patch for `git apply`, with names relative to `path`. What cannot be in it is named in lines with `#`."""
        return await self._call(diff_calls.patch(a, b, path))

    async def close(self) -> None:
        """Close every connection. The client may be used again and then opens new ones."""
        transport, self._given = self._given, None
        if transport is not None:
            await transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _transport(self) -> transports.AsyncTransport:
        self._settings.key()
        if self._given is None:
            self._given = transports.AsyncHttpTransport(self.api_url, self._headers(), self.timeout)
        return self._given

    async def _call(self, call: Call[T], cancel: CancelEvent | None = None) -> T:
        return call.read(await self._send(call.request, cancel))

    async def _send(self, request: Request, cancel: CancelEvent | None = None) -> Answer:
        transport, attempts, begun = self._transport(), self._attempts(request), time.monotonic()
        outcome: Answer | errors.ConnectionError | None = None
        while True:
            if cancel is not None and cancel.is_set():
                raise _cancelled(outcome)
            try:
                outcome = await transport.send(request)
            except errors.ConnectionError as error:
                outcome = error
            if isinstance(outcome, Answer) and outcome.status < 400:
                return _settle(outcome, request, attempts)
            pause = self._pause(attempts, outcome, begun)
            if pause is None:
                return _settle(outcome, request, attempts)
            await _sleep(pause.delay_s, cancel)

    @asynccontextmanager
    async def _open(self, request: Request) -> AsyncIterator[transports.AsyncOpened]:
        """An answer to be read while it arrives. Retries end with its first byte; a failed status is raised here."""
        transport, attempts, begun = self._transport(), self._attempts(request), time.monotonic()
        while True:
            try:
                opening = transport.open(request)
                opened = await opening.__aenter__()
                break
            except errors.ConnectionError as error:
                pause = self._pause(attempts, error, begun)
                if pause is None:
                    raise
                await asyncio.sleep(pause.delay_s)
        try:
            if opened.status >= 300:
                _settle(Answer(opened.status, opened.headers, b"".join([data async for data in opened])), request, attempts)
            yield opened
        finally:
            await opening.__aexit__(None, None, None)


def _check_blocking(cancel: Any) -> None:
    wait = getattr(cancel, "wait", None)
    if not callable(getattr(cancel, "is_set", None)) or not callable(wait) or inspect.iscoroutinefunction(wait):
        raise TypeError(
            f"cancel takes a threading.Event or multiprocessing.Event, not {type(cancel).__name__}; with asyncio use AsyncClient"
        )


async def _sleep(delay_s: float, cancel: CancelEvent | None) -> None:
    """Wait, but not past the cancellation. A thread's event is looked at often, because it cannot be awaited."""
    if cancel is None:
        await asyncio.sleep(delay_s)
        return
    end = time.monotonic() + delay_s
    while (left_s := end - time.monotonic()) > 0 and not cancel.is_set():  # noqa: ASYNC110
        await asyncio.sleep(min(left_s, 0.05))


_default: Client | None = None
_default_async: dict[asyncio.AbstractEventLoop, AsyncClient] = {}
_default_lock = threading.Lock()


def get_default_client() -> Client:
    """The client that `Sandbox.create()` and its sisters use; made from the configuration when first asked for."""
    global _default
    with _default_lock:
        if _default is None:
            _default = Client()
        return _default


def set_default_client(client: Client | None) -> None:
    """Replace it; None makes a new one from the configuration next time."""
    global _default
    with _default_lock:
        _default = client


def get_default_async_client() -> AsyncClient:
    """The same for AsyncSandbox: one per running event loop, because connections belong to a loop."""
    loop = asyncio.get_running_loop()
    with _default_lock:
        # A client keeps its loop alive through its connections, so clients of closed loops must be dropped here.
        for closed in [other for other in _default_async if other.is_closed()]:
            del _default_async[closed]
        if loop not in _default_async:
            _default_async[loop] = AsyncClient()
        return _default_async[loop]


def set_default_async_client(client: AsyncClient | None) -> None:
    """Replace it for the running event loop; None makes a new one next time."""
    with _default_lock:
        _default_async.pop(asyncio.get_running_loop(), None)
        if client is not None:
            _default_async[asyncio.get_running_loop()] = client
