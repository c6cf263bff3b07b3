"""Calls about commands and processes: how a command is described, how its end is read."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pandastack import errors
from pandastack.sdk.calls.call import Answer, Call, Query, Request, build, items_of, nothing, parse, reads, segment, validated
from pandastack.sdk.calls.sandboxes import root
from pandastack.sdk.results import Channel, ExecResult, OutputSlice
from pandastack.wire import ids
from pandastack.wire import processes as wire
from pandastack.wire.processes import ProcessView

C = TypeVar("C", wire.ExecRequest, wire.ProcessStart)

Cmd = str | Sequence[str]
Stdin = str | bytes

EXEC_MARGIN_S = 30.0
"""What the server may need beyond a command's own limit: to start it, and to end its whole process tree."""

SILENCE_S = 45.0
"""Streams carry a comment every 15 s; three missing ones mean that nobody is there."""

_LANGUAGES = {"python": "python", "py": "python", "python3": "python", "bash": "bash", "sh": "bash", "shell": "bash"}


def describe(
    shape: type[C],
    cmd: Cmd | None,
    *,
    cwd: str | None,
    env: Mapping[str, str] | None,
    user: str | None,
    timeout_seconds: float | None,
    code: str | None = None,
    language: str | None = None,
    **more: Any,
) -> C:
    """A text is a shell line, a list is an argv without a shell. Raises InvalidRequest before anything is sent."""
    return validated(
        shape,
        cmd=cmd if isinstance(cmd, str) else None,
        argv=None if cmd is None or isinstance(cmd, str) else [str(part) for part in cmd],
        code=code,
        language=language,
        cwd=cwd,
        env=dict(env) if env else None,
        user=user,
        timeout_seconds=timeout_seconds,
        **more,
    )


def language_of(name: str) -> str:
    language = _LANGUAGES.get(name.lower())
    if language is None:
        raise ValueError(f"Unsupported language: {name}")
    return language


def shown(cmd: Cmd | None, code: str | None = None) -> str:
    """The command in one line, for messages."""
    text = code if code is not None else cmd if isinstance(cmd, str) else shlex.join(cmd or [])
    return " ".join(text.split())


def exec_request(cmd: Cmd | None, stdin: Stdin | None, max_output_bytes: int | None = None, **options: Any) -> wire.ExecRequest:
    size = len(stdin.encode("utf-8", "surrogatepass") if isinstance(stdin, str) else stdin or b"")
    if size > wire.MAX_INLINE_STDIN_BYTES:
        raise errors.InvalidRequest(
            f"stdin of {size} bytes is more than the {wire.MAX_INLINE_STDIN_BYTES} that fit into one call", field="stdin",
            hint="use processes.start(..., stdin=True) and write_stdin, or upload a file and redirect it",
        )  # fmt: skip
    given: dict[str, Any] = {"stdin": stdin} if isinstance(stdin, str) else {}
    if stdin is not None and not isinstance(stdin, str):
        given = {"stdin_b64": base64.b64encode(stdin).decode()}
    return describe(wire.ExecRequest, cmd, max_output_bytes=max_output_bytes, **given, **options)


def execute(sandbox_id: str, body: wire.ExecRequest) -> Call[ExecResult]:
    # Without a limit of its own a command may be silent for hours; the transport's keep-alive finds a dead peer.
    read_s = None if body.timeout_seconds is None else body.timeout_seconds + EXEC_MARGIN_S
    return Call(build("POST", f"{root(sandbox_id)}/exec", body=body, read_s=read_s), _read_result)


def _read_result(answer: Answer) -> ExecResult:
    data = answer.json()
    if isinstance(data, dict) and "exit_code" not in data and "exit" in data:
        data = {**data, "exit_code": data["exit"]}
    wire_result = parse(wire.ExecResult, data)
    out, err = _exact(wire_result.stdout, wire_result.stdout_b64), _exact(wire_result.stderr, wire_result.stderr_b64)
    return ExecResult.from_wire(wire_result, out, err)


def _exact(text: str, encoded: str | None) -> bytes:
    return base64.b64decode(encoded) if encoded is not None else text.encode("utf-8", "surrogatepass")


