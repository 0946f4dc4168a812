"""Rule budgets as events spend them, over HTTP with a real worker. Contract: rules-and-events.md 3 and 4.1.

What a budget is and how it is changed is in test_rule_budgets.py.
"""

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import httpx
import pytest

from db.session import Database
from tests.conftest import SettableClock, Tenant
from tests.events_support import HttpProgram, counter, credit, debit, move, settled, tag, to_participant
from tests.ledger_invariants import assert_ledger_invariants
from tests.program_support import amounts, entries_of, eventually, get, post, run_all, verdicts

pytestmark = pytest.mark.usefixtures("running_worker")

SPENT = "BUDGET_EXCEEDED"


@pytest.fixture
async def program(client: httpx.AsyncClient) -> HttpProgram:
    return await HttpProgram.open(client)


@pytest.fixture
async def cash(program: HttpProgram) -> str:
    return await program.asset()


@pytest.fixture(autouse=True)
async def sound_ledger(database: Database, organization: Tenant) -> AsyncIterator[None]:
    yield
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)


def budget(asset_id: str, limit: str, **schedule: str) -> dict[str, Any]:
    return {"asset_id": asset_id, "limit": limit, **schedule}


async def consumed(program: HttpProgram, rule: dict[str, Any]) -> list[str]:
    return [str(b["consumed"]) for b in (await get(program.client, f"/rules/{rule['id']}"))["budgets"]]


async def issued(program: HttpProgram, asset_id: str) -> Decimal:
    """What all credits of the asset have issued together, by the ledger."""
    credits = await entries_of(program.client, asset_id=asset_id, action_type="CREDIT")
    return sum((-Decimal(p["amount"]) for e in credits for p in e["postings"] if Decimal(p["amount"]) < 0), Decimal(0))


# --- a spent budget ---------------------------------------------------------------------------------------------------


async def test_a_spent_lifetime_budget_suppresses_the_credit_and_nothing_else(program: HttpProgram, cash: str) -> None:
    """The rule still counts as matched: its other actions run, and later rules are stopped."""
    rule = await program.rule(
        "event.type == 'purchase'",
        credit(cash, "10"),
        counter("purchases", "1"),
        tag("buyer"),
        name="capped",
        budgets=[budget(cash, "25")],
        stop_after_match=True,
    )
    await program.rule("event.type == 'purchase'", credit(cash, "1"), name="behind")

    events = await run_all(program, [program.event(type="purchase") for _ in range(4)])

    assert [event["status"] for event in events] == ["COMPLETED"] * 4
    assert [verdicts(event) for event in events] == [
        {"capped": "SUCCESS", "behind": "STOPPED_BY_PRIOR_RULE"},
        {"capped": "SUCCESS", "behind": "STOPPED_BY_PRIOR_RULE"},
        {"capped": SPENT, "behind": "STOPPED_BY_PRIOR_RULE"},
        {"capped": SPENT, "behind": "STOPPED_BY_PRIOR_RULE"},
    ]
    suppressed, stopped = events[3]["rule_evaluations"]
    assert (suppressed["status"], suppressed["error_message"]) == ("SKIPPED", None)
    assert [action["type"] for action in suppressed["actions"]] == ["COUNTER", "TAG"]
    assert stopped["stopped_by_rule_id"] == rule["id"]
    with_skipped = await get(program.client, f"/events/{events[3]['id']}", include_skipped=True)
    assert with_skipped["rule_evaluations"] == events[3]["rule_evaluations"]
    matched = (await get(program.client, "/events", rule_id=rule["id"]))["data"]
    assert {event["id"] for event in matched} == {event["id"] for event in events}, "a spent rule has matched"
    assert (await program.participant())["counters"] == {"purchases": "4"}
    assert await program.available("alice", cash) == "20.00"
    assert await consumed(program, rule) == ["20.00"]


