"""What rules schedule: it becomes an event once, in order, when it is due. Contract: tiers-and-automations.md B;
rules-and-events.md 5.14.
"""

import asyncio
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest

from db.session import Database
from domain import faults
from domain.errors import Refusal
from domain.events.ingest import NewEvent, payload_hash
from domain.ids import event_id, new_id
from tests.automations_support import NOON, AutomatedProgram, new_automation
from tests.conftest import SettableClock, Tenant

A_DAY = timedelta(days=1)


@pytest.fixture
async def program(database: Database, organization: Tenant, clock: SettableClock) -> AutomatedProgram:
    clock.set(NOON)
    return await AutomatedProgram.open(database, organization.id)


# --- what is stored ---


async def test_a_scheduled_event_is_a_one_time_automation_of_the_program(program: AutomatedProgram) -> None:
    alice = new_id()
    made = await program.schedule(NOON + A_DAY, event_name="check_status", participant_id=alice, depth=3)

    stored = await program.stored(made.id)

    assert (stored.trigger_type, stored.scope, stored.source, stored.status) == (
        "one_time",
        "program",
        "rule_action",
        "active",
    )
    assert (stored.trigger_at, stored.participant_id, stored.depth) == (NOON + A_DAY, alice, 3)
    assert (stored.event_name, stored.payload, stored.request_id) == ("check_status", {"bonus": 50}, "req_1")
    assert (stored.execution_status, stored.participants_total) == (None, None)


async def test_a_broadcast_is_an_immediate_automation_of_the_participants(program: AutomatedProgram) -> None:
    stored = await program.stored((await program.add()).id)

    assert (stored.trigger_type, stored.scope, stored.source, stored.status) == (
        "immediate",
        "participants",
        "rule_action",
        "active",
    )
    assert stored.execution_status == "pending"


@pytest.mark.parametrize("event_name", ["digest", "n" * 255, "é" * 255])
def test_its_name_says_where_it_came_from_within_255_characters(event_name: str) -> None:
    made = new_automation(event_name=event_name, action_index=12)

    origin = f":{made.event_id}:{made.rule_id}:12"
    assert made.name == event_name[: 255 - len(origin)] + origin
    assert len(made.name) <= 255


async def test_one_event_rule_and_action_makes_one_automation(program: AutomatedProgram) -> None:
    first = new_automation()
    again = new_automation(event_id=first.event_id, rule_id=first.rule_id)
    other_action = new_automation(event_id=first.event_id, rule_id=first.rule_id, action_index=1)

    await program.write([first, other_action])
    await program.write([again])

    rows = await program.sql("select id from automation order by action_index")
    assert [row[0] for row in rows] == [first.id, other_action.id]


# --- becoming an event ---


async def test_it_becomes_an_event_when_it_is_due_and_not_before(
    program: AutomatedProgram, clock: SettableClock
) -> None:
    made = await program.schedule(NOON + A_DAY)

    clock.set(NOON + A_DAY - timedelta(microseconds=1))
    assert await program.release() == 0
    clock.advance(microseconds=1)
    assert await program.release() == 1

    assert len(await program.events()) == 1
    stored = await program.stored(made.id)
    assert (stored.status, stored.processed_at) == ("completed", NOON + A_DAY)


async def test_the_event_is_a_system_event_with_the_payload_and_the_name_as_its_type(
    program: AutomatedProgram, clock: SettableClock
) -> None:
    """Worked example A6 and B6: key, instant and depth."""
    alice = new_id()
    made = await program.schedule(NOON + A_DAY, event_name="weekly_digest", participant_id=alice, depth=2)
    clock.set(NOON + 3 * A_DAY)
    await program.release()

    (event,) = await program.events()
    assert event["event_data"] == {"type": "weekly_digest", "bonus": Decimal(50)}
    assert event["event_type"] == "SYSTEM"
    assert event["idempotency_key"] == f"automation:{made.id}:2026-03-02T12:00:00.000000Z"
    assert event["id"] == event_id(program.id, event["idempotency_key"])
    assert event["event_timestamp"] == NOON + A_DAY, "the instant it was scheduled for"
    assert event["created_at"] == event["received_at"] == NOON + 3 * A_DAY
    assert (event["participant_id"], event["external_id"], event["status"]) == (alice, None, "RECEIVED")
    assert (event["depth"], event["request_id"], event["attempts"], event["due_at"]) == (2, "req_1", 0, None)
    same = NewEvent(program.id, event["idempotency_key"], NOON + A_DAY, event["event_data"], alice)
    assert event["payload_hash"] == payload_hash(same)


async def test_a_type_in_the_payload_loses_to_the_events_name(program: AutomatedProgram) -> None:
    await program.schedule(NOON, payload={"type": "other", "bonus": 1}, event_name="check_status")
    await program.release()

    assert (await program.events())[0]["event_data"] == {"type": "check_status", "bonus": Decimal(1)}


@pytest.mark.parametrize(
    "payload",
    [
        None,
        {},
        {"amount": Decimal("10.50"), "tiny": Decimal("1E-40"), "large": Decimal("12345678901234567890.123456789")},
        {"deep": {"list": [1, None, True, "ü"]}, "": "a member without a name"},
    ],
)
async def test_the_payload_comes_through_digit_by_digit(
    program: AutomatedProgram, payload: dict[str, Any] | None
) -> None:
    await program.schedule(NOON, payload=payload)
    await program.release()

    (event,) = await program.events()
    assert event["event_data"] == {**(payload or {}), "type": "digest"}
    (text,) = await program.sql("select event_data::text from event")
    for number in (payload or {}).values():
        assert not isinstance(number, Decimal) or str(number) in text[0]


