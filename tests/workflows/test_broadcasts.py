"""How Broadcasts works off a program's fan-outs, and what operators can do. Contract: tiers-and-automations.md B5, B7;
docs/automations.md.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

import httpx
import pytest
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowHandle
from temporalio.service import RPCError, RPCStatusCode
from temporalio.testing import ActivityEnvironment, WorkflowEnvironment
from temporalio.worker import Worker

from activities.broadcasts import AutomationActivities, CancelOrder, FanOutActivities, FanOutReport, FanOutRequest
from activities.threads import ThreadDatabases
from db.session import Database
from domain import faults, limits
from domain.ids import new_id
from settings import Settings
from tests.automations_support import NOON, AutomatedProgram
from tests.conftest import SettableClock, Tenant
from tests.events_support import HttpProgram, counter
from tests.workflows import broadcast_scenarios
from tests.workflows.broadcast_scenarios import SCENARIOS
from tests.workflows.record import HISTORIES
from tests.workflows.scenarios import time_skipping
from workflows.broadcasts import Broadcasts, workflow_id
from workflows.gateway import Gateway
from workflows.reconcile import find_lost_broadcasts, reconcile_broadcasts

COMPLETED, CANCELED = WorkflowExecutionStatus.COMPLETED, WorkflowExecutionStatus.CANCELED


@pytest.fixture(scope="module")
async def env() -> AsyncIterator[WorkflowEnvironment]:
    async with time_skipping() as env:
        yield env


# --- the workflow ---


@pytest.mark.parametrize(
    ("scenario", "steps", "status"),
    [
        ("broadcasts_and_is_gone_after_an_idle_minute", ["fan out"], COMPLETED),
        ("broadcasts_on_at_once_while_there_is_more", ["fan out", "fan out"], COMPLETED),
        ("broadcasts_again_when_woken", ["fan out", "fan out"], COMPLETED),
        ("broadcasts_again_when_woken_at_work", ["fan out", "fan out"], COMPLETED),
        ("broadcasts_again_after_a_fault", ["fan out", "fan out"], COMPLETED),
        ("broadcasts_as_the_queue_has_room", ["fan out"] * 5, COMPLETED),
        ("broadcasts_until_one_is_cancelled", ["fan out", "cancel one", "fan out"], COMPLETED),
        ("broadcasts_nothing_and_cancels_one", ["fan out", "fan out", "cancel one"], COMPLETED),
        ("broadcasts_until_cancelled_at_work", ["fan out", "cancel the one under way"], CANCELED),
        ("broadcasts_until_cancelled_at_rest", ["fan out"], CANCELED),
        (
            "broadcasts_on_in_a_new_run",
            ["fan out", "fan out"],
            WorkflowExecutionStatus.CONTINUED_AS_NEW,
        ),
    ],
)
@pytest.mark.parametrize("cached", [True, False], ids=["", "evicted at every step"])
async def test_broadcasts(
    env: WorkflowEnvironment,
    monkeypatch: pytest.MonkeyPatch,
    scenario: str,
    steps: list[str],
    status: WorkflowExecutionStatus,
    cached: bool,
) -> None:
    if not cached:
        monkeypatch.setattr(broadcast_scenarios, "Worker", partial(Worker, max_cached_workflows=0))

    played = await SCENARIOS[scenario](env)

    # An order that comes at rest is carried out beside the next step, in either order.
    assert sorted(played.fan_outs.steps) == sorted(steps)
    assert played.fan_outs.steps[0] == steps[0]
    assert played.status == status


async def test_a_full_queue_is_left_alone_the_longer_the_less_it_moves(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["broadcasts_as_the_queue_has_room"](env)

    assert await timers(played.handle) == [0.5, 1, 2, 0.5, 60]


async def timers(handle: WorkflowHandle[Any, Any]) -> list[float]:
    """How long each sleep was to be, in seconds."""
    return [
        event.timer_started_event_attributes.start_to_fire_timeout.ToMilliseconds() / 1000
        for event in (await handle.fetch_history()).events
        if event.HasField("timer_started_event_attributes")
    ]


async def test_cancelling_at_a_full_queue_cancels_the_one_under_way(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["broadcasts_until_cancelled_at_a_full_queue"](env)

    assert played.fan_outs.steps[-1] == "cancel the one under way"
    assert set(played.fan_outs.steps[:-1]) == {"fan out"}
    assert played.status == CANCELED


def test_every_path_is_recorded() -> None:
    """tests/workflows/test_event_processing.py replays whatever is recorded."""
    assert {path.name.partition(".")[0] for path in HISTORIES.glob("*.json")} >= set(SCENARIOS)


# --- the steps ---


@pytest.fixture
async def program(database: Database, organization: Tenant, clock: SettableClock) -> AutomatedProgram:
    clock.set(NOON)
    return await AutomatedProgram.open(database, organization.id)


@pytest.fixture
def woken() -> list[tuple[UUID, UUID]]:
    """Whose event processing was woken."""
    return []


@pytest.fixture
def fan_outs(
    settings: Settings, shared_clock: SettableClock, woken: list[tuple[UUID, UUID]]
) -> Iterator[FanOutActivities]:
    databases = ThreadDatabases(settings.database_url.get_secret_value(), shared_clock)
    yield FanOutActivities(databases, lambda *whose: woken.append(whose))
    closing = threading.Thread(target=databases.close)
    closing.start()
    closing.join()


@pytest.fixture
def step(fan_outs: FanOutActivities, program: AutomatedProgram) -> Callable[[], Awaitable[FanOutReport]]:
    """Run a step for the program, in a thread of its own, as a worker does."""
    request = FanOutRequest(program.organization_id, program.id)

    async def run() -> FanOutReport:
        return await asyncio.to_thread(ActivityEnvironment().run, fan_outs.fan_out, request)

    return run


Step = Callable[[], Awaitable[FanOutReport]]


async def test_a_step_works_through_every_fan_out_of_the_program_and_wakes_its_event_processing(
    program: AutomatedProgram, step: Step, woken: list[tuple[UUID, UUID]]
) -> None:
    members = await program.members(700)
    for _ in range(2):
        await program.add()

    assert await step() == FanOutReport(events=1_400, finished=2)

    assert await program.reached() == members * 2
    assert set(woken) == {(program.organization_id, program.id)}


async def test_a_step_with_nothing_to_do_wakes_nobody(
    program: AutomatedProgram, step: Step, woken: list[tuple[UUID, UUID]]
) -> None:
    await program.add()

    assert await step() == FanOutReport(events=0, finished=1)
    assert await step() == FanOutReport(events=0, finished=0)
    assert woken == []


async def test_a_step_whose_time_is_over_says_how_far_it_has_come(
    program: AutomatedProgram, step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "FAN_OUT_S", -1.0)
    await program.members(700)
    made = await program.add()

    report = await step()

    assert (report.events, report.finished, report.more, report.is_held_back) == (500, 0, True, False)
    assert report.under_way is not None
    assert (report.under_way.automation_id, report.under_way.name) == (made.id, made.name)
    assert (report.under_way.processed, report.under_way.total) == (500, 700)


async def test_a_step_gives_way_to_a_full_queue(
    program: AutomatedProgram, step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "FAN_OUT_BACKLOG", 800)
    await program.members(1_200)
    await program.add()

    report = await step()

    assert (report.events, report.more, report.is_held_back) == (1_000, True, True)


async def test_an_attempt_that_is_lost_after_a_commit_loses_and_doubles_nothing(
    program: AutomatedProgram, step: Step
) -> None:
    members = await program.members(1_200)
    await program.add()
    with faults.arm("fan_out.committed=fail@2"), pytest.raises(faults.InjectedFault):
        await step()

    await step()

    assert await program.reached() == members


async def test_a_step_returns_when_the_fan_out_under_way_is_cancelled(
    program: AutomatedProgram, fan_outs: FanOutActivities, step: Step, database: Database
) -> None:
    """Its workflow may have been cancelled with it, and others are to go on in a later step."""
    await program.members(1_200)
    cancelled, _ = await program.add(), await program.add()
    has_begun, is_cancelled = threading.Event(), threading.Event()

    def wait_for_the_cancel(*_: UUID) -> None:
        has_begun.set()
        assert is_cancelled.wait(timeout=30)

    fan_outs._wake = wait_for_the_cancel
    working = asyncio.ensure_future(step())
    assert await asyncio.to_thread(has_begun.wait, 30)
    order = CancelOrder(program.organization_id, program.id, None)
    assert await ActivityEnvironment().run(AutomationActivities(database).cancel_automation, order)
    is_cancelled.set()
    report = await working

    assert (report.events, report.finished, report.more) == (1_000, 0, True)
    assert (await program.stored(cancelled.id)).participants_processed == 500


async def test_an_order_to_cancel_what_is_not_there_is_no_fault(program: AutomatedProgram, database: Database) -> None:
    activities = AutomationActivities(database)
    done = await program.add()
    await program.cancel(done.id)

    for automation_id in (None, new_id(), done.id):
        order = CancelOrder(program.organization_id, program.id, automation_id)
        assert not await ActivityEnvironment().run(activities.cancel_automation, order)


# --- what should be running ---


class Told(Gateway):
    """Notes who is woken; `fails` are programs that Temporal doesn't take."""

    def __init__(self, *fails: UUID) -> None:
        self.woken: list[UUID] = []
        self.fails = fails

    async def wake_broadcasts(self, organization_id: UUID, program_id: UUID, program_name: str) -> None:
        if program_id in self.fails:
            raise RPCError("not this one", RPCStatusCode.INVALID_ARGUMENT, b"")
        self.woken.append(program_id)


