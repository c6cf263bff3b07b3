"""Reads the last words of apt, dpkg, pip, mmdebstrap and unshare, and says in one sentence what went wrong and what helps.

Pure: used by `build`. The first matching row wins, so causes stand before their consequences.
"""

from __future__ import annotations

import re
from pathlib import Path

from pandastack.errors import DiskFull, HostUnfit, PandastackError, TemplateBuildError
from pandastack.host.storage.commands import CommandFailed

_Row = tuple[str, type[PandastackError], str, str, str]  # pattern, error, reason, what happened, what helps

_ROWS: list[_Row] = [
    (r"No space left on device|Disk quota exceeded|not have enough free space",
     DiskFull, "space", "the disk became full", "free some space and build again"),
    (r"unshare: .*(Operation not permitted|failed)|chroot: .*Operation not permitted|mknod.*Operation not permitted",
     HostUnfit, "namespaces", "this host does not allow the namespaces or mounts a build needs",
     "build on a host where root may unshare and mount; most containers do not allow it"),
    (r"is not valid yet|Release file .* is expired|certificate (is not yet valid|has expired)",
     TemplateBuildError, "clock", "a mirror's lists are not valid at this host's time",
     "set the clock, or name a mirror that is up to date"),
    (r"NO_PUBKEY|BADSIG|EXPKEYSIG|is not signed|GPG error|signatures? (were|was|couldn't|could not)|unsigned",
     TemplateBuildError, "signature", "the signature of the package lists could not be verified",
     "nothing was installed; check the mirror and the distribution's keyring on this host"),
    (r"DO NOT MATCH THE HASHES|Hash Sum mismatch|Hashes? .*mismatch",
     TemplateBuildError, "hash", "a fetched file is not the one that was locked",
     "try again later; if it stays, renew the lock after a look at why"),
    (r"CERTIFICATE_VERIFY_FAILED|certificate verif",
     TemplateBuildError, "certificate", "the certificate of a server could not be verified",
     "add your proxy's certificate to this host's bundle"),
    (r"Could not resolve|Temporary failure in name resolution|Name or service not known|NameResolutionError|Could not connect"
     r"|Unable to connect|[Cc]onnection (timed out|refused|failed)|Network is unreachable|Max retries exceeded"
     r"|ReadTimeoutError|NewConnectionError",
     TemplateBuildError, "network", "a mirror or package index could not be reached",
     "check the network, the proxy and the mirror settings"),
    (r"Unable to locate package (?P<what>\S+)|Package '?(?P<what2>\S+?)'? has no installation candidate",
     TemplateBuildError, "recipe", "there is no package {what} in this distribution", "correct `packages` in the recipe"),
    (r"No matching distribution found for (?P<what>\S+)",
     TemplateBuildError, "recipe", "there is no wheel of {what} for this distribution's Python",
     "correct the requirements of the recipe"),
    (r"404 +Not Found|403 +Forbidden|does not have a Release file|Failed to fetch",
     TemplateBuildError, "network", "a mirror does not have what it should", "name another mirror, or try again later"),
]  # fmt: skip
_IMPORT_ROWS: list[_Row] = [
    (r"ModuleNotFoundError|ImportError",
     TemplateBuildError, "recipe", "a module of [warm] cannot be imported", "correct `python_modules` or add what it needs"),
]  # fmt: skip


def explain(failed: CommandFailed, *, template: str, step: str, log: Path) -> PandastackError:
    """The error for a user, with the fields `reason`, `template` and `step`.

    Where the whole output is stands in a note (`__notes__`), which tracebacks show and API answers do not.
    """
    error = _classify(failed, template=template, step=step)
    error.add_note(f"the whole output is in {log}")
    return error


def _classify(failed: CommandFailed, *, template: str, step: str) -> PandastackError:
    text = "\n".join(failed.lines)
    for pattern, kind, reason, what, hint in [*_ROWS, *(_IMPORT_ROWS if step == "check" else [])]:
        if match := re.search(pattern, text):
            name = next((value for value in match.groupdict().values() if value), "")
            sentence = f"{template} could not be built ({step}): {what.format(what=name)}"
            return kind(sentence, hint=hint, reason=reason, template=template, step=step)
    if failed.exit_code == 127 and not failed.lines[1:]:
        sentence = f"{failed.program} could not be started"
        return HostUnfit(sentence, hint="install it on this host", reason="program", template=template, step=step)
    reason = "timeout" if failed.exit_code is None else "other"
    sentence = f"{template} could not be built ({step}): {failed}"
    return TemplateBuildError(sentence, hint="the build's log on the host says more", reason=reason, template=template, step=step)
