"""Broadcasts: one workflow per program carries all its fan-outs. Contract: tiers-and-automations.md B5, B7.

A rule may broadcast on every event, so no broadcast has a workflow of its own, and no participant costs one anything:
an activity works through the program's fan-outs, five hundred participants a transaction, for ten seconds at a time.
How far each has come is in Postgres. docs/automations.md.
"""

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from temporalio import workflow
from temporalio.common import RetryPolicy

with workflow.unsafe.imports_passed_through():
    from activities.broadcasts import (
        AutomationActivities,
        CancelOrder,
        FanOutActivities,
        FanOutReport,
        FanOutRequest,
    )
    from workflows import queues
    from workflows.shield import through_cancel
    from workflows.signals import sent_id
    from workflows.summaries import summary

IDLE_LIMIT = timedelta(minutes=1)
# How long to leave a queue alone that is full; longer, up to the second, while it doesn't get shorter.
FIRST_PAUSE = timedelta(milliseconds=500)
LONGEST_PAUSE = timedelta(seconds=8)
_RETRIES = RetryPolicy(initial_interval=timedelta(milliseconds=200), maximum_interval=timedelta(seconds=5))


@dataclass(frozen=True)
class BroadcastsInput:
    """Whose fan-outs."""

    organization_id: UUID
    program_id: UUID
    program_name: str


def workflow_id(program_id: UUID) -> str:
    """The id of the workflow that carries this program's fan-outs."""
    return f"broadcasts/{program_id}"


@workflow.defn(name="Broadcasts")
class Broadcasts:
    """Works through the fan-outs of one program whenever it is woken, and is gone after an idle minute."""

    @workflow.init
    def __init__(self, request: BroadcastsInput) -> None:
        self._request = request
        self._woken = False
        self._cancelled = False
        self._orders: list[UUID | None] = []
        self._pause = FIRST_PAUSE
        self._events = 0
        self._finished = 0

    @workflow.signal(description="There may be a new broadcast.")
    def wake(self) -> None:
        """There may be a new broadcast."""
        self._woken = True

    @workflow.signal(description="Cancel one broadcast for good, at its next batch; its automation's id.")
    def cancel(self, *sent: Any) -> None:
        """Cancel one broadcast for good, at its next batch."""
        automation_id = sent_id("cancel", sent, self._orders)
        if automation_id is not None:
            self._orders.append(automation_id)

    @workflow.run
    async def run(self, request: BroadcastsInput) -> None:
        """Work on what is there, then wait for a wake; end after an idle minute.

        Cancelling the workflow cancels the fan-out under way; others go on in the run that is started for them.
        """
        while True:
            self._woken = False
            report = await through_cancel(self._work(), self._note_cancel)
            if self._cancelled:
                raise asyncio.CancelledError
            # An order that came meanwhile is carried out first: the next run would know nothing of it.
            if not self._orders and workflow.info().is_continue_as_new_suggested():
                workflow.continue_as_new(request)
            if not report.more and not await self._wait_for_work():
                return

    async def _work(self) -> FanOutReport:
        """One step of work. What is ordered meanwhile is carried out beside it, so that its next batch sees it."""
        step = asyncio.create_task(self._fan_out())
        while not step.done():
            await self._obey()
            await workflow.wait_condition(lambda: step.done() or bool(self._orders))
        report = step.result()
        self._describe(report)
        if report.is_held_back:
            await self._leave_alone(report)
        await self._obey()
        return report

    async def _obey(self) -> None:
        while self._orders:
            automation_id = self._orders.pop(0)
            await workflow.execute_activity_method(
                AutomationActivities.cancel_automation,
                CancelOrder(self._request.organization_id, self._request.program_id, automation_id),
                task_queue=queues.LIFECYCLE,
                summary=f"cancel {automation_id or 'the fan-out under way'}",
                start_to_close_timeout=timedelta(seconds=30),
                retry_policy=_RETRIES,
            )

    async def _fan_out(self) -> FanOutReport:
        request = self._request
        return await workflow.execute_activity_method(
            FanOutActivities.fan_out,
            FanOutRequest(request.organization_id, request.program_id),
            task_queue=queues.LEDGER,
            summary=summary(f"broadcasts of {request.program_name}"),
            start_to_close_timeout=timedelta(minutes=2),
            heartbeat_timeout=timedelta(seconds=30),
            retry_policy=_RETRIES,
        )

    async def _leave_alone(self, report: FanOutReport) -> None:
        """Let the program's events be processed for a moment; an order cuts it short."""
        self._pause = FIRST_PAUSE if report.events else min(self._pause * 2, LONGEST_PAUSE)
        try:
            await workflow.wait_condition(
                lambda: bool(self._orders), timeout=self._pause, timeout_summary="the queue is full"
            )
        except TimeoutError:
            return

    async def _wait_for_work(self) -> bool:
        """Wait for a wake or an order; False after an idle minute."""
        try:
            await workflow.wait_condition(
                lambda: self._woken or bool(self._orders), timeout=IDLE_LIMIT, timeout_summary="idle limit"
            )
        except TimeoutError:
            return False
        return True

    def _note_cancel(self) -> None:
        """Temporal's cancel: the fan-out under way, which its activity then sees at its next batch."""
        self._cancelled = True
        self._orders.append(None)

    def _describe(self, report: FanOutReport) -> None:
        """What an operator sees on the workflow's page."""
        self._events += report.events
        self._finished += report.finished
        under_way = "none"
        if (progress := report.under_way) is not None:
            waiting = " (waiting for the queue)" if report.is_held_back else ""
            under_way = f"{progress.name}: {progress.processed:,} of {progress.total:,} participants{waiting}"
        workflow.set_current_details(
            f"**{self._request.program_name}**: {self._events:,} events made and {self._finished} broadcasts ended in "
            f"this run; under way: {under_way}. Signal cancel with an automation's id; Temporal's Cancel cancels the "
            "one under way."
        )
