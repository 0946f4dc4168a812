"""Activities of two-step redemptions. Contract: redemptions.md 3; docs/two-step.md."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar
from uuid import UUID

import psycopg
from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.holds import as_application_error
from db.session import Database, Transaction
from domain import faults, two_step
from domain.errors import Refusal
from domain.two_step import (
    CancelOrder,
    ConfirmOrder,
    ExpireOrder,
    Order,
    RedemptionState,
    Reservation,
    Reserved,
    ReversalDone,
    ReverseOrder,
)

logger = logging.getLogger("scrip.temporal")

T = TypeVar("T")

_FAULTS = (
    psycopg.DataError,
    psycopg.IntegrityError,
    ArithmeticError,
    AssertionError,
    LookupError,
    TypeError,
    ValueError,
)
"""What a step raises that would raise it again: repeating it would only keep others from their turn."""


@dataclass(frozen=True)
class RedemptionRef:
    """Which redemption."""

    organization_id: UUID
    redemption_id: UUID


class RedemptionActivities:
    """The steps of a redemption's workflow. They only wait for the database, so they share the worker's event loop.

    Repeating a step changes nothing. For a refusal they raise an ApplicationError that is not to be repeated, and
    likewise, with the type `step_fault`, for what repeating can't mend.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @activity.defn(name="reserve_redemption")
    async def reserve(self, reservation: Reservation) -> Reserved:
        """Make the redemption."""
        return await self._do(reservation, lambda tx: two_step.reserve(tx, reservation))

    @activity.defn(name="confirm_redemption")
    async def confirm(self, order: ConfirmOrder) -> RedemptionState:
        """Take what is reserved; how the redemption stands then."""
        return await self._do(order, lambda tx: two_step.confirm(tx, order))

    @activity.defn(name="cancel_redemption")
    async def cancel(self, order: CancelOrder) -> RedemptionState:
        """Give back what is reserved; how the redemption stands then."""
        return await self._do(order, lambda tx: two_step.cancel(tx, order))

    @activity.defn(name="reverse_redemption")
    async def reverse(self, order: ReverseOrder) -> ReversalDone:
        """Give back what was taken, or a part of it."""
        return await self._do(order, lambda tx: two_step.reverse(tx, order))

    @activity.defn(name="expire_redemption")
    async def expire(self, order: ExpireOrder) -> RedemptionState | None:
        """Give back what is reserved if it is due, or by an operator's order; how the redemption stands then.

        Raises ApplicationError, to be repeated, where it isn't due by the clock although somebody waited for that.
        """
        state = await self._do(order, lambda tx: two_step.expire(tx, order))
        if state is not None and state.status == "PENDING":
            raise ApplicationError(f"redemption {order.redemption_id} is not due yet", type="not_due")
        return state

    @activity.defn(name="find_redemption")
    async def find(self, ref: RedemptionRef) -> RedemptionState | None:
        """How the redemption stands; None where there is none."""
        try:
            return await self._database.repeat(
                ref.organization_id, lambda tx: two_step.find_state(tx, ref.redemption_id)
            )
        except _FAULTS as fault:
            raise _step_fault(ref.redemption_id, fault) from fault

    async def _do(self, order: Reservation | Order, work: Callable[[Transaction], Awaitable[T]]) -> T:
        try:
            done = await self._database.repeat(
                order.organization_id, work, api_key_id=order.api_key_id, request_id=order.request_id
            )
        except Refusal as refusal:
            raise as_application_error(refusal) from None
        except _FAULTS as fault:
            raise _step_fault(order.redemption_id, fault) from fault
        await faults.reach("redemption.committed")
        return done


def _step_fault(redemption_id: UUID, fault: Exception) -> ApplicationError:
    logger.error("a step of redemption %s can never succeed", redemption_id, exc_info=fault)
    return ApplicationError(f"{type(fault).__name__}: {fault}"[:500], type="step_fault", non_retryable=True)
