"""The paths of Hold and HoldEnds, each played through once, with canned activities.

The tests assert what happens on each path; `python -m tests.workflows.hold_scenarios VERSION` keeps the histories for
the replay test, as `tests.workflows.record` does for EventProcessing.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any
from unittest.mock import patch
from uuid import UUID

from temporalio import activity
from temporalio.api.enums.v1 import EventType
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
from temporalio.workflow import Info

from activities.holds import DueHolds, DueHoldsReport, HoldEndOrder, HoldRef, as_application_error
from domain.balances import Holder, HolderBalance, OperationRequest, OperationResult
from domain.errors import Refusal
from domain.hold_ends import HoldState
from domain.ids import new_id
from domain.timed_holds import Reservation, Reserved
from tests.workflows.record import HISTORIES
from tests.workflows.scenarios import time_skipping
from worker import WORKFLOWS
from workflows import hold, hold_ends, queues
from workflows.hold import Hold, HoldInput
from workflows.hold_ends import HoldEnds, HoldEndsInput

ORGANIZATION_ID = UUID("01980000-0000-7000-8000-000000000001")
PROGRAM_ID = UUID("01980000-0000-7000-8000-000000000002")
WEEK = timedelta(days=7)
SEVENTY_DAYS = timedelta(days=70)


@dataclass
class Bank:
    """Stands in for the activities: one hold, what has been asked of it and when.

    `reserving` is what happens to reservations, in turn; after that they are made. A step waits while its gate is
    closed, and tells when it has begun.
    """

    env: WorkflowEnvironment
    hold_id: UUID = field(default_factory=new_id)
    state: HoldState | None = None
    reserving: list[Exception] = field(default_factory=list)
    due: list[DueHoldsReport | timedelta] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    at: list[datetime] = field(default_factory=list)
    dues: list[datetime | None] = field(default_factory=list)
    next_end: datetime | None = None
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    first_run_id: str | None = None

    @activity.defn(name="reserve_hold")
    async def reserve_hold(self, reservation: Reservation) -> Reserved:
        """Make the hold, or what is said."""
        await self._step("reserve")
        if self.reserving:
            raise self.reserving.pop(0)
        self.state = self.state or await self.until(WEEK)
        balance = HolderBalance(Decimal("70"), Decimal(0), Decimal("30"))
        return Reserved(
            OperationResult(False, new_id(), Decimal("30"), balance, 2, None, reservation.hold_id), self.state
        )

    @activity.defn(name="find_hold")
    async def find_hold(self, ref: HoldRef) -> HoldState | None:
        """How the hold stands."""
        await self._step("find")
        return self.state

    @activity.defn(name="end_hold")
    async def end_hold(self, order: HoldEndOrder) -> HoldState | None:
        """End the hold, if it is active."""
        await self._step((order.order or "END").lower())
        if self.state is not None and self.state.status == "ACTIVE":
            status = {"RELEASE": "RELEASED", "FORFEIT": "FORFEITED", None: "EXPIRED"}[order.order]
            self.state = HoldState(status, self.state.expires_at)  # type: ignore[arg-type]
        return self.state

    @activity.defn(name="end_due_holds")
    async def end_due(self, request: DueHolds) -> DueHoldsReport:
        """Do what is said next; a timedelta is when the next end comes. After the last one there is nothing to do.

        Asked before an end that it has told, it tells that again.
        """
        self.dues.append(request.due)
        await self._step("end due")
        if self.next_end is not None and self.at[-1] < self.next_end:
            return DueHoldsReport(0, False, self.next_end)
        step = self.due.pop(0) if self.due else DueHoldsReport(0, False, None)
        if isinstance(step, timedelta):
            self.next_end = self.at[-1] + step
            return DueHoldsReport(1, False, self.next_end)
        self.next_end = None
        return step

    async def until(self, left: timedelta) -> HoldState:
        """An active hold that ends so much later."""
        return HoldState("ACTIVE", await self.env.get_current_time() + left)

    async def _step(self, name: str) -> None:
        self.steps.append(name)
        self.at.append(await self.env.get_current_time())
        if name in self.gates:
            self.begun.set()
            await self.gates[name].wait()

    def seconds(self) -> list[int]:
        """When the steps began, in whole seconds after the first."""
        return [round((at - self.at[0]).total_seconds()) for at in self.at]

    # --- what others do ---

    async def reserve(self) -> OperationResult:
        """Ask for the hold as the API does."""
        request = OperationRequest(
            operation="HOLD",
            program_id=PROGRAM_ID,
            asset_id=UUID("01980000-0000-7000-8000-000000000003"),
            description="Card authorization",
            amount="30",
            expires_in=WEEK,
            hold_id=self.hold_id,
            idempotency_key="key",
        )
        holder = Holder("PARTICIPANT", UUID("01980000-0000-7000-8000-000000000004"))
        start = WithStartWorkflowOperation(
            Hold.run,
            HoldInput(ORGANIZATION_ID, self.hold_id),
            id=hold.workflow_id(self.hold_id),
            task_queue=queues.LIFECYCLE,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        )
        not_after = await self.env.get_current_time() + timedelta(seconds=4)
        result = await self.env.client.execute_update_with_start_workflow(
            Hold.reserve,
            Reservation(ORGANIZATION_ID, holder, request, not_after),
            start_workflow_operation=start,
            id=str(new_id()),
        )
        self.first_run_id = (await start.workflow_handle()).first_execution_run_id
        return result

    async def start(self) -> WorkflowHandle[Any, Any]:
        """Start the hold's workflow as `reconcile` does."""
        await self.env.client.start_workflow(
            Hold.run,
            HoldInput(ORGANIZATION_ID, self.hold_id),
            id=hold.workflow_id(self.hold_id),
            task_queue=queues.LIFECYCLE,
        )
        return self.handle

    @property
    def handle(self) -> WorkflowHandle[Any, Any]:
        """The hold's workflow; waiting for its result lets time run."""
        return self.env.client.get_workflow_handle(hold.workflow_id(self.hold_id))

    async def wake(self) -> WorkflowHandle[Any, Any]:
        """Wake the program's HoldEnds as the gateway does."""
        return await self.env.client.start_workflow(
            HoldEnds.run,
            HoldEndsInput(ORGANIZATION_ID, self.hold_id, "Loyalty"),
            id=hold_ends.workflow_id(self.hold_id),
            task_queue=queues.LIFECYCLE,
            start_signal="wake",
        )