def as_exec_error(error: errors.PandastackError, command: str) -> errors.PandastackError:
    """A command over its limit is SandboxTimeout; servers without error codes say it only in the text of a 5xx."""
    text = error.message.lower()
    if type(error) is not errors.ServerError or "i/o timeout" in text or not ("timeout" in text or "deadline exceeded" in text):
        return error
    return errors.SandboxTimeout(
        error.message or f"command timeout: {command}",
        hint=error.hint,
        request_id=error.request_id,
        http_status=error.http_status,
        **error.fields,
    )


def exec_stream(sandbox_id: str, body: wire.ExecRequest) -> Request:
    return build(
        "POST",
        f"{root(sandbox_id)}/exec/stream",
        {"encoding": "base64"},
        body=body,
        headers={"accept": "text/event-stream"},
        read_s=SILENCE_S,
    )


def process_root(sandbox_id: str, process_id: str) -> str:
    return f"{root(sandbox_id)}/processes/{segment(process_id)}"


def process_stream(sandbox_id: str, process_id: str, offsets: Mapping[Channel, int], read_s: float = SILENCE_S) -> Request:
    query: Query = {"stdout_offset": offsets["stdout"], "stderr_offset": offsets["stderr"], "encoding": "base64"}
    return build("GET", f"{process_root(sandbox_id, process_id)}/stream", query, headers={"accept": "text/event-stream"}, read_s=read_s)


def start(
    sandbox_id: str, cmd: Cmd, *, stdin: bool, pty: tuple[int, int] | None, process_id: str | None, **options: Any
) -> Call[ProcessView]:
    """The id is made here, so that after a lost answer the process can be looked for instead of started twice."""
    size = validated(wire.PtySize, rows=pty[0], cols=pty[1]) if pty is not None else None
    body = describe(wire.ProcessStart, cmd, id=process_id or ids.new_process_id(), stdin=True if stdin else None, pty=size, **options)
    return Call(build("POST", f"{root(sandbox_id)}/processes", body=body), reads(ProcessView))


def id_of(call: Call[ProcessView]) -> str:
    """The id that a start call carries."""
    return str(json.loads(call.request.body or b"{}")["id"])


def list_processes(sandbox_id: str) -> Call[list[ProcessView]]:
    return Call(build("GET", f"{root(sandbox_id)}/processes"), lambda answer: [parse(ProcessView, item) for item in items_of(answer)])


def get(sandbox_id: str, process_id: str) -> Call[ProcessView]:
    return Call(build("GET", process_root(sandbox_id, process_id)), reads(ProcessView))


def read_output(sandbox_id: str, process_id: str, stream: Channel, offset: int, limit: int | None) -> Call[OutputSlice]:
    request = build("GET", f"{process_root(sandbox_id, process_id)}/output", {"stream": stream, "offset": offset, "limit": limit})
    return Call(request, lambda answer: _read_slice(answer, offset))


def _read_slice(answer: Answer, asked: int) -> OutputSlice:
    offset = int(answer.headers.get("x-output-offset", asked))
    end = int(answer.headers.get("x-output-end", offset + len(answer.body)))
    return OutputSlice(offset, answer.body, end, answer.headers.get("x-output-running") == "true")


def write_stdin(sandbox_id: str, process_id: str, data: bytes, close: bool) -> Call[None]:
    # No limit: a program that is slow to read must not look like a dead connection.
    path = f"{process_root(sandbox_id, process_id)}/stdin"
    return Call(build("POST", path, {"close": close}, content=data, read_s=None), nothing)


def signal(sandbox_id: str, process_id: str, name: str, tree: bool) -> Call[None]:
    body = validated(wire.SignalRequest, signal=name.upper().removeprefix("SIG"), tree=tree)
    return Call(build("POST", f"{process_root(sandbox_id, process_id)}/signal", body=body), nothing)


def resize(sandbox_id: str, process_id: str, rows: int, cols: int) -> Call[None]:
    body = validated(wire.PtySize, rows=rows, cols=cols)
    return Call(build("POST", f"{process_root(sandbox_id, process_id)}/resize", body=body, safe_to_repeat=True), nothing)
