"""Goal: a program whose rules eat the machine harms nobody else's events, nor its own that the rules don't concern.

Method: over HTTP, with a real worker. One program's rules burn ten thousand steps each for every hostile event, more
events of it than a batch takes in its time; another program's events come behind them.
Contract: rules-and-events.md 4.3, 6.5.
"""

from typing import Any

import httpx
import pytest

from tests.events_support import HttpProgram, credit, settled, tag

pytestmark = pytest.mark.usefixtures("running_worker")

BOMBS = [
    "event.n.all(a, event.n.all(b, event.n.all(c, event.n.all(d, a + b + c + d >= 0))))",
    "event.n.map(a, event.n.map(b, event.n.map(c, event.n.map(d, a * b * c * d)))).size() >= 0",
    "event.n.exists(a, event.n.exists(b, event.n.exists(c, (event.text + event.text).matches('(a+)+$'))))",
]
"""Each would take minutes if its steps were not counted."""

HOSTILE: dict[str, Any] = {"type": "bomb", "n": list(range(60)), "text": "a" * 30_000 + "!"}


async def test_hostile_rules_are_skipped_and_everybody_elses_events_complete(client: httpx.AsyncClient) -> None:
    hostile, peaceful = await HttpProgram.open(client), await HttpProgram.open(client, name="Peaceful")
    points, stars = await hostile.asset(), await peaceful.asset()
    for number, bomb in enumerate(BOMBS, start=1):
        await hostile.rule(f"event.type == 'bomb' && {bomb}", tag(f"bomb_{number}"))
    await hostile.rule("true", credit(points, "1"))
    await peaceful.rule("true", credit(stars, "1"))

    bombs = [await hostile.send(f"bomber-{number}", **HOSTILE) for number in range(60)]
    calm = await hostile.send("alice", type="purchase")
    others = [await settled(client, await peaceful.send("bob")) for _ in range(3)]

    assert [event["status"] for event in others] == ["COMPLETED"] * 3
    for event_id in (*bombs, calm):
        assert (await settled(client, event_id))["status"] == "COMPLETED"
    assert await hostile.available("alice", points) == "1.00"
    records = (await settled(client, bombs[0], include_skipped=True))["rule_evaluations"]
    assert [record["status"] for record in records] == ["SKIPPED_TIMEOUT"] * len(BOMBS) + ["SUCCESS"]
