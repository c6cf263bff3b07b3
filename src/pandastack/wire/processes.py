"""Commands and processes as the public API shows them.

`ExecRequest` and `ExecResult` are the contract of existing clients plus optional fields of ours. A process is
the same thing with an id: it outlives the connection, and its output can be read again from a byte offset.
"""

from __future__ import annotations

import base64
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from pandastack.wire.ids import PROCESS_ID_PATTERN
from pandastack.wire.sandboxes import Env, Shape, View

MAX_COMMAND_BYTES = 1 << 20
MAX_INLINE_STDIN_BYTES = 1 << 20
MAX_TIMEOUT_SECONDS = 24 * 3600


def _no_nul(text: str) -> str:
    if "\x00" in text:
        raise ValueError("must not contain a NUL character")
    return text


def _is_base64(text: str) -> str:
    try:
        base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError("must be standard base64") from None
    return text


Text = Annotated[str, StringConstraints(max_length=MAX_COMMAND_BYTES), AfterValidator(_no_nul)]
AbsolutePath = Annotated[str, StringConstraints(pattern=r"^/", max_length=4096), AfterValidator(_no_nul)]
User = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}\$?$")]
Language = Literal["python", "bash"]
Signal = Literal["HUP", "INT", "QUIT", "KILL", "USR1", "USR2", "TERM", "CONT", "STOP", "TSTP", "WINCH"]


class Command(Shape):
    """What to run: exactly one of `cmd` (a shell line), `argv` (no shell) or `code` (with `language`)."""

    cmd: Text | None = None
    argv: Annotated[list[Text], Field(min_length=1, max_length=4096)] | None = None
    code: Text | None = None
    language: Language = "python"
    cwd: AbsolutePath | None = None
    env: Env = {}
    user: User | None = None
    timeout_seconds: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_SECONDS)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Command:
        given = [value for value in (self.cmd, self.argv, self.code) if value is not None]
        if len(given) != 1 or not given[0] or (self.cmd is not None and not self.cmd.strip()):
            raise ValueError("give exactly one of cmd, argv and code, and not an empty one")
        return self


class ExecRequest(Command):
    """`POST .../exec` and `.../exec/stream`. `stdin` is text, `stdin_b64` bytes; both at once are refused.

    `max_output_bytes` bounds each of stdout and stderr of the blocking answer (default 1 MiB, at most 8 MiB).
    """

    stdin: Annotated[str, StringConstraints(max_length=MAX_INLINE_STDIN_BYTES)] | None = None
    stdin_b64: Annotated[str, StringConstraints(max_length=MAX_INLINE_STDIN_BYTES * 4 // 3 + 4), AfterValidator(_is_base64)] | None = None
    max_output_bytes: Annotated[int, Field(ge=1024, le=8 << 20)] | None = None

    @model_validator(mode="after")
    def _one_stdin(self) -> ExecRequest:
        if self.stdin is not None and self.stdin_b64 is not None:
            raise ValueError("give stdin or stdin_b64, not both")
        return self

    def stdin_bytes(self) -> bytes | None:
        """The bytes for the command's standard input, or None for an empty one."""
        if self.stdin_b64 is not None:
            return base64.b64decode(self.stdin_b64)
        return self.stdin.encode("utf-8", "surrogatepass") if self.stdin is not None else None


class ExecResult(View):
    """What a finished command said. Invalid UTF-8 is replaced; exact bytes are in `*_b64` only where that happened.

    `exit_code` is 128 + n for a command ended by signal n (`signal` names it). Where output was cut, `truncated` is
    true, the text ends with a marker line, and `process_id` with `stdout_bytes`/`stderr_bytes` (totals) lets you read
    the rest from `GET .../processes/{process_id}/output`.
    """

    stdout: str
    stderr: str
    exit_code: int
    duration_ms: int
    signal: str | None = None
    truncated: bool = False
    process_id: str | None = None
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    stdout_b64: str | None = None
    stderr_b64: str | None = None


class PtySize(Shape):
    rows: Annotated[int, Field(ge=1, le=10_000)] = 24
    cols: Annotated[int, Field(ge=1, le=10_000)] = 80


class ProcessStart(Command):
    """`POST .../processes`. `stdin` true keeps its standard input open for `POST .../stdin`; else it is empty."""

    id: Annotated[str, StringConstraints(pattern=PROCESS_ID_PATTERN)] | None = None
    stdin: bool = False
    pty: PtySize | None = None


class ProcessView(View):
    """A process. While it runs, `exit_code`, `signal` and `reason` are null.

    `*_start` is the first byte offset that can still be read and `*_bytes` the offset of the next byte to come.
    """

    id: str
    pid: int
    command: str
    user: str = "root"
    running: bool
    started_at: str
    ended_at: str | None = None
    exit_code: int | None = None
    signal: str | None = None
    reason: str | None = None
    stdout_start: int = 0
    stdout_bytes: int = 0
    stderr_start: int = 0
    stderr_bytes: int = 0


class StdinWritten(View):
    """`bytes` is what the process's standard input took."""

    bytes: int


class SignalRequest(Shape):
    """`tree` true (the default) reaches every process that the command started, also daemons it left behind."""

    signal: Signal = "TERM"
    tree: bool = True
