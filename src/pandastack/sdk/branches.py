"""What `explore` decides: its shapes, which outcome wins, what is left to delete. No request is sent from here."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from pandastack.errors import ExploreError
from pandastack.sdk.calls import sandboxes as calls
from pandastack.sdk.calls.call import Call
from pandastack.sdk.facts import Facts
from pandastack.sdk.results import ExecResult, Lifecycle, Promoted
from pandastack.wire.snapshots import MAX_FORKS

if TYPE_CHECKING:
    from pandastack.sdk.async_sandboxes import AsyncSandbox
    from pandastack.sdk.sandboxes import Sandbox

AT_ONCE = 4
TTL_S = 600
TAIL_BYTES = 4096
MAX_FILES = 200
FILES_TIMEOUT_S = 10.0
MARKER = "/tmp/.pandastack-explore-marker"  # noqa: S108 - a path in the sandbox, which belongs to one user
ROOTS = "/app /work /root /home"
METADATA = {"explore": "1"}


@dataclass(slots=True)
class Candidate:
    """One thing to try: a shell line `cmd` (with `env`), or `fn`, which gets the copy and does what it likes with it.

    `timeout_s` bounds `cmd`. `score` replaces the score function. A bare text in a list of candidates is a `cmd`.
    """

    label: str
    cmd: str | None = None
    fn: Callable[[Any], Any] | None = None
    timeout_s: float = 60.0
    env: Mapping[str, str] | None = None
    score: float | None = None

    @staticmethod
    def shell(label: str, cmd: str, **options: Any) -> Candidate:
        return Candidate(label=label, cmd=cmd, **options)

    @staticmethod
    def call(label: str, fn: Callable[[Any], Any], **options: Any) -> Candidate:
        return Candidate(label=label, fn=fn, **options)


@dataclass(slots=True)
class BranchOutcome:
    """What became of one candidate. `ok`: the command ended with 0, or `fn` returned, and its `value` is here.

    `error` says what went wrong instead, also in the score function; such an outcome never wins unless `require_success`
    is false. `stdout_tail` and `stderr_tail` are the last 4096 bytes, `duration_ms` the time of `cmd` or `fn` alone.
    """

    label: str
    sandbox_id: str
    ok: bool
    score: float
    exit_code: int | None
    stdout_tail: str
    stderr_tail: str
    files_changed: list[str]
    duration_ms: int
    value: Any = None
    error: str | None = None
    timed_out: bool = False
    _sandbox: Any = field(repr=False, default=None)

    @property
    def viable(self) -> bool:
        return self.ok and self.error is None


S = TypeVar("S", bound=Facts)


@dataclass(slots=True)
class ExploreResult(Generic[S]):
    """`outcomes` are the best first. `winner` is independent by now, or None where `promote_winner` was false.

    `reaped` are the ids of deleted copies, `reap_failures` says why others could not be; `errors` are what went wrong
    without deciding the outcome.
    """

    winner: S | None
    winner_outcome: BranchOutcome
    outcomes: list[BranchOutcome]
    tree_id: str
    reaped: list[str]
    reap_failures: dict[str, str]
    errors: list[str]

    def best(self, n: int = 1) -> list[BranchOutcome]:
        return self.outcomes[:n]

    def table(self) -> str:
        """For people: a line per candidate, the winner marked with *."""
        lines = [f"  {'label':<24} {'score':>8}  {'ok':<3} {'exit':>4} {'ms':>7} {'files':>5}"]
        for outcome in self.outcomes:
            mark = "*" if outcome is self.winner_outcome else " "
            exit_code = "-" if outcome.exit_code is None else outcome.exit_code
            lines.append(
                f"{mark} {outcome.label[:24]:<24} {outcome.score:>8.3g}  {'yes' if outcome.ok else 'no':<3} {exit_code:>4} "
                f"{outcome.duration_ms:>7} {len(outcome.files_changed):>5}"
            )
        return "\n".join(lines)


Score = Callable[["Sandbox", BranchOutcome], float]
AsyncScore = Callable[["AsyncSandbox", BranchOutcome], float | Awaitable[float]]
Select = Literal["max", "min"] | Callable[[list[BranchOutcome]], BranchOutcome]
OnOutcome = Callable[[BranchOutcome], None]


def planned(candidates: Sequence[Candidate | str], select: Select, max_concurrency: int | None) -> list[Candidate]:
    """The candidates, or ExploreError before anything is copied."""
    plan = [Candidate(label=item, cmd=item) if isinstance(item, str) else item for item in candidates]
    if not plan:
        raise ExploreError("explore: there are no candidates")
    if len(plan) > MAX_FORKS:
        raise ExploreError(f"explore: {len(plan)} candidates are more than {MAX_FORKS}; try them in rounds")
    for candidate in plan:
        if candidate.cmd is None and candidate.fn is None:
            raise ExploreError(f"explore: candidate {candidate.label!r} has neither cmd nor fn")
    if not callable(select) and select not in ("max", "min"):
        raise ExploreError(f'explore: select is "max", "min" or a function, not {select!r}')
    if max_concurrency is not None and max_concurrency < 1:
        raise ExploreError("explore: max_concurrency must be 1 or more")
    return plan


def missing(plan: Sequence[Candidate], children: Sequence[Facts]) -> list[str]:
    """A server that makes as many copies as it has room for leaves the last candidates untried."""
    if len(children) >= len(plan):
        return []
    return [f"{len(plan)} copies were asked for and {len(children)} came: " + ", ".join(item.label for item in plan[len(children) :])]


def guard(child: Facts, ttl_seconds: int) -> Call[Lifecycle] | None:
    """Let the copy expire by itself should this program die; None where it does so already, or nobody knows."""
    if ttl_seconds <= 0 or child.ttl_seconds is None or (not child.persistent and 0 < child.ttl_seconds <= ttl_seconds):
        return None
    return calls.set_lifecycle(child.id, ttl_seconds=ttl_seconds, persistent=False)


def renewals(children: Sequence[Facts], ttl_seconds: int) -> list[Call[Lifecycle]]:
    """A copy that is done waits for the others, and must not expire meanwhile: it may be the winner."""
    awake_s = ttl_seconds or max((child.ttl_seconds or 0 for child in children), default=0)
    return [calls.set_lifecycle(child.id, keep_awake_seconds=awake_s) for child in children] if awake_s else []


def renew_every_s(children: Sequence[Facts], ttl_seconds: int) -> float | None:
    """Well before the first of them expires; None: none does."""
    limits = [limit for limit in (ttl_seconds, *(child.ttl_seconds for child in children)) if limit]
    return max(1.0, min(limits) / 3) if limits else None


def unguard(winner: Facts, ttl_seconds: int) -> Call[Lifecycle] | None:
    """The winner lives on as the parent would: what `guard` changed is put back."""
    if guard(winner, ttl_seconds) is None:
        return None
    return calls.set_lifecycle(winner.id, ttl_seconds=winner.ttl_seconds, persistent=winner.persistent)


def mark_command() -> str:
    return f"touch {MARKER}"


def files_command(capture_files: bool | str) -> str:
    """`capture_files` may name directories, quoted as in a shell where they have spaces."""
    roots = shlex.split(capture_files if isinstance(capture_files, str) else ROOTS)
    return f"find {shlex.join(roots)} -type f -newer {MARKER} 2>/dev/null | head -n {MAX_FILES}"


def files_of(found: ExecResult) -> list[str]:
    return [line for line in found.stdout.splitlines() if line.strip()]


def _tail(text: str) -> str:
    return text.encode("utf-8", "replace")[-TAIL_BYTES:].decode("utf-8", "replace")


def outcome_of(
    candidate: Candidate,
    child: Facts,
    begun: float,
    *,
    result: ExecResult | None = None,
    value: Any = None,
    failure: BaseException | None = None,
) -> BranchOutcome:
    """Not yet scored, and without the changed files. `begun` is on the monotonic clock."""
    return BranchOutcome(
        label=candidate.label,
        sandbox_id=child.id,
        ok=failure is None and (result is None or result.exit_code == 0),
        score=0.0,
        exit_code=result.exit_code if result is not None else None,
        stdout_tail=_tail(result.stdout) if result is not None else "",
        stderr_tail=_tail(result.stderr) if result is not None else "",
        files_changed=[],
        duration_ms=int((time.monotonic() - begun) * 1000),
        value=value,
        error=None if failure is None else str(failure) or type(failure).__name__,
        timed_out=isinstance(failure, TimeoutError),
        _sandbox=child,
    )


def fixed_score(candidate: Candidate, outcome: BranchOutcome, score_fn: object | None) -> float | None:
    """The score where no function is to be asked."""
    if candidate.score is not None:
        return float(candidate.score)
    return None if score_fn is not None else float(outcome.ok)


def scored(outcome: BranchOutcome, score: float | None, failure: Exception | None = None) -> BranchOutcome:
    if failure is None and score is not None and not math.isnan(score):
        return replace(outcome, score=score)
    # A score that nobody knows is not the lowest one: with select="min" that would win.
    text = f"score_fn raised {type(failure).__name__}: {failure}" if failure is not None else "score_fn gave no number"
    return replace(outcome, score=0.0, error=outcome.error or text)


def chosen(outcomes: list[BranchOutcome], select: Select, require_success: bool) -> BranchOutcome:
    """Sorts `outcomes`, the best first, and picks. A tie goes to the faster one, then to the label that sorts first.

    Raises ExploreError where none may win.
    """
    sign = 1 if select == "min" else -1
    outcomes.sort(key=lambda item: (require_success and not item.viable, sign * item.score, item.duration_ms, item.label))
    allowed = [item for item in outcomes if item.viable or not require_success]
    picked = select(allowed) if callable(select) and allowed else allowed[0] if allowed else None
    if picked is None or all(picked is not item for item in allowed):
        said = ", ".join(f"{item.label}: {item.error or f'exit code {item.exit_code}'}" for item in outcomes)
        reason = "select picked none of the outcomes" if allowed else "no candidate succeeded"
        raise ExploreError(f"explore: {reason} ({said})")
    return picked


def tree_of(children: Sequence[Facts]) -> str:
    return next((child.fork_tree_id for child in children if child.fork_tree_id), "")


class Reaping:
    """Which losers are gone: as the server says after a promote, and as our own deletes find out."""

    def __init__(self, children: Sequence[Any], winner: BranchOutcome, wanted: bool) -> None:
        self._losers = [child for child in children if child.id != winner.sandbox_id] if wanted else []
        self.reaped: list[str] = []
        self.failures: dict[str, str] = {}

    def promoted(self, answer: Promoted) -> None:
        ours = {child.id for child in self._losers}
        self.reaped += [sandbox_id for sandbox_id in answer["deleted"] if sandbox_id in ours]

    def left(self) -> list[Any]:
        return [child for child in self._losers if child.id not in self.reaped]

    def deleted(self, children: Sequence[Any], failures: Mapping[str, str]) -> None:
        self.failures.update(failures)
        self.reaped += [child.id for child in children if child.id not in failures]
