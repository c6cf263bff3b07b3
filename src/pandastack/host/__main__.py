"""`python -m pandastack.host doctor|setup|install|storage`; what the command line starts.

doctor: exit code 0 when some runtime works, else 1; with --security 1 when something of the production checklist fails. setup: fetches
what this host lacks (runsc, and a guest kernel where there are programs for microVMs) into the cache directory, lines of progress on
stderr, the path of runsc on stdout; with --update 1 when no newer guest kernel could be looked for. install firecracker: its path on
stdout. storage init: makes a pool, its file on stdout. storage status: what takes the disk. Wrong usage: 2.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from pandastack.errors import HostUnfit, PandastackError
from pandastack.host import app, doctor, fetch_firecracker, fetch_runsc, hardening, lock, runtimes_here
from pandastack.host.settings import HostSettings, read
from pandastack.host.storage import space, status
from pandastack.host.storage.pool import Pool


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pandastack.host", description="Look at this host, or fetch what it needs.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    examined = verbs.add_parser("doctor", help="what this machine can run, and what to change")
    examined.add_argument("--json", action="store_true")
    examined.add_argument("--security", action="store_true", help="the production checklist instead")
    fetched = verbs.add_parser("setup", help="fetch runsc into the cache directory when there is none")
    fetched.add_argument("--update", action="store_true", help="also a newer guest kernel, if there is one")
    install = verbs.add_parser("install", help="put a runtime into the cache directory")
    install.add_argument("runtime", choices=["firecracker"])
    install.add_argument("--path", type=Path, help="a Firecracker with its jailer beside it, or the folder of a release")
    install.add_argument("--releases", default=fetch_firecracker.RELEASES, help="another address of Firecracker's releases")
    storage = verbs.add_parser("storage", help="what takes the disk, and a pool whose files share blocks").add_subparsers(
        dest="action", required=True
    )
    init = storage.add_parser("init", help="make a pool: an XFS in a file")
    init.add_argument("--file", type=Path, help="where to make it (default: pool.xfs in the data directory)")
    init.add_argument("--size-gb", type=float, help="GiB (default: three quarters of what is free)")
    shown = storage.add_parser("status", help="how much there is, and what takes it")
    shown.add_argument("--json", action="store_true")
    for verb in (init, shown):
        verb.add_argument("--data-dir", type=Path)
    arguments = parser.parse_args(argv)
    try:
        settings = read()
        if arguments.verb == "storage":
            settings = read(data_dir=arguments.data_dir) if arguments.data_dir is not None else settings
            return _storage_init(settings, arguments) if arguments.action == "init" else _storage_status(settings, arguments.json)
        if arguments.verb == "install":
            return _install(settings, arguments)
        if arguments.verb == "doctor" and arguments.security:
            return _checklist(settings, arguments.json)
        work = _doctor(settings, arguments.json) if arguments.verb == "doctor" else _setup(settings, arguments.update)
        return asyncio.run(_until_signal(work))
    except PandastackError as error:
        return _fail(error.message, error.hint)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return _fail("interrupted", None)


async def _until_signal(work: Coroutine[Any, Any, int]) -> int:
    """SIGTERM cancels, so that the probes' disks and cgroups are taken away also then."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


async def _doctor(settings: HostSettings, as_json: bool) -> int:
    report = await doctor.examine(settings)
    sys.stdout.write(report.model_dump_json(indent=2) + "\n" if as_json else doctor.render(report))
    return 0 if report.auto is not None else 1


def _checklist(settings: HostSettings, as_json: bool) -> int:
    checks = hardening.examine(hardening.Here(settings=settings))
    shown = json.dumps({"checks": [check.model_dump() for check in checks]}, indent=2) + "\n" if as_json else doctor.render_checks(checks)
    sys.stdout.write(shown)
    return 1 if any(check.ok is False for check in checks) else 0


