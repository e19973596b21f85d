"""What decoders leave to their caller: what of a PNG is its picture, and whether all of that is there.

Pillow refuses files for what stands beside the pixels (a comment with a wrong checksum, a large profile), and takes one
whose data ends early, with a stream that is whole in itself, for a picture whose last rows are black. Chunks, passes
and sizes are those of the PNG specification, third edition, 5.3, 8.1 and 11.2.2.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_SIGNATURE_BYTES = 8
_PICTURE = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# First column, first row, and the steps between columns and rows, of each pass of Adam7.
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PIECE_BYTES = 1 << 20


def picture(data: bytes) -> bytes:
    """The file with nothing but its picture; as it is where it has nothing else, or where its chunks are damaged."""
    try:
        spans = list(chunks(data))
    except struct.error:
        return data
    kept = [data[start:stop] for kind, start, stop in spans if kind in _PICTURE]
    return data if len(kept) == len(spans) else data[:_SIGNATURE_BYTES] + b"".join(kept)


def claimed_bytes(data: bytes) -> int:
    """Bytes that the data of a file have to unfold to, by its header."""
    width, height, bits, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    return _unfolded_bytes(width, height, bits * _CHANNELS.get(colour, 1), interlaced=bool(interlaced))


def is_whole(data: bytes) -> bool:
    """Whether the data unfold to as many bytes as the header says; what is damaged in another way is not told here.

    Raises:
        struct.error: the chunks end early.
        zlib.error: the stream is damaged.
    """
    inflating, wanted, found = zlib.decompressobj(), claimed_bytes(data), 0
    for kind, start, stop in chunks(data):
        piece = data[start + 8 : stop - 4] if kind == b"IDAT" else b""
        while piece and found < wanted:
            found += len(inflating.decompress(piece, min(_PIECE_BYTES, wanted - found)))
            piece = inflating.unconsumed_tail
    return found >= wanted


def _unfolded_bytes(width: int, height: int, bits: int, *, interlaced: bool) -> int:
    """Bytes of all rows, each with the byte that names its filter. `bits`: of a pixel."""
    if not interlaced:
        return height * _row_bytes(width, bits)
    sizes = ((-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in PASSES)
    return sum(rows * _row_bytes(columns, bits) for columns, rows in sizes if columns > 0 and rows > 0)


def _row_bytes(width: int, bits: int) -> int:
    return 1 + -(-width * bits // 8)


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each chunk, up to the last one.

    Raises:
        struct.error: the data end before it: the file was cut short, even if its pixels are all there.
    """
    kind, end = b"", _SIGNATURE_BYTES
    while kind != b"IEND":
        start = end
        length, kind = struct.unpack_from(">I4s4x", data, start)
        end = start + length + 12
        yield kind, start, end
