"""The log: one JSON object per line on standard error, without keys. Called once, by whoever builds the application."""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

import structlog

_KEY = re.compile(r"(pds_[0-9a-f]{8})[0-9a-f]{48}")


def _without_keys(_logger: Any, _method: str, event: Any) -> Any:
    """A key that got into a text (an address, an exception) is cut to its public prefix, whoever put it there."""
    return {name: _KEY.sub(r"\1...", value) if isinstance(value, str) else value for name, value in event.items()}


def configure(level: int = logging.INFO) -> None:
    """Does nothing if the log is configured already. Tracebacks carry no local variables: those hold secrets."""
    if structlog.is_configured():
        return
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _without_keys,
            structlog.processors.JSONRenderer(default=repr),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