async def _setup(settings: HostSettings, update: bool) -> int:
    prefix = settings.cache_dir / "runsc"
    path = await doctor.usable_runsc(settings)
    if path is not None:
        _say(f"runsc is there already: {path}")
    elif settings.runsc is not None:
        return _fail(f"the runsc of PANDASTACK_RUNSC does not work: {settings.runsc}", "unset it to have one fetched; the doctor says more")
    elif prefix / "runsc" in fetch_runsc.candidates(None, prefix):
        return _fail(f"{prefix / 'runsc'} does not work here", "the doctor says why; remove it to have it fetched again")
    else:
        try:
            path = await fetch_runsc.fetch(prefix, debian_mirror=settings.debian_mirror, say=_say)
        except OSError as error:
            return _fail(f"nothing can be written in {prefix} ({error.strerror})", "run as root, or set PANDASTACK_CACHE_DIR")
    wanted = runtimes_here.wanted(settings)
    found = {"qemu": runtimes_here.qemu(settings), "firecracker": runtimes_here.firecracker(settings)}
    microvms = any(name in wanted and program is not None for name, program in found.items())
    updated = await _update(settings, microvms) if update else True
    if microvms:
        await _guest_kernel(settings)
    sys.stdout.write(f"{path}\n")
    return 0 if updated else 1


async def _update(settings: HostSettings, microvms: bool) -> bool:
    """Whether what microVMs boot is the newest there is, or what the operator wants. If not, what is there stays in use."""
    if not microvms:
        _say("there is no guest kernel to update: neither QEMU nor Firecracker is here")
    elif settings.kernel is not None:
        _say(f"the guest kernel is the one that PANDASTACK_KERNEL names: {settings.kernel}")
    else:
        try:
            await runtimes_here.update_guest_kernel(settings, say=_say)
        except (HostUnfit, OSError) as error:
            why, hint = (
                (error.message, error.hint) if isinstance(error, HostUnfit) else (str(error), "run as root, or set PANDASTACK_CACHE_DIR")
            )
            _fail(f"no newer guest kernel could be had: {why}", hint)
            return False
    return True


async def _guest_kernel(settings: HostSettings) -> None:
    """What microVMs boot. That it cannot be had is told, and no failure: gVisor does not need it."""
    try:
        guest, _ = await asyncio.to_thread(app.guest_directory, settings.cache_dir / "guest")
        kernel = await runtimes_here.guest_kernel(settings, guest, say=_say)
        _say(f"the guest kernel for microVMs is {kernel.version}")
    except (HostUnfit, OSError) as error:
        _say(f"there will be no microVMs, for want of a guest kernel: {error}")


def _install(settings: HostSettings, arguments: argparse.Namespace) -> int:
    prefix = settings.cache_dir / "firecracker"
    made = fetch_firecracker.install(prefix, path=arguments.path, releases=arguments.releases, say=_say)
    if settings.firecracker is not None:
        _say(f"PANDASTACK_FIRECRACKER names another one, which is used instead: {settings.firecracker}")
    sys.stdout.write(f"{made.firecracker}\n")
    return 0


def _storage_init(settings: HostSettings, arguments: argparse.Namespace) -> int:
    if os.geteuid() != 0:
        raise HostUnfit("pandastack storage init must run as root: it mounts what it makes", hint="run it with sudo")
    with lock.held(settings.data_dir):
        pool = Pool(settings.data_dir)
        known = pool.file
        if known is None and arguments.file is None and space.shares_blocks(settings.data_dir):
            _say(f"no pool is needed: files in {settings.data_dir} share their blocks already")
            return 0
        file, size_bytes = pool.init(arguments.file, None if arguments.size_gb is None else int(arguments.size_gb * (1 << 30)))
    made = "made" if known is None else "there already"
    _say(f"{file} is {made}: an XFS of {size_bytes / (1 << 30):.0f} GiB that takes what is written to it; `pandastack up` uses it")
    if (free := space.free_bytes(file.parent)) < size_bytes and known is None:
        _say(f"only {free / (1 << 30):.0f} GiB are free where it lies, which is all that it can hold now")
    sys.stdout.write(f"{file}\n")
    return 0


def _storage_status(settings: HostSettings, as_json: bool) -> int:
    found = status.look(settings.data_dir, images=settings.cache_dir, captures=settings.captures_dir)
    sys.stdout.write(found.model_dump_json(indent=2) + "\n" if as_json else status.render(found))
    return 0 if found.problem is None else 1


def _say(text: str) -> None:
    sys.stderr.write(f"pandastack: {text}\n")
    sys.stderr.flush()


def _fail(message: str, hint: str | None) -> int:
    _say(message)
    if hint:
        sys.stderr.write(f"  {hint}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
