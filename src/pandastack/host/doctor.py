"""`pandastack doctor`: tests this host for real, says which runtimes work, which one `auto` picks, and why.

Read-only but for short probes that are removed (see `checks` and `kvm`). Run by `python -m pandastack.host doctor`; `preflight`
is the part that `pandastack up` asks before it touches anything. Without root fewer things can be tried, and it says so.
"""

from __future__ import annotations

import asyncio
import importlib
import shutil
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pandastack.errors import HostUnfit, PandastackError
from pandastack.host import checks, fetch_runsc, kvm, runtimes_here
from pandastack.host.backends import TRY_TIMEOUT_S, Offer
from pandastack.host.checks import Check
from pandastack.host.keeper import Keeper
from pandastack.host.runtimes.base import Probe
from pandastack.host.runtimes.gvisor.driver import GvisorRuntime
from pandastack.host.settings import HostSettings
from pandastack.wire.host import RuntimeInfo
from pandastack.wire.isolation import MINIMUMS, ORDER, Level, Minimum, level

_PROBE_TIMEOUT_S = 120.0
_MARKS = {True: "ok  ", False: "FAIL", None: "--  "}
_NOT_ROOT = "not tried, because this user is not root"
_FETCH = f"run `{Path(sys.executable).name} -m pandastack.host setup`, or name one in PANDASTACK_RUNSC"

# How a runsc is tried; tests hand in another.
Prober = Callable[[Path], Awaitable[tuple[Probe, str | None]]]


