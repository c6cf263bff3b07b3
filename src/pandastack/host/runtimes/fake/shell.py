"""Programs of the in-memory guest: a few shell words and a little Python, run step by step.

A program is plain data (what is still to do, until when it sleeps, what it wrote), so that a saved machine goes on where
it was. Words: `echo [-n]`, `printf`, `true`, `false`, `:`, `exit`, `sleep`, `cat [FILE...]`, `pwd`, `env`, `hostname`,
`yes | head -c N`, `head -c N [/dev/zero]`, `sh -c`, `python3 -c`; with `;`, `&&`, `||`, `&`, `>&2`, `> FILE`, `$NAME`.
"""

from __future__ import annotations

import ast
import codecs
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

RING_BYTES = 1 << 20
_BLOCK = b"y\n" * (32 << 10)
_KNOWN = {"echo", "printf", "true", "false", ":", "exit", "sleep", "cat", "pwd", "env", "hostname", "head", "yes"}
_JOINTS = {";", "&&", "||", "&"}

Command = list[Any]  # [how it is joined to the one before, words, in the background]


@dataclass
class Job:
    """One line of work: the process itself, or what it put into the background."""

    todo: list[Command]
    status: int = 0
    wake: float = 0.0


@dataclass
class Process:
    """A process, running until `exit` (the JSON of its end) is set; background jobs may live on."""

    id: str
    pid: int
    argv: list[str]
    jobs: list[Job]
    user: str = "root"
    cwd: str = "/root"
    env: dict[str, str] = field(default_factory=dict)
    baked: bool = False
    warm: bool = False
    pty: bool = False
    started_unix_ns: int = 0
    began: float = 0.0
    deadline: float | None = None
    stdin: bytes = b""
    stdin_open: bool = False
    first: dict[int, int] = field(default_factory=lambda: {1: 0, 2: 0})
    out: dict[int, bytes] = field(default_factory=lambda: {1: b"", 2: b""})
    exit: dict[str, Any] | None = None

    def next(self, channel: int) -> int:
        return self.first[channel] + len(self.out[channel])

    def write(self, channel: int, data: bytes) -> None:
        kept = self.out[channel] + data
        surplus = max(0, len(kept) - RING_BYTES)
        self.first[channel] += surplus
        self.out[channel] = kept[surplus:]

    def end(self, now: float, code: int | None, signal: int | None = None, reason: str = "exited", *, tree: bool = True) -> None:
        """Over. With `tree` its background jobs are, too."""
        self.jobs = [] if tree else self.jobs[1:]
        if self.exit is None:
            ms = round((now - self.began) * 1000)
            ended = {"id": self.id, "exit_code": code, "signal": signal, "reason": reason, "duration_ms": ms}
            self.exit = {**ended, "stdout_bytes": self.next(1), "stderr_bytes": self.next(2)}


@dataclass(frozen=True)
class World:
    """What programs reach of their guest: files, its name, and whether a slow reader of that output must be waited for."""

    read: Callable[[str], bytes | None]
    write: Callable[[str, bytes, bool], None]
    hostname: Callable[[], str]
    may_write: Callable[[Process, int], bool]


def program(params: dict[str, Any]) -> list[Command] | None:
    """The commands of process.start's `argv`, `shell` or `warm`; None where there is no such program."""
    if "warm" in params:
        return _python(params["warm"]["code"])
    if "shell" in params:
        return _shell(params["shell"])
    name, *rest = params["argv"]
    name = name.rsplit("/", 1)[-1]
    if name in ("sh", "bash", "python3") and rest[:1] == ["-c"]:
        return (_python if name == "python3" else _shell)(rest[1])
    return [["", [name, *rest], False]] if name in _KNOWN else None


