"""Commands inside sandboxes: `run` and `sandbox exec` write output as it comes and end with the command's exit code."""

from __future__ import annotations

import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pandastack.cli import console
from pandastack.wire.isolation import AUTO

if TYPE_CHECKING:
    from pandastack.sdk.client import Client
    from pandastack.sdk.sandboxes import Sandbox
    from pandastack.sdk.streams import OutputStream

Timeout = Annotated[float | None, typer.Option("--timeout", min=0.001, help="End the command after so many seconds (exit code 124).")]
Env = Annotated[list[str] | None, typer.Option("--env", "-e", metavar="KEY=VALUE", help="Set a variable; may be repeated.")]
Cwd = Annotated[str | None, typer.Option(help="The directory to run in.")]
User = Annotated[str | None, typer.Option(help="The user to run as.")]

# A sandbox of `run` that was left over (power cut, kill -9) goes away by itself after so many idle seconds.
RUN_TTL_S = 900
LANGUAGE_OF_SUFFIX = {".py": "python", ".sh": "bash", ".bash": "bash"}


def run(
    code: Annotated[str, typer.Argument(metavar="CODE|FILE|-", help="Program text, a file, or - for standard input.")],
    language: Annotated[str | None, typer.Option("--language", "-l", help="python or bash (default: by the file's name).")] = None,
    template: Annotated[str, typer.Option("--template", "-t")] = "code-interpreter",
    timeout: Timeout = None,
    env: Env = None,
    cpu: Annotated[float | None, typer.Option(help="Cores.")] = None,
    memory_mb: Annotated[int | None, typer.Option(help="MiB.")] = None,
    isolation: console.Isolation = AUTO,
    keep: Annotated[bool, typer.Option("--keep", help="Do not delete the sandbox; its id is printed on stderr.")] = False,
    as_json: console.Json = False,
) -> None:
    """Run code in a new sandbox, which is deleted afterwards. The exit code is that of the code."""
    text, language = _program(code, language)
    with (
        console.client() as client,
        ending_on_signals(),
        temporary_sandbox(client, keep, RUN_TTL_S, template=template, cpu=cpu, memory_mb=memory_mb, isolation=isolation) as sandbox,
    ):
        if keep:
            console.say(f"sandbox {sandbox.id}")
        stream = sandbox.stream_code(text, language, timeout_seconds=timeout, env=console.pairs(env, "--env"))
        code_of_run = _play(stream, sandbox.id, as_json)
    raise typer.Exit(code_of_run)


def _program(code: str, language: str | None) -> tuple[str, str]:
    suffix = ""
    if code == "-":
        text = sys.stdin.buffer.read().decode()
    elif "\n" not in code and len(code) < 4096 and Path(code).is_file():
        text, suffix = Path(code).read_text(encoding="utf-8"), Path(code).suffix
    elif " " not in code and "\n" not in code and Path(code).suffix in LANGUAGE_OF_SUFFIX:
        console.usage(f"there is no file {code!r}")
    else:
        text = code
    language = language or LANGUAGE_OF_SUFFIX.get(suffix, "python")
    if language not in ("python", "bash"):
        console.usage("--language is python or bash")
    if not text.strip():
        console.usage("there is no code to run")
    return text, language


@contextmanager
def temporary_sandbox(client: Client, keep: bool, ttl_s: int, **asked: Any) -> Iterator[Sandbox]:
    """A sandbox that is deleted at the end, however the end comes about, unless it is to be kept."""
    asked["idempotency_key"] = uuid.uuid4().hex
    if not keep:
        asked["ttl_seconds"] = ttl_s
    try:
        sandbox = client.sandboxes.create(**asked)
    except KeyboardInterrupt:
        # The request may be on its way. The same key answers with the same sandbox, which can then be deleted.
        console.say("interrupted; deleting the sandbox that was being made (Ctrl-C again to leave it)")
        client.sandboxes.create(**asked).kill()
        raise
    if keep:
        yield sandbox
    else:
        with sandbox:
            yield sandbox


def execute(
    sandbox_id: console.SandboxId,
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="One word is a shell line; several are run without a shell.")
    ],
    timeout: Timeout = None,
    cwd: Cwd = None,
    env: Env = None,
    user: User = None,
    stdin: Annotated[bool, typer.Option("--stdin", "-i", help="Send standard input (at most 1 MiB) to the command.")] = False,
    as_json: console.Json = False,
) -> None:
    """Run a command in a sandbox, with live output. The exit code is that of the command."""
    with console.sandbox(sandbox_id) as sandbox, ending_on_signals():
        stream = sandbox.stream(
            command[0] if len(command) == 1 else command, timeout_seconds=timeout, cwd=cwd, env=console.pairs(env, "--env"), user=user,
            stdin=sys.stdin.buffer.read() if stdin else None,
        )  # fmt: skip
        code = _play(stream, sandbox_id, as_json)
    raise typer.Exit(code)


def _play(stream: OutputStream, sandbox_id: str, as_json: bool) -> int:
    """Output as it comes; Ctrl-C kills the command. With JSON the output is in the JSON instead."""
    kept = {"stdout": bytearray(), "stderr": bytearray()}
    with stream:
        for event in stream:
            if as_json:
                kept[event.channel] += event.data
            else:
                console.write_event(event)
    code = stream.exit_code if stream.exit_code is not None else 1
    if as_json:
        console.emit_json({
            "sandbox_id": sandbox_id, "process_id": stream.process_id, "exit_code": code, "signal": stream.signal,
            "duration_ms": stream.duration_ms, **{name: data.decode("utf-8", "replace") for name, data in kept.items()},
        })  # fmt: skip
    return code


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the command as Ctrl-C does, so that they clean up too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    wanted = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    try:
        before = [(number, signal.signal(number, interrupt)) for number in wanted]
    except ValueError:
        # Not the main thread: somebody else decides about signals.
        before = []
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
