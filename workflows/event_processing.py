"""EventProcessing: one workflow per program, awake while there is something to do. Contract: rules-and-events.md 7.

A wake says "there may be events". The workflow answers with the draining activity, which works through the queue batch
by batch, so that Temporal's cost is per drain and not per event. It sleeps until the next delayed event and ends after
an idle minute; the next wake starts it anew (signal-with-start).
"""

from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from temporalio import workflow
from temporalio.common import RetryPolicy

with workflow.unsafe.imports_passed_through():
    from activities.events import DrainReport, DrainRequest, EventActivities, PauseRequest
    from workflows.summaries import summary

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
        self._pause: bool | None = None
        self._processed = 0

    @workflow.signal(description="There may be events to process.")
    def wake(self) -> None:
        """There may be events to process."""
        self._woken = True

    @workflow.signal(description="Stop processing this program's events; they are accepted all the same.")
    def pause(self) -> None:
        """Stop processing this program's events."""
        self._pause = True

    @workflow.signal(description="Process this program's events again.")
    def resume(self) -> None:
        """Process this program's events again."""
        self._pause = False

    @workflow.run
    async def run(self, request: EventProcessingInput) -> None:
        """Drain, then sleep until the next wake or due event; end after an idle minute."""
        while True:
            self._woken = False
            await self._obey()
            report = await self._drain()
            self._describe(report)
            # An order that came during the drain is carried out first: the next run would know nothing of it.
            if self._pause is None and workflow.info().is_continue_as_new_suggested():
                workflow.continue_as_new(request)
            if not await self._wait_for_work(report):
                return

    async def _obey(self) -> None:
        """Carry out what an operator asked for; it is kept in the database, for every worker to see."""
        while self._pause is not None:
            paused, self._pause = self._pause, None
            await workflow.execute_activity_method(
                EventActivities.set_processing_paused,
                PauseRequest(self._request.organization_id, self._request.program_id, paused),
                summary="pause" if paused else "resume",
                start_to_close_timeout=timedelta(seconds=30),
                retry_policy=RetryPolicy(maximum_interval=timedelta(seconds=5)),
            )

    async def _drain(self) -> DrainReport:
        request = self._request
        return await workflow.execute_activity_method(
            EventActivities.drain_events,
            DrainRequest(request.organization_id, request.program_id),
            summary=summary(f"drain the queue of {request.program_name}"),
            start_to_close_timeout=timedelta(minutes=2),
            heartbeat_timeout=timedelta(seconds=10),
            retry_policy=RetryPolicy(
                initial_interval=timedelta(milliseconds=200),
                maximum_interval=timedelta(seconds=5),
            ),
        )

    async def _wait_for_work(self, report: DrainReport) -> bool:
        """Wait for a wake or for the next due event; False after an idle minute.

        A paused program's workflow stays, so that there is something to send `resume` to.
        """
        if self._has_work():
            return True
        if report.is_paused:
            await workflow.wait_condition(self._has_work)
            return True
        next_due_at = report.next_due_at
        wait = IDLE_LIMIT if next_due_at is None else max(next_due_at - workflow.now(), timedelta(0))
        if next_due_at is not None and wait == timedelta(0):
            return True
        try:
            await workflow.wait_condition(
                self._has_work, timeout=wait, timeout_summary="next due event" if next_due_at else "idle limit"
            )
        except TimeoutError:
            return next_due_at is not None
        return True

    def _has_work(self) -> bool:
        return self._woken or self._pause is not None

    def _describe(self, report: DrainReport) -> None:
        """What an operator sees on the workflow's page."""
        self._processed += report.events
        due = report.next_due_at.isoformat(timespec="seconds") if report.next_due_at else "none"
        workflow.set_current_details(
            f"**{self._request.program_name}**: {self._processed} events processed in this run; "
            f"last drain: {report.completed} completed, {report.failed} failed; next delayed event: {due}"
        )
