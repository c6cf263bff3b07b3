"""The production checklist: each fact told right from what a kernel would say, and every one of them documented."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pandastack.host import __main__ as program
from pandastack.host import hardening
from pandastack.host.checks import Check
from pandastack.host.hardening import Here
from pandastack.host.settings import HostSettings

FLAWS = "sys/devices/system/cpu/vulnerabilities"
PAGE = Path(__file__).parents[2] / "docs/howto/production.md"

# What is to be changed: a file, what it says, the check it concerns, and a word of the answer.
BAD = [
    (f"{FLAWS}/mds", "Vulnerable: Clear CPU buffers attempted, no microcode", "cpu flaws", "mds"),
    ("sys/devices/system/cpu/smt/active", "1", "smt", "threads"),
    ("sys/kernel/mm/ksm/run", "1", "ksm", "merged"),
    ("proc/swaps", "Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2", "swap", "/dev/sda2"),
    ("sys/module/kvm_intel/parameters/nested", "Y", "nested kvm", "kvm_intel"),
    ("sys/module/kvm_amd/parameters/nested", "1", "nested kvm", "kvm_amd"),
    ("proc/sys/kernel/yama/ptrace_scope", "3", "ptrace", "traced"),
    ("proc/sys/kernel/unprivileged_bpf_disabled", "0", "bpf", "every user"),
    ("run/reboot-required", "", "restart", "newer"),
]
GOOD = [
    (f"{FLAWS}/mds", "Mitigation: Clear CPU buffers; SMT vulnerable", "cpu flaws"),
    (f"{FLAWS}/meltdown", "Not affected", "cpu flaws"),
    ("sys/devices/system/cpu/smt/active", "0", "smt"),
    ("sys/kernel/mm/ksm/run", "0", "ksm"),
    ("proc/swaps", "Filename Type Size Used Priority\n/dev/zram0 partition 1 0 100", "swap"),
    ("sys/module/kvm_amd/parameters/nested", "0", "nested kvm"),
    ("proc/sys/kernel/core_pattern", "core", "core dumps"),
    ("proc/sys/kernel/yama/ptrace_scope", "1", "ptrace"),
    ("proc/sys/kernel/unprivileged_bpf_disabled", "2", "bpf"),
]


def looked(tmp_path: Path, **settings: object) -> dict[str, Check]:
    here = Here(settings=HostSettings(data_dir=tmp_path / "data", **settings), root=tmp_path)  # type: ignore[arg-type]
    return {check.name: check for check in hardening.examine(here)}


def say(tmp_path: Path, path: str, text: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")


@pytest.mark.parametrize(("path", "text", "name", "word"), BAD)
def test_what_is_to_be_changed_fails_with_a_remedy(tmp_path: Path, path: str, text: str, name: str, word: str) -> None:
    say(tmp_path, path, text)
    check = looked(tmp_path)[name]
    assert check.ok is False
    assert word in check.detail
    assert check.hint


@pytest.mark.parametrize(("path", "text", "name"), GOOD)
def test_what_is_well_passes(tmp_path: Path, path: str, text: str, name: str) -> None:
    say(tmp_path, path, text)
    assert looked(tmp_path)[name].ok is True


def test_a_handler_of_crashes_is_named(tmp_path: Path) -> None:
    say(tmp_path, "proc/sys/kernel/core_pattern", "|/lib/systemd/systemd-coredump %P")
    check = looked(tmp_path)["core dumps"]
    assert (check.ok, "systemd-coredump" in check.detail) == (None, True)


def test_the_kvm_device_is_not_for_everybody(tmp_path: Path) -> None:
    assert looked(tmp_path)["kvm device"].ok is True
    say(tmp_path, "dev/kvm", "")
    for mode, ok in ((0o666, False), (0o660, True)):
        (tmp_path / "dev/kvm").chmod(mode)
        assert looked(tmp_path)["kvm device"].ok is ok


def test_the_data_directory_is_private(tmp_path: Path) -> None:
    assert looked(tmp_path)["data directory"].ok is None
    (tmp_path / "data").mkdir()
    for mode, ok in ((0o755, False), (0o770, False), (0o700, True), (0o750, False)):
        (tmp_path / "data").chmod(mode)
        assert looked(tmp_path)["data directory"].ok is ok, oct(mode)


def test_the_least_isolation_is_a_choice(tmp_path: Path) -> None:
    assert looked(tmp_path)["least isolation"].ok is None
    check = looked(tmp_path, min_isolation="gvisor")["least isolation"]
    assert (check.ok, "gvisor" in check.detail) == (True, True)


def test_a_kernel_that_says_nothing_is_no_error(tmp_path: Path) -> None:
    found = looked(tmp_path)
    assert found.keys() == hardening.CHECKS.keys()
    assert not [check for check in found.values() if check.ok is False]


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / FLAWS / "mds").mkdir(parents=True)
    check = looked(tmp_path)["cpu flaws"]
    assert (check.ok, "unexpectedly" in check.detail) == (None, True)


def test_the_program_prints_it_and_says_by_its_code_whether_all_is_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    monkeypatch.setenv("PANDASTACK_DATA_DIR", str(data))
    monkeypatch.setattr(hardening, "CHECKS", {"data directory": hardening.CHECKS["data directory"]})
    assert program.main(["doctor", "--security", "--json"]) == 0
    assert [check["ok"] for check in json.loads(capsys.readouterr().out)["checks"]] == [True]
    data.chmod(0o777)
    assert program.main(["doctor", "--security"]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("FAIL data directory:")
    assert "-> chown root" in shown


def test_the_page_has_a_row_for_each_check() -> None:
    rows = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert [row for row in rows if row in hardening.CHECKS] == list(hardening.CHECKS)
