"""Long work on the event loop lets others have their turns."""

import asyncio

import pytest

from service.turns import TURN, in_turns


@pytest.mark.parametrize(
    ("items", "cost", "turns"), [(100, TURN, 100), (100, TURN // 2, 50), (100, 1, 0), (0, TURN, 0)]
)
async def test_others_have_a_turn_whenever_so_much_is_done(items, cost, turns):
    had = 0

    async def other():
        nonlocal had
        while True:
            await asyncio.sleep(0)
            had += 1

    task = asyncio.create_task(other())
    await asyncio.sleep(0)
    begun = had
    made = await in_turns(iter(range(items)), cost)

    assert (made, had - begun) == (list(range(items)), turns)
    task.cancel()


async def test_an_item_that_cannot_be_made_ends_it():
    with pytest.raises(ZeroDivisionError):
        await in_turns((1 // n for n in (1, 0)), TURN)
