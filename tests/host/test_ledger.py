"""The ledger: what was written is read again, and what cannot be read is never trusted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hosts import wanted
from pandastack.errors import DiskFull
from pandastack.host.ledger import Entry, Ledger
from pandastack.wire.ids import SandboxId


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(tmp_path / "ledger")
    assert made.open() == []
    return made


def test_entries_come_back_as_they_were(ledger: Ledger) -> None:
    first = Entry(request=wanted(env={"A": "\u20ac"}), state="creating", machine="m1", cpu=1.5, token="t")
    second = Entry(request=wanted(), state="failed", reason="oom")
    ledger.write(first)
    ledger.write(second)
    first.state = "running"
    ledger.write(first)
    assert sorted(ledger.open(), key=lambda entry: entry.state) == [second, first]
    ledger.remove(first.request.id)
    ledger.remove(first.request.id)
    assert ledger.open() == [second]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"request": {}, "state": "running"}', b'{"state": "paused"}'])
def test_an_entry_that_cannot_be_read_is_set_aside(ledger: Ledger, tmp_path: Path, content: bytes) -> None:
    good = Entry(request=wanted(), state="running")
    ledger.write(good)
    (tmp_path / "ledger" / "bad.json").write_bytes(content)
    assert ledger.open() == [good]
    assert (tmp_path / "ledger" / "bad.unreadable").read_bytes() == content
    assert ledger.open() == [good]


def test_an_entry_of_another_version_is_set_aside(ledger: Ledger, tmp_path: Path) -> None:
    entry = Entry(request=wanted(), state="running")
    text = entry.model_dump_json().replace('"state"', '"colour":"red","state"')
    (tmp_path / "ledger" / "new.json").write_text(text)
    assert ledger.open() == []


def test_what_a_killed_write_left_is_cleared(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "ledger" / "half.tmp").write_text("{")
    assert ledger.open() == []
    assert list((tmp_path / "ledger").iterdir()) == []


def test_the_folder_is_private(ledger: Ledger, tmp_path: Path) -> None:
    assert (tmp_path / "ledger").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_takes_nothing_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskFull) as full:
        Ledger(tmp_path / "file").write(Entry(request=wanted(), state="creating"))
    assert full.value.hint


def test_an_id_never_leaves_the_folder(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "victim.json").write_text("x")
    ledger.remove(SandboxId("../victim"))
    assert (tmp_path / "victim.json").exists()
    request = wanted(id=SandboxId("../../escaped"))
    ledger.write(Entry(request=request, state="creating"))
    assert os.listdir(tmp_path / "ledger") == ["escaped.json"]  # noqa: PTH208
