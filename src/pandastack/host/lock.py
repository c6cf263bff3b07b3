"""One process at a time works with a data directory. Taken by `pandastack up` and `pandastack storage init`."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from pandastack.errors import Conflict, HostUnfit


@contextlib.contextmanager
def held(data_dir: Path) -> Iterator[None]:
    """The directory, made if need be, is ours for as long as the block lasts. Raises Conflict where another process has it."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (data_dir / "lock").open("a")
    except OSError as error:
        raise HostUnfit(f"the data directory {data_dir} cannot be used ({error.strerror})", hint="name another with --data-dir") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Conflict(f"another pandastack runs on {data_dir}", hint="stop it, or name another directory with --data-dir") from error
        yield
