"""Where a reader stands in the output of a process, and what to do when its connection breaks: no I/O, no clock.

    unopened -> reading -> exit seen
                   | broken: ask again from the two byte offsets; give up when nothing came for `reconnect_s`

Every piece of output carries its offset, so after a break nothing is lost and nothing comes twice.
"""

from __future__ import annotations

import base64
import codecs
import random
from collections.abc import Mapping
from dataclasses import dataclass

from pandastack import errors
from pandastack.sdk import sse
from pandastack.sdk.calls import processes as calls
from pandastack.sdk.calls.call import Request
from pandastack.sdk.results import Channel, OutputEvent

RECONNECT_S = 60.0
TAIL_CHARACTERS = 64 * 1024


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended; 128 + n after signal n. `reason` is "exited", "signaled", "timeout" or "killed"."""

    exit_code: int
    signal: str | None = None
    reason: str | None = None
    duration_ms: int = 0


class Cursor:
    def __init__(
        self,
        sandbox_id: str,
        *,
        first: Request | None = None,
        process_id: str | None = None,
        offsets: Mapping[Channel, int] | None = None,
        command: str = "",
        deadline: float | None = None,
    ) -> None:
        """Either `first`, the request that starts a command, or the `process_id` of a running one. `deadline` is monotonic."""
        self.process_id = process_id
        self.exit: Exit | None = None
        self._sandbox_id = sandbox_id
        self._first = first
        self._offsets: dict[Channel, int] = {"stdout": 0, "stderr": 0, **(offsets or {})}
        self._command = command
        self._deadline = deadline
        self._request_id: str | None = None
        self._was_opened = False
        self._lacks_offsets = False
        self._parser = sse.Parser()
        self._text = {channel: codecs.getincrementaldecoder("utf-8")("replace") for channel in self._offsets}
        self._tail: dict[Channel, str] = {"stdout": "", "stderr": ""}
        self._failures = 0
        self._quiet_since: float | None = None
        self._read_s = calls.SILENCE_S
        self._final: errors.PandastackError | None = None

    def request(self, now: float) -> Request:
        """What to send next. Raises SandboxTimeout when the deadline has passed."""
        self._parser = sse.Parser()
        if self._first is not None and not self._was_opened:
            return self._first
        self._check_deadline(now)
        if self._deadline is not None:
            self._read_s = min(calls.SILENCE_S, max(0.05, self._deadline - now))
        return calls.process_stream(self._sandbox_id, self.process_id or "", self._offsets, self._read_s)

    def opened(self, headers: Mapping[str, str]) -> None:
        self._was_opened = True
        self.process_id = headers.get("x-process-id") or self.process_id
        self._request_id = headers.get("x-request-id")

    def feed(self, data: bytes) -> list[OutputEvent]:
        """Bytes of the stream as output. Raises what an error event says; sets `exit` at the end."""
        found = []
        for event in self._parser.feed(data):
            if self.exit is not None:
                break
            if event.name in ("stdout", "stderr"):
                output = self._output("stdout" if event.name == "stdout" else "stderr", event)
                if output is not None:
                    found.append(output)
            elif event.name == "exit":
                found += self._finish(event)
            elif event.name == "error":
                error = self._failed(event)
                # The server lost the sandbox's daemon, perhaps only for a moment: the process may be there still.
                if not (isinstance(error, (errors.GuestGone, errors.GuestTimeout)) and self.process_id and not self._lacks_offsets):
                    self._final = error
                raise error
        if found:
            self._failures, self._quiet_since = 0, None
        return found

    def code(self) -> int:
        """The exit code of a stream that was read to its end. Never a made-up 0."""
        if self.exit is None:
            raise self.interrupted("the stream was closed before the command ended")
        return self.exit.exit_code

    def must_reopen(self, now: float) -> bool:
        """True when the next read could outlast the deadline, which came nearer while output kept arriving."""
        if self._deadline is None or self.exit is not None:
            return False
        self._check_deadline(now)
        return now + self._read_s > self._deadline + 1.0

    def after_break(self, failure: errors.PandastackError | None, now: float) -> float:
        """Seconds to wait before asking again. Raises ExecInterrupted when that makes no sense (any more)."""
        if failure is not None and failure is self._final:
            raise failure
        self._check_deadline(now)
        if not self._was_opened:
            raise failure if failure is not None else self.interrupted("the stream ended before it began")
        if self.process_id is None or self._lacks_offsets:
            raise self.interrupted("the stream ended without an exit code") from failure
        if failure is not None and not isinstance(failure, (errors.ConnectionError, errors.ServerError, errors.RateLimited)):
            raise self.interrupted(f"the process cannot be read any more: {failure.message}") from failure
        self._quiet_since = now if self._quiet_since is None else self._quiet_since
        if now - self._quiet_since > RECONNECT_S:
            raise self.interrupted(f"the stream broke off and could not be resumed within {RECONNECT_S:.0f} s") from failure
        self._failures += 1
        # The first time ask again at once: most breaks are a proxy's or a restarted server's.
        jitter = random.uniform(0.5, 1.0)  # noqa: S311 - it spreads load, it protects nothing
        return 0.0 if self._failures == 1 else min(2.0, 0.05 * 2 ** min(self._failures, 8)) * jitter

    def interrupted(self, text: str) -> errors.ExecInterrupted:
        """The outcome of the command is unknown; what had arrived (the last 64 Ki characters) is in the error."""
        out, err = self._tail["stdout"], self._tail["stderr"]
        return errors.ExecInterrupted(
            text, hint="the outcome of the command is unknown; it may still be running", request_id=self._request_id,
            process_id=self.process_id, stdout=out, stderr=err, partial_stdout=out, partial_stderr=err,
        )  # fmt: skip

    def _output(self, channel: Channel, event: sse.ServerEvent) -> OutputEvent | None:
        body = event.json()
        encoded, text = body.get("b64"), body.get("chunk")
        try:
            data = (
                base64.b64decode(encoded, validate=True) if isinstance(encoded, str) else str(text or "").encode("utf-8", "surrogatepass")
            )
        except ValueError as error:
            self._final = errors.ServerError("the API sent output that is not base64", request_id=self._request_id)
            raise self._final from error
        expected = self._offsets[channel]
        offset = body.get("offset")
        # An older server does not count its bytes: from then on a break cannot be mended.
        self._lacks_offsets = self._lacks_offsets or not isinstance(offset, int)
        offset = offset if isinstance(offset, int) else expected
        if offset + len(data) <= expected:
            return None
        if offset < expected:
            data, offset = data[expected - offset :], expected
        decoded = self._text[channel].decode(data)
        self._offsets[channel] = offset + len(data)
        self._keep(channel, decoded)
        return OutputEvent(channel, data, offset, decoded, offset - expected)

    def _keep(self, channel: Channel, text: str) -> None:
        """Remember the last of the output for error messages. Cut now and then, not each time: copying is the cost."""
        tail = self._tail[channel] + text
        self._tail[channel] = tail if len(tail) < 2 * TAIL_CHARACTERS else tail[-TAIL_CHARACTERS:]

    def _finish(self, event: sse.ServerEvent) -> list[OutputEvent]:
        body = event.json()
        if not isinstance(body.get("exit_code"), int):
            self._final = self.interrupted("the stream ended without an exit code")
            raise self._final
        rest = []
        for channel, decoder in self._text.items():
            if left := decoder.decode(b"", final=True):
                rest.append(OutputEvent(channel, b"", self._offsets[channel], left))
        self.process_id = body.get("process_id") or self.process_id
        self.exit = Exit(body["exit_code"], body.get("signal"), body.get("reason"), int(body.get("duration_ms") or 0))
        return rest

    def _failed(self, event: sse.ServerEvent) -> errors.PandastackError:
        out, err = self._tail["stdout"], self._tail["stderr"]
        partial = {"process_id": self.process_id, "stdout": out, "stderr": err}
        error = errors.from_body(500, {**partial, **event.json()}, request_id=self._request_id)
        return calls.as_exec_error(error, self._command)

    def _check_deadline(self, now: float) -> None:
        if self._deadline is not None and now >= self._deadline:
            self._final = errors.SandboxTimeout(
                f"timeout: process {self.process_id} is still running",
                hint="it goes on; wait again, or kill it",
                process_id=self.process_id,
            )
            raise self._final
