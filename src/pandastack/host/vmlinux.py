"""Takes the kernel proper, an ELF file, out of a bzImage. QEMU and Firecracker start it at once, without its decompressor.

Pure: bytes in, bytes out. Source: Linux, Documentation/arch/x86/boot.rst (`payload_offset`, `payload_length`), and
Documentation/staging/lz4 of the legacy frame that the kernel's build uses.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib

from pandastack.errors import HostUnfit

_SETUP_SECTORS = 0x1F1
_MAGIC = 0x202
_VERSION = 0x206
_PAYLOAD = 0x248
_FIRST_VERSION = 0x0208  # of the boot protocol that says where the payload is
_SECTOR_BYTES = 512
_ELF = b"\x7fELF"
_LZ4_CHUNK_BYTES = 8 << 20
_MOST_BYTES = 512 << 20  # Debian's have some 50 MiB


def extract(image: bytes) -> bytes:
    """The ELF file in a bzImage. Raises HostUnfit where there is none, or a compression that Python cannot undo."""
    if len(image) < _PAYLOAD + 8 or image[_MAGIC : _MAGIC + 4] != b"HdrS":
        raise _unusable("it is no bzImage")
    if struct.unpack_from("<H", image, _VERSION)[0] < _FIRST_VERSION:
        raise _unusable("its boot protocol is too old")
    offset, length = struct.unpack_from("<II", image, _PAYLOAD)
    start = ((image[_SETUP_SECTORS] or 4) + 1) * _SECTOR_BYTES + offset
    if length < 16 or start + length > len(image):
        raise _unusable("it is cut off")
    try:
        # The build appends the size to what has no room for it; a decompressor object ignores such a tail.
        kernel = _decompress(image[start : start + length])
    except (OSError, EOFError, IndexError, ValueError, struct.error, lzma.LZMAError, zlib.error) as error:
        raise _unusable(f"it is damaged ({error})") from error
    if not kernel.startswith(_ELF):
        raise _unusable("there is no ELF file in it")
    return kernel


def _decompress(payload: bytes) -> bytes:
    if payload.startswith(_ELF):
        return payload
    if payload.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(payload, _MOST_BYTES)
    if payload.startswith(b"BZh"):
        return bz2.BZ2Decompressor().decompress(payload, _MOST_BYTES)
    if payload.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload, _MOST_BYTES)
    if payload.startswith(b"\x5d\0\0"):
        return lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(payload, _MOST_BYTES)
    if payload.startswith(b"\x02\x21\x4c\x18"):
        return _lz4(memoryview(payload)[4:])
    kind = {b"\x28\xb5\x2f\xfd": "zstd", b"\x89LZO": "LZO"}.get(payload[:4], "an unknown method")
    raise _unusable(f"it is compressed by {kind}")


def _lz4(payload: memoryview) -> bytes:
    """LZ4's legacy frame: chunks of up to 8 MiB, each with its length, and the kernel's own size in the last four bytes."""
    kernel = bytearray()
    at, end = 0, len(payload) - 4
    while at < end:
        (length,) = struct.unpack_from("<I", payload, at)
        kernel += _lz4_block(payload[at + 4 : at + 4 + length])
        at += 4 + length
    if len(kernel) != struct.unpack_from("<I", payload, end)[0]:
        raise ValueError("its size is not what it says")
    return bytes(kernel)


def _lz4_block(block: memoryview) -> bytearray:
    # Two seconds for a whole kernel, once on a machine: no reason for a library. Source: lz4, doc/lz4_Block_format.md.
    out = bytearray()
    at, end = 0, len(block)
    while True:
        token = block[at]
        at += 1
        literals = token >> 4
        if literals == 15:
            while (more := block[at]) == 255:
                literals += 255
                at += 1
            literals += more
            at += 1
        out += block[at : at + literals]
        at += literals
        if at >= end:  # The last sequence has literals only.
            return out
        distance = block[at] | block[at + 1] << 8
        at += 2
        length = token & 15
        if length == 15:
            while (more := block[at]) == 255:
                length += 255
                at += 1
            length += more
            at += 1
        length += 4
        start = len(out) - distance
        if distance == 0 or start < 0 or len(out) + length > _LZ4_CHUNK_BYTES:
            raise ValueError("a match outside of its block")
        if distance >= length:
            out += out[start : start + length]
        else:  # It overlaps itself: a pattern that repeats.
            pattern = bytes(out[start:])
            out += (pattern * (length // distance + 1))[:length]


def _unusable(why: str) -> HostUnfit:
    return HostUnfit(f"the guest kernel cannot be used: {why}", hint="use the cloud kernel of Debian 12")
