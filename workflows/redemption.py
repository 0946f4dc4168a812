"""Redemption: a two-step redemption as a durable workflow. Contract: redemptions.md 3; docs/two-step.md.

It is reserved by an update that comes together with the start, waits to be confirmed, canceled or timed out, and ends.
Whatever comes later (a reversal, a confirm after the workflow was lost) comes to the same id: it starts a short run
that does the one thing. The workflow never decides how the redemption stands: its row does, read under its
participant's lock.

Steps for which a caller waits are local activities: they are part of the workflow task that brought the order, which
saves Temporal a task and another workflow task, and they are short and bounded. What operators and time order has to be
repeated until it is done, and is an activity.

What settles nothing is not repeated at once: each turn of the run's loop uses up an order or a look that somebody asked
for, or is followed by a pause.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from temporalio import workflow
from temporalio.common import RawValue, RetryPolicy
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
        Order,
        RedemptionState,
        Reservation,
        Reserved,
        ReversalDone,
        ReverseOrder,
    )
    from workflows.search_attributes import ORGANIZATION, STATUS
    from workflows.shield import through_cancel
    from workflows.signals import MOST_ORDERS

_STEP_TIMEOUT = timedelta(seconds=30)
_RETRIES = RetryPolicy(initial_interval=timedelta(milliseconds=100), maximum_interval=timedelta(seconds=30))
_ANSWER_RETRIES = RetryPolicy(
    initial_interval=timedelta(milliseconds=100), maximum_interval=timedelta(seconds=1), maximum_attempts=5
)
"""How often a caller's order is tried while the database is away. In attempts, as local activities count no time."""
_SHORTEST_PAUSE, _LONGEST_PAUSE = timedelta(seconds=1), timedelta(hours=1)
"""How long the workflow waits before it repeats what has settled nothing; each time twice as long."""
_REASON_LENGTH, _AMOUNT_LENGTH, _NOTE_LENGTH = 500, 100, 500

BY_AN_OPERATOR = "canceled by an operator"
"""The reason of a cancel that came without one."""


@dataclass(frozen=True)
class RedemptionInput:
    """Which redemption. Everything else is in the database."""

    organization_id: UUID
    redemption_id: UUID


class NotUnderstood(Exception):
    """What came with an operator's signal is nothing that the signal takes. The message says what it takes."""


def workflow_id(redemption_id: UUID) -> str:
    """The id of the workflow that carries this redemption."""
    return f"redemption/{redemption_id}"