async def test_each_credit_is_all_or_nothing_in_the_order_of_actions(program: HttpProgram, cash: str) -> None:
    rule = await program.rule(
        "true", *(credit(cash, amount) for amount in ("6", "5", "4", "1")), budgets=[budget(cash, "10")]
    )

    first, second = await run_all(program, [program.event(), program.event()])

    assert (verdicts(first), amounts(first)) == ({"rule": SPENT}, {"rule": "6.00+4.00"})
    assert (verdicts(second), amounts(second)) == ({"rule": SPENT}, {})
    assert await consumed(program, rule) == ["10.00"], "met exactly, and never passed"
    assert await program.available("alice", cash) == "10.00"


async def test_only_credits_of_the_budgets_asset_count_wherever_they_go(program: HttpProgram, cash: str) -> None:
    other = await program.asset()
    rule = await program.rule(
        "true",
        credit(cash, "4"),
        credit(cash, "4", **to_participant(external_id="'bob'")),
        credit(other, "100"),
        debit(cash, "3"),
        credit(cash, "0"),
        budgets=[budget(cash, "8")],
    )

    first, second = await program.run(), await program.run()

    assert (verdicts(first), await consumed(program, rule)) == ({"rule": "SUCCESS"}, ["8.00"])
    assert (second["status"], second["error_message"]) == ("FAILED", "action DEBIT failed: insufficient balance")
    assert await program.available("bob", cash) == "4.00"
    assert await program.available("alice", other) == "100.00"


async def test_two_rules_have_two_budgets_and_one_rule_one_for_each_asset(program: HttpProgram, cash: str) -> None:
    points = await program.asset(scale=0)
    both = [budget(cash, "3"), budget(points, "100")]
    first = await program.rule("true", credit(cash, "2"), credit(points, "40"), name="first", budgets=both)
    await program.rule("true", credit(cash, "2"), name="second", budgets=[budget(cash, "6")])

    events = await run_all(program, [program.event() for _ in range(4)])

    assert [verdicts(event) for event in events] == [
        {"first": "SUCCESS", "second": "SUCCESS"},
        {"first": SPENT, "second": "SUCCESS"},
        {"first": SPENT, "second": "SUCCESS"},
        {"first": SPENT, "second": SPENT},
    ]
    spent = {b["asset_id"]: b["consumed"] for b in (await get(program.client, f"/rules/{first['id']}"))["budgets"]}
    assert spent == {cash: "2.00", points: "80"}


# --- what gives back --------------------------------------------------------------------------------------------------


async def test_an_event_that_fails_gives_back_what_it_consumed(program: HttpProgram, cash: str) -> None:
    rule = await program.rule("true", credit(cash, "10"), counter("n", "event.n"), budgets=[budget(cash, "10")])

    failed = await program.run()
    assert (failed["status"], await consumed(program, rule)) == ("FAILED", ["0.00"])
    good = await program.run(n=1)

    assert (verdicts(good), await consumed(program, rule)) == ({"rule": "SUCCESS"}, ["10.00"])


async def test_a_retry_consumes_once(program: HttpProgram, cash: str) -> None:
    rule = await program.rule("event.type == 'spend'", credit(cash, "4"), debit(cash, "5"), budgets=[budget(cash, "9")])
    await program.rule("event.type == 'earn'", credit(cash, "1"))
    failed = await program.run(type="spend")
    await program.run(type="earn")

    await post(program.client, f"/events/{failed['id']}/retry")

    assert (await settled(program.client, failed["id"]))["status"] == "COMPLETED"
    assert await consumed(program, rule) == ["4.00"]


async def test_a_refund_gives_nothing_back(program: HttpProgram, cash: str) -> None:
    rule = await program.rule(
        "true",
        credit(cash, "event.type == 'purchase' ? 10 : 0"),
        debit(cash, "event.type == 'refund' ? 10 : 0"),
        budgets=[budget(cash, "10")],
    )

    kinds = ["purchase", "refund", "purchase"]
    events = await run_all(program, [program.event(type=kind) for kind in kinds])

    assert [verdicts(event)["rule"] for event in events] == ["SUCCESS", "SUCCESS", SPENT]
    assert await consumed(program, rule) == ["10.00"]
    assert await program.available("alice", cash) == "0.00"