def _shell(text: str) -> list[Command]:
    lexer = shlex.shlex(text if "'" in text or '"' in text else text.replace("\n", ";"), posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    lexer.commenters = ""
    commands: list[Command] = []
    joint, words = "", list[str]()
    try:
        for word in [*lexer, ";"]:
            if word not in _JOINTS:
                words.append(word)
                continue
            if words:
                commands.append([joint, words, word == "&"])
            joint, words = word if word in ("&&", "||") else "", []
    except ValueError:
        return [["", ["echo", "sh: syntax error: unterminated quoted string", ">&", "2"], False], ["", ["exit", "2"], False]]
    return commands


def _python(code: str) -> list[Command]:
    commands: list[Command] = []
    try:
        for line in ast.parse(code).body:
            if isinstance(line, ast.Import | ast.ImportFrom):
                continue
            call = line.value if isinstance(line, ast.Expr) else line.exc if isinstance(line, ast.Raise) else None
            if not isinstance(call, ast.Call):
                raise ValueError("beyond this interpreter")
            name, values = ast.unparse(call.func).rsplit(".", 1)[-1], [str(_value(one)) for one in call.args]
            word = {"print": "echo", "sleep": "sleep", "exit": "exit", "SystemExit": "exit"}[name]
            commands.append(["", [word, " ".join(values)], False])
    except (SyntaxError, ValueError, KeyError) as error:
        commands += [["", ["echo", f"Traceback: {error}", ">&", "2"], False], ["", ["exit", "1"], False]]
    return commands


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        return left * right if isinstance(node.op, ast.Mult) else left - right if isinstance(node.op, ast.Sub) else left + right
    return ast.literal_eval(node)


def advance(process: Process, now: float, world: World) -> int:
    """Let a process do what it can without waiting. Returns the number of steps that it took."""
    steps = 0
    if process.deadline is not None and now >= process.deadline:
        process.end(now, None, 9, "timeout")
    for job in list(process.jobs):
        while job.todo and job.wake <= now:
            joint, words, background = job.todo[0]
            if (joint == "&&" and job.status) or (joint == "||" and not job.status):
                job.todo.pop(0)
            elif background:
                process.jobs.append(Job([["", words, False]]))
                job.todo.pop(0)
            else:
                status = _run(process, job, words, now, world)
                if status is None:
                    break
                job.status = status
                job.todo.pop(0)
            steps += 1
    if process.exit is None and not process.jobs[0].todo:
        process.end(now, process.jobs[0].status, tree=False)
    process.jobs = [job for at, job in enumerate(process.jobs) if job.todo or (at == 0 and process.exit is None)]
    return steps


def _run(process: Process, job: Job, words: list[str], now: float, world: World) -> int | None:
    """One command; None while it has to wait, with `words` then saying what is left of it."""
    values = process.env | {"HOSTNAME": world.hostname(), "?": str(job.status)}
    full = [re.sub(r"\$(\w+|\?)", lambda match: values.get(match[1], ""), word) for word in words]
    where: int | str = 1
    append = False
    for sign in (">&", ">", ">>"):
        if sign in full:
            at = full.index(sign)
            where, append = (2 if full[at + 1] == "2" else 1) if sign == ">&" else full[at + 1], sign == ">>"
            full = full[:at]
    if isinstance(where, int) and not world.may_write(process, where):
        return None

    def say(data: bytes) -> int:
        nonlocal append
        if isinstance(where, str):
            world.write(where, data, append)
            append = True
        elif data:
            process.write(where, data)
        return 0

    match full:
        case ["sleep", seconds]:
            job.wake, words[:] = now + float(seconds), ["true"]
            return None
        case ["true" | ":", *_] | []:
            return 0
        case ["false", *_]:
            return 1
        case ["exit", *rest]:
            del job.todo[1:]
            return int(rest[0]) & 255 if rest else job.status
        case ["echo", "-n", *rest]:
            return say(" ".join(rest).encode("utf-8", "surrogateescape"))
        case ["echo", *rest]:
            return say((" ".join(rest) + "\n").encode("utf-8", "surrogateescape"))
        case ["printf", text, *_]:
            return say(codecs.escape_decode(text.encode())[0])
        case ["pwd"]:
            return say(process.cwd.encode() + b"\n")
        case ["hostname"]:
            return say(world.hostname().encode() + b"\n")
        case ["env"]:
            return say("".join(f"{name}={value}\n" for name, value in process.env.items()).encode())
        case ["cat"]:
            data, process.stdin = process.stdin, b""
            say(data)
            return None if process.stdin_open or data else 0
        case ["cat", *paths]:
            found = [world.read(path) for path in paths]
            say(b"".join(data for data in found if data is not None))
            if None in found:
                process.write(2, f"cat: {paths[found.index(None)]}: No such file or directory\n".encode())
            return int(None in found)
        case ["yes", "|", "head", "-c", size] | ["head", "-c", size] | ["head", "-c", size, "/dev/zero"]:
            left = int(size)
            while left > 0:
                if isinstance(where, int) and not world.may_write(process, where):
                    words[words.index(size)] = str(left)
                    return None
                say(_BLOCK[:left] if full[0] == "yes" else bytes(min(left, len(_BLOCK))))
                left -= len(_BLOCK)
            return 0
    process.write(2, f"sh: {full[0][:100]}: not found\n".encode())
    return 127
