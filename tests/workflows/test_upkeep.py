"""Upkeep as Temporal carries it: its runs, its steps over all organizations, its schedules. docs/upkeep.md."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

import psycopg
import pytest
from temporalio.client import Client, ScheduleOverlapPolicy
from temporalio.testing import ActivityEnvironment, WorkflowEnvironment

from activities.threads import ThreadDatabases
from activities.upkeep import UpkeepActivities, UpkeepReport, UpkeepRequest
from db.session import Database
from domain import upkeep as domain
from domain.ledger.checkpoints import append_checkpoints
from settings import Settings
from tests.builders import open_shop
from tests.conftest import SettableClock, Tenant
from tests.due_support import timed_hold
from tests.holdings_support import Desk
from tests.workflows.record import HISTORIES
from tests.workflows.scenarios import time_skipping
from tests.workflows.upkeep_scenarios import FIRST, SCENARIOS, Played
from workflows.schedules import ensure_schedules
from workflows.upkeep import DRIFT_ID, RECONCILE_ID, UPKEEP_ID

NOON = datetime.fromisoformat("2025-01-15T12:00:00+00:00")
ONE_O_CLOCK = NOON + timedelta(hours=1)


@pytest.fixture(scope="module")
async def env() -> AsyncIterator[WorkflowEnvironment]:
    async with time_skipping() as env:
        yield env


@pytest.fixture
def upkeep(
    settings: Settings, shared_clock: SettableClock, monkeypatch: pytest.MonkeyPatch
) -> Iterator[UpkeepActivities]:
    monkeypatch.setattr("domain.limits.SWEEP_S", 600.0)
    databases = ThreadDatabases(settings.database_url.get_secret_value(), shared_clock)
    yield UpkeepActivities(databases)
    closing = threading.Thread(target=databases.close)
    closing.start()
    closing.join()


@pytest.fixture
async def desk(database: Database, organization: Tenant, clock: SettableClock) -> Desk:
    clock.set(NOON)
    return Desk.of(database, organization.id, await open_shop(database, organization.id, inventory_mode="LOT"))


def is_the_start_of(played: Played) -> bool:
    """Whether every step was told the one instant at which the run began."""
    dues = {due for _, _, due in played.steps.asked if due is not None}
    return {round((due - played.started_at).total_seconds()) for due in dues} == {0} and len(dues) == 1


async def step(activity: Callable[[UpkeepRequest], UpkeepReport], request: UpkeepRequest) -> UpkeepReport:
    """Run an activity in a thread of its own, as a worker does."""
    return await asyncio.to_thread(ActivityEnvironment().run, activity, request)


async def test_a_run_goes_through_all_organizations_for_the_instant_of_its_start(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["keeps_up_through_all_organizations"](env)

    assert played.result == {"organizations": 2, "failed": 1, "matured": 5, "expired": 1}
    assert [(name, after) for name, after, _ in played.steps.asked] == [("sweep", None), ("sweep", FIRST)]
    assert is_the_start_of(played)


async def test_a_step_that_fails_is_repeated(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["keeps_up_after_a_fault"](env)

    assert [after for _, after, _ in played.steps.asked] == [None, None]


async def test_a_new_run_goes_on_where_the_one_before_stopped(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["keeps_up_in_a_new_run"](env)

    assert [after for _, after, _ in played.steps.asked] == [None, FIRST]
    assert is_the_start_of(played)


async def test_reconcile_starts_what_is_missing_and_maintains(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["keeps_temporal_reconciled"](env)

    assert [name for name, _, _ in played.steps.asked] == ["reconcile", "maintain"]
    assert played.result["holds started"] == 2


async def test_drift_is_looked_for_everywhere(env: WorkflowEnvironment) -> None:
    played = await SCENARIOS["keeps_an_eye_on_drift"](env)

    assert [name for name, _, _ in played.steps.asked] == ["find_drift"]


async def test_a_sweep_reaches_every_organization(
    upkeep: UpkeepActivities,
    desk: Desk,
    database: Database,
    new_organization: Callable[[], Tenant],
    clock: SettableClock,
) -> None:
    other = new_organization()
    theirs = Desk.of(database, other.id, await open_shop(database, other.id, inventory_mode="LOT"))
    for one in (desk, theirs):
        await one.grant("10", expires_at=ONE_O_CLOCK)
        await one.grant("20", matures_at=ONE_O_CLOCK)

    clock.set(ONE_O_CLOCK - timedelta(seconds=30))

    report = await step(upkeep.sweep, UpkeepRequest(None, due=ONE_O_CLOCK))

    assert report.finished
    assert [await one.buckets() for one in (desk, theirs)] == [("20", "0", "0")] * 2


async def test_an_organization_that_goes_wrong_does_not_keep_others_waiting(
    upkeep: UpkeepActivities,
    new_organization: Callable[[], Tenant],
    desk: Desk,
    clock: SettableClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new_organization()
    await desk.grant("10", expires_at=ONE_O_CLOCK)
    clock.set(ONE_O_CLOCK)
    process_due_lots = domain.process_due_lots
    broken: list[UUID] = []

    async def fails_for_others(database: Database, organization_id: UUID, *about: Any, **how: Any) -> Any:
        if organization_id != desk.organization_id:
            broken.append(organization_id)
            raise ValueError("something about its data")
        return await process_due_lots(database, organization_id, *about, **how)

    monkeypatch.setattr(domain, "process_due_lots", fails_for_others)

    report = await step(upkeep.sweep, UpkeepRequest(None))

    assert report.finished
    assert broken
    assert report.failed == len(set(broken))
    assert report.counts["failures"] == 2 * report.failed, "both kinds of each"
    assert await desk.buckets() == ("0", "0", "0")


async def test_organizations_take_turns_a_slice_each(
    upkeep: UpkeepActivities,
    database: Database,
    desk: Desk,
    new_organization: Callable[[], Tenant],
    clock: SettableClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The backlog of one doesn't keep the others waiting."""
    other = new_organization()
    theirs = Desk.of(database, other.id, await open_shop(database, other.id, inventory_mode="LOT"))
    await theirs.grant("1", expires_at=ONE_O_CLOCK)
    for _ in range(6):
        await desk.grant("1", expires_at=ONE_O_CLOCK)
    clock.set(ONE_O_CLOCK)
    monkeypatch.setattr("domain.limits.DUE_LOTS", 2)
    monkeypatch.setattr(domain.Sweep.go_on, "__defaults__", (1,))
    turns: list[UUID] = []
    process_due_lots = domain.process_due_lots

    async def seen(database: Database, organization_id: UUID, kind: str, **how: Any) -> tuple[int, bool]:
        written, more = await process_due_lots(database, organization_id, kind, **how)  # type: ignore[arg-type]
        if written:
            turns.append(organization_id)
        return written, more

    monkeypatch.setattr(domain, "process_due_lots", seen)

    report = await step(upkeep.sweep, UpkeepRequest(None))

    assert report.finished
    ours = [turn for turn in turns if turn in (desk.organization_id, other.id)]
    assert sorted(ours[:2]) == sorted([desk.organization_id, other.id])
    assert ours[2:] == [desk.organization_id] * 2


