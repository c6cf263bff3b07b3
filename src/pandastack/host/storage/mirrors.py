"""Where a build may fetch from: Debian mirrors, proxies and the Python index, as this machine is set up already.

Runs on a host, read by `build`. It only reads: apt's sources, apt's proxy settings, pip's settings and environment.
Which mirror is used is no matter of trust, because every package list is checked against the distribution's keyring
and every Python wheel against the hashes of the recipe.
"""

from __future__ import annotations

import configparser
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict
from urllib.parse import urlsplit

from pandastack.errors import HostUnfit
from pandastack.host.storage.recipes import Distribution

KEYRINGS = {
    "debian": Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    "ubuntu": Path("/usr/share/keyrings/ubuntu-archive-keyring.gpg"),
}
_KEYRING_PACKAGES = {"debian": "debian-archive-keyring", "ubuntu": "ubuntu-archive-keyring"}
_DEBIAN_SUITES = {
    "bullseye", "bookworm", "trixie", "forky", "duke", "sid", "oldoldstable", "oldstable", "stable", "testing", "unstable",
}  # fmt: skip
_SCHEMES = ("http", "https", "mirror+file")


@dataclass(frozen=True, kw_only=True)
class Mirror:
    """Where a distribution's packages are: `main` and, where they are kept apart, the `security` updates."""

    main: str
    security: str | None


class Named(TypedDict):
    """The operator's settings of the same names; None takes the host's own apt sources (Debian only)."""

    debian_mirror: str | None
    ubuntu_mirror: str | None


@dataclass(frozen=True, kw_only=True)
class HostSettings:
    """What commands in a build need to reach the network as this machine does. Values may hold credentials."""

    apt_options: list[str] = field(default_factory=list)  # such as "Acquire::http::Proxy=http://proxy:3128"
    environment: dict[str, str] = field(default_factory=dict)  # PIP_* and *_proxy
    ca_bundle: Path | None = None


@dataclass(frozen=True, kw_only=True)
class _Entry:
    uri: str
    suite: str


def sources_list(distribution: Distribution, mirror: Mirror, keyring: str) -> str:
    """apt's one-line source list for a distribution and its updates; `keyring` as seen by the apt that reads it."""
    suites = [(mirror.main, distribution.suite), (mirror.main, f"{distribution.suite}-updates")]
    if mirror.security:
        suites.append((mirror.security, f"{distribution.suite}-security"))
    components = " ".join(distribution.components)
    return "".join(f"deb [signed-by={keyring}] {uri} {suite} {components}\n" for uri, suite in suites)


def keyring(distribution: Distribution, keyrings: Mapping[str, Path] = KEYRINGS) -> Path:
    """The keyring that signs a distribution. Raises HostUnfit with `reason` "keyring" when the host lacks it."""
    path = keyrings[distribution.name]
    if not path.is_file():
        raise HostUnfit(
            f"the keyring of {distribution.name} is missing on this host",
            hint=f"install the package {_KEYRING_PACKAGES[distribution.name]}",
            reason="keyring",
        )
    return path


def find(distribution: Distribution, *, debian_mirror: str | None, ubuntu_mirror: str | None, apt: Path = Path("/etc/apt")) -> Mirror:
    """The mirror of a distribution: the setting when there is one, else (Debian only) the host's own apt sources.

    A setting is one address, or two with a space between: packages, then security updates.
    Raises HostUnfit with `reason` "mirror" when there is none.
    """
    setting = debian_mirror if distribution.name == "debian" else ubuntu_mirror
    if setting:
        return _from_setting(distribution, setting)
    if distribution.name == "debian":
        entries = list(_debian_entries(apt))
        # The host may run another release of Debian than the template; the same mirror carries both.
        main = next((entry.uri for entry in entries if not entry.suite.endswith("-security")), None)
        security = next((entry.uri for entry in entries if entry.suite.endswith("-security")), None)
        if main:
            return Mirror(main=main, security=security or _security_beside(main))
    raise HostUnfit(
        f"no mirror for {distribution.name} is known on this host",
        hint=f"name one in the setting {distribution.name}_mirror",
        reason="mirror",
    )


def _from_setting(distribution: Distribution, setting: str) -> Mirror:
    uris = [uri.rstrip("/") for uri in setting.split()]
    if len(uris) > 2 or any(urlsplit(uri).scheme not in ("http", "https") or not urlsplit(uri).netloc for uri in uris):
        raise HostUnfit(
            f"the setting {distribution.name}_mirror is no mirror address",
            hint="write http://host/path, and after a space the address of security updates if it differs",
            reason="setting",
        )
    if len(uris) == 2:
        return Mirror(main=uris[0], security=uris[1])
    return Mirror(main=uris[0], security=uris[0] if distribution.name == "ubuntu" else _security_beside(uris[0]))


def _security_beside(main: str) -> str | None:
    # Debian keeps security updates in a sibling tree; a mirror with another layout must be named with both addresses.
    return f"{main}-security" if main.endswith("/debian") else None


