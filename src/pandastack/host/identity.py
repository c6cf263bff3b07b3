"""Makes a restored guest a machine of its own: entropy, clock, hostname, machine id, environment and token.

Then its hook `after-restore` runs, and processes that were frozen when it was saved go on.

The gate every sandbox passes before it is handed out: a guest that does not confirm each step is destroyed.
"""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass

from pandastack.errors import GuestError, HookFailed
from pandastack.host.guest import HOOK_TIMEOUT_S, Guest

IDENTITY_TIMEOUT_S = 10.0  # Without the hook.
# What a sandbox cannot be without, in the guest's order. A runtime may supply entropy and clock itself; the guest then says
# so and is ok.
REQUIRED_STEPS = ("entropy", "clock", "hostname", "machine_id", "env", "token", "hooks", "processes")
# Unknown to guests in states that were saved by older versions, which had no kernel of their own.
LATER_STEPS = ("boot_id", "disk")
MAX_CLOCK_OFFSET_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What is given to the guest; `token` opens its loopback listener and is never the tenant's key."""

    sandbox_id: str
    hostname: str
    token: str
    machine_id: str
    entropy: bytes
    env: dict[str, str]


def fresh(sandbox_id: str, hostname: str, env: dict[str, str], *, machine_id: str | None = None) -> Identity:
    """A new identity; a sandbox that is woken keeps the `machine_id` it had."""
    return Identity(
        sandbox_id=sandbox_id,
        hostname=hostname,
        token=secrets.token_hex(32),
        machine_id=machine_id or secrets.token_hex(16),
        entropy=os.urandom(64),
        env=env,
    )


async def confirm(guest: Guest, identity: Identity, *, hook_timeout_s: float = HOOK_TIMEOUT_S) -> None:
    """Give the guest its identity and check its report.

    Raises GuestError naming the steps that failed; HookFailed if it is because of the hook.
    """
    asked_ns, began = time.time_ns(), time.monotonic()
    report = await guest.identity(
        sandbox_id=identity.sandbox_id,
        hostname=identity.hostname,
        unix_ns=asked_ns,
        entropy=identity.entropy,
        token=identity.token,
        env=identity.env,
        machine_id=identity.machine_id,
        hook_timeout_s=hook_timeout_s,
        timeout_s=IDENTITY_TIMEOUT_S,
    )
    wanted = [*REQUIRED_STEPS, *(name for name in LATER_STEPS if name in report.steps)]
    failed = [name for name in wanted if name not in report.steps or not report.steps[name].ok]
    if not failed:
        if report.steps["clock"].detail == "runtime":
            _check_clock(report.offset_ns / 1e9, time.monotonic() - began)
        return
    step = report.steps.get(failed[0])  # Later ones fail because of the first.
    if failed[0] == "hooks" and step is not None:
        raise HookFailed(step.detail[:500], detail=step.detail)
    raise GuestError(f"the guest did not confirm its identity: {', '.join(failed)}", detail=step.detail if step is not None else None)


async def rehearse(guest: Guest) -> None:
    """Have a sealed guest go once through what `confirm` and a first command will ask of it. Raises GuestError."""
    nobody = fresh("", "sandbox", {})
    report = await guest.rehearse(
        hostname=nobody.hostname,
        unix_ns=time.time_ns(),
        entropy=nobody.entropy,
        machine_id=nobody.machine_id,
        timeout_s=IDENTITY_TIMEOUT_S,
    )
    if failed := [name for name, step in report.steps.items() if not step.ok]:
        raise GuestError(f"the guest could not rehearse its identity: {', '.join(failed)}", detail=report.steps[failed[0]].detail)


def _check_clock(offset_s: float, took_s: float) -> None:
    """A clock that cannot be set must be right already. What it seems to be ahead is also the time the call took to arrive."""
    if not -MAX_CLOCK_OFFSET_S <= offset_s <= MAX_CLOCK_OFFSET_S + took_s:
        raise GuestError(f"the guest's clock is {offset_s:.3f} s off and cannot be set")
