"""The paths of Redemption, each played through once, with canned activities.

The tests assert what happens on each path; `python -m tests.workflows.redemption_scenarios VERSION` keeps the histories
for the replay test.
"""

import asyncio
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, TypeVar
from unittest.mock import patch
from uuid import UUID

from temporalio import activity
from temporalio.client import (
    WithStartWorkflowOperation,
    WorkflowExecutionStatus,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowUpdateFailedError,
)
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.exceptions import ApplicationError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import UnsandboxedWorkflowRunner, Worker
from temporalio.workflow import Info, UpdateMethodMultiParam

from activities.holds import as_application_error
from activities.redemptions import RedemptionRef
from domain.errors import Refusal, not_found
from domain.ids import new_id
from domain.redemptions import RedemptionRequest, RedemptionStatus
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
from tests.workflows.hold_scenarios import record, until_seen
from tests.workflows.scenarios import time_skipping
from worker import WORKFLOWS
from workflows import queues, redemption
from workflows.redemption import Redemption, RedemptionInput

__all__ = ["SCENARIOS", "Played", "Till", "time_skipping"]

P = TypeVar("P")
T = TypeVar("T")

ORGANIZATION_ID = UUID("01980000-0000-7000-8000-000000000001")
PROGRAM_ID = UUID("01980000-0000-7000-8000-000000000002")
ASSET_ID = UUID("01980000-0000-7000-8000-000000000003")
ALICE = UUID("01980000-0000-7000-8000-000000000004")
DAY = timedelta(days=1)
RESERVED = Decimal(100)


