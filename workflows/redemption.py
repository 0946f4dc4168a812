"""Redemption: a two-step redemption as a durable workflow. Contract: redemptions.md 3; docs/two-step.md.

It is reserved by an update that comes together with the start, waits to be confirmed, canceled or timed out, and ends.
Whatever comes later (a reversal, a confirm after the workflow was lost) comes to the same id: it starts a short run
that does the one thing. The workflow never decides how the redemption stands: its row does, read under its
participant's lock.

Steps for which a caller waits are local activities: they are part of the workflow task that brought the order, which
saves Temporal a task and another workflow task, and they are short and bounded. What operators and time order has to be
repeated until it is done, and is an activity.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError, FailureError

with workflow.unsafe.imports_passed_through():
    from activities.redemptions import RedemptionActivities, RedemptionRef
    from domain.clock import format_timestamp
    from domain.errors import STATUS_BY_CODE
    from domain.money import format_plain
    from domain.two_step import (
        CancelOrder,
        ConfirmOrder,
        ExpireOrder,
        RedemptionState,
        Reservation,
        Reserved,
        ReversalDone,
        ReverseOrder,
    )
    from workflows.search_attributes import ORGANIZATION, STATUS
    from workflows.shield import through_cancel

_STEP_TIMEOUT = timedelta(seconds=30)
_RETRIES = RetryPolicy(initial_interval=timedelta(milliseconds=100), maximum_interval=timedelta(seconds=30))
_ANSWER_RETRIES = RetryPolicy(
    initial_interval=timedelta(milliseconds=100), maximum_interval=timedelta(seconds=1), maximum_attempts=5
)
"""How often a caller's order is tried while the database is away. In attempts, as local activities count no time."""
_ORDERS = 100
"""How many orders of operators may wait. More are dropped: they can only repeat what the first ones decide."""

BY_AN_OPERATOR = "canceled by an operator"
"""The reason of a cancel that came without one."""


@dataclass(frozen=True)
class RedemptionInput:
    """Which redemption. Everything else is in the database."""

    organization_id: UUID
    redemption_id: UUID


@dataclass(frozen=True)
class Part:
    """What an operator wants to be taken of what is reserved; nothing of both: all of it."""

    amount: str | None = None
    quantity: int | None = None


def workflow_id(redemption_id: UUID) -> str:
    """The id of the workflow that carries this redemption."""
    return f"redemption/{redemption_id}"


def summary_of(expires_at: datetime | None) -> str:
    """What operators read beside the workflow of a redemption that expires then; None: not known yet."""
    until = f" until {format_timestamp(expires_at)}" if expires_at else ""
    return f"Redemption to be confirmed{until}"


