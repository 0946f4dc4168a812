"""SCHEDULE_EVENT over HTTP, with a real worker and a settable clock. Contract: rules-and-events.md 5.14, 5.16.

Time stands still at noon in 2030, years ahead of Temporal's own. So nothing falls due by itself: once the clock has
been moved, `look` does what every worker's timer does.
"""

from collections.abc import AsyncIterator, Awaitable, Callable

import httpx
import pytest

from db.session import Database
from tests.conftest import SettableClock, Tenant
from tests.events_support import HttpProgram, attribute, counter, credit, schedule, tag, to_participant
from tests.ledger_invariants import assert_ledger_invariants
from tests.program_support import get, made, run_all, system_events, verdicts
from workflows.gateway import Gateway
from workflows.reconcile import reconcile

pytestmark = pytest.mark.usefixtures("running_worker")

NOON = "2030-03-01T12:00:00Z"
Look = Callable[[], Awaitable[None]]


@pytest.fixture
async def program(client: httpx.AsyncClient, clock: SettableClock) -> HttpProgram:
    clock.set(NOON)
    return await HttpProgram.open(client)


@pytest.fixture(autouse=True)
async def sound_ledger(database: Database, organization: Tenant) -> AsyncIterator[None]:
    yield
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)


@pytest.fixture
def look(database: Database, gateway: Gateway, program: HttpProgram) -> Look:
    """Wake what is due, and wait until the program's queue has been looked at."""

    async def wake() -> None:
        await reconcile(database, gateway)
        # Behind everything that is due by now: events that fall due are released before a batch takes others.
        await program.run("somebody else", type="looked")

    return wake


async def test_a_follow_up_appears_when_it_is_due_and_not_before(
    program: HttpProgram, clock: SettableClock, look: Look
) -> None:
    points = await program.asset()
    await program.rule(
        "event.type == 'cart'", schedule("reminder", "24h", payload={"coupon": "SAVE10", "type": "x", "n": 1.50})
    )
    await program.rule("event.type == 'reminder'", credit(points, "event.n"), attribute("coupon", "event.coupon"))

    parent = await program.run(type="cart", event_timestamp=NOON)

    (action,) = parent["rule_evaluations"][0]["actions"]
    assert (action["type"], action["event_name"], action["trigger_at"]) == (
        "SCHEDULE_EVENT",
        "reminder",
        "2030-03-02T12:00:00Z",
    )
    clock.set("2030-03-02T11:59:59.999999Z")
    await look()
    assert await system_events(program) == []
    clock.set("2030-03-02T12:00:00Z")
    await look()
    (event,) = await made(program, 1)

    alice = (await program.participant())["id"]
    assert (event["event_type"], event["status"], event["participant_id"]) == ("SYSTEM", "COMPLETED", alice)
    assert event["event_data"] == {"coupon": "SAVE10", "type": "reminder", "n": 1.50}
    assert (event["event_timestamp"], event["received_at"]) == ("2030-03-02T12:00:00Z", "2030-03-02T12:00:00Z")
    automation_id = action["automation_id"]
    assert event["idempotency_key"] == f"automation:{automation_id}:2030-03-02T12:00:00.000000Z"
    assert await program.available("alice", points) == "1.50"
    assert (await program.participant())["attributes"] == {"coupon": "SAVE10"}
    clock.advance(hours=24)
    await look()
    assert len(await system_events(program)) == 1, "exactly once"


async def test_it_is_due_by_the_parents_own_time_and_at_once_if_that_has_passed(program: HttpProgram) -> None:
    """No clock is moved and nobody looks: the worker goes on by itself."""
    await program.rule("event.type == 'cart'", schedule("reminder", "24h"))
    await program.rule("event.type == 'reminder'", attribute("reminded_at", "now"))

    await program.run(type="cart", event_timestamp="2030-02-28T12:00:00Z")

    (event,) = await made(program, 1)
    assert event["event_timestamp"] == "2030-03-01T12:00:00Z"
    assert (await program.participant())["attributes"] == {"reminded_at": "2030-03-01T12:00:00Z"}


async def test_follow_ups_come_in_the_order_of_their_instants(
    program: HttpProgram, clock: SettableClock, look: Look
) -> None:
    actions = [schedule(f"after_{hours}", f"{hours}h") for hours in (3, 1, 2)]
    await program.rule("event.type == 'start'", *actions)
    last = 'get(participant.attributes, "order", "")'
    await program.rule('event.type.startsWith("after")', attribute("order", f'{last} + event.type + " "'))
    await program.run(type="start", event_timestamp=NOON)

    clock.advance(hours=5)
    await look()

    events = await made(program, 3)
    assert (await program.participant())["attributes"] == {"order": "after_1 after_2 after_3 "}
    assert {event["received_at"] for event in events} == {"2030-03-01T17:00:00Z"}


async def test_each_action_of_each_rule_makes_one_of_its_own(
    program: HttpProgram, clock: SettableClock, look: Look
) -> None:
    twice = [schedule("ping", "1h"), schedule("ping", "1h")]
    await program.rule("event.type == 'start'", *twice)
    await program.rule("event.type == 'start'", schedule("ping", "1h"))
    await program.rule("event.type == 'ping'", counter("pings", "1"))
    await run_all(program, [program.event(who, type="start", event_timestamp=NOON) for who in ("alice", "bob")])

    clock.advance(hours=1)
    await look()

    await made(program, 6)
    assert [(await program.participant(who))["counters"] for who in ("alice", "bob")] == [{"pings": "3"}] * 2


