"""Orientation out of EXIF blocks, whole and damaged."""

import struct

import pytest

from service import exif


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_is_read_in_both_byte_orders(order):
    magic = b"II*\0" if order == "<" else b"MM\0*"
    other = struct.pack(order + "HHII", 0x0100, 4, 1, 9)
    wanted = struct.pack(order + "HHIHH", 0x0112, 3, 1, 8, 0)

    assert exif.orientation(magic + struct.pack(order + "IH", 8, 2) + other + wanted) == 8


@pytest.mark.parametrize("order", ["<", ">"])
def test_an_orientation_in_four_bytes_is_read_too(order):
    magic = b"II*\0" if order == "<" else b"MM\0*"
    assert exif.orientation(magic + struct.pack(order + "IHHHII", 8, 1, 0x0112, 4, 1, 6)) == 6


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"II*\0",
        b"II*\0\xff\xff\xff\x7f",
        b"II*\0\x08\0\0\0\xff\xff",
        b"II*\0" + struct.pack("<IHHHIHH", 8, 1, 0x0112, 3, 1, 9, 0),
        b"II*\0" + struct.pack("<IHHHIHH", 8, 1, 0x0112, 3, 1, 0, 0),
        b"II*\0" + struct.pack("<IHHHII", 8, 1, 0x0112, 4, 1, 1 << 16 | 6),
        b"II*\0" + struct.pack("<IHHHII", 8, 1, 0x0112, 4, 2, 6),
        b"II*\0" + struct.pack("<IHHHIHH", 8, 1, 0x0112, 1, 1, 6, 0),
        b"garbage!",
    ],
)
def test_damaged_exif_counts_as_upright(block):
    assert exif.orientation(block) == 1
