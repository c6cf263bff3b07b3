"""Where the guest daemon's static binary is. The wheel carries the one for the architecture it was built for."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["path"]

_ARCHITECTURES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}


def path(arch: str | None = None) -> Path:
    """The binary for `arch` ("amd64" or "arm64"; default: this machine's).

    PANDASTACK_GUEST_BINARY names another one. Raises FileNotFoundError if there is none.
    """
    if override := os.environ.get("PANDASTACK_GUEST_BINARY"):
        binary = Path(override)
    else:
        wanted = arch or platform.machine()
        name = _ARCHITECTURES.get(wanted.lower(), wanted)
        binary = Path(__file__).parent / "bin" / f"pandastack-guest-{name}"
    if not binary.is_file():
        raise FileNotFoundError(f"no guest daemon at {binary}")
    return binary
