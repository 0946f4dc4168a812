"""The paths of Upkeep, Reconcile and DriftCheck, each played through once, with canned activities.

The tests assert what happens on each path; `python -m tests.workflows.upkeep_scenarios VERSION` keeps the histories for
the replay test, as `tests.workflows.record` does for EventProcessing.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from unittest.mock import patch
from uuid import UUID

from temporalio import activity
from temporalio.client import WorkflowHandle
from temporalio.exceptions import ApplicationError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import UnsandboxedWorkflowRunner, Worker
from temporalio.workflow import Info

from activities.upkeep import ReconcileReport, UpkeepReport, UpkeepRequest
from domain.ids import new_id
from tests.workflows.hold_scenarios import suggest, without_traces
from tests.workflows.record import HISTORIES
from tests.workflows.scenarios import time_skipping
from worker import WORKFLOWS
from workflows import queues
from workflows.upkeep import DriftCheck, Reconcile, Upkeep, UpkeepInput

FIRST, SECOND = UUID("01980000-0000-7000-8000-00000000000a"), UUID("01980000-0000-7000-8000-00000000000b")

PART = UpkeepReport(FIRST, finished=False, organizations=1, failed=0, counts={"matured": 2, "expired": 1})
REST = UpkeepReport(SECOND, finished=True, organizations=1, failed=1, counts={"matured": 3})


@dataclass
class Steps:
    """Stands in for the activities: what each call answers, in turn, and what it was asked."""

    reports: list[UpkeepReport | Exception]
    asked: list[tuple[str, UUID | None, datetime | None]] = field(default_factory=list)

    @activity.defn(name="sweep")
    async def sweep(self, request: UpkeepRequest) -> UpkeepReport:
        """Answer what is said."""
        return self._answer("sweep", request)

    @activity.defn(name="maintain")
    async def maintain(self, request: UpkeepRequest) -> UpkeepReport:
        """Answer what is said."""
        return self._answer("maintain", request)

    @activity.defn(name="find_drift")
    async def find_drift(self, request: UpkeepRequest) -> UpkeepReport:
        """Answer what is said."""
        return self._answer("find_drift", request)

    @activity.defn(name="reconcile_temporal")
    async def reconcile(self) -> ReconcileReport:
        """Start a little."""
        self.asked.append(("reconcile", None, None))
        return ReconcileReport(1, 2, 3)

    def _answer(self, name: str, request: UpkeepRequest) -> UpkeepReport:
        self.asked.append((name, request.after, request.due))
        report = self.reports.pop(0)
        if isinstance(report, Exception):
            raise report
        return report


@dataclass(frozen=True)
class Played:
    """A run that has ended."""

    steps: Steps
    handle: WorkflowHandle[Any, Any]
    result: dict[str, int]
    started_at: datetime


async def _play(env: WorkflowEnvironment, workflow: Any, *reports: UpkeepReport | Exception, **worker: Any) -> Played:
    steps = Steps(list(reports))
    listed: list[Callable[..., Any]] = [steps.sweep, steps.maintain, steps.find_drift, steps.reconcile]
    async with (
        Worker(env.client, task_queue=queues.LEDGER, workflows=WORKFLOWS, activities=listed, **worker),
        Worker(env.client, task_queue=queues.LIFECYCLE, activities=listed),
    ):
        handle = await env.client.start_workflow(
            workflow, UpkeepInput(), id=f"upkeep-{new_id()}", task_queue=queues.LEDGER
        )
        result = await handle.result()
        first = env.client.get_workflow_handle(handle.id, run_id=handle.first_execution_run_id)
        return Played(steps, first, result, (await first.describe()).start_time)


async def _continued(env: WorkflowEnvironment) -> Played:
    suggested = iter([False, True])
    with patch.object(Info, "is_continue_as_new_suggested", lambda _: next(suggested, False)):
        return await _play(env, Upkeep.run, PART, REST, workflow_runner=UnsandboxedWorkflowRunner())


SCENARIOS: dict[str, Callable[[WorkflowEnvironment], Awaitable[Played]]] = {
    "keeps_up_through_all_organizations": lambda env: _play(env, Upkeep.run, PART, REST),
    "keeps_up_after_a_fault": lambda env: _play(env, Upkeep.run, ApplicationError("the database is away"), REST),
    "keeps_up_in_a_new_run": _continued,
    "keeps_temporal_reconciled": lambda env: _play(env, Reconcile.run, REST),
    "keeps_an_eye_on_drift": lambda env: _play(env, DriftCheck.run, REST),
}
"""Every path by its name."""


async def record(version: str) -> None:
    """Write `histories/<scenario>.<version>.json` for every scenario that has no such file yet."""
    async with time_skipping() as env:
        for name, play in SCENARIOS.items():
            path = HISTORIES / f"{name}.{version}.json"
            if not path.exists():
                history = without_traces(json.loads((await (await play(env)).handle.fetch_history()).to_json()))
                if any("workflowExecutionContinuedAsNewEventAttributes" in event for event in history["events"]):
                    suggest(history)
                path.write_text(json.dumps(history, indent=1) + "\n")


if __name__ == "__main__":
    asyncio.run(record(version=sys.argv[1]))