@dataclass
class Till:
    """Stands in for the activities: one redemption of 100, what has been asked of it and when.

    `failing` is what happens to steps instead, by their name and in turn. A step waits while its gate is closed;
    `reached` tells which have begun.
    """

    env: WorkflowEnvironment
    redemption_id: UUID = field(default_factory=new_id)
    state: RedemptionState | None = None
    failing: dict[str, list[Exception]] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    at: list[datetime] = field(default_factory=list)
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    reached: defaultdict[str, asyncio.Event] = field(default_factory=lambda: defaultdict(asyncio.Event))
    first_run_id: str | None = None
    organization_id: UUID = ORGANIZATION_ID

    @activity.defn(name="reserve_redemption")
    async def reserve_step(self, reservation: Reservation) -> Reserved:
        """Make the redemption, or what is said."""
        await self._step("reserve")
        replayed = self.state is not None
        self.state = self.state or await self.pending()
        return Reserved(reservation.redemption_id, replayed, self.state)

    @activity.defn(name="confirm_redemption")
    async def confirm_step(self, order: ConfirmOrder) -> RedemptionState:
        """Take it, or a part of it."""
        await self._step("confirm")
        return self._become("COMPLETED", Decimal(order.amount) if order.amount else None)

    @activity.defn(name="cancel_redemption")
    async def cancel_step(self, order: CancelOrder) -> RedemptionState:
        """Give it back; the reason is part of the step's name."""
        await self._step("cancel", f"cancel: {order.reason}")
        return self._become("CANCELED")

    @activity.defn(name="expire_redemption")
    async def expire_step(self, order: ExpireOrder) -> RedemptionState | None:
        """Let it expire."""
        await self._step("expire", "expire" if order.due else "expire at once")
        return None if self.state is None else self._become("EXPIRED")

    @activity.defn(name="reverse_redemption")
    async def reverse_step(self, order: ReverseOrder) -> ReversalDone:
        """Give back all that was taken."""
        await self._step("reverse")
        assert self.state is not None
        self.state = replace(self.state, status="FULLY_REVERSED", reversed_amount=self.state.amount)
        return ReversalDone(new_id(), False, self.state)

    @activity.defn(name="find_redemption")
    async def find_step(self, ref: RedemptionRef) -> RedemptionState | None:
        """How it stands when the look begins."""
        found = self.state
        await self._step("find")
        return found

    def _become(self, status: RedemptionStatus, amount: Decimal | None = None) -> RedemptionState:
        """As the domain does it: the first to come wins, others who want something else are refused."""
        if self.state is None:
            raise as_application_error(not_found("redemption"))
        if self.state.status == "PENDING":
            self.state = replace(self.state, status=status, amount=amount or self.state.amount)
        elif self.state.status != status:
            raise as_application_error(Refusal("redemption_not_pending", f"redemption is {self.state.status}"))
        return self.state

    async def pending(self) -> RedemptionState:
        """A pending redemption that expires in a day."""
        return RedemptionState("PENDING", RESERVED, None, Decimal(0), await self.env.get_current_time() + DAY)

    async def _step(self, name: str, noted: str | None = None) -> None:
        self.steps.append(noted or name)
        self.at.append(await self.env.get_current_time())
        self.reached[name].set()
        if name in self.gates:
            await self.gates[name].wait()
        if self.failing.get(name):
            raise self.failing[name].pop(0)

    def seconds(self) -> list[int]:
        """When the steps began, in whole seconds after the first."""
        return [round((at - self.at[0]).total_seconds()) for at in self.at]

    # --- what others do; `of` is whose workflow gets the order, where it isn't the redemption's own ---

    async def reserve(self, of: "Till | None" = None) -> Reserved:
        """Ask for the redemption as the API does."""
        request = RedemptionRequest(
            participant_id=ALICE,
            program_id=PROGRAM_ID,
            asset_id=ASSET_ID,
            amount="100",
            description="Gift card",
            requires_confirmation=True,
            idempotency_key="key",
        )
        not_after = await self.env.get_current_time() + timedelta(seconds=4)
        reservation = Reservation(self.organization_id, self.redemption_id, request, not_after)
        return await self._update(Redemption.reserve, reservation, of)

    async def confirm(self, amount: str | None = None, of: "Till | None" = None) -> RedemptionState:
        """Confirm as the API does."""
        order = ConfirmOrder(organization_id=self.organization_id, redemption_id=self.redemption_id, amount=amount)
        return await self._update(Redemption.confirm, order, of)

    async def cancel(self, of: "Till | None" = None) -> RedemptionState:
        """Cancel as the API does."""
        order = CancelOrder(
            organization_id=self.organization_id, redemption_id=self.redemption_id, reason="changed my mind"
        )
        return await self._update(Redemption.cancel, order, of)

    async def reverse(self, of: "Till | None" = None) -> ReversalDone:
        """Reverse as the API does."""
        order = ReverseOrder(
            organization_id=self.organization_id, redemption_id=self.redemption_id, reason="broken", idempotency_key="r"
        )
        return await self._update(Redemption.reverse, order, of)

    async def _update(self, update: UpdateMethodMultiParam[[Redemption, P], T], order: P, of: "Till | None") -> T:
        own = of or self
        start = WithStartWorkflowOperation(
            Redemption.run,
            RedemptionInput(own.organization_id, own.redemption_id),
            id=redemption.workflow_id(own.redemption_id),
            task_queue=queues.LIFECYCLE,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            # A local activity that takes long lets others be heard when most of this is over.
            task_timeout=timedelta(seconds=1),
        )
        try:
            return await self.env.client.execute_update_with_start_workflow(
                update, order, start_workflow_operation=start, id=str(new_id())
            )
        finally:
            self.first_run_id = self.first_run_id or (await start.workflow_handle()).first_execution_run_id

    async def start(self) -> WorkflowHandle[Any, Any]:
        """Start the redemption's workflow as `reconcile` does."""
        await self.env.client.start_workflow(
            Redemption.run,
            RedemptionInput(ORGANIZATION_ID, self.redemption_id),
            id=redemption.workflow_id(self.redemption_id),
            task_queue=queues.LIFECYCLE,
        )
        return self.handle

    @property
    def handle(self) -> WorkflowHandle[Any, Any]:
        """The redemption's workflow, its newest run."""
        return self.env.client.get_workflow_handle(redemption.workflow_id(self.redemption_id))