@asynccontextmanager
async def serving(env: WorkflowEnvironment, bank: Bank, **worker: Any) -> AsyncIterator[None]:
    """Workers with the canned activities."""
    steps: list[Callable[..., Any]] = [bank.reserve_hold, bank.find_hold, bank.end_hold, bank.end_due]
    async with (
        Worker(env.client, task_queue=queues.LIFECYCLE, workflows=WORKFLOWS, activities=steps, **worker),
        Worker(env.client, task_queue=queues.LEDGER, activities=steps),
    ):
        yield


@dataclass(frozen=True)
class Played:
    """A run that has ended."""

    bank: Bank
    handle: WorkflowHandle[Any, Any]
    status: WorkflowExecutionStatus | None
    result: Any
    refused: str | None = None


async def ended(bank: Bank, handle: WorkflowHandle[Any, Any], refused: str | None = None) -> Played:
    """Let time pass until the run has ended."""
    # Waiting for the result of a run that came with an update doesn't let time skip.
    while (await handle.describe()).status == WorkflowExecutionStatus.RUNNING:
        await bank.env.sleep(WEEK)
    try:
        result = await handle.result()
    except WorkflowFailureError:
        result = None
    return Played(bank, handle, (await handle.describe()).status, result, refused)


# --- Hold ------------------------------------------------------------------------------------------------------------


async def _due(env: WorkflowEnvironment) -> Played:
    bank = Bank(env)
    async with serving(env, bank):
        await bank.reserve()
        return await ended(bank, bank.handle)


async def _signalled(env: WorkflowEnvironment, signal: str) -> Played:
    bank = Bank(env)
    async with serving(env, bank):
        await bank.reserve()
        await bank.handle.signal(signal)
        return await ended(bank, bank.handle)


async def _ended_by_others(env: WorkflowEnvironment, *, told: bool) -> Played:
    bank = Bank(env)
    async with serving(env, bank):
        await bank.reserve()
        assert bank.state is not None
        bank.state = HoldState("SETTLED", bank.state.expires_at)
        if told:
            await bank.handle.signal("look")
        return await ended(bank, bank.handle)


