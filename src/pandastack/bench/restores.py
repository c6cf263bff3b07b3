"""What the restore of a microVM is made of, as its runtime wrote it down; and what a create would be without emulation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from pandastack.bench import estimate, facts
from pandastack.bench.bare_qemu import Qemu
from pandastack.bench.figures import Row, percentile, quantity, timing
from pandastack.bench.server import Server
from pandastack.bench.setting import Setting

_PARTS = {"disk": "disk cloned and given", "memory": "memory mapped", "devices": "device state"}
_MESSAGES = 3  # The session's greeting, the identity, the command.
_PINGS = 30
_OF_BLANK = "parts of a restore into a machine that waited blank, between the host and QEMU; nothing of the guest is in them"


def restore(setting: Setting, n: int, blanks: int) -> list[Row]:
    """The parts of each restore, how much memory a guest has written when its first command is over, and the estimate for KVM."""
    parts: list[Mapping[str, float]] = []
    pages: list[int] = []
    with setting.running(blanks=max(1, blanks)) as running:
        for turn in range(n):
            setting.say(f"restore: {turn + 1} of {n}")
            with running.client.sandboxes.create(setting.template) as sandbox:
                sandbox.exec(["/bin/true"], check=True)
                pid = sandbox.metrics().pid
                parts.append(facts.restore_parts_ms(running, pid))
                pages.append(facts.pages_of(pid))
        rows = [_row(setting, name, [one[name] / 1000 for one in parts]) for name in _PARTS]
        written = percentile(pages, 0.5)
        rows.append(
            quantity("restore", "memory written until the first result", setting.runtime, n, written * facts.PAGE_BYTES / 1e6, "MB")
        )
        if running.acceleration != "kvm" and isinstance(setting.bare, Qemu):
            setting.say("restore: estimate for KVM")
            estimated = [
                *_requests(running, setting.template),
                *(estimate.Part(f"{said} (measured)", percentile([one[name] for one in parts], 0.5)) for name, said in _PARTS.items()),
                _messages(setting.bare),
                estimate.first_touch_ms(round(written)),
                estimate.program_ms(),
            ]
            rows.append(estimate.row("create to first result with KVM", setting.runtime, estimated))
    return rows


def _row(setting: Setting, name: str, took: Sequence[float]) -> Row:
    promise = setting.promise("create", "device state") if name == "devices" else None
    return timing("restore", _PARTS[name], setting.runtime, took, promise=promise, note=_OF_BLANK)


def _requests(running: Server, template: str) -> list[estimate.Part]:
    """The two requests without what they ask for: one that changes records on its way, as a create does, and one that reads them."""
    with running.client.sandboxes.create(template, ttl_seconds=3600) as sandbox:
        changing = _median_ms(lambda: sandbox.set_ttl(3600))
        asking = _median_ms(lambda: running.client.sandboxes.get(sandbox.id))
    return [
        estimate.Part("request that writes records (measured: a new lifetime)", changing),
        estimate.Part("request that reads them (measured: a look at a sandbox)", asking),
    ]


def _messages(by_hand: Qemu) -> estimate.Part:
    with by_hand.speaking() as guest:
        guest.ping()
        took = _median_ms(guest.ping)
    return estimate.Part(f"{_MESSAGES} messages to the guest and back (measured under emulation: calls that are refused)", _MESSAGES * took)


def _median_ms(action: Callable[[], object]) -> float:
    took = []
    for _ in range(_PINGS):
        began = time.perf_counter()
        action()
        took.append(time.perf_counter() - began)
    return percentile(took, 0.5) * 1000