async def test_events_enter_the_queue_in_the_order_in_which_they_were_due(
    program: AutomatedProgram, clock: SettableClock
) -> None:
    at = [NOON + timedelta(minutes=minutes) for minutes in (5, 1, 3, 1)]
    made = [await program.schedule(instant, participant_id=new_id()) for instant in at]
    clock.set(NOON + A_DAY)

    assert [await program.release(limit=3), await program.release(limit=3), await program.release(limit=3)] == [3, 1, 0]

    expected = sorted(made, key=lambda automation: (automation.trigger_at, automation.id))
    assert await program.reached() == [automation.participant_id for automation in expected]


async def test_one_whose_time_has_passed_fires_at_once(program: AutomatedProgram) -> None:
    await program.schedule(NOON - A_DAY)

    assert await program.release() == 1
    assert (await program.events())[0]["event_timestamp"] == NOON - A_DAY


async def test_a_crash_before_the_commit_leaves_it_scheduled_and_it_fires_once(program: AutomatedProgram) -> None:
    made = await program.schedule(NOON)
    with faults.arm("automations.released=fail"), pytest.raises(faults.InjectedFault):
        await program.release()

    assert await program.events() == []
    assert (await program.stored(made.id)).status == "active"
    assert [await program.release(), await program.release()] == [1, 0]
    assert len(await program.events()) == 1


async def test_making_the_same_event_again_changes_nothing(program: AutomatedProgram) -> None:
    """Whatever went wrong with the automation's row: the event's key stands for it."""
    made = await program.schedule(NOON)
    await program.release()
    await program.process_events()
    await program.sql("update automation set status = 'active' where id = %s", made.id)

    await program.release()

    (event,) = await program.events()
    assert event["status"] == "COMPLETED"


async def test_two_at_once_release_each_one_once(program: AutomatedProgram) -> None:
    for _ in range(20):
        await program.schedule(NOON)

    released = await asyncio.gather(*(program.release() for _ in range(4)))

    assert sum(released) == 20
    assert len(await program.events()) == 20


@pytest.mark.parametrize("status", ["SUSPENDED", "ARCHIVED"])
async def test_while_its_program_is_not_active_it_waits(
    program: AutomatedProgram, clock: SettableClock, status: str
) -> None:
    """B7: as if paused; it fires when the program is ACTIVE again (B6)."""
    await program.schedule(NOON + A_DAY)
    await program.change("program", status=status)
    clock.set(NOON + 2 * A_DAY)

    assert (await program.release(), await program.next_trigger()) == (0, None)

    await program.change("program", status="ACTIVE")
    assert (await program.next_trigger(), await program.release()) == (NOON + A_DAY, 1)


async def test_the_look_for_lost_wakes_finds_it_when_it_is_due_and_the_program_active(
    program: AutomatedProgram, database: Database
) -> None:
    await program.schedule(NOON + A_DAY)

    async def is_found(older_than: Any) -> bool:
        rows = await database.system_rows("select * from programs_with_due_events(%s, %s)", (older_than, 10_000))
        return (program.organization_id, program.id) in rows

    assert [await is_found(NOON), await is_found(NOON + A_DAY)] == [False, True]
    await program.change("program", status="SUSPENDED")
    assert not await is_found(NOON + A_DAY)


async def test_the_next_trigger_is_the_earliest_of_the_program(program: AutomatedProgram, database: Database) -> None:
    other = await AutomatedProgram.open(database, program.organization_id)
    assert await program.next_trigger() is None
    await other.schedule(NOON)
    for days in (3, 2, 5):
        await program.schedule(NOON + days * A_DAY)
    await program.add(trigger_at=NOON)

    assert await program.next_trigger() == NOON + 2 * A_DAY


# --- cancelling ---


async def test_a_cancelled_one_never_fires(program: AutomatedProgram, clock: SettableClock) -> None:
    made = await program.schedule(NOON + A_DAY)

    cancelled = await program.cancel(made.id)
    clock.set(NOON + 2 * A_DAY)

    assert (cancelled.status, cancelled.deleted_at, cancelled.execution_status) == ("archived", NOON, None)
    assert (await program.release(), await program.next_trigger()) == (0, None)


async def test_what_has_fired_or_is_cancelled_cannot_be_cancelled(program: AutomatedProgram) -> None:
    fired, cancelled = await program.schedule(NOON), await program.schedule(NOON + A_DAY)
    await program.release()
    await program.cancel(cancelled.id)

    for made in (fired, cancelled):
        with pytest.raises(Refusal, match="the automation is") as refusal:
            await program.cancel(made.id)
        assert refusal.value.code == "bad_request"


async def test_an_automation_is_cancelled_under_its_own_program_and_organization_only(
    program: AutomatedProgram, database: Database, new_organization: Any
) -> None:
    made = await program.schedule(NOON)
    sibling = await AutomatedProgram.open(database, program.organization_id)
    stranger = AutomatedProgram(database, new_organization().id, program.id)

    for other in (sibling, stranger):
        with pytest.raises(Refusal) as refusal:
            await other.cancel(made.id)
        assert refusal.value.code == "not_found"
    assert (await program.stored(made.id)).status == "active"


async def test_of_a_cancel_and_a_release_that_race_one_wins(program: AutomatedProgram) -> None:
    for _ in range(20):
        made = await program.schedule(NOON)
        before = len(await program.events())

        cancelled, released = await asyncio.gather(program.cancel(made.id), program.release(), return_exceptions=True)

        assert not isinstance(released, BaseException)
        assert isinstance(cancelled, Refusal) == (released == 1)
        assert len(await program.events()) - before == released