@asynccontextmanager
async def serving(till: Till, **worker: Any) -> AsyncIterator[None]:
    """A worker with the canned activities."""
    steps: list[Callable[..., Any]] = [
        till.reserve_step,
        till.confirm_step,
        till.cancel_step,
        till.expire_step,
        till.reverse_step,
        till.find_step,
    ]
    async with Worker(till.env.client, task_queue=queues.LIFECYCLE, workflows=WORKFLOWS, activities=steps, **worker):
        yield


@dataclass(frozen=True)
class Played:
    """A run that has ended."""

    till: Till
    handle: WorkflowHandle[Any, Any]
    status: WorkflowExecutionStatus | None
    result: Any
    refused: str | None = None
    page: str = ""


async def ended(till: Till, refused: str | None = None) -> Played:
    """Let time pass until the newest run has ended."""
    # Waiting for the result of a run that came with an update doesn't let time skip.
    while (await till.handle.describe()).status == WorkflowExecutionStatus.RUNNING:
        await till.env.sleep(DAY)
    try:
        result = await till.handle.result()
    except WorkflowFailureError:
        result = None
    return Played(till, till.handle, (await till.handle.describe()).status, result, refused)


async def _asked(till: Till, *calls: Callable[[], Awaitable[Any]]) -> Played:
    """These calls one after another, then whatever time brings."""
    async with serving(till):
        for call in calls:
            await call()
        return await ended(till)


async def told(env: WorkflowEnvironment, signal: str, *argument: Any) -> Played:
    """An operator's signal, then whatever time brings; and what the run's page shows at its end."""
    till = Till(env)
    async with serving(till):
        await till.reserve()
        await till.handle.signal(signal, args=argument)
        played = await ended(till)
        return replace(played, page=await page_of(till))


async def page_of(till: Till) -> str:
    """What an operator reads on the page of the newest run."""
    return str(await till.handle.query("__temporal_workflow_metadata"))


async def _told_in_vain(env: WorkflowEnvironment) -> Played:
    """The participant is suspended when an operator confirms: the redemption goes on waiting."""
    refusal = as_application_error(Refusal("participant_inactive", "participant is SUSPENDED"))
    till = Till(env, failing={"confirm": [refusal]})
    async with serving(till):
        await till.reserve()
        await till.handle.signal("confirm")
        await till.reached["find"].wait()
        played = await ended(till)
        return replace(played, page=await page_of(till))


async def _repeated(env: WorkflowEnvironment) -> Played:
    """The database is away when the redemption is due."""
    till = Till(env, failing={"expire": [ApplicationError("the database is away") for _ in range(3)]})
    return await _asked(till, till.reserve)


async def _cancelled(env: WorkflowEnvironment) -> Played:
    till = Till(env)
    return await _asked(till, till.reserve, lambda: till.handle.cancel())


def fault(times: int = 1) -> list[Exception]:
    """What a step says that can never succeed."""
    return [ApplicationError("DataError: no such thing", type="step_fault", non_retryable=True)] * times


async def _cancelled_at_a_fault(env: WorkflowEnvironment) -> Played:
    """An operator's order can never succeed; Temporal's cancel arrives while that is being found out."""
    till = Till(env, gates={"cancel": asyncio.Event()}, failing={"cancel": fault()})
    async with serving(till):
        await till.reserve()
        await till.handle.signal("cancel", "sold out")
        await till.reached["cancel"].wait()
        await till.handle.cancel()
        await until_seen(till.handle, "WORKFLOW_EXECUTION_CANCEL_REQUESTED")
        till.gates["cancel"].set()
        played = await ended(till)
        return replace(played, page=await page_of(till))


async def _failing(env: WorkflowEnvironment, step: str, times: int, *, cancelled: bool = False) -> Played:
    """Nobody ordered the step, and so often it fails for good."""
    till = Till(env, failing={step: fault(times)})
    till.state = await till.pending()
    calls = [till.start, *([lambda: till.handle.cancel()] if cancelled else [])]
    return await _asked(till, *calls)


