"""EventProcessing: one workflow per program, awake while there is something to do. Contract: rules-and-events.md 7.

A wake says "there may be events". The workflow answers with the draining activity, which works through the queue batch
by batch, so that Temporal's cost is per drain and not per event. It sleeps until the next delayed event and ends after
an idle minute; the next wake starts it anew (signal-with-start).
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from temporalio import workflow
from temporalio.common import RetryPolicy

with workflow.unsafe.imports_passed_through():
    from activities.events import DrainReport, DrainRequest, EventActivities

IDLE_LIMIT = timedelta(minutes=1)


@dataclass(frozen=True)
class EventProcessingInput:
    """Whose events. `lane` is 0 until a program is split over several lanes."""

    organization_id: UUID
    program_id: UUID
    program_name: str
    lane: int = 0


def workflow_id(program_id: UUID) -> str:
    """The id of the workflow that processes this program's events."""
    return f"events/{program_id}"


@workflow.defn(name="EventProcessing")
class EventProcessing:
    """Drains the events of one program whenever it is woken."""

    @workflow.init
    def __init__(self, request: EventProcessingInput) -> None:
        self._request = request
        self._woken = True
        self._processed = 0

    @workflow.signal(description="There may be events to process.")
    def wake(self) -> None:
        """There may be events to process."""
        self._woken = True

    @workflow.run
    async def run(self, request: EventProcessingInput) -> None:
        """Drain, then sleep until the next wake or due event; end after an idle minute."""
        while True:
            self._woken = False
            report = await self._drain()
            self._describe(report)
            if workflow.info().is_continue_as_new_suggested():
                workflow.continue_as_new(request)
            if not await self._wait_for_work(report.next_due_at):
                return

    async def _drain(self) -> DrainReport:
        request = self._request
        return await workflow.execute_activity_method(
            EventActivities.drain_events,
            DrainRequest(request.organization_id, request.program_id),
            summary=f"drain the queue of {request.program_name}",
            start_to_close_timeout=timedelta(minutes=2),
            heartbeat_timeout=timedelta(seconds=10),
            retry_policy=RetryPolicy(
                initial_interval=timedelta(milliseconds=200),
                maximum_interval=timedelta(seconds=5),
            ),
        )

    async def _wait_for_work(self, next_due_at: datetime | None) -> bool:
        """Wait for a wake or for the next due event; False after an idle minute."""
        if self._woken:
            return True
        wait = IDLE_LIMIT if next_due_at is None else max(next_due_at - workflow.now(), timedelta(0))
        if next_due_at is not None and wait == timedelta(0):
            return True
        try:
            await workflow.wait_condition(
                lambda: self._woken, timeout=wait, timeout_summary="next due event" if next_due_at else "idle limit"
            )
        except TimeoutError:
            return next_due_at is not None
        return True

    def _describe(self, report: DrainReport) -> None:
        """What an operator sees on the workflow's page."""
        self._processed += report.events
        due = report.next_due_at.isoformat(timespec="seconds") if report.next_due_at else "none"
        workflow.set_current_details(
            f"**{self._request.program_name}**: {self._processed} events processed in this run; "
            f"last drain: {report.completed} completed, {report.failed} failed; next delayed event: {due}"
        )
