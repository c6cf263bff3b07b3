"""Drives a sandbox by runsc's command line: the fallback for a runsc whose control socket speaks no known dialect.

Each call starts a runsc process, so everything is tens of milliseconds slower. The network is `none` (the sandbox still has
a loopback interface), because some releases refuse to start any other from their command line.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes.gvisor.client import CALL_TIMEOUT_S, STATE_TIMEOUT_S


class CliControl:
    """See `client.Control`. `prefix` is runsc with its global flags, the same as at create."""

    def __init__(self, prefix: Sequence[str], container: str) -> None:
        self._prefix = list(prefix)
        self._container = container

    def _call(self, *words: str, timeout_s: float = CALL_TIMEOUT_S) -> None:
        try:
            # Output goes to a pipe that ends with runsc itself: what it detaches is given no copy of it.
            done = subprocess.run(
                [*self._prefix, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=timeout_s,
                check=False,
                env={"PATH": os.defpath},
                start_new_session=True,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeFailed(f"runsc {words[0]} did not finish within {timeout_s:g} s") from error
        except OSError as error:
            raise RuntimeFailed(f"runsc cannot be started ({error.strerror})") from error
        if done.returncode != 0:
            raise RuntimeFailed(f"runsc {words[0]} failed", exit_code=done.returncode)

    def start(self) -> None:
        self._call("start", self._container)

    def restore(self, source: Path) -> None:
        self._call("restore", "--detach", f"--image-path={source}", self._container, timeout_s=STATE_TIMEOUT_S)

    def checkpoint(self, into: Path, *, resume: bool) -> None:
        going_on = ["--leave-running"] if resume else []
        self._call("checkpoint", f"--image-path={into}", "--compression=none", *going_on, self._container, timeout_s=STATE_TIMEOUT_S)

    def pause(self) -> None:
        self._call("pause", self._container)

    def resume(self) -> None:
        self._call("resume", self._container)
