"""What crosses the wall between a host and the daemon inside a sandbox: frames, and the shapes of JSON in them.

`guest/PROTOCOL.md` is the text this file follows. Nothing here does I/O. The guest is hostile input: a frame that breaks
the rules, or JSON that is not exactly of the expected shape, raises GuestProtocolError, and memory stays bounded by
constants of this file, never by a number the guest sent.
"""

from __future__ import annotations

import base64
import json
import struct
from enum import IntEnum
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pandastack.errors import GuestProtocolError

VERSION = 1
MAGIC = b"\xf0PANDASTACK\r\n\x1a\x01\xf1"
MAX_PAYLOAD_BYTES = 262_144
MAX_CALL_BYTES = 4 << 20  # Of a call's JSON, which may span several frames.
MAX_DISCARDED_BYTES = 64 << 20  # Of an older session's output, before the guest's greeting must have come.
WINDOW_BYTES = 1 << 20
PADDING = bytes(MAX_PAYLOAD_BYTES + 16)
FLAG_LAST = 1
FLAG_MORE = 2

_HEADER = struct.Struct(">BBHII")
_TRAILER = struct.Struct(">I")
_OFFSET = struct.Struct(">Q")
_OVERHEAD = _HEADER.size + _TRAILER.size


class Kind(IntEnum):
    HELLO = 1
    HELLO_OK = 2
    CALL = 3
    REPLY = 4
    ERROR = 5
    DATA = 6
    CREDIT = 7
    END = 8
    RESET = 9
    EVENT = 10


class Channel(IntEnum):
    BODY = 0
    STDOUT = 1
    STDERR = 2


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes


def encode(kind: Kind, stream: int, payload: bytes | memoryview, tag: int, *, flags: int = 0) -> list[bytes | memoryview]:
    """A frame as buffers for one gathering write, so that a large payload is not copied."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a payload of {len(payload)} bytes")
    return [_HEADER.pack(kind, flags, 0, stream, len(payload)), payload, _TRAILER.pack(tag)]


def encode_json(value: Any) -> bytes:
    """Compact UTF-8. Raises ValueError for text that is no valid Unicode (a lone surrogate) and numbers not finite."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def hello(tag: int, nonce: str, token: str | None = None) -> bytes:
    """Magic and HELLO, as the host sends them."""
    body: dict[str, Any] = {"version": VERSION, "tag": tag, "nonce": nonce}
    if token is not None:
        body["token"] = token
    return MAGIC + b"".join(encode(Kind.HELLO, 0, encode_json(body), tag))


def split_output(payload: bytes) -> tuple[int, memoryview]:
    """The absolute offset and the bytes of a DATA payload on stdout or stderr."""
    if len(payload) <= _OFFSET.size:
        raise GuestProtocolError("an output frame without output")
    return _OFFSET.unpack_from(payload)[0], memoryview(payload)[_OFFSET.size :]


def credit_bytes(payload: bytes) -> int:
    if len(payload) != _TRAILER.size:
        raise GuestProtocolError("a credit frame of the wrong size")
    return int(_TRAILER.unpack(payload)[0])


def encode_credit(count: int) -> bytes:
    return _TRAILER.pack(count)


