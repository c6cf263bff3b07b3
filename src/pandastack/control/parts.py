"""What an application is made of, so that routes can reach it without knowing how it was built."""

from __future__ import annotations

from dataclasses import dataclass

from pandastack.control.access import Keys
from pandastack.control.checkpoints import Checkpoints
from pandastack.control.diff import Diffs
from pandastack.control.forks import Forks
from pandastack.control.gateway import Gateway
from pandastack.control.history import History
from pandastack.control.hosts import Host
from pandastack.control.meters import Meters
from pandastack.control.reconcile import Reconciler
from pandastack.control.sandboxes import Sandboxes
from pandastack.control.settings import ControlSettings
from pandastack.control.snapshots import Snapshots
from pandastack.control.states import States
from pandastack.control.store import Store
from pandastack.control.templates import Bakes
from pandastack.control.usage import Usages
from pandastack.control.work import Crew


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Built by `app.build` when it starts; one set per application."""

    settings: ControlSettings
    store: Store
    host: Host
    crew: Crew
    keys: Keys
    sandboxes: Sandboxes
    states: States
    snapshots: Snapshots
    checkpoints: Checkpoints
    history: History
    forks: Forks
    diffs: Diffs
    usages: Usages
    bakes: Bakes
    gateway: Gateway
    reconciler: Reconciler
    meters: Meters
