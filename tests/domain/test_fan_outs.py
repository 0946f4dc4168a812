"""Goal: a broadcast reaches everybody it should, once, whatever crashes. Contract: tiers-and-automations.md B5, B7;
rules-and-events.md 5.15.

Method: fan-outs batch by batch, with everything that can happen between two batches, or within one.
"""

import asyncio
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg
import pytest

from db.session import Database
from domain import fan_outs, faults, limits
from domain.errors import Refusal
from domain.fan_outs import cancel_executing, programs_with_fan_outs
from domain.ids import event_id, new_id
from tests.automations_support import NOON, AutomatedProgram
from tests.conftest import SettableClock, Tenant


@pytest.fixture
async def program(database: Database, organization: Tenant, clock: SettableClock) -> AutomatedProgram:
    clock.set(NOON)
    return await AutomatedProgram.open(database, organization.id)


async def execution(program: AutomatedProgram, automation_id: UUID) -> tuple[str | None, int | None, int | None]:
    """(execution_status, participants_processed, participants_total)."""
    stored = await program.stored(automation_id)
    return stored.execution_status, stored.participants_processed, stored.participants_total


# --- whom it reaches ---


async def test_every_participant_of_the_program_gets_one_event_in_the_order_of_ids(program: AutomatedProgram) -> None:
    members = await program.members(2_000)
    made = await program.add()

    assert await program.fan_out(limit=300) == 2_000

    assert await program.reached() == members
    assert await execution(program, made.id) == ("completed", 2_000, 2_000)
    stored = await program.stored(made.id)
    assert (stored.status, stored.execution_error) == ("active", None)
    assert (stored.execution_started_at, stored.execution_completed_at) == (NOON, NOON)


async def test_the_events_are_system_events_of_the_broadcasts_instant(
    program: AutomatedProgram, clock: SettableClock
) -> None:
    (alice,) = await program.members(1)
    made = await program.add(event_name="weekly_digest", payload={"bonus": Decimal("50.00"), "type": "other"})
    clock.advance(hours=1)
    await program.fan_out()

    (event,) = await program.events()
    assert event["event_data"] == {"type": "weekly_digest", "bonus": Decimal("50.00")}
    assert event["idempotency_key"] == f"automation:{made.id}:2026-03-01T12:00:00.000000Z:{alice}"
    assert event["id"] == event_id(program.id, event["idempotency_key"])
    assert (event["event_type"], event["participant_id"], event["depth"]) == ("SYSTEM", alice, 1)
    assert (event["event_timestamp"], event["created_at"]) == (NOON, NOON + timedelta(hours=1))
    assert (event["request_id"], event["status"]) == ("req_1", "RECEIVED")


async def test_nobody_else_is_reached(program: AutomatedProgram, database: Database, new_organization: Any) -> None:
    members = await program.members(3)
    for status, enrollment in (("SUSPENDED", "ACTIVE"), ("CLOSED", "ACTIVE"), ("ACTIVE", "FROZEN")):
        await program.members(2, status, enrollment)
    for other in (program.organization_id, new_organization().id):
        await (await AutomatedProgram.open(database, other)).members(2)
    made = await program.add()

    await program.fan_out(limit=2)

    assert await program.reached() == members
    assert await execution(program, made.id) == ("completed", 3, 3)


async def test_who_is_enrolled_after_the_start_is_not_reached(program: AutomatedProgram, clock: SettableClock) -> None:
    members = await program.members(4)
    made = await program.add()
    await program.batch(limit=2)
    clock.advance(microseconds=1)
    await program.members(5)

    await program.fan_out(limit=2)

    assert await program.reached() == members
    assert await execution(program, made.id) == ("completed", 4, 4)


async def test_who_is_enrolled_between_the_broadcast_and_its_start_is_reached(
    program: AutomatedProgram, clock: SettableClock
) -> None:
    await program.add()
    clock.advance(hours=1)
    members = await program.members(2)

    await program.fan_out()

    assert await program.reached() == members


