"""`pandastack setup --update`: what it says and how it ends, without a network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pandastack.errors import HostUnfit
from pandastack.host import __main__ as program
from pandastack.host import app, doctor, runtimes_here


@pytest.mark.parametrize(
    ("qemu", "kernel", "fails", "code", "said"),
    [
        (True, None, False, 0, "updated"),
        (True, None, True, 1, "no newer guest kernel could be had: no answer"),
        (True, "/k.deb", False, 0, "PANDASTACK_KERNEL names: /k.deb"),
        (False, None, False, 0, "no guest kernel to update"),
    ],
)
def test_an_update_that_fails_leaves_what_is_there_in_use(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    qemu: bool,
    kernel: str | None,
    fails: bool,
    code: int,
    said: str,
) -> None:
    async def runsc(_: Any) -> Path:
        return Path("/runsc")

    async def update(_: Any, *, say: Any) -> None:
        if fails:
            raise HostUnfit("no answer", hint="look at the network")
        say("updated")

    async def ensure(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(version="6.1_abc")

    monkeypatch.setenv("PANDASTACK_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("PANDASTACK_KERNEL", raising=False)
    if kernel is not None:
        monkeypatch.setenv("PANDASTACK_KERNEL", kernel)
    monkeypatch.setattr(doctor, "usable_runsc", runsc)
    monkeypatch.setattr(app, "guest_directory", lambda _: (tmp_path, "g"))
    monkeypatch.setattr(runtimes_here, "qemu", lambda _: Path("/qemu") if qemu else None)
    monkeypatch.setattr(runtimes_here, "firecracker", lambda _: None)
    monkeypatch.setattr(runtimes_here, "update_guest_kernel", update)
    monkeypatch.setattr(runtimes_here, "guest_kernel", ensure)
    assert program.main(["setup", "--update"]) == code
    out, err = capsys.readouterr()
    assert out == "/runsc\n"
    assert said in err
    assert ("the guest kernel for microVMs is 6.1_abc" in err) == qemu
    assert ("look at the network" in err) == fails
