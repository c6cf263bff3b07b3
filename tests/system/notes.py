"""A program that keeps what it is told in memory and nowhere else: who asks it later knows whether that memory is still there."""

from __future__ import annotations

from pandastack.sdk.sandboxes import Sandbox

from .servers import until

# The ballast is so many MiB that a saved state has to hold.
PROGRAM = """
import os, sys
ballast = os.urandom(1 << 20) * int(sys.argv[1])
kept = []
print("began", flush=True)
for line in sys.stdin:
    kept.append(line.strip())
    print(*kept, flush=True)
"""
NAME = "notes"


def begin(sandbox: Sandbox, *, ballast_mib: int = 0) -> None:
    sandbox.processes.start(["python3", "-u", "-c", PROGRAM, str(ballast_mib)], id=NAME, stdin=True)
    assert _answer(sandbox, 0) == ["began"]


def add(sandbox: Sandbox, word: str) -> list[str]:
    """Tell it a word; the answer is all that it was ever told."""
    process = sandbox.processes.get(NAME)
    process.write_stdin(f"{word}\n")
    return _answer(sandbox, process.stdout_bytes)


def _answer(sandbox: Sandbox, offset: int) -> list[str]:
    def look() -> bytes:
        process = sandbox.processes.get(NAME)
        assert process.running, (process.exit_code, process.read_output("stderr").data[-2000:])
        data = process.read_output("stdout", offset=offset).data
        return data if data.endswith(b"\n") else b""

    return until(look, "the program answers").decode().split()
