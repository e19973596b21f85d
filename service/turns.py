"""Long work on the event loop, in turns: other requests, health and deadlines are not to wait for all of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

# So much of what costs about half a microsecond, a class of an answer, is done in one turn.
TURN = 2048


async def in_turns(items: Iterable[T], cost: int) -> list[T]:
    """What a lazy iterable gives.

    Args:
        items: each is made when it is asked for.
        cost: of one item, in units of `TURN`.
    """
    made: list[T] = []
    spent = 0
    for item in items:
        made.append(item)
        spent += cost
        if spent >= TURN:
            spent = 0
            await asyncio.sleep(0)
    return made
