"""HoldEnds: one workflow per program carries the ends of all holds that its rules made. Contract: holders.md 6.8.

Card authorizations come a thousand a second, so no hold has a workflow, a timer or a signal of its own here: the
workflow sleeps until the next end that Postgres knows, and one activity ends what is due, two hundred a transaction.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from temporalio import workflow
from temporalio.common import RetryPolicy

with workflow.unsafe.imports_passed_through():
    from activities.holds import DueHoldActivities, DueHolds, DueHoldsReport, HoldActivities, HoldEndOrder
    from domain.clock import format_timestamp
    from domain.hold_ends import Order
    from workflows import queues
    from workflows.shield import through_cancel
    from workflows.signals import sent_id
    from workflows.summaries import summary

IDLE_LIMIT = timedelta(minutes=1)
_LONGEST_SLEEP = timedelta(days=30)
"""After that the workflow looks what the next end is, and sleeps on."""
_RETRIES = RetryPolicy(initial_interval=timedelta(milliseconds=200), maximum_interval=timedelta(seconds=5))


@dataclass(frozen=True)
class HoldEndsInput:
    """Whose holds."""

    organization_id: UUID
    program_id: UUID
    program_name: str


def workflow_id(program_id: UUID) -> str:
    """The id of the workflow that ends this program's holds."""
    return f"holds/{program_id}"


@workflow.defn(name="HoldEnds")
class HoldEnds:
    """Ends the due holds of one program, sleeps until the next, and is gone after an idle minute without any."""

    @workflow.init
    def __init__(self, request: HoldEndsInput) -> None:
        self._request = request
        self._woken = False
        self._orders: list[tuple[UUID, Order]] = []
        self._due: datetime | None = None
        self._ended = 0
        self._cancelled = False

    @workflow.signal(description="There may be a new hold with an earlier end.")
    def wake(self) -> None:
        """There may be a new hold with an earlier end."""
        self._woken = True

    @workflow.signal(description="End now what is due.")
    def run_now(self) -> None:
        """End now what is due."""
        self._woken = True

    @workflow.signal(description="Release what remains of one hold now; the argument is its id.")
    def release(self, *sent: Any) -> None:
        """Release what remains of one hold now."""
        self._take_order("release", sent, "RELEASE")

    @workflow.signal(description="Forfeit what remains of one hold now, for good; the argument is its id.")
    def forfeit(self, *sent: Any) -> None:
        """Forfeit what remains of one hold now, for good."""
        self._take_order("forfeit", sent, "FORFEIT")

    def _take_order(self, signal: str, sent: Sequence[Any], order: Order) -> None:
        hold_id = sent_id(signal, sent, self._orders)
        if hold_id is not None:
            self._orders.append((hold_id, order))

    @workflow.run
    async def run(self, request: HoldEndsInput) -> None:
        """End what is due, then sleep until the next end or wake; end after an idle minute."""
        while True:
            self._woken = False
            while self._orders:
                await through_cancel(self._carry_out(*self._orders.pop(0)), self._note_cancel)
            report = await through_cancel(self._end_due(), self._note_cancel)
            self._describe(report)
            if self._cancelled:
                raise asyncio.CancelledError
            # An order that came meanwhile is carried out first: the next run would know nothing of it.
            if not self._orders and workflow.info().is_continue_as_new_suggested():
                workflow.continue_as_new(request)
            if not report.more and not await self._wait_for_work(report.next_end):
                return

    async def _carry_out(self, hold_id: UUID, order: Order) -> None:
        await workflow.execute_activity_method(
            HoldActivities.end_hold,
            HoldEndOrder(self._request.organization_id, hold_id, order, program_id=self._request.program_id),
            task_queue=queues.LIFECYCLE,
            summary=f"{order.lower()} {hold_id}",
            start_to_close_timeout=timedelta(seconds=30),
            retry_policy=_RETRIES,
        )

    async def _end_due(self) -> DueHoldsReport:
        request = self._request
        return await workflow.execute_activity_method(
            DueHoldActivities.end_due,
            DueHolds(request.organization_id, request.program_id, self._due),
            task_queue=queues.LEDGER,
            summary=summary(f"end due holds of {request.program_name}"),
            start_to_close_timeout=timedelta(minutes=2),
            heartbeat_timeout=timedelta(seconds=15),
            retry_policy=_RETRIES,
        )

    async def _wait_for_work(self, next_end: datetime | None) -> bool:
        """Wait for a wake, an order or the next end; False after an idle minute."""
        self._due = None
        wait = IDLE_LIMIT if next_end is None else max(next_end - workflow.now(), timedelta(0))
        awaited = "next end" if next_end else "idle limit"
        # Runs that began before there was a longest sleep have a timer for all of it.
        sleeps_in_parts = wait > _LONGEST_SLEEP and workflow.patched("sleep in parts")
        if sleeps_in_parts:
            wait, awaited = _LONGEST_SLEEP, "look"
        try:
            await workflow.wait_condition(self._has_work, timeout=wait, timeout_summary=awaited)
        except TimeoutError:
            self._due = None if sleeps_in_parts else next_end
            return next_end is not None
        return True

    def _has_work(self) -> bool:
        return self._woken or bool(self._orders)

    def _note_cancel(self) -> None:
        self._cancelled = True

    def _describe(self, report: DueHoldsReport) -> None:
        """What an operator sees on the workflow's page."""
        self._ended += report.ended
        following = format_timestamp(report.next_end) if report.next_end else "none"
        workflow.set_current_details(
            f"**{self._request.program_name}**: {self._ended} holds ended in this run; next end: {following}. "
            "Signals: release and forfeit with a hold's id, run_now."
        )