async def _cancelled_at_a_look(env: WorkflowEnvironment) -> Played:
    """Temporal's cancel arrives when the workflow, started again, looks how the redemption stands."""
    till = Till(env, gates={"find": asyncio.Event()})
    till.state = await till.pending()
    async with serving(till):
        await till.start()
        await till.reached["find"].wait()
        await till.handle.cancel()
        await until_seen(till.handle, "WORKFLOW_EXECUTION_CANCEL_REQUESTED")
        till.gates["find"].set()
        return await ended(till)


async def _cancelled_in_an_outage(env: WorkflowEnvironment) -> Played:
    """Temporal's cancel arrives while the database is away and a step is being repeated."""
    till = Till(env, gates={"expire": asyncio.Event()})
    till.failing = {"expire": [ApplicationError("the database is away") for _ in range(3)]}
    async with serving(till):
        await till.reserve()
        await till.handle.signal("expire_now")
        await till.reached["expire"].wait()
        await till.handle.cancel()
        await until_seen(till.handle, "WORKFLOW_EXECUTION_CANCEL_REQUESTED")
        till.gates["expire"].set()
        return await ended(till)


async def _gone(env: WorkflowEnvironment, *calls: Callable[[Till], Awaitable[Any]]) -> Played:
    """A backup was restored that doesn't know the redemption; then these calls, then whatever time brings."""
    till = Till(env)
    async with serving(till):
        await till.reserve()
        till.state = None
        for call in calls:
            await call(till)
        return await ended(till)


async def _confirmed_when_gone(env: WorkflowEnvironment) -> Played:
    till = Till(env)
    async with serving(till):
        await till.reserve()
        till.state = None
        return await _ask_in_vain(till, till.confirm)


async def _settled_by_others(env: WorkflowEnvironment) -> Played:
    """Somebody expired it without the workflow; a confirm then tells the workflow so."""
    till = Till(env)
    async with serving(till):
        await till.reserve()
        assert till.state is not None
        till.state = replace(till.state, status="EXPIRED")
        return await _ask_in_vain(till, till.confirm)


async def _made_at_a_look(env: WorkflowEnvironment) -> Played:
    """The workflow is started, finds no redemption, and hears of that only after it has made one."""
    till = Till(env, gates={"find": asyncio.Event()})
    async with serving(till):
        await till.start()
        await till.reached["find"].wait()
        await till.reserve()
        till.gates["find"].set()
        return await ended(till)


async def _confirmed_at_a_fault(env: WorkflowEnvironment) -> Played:
    till = Till(env, failing={"confirm": fault()})
    async with serving(till):
        await till.reserve()
        return await _ask_in_vain(till, till.confirm)


async def _late_confirm(env: WorkflowEnvironment) -> Played:
    """The first attempt's commit got lost, the second one is refused as too late."""
    late = as_application_error(Refusal("service_unavailable", "too late"))
    till = Till(env, failing={"confirm": [late]})
    async with serving(till):
        await till.reserve()
        assert till.state is not None
        till.state = replace(till.state, status="COMPLETED")
        return await _ask_in_vain(till, till.confirm)


async def _cancelled_at_work(env: WorkflowEnvironment, step: str, signal: str | None = None) -> Played:
    """Temporal's cancel arrives while the step is under way; the step ends later."""
    till = Till(env, gates={step: asyncio.Event()})
    async with serving(till):
        asking = asyncio.create_task(till.reserve())
        if step != "reserve":
            await asking
        if signal is not None:
            await till.handle.signal(signal)
        elif step == "confirm":
            asking = asyncio.create_task(till.confirm())  # type: ignore[arg-type]
        await till.reached[step].wait()
        await till.handle.cancel()
        await until_seen(till.handle, "WORKFLOW_EXECUTION_CANCEL_REQUESTED")
        till.gates[step].set()
        await asking
        return await ended(till)