REVERSAL_SUMMARY = "Reversal of a redemption"
"""What operators read beside a run that was started for a reversal."""


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
        self._orders: deque[Order] = deque()
        self._look = False
        self._cancelled = False
        self._note = ""
        self._answers = 0
        self._pause = _SHORTEST_PAUSE
        self._not_before = workflow.now()

    # --- what callers order: each waits for its answer ---

    @workflow.update
    async def reserve(self, reservation: Reservation) -> Reserved:
        """Make the redemption. Raises ApplicationError whose type is a refusal's code."""
        try:
            reserved: Reserved = await self._answer(RedemptionActivities.reserve, reservation, "reserve")
        except ApplicationError as error:
            # These say nothing about the redemption that has the id, which may have been made before: it is looked up.
            self._refused |= error.type not in ("idempotency_conflict", "service_unavailable")
            raise
        self._learn(reserved.state)
        return reserved

    @reserve.validator
    def _check_reserve(self, reservation: Reservation) -> None:
        self._require_own(reservation)

    @workflow.update
    async def confirm(self, order: ConfirmOrder) -> RedemptionState:
        """Take what is reserved; how the redemption stands then. Raises as `reserve`."""
        state: RedemptionState = await self._answer(RedemptionActivities.confirm, order, "confirm")
        self._learn(state)
        return state

    @confirm.validator
    def _check_confirm(self, order: ConfirmOrder) -> None:
        self._require_own(order)

    @workflow.update
    async def cancel(self, order: CancelOrder) -> RedemptionState:
        """Give back what is reserved; how the redemption stands then. Raises as `reserve`."""
        state: RedemptionState = await self._answer(RedemptionActivities.cancel, order, "cancel")
        self._learn(state)
        return state

    @cancel.validator
    def _check_cancel(self, order: CancelOrder) -> None:
        self._require_own(order)

    @workflow.update
    async def reverse(self, order: ReverseOrder) -> ReversalDone:
        """Give back what was taken, or a part of it. Raises as `reserve`."""
        done: ReversalDone = await self._answer(RedemptionActivities.reverse, order, "reverse")
        self._learn(done.state)
        return done

    @reverse.validator
    def _check_reverse(self, order: ReverseOrder) -> None:
        self._require_own(order)

    # --- what operators order ---
    # They take whatever is sent. Where arguments don't fit a handler the SDK drops the signal, or stops the workflow.

    @workflow.signal(
        name="confirm", description='Take what is reserved. For less: {"amount": "12.50"}, {"quantity": 1}.'
    )
    def order_confirm(self, *sent: Any) -> None:
        """Take what is reserved, or a part of it."""
        self._obey("confirm", self._confirm_order, sent)

    @workflow.signal(name="cancel", description='Give back what is reserved. Optional: a reason, such as "sold out".')
    def order_cancel(self, *sent: Any) -> None:
        """Give back what is reserved."""
        self._obey("cancel", lambda sent: self._cancel_order(_reason(sent)), sent)

    @workflow.signal(description="Let it time out now: what is reserved is given back, the redemption is EXPIRED.")
    def expire_now(self, *sent: Any) -> None:
        """Let the redemption expire before its time."""
        self._obey("expire_now", self._expire_at_once_order, sent)

    @workflow.signal(dynamic=True)
    def not_a_signal(self, name: str, sent: Sequence[RawValue]) -> None:
        """Say so where an operator reads it."""
        del sent
        self._refuse(name, "there is no such signal")

    # --- its course ---

    @workflow.run
    async def run(self, request: RedemptionInput) -> str:
        """Carry the redemption until it is no longer pending; its status then, or NONE where there is none.

        A cancel gives back what is reserved, then the run ends as cancelled.
        """
        await self._let_handlers_finish()
        if self._state is None and not self._refused:
            # Started for a redemption that was made before, or its reservation never arrived.
            self._look = True
        while not await self._is_settled():
            if self._state is None and self._is_too_long():
                workflow.continue_as_new(request)
            if self._look:
                await through_cancel(self._find(), self._note_cancel)
            elif order := await self._next_order():
                await through_cancel(self._take(order), self._note_cancel)
        self._describe()
        if self._cancelled:
            raise asyncio.CancelledError
        return self._status

    async def _is_settled(self) -> bool:
        """Whether the redemption isn't pending, and no update is under way that might make it so."""
        if not self._is_pending() and not self._look:
            await self._let_handlers_finish()
        return not self._is_pending() and not self._look

    async def _let_handlers_finish(self) -> None:
        await through_cancel(workflow.wait_condition(workflow.all_handlers_finished), self._note_cancel)

    async def _next_order(self) -> Order | None:
        """Wait for an operator's order, for the redemption's end, or for something to look at (None)."""
        assert self._state is not None
        due_at = max(self._not_before, workflow.now() if self._cancelled else self._state.expires_at)
        left = due_at - workflow.now()
        if left <= timedelta(0):
            return await self._own_order()
        try:
            await workflow.wait_condition(self._has_work, timeout=left, timeout_summary="expiry")
        except TimeoutError:
            return await self._own_order()
        except asyncio.CancelledError:
            self._note_cancel()
            return await self._own_order()
        if self._orders:
            return self._orders.popleft()
        if self._is_pending() and not self._look and workflow.all_handlers_finished():
            workflow.continue_as_new(self._request)
        return None

    def _has_work(self) -> bool:
        return bool(self._orders) or self._look or not self._is_pending() or self._is_too_long()

    def _is_too_long(self) -> bool:
        """Whether a new run should go on. Not while somebody waits for an answer.

        Nor after a cancel, of which the new run wouldn't know; what is repeated then is rare enough for one run.
        """
        suggested = workflow.info().is_continue_as_new_suggested()
        return suggested and not self._cancelled and workflow.all_handlers_finished()

    async def _own_order(self) -> Order | None:
        """What nobody has to order: the end of a workflow that was cancelled, or of a redemption whose time is over.

        Should it settle nothing, it is ordered again after a pause.
        """
        self._not_before = workflow.now() + self._longer_pause()
        if not self._cancelled:
            assert self._state is not None
            return self._expire_order(self._state.expires_at)
        # What is under way may settle it. If not, it is given back.
        await self._let_handlers_finish()
        return self._cancel_order(BY_AN_OPERATOR) if self._is_pending() else None

    def _longer_pause(self) -> timedelta:
        """How long to wait now; the next time it is twice as long."""
        pause, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        return pause

    async def _take(self, order: Order) -> None:
        """Carry out an order of an operator's or of time's, until it is done or refused."""
        step: Any
        if isinstance(order, ConfirmOrder):
            step, name = RedemptionActivities.confirm, "confirm"
        elif isinstance(order, CancelOrder):
            step, name = RedemptionActivities.cancel, "cancel"
        else:
            step, name = RedemptionActivities.expire, "expire"
        answers = self._answers
        try:
            self._learn_since(answers, await self._repeat(step, order, name))
        except ActivityError as error:
            self._note_failure(name, error)
            self._look = True

    async def _find(self) -> None:
        """Look how the redemption stands. Where that can't be read, what is known counts on."""
        self._look = False
        answers = self._answers
        ref = RedemptionRef(self._request.organization_id, self._request.redemption_id)
        try:
            self._learn_since(answers, await self._repeat(RedemptionActivities.find, ref, "look"))
        except ActivityError as error:
            self._note_failure("look", error)
            if self._state is None:
                await workflow.sleep(self._longer_pause(), summary="pause")
                self._look = True

    async def _repeat(self, step: Any, argument: Any, name: str) -> Any:
        """The result of a step that is repeated until it has one. Raises ActivityError where it never will."""
        return await workflow.execute_activity_method(
            step, argument, summary=name, start_to_close_timeout=_STEP_TIMEOUT, retry_policy=_RETRIES
        )

    async def _answer(self, step: Any, argument: Any, name: str) -> Any:
        """The result of a step for which a caller waits. Raises ApplicationError: a refusal, or `service_unavailable`.

        After the latter it isn't known here what was done, not even where the step was refused as too late: that may
        have been its second attempt. So it is looked up, and so is what contradicts what is known here.
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
            refusal = _refusal_of(error)
            if refusal is None:
                self._look = True
                message = f"whether it was done is not known: {_message_of(error)}"
                raise ApplicationError(message, type="service_unavailable") from error
            is_contradiction = refusal.type in ("not_found", "redemption_not_pending") and self._is_pending()
            self._look |= refusal.type == "service_unavailable" or is_contradiction
            raise refusal from None

    def _require_own(self, order: Order | Reservation) -> None:
        """Raises ApplicationError for an order that names another redemption than this workflow's."""
        own = self._request
        if (order.organization_id, order.redemption_id) != (own.organization_id, own.redemption_id):
            message = f"this is the workflow of redemption {own.redemption_id} of organization {own.organization_id}"
            raise ApplicationError(message, type="another_redemption", non_retryable=True)

    def _confirm_order(self, sent: Sequence[Any]) -> ConfirmOrder:
        amount, quantity = _part(sent)
        organization_id, redemption_id = self._request.organization_id, self._request.redemption_id
        return ConfirmOrder(
            organization_id=organization_id, redemption_id=redemption_id, amount=amount, quantity=quantity
        )

    def _cancel_order(self, reason: str) -> CancelOrder:
        organization_id, redemption_id = self._request.organization_id, self._request.redemption_id
        return CancelOrder(organization_id=organization_id, redemption_id=redemption_id, reason=reason)

    def _expire_at_once_order(self, sent: Sequence[Any]) -> ExpireOrder:
        if not _is_nothing(sent):
            raise NotUnderstood("it takes nothing")
        return self._expire_order(None)

    def _expire_order(self, due: datetime | None) -> ExpireOrder:
        organization_id, redemption_id = self._request.organization_id, self._request.redemption_id
        return ExpireOrder(organization_id=organization_id, redemption_id=redemption_id, due=due)

    def _is_pending(self) -> bool:
        return self._state is not None and self._state.status == "PENDING"

    def _learn_since(self, answers: int, state: RedemptionState | None) -> None:
        """Take note of what a step said that began after so many answers.

        That there is no such redemption (say, in a restored backup) is final, unless another step has seen it since.
        """
        if state is not None:
            self._learn(state)
        elif self._answers == answers:
            self._state = None
            self._describe()
        else:
            self._look = True

    def _learn(self, state: RedemptionState) -> None:
        """Take note how the redemption stands. Steps may end in another order than they were done in."""
        self._answers += 1
        is_outdated = self._state is not None and state.status == "PENDING" != self._state.status
        if not is_outdated:
            self._state = state
        self._describe()

    def _obey(self, name: str, order_of: Callable[[Sequence[Any]], Order], sent: Sequence[Any]) -> None:
        """Have the order that was sent carried out in its turn, or refuse the signal."""
        if len(self._orders) >= MOST_ORDERS:
            self._refuse(name, f"{MOST_ORDERS} orders are waiting already")
            return
        try:
            self._orders.append(order_of(sent))
        except NotUnderstood as problem:
            self._refuse(name, str(problem))

    def _refuse(self, name: str, why: str) -> None:
        """Say where operators read it, and in the log, that a signal changes nothing, and why."""
        workflow.logger.warning("signal %.50r is refused: %s", name, why)
        self._note = f" Signal {name[:50]!r} was refused: {why}."[:_NOTE_LENGTH]
        self._show()

    def _note_failure(self, name: str, error: ActivityError) -> None:
        outcome = "failed" if _refusal_of(error) is None else "was refused"
        self._note = f" Last order, {name}, {outcome}: {_message_of(error)}."[:_NOTE_LENGTH]
        self._show()

    def _note_cancel(self) -> None:
        self._cancelled = True
        self._pause, self._not_before = _SHORTEST_PAUSE, workflow.now()

    @property
    def _status(self) -> str:
        return "NONE" if self._state is None else self._state.status

    def _show(self) -> None:
        workflow.set_current_details(_details(self._state) + self._note)

    def _describe(self) -> None:
        """What an operator sees on the workflow's page, and by what it is found."""
        status = self._status
        self._show()
        shown = workflow.info().typed_search_attributes
        # A server without our search attributes refuses them, and the start has found that out.
        if shown.get(ORGANIZATION) is not None and shown.get(STATUS) != status:
            workflow.upsert_search_attributes([STATUS.value_set(status)])


