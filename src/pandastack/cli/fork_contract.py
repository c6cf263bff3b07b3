"""What a fork promises, as checks on what was seen. Pure: `selftest` does the looking.

Every sandbox is looked at twice, right after the fork and after each was told a value of its own: `first` and `second` are
what `fork_witness.py probe` printed there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

CLOCK_LIMIT_MS = 500.0


@dataclass
class Clock:
    """How far a clock is ahead of ours; `error_ms` is what the way there leaves unknown."""

    offset_ms: float
    error_ms: float

    def least(self, reference: Clock | None) -> float:
        """The smallest distance that is possible."""
        offset_ms = self.offset_ms - (reference.offset_ms if reference else 0.0)
        return max(0.0, abs(offset_ms) - self.error_ms - (reference.error_ms if reference else 0.0))


@dataclass
class Seen:
    """One sandbox. `told` is the value that only it was told."""

    role: str
    id: str
    told: str = ""
    first: dict[str, Any] = field(default_factory=dict)
    second: dict[str, Any] = field(default_factory=dict)
    clock: Clock | None = None

    def get(self, name: str, look: str = "first") -> Any:
        return getattr(self, look).get(name)

    def memory(self, name: str, look: str = "first") -> Any:
        return (self.get("memory", look) or {}).get(name)

    def why_not(self, name: str, look: str = "first") -> str:
        errors = getattr(self, look).get("errors", {})
        return str(errors.get(name) or errors.get("probe") or "nothing was seen")


@dataclass
class Fork:
    """`before` is the parent just before the fork; `files` are the names that were written by then; `afterwards` the parent
    after the `deleted` ones were. `reference` is the clock to compare with where this program is not on the host.
    """

    before: dict[str, Any]
    files: dict[str, str]
    parent: Seen
    children: list[Seen]
    grandchild: Seen | None = None
    grandchild_failure: str = ""
    reference: Clock | None = None
    afterwards: dict[str, Any] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    not_gone: list[str] = field(default_factory=list)

    @property
    def family(self) -> list[Seen]:
        return [self.parent, *self.children]

    @property
    def secret(self) -> Any:
        return (self.before.get("memory") or {}).get("secret")

    @property
    def ticks(self) -> int:
        return int((self.before.get("memory") or {}).get("ticks") or 0)


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    evidence: str


Problems = list[str]
Rule = Callable[[Fork], tuple[Problems, str]]


def judged(fork: Fork) -> list[Check]:
    """A row per promise: its problems if there are any, otherwise what was seen."""
    checks = []
    for name, rule in RULES.items():
        problems, evidence = rule(fork)
        checks.append(Check(name, not problems, "; ".join(problems) if problems else evidence))
    return checks


def _carried(fork: Fork, whom: Sequence[Seen]) -> Problems:
    """Problems with the memory of a process that ran before the fork."""
    problems = []
    for seen in whom:
        if seen.memory("secret") is None:
            problems.append(f"{seen.role}: {seen.why_not('memory')}")
        elif seen.memory("secret") != fork.secret:
            problems.append(f"{seen.role}: its memory is not that of the parent")
        elif seen.memory("ticks") < fork.ticks:
            problems.append(f"{seen.role}: counted back from {fork.ticks} to {seen.memory('ticks')}")
        elif (seen.memory("ticks", "second") or 0) <= seen.memory("ticks"):
            problems.append(f"{seen.role}: stands still at {seen.memory('ticks')}")
    return problems


def _memory(fork: Fork) -> tuple[Problems, str]:
    counts = ", ".join(f"{seen.role} {seen.memory('ticks')}" for seen in fork.family)
    return _carried(fork, fork.family), f"the counter was {fork.ticks} before; then {counts}"


def _memory_apart(fork: Fork) -> tuple[Problems, str]:
    problems = [
        f"{seen.role}: was told {seen.told!r}, has {seen.memory('value', 'second')!r}"
        for seen in fork.family
        if seen.memory("value", "second") != seen.told
    ]
    return problems, "each kept the value that only it was told"


def _files(fork: Fork) -> tuple[Problems, str]:
    problems = []
    for seen in fork.family:
        found = seen.get("files")
        if found is None:
            problems.append(f"{seen.role}: {seen.why_not('files')}")
            continue
        problems += [f"{seen.role}: {name} has {found.get(name)!r}" for name, text in fork.files.items() if found.get(name) != text]
    return problems, f"{', '.join(fork.files)} are the same in all {len(fork.family)}"


def _files_apart(fork: Fork) -> tuple[Problems, str]:
    problems = []
    for seen in fork.family:
        found = seen.get("files", "second")
        if found is None or seen.told not in found:
            problems.append(f"{seen.role}: its own file is missing" + (f" ({seen.why_not('files', 'second')})" if found is None else ""))
            continue
        problems += [
            f"{seen.role}: sees the file of the {other.role}" for other in fork.family if other is not seen and other.told in found
        ]
    return problems, "each sees only the file that was written in it"


def _parent(fork: Fork) -> tuple[Problems, str]:
    problems = _carried(fork, [fork.parent])
    if fork.parent.memory("pid") != (fork.before.get("memory") or {}).get("pid"):
        problems.append("the process has another pid now")
    return problems, f"the same process; its longest pause was {fork.parent.memory('longest_gap_ms')} ms"


def _distinct(name: str, *, size: int | None = None) -> Rule:
    def rule(fork: Fork) -> tuple[Problems, str]:
        return _not_distinct(name, fork.family, size), ", ".join(f"{seen.role} {str(seen.get(name))[:12]}" for seen in fork.family)

    return rule


def _not_distinct(name: str, whom: Sequence[Seen], size: int | None) -> Problems:
    problems, owners = [], dict[str, str]()
    for seen in whom:
        value = seen.get(name)
        if not value:
            problems.append(f"{seen.role}: {seen.why_not(name)}")
        elif size is not None and len(value) != size:
            problems.append(f"{seen.role}: {value!r} is not {size} characters")
        elif value in owners:
            problems.append(f"{seen.role}: the same as the {owners[value]}: {value}")
        owners.setdefault(value, seen.role)
    return problems


def _own_id(fork: Fork) -> tuple[Problems, str]:
    problems = [
        f"{seen.role}: says {seen.get('sandbox_id') or seen.why_not('sandbox_id')}, is {seen.id}"
        for seen in fork.family
        if seen.get("sandbox_id") != seen.id
    ]
    return problems, "a fresh process knows the id of its own sandbox"


def _clock(fork: Fork) -> tuple[Problems, str]:
    problems, said = [], []
    for child in fork.children:
        if child.clock is None:
            problems.append(f"{child.role}: {child.why_not('time_s')}")
            continue
        offset_ms = child.clock.offset_ms - (fork.reference.offset_ms if fork.reference else 0.0)
        text = f"{child.role} {offset_ms:+.0f} ms (±{child.clock.error_ms:.0f})"
        said.append(text)
        if child.clock.least(fork.reference) >= CLOCK_LIMIT_MS:
            problems.append(text)
    return problems, ", ".join(said) + (" from the parent" if fork.reference else " from this machine")


def _listener(fork: Fork) -> tuple[Problems, str]:
    problems = [f"{seen.role}: {seen.why_not('listener')}" for seen in fork.family if seen.get("listener") != fork.secret]
    return problems, f"the port that was opened before answers in all {len(fork.family)}"


def _fork_of_a_fork(fork: Fork) -> tuple[Problems, str]:
    if fork.grandchild is None:
        return [fork.grandchild_failure or "it was not made"], ""
    whom = [*fork.family, fork.grandchild]
    problems = _carried(fork, [fork.grandchild])
    for name in ("waiting", "fresh", "hostname", "machine_id"):
        problems += [f"{name}: {problem}" for problem in _not_distinct(name, whom, None) if problem.startswith(fork.grandchild.role)]
    if fork.grandchild.get("sandbox_id") != fork.grandchild.id:
        problems.append("it does not know its own id")
    return problems, f"counter {fork.grandchild.memory('ticks')}, its own name, machine id and randomness"


def _deleted(fork: Fork) -> tuple[Problems, str]:
    problems = [f"{sandbox_id} is still there" for sandbox_id in fork.not_gone]
    memory = fork.afterwards.get("memory") or {}
    if memory.get("secret") != fork.secret:
        problems.append(f"the parent does not work any more: {(fork.afterwards.get('errors') or {}).get('memory', 'no answer')}")
    elif fork.afterwards.get("listener") != fork.secret:
        problems.append("the parent's listener does not answer any more")
    return problems, f"{len(fork.deleted)} deleted; the parent counts on at {memory.get('ticks')}"


RULES: dict[str, Rule] = {
    "memory is carried over": _memory,
    "memory diverges": _memory_apart,
    "files are carried over": _files,
    "writes stay where they are made": _files_apart,
    "parent goes on": _parent,
    "randomness of a process that waited": _distinct("waiting", size=32),
    "randomness of a fresh process": _distinct("fresh", size=32),
    "hostname": _distinct("hostname"),
    "/etc/machine-id": _distinct("machine_id", size=32),
    "PANDASTACK_SANDBOX_ID": _own_id,
    "clock": _clock,
    "listener": _listener,
    "fork of a fork": _fork_of_a_fork,
    "children can be deleted": _deleted,
}