async def _ask_in_vain(till: Till, call: Callable[[], Awaitable[Any]]) -> Played:
    refused = None
    try:
        await call()
    except WorkflowUpdateFailedError as error:
        refused = error.cause.type if isinstance(error.cause, ApplicationError) else str(error.cause)
    return await ended(till, refused)


async def _refused(env: WorkflowEnvironment, code: str, *, made_before: bool = False) -> Played:
    till = Till(env, failing={"reserve": [as_application_error(Refusal(code, code))]})
    till.state = await till.pending() if made_before else None
    async with serving(till):
        return await _ask_in_vain(till, till.reserve)


async def _refused_confirm(env: WorkflowEnvironment) -> Played:
    till = Till(env, failing={"confirm": [as_application_error(Refusal("bad_request", "more than reserved"))]})
    async with serving(till):
        await till.reserve()
        return await _ask_in_vain(till, lambda: till.confirm("101"))


async def _unreachable(env: WorkflowEnvironment, step: str) -> Played:
    """The database stays away until the step gives up. It was done all the same: the answer was lost."""
    till = Till(env, failing={step: [ApplicationError("the database is away") for _ in range(1_000)]})
    async with serving(till):
        if step == "confirm":
            await till.reserve()
        asking = asyncio.create_task(_ask_in_vain(till, till.reserve if step == "reserve" else till.confirm))
        await till.reached[step].wait()
        till.state = await till.pending()
        if step == "confirm":
            till.state = replace(till.state, status="COMPLETED")
        return await asking


async def _asked_twice(env: WorkflowEnvironment) -> Played:
    till = Till(env)
    async with serving(till):
        await asyncio.gather(till.reserve(), till.reserve())
        return await ended(till)


async def _all_at_once(env: WorkflowEnvironment) -> Played:
    """A confirm, a cancel and an operator's order race: one of them wins."""
    till = Till(env)
    async with serving(till):
        await till.reserve()
        await till.handle.signal("expire_now")
        await asyncio.gather(till.confirm(), till.cancel(), return_exceptions=True)
        return await ended(till)


async def _nothing_there(env: WorkflowEnvironment) -> Played:
    till = Till(env)
    return await _asked(till, till.start)


async def _found_again(env: WorkflowEnvironment, *calls: Callable[[Till], Awaitable[Any]]) -> Played:
    """The workflow was lost; somebody starts it again, or comes with an order."""
    till = Till(env)
    till.state = await till.pending()
    return await _asked(till, *(lambda call=call: call(till) for call in calls))


async def _reversed_later(env: WorkflowEnvironment) -> Played:
    """The run has ended long ago: a reversal gets a short one."""
    till = Till(env)
    async with serving(till):
        await till.reserve()
        await till.confirm()
        await ended(till)
        await till.reverse()
        return await ended(till)


async def _continued(env: WorkflowEnvironment) -> Played:
    """The server suggests a new run while the redemption waits; what is kept is the first run's history."""
    till = Till(env)
    with patch.object(Info, "is_continue_as_new_suggested", lambda run: run.continued_run_id is None):
        async with serving(till, workflow_runner=UnsandboxedWorkflowRunner()):
            await till.reserve()
            played = await ended(till)
    handle = env.client.get_workflow_handle(till.handle.id, run_id=till.first_run_id)
    return Played(till, handle, (await handle.describe()).status, played.result)


async def _confirmed(env: WorkflowEnvironment, amount: str | None = None) -> Played:
    till = Till(env)
    return await _asked(till, till.reserve, lambda: till.confirm(amount))


async def _canceled(env: WorkflowEnvironment) -> Played:
    till = Till(env)
    return await _asked(till, till.reserve, till.cancel)


async def _due(env: WorkflowEnvironment) -> Played:
    till = Till(env)
    return await _asked(till, till.reserve)


