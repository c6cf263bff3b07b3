"""What is left of a history: within its bounds, dense where it is recent, sparse where it is old."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from pandastack.control.thinning import Point, thin
from pandastack.wire.ids import SnapshotId

NOW_US = 10**15
POINTS = st.lists(st.tuples(st.integers(0, NOW_US), st.integers(0, 1000)), max_size=60).map(
    lambda made: [Point(id=SnapshotId(str(number)), at_us=at_us, size_bytes=size) for number, (at_us, size) in enumerate(made)]
)


def left_of(points: list[Point], keep: int, max_bytes: int, now_us: int = NOW_US) -> list[Point]:
    gone = thin(points, keep=keep, max_bytes=max_bytes, now_us=now_us)
    assert len(gone) == len(set(gone))
    assert set(gone) <= {point.id for point in points}
    return sorted((point for point in points if point.id not in gone), key=lambda point: (point.at_us, point.id))


@given(POINTS, st.integers(1, 500), st.integers(1, 20_000))
def test_it_is_within_both_bounds_and_keeps_the_newest(points: list[Point], keep: int, max_bytes: int) -> None:
    left = left_of(points, keep, max_bytes)
    assert len(left) <= keep
    assert sum(point.size_bytes for point in left) <= max_bytes or len(left) == 1
    if points:
        assert max(points, key=lambda point: (point.at_us, point.id)) in left
        # And nothing goes that need not.
        fits = len(points) <= keep and sum(point.size_bytes for point in points) <= max_bytes
        assert (left == sorted(points, key=lambda point: (point.at_us, point.id))) == (fits or len(points) == 1)


@given(POINTS, st.integers(1, 500), st.integers(1, 20_000))
def test_what_is_left_stays(points: list[Point], keep: int, max_bytes: int) -> None:
    left = left_of(points, keep, max_bytes)
    assert thin(left, keep=keep, max_bytes=max_bytes, now_us=NOW_US) == []


@given(POINTS, st.integers(2, 500))
def test_the_beginning_stays_as_long_as_two_may(points: list[Point], keep: int) -> None:
    if points:
        assert min(points, key=lambda point: (point.at_us, point.id)) in left_of(points, keep, 1 << 62)


@settings(max_examples=20)
@given(st.integers(4, 40), st.integers(100, 600), st.integers(1, 10**9))
def test_what_is_older_becomes_sparser(keep: int, count: int, every_us: int) -> None:
    """As they come in, one after the other, evenly."""
    left: list[Point] = []
    for number in range(count):
        left.append(Point(id=SnapshotId(str(number)), at_us=number * every_us, size_bytes=1))
        left = left_of(left, keep, 1 << 62, number * every_us)
    gaps = [later.at_us - earlier.at_us for earlier, later in itertools.pairwise(left)]
    half = len(gaps) // 2
    assert sum(gaps[:half]) > sum(gaps[half:])
    assert gaps[-1] < max(gaps)
