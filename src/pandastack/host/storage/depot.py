"""Files of saved states in the object store: put there as chunks, and what nothing refers to any more taken away.

    snapshots/<install>/<id>    what the files of a state consist of; written before its first chunk, removed when it is deleted
    chunks/ab/ab12...           see `chunks`
    orders/<index>              in which order a file was read the first time; see `lazy_server`
    sweeps/<number>             a sweep is under way

A sweep may never take a chunk that an upload, here or on another host, has just found there and relies on. So an upload writes its
reference first, then waits until every sweep that began before is over, and only then looks what is there; a sweep announces itself
before it reads the references, and takes nothing away later than `SWEEP_S` after that. A chunk younger than the grace time is left alone.
Calls block.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from pandastack.errors import ObjectStoreUnavailable, RuntimeFailed
from pandastack.host.storage import chunks
from pandastack.host.storage.chunks import Index
from pandastack.host.storage.objects import Missing, Objects

log = structlog.get_logger(__name__)

SWEEP_S = 60.0
GRACE_S = 3600.0
_CLOCKS_DIFFER_S = 60.0
_LOOK_S = 0.5
_UPLOADING = 6
_DELETE_AT_ONCE = 100
ORDERS = "orders/"
_REFERENCES, _SWEEPS = "snapshots/", "sweeps/"


class Kept(BaseModel):
    """The files of a state that are in the object store."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    files: dict[str, Index]


class Depot:
    """What this install keeps in `objects`; others may use the same store."""

    def __init__(self, objects: Objects, install: str) -> None:
        self._objects = objects
        self._own = f"{_REFERENCES}{install}/"
        self._uploading: set[str] = set()
        self._known: dict[str, Kept] = {}  # References never change.
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def putting(self, name: str) -> Iterator[None]:
        """While the block runs no sweep takes the reference of that name away. Long enough for the caller to make it known."""
        with self._lock:
            self._uploading.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._uploading.discard(name)

    def put(self, name: str, files: Mapping[str, Path], *, stopped: Callable[[], bool] = lambda: False) -> Kept:
        """Put files there, and a reference to them under that name; chunks that are there already are not sent again.

        To be called inside `putting`. Raises ObjectStoreUnavailable, OSError; the next sweep removes what is left then. `stopped`
        is asked again and again.
        """
        with ThreadPoolExecutor(_UPLOADING, thread_name_prefix="upload") as pool:
            kept = Kept(files={file: chunks.index_of(path, pool) for file, path in files.items()})
            self._objects.put(self._own + name, kept.model_dump_json().encode())
            self._wait_for_sweeps()
            sent: set[str] = set()
            for file, path in files.items():
                self._upload(path, kept.files[file], sent, pool, stopped)
        self._objects.settle()
        return kept

    def _wait_for_sweeps(self) -> None:
        while any(found.age_s < SWEEP_S + _CLOCKS_DIFFER_S for found in self._objects.list(_SWEEPS)):
            time.sleep(_LOOK_S)

    def _upload(self, path: Path, index: Index, sent: set[str], pool: ThreadPoolExecutor, stopped: Callable[[], bool]) -> None:
        places = {digest: number for number, digest in enumerate(index.chunks) if digest is not None and digest not in sent}
        sent.update(places)
        with path.open("rb") as file:

            def upload(digest: str) -> None:
                if stopped():
                    raise ObjectStoreUnavailable("the upload was given up")
                if self._objects.age_s(chunks.key(digest)) is not None:
                    return
                data = chunks.read_at(file.fileno(), places[digest], index.size)
                if data is None or chunks.digest_of(data) != digest:
                    raise RuntimeFailed("a file of a saved state changed while it was put into the object store")
                self._objects.put(chunks.key(digest), data)

            for _ in pool.map(upload, places):
                pass

    def remove(self, name: str) -> None:
        """Forget a state; its chunks go with the next sweep after the grace time, if nothing else refers to them."""
        self._objects.delete([self._own + name])

    # Sweeping

    def sweep(self, known: Callable[[], Collection[str]], in_use: Callable[[], Collection[str]], *, grace_s: float = GRACE_S) -> int:
        """Take away own references to states that are not `known` and of which no index is `in_use`, then the chunks, of
        whomever, that no reference names. Returns how many chunks. Raises ObjectStoreUnavailable.
        """
        self._drop_references(known, in_use)
        announced = f"{_SWEEPS}{secrets.token_hex(8)}"
        self._objects.put(announced, b"")
        ends = time.monotonic() + SWEEP_S
        try:
            old = [found.key for found in self._objects.list(chunks.PREFIX) if found.age_s > grace_s]
            orders = [found.key for found in self._objects.list(ORDERS) if found.age_s > grace_s]
            needed = self._references()
            if needed is None:
                return 0
            named = {digest for kept in needed for index in kept.files.values() for digest in index.stored}
            indexes = {index.digest for kept in needed for index in kept.files.values()}
            gone = [key for key in old if chunks.name_of(key) not in named]
            gone_orders = [key for key in orders if chunks.name_of(key) not in indexes]
            removed = 0
            for some in _batches(gone + gone_orders):
                # A request may take its own time; whatever is left then, the next sweep finds again.
                if time.monotonic() > ends - self._objects.timeout_s:
                    break
                self._objects.delete(some)
                removed += len(some)
            return min(removed, len(gone))
        finally:
            self._objects.delete([announced, *self._forgotten_sweeps()])

    def _drop_references(self, known: Callable[[], Collection[str]], in_use: Callable[[], Collection[str]]) -> None:
        found = [one.key for one in self._objects.list(self._own)]
        # Asked after the list: what was being put when it was made is known, or being put, by now.
        with self._lock:
            kept = {*known(), *self._uploading}
        used = set(in_use())
        for key in found:
            if chunks.name_of(key) in kept:
                continue
            reference = self._reference(key)
            if reference is None or not used.intersection(index.digest for index in reference.files.values()):
                self._objects.delete([key])

    def _references(self) -> list[Kept] | None:
        """Of every install. None where one cannot be read: then nobody knows what is needed."""
        keys = [found.key for found in self._objects.list(_REFERENCES)]
        self._known = {key: kept for key, kept in self._known.items() if key in set(keys)}
        references = []
        for key in keys:
            try:
                references.append(self._known.get(key) or self._read(key))
            except Missing:
                continue  # Deleted just now.
            except ValidationError as error:
                log.error("a reference in the object store cannot be read; nothing is swept", key=key, error=str(error))
                return None
        return references

    def _reference(self, key: str) -> Kept | None:
        try:
            return self._known.get(key) or self._read(key)
        except (Missing, ValidationError):
            return None

    def _read(self, key: str) -> Kept:
        kept = self._known[key] = Kept.model_validate_json(self._objects.get(key))
        return kept

    def _forgotten_sweeps(self) -> list[str]:
        return [found.key for found in self._objects.list(_SWEEPS) if found.age_s > SWEEP_S + 2 * _CLOCKS_DIFFER_S]


def _batches(keys: list[str]) -> list[list[str]]:
    return [keys[start : start + _DELETE_AT_ONCE] for start in range(0, len(keys), _DELETE_AT_ONCE)]
