"""Ports for tests that must name one before anything listens there."""

import random
import socket
from contextlib import closing

# Below those that Linux gives to whoever asks for any port (32768 and up): no connection of a test that runs beside
# takes one between its being chosen and its being bound.
_CHOICES = range(20_000, 32_000)
_chance = random.SystemRandom()


def free_port():
    """A port of 127.0.0.1 that was free a moment ago."""
    while True:
        port = _chance.choice(_CHOICES)
        with closing(socket.socket()) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
