"""The paths of Simulation, each played through once, with canned reports in place of the activities.

The tests assert what happens on each path; `python -m tests.workflows.simulation_scenarios VERSION` keeps the histories
for the replay test, as `tests.workflows.record` does for EventProcessing.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from temporalio import activity
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from activities.simulations import SimulationReport, SimulationStep
from domain.ids import new_id
from tests.workflows.hold_scenarios import without_traces
from tests.workflows.record import HISTORIES
from tests.workflows.scenarios import time_skipping
from worker import WORKFLOWS
from workflows.simulation import Simulation, SimulationInput, workflow_id

ORGANIZATION_ID = UUID("01980000-0000-7000-8000-000000000001")
EVENTS = 1_000

DONE = SimulationReport("COMPLETED", EVENTS, EVENTS, finished=True)
CLEARING = SimulationReport("COMPLETED", EVENTS, EVENTS, finished=False)
FAILED = SimulationReport("FAILED", 300, EVENTS, finished=True, error="a holder has too much")


def running(events_done: int) -> SimulationReport:
    """What a step answers that has come so far."""
    return SimulationReport("RUNNING", events_done, EVENTS, finished=False)


@dataclass
class Steps:
    """Stands in for the activities: each step answers what `script` says next; None waits for the cancel."""

    script: Sequence[SimulationReport | Exception | None]
    taken: int = 0
    cancelled: int = 0
    waiting: asyncio.Event = field(default_factory=asyncio.Event)
    was_cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    @activity.defn(name="simulate")
    async def simulate(self, step: SimulationStep) -> SimulationReport:
        """Answer what the script says next."""
        answer = self.script[self.taken]
        self.taken += 1
        if isinstance(answer, Exception):
            raise answer
        if answer is None:
            self.waiting.set()
            await self.was_cancelled.wait()
            return SimulationReport("CANCELED", 300, EVENTS, finished=False)
        return answer

    @activity.defn(name="cancel_simulation")
    async def cancel_simulation(self, step: SimulationStep) -> None:
        """Note that it was cancelled."""
        self.cancelled += 1
        self.was_cancelled.set()


@dataclass(frozen=True)
class Played:
    """A run that has ended, with its result or the error that ended it."""

    steps: Steps
    handle: WorkflowHandle[Any, Any]
    result: Any = None
    error: BaseException | None = None


@asynccontextmanager
async def serving(env: WorkflowEnvironment, steps: Steps, **worker: Any) -> AsyncIterator[str]:
    """A worker with the canned activities; the queue it serves."""
    queue = f"ledger-{new_id().hex}"
    activities = [steps.simulate, steps.cancel_simulation]
    async with Worker(env.client, task_queue=queue, workflows=WORKFLOWS, activities=activities, **worker):
        yield queue


async def start(env: WorkflowEnvironment, queue: str) -> WorkflowHandle[Any, SimulationReport]:
    """Start a simulation."""
    simulation_id = new_id()
    return await env.client.start_workflow(
        Simulation.run,
        SimulationInput(ORGANIZATION_ID, simulation_id),
        id=workflow_id(simulation_id),
        task_queue=queue,
    )


async def ended(steps: Steps, handle: WorkflowHandle[Any, Any]) -> Played:
    """Wait for the run's end."""
    try:
        return Played(steps, handle, result=await handle.result())
    except WorkflowFailureError as failure:
        return Played(steps, handle, error=failure.cause)


def _plays(
    *script: SimulationReport | Exception | None,
) -> Callable[[WorkflowEnvironment], Awaitable[Played]]:
    async def play(env: WorkflowEnvironment) -> Played:
        steps = Steps(script)
        async with serving(env, steps) as queue:
            return await ended(steps, await start(env, queue))

    return play


async def _cancelled(env: WorkflowEnvironment) -> Played:
    steps = Steps([running(300), None, SimulationReport("CANCELED", 300, EVENTS, finished=True)])
    async with serving(env, steps) as queue:
        handle = await start(env, queue)
        await steps.waiting.wait()
        await handle.cancel()
        return await ended(steps, handle)


SCENARIOS: dict[str, Callable[[WorkflowEnvironment], Awaitable[Played]]] = {
    "simulates_in_steps": _plays(running(400), running(800), CLEARING, DONE),
    "simulates_again_after_a_fault": _plays(ApplicationError("the database is away"), DONE),
    "simulates_and_fails": _plays(running(300), FAILED),
    "simulates_until_cancelled": _cancelled,
    "simulates_until_the_api_cancels": _plays(running(300), SimulationReport("CANCELED", 300, EVENTS, finished=True)),
}
"""Each path by its name."""


async def record(version: str) -> None:
    """Write `histories/<scenario>.<version>.json` for every scenario that has no such file yet."""
    async with time_skipping() as env:
        for name, play in SCENARIOS.items():
            path = HISTORIES / f"{name}.{version}.json"
            if not path.exists():
                played = await play(env)
                history = without_traces(json.loads((await played.handle.fetch_history()).to_json()))
                path.write_text(json.dumps(history, indent=1) + "\n")


if __name__ == "__main__":
    asyncio.run(record(version=sys.argv[1]))
