"""`python -m pandastack.control.openapi [file]` writes the public contract to `openapi/public.json`.

The file is checked in, so that a change of the contract is seen in review; a test holds it to the code.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pandastack.control.app import build
from pandastack.control.fake_host import FakeHost
from pandastack.control.settings import ControlSettings


def text() -> str:
    """The document as it is checked in."""
    document = build(ControlSettings(), FakeHost()).openapi()
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "openapi/public.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text())
