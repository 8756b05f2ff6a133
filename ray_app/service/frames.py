"""What goes between a pool and its slots: two lengths, a JSON header, a body; no pickles."""

import json
import struct
from typing import Any, BinaryIO

__all__ = ["LENGTHS", "MAX_HEADER_BYTES", "pack", "read_header"]

LENGTHS = struct.Struct(">II")
"""Bytes of the header and of the body of a frame."""
MAX_HEADER_BYTES = 64 << 10
"""Most bytes of the header of a slot's reply."""


def pack(header: dict[str, Any], body: bytes = b"") -> bytes:
    """The bytes of one frame."""
    head = json.dumps(header).encode()
    return LENGTHS.pack(len(head), len(body)) + head + body


def read_header(stream: BinaryIO) -> dict[str, Any] | None:
    """The header of the next frame, which has no body; None at the end of the stream."""
    lengths = stream.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    header: dict[str, Any] = json.loads(stream.read(LENGTHS.unpack(lengths)[0]))
    return header
