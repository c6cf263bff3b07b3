"""Users for machines: each has one of its own, without a name and without rights, so that none may touch another."""

from __future__ import annotations

import hashlib
import threading

_UIDS, _FIRST_UID = 0x0FFF_FFFF, 0x7000_0000


class Users:
    """The numbers of one runtime's machines."""

    def __init__(self) -> None:
        self._uids: dict[str, int] = {}
        self._lock = threading.Lock()

    def of(self, machine: str) -> int:
        """A user of this machine alone; the same one each time, unless two of this runtime's would be equal."""
        with self._lock:
            if machine not in self._uids:
                number = int.from_bytes(hashlib.sha256(machine.encode()).digest()[:4])
                taken = set(self._uids.values())
                while (uid := _FIRST_UID + (number & _UIDS)) in taken:
                    number += 1
                self._uids[machine] = uid
            return self._uids[machine]

    def remember(self, machine: str, uid: int) -> None:
        """A machine of an earlier life of this daemon has that one."""
        with self._lock:
            self._uids[machine] = uid

    def forget(self, machine: str) -> None:
        """Its user may be another machine's from now on."""
        with self._lock:
            self._uids.pop(machine, None)