def _debian_entries(apt: Path) -> Iterator[_Entry]:
    files = [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*"))]
    for file in files:
        if not file.is_file():
            continue
        text = file.read_text("utf-8", errors="replace")
        if file.suffix == ".list":
            yield from _one_line_entries(text)
        elif file.suffix == ".sources":
            yield from _deb822_entries(text)


def _one_line_entries(text: str) -> Iterator[_Entry]:
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>[^#]*)", line)
        if match:
            options = dict(part.split("=", 1) for part in (match["options"] or "").split() if "=" in part)
            yield from _official([match["uri"]], [match["suite"]], match["components"].split(), options)


def _deb822_entries(text: str) -> Iterator[_Entry]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in re.split(r"\n\s*\n", "\n".join(lines)):
        fields: dict[str, str] = {}
        key = ""
        for line in stanza.splitlines():
            if line[:1].isspace() and key:
                fields[key] += " " + line.strip()
            elif ":" in line:
                key, value = line.split(":", 1)
                key = key.strip().lower()
                fields[key] = value.strip()
        if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes").lower() not in ("no", "false"):
            uris, suites, components = (fields.get(name, "").split() for name in ("uris", "suites", "components"))
            yield from _official(uris, suites, components, fields)


def _official(uris: list[str], suites: list[str], components: list[str], options: Mapping[str, str]) -> Iterator[_Entry]:
    """The entries that are Debian itself. Others (vendors, backports of someone) are none of a template's business."""
    signed_by = options.get("signed-by", "")
    if "main" not in components or options.get("trusted", "no") == "yes" or (signed_by and "debian-archive" not in signed_by):
        return
    for uri in uris:
        for suite in suites:
            release = re.sub(r"-(updates|security)\Z", "", suite)
            if release in _DEBIAN_SUITES and uri.split(":", 1)[0] in _SCHEMES and (resolved := _resolve(uri)):
                yield _Entry(uri=resolved.rstrip("/"), suite=suite)


def _resolve(uri: str) -> str | None:
    # Debian's cloud images name their mirrors in a file, which would not be there inside a chroot.
    if not uri.startswith("mirror+file:"):
        return uri
    try:
        lines = Path(uri.removeprefix("mirror+file:").replace("//", "/", 1)).read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return next((line.split()[0] for line in lines if line.startswith(("http://", "https://"))), None)


def host_settings(apt_dump: str, environ: Mapping[str, str], *, home: Path, etc: Path = Path("/etc")) -> HostSettings:
    """How this machine reaches the network. `apt_dump` is the output of `apt-config dump Acquire`."""
    options = []
    for line in apt_dump.splitlines():
        # Only how to reach a mirror is taken over; hooks and exceptions from verification never are.
        match = re.match(r'(Acquire::https?::(?:Proxy|Timeout)(?:::\S+)?) "([^"]+)";', line)
        if match:
            options.append(f"{match[1]}={match[2]}")
    pip = _pip_settings(environ, home, etc)
    proxies = {key: value for key, value in environ.items() if key.lower() in ("http_proxy", "https_proxy", "no_proxy", "all_proxy")}
    named = [pip.pop("PIP_CERT", None), environ.get("SSL_CERT_FILE"), environ.get("REQUESTS_CA_BUNDLE")]
    bundles = [*named, str(etc / "ssl/certs/ca-certificates.crt")]
    bundle = next((Path(path) for path in bundles if path and Path(path).is_file()), None)
    return HostSettings(apt_options=options, environment={**proxies, **pip}, ca_bundle=bundle)


def _pip_settings(environ: Mapping[str, str], home: Path, etc: Path) -> dict[str, str]:
    # Folders of this machine (find-links, cache) mean nothing inside a chroot and stay behind.
    wanted = ("index-url", "extra-index-url", "trusted-host", "proxy", "cert", "timeout", "retries")
    found: dict[str, str] = {}
    for path in (etc / "pip.conf", home / ".pip/pip.conf", home / ".config/pip/pip.conf"):
        parser = configparser.RawConfigParser()
        try:
            parser.read(path)
        except (OSError, configparser.Error, UnicodeDecodeError):
            continue
        for name in wanted:
            value = parser.get("global", name, fallback=None)
            if value:
                found["PIP_" + name.upper().replace("-", "_")] = " ".join(value.split())
    for uv, key in (("UV_INDEX_URL", "PIP_INDEX_URL"), ("UV_DEFAULT_INDEX", "PIP_INDEX_URL")):
        if environ.get(uv):
            found[key] = environ[uv].split("=", 1)[-1] if "://" not in environ[uv].split("=", 1)[0] else environ[uv]
    for name in wanted:
        key = "PIP_" + name.upper().replace("-", "_")
        if environ.get(key):
            found[key] = environ[key]
    if environ.get("PIP_DEFAULT_TIMEOUT"):
        found["PIP_DEFAULT_TIMEOUT"] = environ["PIP_DEFAULT_TIMEOUT"]
    return found
