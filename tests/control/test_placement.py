from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pandastack.control import placement
from pandastack.control.fake_host import FakeHost
from pandastack.control.settings import ControlSettings
from pandastack.errors import CapacityError, HostUnfit, InvalidRequest
from pandastack.wire.host import HostInfo
from pandastack.wire.ids import HostId
from pandastack.wire.sandboxes import SandboxCreate

SETTINGS = ControlSettings(database_path=Path("/nowhere"), max_memory_mb=4096, max_cpu=4)


def host(name: str = "a", **changes: Any) -> HostInfo:
    info = asyncio.run(FakeHost(memory_mb=8192).describe())
    return info.model_copy(update={"id": HostId(name), "capacity": info.capacity.model_copy(update=changes)})


def test_limits_left_out_come_from_the_template() -> None:
    place = placement.choose(SandboxCreate(template="base"), [host()], SETTINGS)
    assert (place.cpu, place.memory_mb, place.disk_mb, place.ttl_seconds) == (1.0, 512, 2048, 3600)


@pytest.mark.parametrize(("field", "most"), [("memory_mb", 4096), ("cpu", 4), ("disk_mb", 1 << 20)])
def test_the_limit_is_allowed_and_one_more_is_not(field: str, most: int) -> None:
    placement.choose(SandboxCreate.model_validate({field: most}), [host()], SETTINGS)
    with pytest.raises(InvalidRequest) as refused:
        placement.choose(SandboxCreate.model_validate({field: most + 1}), [host()], SETTINGS)
    assert (refused.value.field, refused.value.maximum) == (field, most)


def test_the_host_with_the_most_free_memory_is_chosen() -> None:
    busy, free = host("busy", memory_reserved_mb=8000), host("free", memory_reserved_mb=100)
    assert placement.choose(SandboxCreate(), [busy, free], SETTINGS).host_id == "free"


def test_without_a_host_or_a_runtime_nothing_is_promised() -> None:
    with pytest.raises(CapacityError) as refused:
        placement.choose(SandboxCreate(), [], SETTINGS)
    assert refused.value.retry_after_s
    with pytest.raises(HostUnfit) as unfit:
        placement.choose(SandboxCreate(), [host().model_copy(update={"runtime": None})], SETTINGS)
    assert unfit.value.hint
