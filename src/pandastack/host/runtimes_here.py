"""Which runtimes a host tries, and how: the one place that names drivers. `backends` does the rest.

To add a driver: a `_name` function below that answers an Offer, and its line in `_OFFERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pandastack.errors import HostUnfit
from pandastack.host import fetch_runsc
from pandastack.host.backends import Found, Offer
from pandastack.host.keeper import Keeper
from pandastack.host.runtimes.base import Probe
from pandastack.host.runtimes.gvisor.driver import GvisorRuntime
from pandastack.host.settings import HostSettings
from pandastack.wire.isolation import RUNTIMES


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What drivers are made with. `guest` is the folder of the guest daemon, as sandboxes may see it.

    `group` marks every kernel object of this install; `run_dir` is its own and short. `say` gets a line for each long step.
    """

    settings: HostSettings
    run_dir: Path
    group: str
    guest: Path
    keeper: Keeper
    say: Callable[[str], None]


def offers(here: Surroundings) -> Sequence[Offer]:
    """Every runtime that the settings let this host try. Raises HostUnfit for a name that is none."""
    names = wanted(here.settings)
    return [offer(here) for name, offer in _OFFERS.items() if name in names]


def wanted(settings: HostSettings) -> Sequence[str]:
    """The names in PANDASTACK_RUNTIMES; all that this version has where it is empty."""
    names = [name.strip() for name in settings.runtimes.split(",") if name.strip()]
    for name in names:
        if name not in _OFFERS:
            what = "is not in this version" if name in RUNTIMES else "is unknown"
            raise HostUnfit(f"PANDASTACK_RUNTIMES: {name!r} {what}", hint=f"name some of: {', '.join(_OFFERS)}")
    return names or list(_OFFERS)


def _gvisor(here: Surroundings) -> Offer:
    settings, prefix = here.settings, here.settings.cache_dir / "runsc"

    async def find() -> Found:
        """The first runsc that really works here."""
        if not fetch_runsc.candidates(settings.runsc, prefix):
            await fetch_runsc.fetch(prefix, debian_mirror=settings.debian_mirror, say=here.say)
        runtime, probe, reasons = None, Probe(works=False, reason="no runsc was found"), []
        for runsc in fetch_runsc.candidates(settings.runsc, prefix):
            runtime = GvisorRuntime(runsc, root=here.run_dir / "gv", group=here.group, guest=here.guest, keeper=here.keeper)
            probe = await runtime.probe()
            if probe.works:
                return runtime, probe
            reasons.append(f"{runsc}: {probe.reason}" + (f" ({probe.hint})" if probe.hint else ""))
        return runtime, replace(probe, reason="; ".join(reasons) or probe.reason, hint=None)

    # Tried first: it takes a moment, so that the host is ready as soon as it is.
    return Offer(name="gvisor", isolation="gvisor", own_kernel=False, at_once=True, find=find)


_OFFERS: dict[str, Callable[[Surroundings], Offer]] = {"gvisor": _gvisor}
