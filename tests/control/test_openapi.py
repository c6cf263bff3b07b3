from __future__ import annotations

import json
from pathlib import Path

from pandastack.control import openapi

FILE = Path(__file__).parents[2] / "openapi" / "public.json"


def test_the_checked_in_contract_is_current() -> None:
    """If this fails: `python -m pandastack.control.openapi`, and look at the difference."""
    assert FILE.read_text() == openapi.text()


def test_every_operation_has_an_id_an_error_and_a_statement_about_keys() -> None:
    document = json.loads(FILE.read_text())
    assert document["openapi"].startswith("3.1")
    assert set(document["components"]["securitySchemes"]) == {"key", "token"}
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(ids) == len(set(ids))
    for operation in operations:
        assert operation["responses"]["default"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}
        assert "422" not in operation["responses"]
        assert "security" in operation


def test_every_reference_leads_somewhere() -> None:
    text = FILE.read_text()
    known = json.loads(text)["components"]["schemas"]
    for part in text.split('"#/components/schemas/')[1:]:
        assert part.split('"')[0] in known
