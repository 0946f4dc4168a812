"""Temporal's whole state thrown away while events wait: Postgres knows what is left to do."""

import time

from drills.audit import progress_of, prove, settled
from drills.case import Broken, Case, Drill, Finding, Say, Sizes
from drills.client import client_of
from drills.platform import Platform
from drills.workload import make_events, make_program, offer


async def run(platform: Platform, sizes: Sizes, say: Say) -> Finding:
    """Stop Temporal, accept events without it, delete its file, start it empty; nobody helps."""
    await platform.provide()
    async with client_of(platform) as client:
        program = await make_program(client, "lost Temporal")
        events = make_events(program, sizes.lost_temporal_events)
        third = len(events) // 3
        for begin, end, before in ((0, third, False), (third, len(events), True)):
            if before:
                say("stopping Temporal")
                await platform.temporal.stop()
            say("sending events")
            await offer(client, program, events[begin:end])
        progress = await progress_of(platform, program.id)
        for file in platform.temporal_files:
            file.unlink()
        say("starting Temporal with nothing")
        await platform.temporal.start()
        started_at = time.monotonic()
        recovered = await settled(platform, program.id) - started_at
        # An event that comes now finds everything as it was before.
        more = make_events(program, len(events) + 1)[len(events) :]
        await offer(client, program, more)
        await settled(platform, program.id)
    say("comparing")
    await prove(platform, program, [*events, *more])
    if platform.worker.pid is None:
        raise Broken("the worker did not survive")
    waited = progress.waiting if progress else 0
    return Finding(len(events) + 1, 1, recovered, f"{waited} events waited when the file was deleted")


DRILL = Drill(
    "lost-temporal",
    "Temporal's database deleted while events wait",
    (Case("lost-temporal", "delete Temporal's database while events wait", run),),
)