class Report(BaseModel):
    """What `doctor --json` prints. `auto` is the runtime that `up` would use, or None."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checks: list[Check]
    runtimes: list[RuntimeInfo]
    auto: str | None
    auto_reason: str


async def examine(settings: HostSettings) -> Report:
    """Everything, in about the time of the slowest probe. Raises HostUnfit where PANDASTACK_RUNTIMES names what is no runtime."""
    wanted = runtimes_here.wanted(settings)
    root = checks.root()
    guest = _guest()
    looked, gvisor, others = await asyncio.gather(
        asyncio.gather(
            *_basics(settings, root),
            _checked("user namespaces", checks.user_namespaces),
            _checked("reflink", lambda: checks.reflink(settings.data_dir)) if root.ok else _answer(_not_tried("reflink")),
            _checked("pool tools", checks.pool_tools),
            _checked("lazy memory", checks.lazy_memory) if root.ok else _answer(_not_tried("lazy memory")),
            _checked("memory", checks.memory),
            _checked("open files", checks.open_files),
            _checked("network tools", checks.network_tools),
            _checked("template tools", lambda: checks.template_tools(settings.debian_mirror, settings.ubuntu_mirror)),
            _awaited("kvm", kvm.check()),
        ),
        _gvisor(settings, root, guest) if "gvisor" in wanted else _none(),
        _others(settings, root, guest),
    )
    runtimes, tried = [*gvisor[0], *others], gvisor[1]
    runtimes.sort(key=_level, reverse=True)
    name, reason = choose(runtimes, settings.min_isolation)
    return Report(checks=[*looked, _guest_check(guest), *tried], runtimes=runtimes, auto=name, auto_reason=reason)


async def preflight(settings: HostSettings) -> list[Check]:
    """What must hold before `up` changes anything; a second or so. Whether a runtime works is found out by using it."""
    looked = await asyncio.gather(*_basics(settings, checks.root()))
    return [*looked, _guest_check(_guest())]


async def usable_runsc(settings: HostSettings) -> Path | None:
    """The runsc that `up` would use, or None when one must be fetched. Where none can be tried, the first is taken as it is."""
    candidates = fetch_runsc.candidates(settings.runsc, settings.cache_dir / "runsc")
    (gvisor,), tried = await _gvisor(settings, checks.root(), _guest())
    if gvisor.works:
        return candidates[len(tried) - 1]
    return candidates[0] if tried[0].ok is None else None


def require(found: list[Check]) -> None:
    """Raises HostUnfit with the sentence and the remedy of the first check that failed; the others are in its hint."""
    failed = [check for check in found if check.ok is False]
    if failed:
        others = [f"also {check.name}: {check.detail}" for check in failed[1:]]
        raise HostUnfit(failed[0].detail, hint="; ".join([failed[0].hint or "run `pandastack doctor`", *others]))


def choose(runtimes: list[RuntimeInfo], minimum: Minimum = "none") -> tuple[str | None, str]:
    """The runtime that `auto` means and why: the strongest of what works here, if that is as strong as it must be."""
    works = [runtime for runtime in runtimes if runtime.works]
    chosen = max(works, key=_level, default=None)
    if chosen is None:
        reasons = "; ".join(f"{runtime.name}: {runtime.reason or 'it does not work here'}" for runtime in runtimes)
        return None, f"no runtime works here ({reasons})"
    if _level(chosen) < MINIMUMS[minimum]:
        return None, f"PANDASTACK_MIN_ISOLATION is {minimum}, and the strongest that works here is {_named(chosen)}"
    among = f"the strongest of {', '.join(map(_named, works))}" if len(works) > 1 else "the only one that works here"
    return chosen.name, f"{_named(chosen)}, tried with a real sandbox, is {among}; the order is {ORDER}"


def _level(runtime: RuntimeInfo) -> Level:
    return level(runtime.name, runtime.isolation, runtime.acceleration)


def _named(runtime: RuntimeInfo) -> str:
    return f"{runtime.name} with {runtime.acceleration}" if runtime.acceleration else runtime.name


def render(report: Report) -> str:
    """The report for people: a line per check, its remedy below it when something is to be done."""
    lines = list(_lines(report.checks))
    for runtime in report.runtimes:
        words = [runtime.version, _verdict(runtime)]
        # One that works is enough.
        mark = _MARKS[None if report.auto is not None and not runtime.works else runtime.works]
        lines.append(f"{mark} runtime {runtime.name}: {' '.join(word for word in words if word)}")
        if runtime.hint and not runtime.works:
            lines.append(f"       -> {runtime.hint}")
    lines.append(f"auto: {report.auto or 'none'} ({report.auto_reason})")
    return "\n".join(lines) + "\n"


def _verdict(runtime: RuntimeInfo) -> str:
    if not runtime.works:
        return runtime.reason or "does not work"
    how = f"works, with {runtime.acceleration}" if runtime.acceleration else "works"
    return f"{how} ({runtime.reason})" if runtime.reason else how


def render_checks(checks: list[Check]) -> str:
    """The production checklist for people, in the same form."""
    return "\n".join(_lines(checks)) + "\n"


def _lines(checks: list[Check]) -> Iterator[str]:
    for check in checks:
        yield f"{_MARKS[check.ok]} {check.name}: {check.detail}"
        if check.hint and check.ok is not True:
            yield f"       -> {check.hint}"


def _basics(settings: HostSettings, root: Check) -> list[Awaitable[Check]]:
    return [
        _checked("architecture", checks.architecture),
        _answer(root),
        _checked("linux", checks.linux),
        _checked("python", checks.python),
        _checked("cgroups", checks.cgroup) if root.ok else _answer(_not_tried("cgroups")),
        _checked("disks", lambda: checks.disks(settings.data_dir)) if root.ok else _answer(_not_tried("disks")),
        _checked("disk space", lambda: checks.disk_space(settings.data_dir, settings.disk_low_water_mb)),
    ]


async def _answer(check: Check) -> Check:
    return check


def _not_tried(name: str) -> Check:
    return checks.unsure(name, _NOT_ROOT, hint="run it with sudo")


async def _checked(name: str, look: Callable[[], Check]) -> Check:
    return await _awaited(name, asyncio.to_thread(look))


async def _awaited(name: str, work: Awaitable[Check]) -> Check:
    """One check that cannot take the others down: its error becomes its sentence."""
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            return await work
    except PandastackError as error:
        more = f" ({error.fields['detail']})" if error.fields.get("detail") else ""
        return checks.failed(name, error.message + more, error.hint or "see the kernel log (dmesg)")
    except TimeoutError:
        return checks.failed(name, f"no result after {_PROBE_TIMEOUT_S:g} s", hint="try again when the machine is less busy")
    except Exception as error:
        detail = f"the check itself failed: {type(error).__name__}: {error}"
        return checks.failed(name, detail, hint="this is a defect of the doctor; please report it")


def _guest() -> Path | None:
    # By name: this package is a wheel of its own, and the doctor must run, and say so, where it is missing.
    try:
        path = Path(importlib.import_module("pandastack_guest").path())
    except ImportError:
        return None
    return path if path.is_file() else None


def _guest_check(guest: Path | None) -> Check:
    if guest is None:
        detail = "the daemon that runs inside of sandboxes is missing (package pandastack-guest)"
        return checks.failed("guest daemon", detail, hint="pip install 'pandastack[server]'")
    return checks.passed("guest daemon", str(guest))


async def _gvisor(settings: HostSettings, root: Check, guest: Path | None) -> tuple[list[RuntimeInfo], list[Check]]:
    # In a thread with a loop of its own, which a signal cannot interrupt between making something and removing it.
    runtime, tried = await asyncio.to_thread(lambda: asyncio.run(_gvisor_here(settings, root, guest)))
    return [runtime], tried


async def _none() -> tuple[list[RuntimeInfo], list[Check]]:
    return [], []


async def _gvisor_here(settings: HostSettings, root: Check, guest: Path | None) -> tuple[RuntimeInfo, list[Check]]:
    candidates = fetch_runsc.candidates(settings.runsc, settings.cache_dir / "runsc")
    if not root.ok:
        return _info(Probe(works=False, reason=root.detail if candidates else "no runsc was found", hint=root.hint)), [
            _untried_runsc(candidates, _NOT_ROOT)
        ]
    if guest is None:
        probe = Probe(works=False, reason="it cannot be tried without the guest daemon", hint="pip install 'pandastack[server]'")
        return _info(probe), [_untried_runsc(candidates, "not tried, because the guest daemon is missing")]
    with tempfile.TemporaryDirectory(prefix="pandastack-doctor-") as name:
        folder = _guest_folder(guest, Path(name))

        async def prober(runsc: Path) -> tuple[Probe, str | None]:
            group = Path(name).name
            runtime = GvisorRuntime(runsc, root=Path(name) / "gv", group=group, guest=folder, keeper=_NoKeeper(Path(name) / "keeper"))
            probe = await runtime.probe()
            return probe, runtime.dialect if probe.works else None

        return await try_runsc(candidates, prober)


async def try_runsc(candidates: list[Path], prober: Prober) -> tuple[RuntimeInfo, list[Check]]:
    """Try each runsc, best first, until one works; a check for each that was tried."""
    if not candidates:
        missing = checks.failed("runsc", "no runsc was found in the settings, on PATH or in the cache directory", hint=_FETCH)
        return _info(Probe(works=False, reason="no runsc was found", hint=_FETCH)), [missing]
    tried: list[Check] = []
    last, dialect = Probe(works=False), None
    for runsc in candidates:
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                last, dialect = await prober(runsc)
        except TimeoutError:
            last = Probe(works=False, reason="a gVisor sandbox did not start in time", hint="try again when the machine is less busy")
        except Exception as error:
            last = Probe(works=False, reason=f"the probe itself failed: {type(error).__name__}: {error}", hint="please report it")
        if last.works:
            tried.append(checks.passed("runsc", f"{runsc}: {last.version}, control dialect {dialect}, ran a sandbox"))
            break
        last = replace(last, hint=last.hint or _FETCH)
        tried.append(checks.failed("runsc", f"{runsc}: {last.reason}", last.hint or _FETCH))
    if last.works:
        # A bad one before the one that works is worth a word, and no failure of this host.
        tried = [check.model_copy(update={"ok": None}) if check.ok is False else check for check in tried]
    return _info(last), tried


def _untried_runsc(candidates: list[Path], why: str) -> Check:
    if not candidates:
        return checks.failed("runsc", "no runsc was found in the settings, on PATH or in the cache directory", hint=_FETCH)
    return checks.unsure("runsc", f"{', '.join(map(str, candidates))}: {why}")


def _info(probe: Probe) -> RuntimeInfo:
    capabilities = GvisorRuntime.capabilities
    return RuntimeInfo(
        name=GvisorRuntime.name,
        works=probe.works,
        version=probe.version,
        reason=probe.reason,
        hint=probe.hint,
        isolation=GvisorRuntime.isolation,
        capabilities={"snapshot": capabilities.snapshot, "fork_memory": capabilities.fork_memory, "own_kernel": capabilities.own_kernel},
    )


async def _others(settings: HostSettings, root: Check, guest: Path | None) -> list[RuntimeInfo]:
    return await asyncio.to_thread(lambda: asyncio.run(_others_here(settings, root, guest)))


async def _others_here(settings: HostSettings, root: Check, guest: Path | None) -> list[RuntimeInfo]:
    """All but gVisor, each tried as the host tries it. Nothing is fetched; what a boot showed is kept for the host."""
    with tempfile.TemporaryDirectory(prefix="pandastack-doctor-") as name:
        work = Path(name)
        here = runtimes_here.Surroundings(
            settings=settings,
            run_dir=work,
            group=work.name,
            guest=_guest_folder(guest, work) if guest is not None else work,
            roots=work / "roots",
            keeper=_NoKeeper(work / "keeper"),
            pager=_NoPager(),
            say=lambda _: None,
            fetch=False,
        )
        return [await try_offer(offer, root, guest) for offer in await runtimes_here.offers(here) if offer.name != GvisorRuntime.name]


async def try_offer(offer: Offer, root: Check, guest: Path | None) -> RuntimeInfo:
    """What a runtime of this host is, tried for real where that can be done."""
    runtime = None
    if not root.ok:
        probe = Probe(works=False, reason=root.detail, hint=root.hint)
    elif guest is None:
        probe = Probe(works=False, reason="it cannot be tried without the guest daemon", hint="pip install 'pandastack[server]'")
    else:
        try:
            async with asyncio.timeout(TRY_TIMEOUT_S):
                runtime, probe = await offer.find()
        except PandastackError as error:
            probe = Probe(works=False, reason=error.message, hint=error.hint)
        except TimeoutError:
            probe = Probe(works=False, reason=f"no result after {TRY_TIMEOUT_S:g} s", hint="try again when the machine is less busy")
        except Exception as error:
            probe = Probe(works=False, reason=f"the probe itself failed: {type(error).__name__}: {error}", hint="please report it")
    return RuntimeInfo(
        name=offer.name,
        works=probe.works,
        version=probe.version,
        reason=probe.reason,
        hint=probe.hint,
        isolation=offer.isolation,
        acceleration=runtime.acceleration if runtime is not None and probe.works else offer.acceleration,
        capabilities={"own_kernel": offer.own_kernel},
    )


def _guest_folder(guest: Path, work: Path) -> Path:
    """The same file alone in a folder, as `up` gives it to sandboxes."""
    folder = work / "guest"
    folder.mkdir(mode=0o755)
    shutil.copyfile(guest, folder / "pandastack-guest")
    (folder / "pandastack-guest").chmod(0o555)
    return folder


class _NoKeeper(Keeper):
    """Keeps nothing: a probe's sandbox lives shorter than this process, so none needs to be started for it."""

    def put(self, name: str, fds: list[int]) -> None: ...

    def get(self, name: str) -> list[int]:
        return []

    def drop(self, name: str) -> None: ...


class _NoPager:
    """Serves nobody: a probe's machine has all of its memory."""

    def page(self, file: Path, listener: socket.socket, user: int) -> None:
        raise HostUnfit(f"nobody serves {file}")
