"""Which points of a history go when there are too many, or they take too much. Pure: points in, ids out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pandastack.wire.ids import SnapshotId


@dataclass(frozen=True, kw_only=True)
class Point:
    """`at_us` is microseconds since 1970."""

    id: SnapshotId
    at_us: int
    size_bytes: int


def thin(points: Sequence[Point], *, keep: int, max_bytes: int, now_us: int) -> list[SnapshotId]:
    """The ids to delete, so that at most `keep` points and `max_bytes` stay; the newest stays whatever it takes.

    One after the other goes the one whose absence leaves the smallest gap, measured against its age: what is old becomes
    sparse, what is recent stays dense. The oldest, where the history begins, goes when only it and the newest are left.
    """
    left = sorted(points, key=lambda point: (point.at_us, point.id))
    size_bytes = sum(point.size_bytes for point in left)
    gone: list[SnapshotId] = []
    while len(left) > 1 and (len(left) > keep or size_bytes > max_bytes):
        inner = range(1, len(left) - 1)
        weakest = min(inner, key=lambda at: (_gap(left, at, now_us), at), default=0)
        point = left.pop(weakest)
        size_bytes -= point.size_bytes
        gone.append(point.id)
    return gone


def _gap(points: Sequence[Point], at: int, now_us: int) -> float:
    age_us = max(1, now_us - points[at].at_us)
    return (points[at + 1].at_us - points[at - 1].at_us) / age_us
