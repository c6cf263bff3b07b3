"""The runsc command lines and the OCI bundle, as pure functions: same input, same text, easy to test.

Everything that shapes the saved state (flags, mounts, capabilities, resource limits of the first process) is
here, and `SHAPE` names its version: it is part of the key under which baked states are kept.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pandastack.host.runtimes.base import MachineSpec
from pandastack.host.runtimes.gvisor.client import Dialect

SHAPE = "1"
GUEST_PATH = "/.pandastack/pandastack-guest"
OPEN_FILES = 65536

# Docker's default set without NET_RAW is what user processes get (the guest daemon drops the rest before it
# starts one); PID 1 itself needs three more, to set hostname and clock and to drop capabilities.
_CAPABILITY_NAMES = """
    AUDIT_WRITE CHOWN DAC_OVERRIDE FOWNER FSETID KILL MKNOD NET_BIND_SERVICE SETFCAP SETGID SETPCAP SETUID SYS_CHROOT
    SYS_ADMIN SYS_PTRACE SYS_TIME
"""
_CAPABILITIES = [f"CAP_{name}" for name in _CAPABILITY_NAMES.split()]

# Used where a release has them. Set-user-id programs make sudo work; the host's settings are doctor's business; by
# default all gofers would share a namespace that runsc mounts below its root and never removes.
_OPTIONAL_FLAGS = {
    "allow-suid": "--allow-suid",
    "gofer-network-namespace": "--gofer-network-namespace=new",
    "host-settings": "--host-settings=ignore",
    "net-disconnect-ok": "--net-disconnect-ok",
}


def flags(root: Path, dialect: Dialect, known: Collection[str], disk: Path) -> list[str]:
    """Global flags, the same for every verb of one machine. `known` are the names of this runsc's flags; `disk`
    receives all that the guest writes.
    """
    network = "none" if dialect == "cli" else "sandbox"
    optional = [flag for name, flag in _OPTIONAL_FLAGS.items() if name in known]
    return [f"--root={root}", "--platform=systrap", f"--network={network}", f"--overlay2=root:dir={disk}", *optional]


def known_flags(help_text: str) -> frozenset[str]:
    """The names in the output of `runsc flags`."""
    return frozenset(re.findall(r"^\s+-([a-zA-Z][\w-]*)", help_text, re.MULTILINE))


def create(prefix: Sequence[str], spec: MachineSpec) -> list[str]:
    """`prefix` is runsc with its global flags."""
    return [*prefix, "create", "--bundle", str(spec.state), spec.id]


def bundle(spec: MachineSpec, cgroup: str) -> dict[str, Any]:
    """The OCI `config.json` of a machine."""
    limits = [
        {"type": "RLIMIT_NOFILE", "hard": OPEN_FILES, "soft": OPEN_FILES},
        {"type": "RLIMIT_NPROC", "hard": spec.limits.processes, "soft": spec.limits.processes},
        {"type": "RLIMIT_CORE", "hard": 0, "soft": 0},
    ]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            # No listener: host and guest speak over stdio, so that no process inside can pretend to be the host.
            "args": [GUEST_PATH, "-listen", ""],
            "cwd": "/",
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"],
            "capabilities": {
                "bounding": _CAPABILITIES,
                "effective": _CAPABILITIES,
                "permitted": _CAPABILITIES,
                "inheritable": [],
                "ambient": [],
            },
            "rlimits": limits,
            # sudo must work inside: what root may do in there is bounded by gVisor, not by this flag.
            "noNewPrivileges": False,
        },
        "root": {"path": str(spec.rootfs), "readonly": False},
        "hostname": "sandbox",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
            {
                "destination": "/dev/pts",
                "type": "devpts",
                "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
            },
            {
                "destination": "/dev/shm",  # noqa: S108 - a path inside the sandbox
                "type": "tmpfs",
                "source": "shm",
                "options": ["nosuid", "nodev", "mode=1777", "size=256m"],
            },
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro", "nosuid", "noexec", "nodev"]},
            {
                "destination": "/.pandastack",
                "type": "bind",
                "source": str(spec.guest),
                "options": ["ro", "bind", "nosuid", "nodev"],
            },
        ],
        "linux": {
            # A network namespace without a path is a new one, and empty: not even a packet socket leads outside.
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
            "cgroupsPath": cgroup,
        },
    }