SCENARIOS: dict[str, Callable[[WorkflowEnvironment], Awaitable[Played]]] = {
    "redeems_when_confirmed": _confirmed,
    "redeems_a_part": lambda env: _confirmed(env, "60"),
    "redeems_nothing_when_canceled": _canceled,
    "redeems_nothing_when_due": _due,
    "redeems_by_signal": lambda env: told(env, "confirm"),
    "redeems_a_part_by_signal": lambda env: told(env, "confirm", {"amount": "60"}),
    "redeems_nothing_by_signal": lambda env: told(env, "cancel", "sold out"),
    "redeems_nothing_by_a_signal_without_reason": lambda env: told(env, "cancel"),
    "redeems_nothing_when_timed_out_by_signal": lambda env: told(env, "expire_now"),
    "redeems_not_what_is_refused_by_signal": _told_in_vain,
    "redeems_nothing_after_an_outage_at_its_end": _repeated,
    "redeems_nothing_when_cancelled": _cancelled,
    "redeems_nothing_when_cancelled_while_it_reserves": lambda env: _cancelled_at_work(env, "reserve"),
    "redeems_although_cancelled_while_it_confirms": lambda env: _cancelled_at_work(env, "confirm"),
    "redeems_although_cancelled_while_it_confirms_by_signal": lambda env: _cancelled_at_work(env, "confirm", "confirm"),
    "redeems_nothing_when_cancelled_while_it_expires": lambda env: _cancelled_at_work(env, "expire", "expire_now"),
    "redeems_nothing_when_refused": lambda env: _refused(env, "insufficient_balance"),
    "redeems_what_was_made_before_with_the_key": lambda env: _refused(env, "idempotency_conflict", made_before=True),
    "redeems_what_was_made_in_a_lost_attempt": lambda env: _refused(env, "service_unavailable", made_before=True),
    "redeems_not_what_is_refused": _refused_confirm,
    "redeems_what_was_made_without_an_answer": lambda env: _unreachable(env, "reserve"),
    "redeems_what_was_confirmed_without_an_answer": lambda env: _unreachable(env, "confirm"),
    "redeems_once_when_asked_twice": _asked_twice,
    "redeems_or_not_when_all_come_at_once": _all_at_once,
    "redeems_nothing_without_a_reservation": _nothing_there,
    "redeems_nothing_after_its_workflow_was_lost": lambda env: _found_again(env, Till.start),
    "redeems_after_its_workflow_was_lost": lambda env: _found_again(env, Till.confirm),
    "redeems_and_is_reversed_later": _reversed_later,
    "redeems_in_a_new_run": _continued,
    "redeems_not_by_a_typo": lambda env: told(env, "confirm", {"amout": "60"}),
    "redeems_nothing_when_cancelled_after_a_fault": _cancelled_at_a_fault,
    "redeems_nothing_when_cancelled_while_it_looks": _cancelled_at_a_look,
    "redeems_nothing_when_cancelled_in_an_outage": _cancelled_in_an_outage,
    "redeems_nothing_after_faults_at_its_end": lambda env: _failing(env, "expire", 4),
    "redeems_nothing_after_faults_at_a_look": lambda env: _failing(env, "find", 3),
    "redeems_nothing_after_faults_of_a_cancel": lambda env: _failing(env, "cancel", 2, cancelled=True),
    "redeems_nothing_that_is_gone": _gone,
    "redeems_nothing_that_is_gone_when_cancelled": lambda env: _gone(env, lambda till: till.handle.cancel()),
    "redeems_nothing_that_is_gone_when_confirmed": _confirmed_when_gone,
    "redeems_nothing_that_was_settled_by_others": _settled_by_others,
    "redeems_what_was_confirmed_in_a_lost_attempt": _late_confirm,
    "redeems_what_is_made_while_it_looks": _made_at_a_look,
    "redeems_not_after_a_fault_of_a_call": _confirmed_at_a_fault,
}
"""Every path by its name."""


if __name__ == "__main__":
    asyncio.run(record(sys.argv[1], SCENARIOS))
