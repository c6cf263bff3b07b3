"""Files for `FakeHost`: a tree in a dictionary. `/dev/null` swallows any amount; `/dev/zero-N` is N zero bytes."""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from pandastack.errors import FileConflict, FileNotFound
from pandastack.wire import patches
from pandastack.wire.diff import ChangeKind, FileChange, FileSide, HostChange
from pandastack.wire.files import ChangeMode, FileEntry, FileEvent
from pandastack.wire.patches import Blob

PIECE_BYTES = 256 << 10
_ZEROS = bytes(PIECE_BYTES)
_DEV_ZERO = re.compile(rb"/dev/zero-(\d{1,15})")


@dataclass
class Node:
    """A file, or a directory where `data` is None. `mode` is a number."""

    data: bytes | None
    mode: int
    owner: str = "root"
    mtime_ns: int = field(default_factory=time.time_ns)


class FakeFiles:
    def __init__(self) -> None:
        self._nodes: dict[bytes, Node] = {path: Node(None, 0o755) for path in (b"/", b"/root", b"/tmp", b"/home", b"/dev")}
        self._nodes[b"/dev/null"] = Node(b"", 0o666)
        self._watchers: list[tuple[bytes, bool, asyncio.Queue[FileEvent]]] = []

    def copied(self) -> FakeFiles:
        """The same files for somebody else; neither sees what the other does from here on."""
        copy = FakeFiles()
        copy._nodes = {path: replace(node) for path, node in self._nodes.items()}
        return copy

    def size(self) -> int:
        """Bytes of all files."""
        return sum(len(node.data) for node in self._nodes.values() if node.data is not None)

    def content(self, path: bytes) -> bytes | None:
        node = self._nodes.get(_clean(path))
        return node.data if node is not None else None

    def differences(self, other: FakeFiles, root: bytes) -> list[HostChange]:
        """What became of the files below `root` in the other tree, each with its patch."""
        root = _clean(root)
        start = root.rstrip(b"/") + b"/"
        names = {path for nodes in (self._nodes, other._nodes) for path in nodes if path == root or path.startswith(start)}
        if not names:
            raise FileNotFound("neither side has this path", path=_text(root))
        found = (_difference(path, path[len(start) :] or path.rpartition(b"/")[2], self, other) for path in sorted(names, key=_parts))
        return [change for change in found if change is not None]

    def stat(self, path: bytes) -> FileEntry:
        path = _clean(path)
        zeros = _DEV_ZERO.fullmatch(path)
        if zeros:
            return _entry(path, Node(b"", 0o444), int(zeros[1]))
        return _entry(path, self._node(path))

    def open(self, path: bytes) -> FileEntry:
        entry = self.stat(path)
        if entry.is_dir:
            raise FileConflict("this is a directory", path=entry.path)
        return entry

    async def pieces(self, path: bytes, offset: int, length: int | None) -> AsyncIterator[bytes]:
        path = _clean(path)
        zeros = _DEV_ZERO.fullmatch(path)
        size = int(zeros[1]) if zeros else len(self.content(path) or b"")
        end = size if length is None else min(size, offset + length)
        data = None if zeros else self.content(path) or b""
        for at in range(offset, end, PIECE_BYTES):
            take = min(PIECE_BYTES, end - at)
            yield data[at : at + take] if data is not None else (_ZEROS if take == PIECE_BYTES else _ZEROS[:take])

    async def write(self, path: bytes, data: AsyncIterator[bytes], *, mode: int | None) -> int:
        path = _clean(path)
        if path == b"/dev/null":
            return sum([len(piece) async for piece in data])
        old = self._nodes.get(path)
        if old is not None and old.data is None:
            raise FileConflict("this is a directory", path=_text(path))
        self._check_parents(path)
        # Collected aside, so that an upload that breaks off leaves the old file.
        whole = b"".join([piece async for piece in data])
        self.make_dir(path.rpartition(b"/")[0] or b"/", parents=True, mode=0o755)
        self._nodes[path] = Node(whole, mode if mode is not None else (old.mode if old else 0o644))
        self._tell("modify" if old else "create", path)
        return len(whole)

    def entries(self, path: bytes) -> list[FileEntry]:
        path = _clean(path)
        if self._node(path).data is not None:
            raise FileConflict("this is not a directory", path=_text(path))
        start = path if path == b"/" else path + b"/"
        inside = [name for name in self._nodes if name != path and name.startswith(start) and b"/" not in name[len(start) :]]
        return [_entry(name, self._nodes[name]) for name in inside]

    def make_dir(self, path: bytes, *, parents: bool, mode: int) -> None:
        path = _clean(path)
        self._check_parents(path)
        node = self._nodes.get(path)
        if node is not None:
            if node.data is not None or not parents:
                raise FileConflict("it exists already", path=_text(path))
            return
        parent = path.rpartition(b"/")[0] or b"/"
        if parent not in self._nodes:
            if not parents:
                raise FileNotFound("the parent directory does not exist", path=_text(parent))
            self.make_dir(parent, parents=True, mode=0o755)
        self._nodes[path] = Node(None, mode)
        self._tell("create", path)

    def move(self, source: bytes, destination: bytes, *, overwrite: bool) -> None:
        source, destination = _clean(source), _clean(destination)
        self._node(source)
        if destination in self._nodes and not overwrite:
            raise FileConflict("the destination exists", path=_text(destination))
        if (destination + b"/").startswith(source + b"/"):
            raise FileConflict("a directory cannot be moved into itself", path=_text(destination))
        if destination.rpartition(b"/")[0] not in (b"", *self._nodes):
            raise FileNotFound("the destination's directory does not exist", path=_text(destination))
        for name in [name for name in self._nodes if name == source or name.startswith(source + b"/")]:
            self._nodes[destination + name[len(source) :]] = self._nodes.pop(name)
        self._tell("move", destination)

    def remove(self, path: bytes, *, recursive: bool) -> None:
        path = _clean(path)
        self._node(path)
        inside = [name for name in self._nodes if name.startswith(path.rstrip(b"/") + b"/")]
        if path == b"/" or (inside and not recursive):
            raise FileConflict("the directory is not empty", path=_text(path))
        for name in [path, *inside]:
            del self._nodes[name]
        self._tell("delete", path)

    def change_mode(self, path: bytes, request: ChangeMode) -> None:
        node = self._node(_clean(path))
        if request.mode is not None:
            node.mode = int(request.mode, 8)
        if request.owner is not None:
            node.owner = request.owner
        self._tell("attrib", _clean(path))

    async def watch(self, path: bytes, *, recursive: bool) -> AsyncIterator[list[FileEvent]]:
        queue: asyncio.Queue[FileEvent] = asyncio.Queue(maxsize=1000)
        watcher = (_clean(path), recursive, queue)
        self._watchers.append(watcher)
        try:
            yield []  # Watching has begun.
            while True:
                events = [await queue.get()]
                while not queue.empty():
                    events.append(queue.get_nowait())
                yield events
        finally:
            self._watchers.remove(watcher)

    def _tell(self, kind: str, path: bytes) -> None:
        for watched, recursive, queue in self._watchers:
            parent = path.rpartition(b"/")[0] or b"/"
            concerned = path == watched or parent == watched or (recursive and path.startswith(watched.rstrip(b"/") + b"/"))
            if concerned and not queue.full():
                queue.put_nowait(FileEvent(type=kind, path=_text(path)))

    def _node(self, path: bytes) -> Node:
        node = self._nodes.get(path)
        if node is None:
            self._check_parents(path)
            raise FileNotFound("no such file or directory", path=_text(path))
        return node

    def _check_parents(self, path: bytes) -> None:
        parent = path.rpartition(b"/")[0]
        while parent:
            node = self._nodes.get(parent)
            if node is not None and node.data is not None:
                raise FileConflict("a part of the path is not a directory", path=_text(parent))
            parent = parent.rpartition(b"/")[0]


