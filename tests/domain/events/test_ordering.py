"""In which order events take effect. Contract: rules-and-events.md 7.7."""

from datetime import UTC, datetime

import pytest

from domain import faults
from domain.events.control import set_paused
from domain.events.ingest import Accepted
from domain.events.retries import RetryPolicy
from tests.conftest import SettableClock
from tests.events_support import EventProgram, attribute, counter, credit, debit


async def test_events_of_a_participant_take_effect_in_the_order_of_acceptance(program: EventProgram) -> None:
    alice = await program.participant("alice")
    await program.rule("true", attribute("trail", 'get(participant.attributes, "trail", "") + event.step'))

    for number, step in enumerate("abcdefghij"):
        await program.send("alice" if number % 2 else alice, step=step)
    await program.settle(3, 1, 2)

    assert await program.attributes() == {"trail": "abcdefghij"}


async def test_items_of_a_batch_count_as_accepted_in_input_order(program: EventProgram) -> None:
    await program.rule("true", attribute("trail", 'get(participant.attributes, "trail", "") + event.step'))

    await program.ingest([program.event("alice", key=f"k{ord(step) * 7919 % 101}", step=step) for step in "abcdefgh"])
    await program.settle(200)

    assert await program.attributes() == {"trail": "abcdefgh"}


async def test_nothing_is_reordered_by_the_time_of_the_event(program: EventProgram) -> None:
    await program.rule("true", attribute("trail", 'get(participant.attributes, "trail", "") + event.step'))

    years = {"a": 2999, "b": 1970, "c": 2025, "d": 9999, "e": 1}
    await program.ingest(
        [program.event(at=datetime(year, 1, 1, tzinfo=UTC), step=step) for step, year in years.items()]
    )
    await program.settle()

    assert await program.attributes() == {"trail": "abcde"}


async def test_an_event_in_the_future_is_processed_at_once(program: EventProgram) -> None:
    (accepted,) = await program.ingest([program.event(at=datetime(2999, 1, 1, tzinfo=UTC))])
    await program.settle()

    assert isinstance(accepted, Accepted)
    assert (await program.status(accepted.id))[0] == "COMPLETED"


async def test_a_waiting_event_does_not_hold_up_later_ones_of_its_participant(
    program: EventProgram, clock: SettableClock
) -> None:
    clock.set("2026-03-01T12:00:00Z")
    points = await program.asset()
    await program.rule("event.type == 'spend'", debit(points, "10"), counter("spent", "1"))
    await program.rule("event.type == 'visit'", counter("visits", "1"))
    retries = RetryPolicy()

    spent = await program.send(type="spend")
    visits = [await program.send(type="visit") for _ in range(3)]
    await program.settle(1, retries=retries)

    assert (await program.status(spent))[0] == "PENDING"
    assert {(await program.status(event))[0] for event in visits} == {"COMPLETED"}
    assert await program.counters() == {"visits": 3}


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 8, 200])
async def test_neither_waiting_nor_fresh_events_starve_the_other(
    program: EventProgram, clock: SettableClock, limit: int
) -> None:
    clock.set("2026-03-01T12:00:00Z")
    points = await program.asset()
    await program.rule("event.type == 'spend'", debit(points, "1"))
    for _ in range(6):
        await program.send(type="spend")
    await program.settle(retries=RetryPolicy())
    clock.advance(seconds=2)
    for _ in range(6):
        await program.send(type="visit")

    assert await program.settle(limit, retries=RetryPolicy()) == 12
    statuses = await program.sql("select status, count(*) from event group by status order by status")
    assert statuses == [("COMPLETED", 6), ("PENDING", 6)]


async def test_a_paused_program_accepts_and_waits(program: EventProgram) -> None:
    await program.rule("true", counter("n", "1"))

    async def pause(paused: bool) -> None:
        async with program.database.transaction(program.organization_id) as tx:
            await set_paused(tx, program.id, paused=paused)

    await pause(True)
    event = await program.send()
    assert await program.settle() == 0
    assert (await program.status(event))[0] == "RECEIVED"

    await pause(False)
    await program.settle()
    assert (await program.status(event))[0] == "COMPLETED"


async def test_events_accepted_before_the_program_stopped_being_active_are_processed(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule("true", credit(points, "1"))
    suspended, archived = await program.send(), await program.send()

    for event, status in ((suspended, "SUSPENDED"), (archived, "ARCHIVED")):
        await program.sql("update program set status = %s where id = %s", status, program.id)
        await program.batch(1)
        assert (await program.status(event))[0] == "COMPLETED"
    assert await program.balance("alice", points) == 2


async def test_a_batch_is_all_or_nothing(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule("true", credit(points, "1"), counter("n", "1"))
    events = [await program.send(who) for who in ("alice", "bob", "alice")]

    for point in ("batch.locked", "batch.applied", "batch.written", "ledger.written"):
        with faults.arm(f"{point}=fail"), pytest.raises(faults.InjectedFault):
            await program.batch()
        assert [(await program.status(event))[0] for event in events] == ["RECEIVED"] * 3
        assert await program.sql("select external_id from participant") == []
        assert await program.entries() == []

    await program.settle()
    assert await program.balance("alice", points) == 2
