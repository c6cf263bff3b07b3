"""Finds the runsc to use, and fetches Debian's when there is none: into our own prefix, past the system's package sources.

Nothing is installed; one file is unpacked.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from pandastack.host import debian

# The oldest Debian release whose runsc has the systrap platform and can be restored reliably.
SUITE = "trixie"
_REMEDY = "install gVisor, and name its runsc in PANDASTACK_RUNSC"


def candidates(setting: Path | None, prefix: Path, search_path: str | None = None) -> list[Path]:
    """Where a runsc may be, best first: the setting alone if there is one, else PATH, else the prefix."""
    if setting is not None:
        return [setting]
    found = shutil.which("runsc", path=search_path)
    ours = prefix / "runsc"
    return [*([Path(found)] if found else []), *([ours] if ours.exists() else [])]


async def fetch(prefix: Path, *, debian_mirror: str | None, say: Callable[[str], None]) -> Path:
    """Unpack runsc of Debian into `prefix` and return its path; a present one is kept.

    Raises HostUnfit with a remedy where there is no mirror, no apt, or no package for this architecture.
    """
    target = prefix / "runsc"
    if target.exists():
        return target
    say(f"fetching runsc from Debian {SUITE}")
    async with debian.opened(prefix, SUITE, debian_mirror=debian_mirror, what="runsc", remedy=_REMEDY) as packages:
        package = await packages.download("runsc")
        tree = await debian.unpack(package, packages.work / "tree", what="runsc", remedy=_REMEDY)
        binary = tree / "usr/bin/runsc"
        binary.chmod(0o755)
        binary.rename(target)
    say("runsc is unpacked")
    return target
