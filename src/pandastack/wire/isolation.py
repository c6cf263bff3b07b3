"""How far sandboxes are kept from their host: the one order of it, and the words for it that a create or an operator may use.

    none < QEMU that emulates (tcg) < gVisor < QEMU with KVM < Firecracker

An emulator stands below gVisor although its guest has a kernel of its own: its makers promise a boundary only for what
runs under KVM, and its code that faces the guest is by far the largest.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Literal

AUTO, MICROVM = "auto", "microvm"
# The runtimes that PandaStack knows, whether or not a host has them.
RUNTIMES = ("firecracker", "qemu", "gvisor")

# The strongest first, for people.
ORDER = "firecracker, qemu with kvm, gvisor, qemu with tcg (emulation)"

Minimum = Literal["none", "qemu", "gvisor", "qemu-kvm", "firecracker"]


class Level(IntEnum):
    """The higher the stronger."""

    NONE = 0
    EMULATED = 1
    GVISOR = 2
    KVM = 3
    FIRECRACKER = 4


MINIMUMS: dict[Minimum, Level] = {
    "none": Level.NONE,
    "qemu": Level.EMULATED,
    "gvisor": Level.GVISOR,
    "qemu-kvm": Level.KVM,
    "firecracker": Level.FIRECRACKER,
}


def level(runtime: str, isolation: str, acceleration: str | None) -> Level:
    """Where a runtime stands; `isolation` and `acceleration` as in `host.runtimes.base.Runtime`."""
    if isolation == "gvisor":
        return Level.GVISOR
    if isolation != "microvm":
        return Level.NONE
    if acceleration != "kvm":
        return Level.EMULATED
    return Level.FIRECRACKER if runtime == "firecracker" else Level.KVM
