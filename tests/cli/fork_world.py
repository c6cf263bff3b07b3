"""Sandboxes in memory that play the part of `fork_witness.py`, well or, for each promise, badly."""

from __future__ import annotations

import copy
import json
import secrets
import time
from typing import Any

from pandastack.sdk.calls.call import Answer, Request
from pandastack.sdk.testing import answer
from sdk.world import World, says

ENTRY = {"name": "x", "path": "/x", "is_dir": False, "size": 1, "mode": "0644", "mtime": 1}
PROCESS = {"id": "p1", "pid": 7, "command": "python3", "running": True, "started_at": "now"}


class ForkWorld(World):
    """`broken` is a promise that is not kept; `inside` is what is in each sandbox."""

    def __init__(self, broken: str = "") -> None:
        super().__init__(self.execute)
        self.broken = broken
        self.inside: dict[str, dict[str, Any]] = {}
        self.ended: list[str] = []
        self.commands: list[str] = []
        self.has_python = True

    def _answer(self, request: Request, verb: str, parts: list[str], body: dict[str, Any]) -> Answer:
        if request.path == "/templates":
            return answer([{"name": "base", "actual": "base", "state": "ready"}])
        if verb in ("PUT fs", "POST fs"):
            return answer({**ENTRY, "bytes": 1})
        if verb == "GET fs":
            return answer(ENTRY) if self.has_python else answer({"error": "no such file", "code": "file_not_found"}, 404)
        if verb == "POST processes" and len(parts) == 3:
            self.inside[parts[1]] = {
                "secret": secrets.token_hex(16),
                "ticks": 1,
                "value": "",
                "pid": 7,
                "files": {},
                **self.identity(parts[1]),
            }
            return answer(PROCESS, 201)
        if "processes" in verb:
            if parts[-1] == "signal":
                self.ended.append(parts[1])
            if "output" in parts:
                return answer(b"sh: python3: not found\n")
            return answer({**PROCESS, "running": self.has_python})
        return super()._answer(request, verb, parts, body)

    def identity(self, sandbox_id: str) -> dict[str, Any]:
        return {"hostname": sandbox_id, "machine_id": secrets.token_hex(16), "sandbox_id": sandbox_id, "listening": True, "ahead_s": 0.0}

    def _fork(self, parent: dict[str, Any], body: dict[str, Any], key: str) -> Answer:
        if self.broken == "fork of a fork" and "fork_parent_id" in parent:
            return answer({"error": "it failed", "code": "runtime_failed"}, 500)
        known = set(self.sandboxes)
        found = super()._fork(parent, body, key)
        for child in set(self.sandboxes) - known:
            inside = copy.deepcopy(self.inside[parent["id"]])
            inside.update(self.identity(child))
            self._spoil(inside, parent["id"], child)
            self.inside[child] = inside
        return found

    def _spoil(self, inside: dict[str, Any], parent_id: str, child: str) -> None:
        parent = self.inside[parent_id]
        spoilt: dict[str, dict[str, Any]] = {
            "memory is carried over": {"secret": secrets.token_hex(16)},
            "memory diverges": {"shared": True},
            "files are carried over": {"files": {"early": inside["files"].get("early")}},
            "writes stay where they are made": {"files": parent["files"]},
            "hostname": {"hostname": parent["hostname"]},
            "/etc/machine-id": {"machine_id": parent["machine_id"]},
            "PANDASTACK_SANDBOX_ID": {"sandbox_id": parent_id},
            "clock": {"ahead_s": -5.0},
            "listener": {"listening": False},
        }
        inside.update(spoilt.get(self.broken, {}))
        if self.broken == "parent goes on":
            parent["pid"] = 8

    def execute(self, sandbox: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        inside, argv = self.inside.get(sandbox["id"], {"files": {}}), body["argv"]
        self.commands.append(" ".join(argv))
        if argv[0] == "sh":
            name = argv[2].rpartition("/")[2].split(";")[0]
            inside["files"][name] = argv[2].split("'")[1]
        elif argv[0] == "rm":
            inside["files"].clear()
        elif "-c" in argv:
            return says(f"{time.time() + inside['ahead_s']}\n")
        elif argv[2] == "tell":
            for other in self.inside.values() if inside.get("shared") else ():
                other["value"] = argv[4]
            inside["value"] = argv[4]
            inside["files"][argv[4]] = argv[4]
        else:
            return says(json.dumps(self.probe(inside)))
        return says()

    def probe(self, inside: dict[str, Any]) -> dict[str, Any]:
        inside["ticks"] += 1
        gone_bad = self.broken == "children can be deleted" and any("DELETE" in verb for verb in self.verbs())
        return {
            "errors": {"memory": "ConnectionRefusedError"} if gone_bad else {},
            "memory": None if gone_bad else {name: inside[name] for name in ("secret", "ticks", "value", "pid")} | {"longest_gap_ms": 12},
            "waiting": "00" * 16 if self.broken == "randomness of a process that waited" else secrets.token_hex(16),
            "fresh": "00" * 16 if self.broken == "randomness of a fresh process" else secrets.token_hex(16),
            "listener": inside["secret"] if inside["listening"] else None,
            "files": dict(inside["files"]),
            **{name: inside[name] for name in ("hostname", "machine_id", "sandbox_id")},
        }
