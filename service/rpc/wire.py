"""How many fields a message has, before it is parsed: two bytes make a field, and each becomes an object.

Of a message of the largest size that is sixteen million, and the event loop stands still for a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from service.errors import InvalidRequestError

T = TypeVar("T")

# A message so small is parsed in the time of a few images.
_SMALL_BYTES = 64 << 10

# Protocol Buffers encoding, "Message structure": the last three bits of a tag.
_VARINT, _LEN = 0, 2
_FIXED = {
    1: 8,
    3: 0,
    4: 0,
    5: 4,
}  # bytes of a double; of the start and the end of a group, which are tags alone; of a float
_WIRE_TYPE = 7
_MORE, _BITS, _LONGEST = 0x80, 0x7F, 10


def bounded(parse: Callable[[bytes], T], most: int) -> Callable[[bytes], T]:
    """A parser that refuses a message of more than so many fields with InvalidRequestError."""

    def parse_bounded(message: bytes) -> T:
        if has_more_fields_than(message, most):
            raise InvalidRequestError(f"the request has more than {most} parts, images included; split it")
        return parse(message)

    return parse_bounded


def has_more_fields_than(message: bytes, most: int) -> bool:
    """Whether a serialised message has more than so many fields at its top; what is damaged is for the parser."""
    if len(message) <= _SMALL_BYTES:
        return False
    position = 0
    try:
        for _ in range(most):
            tag, position = _varint(message, position)
            kind = tag & _WIRE_TYPE
            if kind == _LEN:
                length, position = _varint(message, position)
                position += length
            elif kind == _VARINT:
                _, position = _varint(message, position)
            else:
                position += _FIXED[kind]
            if position >= len(message):
                return False
    except (IndexError, KeyError):
        return False
    return True


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = 0
    for place in range(_LONGEST):
        byte = message[position + place]
        value |= (byte & _BITS) << 7 * place
        if not byte & _MORE:
            return value, position + place + 1
    raise IndexError("no number is longer")
