"""Finds the runsc to use, and fetches Debian's when there is none: into our own prefix, past the system's package sources.

apt does the fetching, with a private configuration: it checks the signature of the package list against Debian's keyring
and the package against the list, as it would for an installation. Nothing is installed; one file is unpacked.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from pandastack.errors import HostUnfit
from pandastack.host.storage import mirrors
from pandastack.host.storage.recipes import Distribution

# The oldest Debian release whose runsc has the systrap platform and can be restored reliably.
SUITE = "trixie"
_FETCH_TIMEOUT_S = 300.0
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


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
    architecture = _ARCHITECTURES.get(platform.machine())
    if architecture is None:
        raise HostUnfit(f"gVisor does not support the architecture {platform.machine()}", hint="use a machine with x86-64 or arm64")
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise HostUnfit(
            "runsc is missing and this is no Debian system to fetch it with", hint="install gVisor, and name its runsc in PANDASTACK_RUNSC"
        )
    distribution = Distribution(name="debian", version="13", suite=SUITE)
    mirror = mirrors.find(distribution, debian_mirror=debian_mirror, ubuntu_mirror=None)
    keyring = mirrors.keyring(distribution)
    say(f"fetching runsc from Debian {SUITE}")
    with _work_folder(prefix) as work:
        environment = _private_apt(work, architecture, mirrors.sources_list(distribution, mirror, str(keyring)))
        await _run(["apt-get", "-qq", "update"], work, environment)
        await _run(["apt-get", "-qq", "download", "runsc"], work / "download", environment)
        packages = list((work / "download").glob("runsc_*.deb"))
        if not packages:
            raise HostUnfit(f"Debian {SUITE} has no runsc for {architecture}", hint="name a runsc in PANDASTACK_RUNSC")
        await _run(["dpkg-deb", "--extract", str(packages[0]), str(work / "tree")], work, environment)
        binary = work / "tree/usr/bin/runsc"
        binary.chmod(0o755)
        binary.rename(target)
    say("runsc is unpacked")
    return target


@contextlib.contextmanager
def _work_folder(prefix: Path) -> Iterator[Path]:
    # Beside the target, so that the binary appears there by a rename.
    prefix.mkdir(mode=0o755, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=prefix, prefix=".fetch-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def _private_apt(work: Path, architecture: str, sources: str) -> dict[str, str]:
    for directory in ("lists/partial", "cache/archives/partial", "parts", "preferences", "download"):
        (work / directory).mkdir(parents=True)
    (work / "status").touch()
    (work / "sources.list").write_text(sources)
    (work / "apt.conf").write_text(
        "".join(
            f'{key} "{value}";\n'
            for key, value in {
                "Dir::Etc::sourcelist": work / "sources.list",
                "Dir::Etc::sourceparts": work / "parts",
                "Dir::Etc::preferences": "/dev/null",
                "Dir::Etc::preferencesparts": work / "preferences",
                "Dir::State": work,
                "Dir::State::lists": work / "lists",
                "Dir::State::status": work / "status",
                "Dir::Cache": work / "cache",
                "APT::Sandbox::User": "root",
                "APT::Architecture": architecture,
                "APT::Architectures": architecture,
                "Acquire::Languages": "none",
                "Acquire::Retries": "3",
            }.items()
        )
    )
    # The system's proxy settings in apt.conf.d are still read; its sources are not.
    return {**os.environ, "APT_CONFIG": str(work / "apt.conf"), "LC_ALL": "C.UTF-8"}


async def _run(argv: list[str], directory: Path, environment: dict[str, str]) -> None:
    process = await asyncio.create_subprocess_exec(
        *argv,
        cwd=directory,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(_FETCH_TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError as error:
        raise HostUnfit(f"{argv[0]} did not finish while fetching runsc", hint="check the network and the Debian mirror") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        last = output.decode("utf-8", "replace").strip().splitlines()[-1:] or [""]
        raise HostUnfit(
            f"runsc could not be fetched: {last[0][:300]}",
            hint="check the network and the Debian mirror, or name a runsc in PANDASTACK_RUNSC",
        )
