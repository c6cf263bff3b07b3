"""Where the API is and which key opens it. Files and environment are read once, when a client is made.

For each value the first source that has it wins: argument, environment, `config.json`, `local.json`. Both files live
in `$XDG_CONFIG_HOME/pandastack` (else `~/.config/pandastack`); `local.json` is written by `pandastack up`.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pandastack import errors

DEFAULT_API_URL = "https://api.pandastack.ai"
DEFAULT_TIMEOUT_S = 30.0
DEFAULT_MAX_CREATE_RETRY_SECONDS = 60.0
KEY_HINT = "run `pandastack up` on this machine, or set PANDASTACK_API and PANDASTACK_API_KEY, or pass api_url and api_key"


@dataclass(frozen=True, slots=True)
class Settings:
    """`api_url` has no trailing slash; `api_key` is None where none was found. Times are seconds."""

    api_url: str
    api_key: str | None = field(repr=False)
    timeout_s: float = DEFAULT_TIMEOUT_S
    max_create_retry_seconds: float = DEFAULT_MAX_CREATE_RETRY_SECONDS

    def key(self) -> str:
        """The key, or AuthError before anything is sent."""
        if not self.api_key:
            raise errors.AuthError("no API key is configured", hint=KEY_HINT)
        if not all("!" <= character <= "~" for character in self.api_key):
            raise errors.AuthError("the API key contains characters that no key has", hint="check it for spaces or line ends")
        return self.api_key


def folder(environ: Mapping[str, str] | None = None) -> Path:
    """The folder of both configuration files; it need not exist."""
    environ = os.environ if environ is None else environ
    base = environ.get("XDG_CONFIG_HOME") or ""
    # The specification says that a relative XDG_CONFIG_HOME must be ignored.
    return (Path(base) if base.startswith("/") else Path.home() / ".config") / "pandastack"


def load(
    api_url: str | None = None,
    api_key: str | None = None,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    max_create_retry_seconds: float | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Settle every value. A missing key is no error yet: `Settings.key()` says so when it is needed."""
    environ = os.environ if environ is None else environ
    config = _read(folder(environ) / "config.json")
    local = _read(folder(environ) / "local.json")
    local_url = _text(local, "api_url")
    url = _clean_url(api_url or environ.get("PANDASTACK_API") or _text(config, "api_url") or local_url or DEFAULT_API_URL)
    key = api_key if api_key is not None else environ.get("PANDASTACK_API_KEY") or _text(config, "token") or _text(config, "api_key")
    # The key of the local server goes to the local server only: an address from elsewhere must not receive it.
    if key is None and local_url is not None and _clean_url(local_url) == url:
        key = _text(local, "token") or _text(local, "api_key")
    return Settings(url, key.strip() if key else None, timeout_s, _create_budget(max_create_retry_seconds, environ))


def _clean_url(text: str) -> str:
    url = text.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise errors.InvalidRequest(
            f"the API address {text!r} is not an http(s) URL", field="api_url", hint="for example http://127.0.0.1:8000"
        )
    return url


def _create_budget(value: float | None, environ: Mapping[str, str]) -> float:
    text = environ.get("PANDASTACK_MAX_CREATE_RETRY_SECONDS") or ""
    name = "max_create_retry_seconds" if value is not None else "PANDASTACK_MAX_CREATE_RETRY_SECONDS"
    try:
        seconds = float(value if value is not None else text or DEFAULT_MAX_CREATE_RETRY_SECONDS)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"{name} must be a finite number of seconds, 0 or more")
    return seconds


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty where there is none. A file that cannot be understood is an error, not silence."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return {}
    except (OSError, ValueError) as error:
        raise errors.AuthError(f"cannot read {path}: {error}", hint="correct or delete this file") from error
    return data if isinstance(data, dict) else {}


def _text(data: Mapping[str, Any], key: str) -> str | None:
    value = data.get(key)
    return value if isinstance(value, str) and value else None


@functools.cache
def version() -> str:
    """The version of the installed distribution; "0+unknown" where it runs from a source tree alone."""
    import importlib.metadata

    try:
        return importlib.metadata.version("pandastack")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"
