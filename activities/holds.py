"""Activities of holds with an end. Contract: holders.md 6.8; docs/upkeep.md."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.threads import ThreadDatabases
from db.session import Database, Transaction
from domain import faults, limits, timed_holds
from domain.errors import Refusal
from domain.hold_ends import HoldState, Order, end_due_holds, end_hold, find_hold
from domain.timed_holds import Reservation, Reserved


@dataclass(frozen=True)
class HoldRef:
    """Which hold."""

    organization_id: UUID
    hold_id: UUID


@dataclass(frozen=True)
class HoldEndOrder:
    """End this hold: because it is `due`, or by an operator's `order`; only if it is of `program_id`, where given."""

    organization_id: UUID
    hold_id: UUID
    order: Order | None
    due: datetime | None = None
    program_id: UUID | None = None


@dataclass(frozen=True)
class DueHolds:
    """Whose holds to end. `due` is the end for which somebody waited, None for what is due by the clock."""

    organization_id: UUID
    program_id: UUID
    due: datetime | None


@dataclass(frozen=True)
class DueHoldsReport:
    """What was done; `more` where time ran out first. `next_end` is the next end that isn't due, None for none."""

    ended: int
    more: bool
    next_end: datetime | None


class HoldActivities:
    """The steps of a hold's own workflow. They only wait for the database, so they share the worker's event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @activity.defn
    async def reserve_hold(self, reservation: Reservation) -> Reserved:
        """Make the hold. Repeating it changes nothing. Raises ApplicationError, not to be repeated, for a refusal."""

        async def work(tx: Transaction) -> Reserved:
            return await timed_holds.reserve(tx, reservation)

        try:
            return await self._database.repeat(
                reservation.organization_id,
                work,
                api_key_id=reservation.api_key_id,
                request_id=reservation.request_id,
            )
        except Refusal as refusal:
            raise as_application_error(refusal) from None

    @activity.defn
    async def find_hold(self, ref: HoldRef) -> HoldState | None:
        """How the hold stands; None where there is none."""
        return await self._database.repeat(ref.organization_id, lambda tx: find_hold(tx, ref.hold_id))

    @activity.defn
    async def end_hold(self, order: HoldEndOrder) -> HoldState | None:
        """Release or forfeit what remains of the hold, if it is still active; how it stands then.

        Raises ApplicationError, to be repeated, where it could not be ended: it stays with whoever carries it.
        """

        async def work(tx: Transaction) -> HoldState | None:
            return await end_hold(tx, order.hold_id, order=order.order, at=order.due, program_id=order.program_id)

        state = await self._database.repeat(order.organization_id, work)
        await faults.reach("hold_ends.committed", "WORKFLOW")
        if state is not None and state.status == "ACTIVE" and order.program_id is None:
            raise ApplicationError(f"hold {order.hold_id} cannot be ended: see the worker's log", type="hold_stuck")
        return state


class DueHoldActivities:
    """Ends of the holds that a program carries. They run in threads: a batch is computation, and heartbeats and
    workflow tasks must go on beside it.
    """

    def __init__(self, databases: ThreadDatabases) -> None:
        self._databases = databases

    # Without this a cancellation is thrown into the thread at any point, also between a write and its commit.
    @activity.defn(name="end_due_holds", no_thread_cancel_exception=True)
    def end_due(self, request: DueHolds) -> DueHoldsReport:
        """End the program's due holds, batch after batch, a transaction each, for ten seconds at most."""
        return self._databases.run(lambda database: self._end_due(database, request, activity.heartbeat))

    async def _end_due(self, database: Database, request: DueHolds, progress: Callable[[int], None]) -> DueHoldsReport:
        ends_at = time.monotonic() + limits.DRAIN_LIMIT_S
        ended = 0
        while True:
            batch = await end_due_holds(database, request.organization_id, request.program_id, at=request.due)
            ended += batch.ended
            progress(ended)
            if not batch.more or time.monotonic() > ends_at:
                return DueHoldsReport(ended, batch.more, batch.next_end)


def as_application_error(refusal: Refusal) -> ApplicationError:
    """The refusal as Temporal carries it: its code is the type, its message and problems are the details."""
    problems = [
        {
            "field": problem.field,
            "message": problem.message,
            "reason": problem.reason,
            "expected": problem.expected,
            "received": None if problem.received is None else str(problem.received),
        }
        for problem in refusal.problems
    ]
    return ApplicationError(refusal.message, problems, type=refusal.code, non_retryable=True)
