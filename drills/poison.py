"""An event that kills whichever worker evaluates it."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from domain import limits
from drills.audit import prove, settled
from drills.case import Broken, Case, Drill, Finding, Say, Sizes
from drills.client import Client, client_of
from drills.platform import LOOK_EVERY_S, Platform
from drills.workload import PARTICIPANTS, Program, Sent, make_events, make_program, offer

ERROR = f"processing brought its worker down {limits.LOST_STARTS} times"


async def run(platform: Platform, sizes: Sizes, say: Say) -> Finding:
    """One event among many kills each worker that takes it, until it is found out; the others must not suffer."""
    await platform.provide()
    async with client_of(platform) as client:
        program = await make_program(client, "poison")
        events = make_events(program, sizes.poison_events)
        at = len(events) // 3
        # The event is of a participant of its own, by whom the fault point knows it.
        poison = f"{program.prefix}p{PARTICIPANTS}"
        events[at] = replace(events[at], who=poison, data={"type": "visit", "number": at})
        fault = f"event.applying[{poison}]=kill"
        await platform.provide(worker_faults=fault)
        say("sending events")
        begun, deaths = time.monotonic(), 0
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(_send_and_settle(platform, client, program, events))
            while not waiting.done():
                if platform.worker.pid is None:
                    deaths += 1
                    say(f"the worker died {deaths} times; starting it again, as armed as before")
                    await platform.worker.revive(fault)
                await asyncio.sleep(LOOK_EVERY_S)
        recovered = waiting.result() - begun
    say("comparing")
    await prove(platform, program, events, refused={events[at].key: ERROR})
    if deaths > limits.LOST_STARTS + 1:
        raise Broken(f"the event brought {deaths} workers down before it was found out")
    return Finding(len(events), deaths, recovered, f"one event FAILED, {len(events) - 1} unharmed")


async def _send_and_settle(platform: Platform, client: Client, program: Program, events: Sequence[Sent]) -> float:
    await offer(client, program, events)
    return await settled(platform, program.id)


DRILL = Drill(
    "poison",
    "An event whose evaluation kills its worker ends FAILED, the others of its batch don't",
    (Case("poison", "an event kills every worker that takes it", run),),
)
