"""The object store of a host: a folder by default, or whatever `obstore` can reach (S3 and what speaks like it).

Called by the modules of storage that keep chunks; calls block, from any thread, and every one of them ends: a request has
a deadline, is repeated a few times where that can help, and all of it together has `timeout_s`. Keys are made by the callers.
"""

from __future__ import annotations

import ctypes
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLate
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import obstore
from obstore import exceptions
from obstore.store import from_url

from pandastack.errors import HostUnfit, ObjectStoreUnavailable

T = TypeVar("T")

TIMEOUT_S = 30.0
_REQUEST_TIMEOUT_S = 15.0
_CONNECT_TIMEOUT_S = 3.0
_RETRIES = 4
_DELETE_AT_ONCE = 200
# What a library says of a place that is not there, or that it may not open: its words differ, the remedy does not.
_REFUSED = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)

_libc = ctypes.CDLL(None, use_errno=True)


class Missing(Exception):
    """There is no such object."""


@dataclass(frozen=True)
class Listed:
    """`age_s` is by the clock of this host, and may be off by what that is."""

    key: str
    size_bytes: int
    age_s: float


class Objects:
    """The store at `url` (`s3://bucket/prefix`, `file:///folder`, or a plain path). At most `threads` requests at once.

    `folder` is where it is, if it is a folder.
    """

    def __init__(self, url: str, *, threads: int = 16, timeout_s: float = TIMEOUT_S) -> None:
        self.folder = _folder(url)
        self.timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="objects")
        try:
            if self.folder is not None:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._store = from_url(self.folder.absolute().as_uri())
            else:
                self._store = from_url(
                    url,
                    client_options={
                        "timeout": timedelta(seconds=_REQUEST_TIMEOUT_S),
                        "connect_timeout": timedelta(seconds=_CONNECT_TIMEOUT_S),
                        # Whoever names an endpoint without TLS wants it so; chunks are proved by their names in any case.
                        "allow_http": (os.environ.get("AWS_ENDPOINT_URL") or url).startswith("http://"),
                    },
                    retry_config={
                        "max_retries": _RETRIES,
                        "retry_timeout": timedelta(seconds=timeout_s * 2 / 3),
                        "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=2), "base": 2},
                    },
                )
        except (exceptions.BaseError, ValueError, OSError) as error:
            raise HostUnfit(
                "PANDASTACK_OBJECT_STORE cannot be used", hint="give a folder or s3://bucket/prefix", detail=str(error)
            ) from error

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def get(self, key: str) -> bytes:
        """Raises Missing, ObjectStoreUnavailable."""
        return self._timely(lambda: bytes(obstore.get(self._store, key).bytes()))

    def age_s(self, key: str) -> float | None:
        """None where there is no such object. Raises ObjectStoreUnavailable."""
        try:
            return _age(self._timely(lambda: obstore.head(self._store, key))["last_modified"])
        except Missing:
            return None

    def put(self, key: str, data: bytes) -> None:
        """In place of what is there. Whole or not at all. Raises ObjectStoreUnavailable."""
        self._timely(lambda: obstore.put(self._store, key, data, use_multipart=False))

    def list(self, prefix: str) -> Iterator[Listed]:
        """Raises ObjectStoreUnavailable."""
        pages = iter(obstore.list(self._store, prefix))
        while page := self._timely(lambda: next(pages, None)):
            for found in page:
                yield Listed(found["path"], found["size"], _age(found["last_modified"]))

    def delete(self, keys: Sequence[str]) -> None:
        """Those that are not there are no error. Raises ObjectStoreUnavailable."""
        for start in range(0, len(keys), _DELETE_AT_ONCE):
            some = list(keys[start : start + _DELETE_AT_ONCE])
            try:
                self._timely(lambda some=some: obstore.delete(self._store, some))  # type: ignore[misc]
            except Missing:
                for key in some:  # A folder stops at the first that is gone already.
                    self._delete_one(key)

    def _delete_one(self, key: str) -> None:
        try:
            self._timely(lambda: obstore.delete(self._store, key))
        except Missing:
            return

    def settle(self) -> None:
        """What was put is on disk when this returns, where the store is a folder; any other said so when it answered."""
        if self.folder is None:
            return
        fd = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.syncfs(fd) != 0:
                code = ctypes.get_errno()
                raise ObjectStoreUnavailable("the object store could not be written", detail=os.strerror(code))
        finally:
            os.close(fd)

    def _timely(self, work: Callable[[], T]) -> T:
        """The library has deadlines for what it does over a network, and none for a folder that hangs."""
        try:
            return self._pool.submit(work).result(self.timeout_s)
        except TooLate as error:
            raise ObjectStoreUnavailable("the object store did not answer in time", hint="try again later", reason="timeout") from error
        except (exceptions.NotFoundError, FileNotFoundError) as error:
            raise Missing(str(error)) from error
        except _REFUSED as error:
            raise ObjectStoreUnavailable(
                "the object store refuses this host", hint="check its credentials (AWS_...)", detail=str(error), reason="refused"
            ) from error
        except (exceptions.BaseError, OSError) as error:
            raise ObjectStoreUnavailable(
                "the object store cannot be used just now",
                hint="try again later",
                detail=str(error),
                reason="unreachable",
            ) from error


def absolute(url: str) -> str:
    """The same place, for a process with another working directory."""
    return url if urlsplit(url).scheme else str(Path(url).absolute())


def _folder(url: str) -> Path | None:
    parts = urlsplit(url)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return None if parts.scheme else Path(url)


def _age(modified: datetime.datetime) -> float:
    return (datetime.datetime.now(datetime.UTC) - modified).total_seconds()
