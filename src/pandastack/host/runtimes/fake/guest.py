"""The in-memory guest daemon: answers `guest/PROTOCOL.md` on one end of a socket pair.

It is driven from outside (`receive`, `turn`, `out`) and has no thread, clock or descriptor of its own. `save` gives its
state as the text of a Python literal, and a guest made from that text goes on where the other one was.
"""

from __future__ import annotations

import ast
import base64
import json
import posixpath
import re
import secrets
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from pandastack.errors import GuestError, GuestGone, GuestProtocolError, GuestTimeout, PandastackError
from pandastack.host.runtimes.base import Limits
from pandastack.host.runtimes.fake import shell
from pandastack.host.runtimes.fake.files import Fault, Files, path
from pandastack.host.runtimes.fake.shell import RING_BYTES, Job, Process
from pandastack.wire import guest as wire
from pandastack.wire.guest import Kind

_HEADER = struct.Struct(">BBHII")
_PIECE_BYTES = 64 << 10
_BACKLOG_BYTES = 512 << 10
_ACTIVITY_DELAY_S = 0.02
_STEPS = ("entropy", "clock", "hostname", "machine_id", "boot_id", "disk", "env", "token", "hooks", "processes")
_ABOUT_SEALS = ("machine.health", "machine.seal", "machine.unseal", "machine.identity", "machine.rehearse")
_ADMITTED = (*_ABOUT_SEALS, "file.scan", "file.digests", "file.read")
_HOOKS = b"/etc/pandastack/hooks/"

Params = dict[str, Any]


@dataclass
class _Call:
    """An open stream. `pump` sends what it can of a long answer; `finish` is called when the host has sent its last byte.

    `held` is what the host sent after a call that waits for the end of a freeze; None while it does not wait.
    """

    id: int
    params: Params
    head: bytes = b""
    body: bytearray = field(default_factory=bytearray)
    credit: int = wire.WINDOW_BYTES
    at: dict[int, int] = field(default_factory=lambda: {1: 0, 2: 0})
    process: Process | None = None
    pump: Callable[[], None] | None = None
    finish: Callable[[], Params] | None = None
    held: list[tuple[int, bytes]] | None = None


