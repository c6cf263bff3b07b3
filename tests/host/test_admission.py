"""Admission is arithmetic: what is promised never exceeds the totals, whatever the order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pandastack.errors import CapacityError, DiskFull, InvalidRequest
from pandastack.host import admission as module
from pandastack.host.admission import Admission, Totals
from pandastack.host.runtimes.base import Limits
from pandastack.wire.ids import SandboxId

TOTALS = Totals(memory_mib=1000, cpu=2, disk_mib=5000, sandboxes=5)


def limits(memory_mib: int = 100, disk_mib: int = 100, cpu: float = 1) -> Limits:
    return Limits(cpu=cpu, memory_mib=memory_mib, disk_mib=disk_mib)


def made(*, free_disk_mib: int = 10_000, free_memory_mib: int = 10_000) -> Admission:
    return Admission(TOTALS, free_disk_mib=lambda: free_disk_mib, free_memory_mib=lambda: free_memory_mib)


def test_a_promise_is_counted_until_it_is_released() -> None:
    admission = made()
    admission.reserve(SandboxId("a"), limits(memory_mib=300, disk_mib=400))
    admission.reserve(SandboxId("b"), limits(memory_mib=200))
    now = admission.capacity()
    assert (now.memory_reserved_mb, now.disk_reserved_mb, now.cpu_reserved, now.sandboxes) == (500, 500, 2, 2)
    admission.release(SandboxId("a"))
    admission.release(SandboxId("a"))
    assert admission.capacity().sandboxes == 1


@pytest.mark.parametrize(("wanted", "word"), [(limits(memory_mib=901), "memory"), (limits(disk_mib=4901), "disk")], ids=["memory", "disk"])
def test_a_full_machine_says_what_it_lacks_and_when_to_come_back(wanted: Limits, word: str) -> None:
    admission = made()
    admission.reserve(SandboxId("a"), limits())
    with pytest.raises(CapacityError, match=word) as full:
        admission.reserve(SandboxId("b"), wanted)
    assert full.value.retry_after_s == module.RETRY_AFTER_S
    assert admission.capacity().sandboxes == 1


def test_too_many_sandboxes_are_refused() -> None:
    admission = made()
    for number in range(5):
        admission.reserve(SandboxId(str(number)), limits())
    with pytest.raises(CapacityError, match="5 sandboxes"):
        admission.reserve(SandboxId("6"), limits())


@pytest.mark.parametrize("field", ["memory_mib", "disk_mib", "cpu"])
def test_what_could_never_fit_is_a_wrong_request(field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        made().reserve(SandboxId("a"), limits(**{field: 100_000}))
    assert refused.value.fields["field"] == field.replace("mib", "mb")


def test_the_floor_of_really_free_memory_and_disk_holds() -> None:
    with pytest.raises(CapacityError, match="memory is free"):
        made(free_memory_mib=511).reserve(SandboxId("a"), limits())
    with pytest.raises(DiskFull, match="disk is free"):
        made(free_disk_mib=0).reserve(SandboxId("a"), limits())


def test_what_already_runs_always_fits() -> None:
    admission = made(free_disk_mib=0, free_memory_mib=0)
    admission.reserve(SandboxId("a"), limits(memory_mib=100_000), known=True)
    assert admission.capacity().sandboxes == 1


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 600), st.integers(1, 3000), st.booleans()), max_size=60))
def test_no_order_of_promises_exceeds_the_totals(steps: list[tuple[int, int, int, bool]]) -> None:
    admission, model = made(), dict[str, Limits]()
    for number, memory, disk, releases in steps:
        sandbox = SandboxId(str(number))
        if releases:
            admission.release(sandbox)
            model.pop(sandbox, None)
        elif sandbox not in model:
            try:
                admission.reserve(sandbox, limits(memory, disk))
                model[sandbox] = limits(memory, disk)
            except CapacityError:
                pass
        now = admission.capacity()
        assert now.memory_reserved_mb == sum(one.memory_mib for one in model.values()) <= TOTALS.memory_mib
        assert now.disk_reserved_mb == sum(one.disk_mib for one in model.values()) <= TOTALS.disk_mib
        assert now.sandboxes == len(model) <= TOTALS.sandboxes
