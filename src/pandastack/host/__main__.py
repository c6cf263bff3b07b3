"""`python -m pandastack.host doctor [--json]` and `python -m pandastack.host setup`; what the command line starts.

doctor: exit code 0 when some runtime works, else 1. setup: fetches what this host lacks (runsc) into the cache directory,
lines of progress on stderr, the path on stdout. Wrong usage: 2.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Coroutine
from typing import Any

from pydantic import ValidationError

from pandastack.errors import PandastackError
from pandastack.host import doctor, fetch_runsc
from pandastack.host.settings import HostSettings


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pandastack.host", description="Look at this host, or fetch what it needs.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("doctor", help="what this machine can run, and what to change").add_argument("--json", action="store_true")
    verbs.add_parser("setup", help="fetch runsc into the cache directory when there is none")
    arguments = parser.parse_args(argv)
    try:
        settings = HostSettings()
        return asyncio.run(_until_signal(_doctor(settings, arguments.json) if arguments.verb == "doctor" else _setup(settings)))
    except ValidationError as error:
        first = error.errors()[0]
        return _fail(f"the setting PANDASTACK_{str(first['loc'][0]).upper()} is wrong: {first['msg']}", None)
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


async def _setup(settings: HostSettings) -> int:
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
    sys.stdout.write(f"{path}\n")
    return 0


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
