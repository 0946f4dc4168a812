"""Simulations rule by rule: what changed rules would have done, and what a simulation knows of the past.

That unchanged rules do exactly what they did, whatever else happened, is tests/domain/test_simulations_exact.py.
Contract: README.md "Simulations", rules-and-events.md 7.6.
"""

import asyncio
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid5

import psycopg
import pytest

from db.session import Database
from domain import assets, groups, limits, participants, state, wallet
from domain.balances import AdjustRequest, Holder, OperationRequest, adjust, operate
from domain.events import queries
from domain.events.batch import process_batch
from domain.events.engine import apply_event
from domain.events.retries import RetryPolicy
from domain.groups import NewMember
from domain.participants import ParticipantStatus
from domain.rules.budgets import BudgetDraft
from domain.rules.store import RuleDraft, patch_rule
from domain.simulations import records
from domain.simulations.answers import read_figures
from domain.simulations.batches import advance
from domain.simulations.beginnings import TooMuchToSimulate
from domain.simulations.rule_sets import ChangedRule
from domain.simulations.tallies import Tallies, Tally
from domain.upkeep import sweep
from domain.wallet import WalletRequest
from tests.builders import make_group
from tests.conftest import SettableClock, Tenant
from tests.events_support import (
    NO_RETRIES,
    TO_PROGRAM,
    EventProgram,
    attribute,
    counter,
    credit,
    debit,
    move,
    schedule,
    tag,
    to_participant,
)
from tests.simulations_support import LONG_AGO, Simulated, carry, make_simulation, plain, simulate

LOT: dict[str, Any] = {"inventory_mode": "LOT"}
PREFUNDED: dict[str, Any] = {"issuance_policy": "PREFUNDED"}
TO_EVENT_GROUP: dict[str, Any] = {"target": {"type": "GROUP", "id": "event.family"}}


@pytest.fixture
async def program(database: Database, organization: Tenant, clock: SettableClock) -> EventProgram:
    clock.set("2026-03-01T12:00:00Z")
    return await EventProgram.open(database, organization.id)


@pytest.fixture
def run(program: EventProgram, clock: SettableClock) -> Callable[..., Any]:
    """Process an event of its own instant."""

    async def run_one(who: str | UUID = "alice", /, **data: Any) -> Any:
        clock.advance(seconds=1)
        return await program.run(who, **data)

    return run_one


def draft(program: EventProgram, condition: str, *actions: dict[str, Any], **fields: Any) -> RuleDraft:
    return RuleDraft(program.id, fields.pop("name", "draft"), condition, actions, **fields)


async def simulated(program: EventProgram, rules: Any = None, **fields: Any) -> Simulated:
    return await simulate(program.database, program.organization_id, program.id, rules, **fields)


async def exact(program: EventProgram, **fields: Any) -> Simulated:
    """The simulation of the rules as they are, which does what they did."""
    done = await simulated(program, **fields)
    assert done.differences() == []
    assert done.results.get("simulated") == done.results.get("actual")
    return done


def tallies(done: Simulated) -> tuple[list[Tally], list[Tally]]:
    """What each rule of the simulation would have done, and what it really did, in the order of the rules."""
    both = [Tallies.read(done.results[name]) for name in ("simulated", "actual")]
    ids = [rule["id"] for rule in done.record.rules]
    of_simulated, of_actual = ([found.rules.get(id_, Tally()) for id_ in ids] for found in both)
    return of_simulated, of_actual


def issued(done: Simulated, asset_id: UUID) -> list[Decimal]:
    """What all rules would have issued, and what they did."""
    both = (Tallies.read(done.results[name]).issued() for name in ("simulated", "actual"))
    return [found.get(str(asset_id), Decimal(0)) for found in both]


def verdicts(done: Simulated) -> list[tuple[str, str | None]]:
    """How each event would have ended."""
    return [(outcome.verdict, outcome.error) for _, outcome in done.played]


async def fund(program: EventProgram, asset_id: UUID, amount: str) -> None:
    async with program.database.transaction(program.organization_id) as tx:
        await wallet.fund(tx, WalletRequest(program_id=program.id, asset_id=asset_id, amount=amount))


