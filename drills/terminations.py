"""An operator terminates a program's workflow while it works: Temporal's state is never needed."""

import time

from temporalio.client import Client as TemporalClient

from drills.audit import moved_on, prove, settled
from drills.case import Case, Drill, Finding, Say, Sizes
from drills.client import client_of
from drills.platform import Platform
from drills.workload import make_events, make_program, offer
from workflows.event_processing import workflow_id

ROUNDS = 5


async def run(platform: Platform, sizes: Sizes, say: Say) -> Finding:
    """Terminate the workflow in the middle of a drain that follows a lost one, which takes events one by one."""
    await platform.provide()
    recovered_s = []
    async with client_of(platform) as client:
        program = await make_program(client, "terminations")
        events = make_events(program, sizes.point_events)
        temporal = await TemporalClient.connect(platform.temporal_address)
        size = -(-len(events) // ROUNDS)
        for number in range(ROUNDS):
            # The first drain fails, so that the next attempt is a careful one.
            await platform.provide(worker_faults="drain.promised=fail")
            say(f"round {number + 1} of {ROUNDS}: sending events")
            await offer(client, program, events[number * size : (number + 1) * size])
            await moved_on(platform, program.id, number * size + size // 4)
            say(f"round {number + 1} of {ROUNDS}: terminating the workflow")
            await temporal.get_workflow_handle(workflow_id(program.id)).terminate("a drill")
            terminated_at = time.monotonic()
            recovered_s.append(await settled(platform, program.id) - terminated_at)
    say("comparing")
    await prove(platform, program, events)
    return Finding(len(events), ROUNDS, max(recovered_s))


DRILL = Drill(
    "terminations",
    "The workflow terminated in the Temporal UI in the middle of its work",
    (Case("terminations", "terminate the workflow while it works", run),),
)