@workflow.defn(name="Redemption")
class Redemption:
    """Reserves a redemption, waits until it is confirmed, canceled or due, and sees to that."""

    @workflow.init
    def __init__(self, request: RedemptionInput) -> None:
        self._request = request
        self._state: RedemptionState | None = None
        self._refused = False
        self._orders: deque[ConfirmOrder | CancelOrder | ExpireOrder] = deque()
        self._look = False
        self._cancelled = False
        self._note = ""

    # --- what callers order: each waits for its answer ---

    @workflow.update
    async def reserve(self, reservation: Reservation) -> Reserved:
        """Make the redemption. Raises ApplicationError whose type is a refusal's code."""
        try:
            reserved: Reserved = await self._answer(RedemptionActivities.reserve, reservation, "reserve")
        except ApplicationError as error:
            # These say nothing about the redemption that has the id, which may have been made before: it is looked up.
            self._refused = error.type not in ("idempotency_conflict", "service_unavailable")
            raise
        self._learn(reserved.state)
        return reserved

    @workflow.update
    async def confirm(self, order: ConfirmOrder) -> RedemptionState:
        """Take what is reserved; how the redemption stands then. Raises as `reserve`."""
        state: RedemptionState = await self._answer(RedemptionActivities.confirm, order, "confirm")
        self._learn(state)
        return state

    @workflow.update
    async def cancel(self, order: CancelOrder) -> RedemptionState:
        """Give back what is reserved; how the redemption stands then. Raises as `reserve`."""
        state: RedemptionState = await self._answer(RedemptionActivities.cancel, order, "cancel")
        self._learn(state)
        return state

    @workflow.update
    async def reverse(self, order: ReverseOrder) -> ReversalDone:
        """Give back what was taken, or a part of it. Raises as `reserve`."""
        done: ReversalDone = await self._answer(RedemptionActivities.reverse, order, "reverse")
        self._learn(done.state)
        return done

    # --- what operators order ---

    @workflow.signal(
        name="confirm", description='Take what is reserved. For less: {"amount": "12.50"}, {"quantity": 1}.'
    )
    def order_confirm(self, part: Part | None = None) -> None:
        """Take what is reserved, or a part of it."""
        self._order(self._confirm_order(part or Part()))

    @workflow.signal(name="cancel", description='Give back what is reserved. Optional: a reason, such as "sold out".')
    def order_cancel(self, reason: str | None = None) -> None:
        """Give back what is reserved."""
        self._order(self._cancel_order(reason or BY_AN_OPERATOR))

    @workflow.signal(description="Let it time out now: what is reserved is given back, the redemption is EXPIRED.")
    def expire_now(self) -> None:
        """Let the redemption expire before its time."""
        self._order(self._expire_order(None))

    # --- its course ---

    @workflow.run
    async def run(self, request: RedemptionInput) -> str:
        """Carry the redemption until it is no longer pending; its status then, or NONE where there is none.

        A cancel gives back what is reserved, then the run ends as cancelled.
        """
        await self._let_handlers_finish()
        if self._state is None and not self._refused:
            # Started for a redemption that was made before, or its reservation never arrived.
            await through_cancel(self._find(), self._note_cancel)
        while not await self._is_settled():
            order = await self._next_order()
            if self._cancelled:
                # What is under way may settle it. If not, it is given back.
                await self._let_handlers_finish()
                order = self._cancel_order(BY_AN_OPERATOR)
            if self._is_pending():
                await through_cancel(self._take(order), self._note_cancel)
        self._describe()
        if self._cancelled:
            raise asyncio.CancelledError
        return "NONE" if self._state is None else self._state.status

    async def _is_settled(self) -> bool:
        """Whether the redemption isn't pending, and no update is under way that might make it so."""
        if not self._is_pending():
            await self._let_handlers_finish()
        return not self._is_pending()

    async def _let_handlers_finish(self) -> None:
        await through_cancel(workflow.wait_condition(workflow.all_handlers_finished), self._note_cancel)

    async def _next_order(self) -> ConfirmOrder | CancelOrder | ExpireOrder | None:
        """Wait for an operator's order, for the redemption's end, or for something to look at (None)."""
        assert self._state is not None
        if self._cancelled:
            return None
        left = max(self._state.expires_at - workflow.now(), timedelta(0))
        try:
            await workflow.wait_condition(self._has_work, timeout=left, timeout_summary="expiry")
        except TimeoutError:
            return self._expire_order(self._state.expires_at)
        except asyncio.CancelledError:
            self._cancelled = True
            return None
        if self._orders:
            return self._orders.popleft()
        if self._is_pending() and not self._look and workflow.all_handlers_finished():
            workflow.continue_as_new(self._request)
        return None

    def _has_work(self) -> bool:
        is_due = bool(self._orders) or self._look or not self._is_pending()
        return is_due or workflow.info().is_continue_as_new_suggested()

    async def _take(self, order: ConfirmOrder | CancelOrder | ExpireOrder | None) -> None:
        """Carry out an order of an operator's or of time's, until it is done or refused; None: look how it stands."""
        step: Any = None
        if isinstance(order, ConfirmOrder):
            step, name = RedemptionActivities.confirm, "confirm"
        elif isinstance(order, CancelOrder):
            step, name = RedemptionActivities.cancel, "cancel"
        elif isinstance(order, ExpireOrder):
            step, name = RedemptionActivities.expire, "expire"
        else:
            return await self._find()
        try:
            self._learn(await self._repeat(step, order, name))
        except ActivityError as error:
            refusal = _refusal_of(error)
            if refusal is None:
                raise
            self._note = f" Last order, {name}, was refused: {refusal.message}."
            await self._find()

    async def _find(self) -> None:
        self._look = False
        ref = RedemptionRef(self._request.organization_id, self._request.redemption_id)
        self._learn(await self._repeat(RedemptionActivities.find, ref, "look"))

    async def _repeat(self, step: Any, argument: Any, name: str) -> Any:
        """The result of a step that is repeated until it has one."""
        return await workflow.execute_activity_method(
            step, argument, summary=name, start_to_close_timeout=_STEP_TIMEOUT, retry_policy=_RETRIES
        )

    async def _answer(self, step: Any, argument: Any, name: str) -> Any:
        """The result of a step for which a caller waits. Raises ApplicationError: a refusal, or `service_unavailable`.

        After the latter it isn't known here what was done, so that is looked up.
        """
        try:
            return await workflow.execute_local_activity_method(
                step,
                argument,
                summary=name,
                start_to_close_timeout=_STEP_TIMEOUT,
                retry_policy=_ANSWER_RETRIES,
            )
        except FailureError as error:
            if refusal := _refusal_of(error):
                raise refusal from None
            self._look = True
            raise ApplicationError("the database is out of reach", type="service_unavailable") from error

    def _confirm_order(self, part: Part) -> ConfirmOrder:
        organization_id, redemption_id = self._request.organization_id, self._request.redemption_id
        return ConfirmOrder(
            organization_id=organization_id, redemption_id=redemption_id, amount=part.amount, quantity=part.quantity
        )

    def _cancel_order(self, reason: str) -> CancelOrder:
        organization_id, redemption_id = self._request.organization_id, self._request.redemption_id
        return CancelOrder(organization_id=organization_id, redemption_id=redemption_id, reason=reason[:500])

    def _expire_order(self, due: datetime | None) -> ExpireOrder:
        organization_id, redemption_id = self._request.organization_id, self._request.redemption_id
        return ExpireOrder(organization_id=organization_id, redemption_id=redemption_id, due=due)

    def _is_pending(self) -> bool:
        return self._state is not None and self._state.status == "PENDING"

    def _learn(self, state: RedemptionState | None) -> None:
        """Take note how the redemption stands. Steps may end in another order than they were done in."""
        is_outdated = self._state is not None and (state is None or (state.status == "PENDING" != self._state.status))
        if not is_outdated:
            self._state = state
        self._describe()

    def _order(self, order: ConfirmOrder | CancelOrder | ExpireOrder) -> None:
        if len(self._orders) < _ORDERS:
            self._orders.append(order)

    def _note_cancel(self) -> None:
        self._cancelled = True

    def _describe(self) -> None:
        """What an operator sees on the workflow's page."""
        status = "NONE" if self._state is None else self._state.status
        workflow.set_current_details(_details(self._state) + self._note)
        shown = workflow.info().typed_search_attributes
        # A server without our search attributes refuses them, and the start has found that out.
        if shown.get(ORGANIZATION) is not None and shown.get(STATUS) != status:
            workflow.upsert_search_attributes([STATUS.value_set(status)])


def _refusal_of(error: FailureError) -> ApplicationError | None:
    """The refusal that a step raised; None for a fault. Only activities that aren't local wrap what they raise."""
    cause = error.cause if isinstance(error, ActivityError) else error
    return cause if isinstance(cause, ApplicationError) and cause.type in STATUS_BY_CODE else None


def _details(state: RedemptionState | None) -> str:
    if state is None:
        return "No reservation was made."
    units = "" if state.quantity is None else f" ({state.quantity} units)"
    about = f"Redemption **{state.status}** of {format_plain(state.amount)}{units}"
    if state.status == "PENDING":
        return (
            f"{about}, expires {format_timestamp(state.expires_at)}. Signals: confirm, cancel, expire_now. "
            "Cancelling the workflow gives back what is reserved."
        )
    if state.reversed_amount:
        about += f", {format_plain(state.reversed_amount)} of it reversed"
    return f"{about}."
