"""What program authors write most: multipliers, bonuses paid once, streaks, referrals, splits, caps.

Contract: rules-and-events.md 9.1 "Common patterns", 5.2, 5.4 and 4 (every rule of an event reads the state before it).
"""

from typing import Any

import httpx
import pytest

from tests.api.calls import new_group
from tests.events_support import HttpProgram, attribute, counter, credit, tag, to_participant, untag
from tests.program_support import amounts, get, run_all, verdicts

PURCHASE = "event.type == 'purchase' && event.amount > 0"


@pytest.fixture
async def points(program: HttpProgram) -> str:
    return await program.asset(scale=0)


# --- category multipliers ---------------------------------------------------------------------------------------------


async def test_the_first_category_that_fits_sets_the_multiplier(program: HttpProgram, points: str) -> None:
    for order, name, where, factor in (
        (100, "vip", '"vip" in participant.tags', 5),
        (500, "dining", 'event.mcc in ["5812", "5813", "5814"]', 3),
        (510, "travel", 'get(event, "is_travel", false)', 2),
        (1_000, "other", "true", 1),
    ):
        action = credit(points, f"round(event.amount * {factor}, 0)")
        await program.rule(f"{PURCHASE} && {where}", action, order=order, name=name, stop_after_match=True)
    await program.client.post("/participants", json={"external_id": "vera", "tags": ["VIP"]})

    events = await run_all(
        program,
        [
            program.event("alice", type="purchase", amount=150.00, mcc="5812"),
            program.event("alice", type="purchase", amount=20.25, mcc="4511", is_travel=True),
            program.event("alice", type="purchase", amount=9.50, mcc="5732"),
            program.event("vera", type="purchase", amount=10, mcc="5812"),
        ],
    )

    assert [amounts(event) for event in events] == [{"dining": "450"}, {"travel": "41"}, {"other": "10"}, {"vip": "50"}]
    assert verdicts(events[0]) == {
        "dining": "SUCCESS",
        "travel": "STOPPED_BY_PRIOR_RULE",
        "other": "STOPPED_BY_PRIOR_RULE",
    }


# --- sign-up bonus ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def signup_bonus(program: HttpProgram, points: str) -> str:
    """Spend 4,000 in the first three months and get 60,000 points, once; by the events' own times."""
    enrolled = "timestamp(participant.attributes.enrolled_at)"
    spent = 'get(participant.counters, "bonus_spend", 0.0)'
    await program.rule("event.type == 'signup'", attribute("enrolled_at", "now"))
    await program.rule(f"{PURCHASE} && now < {enrolled} + days(90)", counter("bonus_spend", "event.amount"))
    await program.rule(
        f"{PURCHASE} && now < {enrolled} + days(90) && {spent} + event.amount >= 4000"
        ' && !("bonus_paid" in participant.tags)',
        credit(points, "60000"),
        tag("bonus_paid"),
        name="bonus",
    )
    return points


@pytest.mark.parametrize(
    ("purchases", "bonus"),
    [
        ([("2026-01-20T00:00:00Z", 3_999.99), ("2026-02-01T00:00:00Z", 0.01)], "60000"),
        ([("2026-01-20T00:00:00Z", 3_999.99)], "-"),
        ([("2026-01-20T00:00:00Z", 5_000), ("2026-01-21T00:00:00Z", 5_000)], "60000"),
        ([("2026-01-20T00:00:00Z", 2_000), ("2026-04-11T09:59:59Z", 2_000)], "60000"),
        ([("2026-01-20T00:00:00Z", 2_000), ("2026-04-11T10:00:00Z", 2_000)], "-"),
    ],
    ids=["met to the cent", "a cent short", "met twice, paid once", "met in the last second", "met a second too late"],
)
async def test_a_signup_bonus_is_paid_once_and_only_within_three_months(
    program: HttpProgram, signup_bonus: str, purchases: list[tuple[str, float]], bonus: str
) -> None:
    events = [program.event(type="signup", event_timestamp="2026-01-11T10:00:00Z")]
    events += [program.event(type="purchase", amount=amount, event_timestamp=at) for at, amount in purchases]

    await run_all(program, events)

    assert (await program.participant())["attributes"] == {"enrolled_at": "2026-01-11T10:00:00Z"}
    assert await program.available("alice", signup_bonus) == bonus


async def test_a_customer_who_never_signed_up_gets_no_bonus(program: HttpProgram, signup_bonus: str) -> None:
    event = await program.run(type="purchase", amount=5_000)

    assert (event["status"], event["rule_evaluations"]) == ("COMPLETED", [])
    assert await program.available("alice", signup_bonus) == "-"


# --- streaks ----------------------------------------------------------------------------------------------------------