async def test_a_settlement_consumes_what_it_adds_and_gives_back_what_it_takes_away(program: HttpProgram) -> None:
    points = await program.asset(inventory_mode="LOT")
    reference = {"reference_id": "event.reference"}
    rule = await program.rule(
        "true",
        credit(points, "event.type == 'authorize' ? event.amount : 0", bucket="HELD", **reference),
        credit(points, "event.type == 'settle' ? event.amount : 0", **reference),
        budgets=[budget(points, "100")],
    )

    async def after(kind: str, amount: float, reference: str) -> tuple[str, str]:
        event = await program.run(type=kind, amount=amount, reference=reference)
        return verdicts(event)["rule"], (await consumed(program, rule))[0]

    assert await after("authorize", 60, "a") == ("SUCCESS", "60.00")
    assert await after("authorize", 40.01, "b") == (SPENT, "60.00")
    assert await after("settle", 45, "a") == ("SUCCESS", "45.00")
    assert await after("authorize", 50, "b") == ("SUCCESS", "95.00")
    assert await after("settle", 55.01, "b") == (SPENT, "95.00"), "the delta of 5.01 does not fit, so nothing settles"
    assert await after("settle", 55, "b") == ("SUCCESS", "100.00")
    assert await program.available("alice", points) == "100.00"


async def test_a_void_gives_nothing_back(program: HttpProgram) -> None:
    points = await program.asset(inventory_mode="LOT")
    held = credit(points, "event.type == 'authorize' ? 10 : 0", bucket="HELD", reference_id="'a'")
    rule = await program.rule("event.type == 'authorize'", held, budgets=[budget(points, "10")])
    await program.rule("event.type == 'void'", move("VOID_HOLD", points, reference_id="'a'"))

    await run_all(program, [program.event(type=kind) for kind in ("authorize", "void")])

    assert await consumed(program, rule) == ["10.00"]


# --- periods ----------------------------------------------------------------------------------------------------------


async def test_a_monthly_budget_begins_anew_by_the_wall_clock(
    program: HttpProgram, cash: str, clock: SettableClock
) -> None:
    clock.set("2026-01-31T23:00:00Z")
    monthly = budget(cash, "10", schedule_type="CRON", cron_expression="0 0 1 * *")
    rule = await program.rule("true", credit(cash, "10"), budgets=[monthly])

    async def outcome(at: str, event_timestamp: str = "2025-06-15T00:00:00Z") -> tuple[str, str, str]:
        clock.set(at)
        event = await program.run(event_timestamp=event_timestamp)
        (state,) = (await get(program.client, f"/rules/{rule['id']}"))["budgets"]
        return verdicts(event)["rule"], state["consumed"], state["next_reset_at"]

    february, march = "2026-02-01T00:00:00Z", "2026-03-01T00:00:00Z"
    assert await outcome("2026-01-31T23:00:00Z") == ("SUCCESS", "10.00", february)
    assert await outcome("2026-01-31T23:59:59.999999Z", event_timestamp=march) == (SPENT, "10.00", february)
    assert await outcome(february) == ("SUCCESS", "10.00", march)
    assert await outcome("2026-02-28T00:00:00Z") == (SPENT, "10.00", march)
    # Half a year without an event: one period begins, whatever was missed.
    assert await outcome("2026-09-15T00:00:00Z") == ("SUCCESS", "10.00", "2026-10-01T00:00:00Z")
    assert await program.available("alice", cash) == "30.00"


async def test_an_interval_is_counted_from_the_rules_creation(
    program: HttpProgram, cash: str, clock: SettableClock
) -> None:
    clock.set("2026-01-01T12:00:00Z")
    daily = budget(cash, "10", schedule_type="INTERVAL", interval="24h")
    await program.rule("true", credit(cash, "10"), budgets=[daily])

    seen = []
    for instant in ("01T13:00", "02T11:59", "02T12:00", "03T11:59", "05T18:00", "06T11:59", "06T12:00"):
        clock.set(f"2026-01-{instant}:00Z")
        seen.append(verdicts(await program.run())["rule"])

    assert seen == ["SUCCESS", SPENT, "SUCCESS", SPENT, "SUCCESS", SPENT, "SUCCESS"]


