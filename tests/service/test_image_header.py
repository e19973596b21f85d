"""What an image says of itself, in every format, and that nothing but InvalidImageError comes of a broken header."""

import io
import struct
import zlib

import pytest
from PIL import Image

from service.errors import ImageFault, InvalidImageError
from service.image_header import MAX_BLOCKS, MAX_EXIF_SEGMENTS, MAX_SCANS, Header, is_hollow, read_header, sniff


def encoded(image_format, size=(7, 5), mode="RGB", **options):
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, image_format, **options)
    return stream.getvalue()


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_size_and_format_are_read(image_format):
    header = read_header(encoded(image_format))

    assert (header.format, header.width, header.height, header.orientation) == (image_format, 7, 5, 1)


@pytest.mark.parametrize(
    ("options", "mode"), [({"lossless": True}, "RGB"), ({"lossless": True}, "RGBA"), ({"quality": 80}, "RGBA")]
)
def test_every_kind_of_webp_bitstream_gives_its_size(options, mode):
    header = read_header(encoded("WEBP", (300, 17), mode, **options))

    assert (header.width, header.height) == (300, 17)


def test_animated_webp_gives_the_size_of_its_canvas():
    frames = [Image.new("RGB", (33, 21), colour) for colour in ("red", "blue")]
    stream = io.BytesIO()
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:])

    header = read_header(stream.getvalue())

    assert (header.width, header.height) == (33, 21)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_read(image_format, orientation):
    assert read_header(encoded(image_format, exif=exif(orientation))).orientation == orientation


def test_orientation_after_the_pixels_of_a_png_is_read():
    data = encoded("PNG")
    body, end = data[:-12], data[-12:]
    block = exif(6).tobytes().removeprefix(b"Exif\0\0")

    assert read_header(body + png_chunk(b"eXIf", block) + end).orientation == 6


def test_jpeg_header_tells_its_channels():
    assert read_header(encoded("JPEG", mode="L")) == Header("JPEG", 7, 5, 1, components=1)
    assert read_header(encoded("JPEG", mode="CMYK")).components == 4


def test_top_down_bmp_has_a_positive_height():
    data = bytearray(encoded("BMP"))
    struct.pack_into("<i", data, 22, -5)

    assert read_header(bytes(data)).height == 5


def test_os2_bmp_is_read():
    data = b"BM" + struct.pack("<IHHIIHHHH", 26, 0, 0, 26, 12, 40, 30, 1, 24)

    assert read_header(data) == Header("BMP", 40, 30)


@pytest.mark.parametrize("compression", [1, 2, 4, 5], ids=["RLE8", "RLE4", "JPEG", "PNG"])
def test_compressed_bmp_is_unsupported(compression):
    data = bytearray(encoded("BMP", mode="L"))
    struct.pack_into("<I", data, 30, compression)

    with pytest.raises(InvalidImageError, match="Compressed BMP") as caught:
        read_header(bytes(data))
    assert caught.value.reason is ImageFault.UNSUPPORTED_FORMAT


def test_bmp_with_more_colours_than_its_pixels_can_name_is_corrupt():
    data = bytearray(encoded("BMP", mode="L"))
    struct.pack_into("<I", data, 46, 257)

    with pytest.raises(InvalidImageError) as caught:
        read_header(bytes(data))
    assert caught.value.reason is ImageFault.CORRUPT


def test_gif_frame_beyond_the_screen_counts():
    data = bytearray(encoded("GIF", mode="L"))
    struct.pack_into("<HH", data, 6, 1, 1)

    assert (read_header(bytes(data)).width, read_header(bytes(data)).height) == (7, 5)


def test_gif_extensions_before_the_frame_are_skipped():
    data = encoded("GIF", mode="L", comment=b"x" * 1000)

    assert (read_header(data).width, read_header(data).height) == (7, 5)


def test_no_bytes_is_empty():
    with pytest.raises(InvalidImageError, match="no bytes") as caught:
        read_header(b"")
    assert caught.value.reason is ImageFault.EMPTY


