"""One process at a time works with a data directory. Taken by `pandastack up` and `pandastack storage init`.

The file says which process that is; only whether it is locked says that it still is so.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from pandastack.errors import Conflict, HostUnfit


@contextlib.contextmanager
def held(data_dir: Path) -> Iterator[None]:
    """The directory, made if need be, is ours for as long as the block lasts. Raises Conflict where another process has it."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (data_dir / "lock").open("a+")
    except OSError as error:
        raise HostUnfit(f"the data directory {data_dir} cannot be used ({error.strerror})", hint="name another with --data-dir") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Conflict(
                f"another pandastack runs on {data_dir}", hint="stop it with `pandastack down`, or name another directory with --data-dir"
            ) from error
        os.truncate(lock.fileno(), 0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def holder(data_dir: Path) -> int | None:
    """The process that has the directory now. Raises HostUnfit."""
    try:
        with (data_dir / "lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(lock.read())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise HostUnfit(f"{data_dir / 'lock'} does not say who uses it ({error})", hint="stop its process by hand") from error
    return None