async def test_a_streak_grows_day_by_day_pays_on_the_third_and_starts_again_after_a_gap(
    program: HttpProgram, points: str
) -> None:
    streak = 'get(participant.counters, "streak", 0.0)'
    goes_on = (
        "has(participant.attributes.last_day) && timestamp(event.day) - timestamp(participant.attributes.last_day)"
    )
    same_day = f'{goes_on} == duration("0s")'
    next_day = f'{goes_on} == duration("24h")'
    await program.rule(same_day, attribute("last_day", "event.day"), order=10, stop_after_match=True, name="same day")
    await program.rule(f"{next_day} && {streak} + 1 == 3", credit(points, "100"), order=20, name="bonus")
    remember = attribute("last_day", "event.day")
    await program.rule(next_day, counter("streak", "1"), remember, order=30, stop_after_match=True, name="goes on")
    await program.rule("has(event.day)", counter("streak", f"1 - {streak}"), remember, order=40, name="starts")
    days = ["03-01", "03-02", "03-02", "03-03", "03-04", "03-06", "03-07", "03-08"]

    events = await run_all(program, [program.event(type="visit", day=f"2026-{day}") for day in days])

    kinds = [next(name for name, verdict in verdicts(e).items() if verdict == "SUCCESS") for e in events]
    assert kinds == ["starts", "goes on", "same day", "bonus", "goes on", "starts", "goes on", "bonus"]
    assert (await program.participant())["counters"] == {"streak": "3"}
    assert await program.available("alice", points) == "200"


# --- referrals --------------------------------------------------------------------------------------------------------


async def test_a_referral_rewards_both_sides_once(program: HttpProgram, points: str) -> None:
    await program.rule(
        "event.type == 'signup' && has(event.referrer_id) && event.referrer_id != participant.external_id"
        ' && !("referred" in participant.tags)',
        credit(points, "500", **to_participant(external_id="event.referrer_id")),
        counter("referrals", "1", **to_participant(external_id="event.referrer_id")),
        credit(points, "250"),
        tag("referred"),
    )
    signups = [("bob", "alice"), ("carol", "alice"), ("bob", "alice"), ("dora", "dora"), ("eve", "zoe, who is new")]

    await run_all(program, [program.event(who, type="signup", referrer_id=by) for who, by in signups])

    earned = {who: await program.available(who, points) for who in ("alice", "bob", "carol", "dora", "eve")}
    assert earned == {"alice": "1000", "bob": "250", "carol": "250", "dora": "-", "eve": "250"}
    assert (await program.participant("alice"))["counters"] == {"referrals": "2"}
    newcomer = await program.participant("zoe, who is new")
    assert (newcomer["program_ids"], newcomer["counters"]) == ([program.id], {"referrals": "1"})


async def test_referrals_of_many_at_once_are_all_counted(program: HttpProgram, points: str) -> None:
    await program.rule(
        "event.type == 'signup'",
        credit(points, "500", **to_participant(external_id="event.referrer_id")),
        counter("referrals", "1", **to_participant(external_id="event.referrer_id")),
    )
    # Each of five has been referred by all others: every event reaches for somebody whose own event is under way.
    names = [f"user-{n}" for n in range(5)]
    pairs = [(who, by) for who in names for by in names if who != by]

    events = await run_all(program, [program.event(who, type="signup", referrer_id=by) for who, by in pairs])

    assert {event["status"] for event in events} == {"COMPLETED"}
    for name in names:
        assert await program.available(name, points) == "2000"
        assert (await program.participant(name))["counters"] == {"referrals": "4"}


# --- split credit -----------------------------------------------------------------------------------------------------


async def group_balance(client: httpx.AsyncClient, group_id: str, asset_id: str) -> str:
    found = (await get(client, f"/groups/{group_id}/balances"))["data"]
    return next((str(row["balance"]) for row in found if row["asset_id"] == asset_id), "-")


@pytest.fixture
async def family(program: HttpProgram) -> str:
    """A group of which alice is the ADMIN; its id."""
    await program.run(type="hello")
    group: str = (await new_group(program.client, (await program.participant())["id"]))["id"]
    return group


@pytest.fixture
async def split(program: HttpProgram, family: str) -> str:
    """Cash of which a customer keeps 70 %, the family 20 % and the friend that the event names 10 %."""
    cash = await program.asset()
    await program.rule(
        "event.type == 'cashback'",
        credit(cash, "event.amount * 0.7"),
        credit(cash, "event.amount * 0.2", target={"type": "GROUP", "id": "group.id"}),
        credit(cash, "event.amount * 0.1", **to_participant(external_id="event.friend")),
    )
    return cash