@pytest.mark.parametrize(
    "data",
    [
        b"hello, world",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"RIFF\x10\0\0\0WAVEfmt ",
        b"II*\0\x08\0\0\0",
        b"B",
    ],
)
def test_what_is_no_image_of_a_known_format_is_unsupported(data):
    assert sniff(data) is None
    with pytest.raises(InvalidImageError, match="JPEG, PNG, WebP, BMP or GIF") as caught:
        read_header(data)
    assert caught.value.reason is ImageFault.UNSUPPORTED_FORMAT
    assert caught.value.image_format == "unknown"


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_header_cut_anywhere_is_read_or_corrupt(image_format):
    data = encoded(image_format, exif=exif(3)) if image_format in {"JPEG", "PNG", "WEBP"} else encoded(image_format)
    start = {"JPEG": 3, "PNG": 8, "WEBP": 12, "BMP": 2, "GIF": 6}[image_format]
    for length in range(start, len(data)):
        try:
            header = read_header(data[:length])
        except InvalidImageError as error:
            assert error.reason is ImageFault.CORRUPT  # noqa: PT017 - both outcomes are allowed
            assert error.image_format == image_format  # noqa: PT017
        else:
            assert (header.width, header.height) == (7, 5)


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0)])
def test_size_of_zero_is_corrupt(width, height):
    data = bytearray(encoded("PNG"))
    struct.pack_into(">II", data, 16, width, height)

    with pytest.raises(InvalidImageError, match="zero") as caught:
        read_header(bytes(data))
    assert caught.value.reason is ImageFault.CORRUPT


@pytest.mark.parametrize(("offset", "value"), [(1, 0xC3), (4, 12), (9, 2)], ids=["lossless", "12 bits", "2 channels"])
def test_kinds_of_jpeg_that_no_decoder_here_knows_are_unsupported(offset, value):
    data = bytearray(encoded("JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + offset] = value

    with pytest.raises(InvalidImageError, match="kind of JPEG") as caught:
        read_header(bytes(data))
    assert caught.value.reason is ImageFault.UNSUPPORTED_FORMAT


def test_progressive_jpeg_with_endless_scans_is_refused():
    data = encoded("JPEG", progressive=True)
    assert read_header(data).width == 7

    with pytest.raises(InvalidImageError, match="scans"):
        read_header(data[:-2] + b"\xff\xda\0\x02" * MAX_SCANS + b"\xff\xd9")


@pytest.mark.parametrize(("side", "most"), [(2000, 200), (4000, 80), (8000, 20), (16_000, 20)])
def test_a_large_progressive_jpeg_has_few_scans(side, most):
    """Each visits all blocks, decoding cannot be interrupted, and 20 is twice what encoders write."""
    data = bytearray(encoded("JPEG", progressive=True))
    own = data.count(b"\xff\xda\0")
    frame = data.index(b"\xff\xc2")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)

    def with_scans(count):
        return bytes(data[:-2]) + b"\xff\xda\0\x08\x01\x01\0\x01\x05\0" * (count - own) + b"\xff\xd9"

    assert read_header(with_scans(most)).width == side
    with pytest.raises(InvalidImageError, match=f"more than {most} scans"):
        read_header(with_scans(most + 1))


def jpeg_of_scans(count, middle=b""):
    """A sequential JPEG with further scans behind its own, each without a block."""
    data = encoded("JPEG", (64, 48))
    return data[:-2] + (middle + b"\xff\xda\0\x08\x01\x01\0\0\x3f\0") * (count - 1) + b"\xff\xd9"


@pytest.mark.parametrize("middle", [b"", b"\xff\xfe\0\x04\xff\xd9", b"\xff\xfe\0\x04\xff\xda"])
def test_a_sequential_jpeg_has_a_scan_for_each_component_at_most(middle):
    """Every scan costs a look at all blocks, and ten bytes. What only looks like a marker ends nothing."""
    assert read_header(jpeg_of_scans(3, middle)).components == 3
    with pytest.raises(InvalidImageError, match="more than 3 scans"):
        read_header(jpeg_of_scans(4, middle))


def test_scans_of_thumbnails_and_of_further_pictures_are_not_those_of_the_image():
    data, small = encoded("JPEG", (64, 48)), encoded("JPEG", progressive=True) * 3
    within = b"\xff\xe1" + struct.pack(">H", 2 + len(small)) + small
    assert small.count(b"\xff\xda") > 9
    assert read_header(data[:2] + within + data[2:] + small).width == 64


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_a_png_that_claims_more_pixels_than_it_can_hold_is_told_and_an_honest_one_is_not(mode):
    image = Image.new(mode, (3000, 2000))
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=9)
    data = stream.getvalue()
    assert not is_hollow(data, read_header(data))

    lying = data[:16] + struct.pack(">II", 8000, 8000) + data[24:]
    assert is_hollow(lying, read_header(lying))


