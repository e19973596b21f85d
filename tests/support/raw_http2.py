"""HTTP/2 as no gRPC library would write it: frames of any content, for tests of what strangers can send."""

import socket
import struct
from contextlib import contextmanager

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
CLASSIFY = b"/convoy.v1.ImageClassifier/Classify"
_END_STREAM, _END_HEADERS = 1, 4
_INITIAL_WINDOW_SIZE = 4  # the setting
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Connection:
    """One connection; blocking. `window`: bytes of each stream that may be sent to it before it says that it reads."""

    def __init__(self, port, timeout_s=10.0, window=65_535):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout_s)
        self._reader = self.socket.makefile("rb")
        self.socket.sendall(_PREFACE + frame(SETTINGS, struct.pack(">HI", _INITIAL_WINDOW_SIZE, window)))

    def send(self, *frames):
        self.socket.sendall(b"".join(frames))

    def receive(self):
        """The next frame as (kind, flags, stream, payload); None at the end of the connection."""
        head = self._reader.read(9)
        if len(head) < 9:
            return None
        payload = self._reader.read(int.from_bytes(head[:3], "big"))
        return head[3], head[4], int.from_bytes(head[5:], "big"), payload

    def wait_for(self, *kinds):
        """Reads until a frame of one of these kinds; None if the connection ends before."""
        while (got := self.receive()) and got[0] not in kinds:
            pass
        return got

    def close(self):
        self._reader.close()
        self.socket.close()


@contextmanager
def connected(port, **options):
    """A connection that is closed at the end."""
    connection = Connection(port, **options)
    try:
        yield connection
    finally:
        connection.close()


def frame(kind, payload=b"", flags=0, stream=0):
    """A frame (RFC 9113, 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def call(stream, path=CLASSIFY, extra=(), *, end=False):
    """HEADERS that open a gRPC call; `end` closes the client's side at once."""
    fields = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        *extra,
    )
    block = b"".join(b"\x00" + _string(name) + _string(value) for name, value in fields)
    return frame(HEADERS, block, _END_HEADERS | (_END_STREAM if end else 0), stream)


def message(stream, content):
    """DATA with a whole gRPC message, not compressed, and no more after it."""
    return frame(DATA, b"\0" + len(content).to_bytes(4, "big") + content, _END_STREAM, stream)


def reset(stream):
    """RST_STREAM with the code CANCEL."""
    return frame(RST_STREAM, (8).to_bytes(4, "big"), stream=stream)


def _string(value):
    """HPACK without Huffman coding and without the table (RFC 7541, 5.2)."""
    length = len(value)
    if length < 127:
        return bytes([length]) + value
    head, length = [127], length - 127
    while length >= 128:
        head.append(length % 128 | 128)
        length //= 128
    return bytes([*head, length]) + value