def _clean(path: bytes) -> bytes:
    parts: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/" + b"/".join(parts)


def _text(path: bytes) -> str:
    return path.decode("utf-8", "replace")


def _entry(path: bytes, node: Node, size: int | None = None) -> FileEntry:
    raw = path.rpartition(b"/")[2] or b"/"
    name = raw.decode("utf-8", "replace")
    return FileEntry(
        name=name,
        path=_text(path),
        name_b64=None if name.encode() == raw else base64.b64encode(raw).decode(),
        type="directory" if node.data is None else "file",
        is_dir=node.data is None,
        size=size if size is not None else len(node.data or b""),
        mode=f"{node.mode:04o}",
        mtime=node.mtime_ns // 1_000_000_000,
        mtime_ns=node.mtime_ns,
    )


def _parts(path: bytes) -> list[bytes]:
    return path.strip(b"/").split(b"/")


def _difference(path: bytes, name: bytes, one: FakeFiles, two: FakeFiles) -> HostChange | None:
    a, b = one._nodes.get(path), two._nodes.get(path)
    kind: ChangeKind
    if a is None or b is None:
        kind = "added" if a is None else "removed"
    elif (a.data is None) != (b.data is None):
        kind = "type"
    elif a.data != b.data:
        kind = "modified"
    elif (a.mode, a.owner) != (b.mode, b.owner):
        kind = "metadata"
    else:
        return None
    before, after = (None if node is None else _entry(path, node) for node in (a, b))
    text = _text(path)
    change = FileChange(
        path=text,
        path_b64=None if text.encode() == path else base64.b64encode(path).decode(),
        kind=kind,
        before=FileSide(**before.model_dump()) if before else None,
        after=FileSide(**after.model_dump()) if after else None,
    )
    old, new = (Blob(patches.file_mode(node.mode), node.data) if node is not None and node.data is not None else None for node in (a, b))
    return HostChange(change, patches.render(name, old, new))