async def test_what_an_event_of_the_old_period_held_is_settled_in_the_new_one(
    program: HttpProgram, clock: SettableClock
) -> None:
    """A negative delta gives back no more than the running period has consumed."""
    clock.set("2026-01-31T12:00:00Z")
    points = await program.asset(inventory_mode="LOT")
    monthly = budget(points, "100", schedule_type="CRON", cron_expression="0 0 1 * *")
    rule = await program.rule(
        "true",
        credit(points, "event.type == 'authorize' ? event.amount : 0", bucket="HELD", reference_id="event.reference"),
        credit(points, "event.type == 'settle' ? event.amount : 0", reference_id="event.reference"),
        budgets=[monthly],
    )
    await program.run(type="authorize", amount=80, reference="a")
    clock.set("2026-02-01T12:00:00Z")
    await program.run(type="authorize", amount=5, reference="b")

    event = await program.run(type="settle", amount=10, reference="a")

    assert (verdicts(event), await consumed(program, rule)) == ({"rule": "SUCCESS"}, ["0.00"])


# --- at once ----------------------------------------------------------------------------------------------------------


async def test_events_at_once_never_overspend(program: HttpProgram, cash: str) -> None:
    """Sixty events of twenty customers, sent one by one and in batches by several clients at once."""
    rule = await program.rule("true", credit(cash, "event.amount"), counter("n", "1"), budgets=[budget(cash, "100")])
    bodies = [program.event(f"user-{n % 20}", amount=3.5) for n in range(60)]
    sends = [[body] for body in bodies[:20]] + [bodies[20:40], bodies[40:]]

    answers = await asyncio.gather(*(run_all(program, send) for send in sends))

    outcomes = [verdicts(event)["rule"] for events in answers for event in events]
    # 28 of 3.50 are 98.00; a 29th would make 101.50.
    assert (outcomes.count("SUCCESS"), outcomes.count(SPENT)) == (28, 32)
    assert await consumed(program, rule) == ["98.00"]
    assert await issued(program, cash) == 98
    counted = [(await program.participant(f"user-{n}"))["counters"]["n"] for n in range(20)]
    assert counted == ["3"] * 20


async def test_a_reset_by_hand_among_events_opens_one_more_budget_and_no_more(program: HttpProgram, cash: str) -> None:
    rule = await program.rule("true", credit(cash, "1"), budgets=[budget(cash, "10")])

    async def reset() -> None:
        # Once the first period is spent, however the events and the reset fall together from then on.
        await eventually(lambda: is_spent(program, rule))
        await post(program.client, f"/rules/{rule['id']}/reset-budget?asset_id={cash}")

    events, _ = await asyncio.gather(run_all(program, [program.event() for _ in range(40)]), reset())

    late = await run_all(program, [program.event() for _ in range(10)])
    assert {event["status"] for event in (*events, *late)} == {"COMPLETED"}
    assert await consumed(program, rule) == ["10.00"]
    assert await issued(program, cash) == 20


async def is_spent(program: HttpProgram, rule: dict[str, Any]) -> bool:
    return await consumed(program, rule) == ["10.00"]


async def test_a_budget_that_is_lowered_among_events_binds_from_then_on(program: HttpProgram, cash: str) -> None:
    rule = await program.rule("true", credit(cash, "1"), budgets=[budget(cash, "1000")])
    path = f"/rules/{rule['id']}"

    async def lower() -> None:
        answer = await program.client.patch(path, json={"budgets": [budget(cash, "5")]})
        assert answer.status_code == 200, answer.text

    await asyncio.gather(run_all(program, [program.event() for _ in range(30)]), lower())
    before = Decimal((await consumed(program, rule))[0])
    assert before == await issued(program, cash), "what was consumed is what was issued, whatever came between"

    (after,) = await run_all(program, [program.event()])

    assert verdicts(after)["rule"] == (SPENT if before >= 5 else "SUCCESS")
