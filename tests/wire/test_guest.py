"""The codec against anything a guest could send."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pandastack.errors import GuestProtocolError
from pandastack.wire import guest as wire
from pandastack.wire.guest import Frame, FrameDecoder, Kind

TAG, NONCE = 0x01020304, "ab" * 16
GREETING = {"version": 1, "nonce": NONCE, "build": "b", "pid": 1, "sealed": False, "live": 0}


def raw(kind: int, stream: int, payload: bytes, *, tag: int = TAG, flags: int = 0) -> bytes:
    return b"".join(wire.encode(kind, stream, payload, tag, flags=flags))  # type: ignore[arg-type]


def greeting(**changes: object) -> bytes:
    return wire.MAGIC + raw(Kind.HELLO_OK, 0, wire.encode_json(GREETING | changes))


def feed(decoder: FrameDecoder, data: bytes, step: int = 1 << 20) -> list[Frame]:
    frames: list[Frame] = []
    while data:
        space = decoder.space()
        count = min(step, len(space), len(data))
        assert count
        space[:count] = data[:count]
        data = data[count:]
        frames += decoder.filled(count)
    return frames


@pytest.fixture
def decoder() -> FrameDecoder:
    decoder = FrameDecoder(TAG, NONCE)
    feed(decoder, greeting())
    return decoder


frames = st.builds(
    Frame,
    st.sampled_from([Kind.REPLY, Kind.ERROR, Kind.DATA, Kind.CREDIT, Kind.END, Kind.RESET, Kind.EVENT]),
    st.integers(0, 255),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=300),
)


@given(st.lists(frames, max_size=20), st.integers(1, 64))
def test_frames_survive_any_cutting(sent: list[Frame], step: int) -> None:
    stream = greeting() + b"".join(raw(f.kind, f.stream, f.payload, flags=f.flags) for f in sent)
    decoder = FrameDecoder(TAG, NONCE)
    assert feed(decoder, stream, step) == sent
    assert decoder.greeting is not None


@given(st.binary(max_size=2000), st.integers(1, 2000))
def test_garbage_is_refused_or_waits_for_more(garbage: bytes, step: int) -> None:
    decoder = FrameDecoder(TAG, NONCE)
    feed(decoder, greeting())
    with contextlib.suppress(GuestProtocolError):
        for frame in feed(decoder, garbage, step):
            assert raw(frame.kind, frame.stream, frame.payload, flags=frame.flags) in garbage


@given(st.binary(max_size=500), st.integers(1, 100))
@settings(max_examples=200)
def test_greeting_is_found_behind_anything(older: bytes, step: int) -> None:
    decoder = FrameDecoder(TAG, NONCE)
    older = older + wire.MAGIC + older + greeting(nonce="00" * 16) + wire.MAGIC[:7]
    assert feed(decoder, older + greeting() + raw(Kind.RESET, 1, b""), step) == [Frame(Kind.RESET, 0, 1, b"")]


def test_largest_frames_pass(decoder: FrameDecoder) -> None:
    payload = bytes(range(256)) * (wire.MAX_PAYLOAD_BYTES // 256)
    stream = raw(Kind.DATA, 1, payload) * 5
    assert [f.payload for f in feed(decoder, stream, 65_000)] == [payload] * 5


@pytest.mark.parametrize(
    "bad",
    [
        raw(Kind.DATA, 1, b"x", tag=TAG + 1),
        raw(Kind.DATA, 1, b"x", tag=0),
        raw(Kind.HELLO, 0, b"{}"),
        raw(Kind.CALL, 1, b"{}"),
        raw(11, 1, b""),
        raw(0, 0, b""),
        bytes([Kind.DATA, 0, 0, 1]) + bytes(8),
        bytes([Kind.DATA, 0, 0, 0, 0, 0, 0, 1, 0, 4, 0, 1]),
        bytes([Kind.DATA, 0, 0, 0, 0, 0, 0, 1, 255, 255, 255, 255]),
        wire.MAGIC,
    ],
)
def test_violations_end_the_session(decoder: FrameDecoder, bad: bytes) -> None:
    with pytest.raises(GuestProtocolError):
        feed(decoder, bad)


def test_discarding_is_bounded() -> None:
    decoder = FrameDecoder(TAG, NONCE)
    with pytest.raises(GuestProtocolError):
        feed(decoder, bytes(wire.MAX_DISCARDED_BYTES + (1 << 20)))


def test_refusal_names_the_code_and_nothing_else() -> None:
    fault = wire.encode_json({"code": "token", "message": "<script>"})
    with pytest.raises(GuestProtocolError) as caught:
        feed(FrameDecoder(TAG, NONCE), wire.MAGIC + raw(Kind.ERROR, 0, fault))
    assert caught.value.guest_code == "token"
    assert "script" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[]", b"{", b"null", b'{"sent":"1"}', b'{"sent":1.0}', b'{"sent":-1}', b'{"sent":true}', b'{"sent":NaN}',
        b'{"sent":1,"more":2}', b'{"sent":' + b"9" * 400 + b"}", b'{"sent":' + b"[" * 100_000, b"\xff", b'{"sent":1} x',
    ],
)  # fmt: skip
def test_json_must_have_exactly_the_shape(text: bytes) -> None:
    with pytest.raises(GuestProtocolError):
        wire.parse(wire.Sent, text)


def test_numbers_must_be_finite() -> None:
    good = {"memory_total_bytes": 1, "memory_available_bytes": 1, "cpu_seconds": 1.5, "load_1m": 0, "disk_total_bytes": 1,
            "disk_free_bytes": 1, "processes": 1}  # fmt: skip
    assert wire.parse(wire.Resources, wire.encode_json(good)).cpu_seconds == 1.5
    with pytest.raises(GuestProtocolError):
        wire.parse(wire.Resources, wire.encode_json(good).replace(b"1.5", b"NaN"))


def test_names_keep_their_bytes() -> None:
    body = {"name": "\ufffd", "name_b64": "/w==", "type": "file", "size": 0, "mode": 0, "mtime_ns": 0, "uid": 0, "gid": 0}
    assert wire.parse(wire.FileStat, wire.encode_json(body)).name_bytes == b"\xff"
    with pytest.raises(GuestProtocolError):
        _ = wire.parse(wire.FileStat, wire.encode_json(body | {"name_b64": "%"})).name_bytes


def test_exit_code_of_a_signal_is_the_shells() -> None:
    body = {"id": "a", "exit_code": None, "signal": 9, "reason": "killed", "stdout_bytes": 0, "stderr_bytes": 0, "duration_ms": 1}
    assert wire.parse(wire.Exit, wire.encode_json(body)).code == 137
    with pytest.raises(GuestProtocolError):
        _ = wire.parse(wire.Exit, wire.encode_json(body | {"signal": None})).code
