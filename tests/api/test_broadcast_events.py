"""BROADCAST over HTTP with a real worker. Contract: rules-and-events.md 5.15 and 5.16.

How a fan-out goes on after a crash, makes room for others and is cancelled is in tests/workflows/test_broadcasts.py.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import psycopg
import pytest

from db.session import Database
from tests.api.calls import new_participant
from tests.conftest import SettableClock, Tenant
from tests.events_support import HttpProgram, counter, credit, schedule, tag
from tests.ledger_invariants import assert_ledger_invariants
from tests.program_support import made, run_all, system_events, verdicts

pytestmark = pytest.mark.usefixtures("running_worker")


@pytest.fixture
async def program(client: httpx.AsyncClient) -> HttpProgram:
    return await HttpProgram.open(client)


@pytest.fixture(autouse=True)
async def sound_ledger(database: Database, organization: Tenant) -> AsyncIterator[None]:
    yield
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)


def broadcast(event_name: str, **more: Any) -> dict[str, Any]:
    return {"type": "BROADCAST", "event_name": event_name, **more}


async def members(program: HttpProgram, *names: str, **fields: Any) -> list[str]:
    """New participants who are enrolled in the program; their ids."""
    made = [new_participant(program.client, external_id=name, program_id=program.id, **fields) for name in names]
    return [participant["id"] for participant in await asyncio.gather(*made)]


async def test_a_broadcast_reaches_everybody_who_is_active_exactly_once(
    program: HttpProgram, clock: SettableClock, owner: psycopg.Connection[Any]
) -> None:
    """25 participants of the program, of whom four are inactive in one way or another, and a stranger."""
    points = await program.asset(scale=0)
    clock.set("2030-03-01T12:00:00Z")
    active = await members(program, *(f"user-{n}" for n in range(21)))
    await members(program, "suspended 1", "suspended 2", status="SUSPENDED")
    await members(program, "closed", status="CLOSED")
    (frozen,) = await members(program, "frozen")
    owner.execute("update enrollment set status = 'FROZEN' where participant_id = %s", (frozen,))
    await new_participant(program.client, external_id="stranger")
    await program.rule("event.type == 'sale'", broadcast("bonus_day", payload={"points": 50, "type": "lost"}))
    await program.rule("event.type == 'bonus_day'", credit(points, "event.points"), counter("bonus_days", "1"))

    parent = await program.run("user-0", type="sale", event_timestamp="2025-01-15T10:00:00Z")

    events = await made(program, len(active))
    (action,) = parent["rule_evaluations"][0]["actions"]
    assert (action["type"], action["event_name"]) == ("BROADCAST", "bonus_day")
    assert {event["participant_id"] for event in events} == set(active), "the one who set it off included"
    for event in events:
        assert (event["event_type"], event["status"]) == ("SYSTEM", "COMPLETED")
        assert event["event_data"] == {"points": 50, "type": "bonus_day"}
        assert event["event_timestamp"] == "2030-03-01T12:00:00Z", "when it was set off, not the parent's own time"
        key = f"automation:{action['automation_id']}:2030-03-01T12:00:00.000000Z:{event['participant_id']}"
        assert event["idempotency_key"] == key
    for n in range(21):
        assert await program.available(f"user-{n}", points) == "50"
        assert (await program.participant(f"user-{n}"))["counters"] == {"bonus_days": "1"}
    for name in ("suspended 1", "closed", "frozen", "stranger"):
        assert (await program.participant(name))["balances"] == []


async def test_its_events_are_judged_by_each_participants_own_state(program: HttpProgram) -> None:
    points = await program.asset(scale=0)
    await members(program, "alice", tags=["vip"])
    await members(program, "bob")
    await program.rule("event.type == 'sale'", broadcast("gift"))
    await program.rule(
        "event.type == 'gift' && 'vip' in participant.tags", credit(points, "100"), stop_after_match=True
    )
    await program.rule("event.type == 'gift'", credit(points, "1"))

    await program.run("bob", type="sale")

    await made(program, 2)
    assert [await program.available(who, points) for who in ("alice", "bob")] == ["100", "1"]


async def test_whoever_joins_later_gets_nothing(program: HttpProgram) -> None:
    await members(program, "alice")
    await program.rule("event.type == 'sale'", broadcast("gift"))
    await program.rule("event.type == 'gift'", counter("gifts", "1"))
    await program.run("alice", type="sale")
    await made(program, 1)

    await members(program, "bob")
    await program.run("bob", type="sale")

    await made(program, 3)
    assert (await program.participant("alice"))["counters"] == {"gifts": "2"}
    assert (await program.participant("bob"))["counters"] == {"gifts": "1"}


async def test_each_action_of_each_event_makes_one_of_its_own(program: HttpProgram) -> None:
    await members(program, "alice", "bob")
    await program.rule("event.type == 'sale'", broadcast("gift"), broadcast("gift"), broadcast("note"))
    await program.rule("event.type == 'gift'", counter("gifts", "1"))
    await program.rule("event.type == 'note'", counter("notes", "1"))

    await run_all(program, [program.event(who, type="sale") for who in ("alice", "bob")])

    events = await made(program, 12)
    assert Counter(event["event_data"]["type"] for event in events) == {"gift": 8, "note": 4}
    for who in ("alice", "bob"):
        assert (await program.participant(who))["counters"] == {"gifts": "4", "notes": "2"}


async def test_an_event_that_fails_broadcasts_nothing(program: HttpProgram) -> None:
    await members(program, "alice", "bob")
    await program.rule("event.type == 'sale'", broadcast("gift"), counter("n", "event.n"))
    failed = await program.run("alice", type="sale")

    done = await program.run("alice", type="sale", n=1)

    assert (failed["status"], done["status"]) == ("FAILED", "COMPLETED")
    events = await made(program, 2)
    (action, _) = done["rule_evaluations"][0]["actions"]
    assert all(action["automation_id"] in event["idempotency_key"] for event in events)


async def test_a_suspended_participant_may_set_one_off_and_is_not_reached_by_it(program: HttpProgram) -> None:
    (alice,) = await members(program, "alice")
    await members(program, "bob", status="SUSPENDED")
    await program.rule("event.type == 'sale'", broadcast("gift"))

    event = await program.run("bob", type="sale")

    assert event["status"] == "COMPLETED"
    assert [made_event["participant_id"] for made_event in await made(program, 1)] == [alice]


async def test_a_broadcast_event_cannot_broadcast_again_but_may_schedule(program: HttpProgram) -> None:
    """Depth 1 is the end of broadcasts, as two of them in a circle would never stop."""
    await members(program, "alice", "bob")
    await program.rule("event.type in ['sale', 'echo']", broadcast("echo"), counter("n", "1"), name="echo")
    await program.rule("event.type == 'fan'", broadcast("quiet"))
    await program.rule("event.type == 'quiet'", schedule("later", "1h"), tag("quiet"), name="quiet")
    await program.run("alice", type="sale")

    echoes = await made(program, 2)

    for event in echoes:
        assert (event["status"], verdicts(event)) == ("FAILED", {"echo": "FAILED"})
        assert event["error_message"].startswith("action BROADCAST failed: automation_depth_exceeded")
    assert (await program.participant("alice"))["counters"] == {"n": "1"}
    await program.run("alice", type="fan", event_timestamp="2025-01-15T10:00:00Z")
    quiet = [event for event in await made(program, 4) if event["event_data"]["type"] == "quiet"]
    assert [verdicts(event) for event in quiet] == [{"quiet": "SUCCESS"}] * 2
    assert len(await system_events(program)) == 4, "what they scheduled is an hour away"
