"""Hold: a hold that an API call made with an end, as a durable workflow of its own. Contract: holders.md 6.8.

The reservation is an update: it comes together with the start, and each call is judged for itself. Then the workflow
waits for the hold's end or for an operator, and ends what remains. It never decides whether there is something to end:
the hold's row does, so a hold that was released meanwhile by the API costs one look.
"""

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal
from uuid import UUID

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError

with workflow.unsafe.imports_passed_through():
    from activities.holds import HoldActivities, HoldEndOrder, HoldRef
    from domain.balances import OperationResult
    from domain.clock import format_timestamp
    from domain.hold_ends import HoldState, Order
    from domain.timed_holds import Reservation
    from workflows.search_attributes import ORGANIZATION, STATUS
    from workflows.shield import through_cancel

Step = Literal["END", "LOOK", "RELEASE", "FORFEIT"]

_STEP_TIMEOUT = timedelta(seconds=30)
_RETRIES = RetryPolicy(initial_interval=timedelta(milliseconds=100), maximum_interval=timedelta(seconds=30))
_RESERVE_LIMIT = timedelta(minutes=1)
"""How long the reservation is repeated while the database is away. It refuses itself long before."""
_LONGEST_SLEEP = timedelta(days=30)
"""After that the workflow looks how its hold stands, and sleeps on."""


@dataclass(frozen=True)
class HoldInput:
    """Which hold. Everything else is in the database."""

    organization_id: UUID
    hold_id: UUID


def workflow_id(hold_id: UUID) -> str:
    """The id of the workflow that carries this hold."""
    return f"hold/{hold_id}"


@workflow.defn(name="Hold")
class Hold:
    """Makes a hold, waits for its end, and releases or forfeits what remains."""

    @workflow.init
    def __init__(self, request: HoldInput) -> None:
        self._request = request
        self._state: HoldState | None = None
        self._refused = False
        self._order: Order | None = None
        self._look = False
        self._cancelled = False

    @workflow.update
    async def reserve(self, reservation: Reservation) -> OperationResult:
        """Make the hold; what it did. Raises ApplicationError whose type is a refusal's code."""
        try:
            reserved = await workflow.execute_activity_method(
                HoldActivities.reserve_hold,
                reservation,
                summary="reserve",
                start_to_close_timeout=_STEP_TIMEOUT,
                schedule_to_close_timeout=_RESERVE_LIMIT,
                retry_policy=_RETRIES,
            )
        except ActivityError as error:
            if isinstance(error.cause, ApplicationError) and error.cause.non_retryable:
                # One that was too late may have been the second attempt: the first one's commit has to be looked for.
                was_late = error.cause.type == "service_unavailable"
                self._refused = not (was_late and workflow.patched("look after a late refusal"))
                raise error.cause from None
            # Whether it was made is looked up by `run`.
            raise ApplicationError("the database is out of reach", type="service_unavailable") from error
        self._state = reserved.hold
        self._describe()
        return reserved.result

    @workflow.signal(description="Release what remains of the hold now.")
    def release(self) -> None:
        """Release what remains of the hold now."""
        self._order = "RELEASE"

    @workflow.signal(description="Forfeit what remains of the hold now, for good.")
    def forfeit(self) -> None:
        """Forfeit what remains of the hold now, for good."""
        self._order = "FORFEIT"

    @workflow.signal(description="The hold may have been ended by the API: look.")
    def look(self) -> None:
        """The hold may have been ended by somebody else: look."""
        self._look = True

    @workflow.run
    async def run(self, request: HoldInput) -> str:
        """Carry the hold to its end; its status then, or NONE where no reservation was made.

        A cancel releases what remains, then the run ends as cancelled.
        """
        await through_cancel(workflow.wait_condition(workflow.all_handlers_finished), self._note_cancel)
        if self._state is None and not self._refused:
            # Started anew for a hold that was made before, or its reservation never arrived.
            self._state = await through_cancel(self._find(), self._note_cancel)
        while self._state is not None and self._state.status == "ACTIVE":
            self._describe()
            step = await self._wait(self._state)
            self._state = await through_cancel(self._take(step), self._note_cancel)
        await through_cancel(workflow.wait_condition(workflow.all_handlers_finished), self._note_cancel)
        self._describe()
        if self._cancelled:
            raise asyncio.CancelledError
        return "NONE" if self._state is None else self._state.status

    async def _wait(self, state: HoldState) -> Step:
        """Wait for an order, for the hold's end, or for a reason to look; which of them came."""
        if self._cancelled:
            return "RELEASE"
        assert state.expires_at is not None, "only holds with an end have a workflow"
        left = max(state.expires_at - workflow.now(), timedelta(0))
        # Runs that began before there was a longest sleep have a timer for all of it.
        sleeps_in_parts = left > _LONGEST_SLEEP and workflow.patched("sleep in parts")
        wait, awaited = (_LONGEST_SLEEP, "look") if sleeps_in_parts else (left, "end of the hold")
        try:
            await workflow.wait_condition(self._has_work, timeout=wait, timeout_summary=awaited)
        except TimeoutError:
            return "LOOK" if sleeps_in_parts else "END"
        except asyncio.CancelledError:
            self._cancelled = True
            return "RELEASE"
        if self._order is not None:
            return self._order
        if not self._look and workflow.all_handlers_finished():
            workflow.continue_as_new(self._request)
        return "LOOK"

    def _has_work(self) -> bool:
        return self._order is not None or self._look or workflow.info().is_continue_as_new_suggested()

    async def _take(self, step: Step) -> HoldState | None:
        """Take a step; how the hold stands then."""
        if step == "LOOK":
            self._look = False
            return await self._find()
        assert self._state is not None
        order, due = (None, self._state.expires_at) if step == "END" else (step, None)
        return await workflow.execute_activity_method(
            HoldActivities.end_hold,
            HoldEndOrder(self._request.organization_id, self._request.hold_id, order, due),
            summary=step.lower(),
            start_to_close_timeout=_STEP_TIMEOUT,
            retry_policy=_RETRIES,
        )

    async def _find(self) -> HoldState | None:
        return await workflow.execute_activity_method(
            HoldActivities.find_hold,
            HoldRef(self._request.organization_id, self._request.hold_id),
            summary="look",
            start_to_close_timeout=_STEP_TIMEOUT,
            retry_policy=_RETRIES,
        )

    def _note_cancel(self) -> None:
        self._cancelled = True

    def _describe(self) -> None:
        """What an operator sees on the workflow's page."""
        if self._state is None:
            workflow.set_current_details("No reservation was made.")
            return
        end = format_timestamp(self._state.expires_at) if self._state.expires_at else "none"
        workflow.set_current_details(
            f"Hold **{self._state.status}**, end: {end}. Signals: release, forfeit. Cancelling releases what remains."
        )
        shown = workflow.info().typed_search_attributes
        # A server without our search attributes refuses them, and the start has found that out.
        if shown.get(ORGANIZATION) is not None and shown.get(STATUS) != self._state.status:
            workflow.upsert_search_attributes([STATUS.value_set(self._state.status)])
