"""Runs inside a sandbox, for `pandastack selftest fork`; needs Python 3.7 or later and nothing else.

    python3 fork_witness.py hold FOLDER         what a fork must carry over: memory, a listener, a process that waits
    python3 fork_witness.py probe FOLDER        a fresh process looks at all that, and at who it is; one JSON object
    python3 fork_witness.py tell FOLDER VALUE   put VALUE into that memory, and a file of that name beside it

`hold` keeps a secret and a counter in memory only, and answers on FOLDER/memory.sock and on a TCP port of 127.0.0.1. Its child
process waits on FOLDER/waiter.sock and reads 16 random bytes when somebody connects: the first read after a fork. Both end
when FOLDER is removed, so whoever started them may be interrupted before it knows their ids.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict  # noqa: UP035 - the Python in a sandbox may be an old one

TICK_S = 0.01
ANSWER_S = 5.0

Answering = Callable[[str], Dict[str, Any]]  # noqa: UP006


def random_hex() -> str:
    with open("/dev/urandom", "rb", buffering=0) as source:  # noqa: PTH123
        return source.read(16).hex()


class Memory:
    """What exists nowhere but in the memory of this process."""

    def __init__(self) -> None:
        self.secret = random_hex()
        self.ticks = 0
        self.value = ""
        self.longest_gap_s = 0.0

    def tick(self, folder: Path, waiter_pid: int) -> None:
        last = time.monotonic()
        while self.ticks % 100 or folder.exists():
            time.sleep(TICK_S)
            now = time.monotonic()
            self.ticks += 1
            self.longest_gap_s = max(self.longest_gap_s, now - last)
            last = now
        os.kill(waiter_pid, signal.SIGKILL)
        os.waitpid(waiter_pid, 0)
        # The whole process and not only this thread.
        os._exit(0)

    def answer(self, line: str) -> dict[str, Any]:
        if line.startswith("set "):
            self.value = line[4:]
        longest_gap_s = self.longest_gap_s
        if line == "begin":
            self.longest_gap_s = 0.0
        return {
            "secret": self.secret,
            "ticks": self.ticks,
            "value": self.value,
            "pid": os.getpid(),
            "longest_gap_ms": round(longest_gap_s * 1000),
        }


def serve(listener: socket.socket, answer: Answering) -> None:
    """One connection after the other: a line in, a line of JSON out. A broken one ends alone."""
    while True:
        connection, _ = listener.accept()
        try:
            connection.settimeout(ANSWER_S)
            line = connection.makefile("r").readline().strip()
            connection.sendall(json.dumps(answer(line)).encode() + b"\n")
        except OSError:
            pass
        finally:
            connection.close()


def listening(address: Any, family: int) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen(16)
    return listener


def hold(folder: Path) -> None:
    (folder / "files").mkdir(exist_ok=True)
    waiter = listening(str(folder / "waiter.sock"), socket.AF_UNIX)
    # Before any thread exists: the waiter is a process of its own, blocked in accept.
    waiter_pid = os.fork()
    if waiter_pid == 0:
        random_hex()
        serve(waiter, lambda line: {"random": random_hex()})
    waiter.close()
    memory = Memory()
    control = listening(str(folder / "memory.sock"), socket.AF_UNIX)
    tcp = listening(("127.0.0.1", 0), socket.AF_INET)
    (folder / "port.new").write_text(str(tcp.getsockname()[1]))
    for target in (lambda: memory.tick(folder, waiter_pid), lambda: serve(tcp, lambda line: {"secret": memory.secret})):
        threading.Thread(target=target, daemon=True).start()
    # Whoever sees the port may ask.
    (folder / "port.new").rename(folder / "port")
    serve(control, memory.answer)


def ask(address: Any, family: int, line: str = "") -> dict[str, Any]:
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_S)
        connection.connect(address)
        connection.sendall(line.encode() + b"\n")
        found: dict[str, Any] = json.loads(connection.makefile("r").readline())
        return found


def ask_memory(folder: Path, line: str = "") -> dict[str, Any]:
    return ask(str(folder / "memory.sock"), socket.AF_UNIX, line)


def probe(folder: Path) -> dict[str, Any]:
    """Everything that can be seen; what can not be is named in `errors`, so that one broken thing hides no other."""
    errors: dict[str, str] = {}
    found: dict[str, Any] = {"errors": errors}
    looks: dict[str, Callable[[], Any]] = {
        "waiting": lambda: ask(str(folder / "waiter.sock"), socket.AF_UNIX)["random"],
        "memory": lambda: ask_memory(folder, "begin"),
        "listener": lambda: ask(("127.0.0.1", int((folder / "port").read_text())), socket.AF_INET)["secret"],
        "fresh": random_hex,
        "hostname": lambda: os.uname().nodename,
        "machine_id": lambda: Path("/etc/machine-id").read_text().strip(),
        "sandbox_id": lambda: os.environ["PANDASTACK_SANDBOX_ID"],
        "files": lambda: {path.name: path.read_text() for path in (folder / "files").iterdir()},
        "time_s": time.time,
    }
    for name, look in looks.items():
        try:
            found[name] = look()
        except Exception as error:
            found[name], errors[name] = None, "{}: {}".format(type(error).__name__, error)  # noqa: UP032
    return found


def main() -> None:
    verb, folder = sys.argv[1], Path(sys.argv[2])
    if verb == "hold":
        hold(folder)
    elif verb == "probe":
        print(json.dumps(probe(folder)))
    else:
        (folder / "files" / sys.argv[3]).write_text(sys.argv[3])
        print(json.dumps(ask_memory(folder, "set " + sys.argv[3])))


if __name__ == "__main__":
    main()