async def test_a_credit_is_split_between_holders(program: HttpProgram, family: str, split: str) -> None:
    event = await program.run(type="cashback", amount=12.50, friend="bob")

    assert amounts(event) == {"rule": "8.75+2.50+1.25"}
    assert (await program.available("alice", split), await program.available("bob", split)) == ("8.75", "1.25")
    assert await group_balance(program.client, family, split) == "2.50"


@pytest.mark.parametrize("trouble", ["a share that does not fit the scale", "a group that is archived", "no friend"])
async def test_a_split_is_all_or_nothing(program: HttpProgram, family: str, split: str, trouble: str) -> None:
    data: dict[str, Any] = {"amount": 12.50, "friend": "bob"}
    if trouble == "a share that does not fit the scale":
        data["amount"] = 12.55  # 8.785
    elif trouble == "no friend":
        del data["friend"]
    else:
        assert (await program.client.delete(f"/groups/{family}")).status_code == 200

    event = await program.run(type="cashback", **data)

    assert (event["status"], await program.available("alice", split)) == ("FAILED", "-")
    assert await group_balance(program.client, family, split) == "-"
    assert (await get(program.client, "/journal-entries", asset_id=split))["data"] == []


# --- caps per participant ---------------------------------------------------------------------------------------------

EARNED = 'get(participant.counters, "earned", 0.0)'
SHARE = "round(event.amount * 0.05, 2)"


@pytest.mark.parametrize(
    "capped",
    [
        f"min({SHARE}, max(0, 20 - {EARNED}))",
        f"{EARNED} + {SHARE} <= 20 ? {SHARE} : 20 - {EARNED}",
        f"math.least({SHARE}, 20 - {EARNED})",
    ],
    ids=["min and max", "ternary", "math.least"],
)
async def test_a_participant_earns_no_more_than_the_cap(program: HttpProgram, capped: str) -> None:
    cash = await program.asset()
    await program.rule(PURCHASE, credit(cash, capped), counter("earned", capped), name="earn")
    purchases = [("alice", 300.00), ("bob", 10.00), ("alice", 99.99), ("alice", 0.30), ("alice", 500.00)]

    events = await run_all(program, [program.event(who, type="purchase", amount=amount) for who, amount in purchases])

    # 15.00; bob's own; 5.00 to the cap exactly (4.9995 rounds up); then nothing, which is no failure.
    assert [amounts(event)["earn"] for event in events] == ["15.00", "0.50", "5.00", "0.00", "0.00"]
    assert {verdict for event in events for verdict in verdicts(event).values()} == {"SUCCESS"}
    assert await program.available("alice", cash) == "20.00"
    assert (await program.participant())["counters"] == {"earned": "20"}


async def test_a_cap_holds_against_many_events_at_once(program: HttpProgram) -> None:
    cash = await program.asset()
    capped = f"min({SHARE}, max(0, 20 - {EARNED}))"
    await program.rule(PURCHASE, credit(cash, capped), counter("earned", capped))

    events = await run_all(program, [program.event(type="purchase", amount=33.30) for _ in range(60)])

    assert {event["status"] for event in events} == {"COMPLETED"}
    assert await program.available("alice", cash) == "20.00"


# --- state as a gate --------------------------------------------------------------------------------------------------


async def test_a_promotion_is_open_to_the_first_customers_of_the_program(program: HttpProgram, points: str) -> None:
    """Program state counts over all customers: the first three get the bonus, each at most once."""
    to_program = {"target": {"type": "PROGRAM"}}
    await program.rule(
        'event.type == \'join\' && get(program.counters, "joined", 0.0) < 3 && !("early" in participant.tags)',
        credit(points, "10"),
        counter("joined", "1", **to_program),
        tag("early"),
    )
    names = ["a", "a", "b", "a", "c", "d", "e", "b"]

    await run_all(program, [program.event(name, type="join") for name in names])

    assert [await program.available(name, points) for name in ("a", "b", "c", "d", "e")] == ["10", "10", "10", "-", "-"]
    counters = (await get(program.client, f"/programs/{program.id}/state/counters"))["data"]
    assert [(row["key"], row["value"]) for row in counters] == [("joined", "3")]


async def test_a_status_is_gained_and_lost_by_tags(program: HttpProgram, points: str) -> None:
    await program.rule("event.type == 'upgrade'", tag("Gold"))
    await program.rule("event.type == 'downgrade'", untag("GOLD"))
    await program.rule(f"{PURCHASE}", credit(points, '"gold" in participant.tags ? 2 : 1'))
    kinds = ["purchase", "upgrade", "purchase", "upgrade", "downgrade", "purchase", "downgrade"]

    await run_all(program, [program.event(type=kind, amount=1) for kind in kinds])

    assert await program.available("alice", points) == "4"
    assert (await program.participant())["tags"] == []
