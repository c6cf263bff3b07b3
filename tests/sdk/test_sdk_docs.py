"""The programs in docs/sdk.md and docs/cli.md run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Live

DOCS = Path(__file__).parents[2] / "docs"


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks("sdk.md", "python"))))
def test_python_of_sdk_md_runs(number: int, live: Live, tmp_path: Path) -> None:
    environ = {**os.environ, "PANDASTACK_API": live.api_url, "PANDASTACK_API_KEY": live.api_key}
    code = blocks("sdk.md", "python")[number]
    done = subprocess.run([sys.executable, "-c", code], env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", range(len(blocks("cli.md", "bash"))))
def test_bash_of_cli_md_runs(number: int, live: Live, tmp_path: Path) -> None:
    command = tmp_path / "pandastack"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m pandastack.cli "$@"\n')
    command.chmod(0o755)
    environ = {**os.environ, "PANDASTACK_API": live.api_url, "PANDASTACK_API_KEY": live.api_key, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = "set -eu -o pipefail\n" + blocks("cli.md", "bash")[number]
    done = subprocess.run(["bash", "-c", script], env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
