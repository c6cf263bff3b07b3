"""Files of the in-memory guest: a dictionary from absolute paths, as bytes, to nodes. Plain data."""

from __future__ import annotations

import base64
import hashlib
import posixpath
import time
from typing import Any

Node = dict[str, Any]  # type, data, mode, uid, gid, mtime_ns

_ERRNO = {"not_found": 2, "not_executable": 2, "exists": 17, "not_a_directory": 20, "is_a_directory": 21, "no_space": 28, "not_empty": 39}
_USERS = {"root": 0, "daemon": 1, "nobody": 65534}


class Fault(Exception):
    """What the guest refuses, with a code of the protocol."""

    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(message or code.replace("_", " "))
        self.code = code
        self.errno = _ERRNO.get(code)


def node(kind: str, mode: int, data: bytes = b"") -> Node:
    return {"type": kind, "data": data, "mode": mode, "uid": 0, "gid": 0, "mtime_ns": time.time_ns()}


def path(params: dict[str, Any], name: str = "path") -> bytes:
    raw = base64.b64decode(params[f"{name}_b64"]) if f"{name}_b64" in params else params[name].encode()
    if not raw.startswith(b"/") or b"\0" in raw:
        raise Fault("invalid", "a path must be absolute")
    clean: bytes = posixpath.normpath(raw)
    return clean[1:] if clean.startswith(b"//") else clean


class Files:
    """`nodes` is the state; `limit_bytes` what the machine's disk holds; `changes` what watchers have not been told yet."""

    def __init__(self, nodes: dict[bytes, Node], limit_bytes: int) -> None:
        self.nodes = nodes or {name: node("directory", 0o755) for name in (b"/", b"/root", b"/tmp", b"/etc")}
        self._limit_bytes = limit_bytes
        self.changes: list[tuple[str, bytes]] = []

    def find(self, where: bytes, kind: str | None = None) -> Node:
        found = self.nodes.get(where)
        if found is None:
            raise Fault("not_found")
        if kind is not None and found["type"] != kind:
            raise Fault("not_a_directory" if kind == "directory" else "is_a_directory")
        return found

    def stat(self, where: bytes) -> dict[str, Any]:
        found, raw = self.find(where), posixpath.basename(where) or b"/"
        stat = {name: found[name] for name in ("type", "mode", "uid", "gid", "mtime_ns")}
        name = raw.decode("utf-8", "replace")
        exact = {} if name.encode() == raw else {"name_b64": base64.b64encode(raw).decode()}
        return {**stat, **exact, "name": name, "size": len(found["data"])}

    def children(self, where: bytes) -> list[bytes]:
        self.find(where, "directory")
        return [one for one in self.nodes if one != where and posixpath.dirname(one) == where]

    def below(self, where: bytes) -> list[bytes]:
        return [one for one in self.nodes if one == where or one.startswith(where.rstrip(b"/") + b"/")]

    def scan(self, where: bytes) -> list[dict[str, Any]]:
        """The tree below, in the order of the paths' parts. Every file counts as written to."""
        self.find(where)
        found = []
        for one in sorted(self.below(where), key=lambda one: one.split(b"/")):
            raw = one[len(where) :].lstrip(b"/")
            entry = {name: value for name, value in self.stat(one).items() if not name.startswith("name")}
            text = raw.decode("utf-8", "replace")
            exact = {} if text.encode() == raw else {"path_b64": base64.b64encode(raw).decode()}
            found.append({**entry, **exact, "path": text, "ctime_ns": entry["mtime_ns"], "pristine": False})
        return found

    def digest(self, where: bytes) -> str | None:
        found = self.nodes.get(where)
        return hashlib.sha256(found["data"]).hexdigest() if found is not None and found["type"] == "file" else None

    def check_room(self, size: int) -> None:
        if sum(len(one["data"]) for one in self.nodes.values()) + size > self._limit_bytes:
            raise Fault("no_space", "no space left on device")

    def write(self, where: bytes, data: bytes, *, parents: bool = True) -> Node:
        """Replace a file at once; mode and owner of an older one stay."""
        if where in self.nodes:
            self.find(where, "file")
        self.check_room(len(data))
        self.mkdir(posixpath.dirname(where), parents=parents, mode=0o755, must_be_new=False)
        found = self.nodes.setdefault(where, node("file", 0o644))
        found.update(data=data, mtime_ns=time.time_ns())
        self.changes.append(("modify", where))
        return found

    def mkdir(self, where: bytes, *, parents: bool, mode: int, must_be_new: bool = True) -> bool:
        if where in self.nodes:
            if must_be_new and not parents:
                raise Fault("exists")
            self.find(where, "directory")
            return False
        parent = posixpath.dirname(where)
        if not parents and (parent not in self.nodes or not must_be_new):
            raise Fault("not_found")
        self.mkdir(parent, parents=parents, mode=0o755, must_be_new=False)
        self.nodes[where] = node("directory", mode)
        self.changes.append(("create", where))
        return True

    def move(self, source: bytes, target: bytes, *, overwrite: bool) -> None:
        self.find(source)
        self.find(posixpath.dirname(target), "directory")
        if target in self.nodes:
            if not overwrite:
                raise Fault("exists")
            self.remove(target, recursive=False)
        for one in self.below(source):
            self.nodes[target + one[len(source) :]] = self.nodes.pop(one)
        self.changes += [("move_from", source), ("move_to", target)]

    def remove(self, where: bytes, *, recursive: bool) -> None:
        gone = self.below(where)
        self.find(where)
        if len(gone) > 1 and not recursive:
            raise Fault("not_empty")
        for one in gone:
            del self.nodes[one]
        self.changes.append(("delete", where))

    def chmod(self, where: bytes, mode: int | None, owner: str | None, *, recursive: bool = False) -> None:
        self.find(where)
        given: Node = {} if mode is None else {"mode": mode & 0o7777}
        for field, name in zip(("uid", "gid"), (owner.split(":") * 2)[:2] if owner else (), strict=False):
            if not name.isdigit() and name not in _USERS:
                raise Fault("unknown_user")
            given[field] = int(name) if name.isdigit() else _USERS[name]
        for one in self.below(where) if recursive else [where]:
            self.nodes[one].update(given)
        self.changes.append(("attributes", where))
