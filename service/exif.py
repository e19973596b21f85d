"""The orientation of a photo: tag 0x0112 of EXIF 2.32 (CIPA DC-008).

Read here instead of with an imaging library because it has to be known before an image is decoded, and because
damaged EXIF, which cameras and editors do write, must never be a reason to refuse an image.
"""

from __future__ import annotations

import struct

UPRIGHT = 1

_ORIENTATION_TAG = 0x0112
_SHORT, _LONG = 3, 4


def orientation(tiff: bytes) -> int:
    """Orientation, 1 to 8, of an EXIF block (a TIFF file without pixels); 1 if it has none or is damaged."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return UPRIGHT
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for index in range(entries):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * index)
            if tag == _ORIENTATION_TAG:
                if kind == _LONG:  # not what EXIF says, but what some write, and others read
                    (value,) = struct.unpack_from(order + "I", tiff, directory + 10 + 12 * index)
                known = kind in {_SHORT, _LONG} and count == 1 and 1 <= value <= 8  # noqa: PLR2004
                return int(value) if known else UPRIGHT
    except struct.error:
        return UPRIGHT
    return UPRIGHT