async def _told_for_nothing(env: WorkflowEnvironment) -> Played:
    """A part was released: the hold goes on."""
    bank = Bank(env)
    async with serving(env, bank):
        await bank.reserve()
        await bank.handle.signal("look")
        return await ended(bank, bank.handle)


async def _cancelled(env: WorkflowEnvironment) -> Played:
    bank = Bank(env)
    async with serving(env, bank):
        await bank.reserve()
        await bank.handle.cancel()
        return await ended(bank, bank.handle)


async def _cancelled_at_work(env: WorkflowEnvironment, step: str) -> Played:
    """The cancel arrives while the step is under way; it ends later."""
    bank = Bank(env, gates={step: asyncio.Event()})
    async with serving(env, bank):
        asking = asyncio.create_task(bank.reserve())
        if step == "release":
            await asking
            await bank.handle.signal("release")
        await bank.begun.wait()
        await bank.handle.cancel()
        await until_seen(bank.handle, "WORKFLOW_EXECUTION_CANCEL_REQUESTED")
        bank.gates[step].set()
        await asking
        return await ended(bank, bank.handle)


async def _refused(
    env: WorkflowEnvironment, code: str = "insufficient_balance", *, made_before: bool = False
) -> Played:
    bank = Bank(env, reserving=[as_application_error(Refusal(code, code))])
    bank.state = await bank.until(WEEK) if made_before else None
    async with serving(env, bank):
        return await _ask_in_vain(bank)


async def _unreachable(env: WorkflowEnvironment) -> Played:
    """The database stays away until the step gives up. It was made all the same: the answer was lost."""
    bank = Bank(env, reserving=[ApplicationError("the database is away") for _ in range(100)])
    bank.state = await bank.until(WEEK)
    async with serving(env, bank):
        asking = asyncio.create_task(_ask_in_vain(bank))
        while bank.reserving and "find" not in bank.steps:
            await env.sleep(timedelta(seconds=5))
        return await asking


async def _ask_in_vain(bank: Bank) -> Played:
    refused = None
    try:
        await bank.reserve()
    except WorkflowUpdateFailedError as error:
        refused = error.cause.type if isinstance(error.cause, ApplicationError) else str(error.cause)
    return await ended(bank, bank.handle, refused)


async def _asked_twice(env: WorkflowEnvironment) -> Played:
    bank = Bank(env)
    async with serving(env, bank):
        await asyncio.gather(bank.reserve(), bank.reserve())
        return await ended(bank, bank.handle)


async def _nothing_there(env: WorkflowEnvironment) -> Played:
    bank = Bank(env)
    async with serving(env, bank):
        return await ended(bank, await bank.start())


async def _found_again(env: WorkflowEnvironment) -> Played:
    bank = Bank(env)
    bank.state = await bank.until(WEEK)
    async with serving(env, bank):
        return await ended(bank, await bank.start())


async def _far_off(env: WorkflowEnvironment) -> Played:
    bank = Bank(env)
    bank.state = await bank.until(SEVENTY_DAYS)
    async with serving(env, bank):
        return await ended(bank, await bank.start())


async def _continued(env: WorkflowEnvironment) -> Played:
    """The server suggests a new run while the hold waits; what is kept is the first run's history."""
    bank = Bank(env)
    suggested = iter([True])
    with patch.object(Info, "is_continue_as_new_suggested", lambda _: next(suggested, False)):
        async with serving(env, bank, workflow_runner=UnsandboxedWorkflowRunner()):
            await bank.reserve()
            played = await ended(bank, bank.handle)
    handle = env.client.get_workflow_handle(bank.handle.id, run_id=bank.first_run_id)
    return Played(bank, handle, (await handle.describe()).status, played.result)


# --- HoldEnds --------------------------------------------------------------------------------------------------------


async def _carrying(env: WorkflowEnvironment, *due: DueHoldsReport | timedelta) -> Played:
    bank = Bank(env, due=list(due))
    async with serving(env, bank):
        return await ended(bank, await bank.wake())


async def _ordered(env: WorkflowEnvironment) -> Played:
    bank = Bank(env, due=[timedelta(days=1)])
    bank.state = await bank.until(WEEK)
    async with serving(env, bank):
        handle = await bank.wake()
        await handle.signal("forfeit", args=[bank.hold_id, "and this"])
        await handle.signal("release", 60)
        await handle.signal("release")
        await handle.signal("forfeit", bank.hold_id)
        await handle.signal("run_now")
        return await ended(bank, handle)