class FrameDecoder:
    """Cuts the guest's byte stream into frames, in a buffer of fixed size.

    Read into `space()`, report how much with `filled(n)`, and handle the frames it returns. Until the greeting with our
    nonce was seen, bytes are searched for it and otherwise discarded; then each frame must carry the session's tag.
    """

    def __init__(self, tag: int, nonce: str) -> None:
        self._tag = tag
        self._nonce = nonce
        self._buffer = bytearray(2 * (MAX_PAYLOAD_BYTES + _OVERHEAD))
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._discarded = 0
        self.greeting: HelloOk | None = None

    def space(self) -> memoryview:
        """Where to read into; never empty."""
        if self._start and (self._start == self._end or self._end > len(self._buffer) // 2):
            rest = self._end - self._start
            self._buffer[:rest] = self._buffer[self._start : self._end]
            self._start, self._end = 0, rest
        return self._view[self._end :]

    def filled(self, count: int) -> list[Frame]:
        self._end += count
        frames: list[Frame] = []
        if self.greeting is None:
            self._greet()
        if self.greeting is not None:
            while (frame := self._next()) is not None:
                frames.append(frame)
        return frames

    def _next(self, limit: int = MAX_PAYLOAD_BYTES) -> Frame | None:
        available = self._end - self._start
        if available < _HEADER.size:
            return None
        kind, flags, zero, stream, length = _HEADER.unpack_from(self._buffer, self._start)
        if not Kind.HELLO_OK <= kind <= Kind.EVENT or kind == Kind.CALL or zero or length > limit:
            raise GuestProtocolError("the guest sent a frame that is none")
        if available < length + _OVERHEAD:
            return None
        begin = self._start + _HEADER.size
        if _TRAILER.unpack_from(self._buffer, begin + length)[0] != self._tag:
            raise GuestProtocolError("the guest sent a frame of another session")
        self._start = begin + length + _TRAILER.size
        return Frame(kind, flags, stream, bytes(self._view[begin : begin + length]))

    def _greet(self) -> None:
        while self.greeting is None:
            found = self._buffer.find(MAGIC, self._start, self._end)
            if found < 0:
                # A magic may have begun in the last bytes.
                self._discard(max(self._start, self._end - len(MAGIC) + 1))
                return
            self._discard(found)
            self._start = found + len(MAGIC)
            try:
                frame = self._next()
            except GuestProtocolError:
                continue  # A magic inside an older session's output. Go on behind it.
            if frame is None:
                self._start = found
                return
            self._accept(frame, found)

    def _accept(self, frame: Frame, found: int) -> None:
        if frame.stream == 0 and frame.kind == Kind.ERROR:
            raise refusal(parse(GuestFault, frame.payload))
        try:
            greeting = parse(HelloOk, frame.payload) if frame.kind == Kind.HELLO_OK else None
        except GuestProtocolError:
            greeting = None
        if greeting is not None and greeting.nonce == self._nonce:
            self.greeting = greeting
        else:
            self._start = found + len(MAGIC)

    def _discard(self, until: int) -> None:
        self._discarded += until - self._start
        self._start = until
        if self._discarded > MAX_DISCARDED_BYTES:
            raise GuestProtocolError("the guest did not greet")


class GuestShape(BaseModel):
    """Base of what the guest sends: exactly these fields, exactly these types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


ShapeT = TypeVar("ShapeT", bound=GuestShape)


def parse(shape: type[ShapeT], payload: bytes) -> ShapeT:
    """Decode JSON of the guest. Raises GuestProtocolError; its text never repeats what the guest wrote."""
    try:
        return shape.model_validate_json(payload)
    except ValidationError as error:
        raise GuestProtocolError(f"the guest sent a {shape.__name__} that is none", problems=error.error_count()) from None


def refusal(fault: GuestFault) -> GuestProtocolError:
    return GuestProtocolError("the guest refused the session", guest_code=fault.code)


Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Text = Annotated[str, Field(max_length=4096)]
LongText = Annotated[str, Field(max_length=65_536)]


class HelloOk(GuestShape):
    version: Literal[1]
    nonce: Text
    build: Text
    pid: Count
    sealed: bool
    live: Count


class GuestFault(GuestShape):
    """ERROR: `code` is from the list in PROTOCOL.md, `errno` Linux's number."""

    code: Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")]
    message: LongText
    errno: Annotated[int, Field(ge=0, le=4095)] | None = None


class Span(GuestShape):
    """`first` is the oldest offset still kept, `next` the one the next byte gets."""

    first: Count
    next: Count


class Started(GuestShape):
    id: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")]
    pid: Count
    started_unix_ns: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
    pty: bool
    stdout: Span
    stderr: Span


class Exit(GuestShape):
    """How a process ended. Exactly one of `exit_code` and `signal` is set."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")]
    exit_code: Annotated[int, Field(ge=0, le=255)] | None
    signal: Annotated[int, Field(ge=1, le=64)] | None
    reason: Literal["exited", "signaled", "timeout", "killed"]
    stdout_bytes: Count
    stderr_bytes: Count
    duration_ms: Count

    @property
    def code(self) -> int:
        """The exit code as shells show it: 128 + n for a process ended by signal n."""
        if self.exit_code is not None:
            return self.exit_code
        if self.signal is None:
            raise GuestProtocolError("the guest sent an exit without code and signal")
        return 128 + self.signal


class ProcessEntry(Started):
    argv: Annotated[list[LongText], Field(max_length=4096)]
    user: Text
    baked: bool
    warm: bool
    running: bool
    exit: Exit | None


class ProcessBatch(GuestShape):
    processes: Annotated[list[ProcessEntry], Field(max_length=64)]


class OutputSlice(GuestShape):
    offset: Count
    first: Count
    next: Count
    data_b64: Annotated[str, Field(max_length=MAX_PAYLOAD_BYTES)]

    @property
    def data(self) -> bytes:
        return _unbase64(self.data_b64)


class FileStat(GuestShape):
    """A name in a directory. Linux names are bytes: `name_bytes` is exact, `name` is for people."""

    name: Text
    name_b64: Text | None = None
    type: Literal["file", "directory", "symlink", "other"]
    size: Count
    mode: Annotated[int, Field(ge=0, le=0o7777)]
    mtime_ns: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
    uid: Count
    gid: Count
    target: LongText | None = None
    target_b64: LongText | None = None

    @property
    def name_bytes(self) -> bytes:
        return _unbase64(self.name_b64) if self.name_b64 is not None else self.name.encode()


class FileBatch(GuestShape):
    entries: Annotated[list[FileStat], Field(max_length=4096)]


# Linux's PATH_MAX; the base64 of so much is a third longer.
Name = Annotated[str, Field(max_length=4096)]
Name64 = Annotated[str, Field(max_length=5464)]


class Scanned(GuestShape):
    """An entry of a tree; `path_bytes` is relative to its root, which itself is empty.

    `pristine`: a file of the image that was never written to. Times alone do not tell: see `file.scan` in PROTOCOL.md.
    """

    path: Name
    path_b64: Name64 | None = None
    type: Literal["file", "directory", "symlink", "other"]
    size: Count
    mode: Annotated[int, Field(ge=0, le=0o7777)]
    uid: Count
    gid: Count
    mtime_ns: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
    ctime_ns: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
    pristine: bool
    target: Name | None = None
    target_b64: Name64 | None = None

    @property
    def path_bytes(self) -> bytes:
        return _unbase64(self.path_b64) if self.path_b64 is not None else self.path.encode()

    @property
    def target_bytes(self) -> bytes:
        return _unbase64(self.target_b64) if self.target_b64 is not None else (self.target or "").encode()


class ScanBatch(GuestShape):
    entries: Annotated[list[Scanned], Field(max_length=4096)]


class DigestBatch(GuestShape):
    """SHA-256 in hex, in the order of the paths; None for what is no file (any more)."""

    digests: Annotated[list[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None], Field(max_length=1000)]


class WatchEvent(GuestShape):
    type: Literal["create", "modify", "attributes", "delete", "move_from", "move_to"]
    path: LongText
    path_b64: LongText | None = None
    directory: bool

    @property
    def path_bytes(self) -> bytes:
        return _unbase64(self.path_b64) if self.path_b64 is not None else self.path.encode()


class WatchBatch(GuestShape):
    """After `overflow` events were lost: list again."""

    events: Annotated[list[WatchEvent], Field(max_length=4096)]
    overflow: bool


class IdentityStep(GuestShape):
    ok: bool
    detail: LongText


class IdentityReport(GuestShape):
    """`offset_ns` is the guest's clock minus the host's before it was set."""

    steps: dict[Annotated[str, Field(max_length=64)], IdentityStep]
    offset_ns: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class Health(GuestShape):
    """`live` counts running processes that are not baked; `idle_ms` is 0 while there are any.

    A machine that is `sealed` refuses calls, one that is `frozen`, too, lets them wait; its processes are stopped.
    """

    version: Count
    build: Text
    uptime_ms: Count
    sealed: bool
    frozen: bool
    live: Count
    baked: Count
    idle_ms: Count


class Resources(GuestShape):
    memory_total_bytes: Count
    memory_available_bytes: Count
    cpu_seconds: Annotated[float, Field(ge=0)]
    load_1m: Annotated[float, Field(ge=0)]
    disk_total_bytes: Count
    disk_free_bytes: Count
    processes: Count


class Port(GuestShape):
    port: Annotated[int, Field(ge=0, le=65_535)]
    address: Text
    pid: Count | None


class Ports(GuestShape):
    ports: Annotated[list[Port], Field(max_length=1024)]


class Activity(GuestShape):
    type: Literal["activity"]
    live: Count


class Empty(GuestShape):
    pass


class Bytes(GuestShape):
    bytes: Count


class Sent(GuestShape):
    sent: Count


class Created(GuestShape):
    created: bool


class Counted(GuestShape):
    count: Count


class Sealed(GuestShape):
    """`live` as in Health; `frozen` is the number of processes that were stopped."""

    live: Count
    frozen: Count


class Continued(GuestShape):
    continued: Count


def _unbase64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise GuestProtocolError("the guest sent base64 that is none") from None
