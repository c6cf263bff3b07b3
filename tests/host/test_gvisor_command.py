"""What runsc is told. The texts are part of the contract with saved states: a change here must change SHAPE."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import get_args

import pytest

from pandastack.host.runtimes.base import Limits, MachineId, MachineSpec
from pandastack.host.runtimes.gvisor import command
from pandastack.host.runtimes.gvisor.client import Dialect

SPEC = MachineSpec(
    id=MachineId("m1"),
    rootfs=Path("/images/base/rootfs"),
    guest=Path("/guest"),
    disk=Path("/disks/m1"),
    state=Path("/machines/m1"),
    limits=Limits(cpu=1, memory_mib=512, disk_mib=1024, processes=77),
)
HELP = "Usage: runsc <flags>\n  -allow-suid\n    \ttext with -not-a-flag inside\n  -net-disconnect-ok\n  -overlay2 value\n"


def test_flags_are_read_from_the_help() -> None:
    assert command.known_flags(HELP) == {"allow-suid", "net-disconnect-ok", "overlay2"}
    assert command.known_flags("") == frozenset()


@pytest.mark.parametrize("dialect", get_args(Dialect))
def test_a_flag_this_runsc_does_not_know_is_not_used(dialect: Dialect) -> None:
    few = command.flags(Path("/run/gv"), dialect, frozenset(), SPEC.disk)
    assert "--root=/run/gv" in few
    assert "--platform=systrap" in few
    assert f"--overlay2=root:dir={SPEC.disk}" in few
    more = command.flags(Path("/run/gv"), dialect, command.known_flags(HELP), SPEC.disk)
    assert set(more) - set(few) == {"--allow-suid", "--net-disconnect-ok"}


def test_no_dialect_reaches_the_network_of_the_host() -> None:
    for dialect in get_args(Dialect):
        assert "--network=host" not in command.flags(Path("/r"), dialect, frozenset(), SPEC.disk)
    namespaces = {one["type"]: one for one in command.bundle(SPEC, "/c")["linux"]["namespaces"]}
    assert set(namespaces) == {"pid", "ipc", "uts", "mount", "network"}
    assert all("path" not in one for one in namespaces.values()), "each is a new one"


def test_create_names_bundle_and_machine() -> None:
    assert command.create(["runsc", "--x"], SPEC) == ["runsc", "--x", "create", "--bundle", "/machines/m1", "m1"]


def test_the_image_is_never_written_to_and_the_guest_is_read_only() -> None:
    bundle = command.bundle(SPEC, "/group/m1")
    assert bundle["root"]["path"] == str(SPEC.rootfs)
    binds = [mount for mount in bundle["mounts"] if mount["type"] == "bind"]
    assert [mount["source"] for mount in binds] == ["/guest"], "nothing else of the host is inside"
    assert {"ro", "nosuid", "nodev"} <= set(binds[0]["options"])


def test_limits_and_cgroup_are_in_the_bundle() -> None:
    bundle = command.bundle(SPEC, "/group/m1")
    assert bundle["linux"]["cgroupsPath"] == "/group/m1"
    limits = {one["type"]: (one["soft"], one["hard"]) for one in bundle["process"]["rlimits"]}
    assert limits["RLIMIT_NPROC"] == (77, 77)
    assert limits["RLIMIT_CORE"] == (0, 0)


def test_capabilities_are_a_list_that_somebody_chose() -> None:
    capabilities = command.bundle(SPEC, "/c")["process"]["capabilities"]
    assert capabilities["bounding"] == capabilities["effective"] == capabilities["permitted"]
    assert capabilities["ambient"] == capabilities["inheritable"] == []
    refused = {"CAP_SYS_MODULE", "CAP_NET_RAW", "CAP_NET_ADMIN", "CAP_SYS_RAWIO", "CAP_SYS_BOOT", "CAP_DAC_READ_SEARCH"}
    assert not refused & set(capabilities["bounding"])


def test_the_guest_is_the_first_process_and_listens_nowhere() -> None:
    process = command.bundle(SPEC, "/c")["process"]
    assert process["args"] == [command.GUEST_PATH, "-listen", ""]
    assert process["terminal"] is False
    assert not any("TOKEN" in one or "KEY" in one for one in process["env"])


def test_the_shape_of_saved_states_is_pinned() -> None:
    """When this fails: raise SHAPE in command.py if a state saved before must not be restored any more, then renew the digest."""
    bundle = command.bundle(SPEC, "/c")
    text = json.dumps([bundle["process"], bundle["mounts"], bundle["linux"]["namespaces"]], sort_keys=True)
    assert (command.SHAPE, hashlib.sha256(text.encode()).hexdigest()[:12]) == PINNED


PINNED = ("1", "5e6ef331e1c8")