async def _ends_cancelled(env: WorkflowEnvironment) -> Played:
    bank = Bank(env, gates={"end due": asyncio.Event()})
    async with serving(env, bank):
        handle = await bank.wake()
        await bank.begun.wait()
        await handle.cancel()
        await until_seen(handle, "WORKFLOW_EXECUTION_CANCEL_REQUESTED")
        bank.gates["end due"].set()
        return await ended(bank, handle)


async def until_seen(handle: WorkflowHandle[Any, Any], event: str) -> None:
    """Wait until the workflow has dealt with the event of this type."""
    for _ in range(1_000):
        events = [seen.event_type for seen in (await handle.fetch_history()).events]
        names = [_EVENT_NAMES[number] for number in events]
        if event in names and "WORKFLOW_TASK_COMPLETED" in names[names.index(event) :]:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{event} was not seen")


_EVENT_NAMES = {number: name.removeprefix("EVENT_TYPE_") for name, number in EventType.items()}


SCENARIOS: dict[str, Callable[[WorkflowEnvironment], Awaitable[Played]]] = {
    "holds_until_due": _due,
    "holds_until_released_by_signal": lambda env: _signalled(env, "release"),
    "holds_until_forfeited_by_signal": lambda env: _signalled(env, "forfeit"),
    "holds_and_finds_nothing_at_the_end": lambda env: _ended_by_others(env, told=False),
    "holds_until_told_to_look": lambda env: _ended_by_others(env, told=True),
    "holds_on_after_a_look": _told_for_nothing,
    "holds_until_cancelled": _cancelled,
    "holds_and_is_cancelled_while_it_reserves": lambda env: _cancelled_at_work(env, "reserve"),
    "holds_and_is_cancelled_while_it_releases": lambda env: _cancelled_at_work(env, "release"),
    "holds_nothing_when_refused": _refused,
    "holds_what_was_made_in_a_lost_attempt": lambda env: _refused(env, "service_unavailable", made_before=True),
    "holds_what_was_made_without_an_answer": _unreachable,
    "holds_once_when_asked_twice": _asked_twice,
    "holds_nothing_without_a_reservation": _nothing_there,
    "holds_on_after_its_workflow_was_lost": _found_again,
    "holds_for_long_and_looks_now_and_then": _far_off,
    "holds_on_in_a_new_run": _continued,
    "ends_holds_and_is_gone_after_an_idle_minute": lambda env: _carrying(env),
    "ends_holds_when_they_fall_due": lambda env: _carrying(env, timedelta(seconds=30), timedelta(hours=36)),
    "ends_holds_at_once_while_there_are_more": lambda env: _carrying(
        env, DueHoldsReport(200, True, None), DueHoldsReport(3, False, None)
    ),
    "ends_holds_far_ahead_and_looks_now_and_then": lambda env: _carrying(env, SEVENTY_DAYS),
    "ends_holds_by_order": _ordered,
    "ends_holds_until_cancelled": _ends_cancelled,
}
"""Every path by its name."""


async def record(version: str, scenarios: Mapping[str, Callable[[WorkflowEnvironment], Awaitable[Any]]]) -> None:
    """Write `histories/<scenario>.<version>.json` for every scenario that has no such file yet."""
    async with time_skipping() as env:
        for name, play in scenarios.items():
            path = HISTORIES / f"{name}.{version}.json"
            if path.exists():
                continue
            played = await play(env)
            history = without_traces(json.loads((await played.handle.fetch_history()).to_json()))
            if played.status == WorkflowExecutionStatus.CONTINUED_AS_NEW:
                suggest(history)
            path.write_text(json.dumps(history, indent=1) + "\n")


def without_traces(value: Any) -> Any:
    """`value` without stack traces: they name places of the machine on which it was recorded."""
    if isinstance(value, dict):
        return {name: without_traces(member) for name, member in value.items() if name != "stackTrace"}
    return [without_traces(item) for item in value] if isinstance(value, list) else value


def suggest(history: dict[str, Any]) -> None:
    """Note the suggestion that the run was given in the task in which it took it up."""
    tasks = [event for event in history["events"] if "workflowTaskStartedEventAttributes" in event]
    tasks[-1]["workflowTaskStartedEventAttributes"]["suggestContinueAsNew"] = True


if __name__ == "__main__":
    asyncio.run(record(sys.argv[1], SCENARIOS))