async def test_a_backlog_that_outlasts_the_step_is_for_another_round(
    upkeep: UpkeepActivities, desk: Desk, clock: SettableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first organization on: all get a slice again."""
    for _ in range(3):
        await desk.grant("1", expires_at=ONE_O_CLOCK)
    clock.set(ONE_O_CLOCK)
    monkeypatch.setattr("domain.limits.DUE_LOTS", 1)
    monkeypatch.setattr(domain.Sweep.go_on, "__defaults__", (1,))
    pages, over = iter([[desk.organization_id], []]), iter([False, False])

    async def next_page(*_: Any) -> list[UUID]:
        return next(pages)

    monkeypatch.setattr("activities.upkeep.organizations_after", next_page)
    monkeypatch.setattr("activities.upkeep._Span.is_over", lambda _: next(over, True))

    report = await step(upkeep.sweep, UpkeepRequest(None))

    assert (report.after, report.finished, report.organizations) == (None, False, 0)
    assert report.counts["expired"] == 1


async def test_a_step_that_is_cancelled_stops_after_the_batch_under_way(
    upkeep: UpkeepActivities, new_organization: Callable[[], Tenant]
) -> None:
    new_organization()
    new_organization()
    environment = ActivityEnvironment()
    environment.cancel()

    report = await asyncio.to_thread(environment.run, upkeep.sweep, UpkeepRequest(None))

    assert (report.finished, report.organizations) == (False, 1)


async def test_a_worker_that_shuts_down_is_not_kept_waiting(
    upkeep: UpkeepActivities, new_organization: Callable[[], Tenant]
) -> None:
    new_organization()
    new_organization()
    environment = ActivityEnvironment()
    environment.worker_shutdown()

    report = await asyncio.to_thread(environment.run, upkeep.sweep, UpkeepRequest(None))

    assert (report.finished, report.organizations) == (False, 1)


async def test_a_sweep_ends_holds_that_are_overdue(upkeep: UpkeepActivities, desk: Desk, clock: SettableClock) -> None:
    await desk.credit("100")
    await timed_hold(desk, "30", ONE_O_CLOCK, carrier="WORKFLOW")

    clock.set(ONE_O_CLOCK + timedelta(seconds=59))
    await step(upkeep.sweep, UpkeepRequest(None))
    assert await desk.buckets() == ("70", "30", "0"), "its workflow has a minute"
    clock.advance(seconds=1)
    await step(upkeep.sweep, UpkeepRequest(None))
    assert await desk.buckets() == ("100", "0", "0")


async def test_maintenance_checkpoints_and_drift_are_counted(
    upkeep: UpkeepActivities, desk: Desk, owner: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner.execute(
        "update lane set drained_until = clock_timestamp() + interval '1 day' where program_id = %s", (desk.program_id,)
    )

    maintained = await step(upkeep.maintain, UpkeepRequest(None))
    checked = await step(upkeep.find_drift, UpkeepRequest(None))

    assert maintained.finished
    assert maintained.counts["promises withdrawn"] >= 1
    assert checked.finished
    assert checked.failed == 0


async def test_a_backlog_of_checkpoints_is_worked_off_a_share_a_run(
    upkeep: UpkeepActivities,
    database: Database,
    desk: Desk,
    new_organization: Callable[[], Tenant],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody waits until the organization before is through with it."""
    other = new_organization()
    theirs = Desk.of(database, other.id, await open_shop(database, other.id))
    for _ in range(5):
        await desk.credit("1")
    await theirs.credit("1")
    monkeypatch.setattr("domain.limits.CHECKPOINT_SPAN", 1)
    monkeypatch.setattr("domain.limits.CHECKPOINT_PASSES", 2)
    monkeypatch.setattr("activities.upkeep.append_checkpoints", partial(append_checkpoints, min_entries=1))

    reached = []
    for _ in range(3):
        assert (await step(upkeep.maintain, UpkeepRequest(None))).finished
        reached.append((await checkpointed(desk), await checkpointed(theirs)))

    assert reached == [(2, 1), (4, 1), (5, 1)]


async def test_a_backlog_of_checkpoints_never_holds_a_step_to_one_organization(
    upkeep: UpkeepActivities, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the step's time is over before its share, the next step goes on with the others all the same."""
    for _ in range(3):
        await desk.credit("1")
    pages = iter([[desk.organization_id], []])

    async def next_page(*_: Any) -> list[UUID]:
        return next(pages)

    monkeypatch.setattr("activities.upkeep.organizations_after", next_page)
    monkeypatch.setattr("domain.limits.CHECKPOINT_SPAN", 1)
    monkeypatch.setattr("domain.limits.SWEEP_S", -1.0)
    monkeypatch.setattr("activities.upkeep.append_checkpoints", partial(append_checkpoints, min_entries=1))

    report = await step(upkeep.maintain, UpkeepRequest(None))

    assert (report.after, report.finished, report.organizations) == (desk.organization_id, False, 1)
    assert await checkpointed(desk) == 1


async def checkpointed(desk: Desk) -> int:
    """The sequence up to which there are checkpoints."""
    async with desk.database.transaction(desk.organization_id) as tx:
        rows = await tx.rows("select max(sequence) as reached from system_checkpoint")
    reached: int = rows[0]["reached"]
    return reached


async def test_an_activity_whose_time_is_over_says_where_to_go_on(
    upkeep: UpkeepActivities,
    new_organization: Callable[[], Tenant],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new_organization()
    monkeypatch.setattr("domain.limits.SWEEP_S", -1.0)

    report = await step(upkeep.sweep, UpkeepRequest(None))

    assert (report.finished, report.organizations) == (False, 1)
    assert report.after is not None


async def test_schedules_are_made_once_kept_up_to_date_and_stay_paused(temporal: Client) -> None:
    await ensure_schedules(temporal)
    paused = temporal.get_schedule_handle(RECONCILE_ID)
    await paused.pause(note="by an operator")
    await ensure_schedules(temporal)

    assert (await paused.describe()).schedule.state.paused
    await paused.unpause()
    for schedule_id, every in ((UPKEEP_ID, 30), (RECONCILE_ID, 300), (DRIFT_ID, 3_600)):
        schedule = (await temporal.get_schedule_handle(schedule_id).describe()).schedule
        assert [interval.every for interval in schedule.spec.intervals] == [timedelta(seconds=every)]
        assert schedule.spec.jitter
        assert schedule.policy.overlap == ScheduleOverlapPolicy.SKIP
        assert schedule.policy.catchup_window == timedelta(minutes=5)


@pytest.mark.usefixtures("running_worker")
async def test_an_operator_triggers_upkeep_and_what_is_due_is_booked(
    temporal: Client, desk: Desk, clock: SettableClock
) -> None:
    await desk.grant("10", expires_at=ONE_O_CLOCK)
    clock.set(ONE_O_CLOCK)
    await ensure_schedules(temporal)

    await temporal.get_schedule_handle(UPKEEP_ID).trigger()

    for _ in range(600):
        if await desk.buckets() == ("0", "0", "0"):
            break
        await asyncio.sleep(0.05)
    assert await desk.buckets() == ("0", "0", "0")


def test_every_path_is_recorded() -> None:
    """tests/workflows/test_event_processing.py replays whatever is recorded."""
    assert {path.name.partition(".")[0] for path in HISTORIES.glob("*.json")} >= set(SCENARIOS)
