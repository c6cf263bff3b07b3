"""The gate of every sandbox: each step of its identity is confirmed, or it is not handed out."""

from __future__ import annotations

from typing import Any

import pytest

from pandastack.errors import GuestError, HookFailed
from pandastack.host import identity
from pandastack.wire.guest import IdentityReport, IdentityStep

pytestmark = pytest.mark.anyio


class Teller:
    """As a guest, with the report that a test wants."""

    def __init__(self, steps: dict[str, IdentityStep], offset_ns: int = 0) -> None:
        self.report = IdentityReport(steps=steps, offset_ns=offset_ns)
        self.given: dict[str, Any] = {}

    async def identity(self, **given: Any) -> IdentityReport:
        self.given = given
        return self.report


def steps(**changed: IdentityStep | None) -> dict[str, IdentityStep]:
    every = {name: IdentityStep(ok=True, detail="") for name in identity.REQUIRED_STEPS} | changed
    return {name: step for name, step in every.items() if step is not None}


async def confirm(teller: Teller) -> None:
    await identity.confirm(teller, identity.fresh("id", "name", {"A": "1"}))  # type: ignore[arg-type]


async def test_a_full_report_passes() -> None:
    teller = Teller(steps())
    await confirm(teller)
    assert teller.given["timeout_s"] == identity.IDENTITY_TIMEOUT_S
    assert (teller.given["hostname"], teller.given["env"]) == ("name", {"A": "1"})
    assert abs(teller.given["unix_ns"]) > 1_600_000_000 * 10**9


@pytest.mark.parametrize("name", sorted(identity.REQUIRED_STEPS))
@pytest.mark.parametrize("missing", [True, False], ids=["missing", "refused"])
async def test_a_step_that_was_not_done_fails_it_by_name(name: str, missing: bool) -> None:
    step = None if missing else IdentityStep(ok=False, detail="no call for that")
    with pytest.raises(GuestError) as refused:
        await confirm(Teller(steps(**{name: step})))
    assert name in refused.value.message or isinstance(refused.value, HookFailed)
    assert refused.value.fields["detail"] == (None if missing else "no call for that")


async def test_a_hook_that_failed_is_told_apart_and_in_its_words() -> None:
    left = IdentityStep(ok=False, detail="not continued: hooks failed")
    with pytest.raises(HookFailed, match="exit code 3: no database") as refused:
        await confirm(
            Teller(steps(hooks=IdentityStep(ok=False, detail="after-restore ended with exit code 3: no database"), processes=left))
        )
    assert (refused.value.code, refused.value.status) == ("hook_failed", 502)


async def test_the_first_step_that_failed_is_the_reason() -> None:
    caused = {name: IdentityStep(ok=False, detail="machine_id failed") for name in ("hooks", "processes")}
    with pytest.raises(GuestError, match="machine_id, hooks, processes") as refused:
        await confirm(Teller(steps(machine_id=IdentityStep(ok=False, detail="read-only"), **caused)))
    assert not isinstance(refused.value, HookFailed)
    assert refused.value.fields["detail"] == "read-only"


async def test_the_hook_gets_its_time() -> None:
    teller = Teller(steps())
    await identity.confirm(teller, identity.fresh("id", "name", {}), hook_timeout_s=7.5)  # type: ignore[arg-type]
    assert (teller.given["hook_timeout_s"], teller.given["timeout_s"]) == (7.5, identity.IDENTITY_TIMEOUT_S)


async def test_a_step_of_a_newer_guest_does_no_harm() -> None:
    await confirm(Teller(steps(colour=IdentityStep(ok=False, detail=""))))


def test_no_two_sandboxes_share_anything_secret() -> None:
    made = [identity.fresh("id", "name", {}) for _ in range(50)]
    for field in ("token", "machine_id", "entropy"):
        assert len({getattr(one, field) for one in made}) == 50
    assert {len(one.entropy) for one in made} == {64}
    assert identity.fresh("id", "name", {}, machine_id="kept").machine_id == "kept"


class _Late:
    """A guest whose runtime owns the clock, and that is off by `offset_s` as it sees it."""

    def __init__(self, offset_s: float) -> None:
        self._offset_ns = round(offset_s * 1e9)

    async def identity(self, **_: object) -> IdentityReport:
        steps = {name: IdentityStep(ok=True, detail="runtime" if name == "clock" else "set") for name in identity.REQUIRED_STEPS}
        return IdentityReport(steps=steps, offset_ns=self._offset_ns)


@pytest.mark.parametrize(("offset_s", "fits"), [(0.0, True), (0.4, True), (-0.4, True), (-0.6, False), (0.6, False), (3600.0, False)])
@pytest.mark.anyio
async def test_a_clock_that_cannot_be_set_must_be_right(offset_s: float, fits: bool) -> None:
    confirming = identity.confirm(_Late(offset_s), identity.fresh("id", "name", {}))  # type: ignore[arg-type]
    if fits:
        await confirming
    else:
        with pytest.raises(GuestError):
            await confirming
