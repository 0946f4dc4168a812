"""The paths of Broadcasts, each played through once, with canned activities.

The tests assert what happens on each path; `python -m tests.workflows.broadcast_scenarios VERSION` keeps the histories
for the replay test, as `tests.workflows.record` does for EventProcessing.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch
from uuid import UUID

from temporalio import activity
from temporalio.client import WorkflowExecutionStatus, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import UnsandboxedWorkflowRunner, Worker
from temporalio.workflow import Info

from activities.broadcasts import CancelOrder, FanOutProgress, FanOutReport, FanOutRequest
from domain.ids import new_id
from tests.workflows.hold_scenarios import suggest, without_traces
from tests.workflows.record import HISTORIES
from tests.workflows.scenarios import time_skipping
from worker import WORKFLOWS
from workflows import queues
from workflows.broadcasts import Broadcasts, BroadcastsInput, workflow_id

ORGANIZATION_ID = UUID("01980000-0000-7000-8000-000000000001")
AUTOMATION_ID = UUID("01980000-0000-7000-8000-000000000002")

NOTHING = FanOutReport(events=0, finished=0)
UNDER_WAY = FanOutProgress(AUTOMATION_ID, "digest", 2_000, 5_000)
SOME = FanOutReport(events=3_000, finished=1)
MORE = FanOutReport(events=2_000, finished=0, under_way=UNDER_WAY, more=True)
FULL = FanOutReport(events=0, finished=0, under_way=UNDER_WAY, more=True, is_held_back=True)
FULL_AFTER_SOME = FanOutReport(events=500, finished=0, under_way=UNDER_WAY, more=True, is_held_back=True)

Act = Callable[[WorkflowHandle[Any, Any]], Awaitable[None]]


async def wake(handle: WorkflowHandle[Any, Any]) -> None:
    """Say that there may be a new broadcast."""
    await handle.signal(Broadcasts.wake)


async def cancel_one(handle: WorkflowHandle[Any, Any]) -> None:
    """Cancel a broadcast, as an operator does."""
    await handle.signal("cancel", AUTOMATION_ID)


async def cancel_the_workflow(handle: WorkflowHandle[Any, Any]) -> None:
    """Temporal's own cancel."""
    await handle.cancel()


@dataclass
class FanOuts:
    """Stands in for the activities: what each step of work answers, in turn, and what was asked of it.

    In place of a report stand an error to raise, or something that is done while the step is under way: it answers
    MORE as soon as something has been cancelled, or SOME where nothing is to be.
    """

    env: WorkflowEnvironment
    script: list[FanOutReport | Exception | Act]
    program_id: UUID = field(default_factory=new_id)
    steps: list[str] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    @activity.defn(name="fan_out")
    async def fan_out(self, request: FanOutRequest) -> FanOutReport:
        """Do what is said next; after the last there is nothing to do."""
        self._note("fan out")
        step = self.script.pop(0) if self.script else NOTHING
        if isinstance(step, Exception):
            raise step
        if isinstance(step, FanOutReport):
            return step
        await step(self.handle)
        if step is wake:
            return SOME
        await self.cancelled.wait()
        return MORE

    @activity.defn(name="cancel_automation")
    async def cancel_automation(self, order: CancelOrder) -> bool:
        """Note which."""
        self._note("cancel the one under way" if order.automation_id is None else "cancel one")
        assert order.automation_id in (None, AUTOMATION_ID)
        self.cancelled.set()
        return True

    def _note(self, name: str) -> None:
        self.steps.append(name)

    @property
    def handle(self) -> WorkflowHandle[Any, Any]:
        """The program's workflow."""
        return self.env.client.get_workflow_handle(workflow_id(self.program_id))

    async def wake(self) -> WorkflowHandle[Any, Any]:
        """Wake the program's Broadcasts as the gateway does."""
        return await self.env.client.start_workflow(
            Broadcasts.run,
            BroadcastsInput(ORGANIZATION_ID, self.program_id, "Loyalty"),
            id=workflow_id(self.program_id),
            task_queue=queues.LIFECYCLE,
            start_signal="wake",
        )


@dataclass(frozen=True)
class Played:
    """A run that has ended; `handle` is its first."""

    fan_outs: FanOuts
    handle: WorkflowHandle[Any, Any]
    status: WorkflowExecutionStatus | None


async def _play(
    env: WorkflowEnvironment, *script: FanOutReport | Exception | Act, later: Act | None = None, **worker: Any
) -> Played:
    """Play the script; `later` is done half a minute after the start."""
    fan_outs = FanOuts(env, list(script))
    steps: list[Callable[..., Any]] = [fan_outs.fan_out, fan_outs.cancel_automation]
    async with (
        Worker(env.client, task_queue=queues.LIFECYCLE, workflows=WORKFLOWS, activities=steps, **worker),
        Worker(env.client, task_queue=queues.LEDGER, activities=steps),
    ):
        started = await fan_outs.wake()
        if later is not None:
            await env.sleep(30)
            await later(fan_outs.handle)
        with contextlib.suppress(WorkflowFailureError):
            await started.result()
        first = env.client.get_workflow_handle(started.id, run_id=started.result_run_id)
        return Played(fan_outs, first, (await first.describe()).status)


async def _continued(env: WorkflowEnvironment) -> Played:
    """The server suggests a new run after the first step; what is kept is the first run's history."""
    suggested = iter([True])
    with patch.object(Info, "is_continue_as_new_suggested", lambda _: next(suggested, False)):
        return await _play(env, MORE, SOME, workflow_runner=UnsandboxedWorkflowRunner())


SCENARIOS: dict[str, Callable[[WorkflowEnvironment], Awaitable[Played]]] = {
    "broadcasts_and_is_gone_after_an_idle_minute": lambda env: _play(env, SOME),
    "broadcasts_on_at_once_while_there_is_more": lambda env: _play(env, MORE, SOME),
    "broadcasts_again_when_woken": lambda env: _play(env, SOME, SOME, later=wake),
    "broadcasts_again_when_woken_at_work": lambda env: _play(env, wake, SOME),
    "broadcasts_again_after_a_fault": lambda env: _play(env, ApplicationError("the database is away"), SOME),
    "broadcasts_as_the_queue_has_room": lambda env: _play(env, FULL_AFTER_SOME, FULL, FULL, FULL_AFTER_SOME, SOME),
    "broadcasts_until_one_is_cancelled": lambda env: _play(env, cancel_one, SOME),
    "broadcasts_nothing_and_cancels_one": lambda env: _play(env, NOTHING, later=cancel_one),
    "broadcasts_until_cancelled_at_work": lambda env: _play(env, cancel_the_workflow),
    "broadcasts_until_cancelled_at_a_full_queue": lambda env: _play(env, *[FULL] * 100, later=cancel_the_workflow),
    "broadcasts_until_cancelled_at_rest": lambda env: _play(env, SOME, later=cancel_the_workflow),
    "broadcasts_on_in_a_new_run": _continued,
}
"""Every path by its name."""


async def record(version: str) -> None:
    """Write `histories/<scenario>.<version>.json` for every scenario that has no such file yet."""
    async with time_skipping() as env:
        for name, play in SCENARIOS.items():
            path = HISTORIES / f"{name}.{version}.json"
            if path.exists():
                continue
            played = await play(env)
            history = without_traces(json.loads((await played.handle.fetch_history()).to_json()))
            if played.status == WorkflowExecutionStatus.CONTINUED_AS_NEW:
                suggest(history)
            path.write_text(json.dumps(history, indent=1) + "\n")


if __name__ == "__main__":
    asyncio.run(record(version=sys.argv[1]))
