"""The public contract as OpenAPI 3.1, made from the routes. `pandastack.control.openapi` writes it to a file.

What FastAPI cannot see is added here: JSON bodies (read by our own dependency), raw bodies, the error shape, and
which scope of a key each route needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from pandastack.control.routes.requests import Body, Needs

_REF = "#/components/schemas/{model}"
ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "title": "Error",
    "description": "Flat: `error` is one sentence, its siblings are facts. `field` names what is wrong with a request.",
    "properties": {
        "error": {"type": "string"},
        "code": {"type": "string"},
        "request_id": {"type": "string"},
        "hint": {"type": "string"},
        "field": {"type": "string"},
        "retry_after_s": {"type": "number"},
    },
    "required": ["error", "code", "request_id"],
    "additionalProperties": True,
}


def routes(app: FastAPI) -> list[Any]:
    """Every route of the API, in order. `build` leaves them here; the framework's own list is nested."""
    found: list[Any] = app.state.routes
    return found


def _dependencies(dependant: Any) -> Iterator[Any]:
    for child in dependant.dependencies:
        yield child.call
        yield from _dependencies(child)


def scope_of(route: Any) -> str | None:
    """The scope a key needs for a route; None where no key is needed."""
    return next((call.scope for call in _dependencies(route.dependant) if isinstance(call, Needs)), None)


def body_of(route: Any) -> Any:
    """The shape of a route's JSON body, or None."""
    return next((call.model for call in _dependencies(route.dependant) if isinstance(call, Body)), None)


def document(app: FastAPI) -> dict[str, Any]:
    """The whole document; made once per application."""
    if app.openapi_schema is None:
        app.openapi_schema = _document(app)
    return app.openapi_schema


def _document(app: FastAPI) -> dict[str, Any]:
    found = get_openapi(title=app.title, version="1", description=app.description, routes=app.routes)
    components = found.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    bodies = sorted({body_of(route) for route in routes(app)} - {None}, key=lambda model: model.__name__)
    _, definitions = models_json_schema([(model, "validation") for model in bodies], ref_template=_REF)
    schemas.update(definitions.get("$defs", {}))
    schemas["Error"] = ERROR_SCHEMA
    components["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "An API key, `pds_...`."},
        "token": {"type": "apiKey", "in": "query", "name": "access_token", "description": "For GET only, where no header can be sent."},
    }
    for route in routes(app):
        for method in route.methods:
            _complete(found["paths"][route.path][method.lower()], route, method)
    components["schemas"] = dict(sorted(schemas.items()))
    return found


def _complete(operation: dict[str, Any], route: Any, method: str) -> None:
    answers = operation["responses"]
    answers.pop("422", None)
    answers["default"] = {
        "description": "An error",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    scope = scope_of(route)
    operation["security"] = [] if scope is None else [{"key": []}] + ([{"token": []}] if method == "GET" else [])
    if scope is not None:
        operation["x-scope"] = scope
    model = body_of(route)
    if model is not None:
        schema = {"$ref": _REF.format(model=model.__name__)}
        operation["requestBody"] = {"content": {"application/json": {"schema": schema}}, "required": False}
    elif operation.pop("x-raw-body", False):
        schema = {"type": "string", "format": "binary"}
        operation["requestBody"] = {"content": {"application/octet-stream": {"schema": schema}}, "required": True}
    operation["responses"] = dict(sorted(answers.items()))