async def credit_by_hand(program: EventProgram, holder: Holder, asset_id: UUID, amount: str) -> None:
    request = AdjustRequest(
        program_id=program.id, asset_id=asset_id, type="CREDIT", amount=amount, description="by hand"
    )
    async with program.database.transaction(program.organization_id) as tx:
        await adjust(tx, holder, request)


# --- changed rules ---


async def test_a_changed_rule_gives_what_computing_by_hand_gives(program: EventProgram, run: Any) -> None:
    points = await program.asset()
    rule = await program.rule("event.type == 'buy'", credit(points, "event.amount"), counter("bought", "1"))
    bonus = await program.rule('get(participant.counters, "bought", 0) >= 2', credit(points, "100"))
    for amount in (10, 20, 30, 40):
        await run(type="buy", amount=amount)

    changes = {
        "condition": "event.type == 'buy' && event.amount > 15",
        "actions": [credit(points, "event.amount * 2"), counter("bought", "1")],
    }
    done = await simulated(program, ChangedRule(rule.id, changes))

    (base, extra), (real_base, real_extra) = tallies(done)
    # 20, 30 and 40, doubled; the second purchase that counts is now that of 30, so the bonus comes once, not twice.
    assert (base.matches, base.issued) == (3, {str(points): Decimal("180.00")})
    assert (extra.matches, extra.issued) == (1, {str(points): Decimal("100.00")})
    assert (real_base.matches, real_base.issued) == (4, {str(points): Decimal("100.00")})
    assert (real_extra.matches, real_extra.issued) == (2, {str(points): Decimal("200.00")})
    assert issued(done, points) == [280, 300]
    assert (done.record.rules[1]["id"], done.record.rules[1]["is_changed"]) == (str(bonus.id), False)


async def test_a_rule_that_is_not_active_is_added_and_one_that_is_suspended_is_taken_out(
    program: EventProgram, run: Any
) -> None:
    points = await program.asset()
    active = await program.rule("true", credit(points, "1"))
    sleeping = await program.rule("true", credit(points, "5"), status="SUSPENDED")
    await run()

    added = await simulated(program, ChangedRule(sleeping.id, {}))
    taken_out = await simulated(program, ChangedRule(active.id, {"status": "SUSPENDED"}))

    assert issued(added, points) == [6, 1]
    assert issued(taken_out, points) == [0, 1]


async def test_drafts_stand_for_themselves(program: EventProgram, run: Any) -> None:
    points = await program.asset()
    await program.rule("true", credit(points, "1"))
    await run(amount=3)
    await run()

    done = await simulated(
        program,
        [
            draft(program, "true", credit(points, "2"), order=20),
            draft(program, "event.amount > 1", credit(points, "event.amount"), order=10, stop_after_match=True),
        ],
    )

    (first, second), (_, real) = tallies(done)
    assert (first.matches, first.errors, first.issued) == (1, 1, {str(points): Decimal("3.00")})
    assert (second.matches, second.issued) == (1, {str(points): Decimal("2.00")})
    assert real == Tally(), "no draft has really run"


async def test_a_spent_budget_of_a_draft_suppresses_credits(program: EventProgram, run: Any) -> None:
    points = await program.asset()
    rule = await program.rule("true", credit(points, "10"))
    for _ in range(3):
        await run()

    done = await simulated(program, ChangedRule(rule.id, {"budgets": [BudgetDraft(points, "25")]}))

    (tally,), _ = tallies(done)
    assert (tally.matches, tally.skipped_budget, tally.issued) == (3, 1, {str(points): Decimal("20.00")})


async def test_what_a_changed_rule_issues_is_what_a_later_rule_can_take(program: EventProgram, run: Any) -> None:
    points = await program.asset()
    earn = await program.rule("event.type == 'earn'", credit(points, "10"))
    await program.rule("event.type == 'spend'", debit(points, "15"))
    await run(type="earn")
    await run(type="spend")

    done = await simulated(program, ChangedRule(earn.id, {"actions": [credit(points, "15")]}))

    assert verdicts(done) == [("COMPLETED", None)] * 2
    assert [past.is_completed for past, _ in done.played] == [True, False]