async def test_who_is_suspended_before_their_turn_is_left_out(program: AutomatedProgram) -> None:
    members = await program.members(4)
    made = await program.add()
    await program.batch(limit=2)
    await program.sql("update participant set status = 'SUSPENDED' where id = %s", members[3])

    await program.fan_out(limit=2)

    assert await program.reached() == members[:3]
    assert await execution(program, made.id) == ("completed", 3, 4)


async def test_progress_never_passes_the_total(program: AutomatedProgram) -> None:
    """Who was suspended at the start and isn't any more when their turn comes is reached, and counted."""
    await program.members(2)
    suspended = await program.members(1, "SUSPENDED")
    made = await program.add()
    await program.batch(limit=2)
    await program.sql("update participant set status = 'ACTIVE' where id = %s", suspended[0])

    await program.fan_out(limit=2)

    assert await execution(program, made.id) == ("completed", 3, 3)


async def test_a_program_without_participants_is_done_at_once(program: AutomatedProgram) -> None:
    made = await program.add()

    assert await program.fan_out() == 0
    assert await execution(program, made.id) == ("completed", 0, 0)


async def test_a_page_of_nothing_but_suspended_participants_does_not_end_it(program: AutomatedProgram) -> None:
    first = await program.members(1)
    await program.members(6, "SUSPENDED")
    last = await program.members(1)
    await program.add()

    await program.fan_out(limit=2)

    assert await program.reached() == first + last


async def test_a_broadcast_to_too_many_fails_and_reaches_nobody(
    program: AutomatedProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "FAN_OUT_PARTICIPANTS", 3)
    await program.members(3)
    allowed = await program.add()
    await program.fan_out()
    await program.process_events()
    await program.members(1)
    refused = await program.add()

    await program.fan_out()

    assert await execution(program, allowed.id) == ("completed", 3, 3)
    stored = await program.stored(refused.id)
    assert (stored.execution_status, stored.execution_error) == ("failed", "more than 3 participants")
    assert stored.status == "active"
    assert len(await program.events()) == 3


# --- in batches ---


async def test_no_batch_takes_more_than_five_hundred(program: AutomatedProgram) -> None:
    await program.members(1_200)
    await program.add()

    assert [(await program.batch()).events for _ in range(4)] == [500, 500, 200, 0]


async def test_its_progress_is_seen_after_every_batch(program: AutomatedProgram) -> None:
    await program.members(5)
    made = await program.add()
    assert await execution(program, made.id) == ("pending", None, None)

    seen = []
    for _ in range(3):
        await program.batch(limit=2)
        seen.append(await execution(program, made.id))

    assert seen == [("executing", 2, 5), ("executing", 4, 5), ("completed", 5, 5)]


async def test_broadcasts_come_one_after_another_the_oldest_first(
    program: AutomatedProgram, clock: SettableClock
) -> None:
    members = await program.members(3)
    made = [await program.add(event_name=name) for name in ("first", "second")]
    clock.advance(seconds=1)
    made.append(await program.add(event_name="third"))

    await program.fan_out(limit=2)

    assert [event["event_data"]["type"] for event in await program.events()] == (
        ["first"] * 3 + ["second"] * 3 + ["third"] * 3
    )
    assert await program.reached() == members * 3
    for automation in made:
        assert await execution(program, automation.id) == ("completed", 3, 3)