def _refusal_of(error: FailureError) -> ApplicationError | None:
    """The refusal that a step raised; None for a fault. Only activities that aren't local wrap what they raise."""
    cause = error.cause if isinstance(error, ActivityError) else error
    return cause if isinstance(cause, ApplicationError) and cause.type in STATUS_BY_CODE else None


def _message_of(error: FailureError) -> str:
    """Why a step failed, with the fields that a refusal names."""
    cause = error.cause if isinstance(error, ActivityError) and isinstance(error.cause, FailureError) else error
    refusal = _refusal_of(error)
    problems = refusal.details[0] if refusal is not None and refusal.details else []
    fields = "; ".join(f"{problem['field']} {problem['message']}" for problem in problems)
    return f"{cause.message} ({fields})" if fields else cause.message


# --- what operators send ---------------------------------------------------------------------------------------------


def _is_nothing(sent: Sequence[Any]) -> bool:
    return len(sent) == 0 or (len(sent) == 1 and sent[0] is None)


def _part(sent: Sequence[Any]) -> tuple[str | None, int | None]:
    """The amount and the quantity that a confirm names; neither of them: all of it. Raises NotUnderstood.

    Whatever isn't exactly understood is refused: it may have been meant to take less.
    """
    if _is_nothing(sent):
        return None, None
    (part, *more) = sent
    if more or not isinstance(part, dict) or not part.keys() <= {"amount", "quantity"}:
        raise NotUnderstood('it takes nothing, {"amount": "12.50"} or {"quantity": 1}')
    amount, quantity = part.get("amount"), part.get("quantity")
    if "amount" in part and not (isinstance(amount, str) and 0 < len(amount) <= _AMOUNT_LENGTH):
        raise NotUnderstood("amount must be a decimal string")
    # Where Python counts, true is 1.
    if "quantity" in part and not (type(quantity) is int and quantity > 0):
        raise NotUnderstood("quantity must be a whole number above 0")
    return amount, quantity


def _reason(sent: Sequence[Any]) -> str:
    """The reason that a cancel names, or BY_AN_OPERATOR. Raises NotUnderstood."""
    if _is_nothing(sent):
        return BY_AN_OPERATOR
    (reason, *more) = sent
    if more or not isinstance(reason, str) or not 0 < len(reason) <= _REASON_LENGTH or "\0" in reason:
        raise NotUnderstood(f"it takes nothing, or a reason: a string of 1 to {_REASON_LENGTH} characters")
    return reason


def _details(state: RedemptionState | None) -> str:
    if state is None:
        return "No redemption is known of."
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