class FakeGuest:
    """`fault` is asked before each step (`hello`, or a method) whether it is to fail; `cpu_s` only grows."""

    def __init__(self, limits: Limits, fault: Callable[[str], PandastackError | None], saved: str | None = None) -> None:
        state: Params = ast.literal_eval(saved) if saved else {
            "sealed": False, "frozen_at": None, "hostname": "sandbox", "env": {}, "saved_at": 0.0,
        }  # fmt: skip
        self.sealed: bool = state["sealed"]
        self.frozen_at: float | None = state["frozen_at"]
        self.hostname: str = state["hostname"]
        self.env: dict[str, str] = state["env"]
        self.files = Files(state.get("files", {}), limits.disk_mib << 20)
        self.processes: dict[str, Process] = {}
        self.out = bytearray()
        self.cpu_s = 0.0
        self._limits, self._fault = limits, fault
        self._born = self._last_call = now = time.monotonic()
        self._in = bytearray()
        self._tag: int | None = None
        self._calls: dict[int, _Call] = {}
        self._told, self._tell_at = False, 0.0
        if self.frozen_at is not None:
            self.frozen_at += now - state["saved_at"]
        self._world = shell.World(self._read_text_path, self._write_text_path, lambda: self.hostname, self._may_write)
        for one in state.get("processes", ()):
            process = Process(**one | {"jobs": [Job(**job) for job in one["jobs"]]})
            process.began += now - state["saved_at"]  # Clocks of a process stand still while it is only saved.
            if process.deadline is not None:
                process.deadline += now - state["saved_at"]
            for job in process.jobs:
                job.wake += now - state["saved_at"]
            self.processes[process.id] = process

    def save(self) -> str:
        state: Params = {"sealed": self.sealed, "frozen_at": self.frozen_at, "hostname": self.hostname, "env": self.env}
        return repr(
            state | {"saved_at": time.monotonic(), "files": self.files.nodes, "processes": [asdict(one) for one in self.processes.values()]}
        )

    def _read_text_path(self, where: str) -> bytes | None:
        found = self.files.nodes.get(where.encode())
        return found["data"] if found and found["type"] == "file" else None

    def _write_text_path(self, where: str, data: bytes, append: bool) -> None:
        self.files.write(where.encode(), ((self._read_text_path(where) or b"") if append else b"") + data)

    def _followers(self, process: Process) -> Iterator[_Call]:
        return (call for call in self._calls.values() if call.process is process)

    def _may_write(self, process: Process, channel: int) -> bool:
        return all(process.next(channel) - call.at[channel] < RING_BYTES // 2 for call in self._followers(process))

    # The session.

    def receive(self, data: bytes) -> None:
        self._in += data
        while (frame := self._next_frame()) is not None:
            self._handle(*frame)

    def _next_frame(self) -> tuple[int, int, int, bytes] | None:
        while True:
            try:
                if self._tag is not None:
                    kind, flags, stream, payload, tag = self._cut(0)
                    if tag != self._tag or kind == Kind.HELLO:
                        raise ValueError("a frame of another session")
                    return kind, flags, stream, payload
                at = self._in.find(wire.MAGIC)
                if at < 0:
                    del self._in[: max(0, len(self._in) - len(wire.MAGIC) + 1)]
                    return None
                del self._in[:at]
                self._hello(*self._cut(len(wire.MAGIC)))
            except IndexError:
                return None  # Not all of it has come yet.
            except ValueError:
                self._tag = None
                self._calls.clear()
                del self._in[:1]

    def _cut(self, at: int) -> tuple[int, int, int, bytes, int]:
        if len(self._in) < at + _HEADER.size:
            raise IndexError
        kind, flags, zero, stream, length = _HEADER.unpack_from(self._in, at)
        if not Kind.HELLO <= kind <= Kind.EVENT or zero or length > wire.MAX_PAYLOAD_BYTES:
            raise ValueError("a bad header")
        end = at + _HEADER.size + length
        if len(self._in) < end + 4:
            raise IndexError
        payload, tag = bytes(self._in[at + _HEADER.size : end]), int.from_bytes(self._in[end : end + 4], "big")
        del self._in[: end + 4]
        return kind, flags, stream, payload, tag

    def _hello(self, kind: int, _flags: int, _stream: int, payload: bytes, tag: int) -> None:
        hello = json.loads(payload) if kind == Kind.HELLO else {}
        if hello.get("tag") != tag:
            return
        self._tag = tag
        self._calls.clear()
        self.out.clear()
        fault = self._fault("hello")
        if isinstance(fault, GuestTimeout):
            return
        self._told = self.live > 0
        ok = {"version": wire.VERSION, "nonce": hello["nonce"], "build": "fake", "pid": 1, "sealed": self.sealed, "live": self.live}
        self.out += wire.MAGIC
        self._send(Kind.HELLO_OK, 0, wire.encode_json(ok))
        self._misbehave(fault)

    def _misbehave(self, fault: PandastackError | None) -> None:
        if isinstance(fault, GuestGone):
            raise fault
        if isinstance(fault, GuestProtocolError):
            self.out += b"\xff" * 64

    def _send(self, kind: Kind, stream: int, payload: bytes = b"", flags: int = 0) -> None:
        self.out += b"".join(wire.encode(kind, stream, payload, self._tag or 0, flags=flags))

    def _handle(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        call = self._calls.get(stream)
        if kind == Kind.CALL:
            call = call or self._calls.setdefault(stream, _Call(stream, {}))
            call.head += payload
            if not flags & wire.FLAG_MORE:
                self._attempt(call, lambda: self._begin(call))
        elif call is None:
            return  # It crossed with our last frame.
        elif call.held is not None and kind != Kind.RESET:
            call.held.append((kind, payload))
        elif kind == Kind.DATA:
            if call.process is not None:
                call.process.stdin += payload
            else:
                call.body += payload
            self._send(Kind.CREDIT, stream, wire.encode_credit(len(payload)))
        elif kind == Kind.CREDIT:
            call.credit += wire.credit_bytes(payload)
        elif kind == Kind.RESET:
            self._close(call, Kind.RESET)
            if call.process is not None and call.params.get("on_detach") == "kill":
                call.process.end(time.monotonic(), None, 9, "killed")
        elif kind == Kind.END:
            if call.finish is not None:
                self._attempt(call, call.finish)
            elif call.params.get("watch"):
                self._close(call, Kind.END)
            elif call.process is not None:
                call.process.stdin_open = False

    def _close(self, call: _Call, kind: Kind, body: Params | None = None, flags: int = 0) -> None:
        self._send(kind, call.id, b"" if body is None else wire.encode_json(body), flags)
        del self._calls[call.id]

    def _attempt(self, call: _Call, action: Callable[[], Params | None]) -> None:
        try:
            answer = action()
            if answer is not None:
                self._close(call, Kind.REPLY, answer, wire.FLAG_LAST)
        except Fault as fault:
            errno = {} if fault.errno is None else {"errno": fault.errno}
            self._close(call, Kind.ERROR, {"code": fault.code, "message": str(fault), **errno})

    def _begin(self, call: _Call) -> Params | None:
        request = json.loads(call.head)
        method, call.params = request["method"], request["params"]
        handler: Callable[[_Call, Params], Params | None] | None = getattr(self, "_" + method.replace(".", "_"), None)
        if handler is None or "." not in method:
            raise Fault("unknown_method")
        if self.frozen_at is not None and method not in _ADMITTED:
            call.held = []
            return None
        if not method.startswith("machine."):
            self._last_call = time.monotonic()
        fault = self._fault(method)
        self._misbehave(fault)
        if isinstance(fault, GuestTimeout | GuestProtocolError):
            return None
        if self.sealed and method not in _ADMITTED:
            raise Fault("sealed", "the machine is sealed")
        if isinstance(fault, GuestError) and method == "machine.identity":
            return self._report("entropy")
        if fault is not None:
            raise Fault("internal", "made to fail")
        self.cpu_s += 0.0001
        return handler(call, call.params)

    def turn(self, now: float) -> float | None:
        """Let everything inside go as far as it can; returns when it wants to be called again, if at all."""
        moving = self.processes.values() if self.frozen_at is None else ()
        for process in moving:
            self.cpu_s += shell.advance(process, now, self._world) * 1e-5
        for call in list(self._calls.values()):
            if call.pump is not None and len(self.out) < _BACKLOG_BYTES:
                call.pump()
        self.files.changes.clear()
        if (self.live > 0) != self._told and self._tag is not None:
            self._tell_at = self._tell_at or now + _ACTIVITY_DELAY_S
            if now >= self._tell_at:
                self._told, self._tell_at = self.live > 0, 0.0
                self._send(Kind.EVENT, 0, wire.encode_json({"type": "activity", "live": self.live}))
        else:
            self._tell_at = 0.0
        wakes = [job.wake for one in moving for job in one.jobs if job.wake > now]
        wakes += [one.deadline for one in moving if one.deadline is not None and one.exit is None]
        return min([*wakes, *([self._tell_at] if self._tell_at else [])], default=None)

    @property
    def live(self) -> int:
        return sum(1 for one in self.processes.values() if one.jobs and not one.baked)

    # Processes.

    def _process(self, params: Params) -> Process:
        if params["id"] not in self.processes:
            raise Fault("no_process", "no such process")
        return self.processes[params["id"]]

    @staticmethod
    def _started(one: Process) -> Params:
        spans = {name: {"first": one.first[channel], "next": one.next(channel)} for channel, name in ((1, "stdout"), (2, "stderr"))}
        return {"id": one.id, "pid": one.pid, "started_unix_ns": one.started_unix_ns, "pty": one.pty, **spans}

    def _start(self, params: Params, **more: Any) -> Process:
        process_id, now = params.get("id") or secrets.token_hex(8), time.monotonic()
        if process_id in self.processes:
            raise Fault("process_exists", "the id is taken")
        commands = shell.program(params)
        if commands is None:
            raise Fault("not_executable", f"{params['argv'][0][:100]}: not found")
        if self.files.nodes.get(params.get("cwd", "/").encode(), {}).get("type") != "directory":
            raise Fault("bad_cwd", "no such directory")
        for old in [one.id for one in self.processes.values() if not one.jobs][:-63]:
            del self.processes[old]
        process = Process(
            id=process_id,
            pid=2 + max((one.pid for one in self.processes.values()), default=0),
            argv=params.get("argv") or [params.get("shell") or params["warm"]["code"]],
            jobs=[Job(commands)],
            user=params.get("user", "root"),
            cwd=params.get("cwd", "/root"),
            env={"HOME": "/root", "PATH": "/usr/bin:/bin", **self.env, **params.get("env", {})},
            pty="pty" in params,
            began=now,
            started_unix_ns=time.time_ns(),
            deadline=now + params["timeout_ms"] / 1000 if params.get("timeout_ms") else None,
            stdin=base64.b64decode(params.get("stdin_b64", "")),
            stdin_open=bool(params.get("stdin")) or "pty" in params,
        )
        self.processes[process_id] = process
        for name, value in more.items():
            setattr(process, name, value)
        return process

    def _follow(self, call: _Call, process: Process, started: Params) -> None:
        self._send(Kind.REPLY, call.id, wire.encode_json(started))
        call.process, call.pump = process, lambda: self._pump_output(call, process)

    def _pump_output(self, call: _Call, process: Process) -> None:
        for channel in (1, 2):
            while call.credit > 8 and call.at[channel] < process.next(channel) and len(self.out) < _BACKLOG_BYTES:
                offset = max(call.at[channel], process.first[channel])
                begin = offset - process.first[channel]
                piece = process.out[channel][begin : begin + min(_PIECE_BYTES, call.credit - 8)]
                self._send(Kind.DATA, call.id, offset.to_bytes(8, "big") + piece, channel)
                call.credit -= len(piece) + 8
                call.at[channel] = offset + len(piece)
        if process.exit is not None and all(call.at[channel] >= process.next(channel) for channel in (1, 2)):
            self._close(call, Kind.END, {**process.exit, "stdout_bytes": process.next(1), "stderr_bytes": process.next(2)})

    def _process_run(self, call: _Call, params: Params) -> None:
        process = self._start(params)
        self._follow(call, process, self._started(process))

    def _process_start(self, _call: _Call, params: Params) -> Params:
        return self._started(self._start(params))

    def _process_attach(self, call: _Call, params: Params) -> None:
        process = self._process(params)
        for channel, name in ((1, "stdout_offset"), (2, "stderr_offset")):
            call.at[channel] = min(max(params.get(name, 0), process.first[channel]), process.next(channel))
        self._follow(call, process, self._started(process))

    def _process_stdin(self, call: _Call, params: Params) -> None:
        process = self._process(params)
        if not process.stdin_open:
            raise Fault("finished" if process.exit else "no_stdin", "the process reads no input")

        def finish() -> Params:
            process.stdin += bytes(call.body)
            process.stdin_open = bool(params.get("keep_open"))
            return {"bytes": len(call.body)}

        call.finish = finish

    def _process_signal(self, _call: _Call, params: Params) -> Params:
        process, number = self._process(params), params["signal"]
        if process.exit is not None and not process.jobs:
            raise Fault("finished", "the process has ended")
        if number in (1, 2, 3, 9, 10, 12, 15):
            process.end(time.monotonic(), None, number, "killed" if number == 9 else "signaled", tree=params.get("tree", True))
        return {"sent": 1}

    def _process_wait(self, call: _Call, params: Params) -> None:
        process = self._process(params)
        call.pump = lambda: self._close(call, Kind.REPLY, process.exit, wire.FLAG_LAST) if process.exit is not None else None

    def _process_list(self, call: _Call, _params: Params) -> None:
        names = ("argv", "user", "baked", "warm", "exit")
        entries = [
            self._started(one) | {name: getattr(one, name) for name in names} | {"running": one.exit is None}
            for one in self.processes.values()
        ]
        self._lines(call, "processes", entries, None)

    def _lines(self, call: _Call, name: str, entries: Sequence[Any], end: Params | None) -> None:
        self._send(Kind.REPLY, call.id, b"{}")
        for at in range(0, len(entries), 50):
            self._send(Kind.DATA, call.id, wire.encode_json({name: entries[at : at + 50]}) + b"\n")
        self._close(call, Kind.END, end)

    def _process_resize(self, _call: _Call, params: Params) -> Params:
        if not self._process(params).pty:
            raise Fault("no_pty", "the process has no terminal")
        return {}

    def _process_output(self, _call: _Call, params: Params) -> Params:
        process, channel = self._process(params), params["stream"]
        first, end = process.first[channel], process.next(channel)
        offset = min(max(params["offset"], first), end)
        data = process.out[channel][offset - first :][: min(params["limit"], 128 << 10)]
        return {"offset": offset, "first": first, "next": end, "data_b64": base64.b64encode(data).decode()}

    # Files.

    def _file_read(self, call: _Call, params: Params) -> None:
        where = path(params)
        data = self.files.find(where, "file")["data"][params.get("offset", 0) :][: params.get("length")]
        self._send(Kind.REPLY, call.id, wire.encode_json(self.files.stat(where)))

        def pump() -> None:
            while call.at[1] < len(data) and call.credit > 0 and len(self.out) < _BACKLOG_BYTES:
                piece = data[call.at[1] : call.at[1] + min(_PIECE_BYTES, call.credit)]
                self._send(Kind.DATA, call.id, piece)
                call.at[1] += len(piece)
                call.credit -= len(piece)
            if call.at[1] >= len(data):
                self._close(call, Kind.END, {"bytes": len(data)})

        call.pump = pump

    def _file_write(self, call: _Call, params: Params) -> None:
        where = path(params)
        if where in self.files.nodes:
            self.files.find(where, "file")

        def finish() -> Params:
            if params.get("size", len(call.body)) != len(call.body):
                raise Fault("invalid", "another size than announced")
            self.files.write(where, bytes(call.body), parents=params.get("parents", True))
            if "mode" in params or "owner" in params:
                self.files.chmod(where, params.get("mode"), params.get("owner"))
            return {"bytes": len(call.body)}

        call.finish = finish

    def _file_stat(self, _call: _Call, params: Params) -> Params:
        return self.files.stat(path(params))

    def _file_list(self, call: _Call, params: Params) -> None:
        names = self.files.children(path(params))
        self._lines(call, "entries", [self.files.stat(name) for name in names], {"count": len(names)})

    def _file_scan(self, call: _Call, params: Params) -> None:
        entries = self.files.scan(path(params))
        if len(entries) > params["limit"]:
            raise Fault("too_large", "the tree has more entries")
        self._lines(call, "entries", entries, {"count": len(entries)})

    def _file_digests(self, call: _Call, params: Params) -> None:
        wanted = [path({"path_b64": one}) for one in params["paths_b64"]]
        self._lines(call, "digests", [self.files.digest(one) for one in wanted], {"count": len(wanted)})

    def _file_mkdir(self, _call: _Call, params: Params) -> Params:
        return {"created": self.files.mkdir(path(params), parents=params.get("parents", True), mode=params.get("mode", 0o755))}

    def _file_move(self, _call: _Call, params: Params) -> Params:
        self.files.move(path(params, "from"), path(params, "to"), overwrite=params.get("overwrite", False))
        return {}

    def _file_remove(self, _call: _Call, params: Params) -> Params:
        self.files.remove(path(params), recursive=params.get("recursive", False))
        return {}

    def _file_chmod(self, _call: _Call, params: Params) -> Params:
        self.files.chmod(path(params), params.get("mode"), params.get("owner"), recursive=params.get("recursive", False))
        return {}

    def _file_watch(self, call: _Call, params: Params) -> None:
        where = path(params)
        self.files.find(where)
        call.params["watch"] = True
        self._send(Kind.REPLY, call.id, b"{}")

        def pump() -> None:
            events = []
            for kind, one in self.files.changes:
                if posixpath.dirname(one) == where or one == where or (params.get("recursive") and one.startswith(where + b"/")):
                    exact = {"path_b64": base64.b64encode(one).decode()} if not _is_text(one) else {}
                    events.append({"type": kind, "path": one.decode("utf-8", "replace"), "directory": False, **exact})
            if events:
                self._send(Kind.DATA, call.id, wire.encode_json({"events": events, "overflow": False}) + b"\n")

        call.pump = pump

    # The machine.

    def _machine_identity(self, _call: _Call, params: Params) -> Params:
        _hook_limit(params)
        self.hostname, self.env = params["hostname"], params["env"]
        self.files.write(b"/etc/hostname", params["hostname"].encode() + b"\n")
        self.files.write(b"/etc/machine-id", params["machine_id"].encode() + b"\n")
        if not self._hook("after-restore"):
            return self._report("hooks")
        continued = self._thaw()
        report = self._report(None)
        report["steps"]["processes"]["detail"] = f"{continued} continued"
        return report

    def _machine_rehearse(self, _call: _Call, params: Params) -> Params:
        if not self.sealed or self.frozen_at is not None:
            raise Fault("invalid", "only a machine that is sealed, and not frozen, can rehearse")
        self.hostname = params["hostname"]
        return self._report(None)

    def _report(self, failed: str | None) -> Params:
        """That all steps were done, or those before the one that failed. A seal outlives a failure."""
        at = _STEPS.index(failed) if failed else len(_STEPS)
        return {"steps": {name: {"ok": _STEPS.index(name) < at, "detail": "fake"} for name in _STEPS}, "offset_ns": 0}

    def _hook(self, name: str) -> bool:
        """False: it is there, and fails. One that is not executable is none."""
        found = self.files.nodes.get(_HOOKS + name.encode(), {})
        return found.get("type") != "file" or not found["mode"] & 0o111 or b"exit 1" not in found["data"]

    def _machine_seal(self, _call: _Call, params: Params) -> Params:
        _hook_limit(params)
        if not re.fullmatch(r"[a-z-]{1,32}", params.get("reason", "snapshot")):
            raise Fault("invalid", "reason")
        if not self.sealed and not self._hook("before-snapshot"):
            raise Fault("hook_failed", f"{_HOOKS.decode()}before-snapshot ended with exit code 1: ")
        self.sealed = True
        if params.get("freeze") and self.frozen_at is None:
            self.frozen_at = time.monotonic()
        return {"live": self.live, "frozen": self._running if self.frozen_at is not None else 0}

    def _machine_unseal(self, _call: _Call, _params: Params) -> Params:
        return {"continued": self._thaw()}

    def _thaw(self) -> int:
        """Open the machine; what waited for it begins, in order. Time limits have stood still, sleeps have not."""
        self.sealed = False
        if self.frozen_at is None:
            return 0
        lost_s = time.monotonic() - self.frozen_at
        self.frozen_at = None
        for process in self.processes.values():
            if process.deadline is not None:
                process.deadline += lost_s
        for call in [one for one in self._calls.values() if one.held is not None]:
            held, call.held = call.held or [], None
            self._attempt(call, partial(self._begin, call))
            for kind, payload in held:
                self._handle(kind, 0, call.id, payload)
        return self._running

    @property
    def _running(self) -> int:
        return sum(1 for one in self.processes.values() if one.jobs)

    def _machine_health(self, _call: _Call, _params: Params) -> Params:
        now = time.monotonic()
        idle = 0 if self.live else round((now - self._last_call) * 1000)
        baked = sum(1 for one in self.processes.values() if one.baked)
        counts = {"sealed": self.sealed, "frozen": self.frozen_at is not None, "live": self.live, "baked": baked, "idle_ms": idle}
        return {"version": 1, "build": "fake", "uptime_ms": round((now - self._born) * 1000), **counts}

    def _machine_resources(self, _call: _Call, _params: Params) -> Params:
        memory, disk = self._limits.memory_mib << 20, self._limits.disk_mib << 20
        used = sum(len(one["data"]) for one in self.files.nodes.values())
        sizes = {"memory_total_bytes": memory, "memory_available_bytes": memory, "disk_total_bytes": disk, "disk_free_bytes": disk - used}
        return {**sizes, "cpu_seconds": self.cpu_s, "load_1m": 0.0, "processes": len(self.processes)}

    def _machine_ports(self, _call: _Call, _params: Params) -> Params:
        return {"ports": []}

    def _machine_warm(self, _call: _Call, params: Params) -> Params:
        return self._started(self._start({"shell": "sleep 1e9", "id": "warm"}, argv=params["argv"], baked=True, warm=True))


def _hook_limit(params: Params) -> None:
    if not 1 <= params.get("hook_timeout_ms", 10_000) <= 120_000:
        raise Fault("invalid", "hook_timeout_ms is from 1 to 120000")


def _is_text(raw: bytes) -> bool:
    return raw.decode("utf-8", "replace").encode() == raw