async def test_it_waits_while_two_thousand_events_of_the_program_wait(
    program: AutomatedProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others' events must not queue up behind all of a broadcast's."""
    monkeypatch.setattr(limits, "FAN_OUT_BACKLOG", 4)
    await program.members(20)
    made = await program.add()

    events = [(await program.batch(limit=2)).events for _ in range(3)]
    held_back = await program.batch(limit=2)
    await program.process_events()

    assert events == [2, 2, 0]
    assert held_back.is_held_back
    assert held_back.fan_out is not None
    assert (held_back.fan_out.processed, held_back.fan_out.total) == (4, 20)
    assert (await program.batch(limit=2)).events == 2
    assert await execution(program, made.id) == ("executing", 6, 20)


async def test_a_batch_reads_its_page_and_not_the_program(
    program: AutomatedProgram, owner: psycopg.Connection[Any]
) -> None:
    """The planner takes every program for a small one: by itself it would read all of it, for each batch."""
    for status in ("ACTIVE", "SUSPENDED"):
        await program.members(10_000, status)
    sibling = await AutomatedProgram.open(program.database, program.organization_id)
    await sibling.members(5_000)
    owner.execute("analyze enrollment, participant")

    async with program.database.transaction(program.organization_id) as tx:
        await tx.execute(fan_outs._NO_SORTING)
        params = {
            "organization_id": program.organization_id,
            "program_id": program.id,
            "started_at": tx.now,
            "after": UUID(int=0),
            "last": UUID(int=2**128 - 1),
            "limit": 500,
        }
        cursor = await tx.execute(
            f"explain (analyze, costs off, timing off, summary off, format json) {fan_outs._NEXT_MEMBERS}", params
        )
        row = await cursor.fetchone()
    assert row is not None
    read = {node["Relation Name"]: node for node in _nodes(row[0][0]["Plan"]) if "Relation Name" in node}
    assert read["enrollment"]["Index Name"] == "enrollment_pkey"
    assert read["participant"]["Index Name"] == "participant_pkey"
    assert read["enrollment"]["Actual Rows"] == 500
    assert read["enrollment"].get("Rows Removed by Filter", 0) == 0


def _nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for child in plan.get("Plans", []) for node in _nodes(child))]


# --- exactly once ---


@pytest.mark.parametrize("at_pass", [1, 2, 3])
async def test_a_crash_within_a_batch_leaves_nothing_of_it_and_it_goes_on(
    program: AutomatedProgram, at_pass: int
) -> None:
    """Worked example A13: five events in all, none twice."""
    members = await program.members(5)
    made = await program.add()
    with faults.arm(f"fan_out.written=fail@{at_pass}"), pytest.raises(faults.InjectedFault):
        await program.fan_out(limit=2)

    done = 2 * (at_pass - 1)
    assert await program.reached() == members[:done]
    expected = ("executing", done, 5) if done else ("pending", None, None)
    assert await execution(program, made.id) == expected

    await program.fan_out(limit=2)

    assert await program.reached() == members
    assert await execution(program, made.id) == ("completed", 5, 5)


async def test_attempts_that_overlap_make_each_event_once(program: AutomatedProgram) -> None:
    """A worker that was taken for lost goes on beside the one that took over."""
    members = await program.members(200)
    made = [await program.add() for _ in range(2)]

    await asyncio.gather(*(program.fan_out(limit=7) for _ in range(4)))

    assert await program.reached() == members * 2
    for automation in made:
        assert await execution(program, automation.id) == ("completed", 200, 200)


async def test_going_through_it_again_makes_no_event_again(program: AutomatedProgram) -> None:
    """Whatever went wrong with the cursor: each event's key stands for it."""
    members = await program.members(5)
    made = await program.add()
    await program.fan_out(limit=2)
    await program.sql(
        "update automation set execution_status = 'executing', last_participant_id = null where id = %s", made.id
    )

    assert await program.fan_out(limit=3) == 0
    assert await program.reached() == members


# --- waiting, cancelling ---


@pytest.mark.parametrize("status", ["SUSPENDED", "ARCHIVED"])
async def test_one_that_has_not_begun_waits_for_its_program_to_be_active(
    program: AutomatedProgram, status: str
) -> None:
    members = await program.members(2)
    made = await program.add()
    await program.change("program", status=status)

    assert await program.fan_out() == 0
    assert (await program.stored(made.id)).execution_status == "pending"

    await program.change("program", status="ACTIVE")
    await program.fan_out()
    assert await program.reached() == members


async def test_one_that_has_begun_finishes_whatever_becomes_of_its_program_or_automation(
    program: AutomatedProgram,
) -> None:
    """B5: pausing doesn't touch a fan-out in progress."""
    members = await program.members(4)
    made = await program.add()
    await program.batch(limit=2)
    await program.change("program", status="SUSPENDED")
    await program.sql("update automation set status = 'paused' where id = %s", made.id)

    await program.fan_out(limit=2)

    assert await program.reached() == members


async def test_while_processing_is_paused_nothing_is_made(program: AutomatedProgram) -> None:
    await program.members(4)
    await program.add()
    await program.batch(limit=2)

    await program.change("program", processing_paused=True)
    assert await program.fan_out(limit=2) == 0
    await program.change("program", processing_paused=False)
    assert await program.fan_out(limit=2) == 2


async def test_one_that_is_cancelled_in_the_middle_stops_and_what_it_made_stays(program: AutomatedProgram) -> None:
    members = await program.members(6)
    cancelled, next_one = await program.add(), await program.add()
    await program.batch(limit=2)

    after = await program.cancel(cancelled.id)
    await program.fan_out(limit=3)

    assert (after.status, after.deleted_at) == ("archived", NOON)
    assert (after.execution_status, after.execution_error) == ("failed", "canceled")
    assert (after.execution_completed_at, after.participants_processed, after.participants_total) == (NOON, 2, 6)
    assert await execution(program, cancelled.id) == ("failed", 2, 6)
    assert await program.reached() == members[:2] + members
    assert await execution(program, next_one.id) == ("completed", 6, 6)


async def test_one_that_is_cancelled_before_its_start_makes_nothing(program: AutomatedProgram) -> None:
    await program.members(2)
    made = await program.add()

    after = await program.cancel(made.id)

    assert (after.execution_status, after.execution_error) == ("failed", "canceled")
    assert await program.fan_out() == 0


async def test_one_that_is_finished_keeps_its_outcome_when_it_is_cancelled(program: AutomatedProgram) -> None:
    """Its automation is still active, so it can be archived; once."""
    await program.members(2)
    made = await program.add()
    await program.fan_out()

    after = await program.cancel(made.id)

    assert (after.status, after.execution_status, after.execution_error) == ("archived", "completed", None)
    with pytest.raises(Refusal):
        await program.cancel(made.id)


async def test_an_operator_cancels_the_one_under_way_without_naming_it(
    program: AutomatedProgram, database: Database
) -> None:
    await program.members(6)
    first, second = await program.add(), await program.add()

    async def cancel() -> UUID | None:
        async with database.transaction(program.organization_id) as tx:
            cancelled = await cancel_executing(tx, program.id)
            return None if cancelled is None else cancelled.id

    assert await cancel() is None, "none has begun"
    await program.batch(limit=2)
    assert [await cancel(), await cancel()] == [first.id, None]
    await program.fan_out()
    assert await execution(program, second.id) == ("completed", 6, 6)


async def test_cancelling_beside_batches_stops_it_after_one_of_them(program: AutomatedProgram) -> None:
    members = await program.members(100)
    made = await program.add()

    _, after = await asyncio.gather(program.fan_out(limit=3), program.cancel(made.id))

    reached = await program.reached()
    assert reached == members[: len(reached)]
    assert len(reached) == (after.participants_processed or 0)
    assert (await program.stored(made.id)).execution_error == "canceled"


# --- what should be running ---


async def test_programs_with_something_to_do_are_found(
    program: AutomatedProgram, database: Database, clock: SettableClock
) -> None:
    async def is_found(idle_since: Any = NOON) -> bool:
        return (program.organization_id, program.id, "Loyalty") in await programs_with_fan_outs(database, idle_since)

    await program.members(4)
    await program.schedule(NOON)
    assert not await is_found(), "a scheduled event is none"
    made = await program.add()
    assert await is_found()

    assert not await is_found(NOON - timedelta(seconds=1)), "it has just been made"
    clock.advance(seconds=5)
    await program.batch(limit=2)
    assert not await is_found(), "it has moved since"
    assert await is_found(NOON + timedelta(seconds=5))

    await program.change("program", processing_paused=True)
    assert not await is_found(clock())
    await program.change("program", processing_paused=False, status="SUSPENDED")
    assert await is_found(clock()), "it has begun"
    await program.sql("update automation set execution_status = 'pending' where id = %s", made.id)
    assert not await is_found(clock())

    await program.change("program", status="ACTIVE")
    await program.fan_out()
    assert not await is_found(clock())


async def test_a_hundred_small_broadcasts_are_worked_off(program: AutomatedProgram) -> None:
    """A rule may broadcast on every event."""
    members = await program.members(2)
    event = new_id()
    for index in range(100):
        await program.add(event_id=event, action_index=index)

    await program.fan_out()

    assert await program.reached() == members * 100