def test_a_jpeg_with_two_frames_is_refused():
    data = encoded("JPEG")
    frame = data.index(b"\xff\xc0")
    end = frame + 2 + int.from_bytes(data[frame + 2 : frame + 4])
    with pytest.raises(InvalidImageError, match="two frames"):
        read_header(data[:end] + data[frame:end] + data[end:])


def test_endless_exif_is_refused():
    data = encoded("JPEG", exif=exif(6))
    start = data.index(b"\xff\xe1")
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
    block, empty = data[start:end], b"\xff\xe1\0\x08Exif\0\0"
    assert read_header(data[:start] + block + empty * 9 + data[end:]).orientation == 6  # the first that says it
    with pytest.raises(InvalidImageError, match="EXIF segments"):
        read_header(data[:start] + empty * (MAX_EXIF_SEGMENTS + 1) + data[end:])


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff" + b"\xff" * (MAX_BLOCKS + 9),
        b"\xff\xd8" + b"\xff\xfe\0\x02" * (MAX_BLOCKS + 1) + b"\xff\xd9",
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", bytes(13)) + png_chunk(b"tEXt", b"") * (MAX_BLOCKS + 1),
        b"RIFF\0\0\0\0WEBPVP8X" + struct.pack("<I", 10) + bytes(10) + b"ANIM\0\0\0\0" * (MAX_BLOCKS + 1),
        b"GIF89a" + bytes(7) + b"\x21\xfe" + b"\x01x" * (MAX_BLOCKS + 1) + b"\0",
        b"GIF89a" + bytes(7) + b"\0" * (MAX_BLOCKS + 1),
    ],
    ids=["fill bytes", "segments", "PNG chunks", "WebP chunks", "GIF sub-blocks", "GIF blocks"],
)
def test_the_number_of_blocks_visited_is_bounded(data):
    with pytest.raises(InvalidImageError) as caught:
        read_header(data)
    assert caught.value.reason is ImageFault.CORRUPT


def test_a_gif_frame_that_begins_below_the_edge_of_the_screen_counts_from_there():
    data = bytearray(encoded("GIF", (8, 6)))
    frame = data.index(b"\x2c")
    data[frame + 1 : frame + 9] = struct.pack("<4H", 3, 10, 8, 6)

    assert read_header(bytes(data))[:3] == ("GIF", 11, 16)


def test_the_scale_beside_the_size_of_a_lossy_webp_is_no_part_of_it():
    data = bytearray(encoded("WEBP", (300, 17), quality=80))
    place = data.index(b"\x9d\x01\x2a") + 3
    width, height = struct.unpack_from("<HH", data, place)
    struct.pack_into("<HH", data, place, width | 1 << 14, height | 2 << 14)

    assert read_header(bytes(data))[:3] == ("WEBP", 300, 17)


def test_markers_without_a_length_before_the_frame_are_passed_over():
    data = encoded("JPEG")

    assert read_header(data[:2] + b"\xff\xd0\xff\xd7\xff\x01" + data[2:]) == read_header(data)


def test_as_much_exif_as_is_allowed_is_read():
    data = encoded("JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", 2 + 6) + b"Exif\0\0"

    assert read_header(data[:2] + segment * MAX_EXIF_SEGMENTS + data[2:]).format == "JPEG"
