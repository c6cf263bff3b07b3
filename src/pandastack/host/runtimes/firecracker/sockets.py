"""Connects to the sockets that a jailed process has made: below a folder, whatever its length, and never through a link."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from pandastack.errors import RuntimeFailed


def connect(place: Path, timeout_s: float) -> socket.socket:
    """A stream to whoever listens at `place`. Raises OSError where nobody does, RuntimeFailed where there is something else.

    The path of a socket has at most 107 bytes, and the jailed process may write where this one is: so the socket itself is
    opened first, and then connected to.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.settimeout(timeout_s)
        fd = os.open(place, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                raise RuntimeFailed("a socket of the machine is none", detail=place.name)
            made.connect(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
    except BaseException:
        made.close()
        raise
    return made
