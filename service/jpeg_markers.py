"""The segments of a JPEG from its first to its last, without decoding: ITU-T T.81, annex B."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

# Far above what encoders write, far below what would hold the interpreter for seconds.
MAX_BLOCKS = 65_536

SOS, EOI, APP0 = 0xDA, 0xD9, 0xE0
_TEM = 0x01
_SEQUENTIAL_SOF = frozenset({0xC0, 0xC1, 0xC9})
_SOI_BYTES = 2
# In coded data 0xFF is followed by 0 or a restart; filling is more of them.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SCAN = b"\xff\xda\0"  # with half of its length, which is below 256
_JFIF = b"JFIF\0"
_JFIF_MAJOR = 7  # of the segment with its length
_WHOLE_SPECTRUM = bytes((0, 63, 0))


class Segment(NamedTuple):
    """`marker` is its second byte; the content, with its two bytes of length, is `start` to `end`."""

    marker: int
    start: int
    end: int


def segments(data: bytes) -> Iterator[Segment]:
    """All segments up to the end marker, those between and behind scans included.

    Raises:
        ValueError: there are more than `MAX_BLOCKS`, or one reaches beyond the data.
    """
    position = _SOI_BYTES
    for _ in range(MAX_BLOCKS):
        found = _MARKER.search(data, position)
        if found is None:
            return
        marker, position = data[found.end() - 1], found.end()
        if marker == EOI:
            yield Segment(marker, position, position)
            return
        if marker == _TEM:
            continue
        end = position + int.from_bytes(data[position : position + 2])
        if not position + 2 <= end <= len(data):
            raise ValueError("a segment is cut short")
        yield Segment(marker, position, end)
        position = end
    raise ValueError("too many segments")


def has_more_scans_than(data: bytes, most: int, first: int) -> bool:
    """Whether a JPEG has more scans than that; those of thumbnails and of pictures behind its end are not its own.

    Args:
        data: the file.
        most: scans, at least 1.
        first: where a scan can begin.

    Raises:
        ValueError: as for `segments`.
    """
    # Most have one: to look for the last takes a third of the time of counting.
    if data.rfind(_SCAN) == data.find(_SCAN, first) or data.count(_SCAN) <= most:
        return False
    scans = 0
    for segment in segments(data):
        scans += segment.marker == SOS
        if scans > most:
            return True
    return False


def tidied(data: bytes) -> bytes:
    """The same picture without what decoders complain of although no pixel is missing.

    Those are a JFIF version that is not known, and a scan of a sequential JPEG that does not say that it holds the
    whole spectrum. libjpeg tells only its first complaint, behind which damage could hide.

    Raises:
        ValueError: as for `segments`.
    """
    parts, coded_from, sequential = [data[:_SOI_BYTES]], 0, False
    for marker, start, end in segments(data):
        if coded_from:
            parts.append(data[coded_from : start - 2])
        content = bytearray(data[start:end])
        sequential = sequential or marker in _SEQUENTIAL_SOF
        if marker == APP0 and content[2:_JFIF_MAJOR] == _JFIF:
            content[_JFIF_MAJOR] = 1
        elif marker == SOS and sequential:
            content[-3:] = _WHOLE_SPECTRUM
        parts += [bytes((0xFF, marker)), bytes(content)]
        coded_from = end if marker == SOS else 0
    if coded_from:
        parts.append(data[coded_from:])
    return b"".join(parts)
