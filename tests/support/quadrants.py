"""Pictures of four quadrants of known colour, in every kind of encoding."""

import struct
import zlib

import numpy as np
from PIL import Image
from toys import encoded

from service.artifact import InputSpec, Resize

# Top left, top right, bottom left, bottom right.
COLOURS = ((230, 40, 20), (10, 200, 60), (40, 60, 220), (250, 250, 120))


GRAYS = (0, 255, 80, 170)


QUADRANTS = InputSpec(height=12, width=16, resize=Resize(mode="stretch"))


GRAY_QUADRANTS = QUADRANTS.model_copy(update={"channels": 1})


IMAGENET = InputSpec(height=224, width=224, resize=Resize(shorter_side=256))


def quadrants(values, size=(64, 48), dtype=np.uint8):
    """[48, 64] or [48, 64, C] of four quadrants."""
    width, height = size
    pixels = np.array(values, dtype).reshape(2, 2, *np.shape(values)[1:])
    return pixels.repeat(height // 2, axis=0).repeat(width // 2, axis=1)


def raw_png(samples, bit_depth, colour_type, chunks=()):
    """A PNG of kinds that Pillow does not write; `samples` are big-endian and packed, one row for each item."""
    height, width = 48, 64

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    head = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, content) for kind, content in parts)


def gray(values):
    return [(v, v, v) for v in values]


def over_white(colours, alphas):
    return [tuple(round(c * a / 255 + 255 - a) for c in colour) for colour, a in zip(colours, alphas, strict=True)]


def with_alpha(colours, alphas):
    return [(*colour, alpha) for colour, alpha in zip(colours, alphas, strict=True)]


def paletted(colours):
    image = Image.fromarray(quadrants((0, 1, 2, 3))).convert("L")
    image.putpalette([v for colour in colours for v in colour])
    return image


ALPHAS = (255, 128, 0, 200)


SIXTEEN_BIT = tuple((17_000 * i + 300, 60_000 - 9_000 * i, 256 * 40 * i + 255) for i in range(4))


HIGH_BYTES = [tuple(v >> 8 for v in colour) for colour in SIXTEEN_BIT]


GRAY16 = (0, 65_535, 20_000, 40_255)


def samples16(values):
    return quadrants(values, dtype=">u2")


