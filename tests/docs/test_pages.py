"""What README.md and the pages of docs/ show does run.

Blocks marked `python`, `sh`, `bash` or `console` are programs. Each runs in an empty folder, with the configuration that
`pandastack up` leaves for its user; of a `console` block the lines that begin with `$ ` are run. One that cannot be run
here has a line `<!-- not run: reason -->` above it. Blocks of any other kind, or of none, are only shown.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from system.servers import Server

TOP = Path(__file__).parents[2]
BLOCK = re.compile(
    r"(?:^<!--\s*not run:(?P<reason>.*?)-->\s*\n+)?^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```\s*$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str
    not_run: str | None


def blocks() -> list[Block]:
    found = []
    for page in [TOP / "README.md", *sorted((TOP / "docs").rglob("*.md"))]:
        text = page.read_text() if page.exists() else ""
        for match in BLOCK.finditer(text):
            if match["language"] in ("python", "sh", "bash", "console"):
                line = text.count("\n", 0, match.start("text"))
                reason = match["reason"].strip() if match["reason"] is not None else None
                found.append(Block(str(page.relative_to(TOP)), line, match["language"], match["text"], reason))
    return found


def program(block: Block) -> list[str]:
    if block.language == "python":
        return [sys.executable, "-c", block.text]
    text = block.text
    if block.language == "console":
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
    return ["bash", "-c", f"set -eu -o pipefail\n{text}"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("block", [pytest.param(block, id=f"{block.page}:{block.line}") for block in blocks()])
def test_the_program_runs(block: Block, documented: Server, tmp_path: Path) -> None:
    if block.not_run is not None:
        assert block.not_run, "say why it is not run"
        pytest.skip(f"the page says: {block.not_run}")
    # A checkout has it there; the pages call it by either name.
    command = tmp_path / "home" / ".venv" / "bin" / "pandastack"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m pandastack.cli "$@"\n')
    command.chmod(0o755)
    environ = {name: value for name, value in documented.environ.items() if not name.startswith("PANDASTACK_API")}
    environ["PATH"] = f"{command.parent}:{Path(sys.executable).parent}:{environ['PATH']}"
    done = subprocess.run(
        program(block),
        env=environ,
        cwd=tmp_path / "home",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{block.text}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"


def test_every_page_ends_its_blocks() -> None:
    for page in [TOP / "README.md", *sorted((TOP / "docs").rglob("*.md"))]:
        if page.exists():
            assert len(re.findall(r"^```", page.read_text(), re.MULTILINE)) % 2 == 0, page
