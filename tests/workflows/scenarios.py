"""The paths of EventProcessing, each played through once, with canned reports in place of the draining activity.

The tests assert what happens on each path; `python -m tests.workflows.record` keeps the histories for the replay test.
"""

import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from temporalio import activity
from temporalio.client import WorkflowHandle
from temporalio.common import WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from activities.events import DrainReport, DrainRequest, PauseRequest
from domain.ids import new_id
from worker import WORKFLOWS
from workflows.converter import DATA_CONVERTER
from workflows.event_processing import EventProcessing, EventProcessingInput, workflow_id

TEST_SERVER = Path(sys.executable).parent / "temporal-test-server"
ORGANIZATION_ID = UUID("01980000-0000-7000-8000-000000000001")

NOTHING = DrainReport(events=0, completed=0, failed=0, next_due_at=None)
SOME = DrainReport(events=3, completed=2, failed=1, next_due_at=None)


@dataclass
class Drains:
    """Stands in for the draining activity: what each drain does, in turn; after the last one there is nothing to do.

    A drain is a list of steps: a signal to send while it is at work, a timedelta (the next event falls due so much
    later than now), an exception to raise, or the report to answer with.
    """

    env: WorkflowEnvironment
    script: Sequence[Sequence[str | timedelta | Exception | DrainReport]]
    at: list[datetime] = field(default_factory=list)
    pauses: list[tuple[int, bool]] = field(default_factory=list)

    @activity.defn(name="drain_events")
    async def drain_events(self, request: DrainRequest) -> DrainReport:
        """Do what the script says next."""
        number = len(self.at)
        self.at.append(await self.env.get_current_time())
        report = NOTHING
        for step in self.script[number] if number < len(self.script) else ():
            if isinstance(step, Exception):
                raise step
            if isinstance(step, str):
                await self.env.client.get_workflow_handle(workflow_id(request.program_id)).signal(step)
            elif isinstance(step, timedelta):
                report = DrainReport(1, 0, 0, self.at[-1] + step)
            else:
                report = step
        return report

    @activity.defn(name="set_processing_paused")
    async def set_processing_paused(self, request: PauseRequest) -> None:
        """Note the order, and after how many drains it came."""
        self.pauses.append((len(self.at), request.paused))

    def seconds(self) -> list[int]:
        """When the drains began, in whole seconds after the first."""
        return [round((at - self.at[0]).total_seconds()) for at in self.at]


@dataclass(frozen=True)
class Run:
    """A finished run."""

    drains: Drains
    handle: WorkflowHandle[Any, Any]
    lasted: timedelta


@asynccontextmanager
async def time_skipping() -> AsyncIterator[WorkflowEnvironment]:
    """A Temporal server whose clock runs ahead to the next timer."""
    env = await WorkflowEnvironment.start_time_skipping(
        data_converter=DATA_CONVERTER, test_server_existing_path=str(TEST_SERVER), identity="test"
    )
    async with env:
        yield env


@asynccontextmanager
async def serving(
    env: WorkflowEnvironment, script: Sequence[Sequence[str | timedelta | Exception | DrainReport]], **worker: Any
) -> AsyncIterator[tuple[Drains, Callable[[UUID], Any]]]:
    """A worker with canned drains, and how to wake the workflow of a program on it."""
    drains = Drains(env, script)
    queue = f"ledger-{new_id().hex}"

    async def wake(program_id: UUID) -> WorkflowHandle[Any, Any]:
        return await env.client.start_workflow(
            EventProcessing.run,
            EventProcessingInput(ORGANIZATION_ID, program_id, "Loyalty"),
            id=workflow_id(program_id),
            task_queue=queue,
            start_signal="wake",
            id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
        )

    async with Worker(
        env.client,
        task_queue=queue,
        workflows=WORKFLOWS,
        activities=[drains.drain_events, drains.set_processing_paused],
        **worker,
    ):
        yield drains, wake


async def play(env: WorkflowEnvironment, name: str) -> Run:
    """Play the scenario to the end of the workflow."""
    async with serving(env, SCENARIOS[name]) as (drains, wake):
        handle = await wake(new_id())
        await handle.result()
        description = await handle.describe()
        assert description.close_time is not None
        return Run(drains, handle, description.close_time - description.start_time)


SCENARIOS: dict[str, Sequence[Sequence[str | timedelta | Exception | DrainReport]]] = {
    "drains_once_and_ends_after_an_idle_minute": [[SOME]],
    "drains_again_when_woken_during_a_drain": [["wake", "wake", SOME], [SOME]],
    "drains_again_when_the_next_event_falls_due": [[timedelta(seconds=30)], [timedelta(hours=36)], [SOME]],
    "drains_again_at_once_when_more_is_due": [[timedelta(0)], [timedelta(seconds=-5)], [SOME]],
    "repeats_a_drain_that_failed": [[ApplicationError("the database is away")], [ApplicationError("still")], [SOME]],
    "carries_out_pause_and_resume": [["pause", SOME], ["resume", SOME]],
    "carries_out_the_last_of_several_orders": [["pause", "resume", "pause", "wake", SOME]],
}
"""What the drains of each path do, by the path's name."""
