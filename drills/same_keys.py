"""Clients that send the same keys at the same time, each in another order."""

import asyncio
from random import Random
from typing import Any

from drills.audit import deadlocks, prove, settled
from drills.case import Broken, Case, Drill, Finding, Say, Sizes
from drills.client import client_of
from drills.platform import Platform
from drills.workload import body_of, make_events, make_program

BATCH = 100


async def run(platform: Platform, sizes: Sizes, say: Say) -> Finding:
    """Round after round: a hundred new events, sent by several clients at once in as many orders."""
    await platform.provide()
    draw = Random(4)
    before = await deadlocks(platform)
    async with client_of(platform) as client:
        program = await make_program(client, "same keys")
        events = make_events(program, BATCH * sizes.same_keys_rounds)
        for number in range(sizes.same_keys_rounds):
            say(f"round {number + 1} of {sizes.same_keys_rounds}")
            piece = events[number * BATCH : (number + 1) * BATCH]
            orders = [draw.sample(piece, BATCH) for _ in range(sizes.same_keys_clients)]
            calls = ({"events": [body_of(program, event) for event in order]} for order in orders)
            answers = await asyncio.gather(*(client.post_once("/events/batch", call) for call in calls))
            ids = [_ids(answer) for answer in answers]
            if any(found != ids[0] for found in ids[1:]):
                raise Broken("two calls with the same keys were answered with different events")
        say("waiting for the last event")
        await settled(platform, program.id)
    say("comparing")
    await prove(platform, program, events, in_order_sent=False)
    found = await deadlocks(platform) - before
    if found or "request repeated" in platform.api.output():
        raise Broken(f"{found} deadlocks, or a request that had to be repeated")
    return Finding(len(events), 0, None, f"{client.calls} calls, no deadlock, no repetition")


def _ids(answer: dict[str, Any]) -> dict[str, str]:
    if answer["error_count"]:
        raise Broken(f"a repeated key was refused: {answer}")
    return {item["event"]["idempotency_key"]: item["event"]["id"] for item in answer["results"]}


DRILL = Drill(
    "same-keys",
    "Several clients send the same hundred keys at once, each in another order",
    (Case("same-keys", "the same keys from several clients at once", run),),
)
