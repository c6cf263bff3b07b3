"""Sending bytes: the only module that knows the HTTP library. Both transports keep connections open and reuse them.

A transport raises errors.ConnectionError and nothing else; its field `maybe_sent` is false only where no connection
was made, so that nothing can have reached the server. Redirects are answers like others: a key never follows one.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx2

from pandastack import errors
from pandastack.sdk.calls.call import DEFAULT_READ_S, Answer, Request

CONNECT_S = 10.0
MAX_CONNECTIONS = 1024
MAX_IDLE_CONNECTIONS = 256
# Below the 5 s after which common servers close idle connections: a request sent into a closing one may be lost.
IDLE_S = 4.0


class Opened(Protocol):
    """An answer whose body is still on its way. Iterating raises errors.ConnectionError when it breaks off."""

    status: int
    headers: Mapping[str, str]

    def __iter__(self) -> Iterator[bytes]: ...


class AsyncOpened(Protocol):
    status: int
    headers: Mapping[str, str]

    def __aiter__(self) -> AsyncIterator[bytes]: ...


class Transport(Protocol):
    def send(self, request: Request) -> Answer: ...
    def open(self, request: Request) -> AbstractContextManager[Opened]: ...
    def close(self) -> None: ...


class AsyncTransport(Protocol):
    async def send(self, request: Request) -> Answer: ...
    def open(self, request: Request) -> AbstractAsyncContextManager[AsyncOpened]: ...
    async def close(self) -> None: ...


def _keepalive_options() -> list[tuple[int, int, int]]:
    """A blocking exec may be silent for hours: the kernel, not a read timeout, finds out that the peer is dead."""
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPALIVE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options


def _proxy_for(url: str) -> str | None:
    """The proxy that the environment names for this address; never one for this machine's own loopback."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    proxies = {} if is_loopback else urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


class _Shared:
    """What both transports do alike: addresses, headers, timeouts, and the meaning of the library's exceptions."""

    def __init__(self, api_url: str, headers: Mapping[str, str], timeout_s: float) -> None:
        self._base = f"{api_url}/v1"
        self._headers = dict(headers)
        self._timeout_s = timeout_s
        # Loading the certificate store costs tens of milliseconds that a plain http address does not need.
        verify: ssl.SSLContext | bool = True if api_url.startswith("https:") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        limits = httpx2.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_IDLE_CONNECTIONS, keepalive_expiry=IDLE_S)
        self.pool: dict[str, Any] = {
            "verify": verify,
            "limits": limits,
            "socket_options": _keepalive_options(),
            "proxy": _proxy_for(api_url),
        }

    def arguments(self, request: Request) -> dict[str, Any]:
        headers = {**self._headers, **request.headers}
        if request.content_type:
            headers["content-type"] = request.content_type
        if request.chunks is not None and request.length is not None:
            headers["content-length"] = str(request.length)
        read_s = self._timeout_s if request.read_s == DEFAULT_READ_S else request.read_s
        return {
            "method": request.method,
            "url": self._base + request.path,
            "headers": headers,
            "content": request.chunks() if request.chunks is not None else request.body,
            "timeout": httpx2.Timeout(
                connect=min(CONNECT_S, self._timeout_s), read=read_s, write=max(self._timeout_s, 30.0), pool=self._timeout_s
            ),
        }

    def failure(self, error: Exception) -> errors.ConnectionError:
        maybe_sent = not isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError))
        timed_out = isinstance(error, httpx2.TimeoutException)
        if isinstance(error, httpx2.PoolTimeout):
            text, hint = "every connection to the API is in use", "close streams that are not read any more"
        elif not maybe_sent:
            text, hint = f"cannot reach the API at {self._base}", "check the address, and that the server runs (`pandastack up`)"
        elif timed_out:
            text, hint = "the API did not answer in time", "pass a larger timeout, or look at the server's log"
        else:
            text, hint = "the connection to the API broke off", None
        return errors.ConnectionError(
            f"{text}: {str(error) or type(error).__name__}", hint=hint, maybe_sent=maybe_sent, timed_out=timed_out
        )


def _failures() -> tuple[type[Exception], ...]:
    return (httpx2.TransportError, httpx2.DecodingError, httpx2.InvalidURL, ssl.SSLError)


class _Body:
    def __init__(self, shared: _Shared, response: httpx2.Response) -> None:
        self._shared = shared
        self._response = response
        self.status = response.status_code
        self.headers: Mapping[str, str] = response.headers

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._response.iter_bytes()
        except _failures() as error:
            raise self._shared.failure(error) from error


class _AsyncBody(_Body):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for data in self._response.aiter_bytes():
                yield data
        except _failures() as error:
            raise self._shared.failure(error) from error


class HttpTransport:
    """Blocking; may be used from many threads at once."""

    def __init__(self, api_url: str, headers: Mapping[str, str], timeout_s: float) -> None:
        self._shared = _Shared(api_url, headers, timeout_s)
        self._http = httpx2.Client(transport=httpx2.HTTPTransport(**self._shared.pool), trust_env=False)

    def send(self, request: Request) -> Answer:
        try:
            response = self._http.request(**self._shared.arguments(request))
        except _failures() as error:
            raise self._shared.failure(error) from error
        return Answer(response.status_code, response.headers, response.content)

    @contextmanager
    def open(self, request: Request) -> Iterator[Opened]:
        try:
            response = self._http.send(self._http.build_request(**self._shared.arguments(request)), stream=True)
        except _failures() as error:
            raise self._shared.failure(error) from error
        try:
            yield _Body(self._shared, response)
        finally:
            response.close()

    def close(self) -> None:
        self._http.close()


class AsyncHttpTransport:
    """Belongs to one event loop."""

    def __init__(self, api_url: str, headers: Mapping[str, str], timeout_s: float) -> None:
        self._shared = _Shared(api_url, headers, timeout_s)
        self._http = httpx2.AsyncClient(transport=httpx2.AsyncHTTPTransport(**self._shared.pool), trust_env=False)

    async def send(self, request: Request) -> Answer:
        try:
            response = await self._http.request(**self._shared.arguments(request))
        except _failures() as error:
            raise self._shared.failure(error) from error
        return Answer(response.status_code, response.headers, response.content)

    @asynccontextmanager
    async def open(self, request: Request) -> AsyncIterator[AsyncOpened]:
        try:
            response = await self._http.send(self._http.build_request(**self._shared.arguments(request)), stream=True)
        except _failures() as error:
            raise self._shared.failure(error) from error
        try:
            yield _AsyncBody(self._shared, response)
        finally:
            await response.aclose()

    async def close(self) -> None:
        await self._http.aclose()
