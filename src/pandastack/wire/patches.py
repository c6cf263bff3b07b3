"""Patches as git writes them, from two contents of one name: `git apply` makes the second of the first. Pure, and bounded.

Text is compared by lines: what both have at the beginning and at the end, then lines that are unique on both sides as anchors,
and only between those, and only where it is cheap, every line with every other. Thus no input, however made, takes long; what was
not looked at closely is replaced as a whole, which is as correct. What is no text, or too long, is given as a whole.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

MAX_TEXT_BYTES = 1 << 20
MAX_TEXT_LINES = 50_000
MAX_FILE_BYTES = 32 << 20
_CONTEXT = 3
_CLOSE_LOOKS = 5_000_000  # Comparisons of lines in one file.
_LINE_BYTES = 52
_LENGTHS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ESCAPES = {7: b"\\a", 8: b"\\b", 9: b"\\t", 10: b"\\n", 11: b"\\v", 12: b"\\f", 13: b"\\r", 34: b'\\"', 92: b"\\\\"}
_NOTHING = b"0" * 40


@dataclass(frozen=True)
class Blob:
    """What git keeps of a name. `mode` is b"100644", b"100755", or b"120000" for a link, whose content is its target."""

    mode: bytes
    data: bytes

    @property
    def id(self) -> bytes:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data, usedforsecurity=False).hexdigest().encode()


def file_mode(mode: int) -> bytes:
    return b"100755" if mode & 0o100 else b"100644"


def render(path: bytes, before: Blob | None, after: Blob | None) -> bytes:
    """The patch of one name, `path` being relative; empty where git sees no difference."""
    if before is not None and after is not None and (before.mode == b"120000") != (after.mode == b"120000"):
        return render(path, before, None) + render(path, None, after)
    if before == after:
        return b""
    old, new = quoted(b"a/" + path), quoted(b"b/" + path)
    head = [b"diff --git %b %b\n" % (old, new)]
    if before is None and after is not None:
        head.append(b"new file mode %b\n" % after.mode)
    elif after is None and before is not None:
        head.append(b"deleted file mode %b\n" % before.mode)
    elif before is not None and after is not None and before.mode != after.mode:
        head.append(b"old mode %b\nnew mode %b\n" % (before.mode, after.mode))
    one, two = before.data if before else b"", after.data if after else b""
    if before is not None and after is not None and one == two:
        return b"".join(head)
    same_mode = b" " + after.mode if before is not None and after is not None and before.mode == after.mode else b""
    head.append(b"index %b..%b%b\n" % (before.id if before else _NOTHING, after.id if after else _NOTHING, same_mode))
    if one == two:  # An empty file that is new, or gone.
        return b"".join(head)
    if not (_is_text(one) and _is_text(two)):
        return b"".join([*head, b"GIT binary patch\n", _literal(two), _literal(one)])
    # A tab tells where a name ends that has spaces in it.
    head.append(b"--- %b\n" % (_ended(old) if before else b"/dev/null"))
    head.append(b"+++ %b\n" % (_ended(new) if after else b"/dev/null"))
    return b"".join([*head, *_hunks(_lines(one), _lines(two))])


def left_out(path: bytes, why: str) -> bytes:
    """A line between patches that `git apply` passes over."""
    return b"# %b is left out: %b\n" % (quoted(path), why.encode())


def quoted(path: bytes) -> bytes:
    if all(0x20 <= byte < 0x7F and byte not in _ESCAPES for byte in path):
        return path
    plain = (_ESCAPES.get(byte) or (bytes([byte]) if 0x20 <= byte < 0x7F else b"\\%03o" % byte) for byte in path)
    return b'"' + b"".join(plain) + b'"'


def _ended(name: bytes) -> bytes:
    return name + b"\t" if b" " in name and not name.startswith(b'"') else name


def _is_text(data: bytes) -> bool:
    return len(data) <= MAX_TEXT_BYTES and b"\0" not in data and data.count(b"\n") < MAX_TEXT_LINES


def _literal(data: bytes) -> bytes:
    packed = zlib.compress(data)
    pieces = [packed[at : at + _LINE_BYTES] for at in range(0, len(packed), _LINE_BYTES)]
    lines = (b"%c%b\n" % (_LENGTHS[len(piece) - 1], base64.b85encode(piece, pad=True)) for piece in pieces)
    return b"literal %d\n" % len(data) + b"".join(lines) + b"\n"


def _lines(data: bytes) -> list[bytes]:
    """Split at line feeds only, which stay; the last one may have none."""
    lines = [line + b"\n" for line in data.split(b"\n")]
    last = lines.pop()[:-1]
    return [*lines, last] if last else lines


# Which lines are the same


def _hunks(old: Sequence[bytes], new: Sequence[bytes]) -> Iterator[bytes]:
    for group in _grouped(_changed(old, new)):
        (first, _, second, _), (_, last, _, until) = group[0], group[-1]
        before = min(_CONTEXT, first)
        after = min(_CONTEXT, len(old) - last)
        begin, end, start, stop = first - before, last + after, second - before, until + after
        yield b"@@ -%b +%b @@\n" % (_range(begin, end), _range(start, stop))
        at = begin
        for from_, to, from_new, to_new in group:
            yield from (_line(b" ", line) for line in old[at:from_])
            yield from (_line(b"-", line) for line in old[from_:to])
            yield from (_line(b"+", line) for line in new[from_new:to_new])
            at = to
        yield from (_line(b" ", line) for line in old[at:end])


def _line(sign: bytes, line: bytes) -> bytes:
    return sign + line if line.endswith(b"\n") else sign + line + b"\n\\ No newline at end of file\n"


def _range(begin: int, end: int) -> bytes:
    return b"%d,%d" % (begin + 1 if end > begin else begin, end - begin)


Change = tuple[int, int, int, int]  # old[a:b] became new[c:d]


def _grouped(changes: Iterator[Change]) -> Iterator[list[Change]]:
    """Changes so near to each other that their context would overlap belong into one hunk."""
    group: list[Change] = []
    for change in changes:
        if group and change[0] - group[-1][1] > 2 * _CONTEXT:
            yield group
            group = []
        group.append(change)
    if group:
        yield group


def _changed(old: Sequence[bytes], new: Sequence[bytes]) -> Iterator[Change]:
    at = at_new = 0
    for begin, start, length in [*_matches(old, new), (len(old), len(new), 0)]:
        if begin > at or start > at_new:
            yield at, begin, at_new, start
        at, at_new = begin + length, start + length


def _matches(old: Sequence[bytes], new: Sequence[bytes]) -> Iterator[tuple[int, int, int]]:
    """Runs of equal lines, as (place in old, place in new, length), in order."""
    head = 0
    while head < min(len(old), len(new)) and old[head] == new[head]:
        head += 1
    tail = 0
    while tail < min(len(old), len(new)) - head and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    yield 0, 0, head
    left = _CLOSE_LOOKS
    at, at_new = head, head
    for begin, start in [*_anchors(old, new, head, tail), (len(old) - tail, len(new) - tail)]:
        size, size_new = begin - at, start - at_new
        cost = size * size_new * min(size, size_new)
        if 0 < cost <= left:
            left -= cost
            between = SequenceMatcher(None, old[at:begin], new[at_new:start], autojunk=False)
            yield from ((at + one, at_new + two, length) for one, two, length in between.get_matching_blocks() if length)
        if begin < len(old) - tail:
            yield begin, start, 1
        at, at_new = begin + 1, start + 1
    yield len(old) - tail, len(new) - tail, tail


def _anchors(old: Sequence[bytes], new: Sequence[bytes], head: int, tail: int) -> list[tuple[int, int]]:
    """The longest series of lines that are unique on both sides and come in the same order."""
    count, count_new = Counter(old[head : len(old) - tail]), Counter(new[head : len(new) - tail])
    place = {line: at for at, line in enumerate(new[head : len(new) - tail], head) if count_new[line] == 1}
    pairs = [(at, place[line]) for at, line in enumerate(old[head : len(old) - tail], head) if count[line] == 1 and line in place]
    ends: list[int] = []  # The least place in new at which a series of this length can end.
    chain: list[int] = []  # Which pair that is.
    before: list[int] = []
    for index, (_, at_new) in enumerate(pairs):
        length = bisect_left(ends, at_new)
        ends[length : length + 1] = [at_new]
        chain[length : length + 1] = [index]
        before.append(chain[length - 1] if length else -1)
    found: list[tuple[int, int]] = []
    index = chain[-1] if chain else -1
    while index >= 0:
        found.append(pairs[index])
        index = before[index]
    return found[::-1]