async def test_a_follow_up_may_be_for_somebody_else(program: HttpProgram, clock: SettableClock, look: Look) -> None:
    target = to_participant(external_id="event.referrer_id")
    await program.rule("event.type == 'signup'", schedule("thank_you", "48h", **target))
    await program.rule("event.type == 'thank_you'", tag("thanked"))
    await program.run("bob", type="signup", referrer_id="alice", event_timestamp=NOON)

    clock.advance(hours=48)
    await look()

    (event,) = await made(program, 1)
    assert event["participant_id"] == (await program.participant("alice"))["id"]
    assert [(await program.participant(who))["tags"] for who in ("alice", "bob")] == [["thanked"], []]


async def test_an_event_that_fails_schedules_nothing(program: HttpProgram, clock: SettableClock, look: Look) -> None:
    await program.rule("event.type == 'start'", schedule("ping", "1h"), counter("n", "event.missing"))
    failed = await program.run(type="start", event_timestamp=NOON)

    clock.advance(hours=2)
    await look()

    assert (failed["status"], await system_events(program)) == ("FAILED", [])


async def test_it_is_for_suspended_participants_too_and_what_it_triggers_is_judged_then(
    program: HttpProgram, clock: SettableClock, look: Look
) -> None:
    points = await program.asset()
    await program.rule("event.type == 'start'", schedule("bonus", "1h"), schedule("note", "1h"))
    await program.rule("event.type == 'bonus'", credit(points, "1"))
    await program.rule("event.type == 'note'", tag("noted"))
    await program.run(type="hello")
    alice = (await program.participant())["id"]
    suspended = await program.client.patch(f"/participants/{alice}/status", json={"status": "SUSPENDED"})
    assert suspended.status_code == 200

    parent = await program.run(type="start", event_timestamp=NOON)
    clock.advance(hours=1)
    await look()

    assert parent["status"] == "COMPLETED"
    outcomes = {event["event_data"]["type"]: event["status"] for event in await made(program, 2)}
    assert outcomes == {"bonus": "FAILED", "note": "COMPLETED"}


async def test_it_waits_while_its_program_is_not_active_and_fires_once_it_is_again(
    program: HttpProgram, clock: SettableClock, look: Look, database: Database, gateway: Gateway
) -> None:
    await program.rule("event.type == 'start'", schedule("ping", "1h"))
    await program.rule("event.type == 'ping'", tag("pinged"))
    await program.run(type="start", event_timestamp=NOON)

    async def set_status(status: str) -> None:
        answer = await program.client.patch(f"/programs/{program.id}", json={"status": status})
        assert answer.status_code == 200, answer.text

    await set_status("SUSPENDED")
    clock.advance(hours=2)
    await reconcile(database, gateway)
    clock.advance(hours=2)
    await set_status("ACTIVE")
    await look()

    (event,) = await made(program, 1)
    assert (event["event_timestamp"], event["received_at"]) == ("2030-03-01T13:00:00Z", "2030-03-01T16:00:00Z")
    assert (await program.participant())["tags"] == ["pinged"]


# --- chains -----------------------------------------------------------------------------------------------------------


async def test_a_chain_ends_at_depth_ten(program: HttpProgram) -> None:
    """Each link is due at once, as its parent's time lies in the past. The eleventh would be one too deep."""
    await program.rule("event.type == 'tick'", schedule("tick", "1h"), counter("ticks", "1"), name="again")

    first = await program.run(type="tick", event_timestamp="2030-02-01T00:00:00Z")

    chain = await made(program, 10)
    assert [event["event_timestamp"] for event in chain] == [f"2030-02-01T{hour:02d}:00:00Z" for hour in range(1, 11)]
    assert [event["status"] for event in (first, *chain)] == ["COMPLETED"] * 10 + ["FAILED"]
    last = chain[-1]
    assert "automation_depth_exceeded" in last["error_message"]
    assert last["error_message"].startswith("action SCHEDULE_EVENT failed: ")
    assert verdicts(last) == {"again": "FAILED"}
    assert (await program.participant())["counters"] == {"ticks": "10"}, "the last one has counted nothing"


async def test_chains_of_their_own_do_not_shorten_each_other(program: HttpProgram) -> None:
    """An event of the API's begins at depth 0 again, whatever ran before it."""
    await program.rule("event.type == 'tick'", schedule("tick", "1h"), counter("ticks", "1"))

    await program.run(type="tick", event_timestamp="2030-02-01T00:00:00Z")
    await made(program, 10)
    await program.run(type="tick", event_timestamp="2030-02-02T00:00:00Z")
    events = await made(program, 20)

    assert [event["status"] for event in events].count("FAILED") == 2
    assert (await program.participant())["counters"] == {"ticks": "20"}


async def test_a_chain_waits_for_each_of_its_links(program: HttpProgram, clock: SettableClock, look: Look) -> None:
    """A drip campaign: three mails, a day apart, each scheduled by the one before."""
    for before, after in (("signup", "mail_1"), ("mail_1", "mail_2"), ("mail_2", "mail_3")):
        await program.rule(f"event.type == '{before}'", schedule(after, "24h"), tag(before))
    await program.run(type="signup", event_timestamp=NOON)

    for day in (1, 2, 3):
        clock.set(f"2030-03-0{day + 1}T12:00:00Z")
        await look()
        events = await made(program, day)
        assert events[-1]["event_timestamp"] == f"2030-03-0{day + 1}T12:00:00Z"
    assert set((await program.participant())["tags"]) == {"signup", "mail_1", "mail_2"}
    shown = (await get(program.client, "/events", event_type="SYSTEM", external_id="alice"))["data"]
    assert shown == [], "they name the participant by its id only"
