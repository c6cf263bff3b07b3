"""A server in memory that knows sandboxes, forks and snapshots; for what the SDK does when things go wrong half-way."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from pandastack.sdk.calls.call import Answer, Request
from pandastack.sdk.client import AsyncClient, Client
from pandastack.sdk.testing import AsyncMemoryTransport, MemoryTransport, Streamed, answer

Exec = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


def says(stdout: str = "", exit_code: int = 0, stderr: str = "") -> dict[str, Any]:
    return {"stdout": stdout, "stderr": stderr, "exit_code": exit_code, "duration_ms": 1}


class World:
    """`run(sandbox, body)` answers an exec; `before[verb]` is called before a verb is done, and may wait or raise."""

    def __init__(self, run: Exec | None = None) -> None:
        self.run = run or (lambda sandbox, body: says())
        self.before: dict[str, Callable[[], None]] = {}
        self.after: dict[str, Callable[[], Any]] = {}
        self.sandboxes: dict[str, dict[str, Any]] = {}
        self.snapshots: dict[str, dict[str, Any]] = {}
        self.asked: list[tuple[str, str, Any]] = []
        self.answers: dict[str, list[dict[str, Any]]] = {}
        self._ids = itertools.count(1)
        self._lock = threading.Lock()

    def make(self, **facts: Any) -> dict[str, Any]:
        made = {"status": "running", "metadata": {}, "ttl_seconds": 3600, **facts, "id": f"s{next(self._ids)}"}
        self.sandboxes[made["id"]] = made
        return made

    def verbs(self) -> list[str]:
        return [verb for verb, _, _ in self.asked]

    def __call__(self, request: Request) -> Answer | Streamed:
        body = json.loads(request.body) if request.body and request.content_type == "application/json" else {}
        parts = [part for part in re.split(r"[/?]", request.path) if part]
        verb = f"{request.method} {parts[2] if len(parts) > 2 else parts[0]}"
        self.asked.append((verb, parts[1] if len(parts) > 1 else "", body))
        self.before.get(verb, lambda: None)()
        found = self._answer(request, verb, parts, body)
        return self.after.get(verb, lambda: None)() or found

    def _answer(self, request: Request, verb: str, parts: list[str], body: dict[str, Any]) -> Answer:
        if parts[0] == "snapshots":
            return self._snapshot(request, parts)
        if len(parts) == 1 or parts[1].startswith(("metadata=", "status=", "limit=")):
            # Filters are ignored, as older servers do.
            return answer(list(self.sandboxes.values())) if request.method == "GET" else answer(self.make(**body), 201)
        sandbox = self.sandboxes.get(parts[1])
        if sandbox is None:
            return answer({"error": "no such sandbox", "code": "sandbox_not_found"}, 404)
        name = verb.split()[1]
        with self._lock:
            if request.method == "DELETE":
                del self.sandboxes[sandbox["id"]]
                return answer(status=204)
            if name in ("fork", "fork-tree"):
                return self._fork(sandbox, body, request.headers["idempotency-key"])
            if name in ("pause", "resume"):
                sandbox["status"] = {"pause": "paused", "resume": "running"}[name]
                return answer(status=204)
            if name in ("hibernate", "wake"):
                sandbox["status"] = {"hibernate": "hibernated", "wake": "running"}[name]
                return answer({"status": sandbox["status"]})
            if name == "snapshots":
                made = {"id": f"snap{next(self._ids)}", "sandbox_id": sandbox["id"], "status": "durable", "size_bytes": 5 << 20}
                self.snapshots[made["id"]] = made
                return answer({**made, "mem_path": "", "state_path": ""}, 201)
            if name == "promote":
                return self._promote(sandbox, body)
            if name == "history":
                return answer({"points": [{"cause": "request", **made} for made in self.snapshots.values()]})
            if name == "restore":
                if body["point"] not in self.snapshots:
                    return answer({"error": "no such snapshot", "code": "snapshot_not_found", "field": "point"}, 400)
                sandbox["status"] = "running"
                return answer({**sandbox, "undo_point": f"snap{next(self._ids)}" if body.get("undo", True) else None})
            if name == "lifecycle":
                sandbox.update({key: value for key, value in body.items() if key != "keep_awake_seconds"})
                facts = {"ttl_seconds": sandbox["ttl_seconds"], "persistent": bool(sandbox.get("persistent")), "idle_seconds": 0}
                policy = sandbox.get("checkpoints")
                return answer({**facts, "checkpoints": None if policy in (None, "off") else {"keep": 20, "max_mb": 4096, **policy}})
        if name == "exec":
            found = self.run(sandbox, body)
            if sandbox["id"] not in self.sandboxes:
                return answer({"error": "the sandbox is gone", "code": "guest_gone"}, 502)
            return answer(found)
        return answer(sandbox)

    def _fork(self, parent: dict[str, Any], body: dict[str, Any], key: str) -> Answer:
        tree_id = f"t{next(self._ids)}"
        if key not in self.answers:
            origin = {"fork_parent_id": parent["id"], "fork_tree_id": tree_id}
            metadata = {**parent["metadata"], **body.get("metadata", {}), **origin}
            self.answers[key] = [self.make(**{**parent, **origin, "metadata": metadata}) for _ in range(body.get("count", 1))]
        children = self.answers[key]
        return answer({"sandbox": children[0], "children": children, "tree_id": tree_id, "parent_id": parent["id"], "at": "now"}, 201)

    def _promote(self, winner: dict[str, Any], body: dict[str, Any]) -> Answer:
        tree_id = body.get("tree_id") or winner.get("fork_tree_id")
        siblings = [one["id"] for one in self.sandboxes.values() if one.get("fork_tree_id") == tree_id and one is not winner]
        for sibling in siblings if body["cleanup_siblings"] else ():
            del self.sandboxes[sibling]
        return answer({"winner": winner["id"], "tree_id": tree_id, "deleted": siblings if body["cleanup_siblings"] else [], "failures": {}})

    def _snapshot(self, request: Request, parts: list[str]) -> Answer:
        if len(parts) == 1 or parts[1].startswith("sandbox_id="):
            return answer({"snapshots": list(self.snapshots.values())})
        if parts[1] not in self.snapshots:
            return answer({"error": "no such snapshot", "code": "snapshot_not_found"}, 404)
        if request.method == "DELETE":
            del self.snapshots[parts[1]]
            return answer(status=204)
        if parts[2:] == ["offload"]:
            self.snapshots[parts[1]]["location"] = "store"
        return answer(self.snapshots[parts[1]])

    def client(self, **options: Any) -> Client:
        return Client("http://api", "key", transport=MemoryTransport(self), **options)

    def async_client(self, **options: Any) -> AsyncClient:
        return AsyncClient("http://api", "key", transport=_Patient(self), **options)


class _Patient(AsyncMemoryTransport):
    """Handles every request in a thread, so that `before` may block as a slow server does."""

    @asynccontextmanager
    async def open(self, request: Request) -> AsyncIterator[Streamed]:
        self.requests.append(request)
        found = await asyncio.to_thread(self._handler, request)
        yield found if isinstance(found, Streamed) else Streamed([found.body], found.status, found.headers)