async def test_reconcile_wakes_what_should_be_running(
    program: AutomatedProgram, database: Database, clock: SettableClock
) -> None:
    sibling = await AutomatedProgram.open(database, program.organization_id)
    for one in (program, sibling):
        await one.add()

    gateway = Told(program.id)
    woken = await reconcile_broadcasts(database, gateway)

    assert woken == len(gateway.woken)
    assert sibling.id in gateway.woken, "though Temporal didn't take the other"


async def test_a_lost_wake_is_found_after_ten_seconds(
    program: AutomatedProgram, database: Database, clock: SettableClock
) -> None:
    async def is_found() -> bool:
        gateway = Told()
        await find_lost_broadcasts(database, gateway)
        return program.id in gateway.woken

    await program.add()
    clock.advance(seconds=9.9)
    assert not await is_found()
    clock.advance(seconds=0.1)
    assert await is_found()


# --- all together ---


async def eventually(is_so: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(1_500):
        if await is_so():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it didn't become so")


@pytest.fixture
async def live(database: Database, organization: Tenant) -> AutomatedProgram:
    """A program by the real time, as Temporal has it."""
    return await AutomatedProgram.open(database, organization.id)


async def statuses(program: AutomatedProgram) -> dict[str, int]:
    return dict(
        await program.sql("select status, count(*)::int from event where program_id = %s group by status", program.id)
    )


@pytest.mark.usefixtures("running_worker")
class TestWithAWorker:
    async def test_a_broadcast_reaches_everybody_and_their_events_are_processed(
        self, live: AutomatedProgram, gateway: Gateway, temporal: Client
    ) -> None:
        members = await live.members(1_200)
        await live.add(trigger_at=datetime.now(NOON.tzinfo))

        await gateway.wake_broadcasts(live.organization_id, live.id, "Loyalty")

        async def are_done() -> bool:
            return await statuses(live) == {"COMPLETED": 1_200}

        await eventually(are_done)
        assert await live.reached() == members
        await temporal.get_workflow_handle(workflow_id(live.id)).cancel()

    async def test_a_scheduled_event_is_processed_when_it_is_due(
        self, live: AutomatedProgram, gateway: Gateway
    ) -> None:
        (alice,) = await live.members(1)
        at = datetime.now(NOON.tzinfo) + timedelta(seconds=2)
        await live.schedule(at, participant_id=alice)
        await gateway.wake_event_processing(live.organization_id, live.id, "Loyalty")

        async def is_done() -> bool:
            return await statuses(live) == {"COMPLETED": 1}

        await eventually(is_done)
        (event,) = await live.events()
        assert event["created_at"] >= event["event_timestamp"] == at

    async def test_an_operator_cancels_one_broadcast_and_others_go_on(
        self, live: AutomatedProgram, gateway: Gateway, temporal: Client
    ) -> None:
        members = await live.members(10)
        await live.change("program", processing_paused=True)
        cancelled, other = await live.add(), await live.add()
        await gateway.wake_broadcasts(live.organization_id, live.id, "Loyalty")
        handle = temporal.get_workflow_handle(workflow_id(live.id))

        await handle.signal(Broadcasts.cancel, cancelled.id)

        async def is_cancelled() -> bool:
            return (await live.stored(cancelled.id)).execution_error == "canceled"

        await eventually(is_cancelled)
        await live.change("program", processing_paused=False)
        await gateway.wake_broadcasts(live.organization_id, live.id, "Loyalty")

        async def is_completed() -> bool:
            return (await live.stored(other.id)).execution_status == "completed"

        await eventually(is_completed)
        assert await live.reached() == members
        await handle.cancel()

    async def test_cancelling_the_workflow_cancels_the_broadcast_under_way(
        self, live: AutomatedProgram, gateway: Gateway, temporal: Client, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(limits, "FAN_OUT_BACKLOG", 1)
        monkeypatch.setattr("activities.broadcasts.fan_out_batch", _one_by_one)
        await live.members(1_000)
        made = await live.add()
        await gateway.wake_broadcasts(live.organization_id, live.id, "Loyalty")
        handle = temporal.get_workflow_handle(workflow_id(live.id))

        async def has_begun() -> bool:
            return bool(await live.reached())

        await eventually(has_begun)
        await handle.cancel()

        async def is_cancelled() -> bool:
            return (await handle.describe()).status == CANCELED

        await eventually(is_cancelled)
        stored = await live.stored(made.id)
        assert (stored.status, stored.execution_error) == ("archived", "canceled")
        reached = len(await live.reached())
        assert 0 < reached == (stored.participants_processed or 0) < 1_000


async def _one_by_one(tx: Any, program_id: UUID) -> Any:
    from domain.fan_outs import fan_out_batch

    return await fan_out_batch(tx, program_id, 1)


@pytest.mark.usefixtures("running_worker")
async def test_what_a_rule_broadcasts_and_schedules_goes_through_the_rules(client: httpx.AsyncClient) -> None:
    """Over HTTP, from the event that did it to what the events that came of it did."""
    program = await HttpProgram.open(client)
    await program.rule('event.type == "launch"', {"type": "BROADCAST", "event_name": "digest", "payload": {"bonus": 5}})
    await program.rule('event.type == "digest"', counter("digests", "event.bonus"))
    follow_up = {"type": "SCHEDULE_EVENT", "event_name": "follow_up", "delay": "1s"}
    await program.rule('event.type == "digest" && event.bonus == 5.0', follow_up)
    await program.rule('event.type == "follow_up"', counter("follow_ups", "1"))
    for name in ("alice", "bob"):
        assert (await program.run(name, type="join"))["status"] == "COMPLETED"

    launched = await program.run("alice", type="launch")
    assert launched["status"] == "COMPLETED", launched

    for name in ("alice", "bob"):

        async def has_both(name: str = name) -> bool:
            counters: dict[str, str] = (await program.participant(name))["counters"]
            return counters == {"digests": "5", "follow_ups": "1"}

        await eventually(has_both)