def packed(values, bits):
    """uint8 rows of samples of 1, 2 or 4 bits."""
    per_byte = 8 // bits
    grid = quadrants(values).reshape(48, 64 // per_byte, per_byte)
    return (grid << (bits * np.arange(per_byte)[::-1])).sum(axis=2).astype(np.uint8)


# Name: (encoded image, the four RGB colours that have to come out, tolerance).
GOLDEN = {
    "PNG RGB": (encoded(quadrants(COLOURS), "PNG"), COLOURS, 0),
    "PNG gray": (encoded(quadrants(GRAYS), "PNG"), gray(GRAYS), 0),
    "PNG 1 bit": (encoded(Image.fromarray(quadrants((0, 255, 255, 0))).convert("1"), "PNG"), gray((0, 255, 255, 0)), 0),
    "PNG gray 2 bits": (raw_png(packed((0, 1, 2, 3), 2), 2, 0), gray((0, 85, 170, 255)), 0),
    "PNG gray 4 bits": (raw_png(packed((0, 5, 10, 15), 4), 4, 0), gray((0, 85, 170, 255)), 0),
    "PNG palette": (encoded(paletted(COLOURS), "PNG"), COLOURS, 0),
    "PNG palette, one entry transparent": (
        encoded(paletted(COLOURS), "PNG", transparency=2),
        over_white(COLOURS, (255, 255, 0, 255)),
        0,
    ),
    "PNG palette, entries half transparent": (
        encoded(paletted(COLOURS), "PNG", transparency=bytes(ALPHAS)),
        over_white(COLOURS, ALPHAS),
        1,
    ),
    "PNG RGBA": (encoded(quadrants(with_alpha(COLOURS, ALPHAS)), "PNG"), over_white(COLOURS, ALPHAS), 1),
    "PNG gray with alpha": (
        encoded(Image.fromarray(quadrants(with_alpha(gray(GRAYS), ALPHAS))).convert("LA"), "PNG"),
        over_white(gray(GRAYS), ALPHAS),
        1,
    ),
    "PNG gray, one value transparent": (
        encoded(quadrants(GRAYS), "PNG", transparency=80),
        gray((0, 255, 255, 170)),
        0,
    ),
    "PNG RGB, one colour transparent": (
        encoded(quadrants(COLOURS), "PNG", transparency=COLOURS[0]),
        [(255, 255, 255), *COLOURS[1:]],
        0,
    ),
    "PNG RGB 16 bits": (raw_png(samples16(SIXTEEN_BIT), 16, 2), HIGH_BYTES, 0),
    "PNG RGB 16 bits, one colour transparent": (
        raw_png(samples16(SIXTEEN_BIT), 16, 2, [(b"tRNS", struct.pack(">3H", *SIXTEEN_BIT[3]))]),
        [*HIGH_BYTES[:3], (255, 255, 255)],
        0,
    ),
    "PNG RGB 16 bits, a transparent colour that only upper bytes have": (
        raw_png(samples16(SIXTEEN_BIT), 16, 2, [(b"tRNS", struct.pack(">3H", *HIGH_BYTES[3]))]),
        HIGH_BYTES,
        0,
    ),
    "PNG gray 2 bits, one value transparent": (
        raw_png(packed((0, 1, 2, 3), 2), 2, 0, [(b"tRNS", struct.pack(">H", 1))]),
        gray((0, 255, 170, 255)),
        0,
    ),
    "PNG gray 4 bits, one value transparent": (
        raw_png(packed((0, 5, 10, 15), 4), 4, 0, [(b"tRNS", struct.pack(">H", 10))]),
        gray((0, 85, 255, 255)),
        0,
    ),
    "PNG RGBA 16 bits": (
        raw_png(samples16([(*c, a * 257) for c, a in zip(SIXTEEN_BIT, ALPHAS, strict=True)]), 16, 6),
        over_white(HIGH_BYTES, ALPHAS),
        1,
    ),
    "PNG gray 16 bits": (raw_png(samples16(GRAY16), 16, 0), gray([v >> 8 for v in GRAY16]), 0),
    "PNG gray 16 bits, one value transparent": (
        raw_png(samples16(GRAY16), 16, 0, [(b"tRNS", struct.pack(">H", GRAY16[0]))]),
        gray((255, 255, 20_000 >> 8, 40_255 >> 8)),
        0,
    ),
    "PNG gray with alpha, 16 bits": (
        raw_png(samples16([(v, a * 257) for v, a in zip(GRAY16, ALPHAS, strict=True)]), 16, 4),
        over_white(gray([v >> 8 for v in GRAY16]), ALPHAS),
        1,
    ),
    "APNG": (
        encoded(quadrants(COLOURS), "PNG", save_all=True, append_images=[Image.new("RGB", (64, 48), "black")]),
        COLOURS,
        0,
    ),
    "JPEG 4:2:0": (encoded(quadrants(COLOURS), "JPEG", quality=95), COLOURS, 4),
    "JPEG 4:4:4": (encoded(quadrants(COLOURS), "JPEG", quality=95, subsampling=0), COLOURS, 4),
    "JPEG 4:2:2, progressive": (
        encoded(quadrants(COLOURS), "JPEG", quality=95, subsampling=1, progressive=True),
        COLOURS,
        4,
    ),
    "JPEG gray": (encoded(quadrants(GRAYS), "JPEG", quality=95), gray(GRAYS), 2),
    "JPEG CMYK": (
        encoded(Image.fromarray(quadrants(COLOURS)).convert("CMYK"), "JPEG", quality=95, subsampling=0),
        COLOURS,
        6,
    ),
    "JPEG stored as RGB": (encoded(quadrants(COLOURS), "JPEG", quality=95, keep_rgb=True), COLOURS, 4),
    "WebP": (encoded(quadrants(COLOURS), "WEBP", quality=95), COLOURS, 8),
    "WebP lossless": (encoded(quadrants(COLOURS), "WEBP", lossless=True), COLOURS, 0),
    "WebP with alpha": (
        encoded(quadrants(with_alpha(COLOURS, ALPHAS)), "WEBP", lossless=True, exact=True),
        over_white(COLOURS, ALPHAS),
        1,
    ),
    "WebP animated": (
        encoded(
            quadrants(COLOURS),
            "WEBP",
            lossless=True,
            save_all=True,
            append_images=[Image.new("RGB", (64, 48), "black")],
        ),
        COLOURS,
        0,
    ),
    "BMP RGB": (encoded(quadrants(COLOURS), "BMP"), COLOURS, 0),
    "BMP gray": (encoded(quadrants(GRAYS), "BMP"), gray(GRAYS), 0),
    "BMP palette": (encoded(paletted(COLOURS), "BMP"), COLOURS, 0),
    "BMP 1 bit": (encoded(Image.fromarray(quadrants((0, 255, 255, 0))).convert("1"), "BMP"), gray((0, 255, 255, 0)), 0),
    "GIF": (encoded(paletted(COLOURS), "GIF"), COLOURS, 0),
    "GIF gray": (encoded(quadrants(GRAYS), "GIF"), gray(GRAYS), 0),
    "GIF transparent": (
        encoded(paletted(COLOURS), "GIF", transparency=1),
        over_white(COLOURS, (255, 0, 255, 255)),
        0,
    ),
    "GIF animated": (
        encoded(paletted(COLOURS), "GIF", save_all=True, append_images=[paletted(COLOURS[::-1])]),
        COLOURS,
        0,
    ),
}