async def test_changing_the_rules_meanwhile_changes_nothing(program: EventProgram, run: Any) -> None:
    points = await program.asset()
    rule = await program.rule("true", credit(points, "1"))
    await run()
    simulation_id = await make_simulation(program.database, program.organization_id, program.id)
    async with program.database.transaction(program.organization_id) as tx:
        await patch_rule(tx, rule.id, {"actions": [credit(points, "9")], "status": "SUSPENDED"})

    played = await carry(program.database, program.organization_id, simulation_id)

    assert [plain(outcome.evaluations) for _, outcome in played] == [plain(past.evaluations) for past, _ in played]


async def test_the_same_set_gives_the_same_figures_however_the_events_are_cut(
    program: EventProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    points, lots = await program.asset(), await program.asset(**LOT)
    await program.rule("event.n % 3 == 0", credit(lots, "event.n"), move("HOLD", lots, "0.5"), counter("n", "1"))
    await program.rule("event.n % 2 == 0", credit(points, 'get(participant.counters, "n", 0)'))
    for number in range(30):
        await program.send("alice" if number % 4 else "bob", n=number)
    await program.settle(7)
    rules = [
        draft(program, "true", debit(lots, "1"), credit(points, "event.n")),
        ChangedRule((await _rule(program)), {}),
    ]

    whole = await simulated(program, rules)
    figures = []
    for size, milliseconds in ((1, 1_000), (8, 1_000), (400, 0)):
        monkeypatch.setattr(limits, "SIMULATION_EVENTS", size)
        monkeypatch.setattr(limits, "SIMULATION_BATCH_MS", milliseconds)
        done = await simulated(program, rules)
        figures.append((tallies(done), done.record.events_done))

    assert figures == [(tallies(whole), 30)] * 3


async def _rule(program: EventProgram) -> UUID:
    rows = await program.sql("select id from rule order by rule_order limit 1")
    found: UUID = rows[0][0]
    return found


# --- what it leaves alone ---


async def test_nothing_but_the_simulations_own_rows_is_written(
    program: EventProgram, run: Any, owner: psycopg.Connection[Any], organization: Tenant
) -> None:
    points, lots, cash = await program.asset(), await program.asset(**LOT), await program.asset(**PREFUNDED)
    await fund(program, cash, "100")
    family = await _family(program)
    actions = [
        credit(lots, "5", matures_at="1h"),
        credit(lots, "5", bucket="HELD", reference_id="'r'", hold_until="1h"),
        credit(points, "1", **to_participant(external_id="event.friend")),
        credit(cash, "2", target={"type": "GROUP", "id": str(family)}),
        counter("n", "1", reset_after="1h"),
        counter("all", "1", **TO_PROGRAM),
        tag("seen"),
        attribute("k", "v"),
        schedule("check", "1h"),
        {"type": "BROADCAST", "event_name": "news"},
    ]
    rule = await program.rule("event.type == 'buy'", *actions, budgets=[BudgetDraft(points, "50")])
    await run(type="buy", friend="bob")
    before = _all_rows(owner, organization.id)

    done = await simulated(
        program,
        [
            ChangedRule(rule.id, {"condition": "event.type == 'buy' || event.type == 'x'"}),
            draft(
                program,
                "true",
                debit(points, "7", allow_negative=True),
                tag("new", **to_participant(external_id="'never seen'")),
                budgets=[BudgetDraft(cash, "3")],
            ),
        ],
    )

    assert {outcome.verdict for _, outcome in done.played} == {"COMPLETED"}
    assert _all_rows(owner, organization.id) == before


def _all_rows(owner: psycopg.Connection[Any], organization_id: UUID) -> dict[str, Any]:
    """Number and hash of an organization's rows in every table but those of simulations."""
    tables = owner.execute(
        "select c.relname from pg_class c join pg_attribute a on a.attrelid = c.oid"
        " where c.relkind = 'r' and c.relnamespace = 'public'::regnamespace and a.attname = 'organization_id'"
        " and c.relname not in ('simulation', 'simulation_holder')"
    ).fetchall()
    assert len(tables) > 30
    return {
        name: owner.execute(
            f"select count(*), md5(string_agg(t::text, '|' order by t::text)) from {name} t where organization_id = %s",
            (organization_id,),
        ).fetchone()
        for (name,) in tables
    }


async def test_what_rules_would_schedule_or_broadcast_is_counted_and_what_really_was_is_simulated(
    program: EventProgram, run: Any, clock: SettableClock
) -> None:
    points = await program.asset()
    await program.rule("event.type == 'buy'", schedule("check", "1h"))
    await program.rule("event.type == 'check'", credit(points, "7"))
    bought = await program.send(type="buy", at=clock())
    await program.settle()
    clock.advance(hours=9_000)
    await program.settle()
    assert (await program.status(bought))[0] == "COMPLETED"

    done = await exact(program)
    news = draft(program, "true", {"type": "BROADCAST", "event_name": "news"})
    drafted = await simulated(program, [news])

    assert [past.event.event_type for past, _ in done.played] == ["EXTERNAL", "SYSTEM"]
    assert [tally.scheduled_events for tally in tallies(done)[0]] == [1, 0]
    assert issued(done, points) == [7, 7]
    # A broadcast event can't broadcast again; one that was scheduled is one deeper than its parent, too.
    assert tallies(drafted)[0] == [Tally(matches=2, failed=1, broadcasts=1)]


# --- what is known of the past ---


async def test_the_range_includes_both_of_its_ends(program: EventProgram, run: Any) -> None:
    await program.rule("true", tag("seen"))
    instants = [(await run()).processed_at for _ in range(5)]

    done = await simulated(program, since=instants[1], until=instants[3])

    assert [past.processed_at for past, _ in done.played] == instants[1:4]
    assert (done.record.basis, done.record.events_total, done.record.events_done) == ("STATE_AT_FROM", 3, 3)
    assert (await simulated(program, since=instants[0])).record.basis == "BEGINNING"


async def test_what_happens_after_it_was_made_is_no_part_of_it(program: EventProgram, run: Any) -> None:
    await program.rule("true", tag("seen"))
    await run()
    simulation_id = await make_simulation(program.database, program.organization_id, program.id)
    await run()

    assert len(await carry(program.database, program.organization_id, simulation_id)) == 1


async def test_budgets_begin_with_what_had_been_issued_by_then(
    program: EventProgram, run: Any, clock: SettableClock
) -> None:
    points, lots = await program.asset(), await program.asset(**LOT)
    daily = {"schedule_type": "CRON", "cron_expression": "0 0 * * *"}
    of_three_hours = {"schedule_type": "INTERVAL", "interval": "3h"}
    for schedule_of_budget in ({}, daily, of_three_hours):
        await program.rule("true", credit(points, "4"), budgets=[BudgetDraft(points, "21", **schedule_of_budget)])
    held = credit(lots, "5", bucket="HELD", reference_id="event.ref")
    await program.rule("event.type == 'auth'", held)
    settles = credit(lots, "event.amount", reference_id="event.ref")
    await program.rule("event.type == 'settle'", settles, budgets=[BudgetDraft(lots, "6")])
    instants = []
    for number in range(12):
        clock.advance(hours=2)
        await run(type="auth", ref=f"r{number}")
        instants.append((await run(type="settle", ref=f"r{number}", amount=Decimal(7 - number % 4))).processed_at)

    for since in (LONG_AGO, *instants):
        done = await exact(program, since=since)
    assert sum(tally.skipped_budget for tally in tallies(await exact(program))[0]) > 10
    assert done.record.events_total == 1


async def test_what_upkeep_did_late_comes_just_as_late_and_other_things_come_in_time(
    program: EventProgram, run: Any, clock: SettableClock
) -> None:
    lots = await program.asset(**LOT)
    await program.rule("event.type == 'earn'", credit(lots, "10", matures_at="1h"))
    await program.rule("event.type == 'spend'", debit(lots, "4"))
    other = draft(program, "event.type == 'earn'", credit(lots, "10", matures_at="30m"))
    await run(type="earn")
    clock.advance(minutes=40)
    await run(type="spend")
    clock.advance(minutes=50)
    await run(type="spend")
    clock.advance(seconds=1)
    await sweep(program.database, program.organization_id)
    await run(type="spend")

    done = await exact(program)
    drafted = await simulated(program, [other, draft(program, "event.type == 'spend'", debit(lots, "4"))])

    assert [past.is_completed for past, _ in done.played] == [True, False, False, True]
    # The draft's lots have no counterpart that was late.
    assert [outcome.verdict for _, outcome in drafted.played] == ["COMPLETED", "COMPLETED", "COMPLETED", "RETRY"]


async def test_holds_of_simulated_rules_come_to_their_end(
    program: EventProgram, run: Any, clock: SettableClock
) -> None:
    points = await program.asset()
    await program.rule("event.type == 'earn'", credit(points, "10"))
    await program.rule("event.type == 'spend'", debit(points, "10"))
    rule = await program.rule("event.type == 'hold'", move("HOLD", points, "10"))
    await run(type="earn")
    await run(type="hold")
    clock.advance(hours=2)
    await run(type="spend")

    done = await simulated(program, ChangedRule(rule.id, {"actions": [move("HOLD", points, "10", hold_until="1h")]}))

    assert [past.is_completed for past, _ in done.played] == [True, True, False]
    assert [outcome.verdict for _, outcome in done.played] == ["COMPLETED"] * 3


async def test_a_batch_took_those_that_had_waited_before_fresh_ones(
    program: EventProgram, run: Any, clock: SettableClock
) -> None:
    points = await program.asset()
    await program.rule("event.type == 'spend'", debit(points, "5"), counter("order", "event.n"))
    await program.rule("event.type == 'earn'", credit(points, "5"))
    later = RetryPolicy(max_attempts=2, waits_s=(60,))
    first = await program.send(type="spend", n=1)
    await program.batch(retries=NO_RETRIES)
    clock.advance(seconds=1)
    second = await program.send(type="spend", n=2)
    await program.batch(retries=later)
    clock.advance(minutes=2)
    # Accepted before the second, the first one is as fresh as can be now.
    async with program.database.transaction(program.organization_id) as tx:
        await queries.retry(tx, first)
        await queries.retry_all(tx, program.id, None, None, None)
    holder = Holder("PARTICIPANT", await program.id_of("alice") or UUID(int=0))
    await credit_by_hand(program, holder, points, "5")
    clock.advance(seconds=1)
    assert (await program.batch(retries=NO_RETRIES)).events == 2
    assert [(await program.status(event))[0] for event in (first, second)] == ["FAILED", "COMPLETED"]

    await exact(program)


async def test_whoever_was_suspended_then_is_suspended_then(
    program: EventProgram, run: Any, clock: SettableClock
) -> None:
    points = await program.asset()
    rule = await program.rule("event.type == 'buy'", credit(points, "1"))
    await program.rule("participant.status == 'SUSPENDED'", tag("blocked"))
    await run(type="buy")
    statuses: tuple[ParticipantStatus, ...] = ("SUSPENDED", "ACTIVE")
    for status in statuses:
        clock.advance(seconds=1)
        alice = await program.id_of("alice")
        assert alice is not None
        async with program.database.transaction(program.organization_id) as tx:
            await participants.set_status(tx, alice, status)
        await run(type="buy")

    done = await exact(program)
    changed = await simulated(program, ChangedRule(rule.id, {"actions": [tag("bought")]}))

    assert [outcome.verdict for _, outcome in done.played] == ["COMPLETED", "FAILED", "COMPLETED"]
    assert [tally.matches for tally in tallies(changed)[0]] == [3, 1]


async def test_who_was_in_a_group_then_is_in_it_then(program: EventProgram, run: Any, clock: SettableClock) -> None:
    points = await program.asset()
    await program.rule("groups.exists(g, g.role == 'MEMBER')", credit(points, "1", **TO_EVENT_GROUP))
    await program.rule("has(group.id)", counter("visits", "1", **TO_EVENT_GROUP))
    alice = await program.participant("alice")
    family = await _family(program)
    steps: Sequence[Callable[[Any], Any]] = (
        lambda tx: groups.add_members(tx, family, [NewMember(alice, "MEMBER")], None),
        lambda tx: groups.remove_member(tx, family, alice),
        lambda tx: groups.archive(tx, family),
    )
    await run(family=str(family))
    for step in steps:
        clock.advance(seconds=1)
        async with program.database.transaction(program.organization_id) as tx:
            await step(tx)
        await run(family=str(family))

    done = await exact(program)

    assert [len(outcome.evaluations) for _, outcome in done.played] == [0, 2, 0, 0]


async def _family(program: EventProgram) -> UUID:
    async with program.database.transaction(program.organization_id) as tx:
        return await make_group(tx)


async def test_an_asset_takes_value_until_it_was_archived(
    program: EventProgram, run: Any, clock: SettableClock
) -> None:
    points = await program.asset()
    await program.rule("true", credit(points, "1"))
    await run()
    clock.advance(seconds=1)
    async with program.database.transaction(program.organization_id) as tx:
        await assets.update(tx, points, {"status": "ARCHIVED"})
    await run()

    assert [outcome.error for _, outcome in (await exact(program)).played] == [
        None,
        "action CREDIT failed: asset is archived",
    ]


async def test_whom_the_simulated_rules_name_for_the_first_time_exists_in_the_simulation_only(
    program: EventProgram, run: Any
) -> None:
    points = await program.asset()
    await program.rule("true", tag("seen"))
    for friend in ("carol", "carol", "dave"):
        await run(friend=friend)

    to_friend = to_participant(external_id="event.friend")
    done = await simulated(
        program,
        [
            draft(program, "true", counter("n", "1", **to_friend), credit(points, "3", **to_friend)),
            draft(program, "true", debit(points, "4", **to_friend)),
        ],
    )

    # Carol has six points only when the second event gives her three more.
    assert [outcome.verdict for _, outcome in done.played] == ["RETRY", "RETRY", "RETRY"]
    earned = await simulated(program, [draft(program, "true", counter("n", "1", **to_friend))])
    values = [outcome.evaluations[0]["actions"][0]["new_value"] for _, outcome in earned.played]
    assert values == ["1", "2", "1"]
    assert await program.id_of("carol") is None


@pytest.mark.parametrize("size", [1, 400])
async def test_whom_it_has_made_it_finds_again(
    program: EventProgram, run: Any, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """By the external id, and by an id that was written down; also from one batch to the next."""
    monkeypatch.setattr(limits, "SIMULATION_EVENTS", size)
    await program.rule("true", tag("seen"))
    for _ in range(2):
        await run(friend="carol")
    made = '"made" in participant.tags'
    to_carol = to_participant(external_id="event.friend")
    by_id = to_participant(participant_id="event.id_of_carol")
    simulation_id = await make_simulation(
        program.database,
        program.organization_id,
        program.id,
        [
            draft(program, "has(event.friend)", counter("n", "1", **to_carol), tag("made", **to_carol)),
            draft(program, "has(event.id_of_carol)", counter("n", "10", **by_id)),
            draft(program, made, tag("never")),
        ],
    )
    carol = uuid5(simulation_id, "carol")
    await program.sql(
        "update event set event_data = json_build_object('id_of_carol', %s::text)"
        " where seq = (select max(seq) from event)",
        str(carol),
    )

    played = await carry(program.database, program.organization_id, simulation_id)

    last = [record["actions"][0]["new_value"] for record in played[-1][1].evaluations]
    assert last == ["11"]


async def test_under_reject_nobody_is_known_before_they_came(
    database: Database, organization: Tenant, clock: SettableClock
) -> None:
    clock.set("2026-03-01T12:00:00Z")
    program = await EventProgram.open(database, organization.id, on_unknown_participant="REJECT")
    await program.rule("true", tag("seen"))
    await program.send("zoe")
    await program.settle()
    clock.advance(seconds=1)
    await program.participant("zoe")
    clock.advance(seconds=1)
    await program.send("zoe")
    await program.settle()

    done = await exact(program)
    to_unknown = draft(program, "true", tag("x", **to_participant(external_id="'nobody'")))

    assert verdicts(done) == [("FAILED", "unknown participant"), ("COMPLETED", None)]
    assert verdicts(await simulated(program, [to_unknown]))[1] == (
        "FAILED",
        "action TAG failed: target participant not found",
    )


async def test_what_brought_down_whoever_tried_it_is_not_tried_again(program: EventProgram) -> None:
    await program.rule("true", tag("seen"))
    await program.send()
    await process_batch(
        program.database, program.organization_id, program.id, 1, NO_RETRIES, poison="processing failed: MemoryError"
    )

    done = await exact(program)

    assert verdicts(done) == [("FAILED", "processing failed: MemoryError")]


async def test_an_event_that_cannot_be_applied_fails_and_holds_up_no_others(
    program: EventProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    await program.rule("true", counter("n", "1"))
    for number in range(3):
        await program.send(n=number)
    await program.settle()

    def broken(world: Any, rules: Any, event: Any, now: Any) -> Any:
        outcome = apply_event(world, rules, event, now)
        if event.data["n"] == 1:
            raise ZeroDivisionError
        return outcome

    monkeypatch.setattr("domain.simulations.stage.apply_event", broken)
    done = await simulated(program)

    assert verdicts(done) == [
        ("COMPLETED", None),
        ("FAILED", "processing failed: ZeroDivisionError"),
        ("COMPLETED", None),
    ]
    assert done.played[2][1].evaluations[0]["actions"][0]["new_value"] == "2"


# --- what others did ---


async def test_the_others_of_a_filter_do_what_they_did(program: EventProgram, run: Any) -> None:
    """Bob is simulated with other amounts; what ann took out of the wallet, and counted, she took and counted."""
    cash = await program.asset(**PREFUNDED)
    await fund(program, cash, "10")
    total = 'get(program.counters, "total", 0)'
    rule = await program.rule("true", credit(cash, "event.amount"), counter("total", "1", **TO_PROGRAM))
    await program.rule(f"{total} >= 2", tag("third"))
    await run("ann", amount=4)
    await run("bob", amount=4)
    await run("ann", amount=4)
    await run("bob", amount=4)

    only_bob = {"participant_filter": "participant.external_id == 'bob'"}
    unchanged = await simulated(program, **only_bob)
    cheaper = await simulated(program, ChangedRule(rule.id, {"actions": [credit(cash, "1")]}), **only_bob)

    assert unchanged.differences() == []
    assert [past.event.external_id for past, _ in unchanged.played] == ["bob", "bob"]
    assert [past.is_completed for past, _ in unchanged.played] == [True, False]
    assert unchanged.results["left_out"] == 2
    # Ann's second event really failed, so hers is 4 of the 10; bob's two are 1 each now.
    assert issued(cheaper, cash) == [2, 4]
    assert tallies(cheaper)[0][0].failed == 0


async def test_the_filter_sees_participants_as_they_are_now(program: EventProgram, run: Any) -> None:
    await program.rule("true", tag("seen"))
    await run("ann")
    await run("bob")
    ann = await program.id_of("ann")
    assert ann is not None
    async with program.database.transaction(program.organization_id) as tx:
        await state.add_tag(tx, await state.lock(tx, "participant", ann), "vip")

    done = await simulated(program, participant_filter="'vip' in participant.tags && now >= timestamp('2026-01-01')")

    assert [past.event.external_id for past, _ in done.played] == ["ann"]


async def test_however_much_others_did_it_is_taken_in_portions(
    program: EventProgram, run: Any, clock: SettableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "OTHERS_FIRST_LOOK", 1)
    monkeypatch.setattr(limits, "OTHERS_LAST_LOOK", 1)
    monkeypatch.setattr(limits, "OTHERS_STATE_CHANGES", 3)
    points = await program.asset()
    await program.rule("true", debit(points, "1"))
    await program.rule('"gold" in participant.tags', counter("n", "1"))
    await run()
    alice = await program.id_of("alice")
    assert alice is not None
    for _ in range(7):
        clock.advance(seconds=1)
        await credit_by_hand(program, Holder("PARTICIPANT", alice), points, "1")
        async with program.database.transaction(program.organization_id) as tx:
            entity = await state.lock(tx, "participant", alice)
            await state.replace_tags(tx, entity, [] if await state.tags(tx, alice) else ["gold"])
        await run()

    simulation_id = await make_simulation(program.database, program.organization_id, program.id)
    done = await exact(program)

    assert done.record.events_done == 8
    async with program.database.transaction(program.organization_id) as tx:
        first = await advance(tx, simulation_id)
    assert first is not None
    assert first.events_done < 8, "not all of it fits one portion"


async def test_what_others_cannot_do_again_is_counted(program: EventProgram, run: Any, clock: SettableClock) -> None:
    points = await program.asset()
    rule = await program.rule("event.type == 'earn'", credit(points, "10"))
    await program.rule("event.type == 'spend'", debit(points, "1"))
    await run(type="earn")
    clock.advance(seconds=1)
    alice = await program.id_of("alice")
    assert alice is not None
    hold = OperationRequest(operation="HOLD", program_id=program.id, asset_id=points, description="by hand", amount="8")
    async with program.database.transaction(program.organization_id) as tx:
        await operate(tx, Holder("PARTICIPANT", alice), hold)
    await run(type="spend")

    done = await simulated(program, ChangedRule(rule.id, {"actions": [credit(points, "5")]}))

    assert done.results["incomplete"] == 1
    # All five are held then, and none is left to spend.
    assert [outcome.verdict for _, outcome in done.played] == ["COMPLETED", "RETRY"]
    async with program.database.transaction(program.organization_id) as tx:
        notes = (await read_figures(tx, done.record)).notes
    assert len(notes) == 1
    assert "1 operations of others" in notes[0]


# --- limits ---


async def test_a_holder_with_more_lots_than_can_be_carried_along_is_refused(
    program: EventProgram, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SIMULATED_LOTS", 2)
    lots = await program.asset(**LOT)
    await program.rule("true", credit(lots, "1"))
    await program.rule("event.type == 'spend'", debit(lots, "1"))
    for _ in range(3):
        await run()
    middle = (await run(type="spend")).processed_at

    with pytest.raises(TooMuchToSimulate, match="more than 2 open lots"):
        await simulated(program, since=middle)


@pytest.mark.parametrize("passes", [1, 2, 8])
async def test_who_is_named_by_what_was_done_before_is_found_in_the_same_batch(
    program: EventProgram, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    """Each event names whom the one before has written down: one more has to be loaded in every pass."""
    monkeypatch.setattr(limits, "SIMULATION_PASSES", passes)
    by_chain = to_participant(external_id="participant.attributes.next")
    await program.rule("has(participant.attributes.next)", counter("n", "1", **by_chain))
    await program.rule("true", attribute("next", "event.next"))
    for number in range(12):
        await program.send(next=f"friend {number}")
    await program.settle(1)

    done = await exact(program)

    assert done.record.events_done == 12


async def test_an_organization_has_only_so_many_at_once(program: EventProgram) -> None:
    def make() -> Any:
        return make_simulation(program.database, program.organization_id, program.id)

    made = await asyncio.gather(*(make() for _ in range(limits.SIMULATIONS_AT_ONCE + 2)), return_exceptions=True)

    assert sum(isinstance(found, UUID) for found in made) == limits.SIMULATIONS_AT_ONCE
    done = next(found for found in made if isinstance(found, UUID))
    await carry(program.database, program.organization_id, done)
    async with program.database.transaction(program.organization_id) as tx:
        assert (await records.get(tx, program.id, done)).status == "COMPLETED"
    await make()


async def test_rules_that_are_too_large_together_are_refused(
    program: EventProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SIMULATION_RULES_BYTES", 1_000)
    await program.rule("true", tag("x" * 200), description="y" * 900)

    await make_simulation(program.database, program.organization_id, program.id)
    for _ in range(3):
        await program.rule("true", tag("x" * 250))
    with pytest.raises(Exception, match="Invalid request parameters"):
        await make_simulation(program.database, program.organization_id, program.id)


def test_a_tally_counts_only_what_holds() -> None:
    def record(status: str, *actions: dict[str, Any], **fields: Any) -> dict[str, Any]:
        return {"rule_id": "r", "status": status, "actions": list(actions), **fields}

    issue = {"type": "CREDIT", "asset_id": "a", "amount": "5.00"}
    settle = {**issue, "settle": {"held_amount": "8.00", "delta": "-3.00"}}
    found = Tallies()
    found.count([record("SUCCESS", issue, settle)], is_completed=True)
    found.count([record("SUCCESS", issue), record("FAILED")], is_completed=False)
    found.count([record("SKIPPED", issue, reason="BUDGET_EXCEEDED")], is_completed=True)
    found.count([record("SKIPPED", reason="OUTSIDE_TIME_WINDOW"), record("SKIPPED_ERROR")], is_completed=True)

    tally = Tally(matches=4, failed=2, skipped_budget=1, errors=1, issued={"a": Decimal("7.00")})
    assert found == Tallies(completed=3, failed=1, rules={"r": tally})
    assert Tallies.read(found.document()) == found
