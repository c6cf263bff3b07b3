"""Limits in both generations of cgroups, against folders that look like them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import pytest

from pandastack.errors import HostUnfit, RuntimeFailed
from pandastack.host.runtimes import cgroups
from pandastack.host.runtimes.cgroups import Hierarchy, MachineCgroup

V1 = ("memory", "cpu", "cpuacct", "pids", "freezer")
FILES = {
    "memory": ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
    "cpu": ("cpu.cfs_period_us", "cpu.cfs_quota_us", "cpu.cfs_burst_us"),
    "pids": ("pids.max",),
}
V2_FILES = ("memory.max", "memory.swap.max", "memory.oom.group", "cpu.max", "cpu.max.burst", "pids.max")


class Tree:
    """A folder with the files a kernel would show. A new group has none of them before it is `filled`, so it is filled first."""

    def __init__(self, root: Path, version: Literal[1, 2]) -> None:
        self.root, self.version = root, version
        if version == 2:
            (root / "unified").mkdir()
            (root / "unified" / "cgroup.controllers").write_text("cpuset cpu io memory pids")
            (root / "unified" / "cgroup.subtree_control").write_text("")
        for name in V1 if version == 1 else ():
            (root / name).mkdir()
            (root / name / "cgroup.procs").write_text("")

    def mountinfo(self) -> Path:
        lines = ["22 1 0:21 / /proc rw - proc proc rw"]
        if self.version == 2:
            lines.append(f"30 22 0:26 / {self.root}/unified rw - cgroup2 cgroup2 rw,nsdelegate")
        lines += [f"3{at} 22 0:3{at} / {self.root}/{name} rw - cgroup cgroup rw,{name}" for at, name in enumerate(V1) if self.version == 1]
        file = self.root / "mountinfo"
        file.write_text("\n".join(lines) + "\n")
        return file

    def directory(self, controller: str, machine: str = "m1") -> Path:
        return self.root / ("unified" if self.version == 2 else controller) / "pandastack-test" / machine

    def fill(self, machine: str = "m1") -> MachineCgroup:
        """The group as the kernel makes it, and the object for it."""
        names = {"any": V2_FILES} if self.version == 2 else {name: FILES.get(name, ()) for name in V1}
        for controller, files in names.items():
            self.directory(controller, machine).mkdir(parents=True)
            for file in (*files, "cgroup.procs"):
                (self.directory(controller, machine) / file).write_text("")
        if self.version == 2:
            (self.directory("any").parent / "cgroup.subtree_control").write_text("")
        return MachineCgroup(cgroups.detect(self.mountinfo()), "pandastack-test", machine)

    def read(self, controller: str, file: str) -> str:
        return (self.directory(controller) / file).read_text()


@pytest.fixture
def v1(tmp_path: Path) -> Tree:
    return Tree(tmp_path, 1)


@pytest.fixture
def v2(tmp_path: Path) -> Tree:
    return Tree(tmp_path, 2)


def test_v2_is_found(v2: Tree) -> None:
    found = cgroups.detect(v2.mountinfo())
    assert found == Hierarchy(version=2, mounts=dict.fromkeys(("memory", "cpu", "pids", "cpuacct"), v2.root / "unified"))


def test_v1_is_found_with_every_hierarchy_that_a_runtime_may_join(v1: Tree) -> None:
    found = cgroups.detect(v1.mountinfo())
    assert found.version == 1
    assert set(V1) <= set(found.mounts)


def test_v2_without_controllers_beside_v1_is_passed_over(v1: Tree) -> None:
    (v1.root / "unified").mkdir()
    (v1.root / "unified" / "cgroup.controllers").write_text("hugetlb")
    file = v1.mountinfo()
    file.write_text(file.read_text() + f"50 22 0:50 / {v1.root}/unified rw - cgroup2 cgroup2 rw\n")
    assert cgroups.detect(file).version == 1


@pytest.mark.parametrize("lost", ["memory", "cpu", "pids", "cpuacct"])
def test_a_missing_controller_is_named(v1: Tree, lost: str) -> None:
    file = v1.mountinfo()
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if not line.endswith(f"rw,{lost}\n")))
    with pytest.raises(HostUnfit, match=lost) as unfit:
        cgroups.detect(file)
    assert unfit.value.hint


def test_a_group_knows_its_machines(v1: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cgroups.detect(v1.mountinfo())
    monkeypatch.setattr(cgroups, "detect", lambda: found)
    group = cgroups.Group("pandastack-a")
    assert group.machines() == set()
    for controller, machine in (("memory", "one"), ("pids", "one"), ("cpu", "two")):
        (found.mounts[controller] / "pandastack-a" / machine).mkdir(parents=True)
    (found.mounts["memory"] / "pandastack-b" / "three").mkdir(parents=True)
    assert group.machines() == {"one", "two"}
    assert group.of("one").path == "/pandastack-a/one"


def test_limits_in_v2(v2: Tree) -> None:
    v2.fill().create(memory_mib=100, cpu=1.5, tasks=77)
    assert v2.read("", "memory.max") == str(100 << 20)
    assert v2.read("", "memory.swap.max") == "0"
    assert v2.read("", "memory.oom.group") == "1"
    assert v2.read("", "cpu.max") == "150000 100000"
    assert v2.read("", "cpu.max.burst") == "150000"
    assert v2.read("", "pids.max") == "77"
    assert (v2.root / "unified" / "cgroup.subtree_control").read_text() == "+memory +cpu +pids"


def test_limits_in_v1(v1: Tree) -> None:
    v1.fill().create(memory_mib=100, cpu=0.5, tasks=77)
    assert v1.read("memory", "memory.limit_in_bytes") == v1.read("memory", "memory.memsw.limit_in_bytes") == str(100 << 20)
    assert (v1.read("cpu", "cpu.cfs_quota_us"), v1.read("cpu", "cpu.cfs_period_us")) == ("50000", "100000")
    assert v1.read("pids", "pids.max") == "77"


@pytest.mark.parametrize("version", [1, 2])
def test_a_kernel_without_swap_accounting_is_no_error(tmp_path: Path, version: Literal[1, 2]) -> None:
    tree = Tree(tmp_path, version)
    group = tree.fill()
    for name in ("memory.memsw.limit_in_bytes", "memory.swap.max", "memory.oom.group", "cpu.max.burst", "cpu.cfs_burst_us"):
        for file in tree.root.rglob(name):
            file.unlink()
    group.create(memory_mib=100, cpu=1, tasks=10)


@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_the_kernel_does_not_know_is_refused_not_invented(tmp_path: Path, version: Literal[1, 2]) -> None:
    tree = Tree(tmp_path, version)
    group = tree.fill()
    for file in tree.root.rglob("pids.max"):
        file.unlink()
    with pytest.MonkeyPatch.context() as patch:
        removed = []
        patch.setattr(MachineCgroup, "remove", lambda self: removed.append(self.path))
        with pytest.raises(HostUnfit) as unfit:
            group.create(memory_mib=100, cpu=1, tasks=10)
    assert removed == ["/pandastack-test/m1"], "what was begun is undone"
    assert "root" in (unfit.value.hint or "")
    assert list(tree.root.rglob("pids.max")) == []


def test_readings_in_v2(v2: Tree) -> None:
    group, directory = v2.fill(), v2.directory("")
    (directory / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    (directory / "memory.current").write_text("4096\n")
    (directory / "memory.stat").write_text("anon 2048\nfile 2048\nshmem 512\ninactive_file 1000\nactive_file 24\n")
    (directory / "memory.events").write_text("low 0\noom 2\noom_kill 3\n")
    (directory / "cgroup.procs").write_text("7\n8\n")
    assert (group.cpu_seconds(), group.memory_bytes(), group.oom_kills(), group.pids()) == (2.5, 4096, 3, [7, 8])
    assert (group.needed_bytes(), group.own_bytes()) == (3072, 2560)


def test_readings_in_v1(v1: Tree) -> None:
    group = v1.fill()
    (v1.directory("cpuacct") / "cpuacct.usage").write_text("2500000000\n")
    (v1.directory("memory") / "memory.usage_in_bytes").write_text("4096\n")
    stat = "rss 1\ninactive_file 1\ntotal_rss 2048\ntotal_shmem 512\ntotal_inactive_file 1000\ntotal_active_file 24\n"
    (v1.directory("memory") / "memory.stat").write_text(stat)
    (v1.directory("memory") / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    (v1.directory("memory") / "cgroup.procs").write_text("7\n")
    (v1.directory("pids") / "cgroup.procs").write_text("7\n8\n")
    assert (group.cpu_seconds(), group.memory_bytes(), group.oom_kills(), group.pids()) == (2.5, 4096, 3, [7, 8])
    assert (group.needed_bytes(), group.own_bytes()) == (3072, 2560)


@pytest.mark.parametrize("version", [1, 2])
def test_readings_of_a_group_that_is_gone_are_nothing(tmp_path: Path, version: Literal[1, 2]) -> None:
    group = MachineCgroup(cgroups.detect(Tree(tmp_path, version).mountinfo()), "pandastack-test", "m1")
    assert (group.cpu_seconds(), group.memory_bytes(), group.oom_kills(), group.pids()) == (0, 0, 0, [])
    assert (group.needed_bytes(), group.own_bytes()) == (0, 0)


@pytest.mark.parametrize("version", [1, 2])
def test_remove_takes_every_directory_and_nothing_of_others(tmp_path: Path, version: Literal[1, 2]) -> None:
    tree = Tree(tmp_path, version)
    names = V1 if version == 1 else ("",)
    for name in names:
        for machine in ("m1", "m2"):
            tree.directory(name, machine).mkdir(parents=True)  # Without files: in a real one they do not stop an rmdir.
    group = MachineCgroup(cgroups.detect(tree.mountinfo()), "pandastack-test", "m1")
    group.remove()
    group.remove()
    assert not any(tree.directory(name).exists() for name in names)
    assert all(tree.directory(name, "m2").exists() for name in names)
    MachineCgroup(cgroups.detect(tree.mountinfo()), "pandastack-test", "m2").remove()
    assert not any(tree.directory(name).parent.exists() for name in names), "the last one takes the group away"


def test_processes_that_do_not_die_are_said(v2: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    group = v2.fill()
    (v2.directory("") / "cgroup.procs").write_text("7\n")
    killed = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    monkeypatch.setattr(cgroups, "_REMOVE_DEADLINE_S", 0.05)
    with pytest.raises(RuntimeFailed, match="do not die"):
        group.remove()
    assert set(killed) == {(7, 9)}
