"""What asset actions do to balances, lots and holds. Contract: rules-and-events.md 5.3 to 5.9, holders.md 6 and 7.

Each operation itself is tested with the ledger (tests/domain/ledger); here it is about rules: whom an action may touch,
which of its failures can be cured, and that reading no further than necessary never changes what is taken.
"""

from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from domain import limits, wallet
from domain.balances import Holder, OperationRequest, operate
from domain.events.retries import RetryPolicy
from domain.rules.budgets import BudgetDraft
from domain.wallet import WalletRequest
from tests.builders import make_group
from tests.conftest import SettableClock
from tests.events_support import EventProgram, counter, credit, debit, move, tag, to_participant
from tests.ledger_invariants import assert_ledger_invariants

Number = Decimal | int

LOT: dict[str, Any] = {"inventory_mode": "LOT"}
CURES = RetryPolicy(max_attempts=2, waits_s=(2,))


@pytest.fixture
async def program(program: EventProgram) -> Any:
    """The program; at the end of the test its organization's ledger is checked."""
    yield program
    async with program.database.transaction(program.organization_id) as tx:
        await assert_ledger_invariants(tx.connection, program.organization_id)


async def fund(program: EventProgram, asset_id: UUID, amount: str) -> None:
    async with program.database.transaction(program.organization_id) as tx:
        await wallet.fund(tx, WalletRequest(program_id=program.id, asset_id=asset_id, amount=amount))


async def group_of(program: EventProgram, *members: UUID, **fields: Any) -> UUID:
    async with program.database.transaction(program.organization_id) as tx:
        return await make_group(tx, *members, **fields)


async def buckets(program: EventProgram, who: str | UUID, asset_id: UUID) -> tuple[Number, Number, Number]:
    """(available, held, deferred) of a holder."""
    entity_id = await program.id_of(who) if isinstance(who, str) else who
    rows = dict(
        await program.sql(
            "select a.bucket, sum(p.amount) from posting p join account a on a.organization_id = p.organization_id"
            " and a.id = p.account_id where a.entity_id = %s and a.asset_id = %s group by a.bucket",
            entity_id,
            asset_id,
        )
    )
    zero = Decimal(0)
    return rows.get("AVAILABLE", zero), rows.get("HELD", zero), rows.get("DEFERRED", zero)


async def lots(program: EventProgram, asset_id: UUID) -> list[tuple[Number, Number, str]]:
    """(amount, remaining, status) of every lot, the oldest first."""
    return await program.sql(
        "select amount, remaining, status from lot where asset_id = %s order by created_at, id", asset_id
    )


async def sum_of(program: EventProgram, entity_type: str, asset_id: UUID) -> Decimal:
    ((amount,),) = await program.sql(
        "select coalesce(sum(p.amount), 0) from posting p join account a on a.organization_id = p.organization_id"
        " and a.id = p.account_id where a.entity_type = %s and a.asset_id = %s",
        entity_type,
        asset_id,
    )
    return Decimal(amount)


# --- authorization and settlement ---


@pytest.mark.parametrize(("settled", "delta"), [("8", "-2"), ("10", "0"), ("15.5", "5.5")])
async def test_a_settle_takes_the_place_of_what_was_authorized(program: EventProgram, settled: str, delta: str) -> None:
    points = await program.asset(**LOT)
    await program.rule("event.type == 'auth'", credit(points, "10", bucket="HELD", reference_id="event.ref"))
    await program.rule("event.type == 'capture'", credit(points, "event.amount", reference_id="event.ref"))

    await program.run(type="auth", ref="a1")
    event = await program.run(type="capture", ref="a1", amount=Decimal(settled))

    assert await buckets(program, "alice", points) == (Decimal(settled), 0, 0)
    assert await sum_of(program, "SYSTEM_ISSUANCE", points) == -Decimal(settled)
    assert event.evaluations is not None
    shown = event.evaluations[0]["actions"][0]["settle"]
    assert (Decimal(shown["held_amount"]), Decimal(shown["delta"])) == (Decimal(10), Decimal(delta))
    assert await program.sql("select status, remaining from hold") == [("SETTLED", 0)]


async def test_authorization_and_settlement_in_one_batch_do_the_same(program: EventProgram) -> None:
    points = await program.asset(**LOT)
    await program.rule("event.type == 'auth'", credit(points, "10", bucket="HELD", reference_id="event.ref"))
    await program.rule("event.type == 'capture'", credit(points, "7", reference_id="event.ref"))

    for ref in ("a1", "a2"):
        await program.send(type="auth", ref=ref)
        await program.send(type="capture", ref=ref)
    assert (await program.batch()).events == 4

    assert await buckets(program, "alice", points) == (14, 0, 0)
    assert await lots(program, points) == [(10, 0, "CONSUMED"), (7, 7, "AVAILABLE")] * 2


async def test_a_settle_without_an_authorization_is_a_plain_credit(program: EventProgram) -> None:
    points = await program.asset(**LOT)
    await program.rule("true", credit(points, "7", reference_id="event.ref"))

    event = await program.run(ref="nothing")

    assert event.evaluations is not None
    assert event.evaluations[0]["actions"][0]["settle"] == {"held_amount": "0.00", "delta": "7.00"}
    assert await buckets(program, "alice", points) == (7, 0, 0)


async def test_what_is_settled_below_goes_back_to_the_wallet_of_each_lots_program(program: EventProgram) -> None:
    points = await program.asset(issuance_policy="PREFUNDED", **LOT)
    other = await EventProgram.open(program.database, program.organization_id, name="Other")
    await program.sql(
        "insert into program_asset (organization_id, program_id, asset_id, created_at) values (%s, %s, %s, now())",
        program.organization_id,
        other.id,
        points,
    )
    await fund(program, points, "100")
    await fund(other, points, "100")
    held = credit(points, "10", bucket="HELD", reference_id="'trip'")
    await program.rule("event.type == 'auth'", held)
    await other.rule("event.type == 'auth'", held)
    await program.rule("event.type == 'capture'", credit(points, "3", reference_id="'trip'"))
    await program.run(type="auth")
    await other.run(type="auth")

    await program.run(type="capture")

    # 20 were held, 3 are settled: 17 go back, the newer lot's 10 to the other program first.
    assert await program.balances(points, program.id, other.id) == [97, 100]
    assert await buckets(program, "alice", points) == (3, 0, 0)


async def test_voiding_an_authorization_gives_it_back_and_spares_what_was_held_of_ones_own(
    program: EventProgram,
) -> None:
    points = await program.asset(**LOT)
    await program.rule("event.type == 'earn'", credit(points, "50"), move("HOLD", points, "50", reference_id="'B'"))
    await program.rule("event.type == 'auth'", credit(points, "10", bucket="HELD", reference_id="'B'"))
    await program.rule("event.type == 'void'", move("VOID_HOLD", points, reference_id="'B'"), tag("voided"))

    await program.run(type="earn")
    await program.run(type="void")
    assert await buckets(program, "alice", points) == (0, 50, 0)

    await program.run(type="auth")
    event = await program.run(type="void")
    assert event.status == "COMPLETED"
    assert await buckets(program, "alice", points) == (0, 50, 0)
    assert await program.tags() == {"voided"}


async def test_an_authorization_counts_into_its_budget_and_a_settle_only_with_its_delta(program: EventProgram) -> None:
    points = await program.asset(**LOT)
    budgets = [BudgetDraft(points, "12")]
    await program.rule("event.type == 'auth'", credit(points, "10", bucket="HELD", reference_id="event.ref"))
    rule = await program.rule(
        "event.type == 'capture'", credit(points, "event.amount", reference_id="event.ref"), budgets=budgets
    )
    await program.run(type="auth", ref="a")
    await program.run(type="capture", ref="a", amount=14)
    await program.run(type="auth", ref="b")
    await program.run(type="capture", ref="b", amount=9)

    assert await program.sql("select consumed from rule_budget where rule_id = %s", rule.id) == [(3,)]

    event = await program.run(type="capture", ref="none", amount=10)
    assert (event.status, event.evaluations[0]["reason"]) == ("COMPLETED", "BUDGET_EXCEEDED")  # type: ignore[index]


# --- ends of holds ---


async def test_a_hold_with_an_end_is_carried_by_the_program_and_the_batch_says_so(
    program: EventProgram, clock: SettableClock
) -> None:
    clock.set("2026-03-01T12:00:00Z")
    points = await program.asset()
    await program.rule("true", credit(points, "5", bucket="HELD", hold_until="72h"))
    await program.send()

    result = await program.batch()

    assert result.news is not None
    assert result.news.has_new_ends
    rows = await program.sql("select carrier, on_expiry, expires_at - created_at, reference_id from hold")
    assert rows == [("PROGRAM", "RELEASE", timedelta(hours=72), None)]


async def test_a_rule_that_ends_a_hold_of_the_api_says_whose_workflow_is_to_look(program: EventProgram) -> None:
    points = await program.asset()
    alice = await program.participant("alice")
    await program.rule("event.type == 'earn'", credit(points, "5"))
    await program.rule("event.type == 'release'", move("RELEASE", points))
    await program.run(alice, type="earn")
    async with program.database.transaction(program.organization_id) as tx:
        request = OperationRequest(
            operation="HOLD", program_id=program.id, asset_id=points, description="x", expires_in=timedelta(hours=1)
        )
        made = await operate(tx, Holder("PARTICIPANT", alice), request)
    await program.send(alice, type="release")

    result = await program.batch()

    assert result.news is not None
    assert result.news.ended_holds == (made.hold_id,)


# --- what falls short ---


@pytest.mark.parametrize(
    "action",
    [
        {"type": "DEBIT", "amount": "5"},
        {"type": "DEBIT", "amount": "5", "bucket": "HELD"},
        {"type": "HOLD", "amount": "5"},
        {"type": "RELEASE"},
        {"type": "RELEASE", "amount": "5"},
        {"type": "FORFEIT", "amount": "5"},
        {"type": "FORFEIT", "bucket": "HELD"},
    ],
)
@pytest.mark.parametrize("mode", ["SIMPLE", "LOT"])
async def test_what_is_short_now_may_be_there_at_the_next_attempt(
    program: EventProgram, clock: SettableClock, mode: str, action: dict[str, Any]
) -> None:
    clock.set("2026-03-01T12:00:00Z")
    points = await program.asset(inventory_mode=mode)
    await program.rule("event.type == 'take'", action | {"asset_id": str(points)})
    await program.rule("event.type == 'give'", credit(points, "5"), credit(points, "5", bucket="HELD"))

    event_id = await program.send(type="take")
    await program.settle(retries=CURES)
    status, message = await program.status(event_id)
    assert (status, "insufficient" in (message or "") or "nothing is held" in (message or "")) == ("PENDING", True)

    await program.run(type="give")
    clock.advance(seconds=3)
    await program.settle(retries=CURES)

    assert await program.status(event_id) == ("COMPLETED", None)


async def test_an_overdraft_uses_up_every_lot_and_books_the_expired_ones(
    program: EventProgram, clock: SettableClock
) -> None:
    clock.set("2026-03-01T12:00:00Z")
    points = await program.asset(**LOT)
    await program.rule("event.type == 'earn'", credit(points, "10", expires_at="event.lasts"))
    await program.rule("event.type == 'clawback'", debit(points, "25", allow_negative=True))
    await program.run(type="earn", lasts="1h")
    await program.run(type="earn", lasts="1000h")
    clock.advance(hours=2)

    await program.run(type="clawback")

    assert await buckets(program, "alice", points) == (-15, 0, 0)
    assert await lots(program, points) == [(10, 0, "EXPIRED"), (10, 0, "CONSUMED")]


async def test_a_lot_past_its_expiry_pays_for_nothing(program: EventProgram, clock: SettableClock) -> None:
    clock.set("2026-03-01T12:00:00Z")
    points = await program.asset(**LOT)
    await program.rule("event.type == 'earn'", credit(points, "10", expires_at="event.lasts"))
    await program.rule("event.type == 'spend'", debit(points, "10"))
    await program.run(type="earn", lasts="1h")
    clock.advance(hours=2)

    assert (await program.run(type="spend")).status == "FAILED"

    await program.run(type="earn", lasts="1h")
    assert (await program.run(type="spend")).status == "COMPLETED"
    assert [row[2] for row in await lots(program, points)] == ["AVAILABLE", "CONSUMED"]


async def test_zero_is_a_no_op_everywhere(program: EventProgram) -> None:
    points = await program.asset(**LOT)
    for kind in ("CREDIT", "DEBIT", "HOLD", "RELEASE", "FORFEIT"):
        await program.rule("true", {"type": kind, "asset_id": str(points), "amount": "0"})

    event = await program.run()

    assert event.status == "COMPLETED"
    assert await program.entries() == []
    assert await program.sql("select id from hold") == []


# --- reading no further than necessary ---


@pytest.mark.parametrize("beginning", [1, 2, 5])
async def test_fifo_holds_however_little_of_a_shelf_is_read_at_first(
    program: EventProgram, monkeypatch: pytest.MonkeyPatch, beginning: int
) -> None:
    """Five old lots of 2 and, in the same batch, a new one of 10: a debit of 7 eats old ones, not the new one."""
    monkeypatch.setattr(limits, "SHELF_BEGINNING", beginning)
    points = await program.asset(**LOT)
    await program.rule("event.type == 'earn'", credit(points, "event.amount"))
    await program.rule("event.type == 'spend'", debit(points, "event.amount"))
    for _ in range(5):
        await program.run(type="earn", amount=2)

    await program.send(type="earn", amount=10)
    await program.send(type="spend", amount=7)
    await program.send(type="spend", amount=2)
    assert (await program.batch()).completed == 3

    left = [2 - 2, 0, 0, 0, 1, 10]
    assert [remaining for _, remaining, _ in await lots(program, points)] == left


async def test_a_release_by_reference_finds_its_lots_behind_many_others(
    program: EventProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SHELF_BEGINNING", 2)
    points = await program.asset(**LOT)
    hold = move("HOLD", points, "1", reference_id="event.ref")
    await program.rule("event.type == 'hold'", credit(points, "1"), hold)
    await program.rule("event.type == 'release'", move("RELEASE", points, reference_id="event.ref"))
    for ref in ("a", "b", "c", "d", "d"):
        await program.run(type="hold", ref=ref)

    await program.run(type="release", ref="d")

    assert await buckets(program, "alice", points) == (2, 3, 0)
    assert await program.sql("select distinct reference_id from lot where status = 'HELD' order by 1") == [
        ("a",),
        ("b",),
        ("c",),
    ]


async def test_settling_many_references_at_once_takes_no_more_passes_than_settling_one(
    program: EventProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SHELF_BEGINNING", 2)
    points = await program.asset(**LOT)
    references = [f"trip-{number}" for number in range(8)]
    await program.rule("event.type == 'hold'", credit(points, "5"), move("HOLD", points, "5", reference_id="event.ref"))
    settle = [(move("RELEASE", points, reference_id=f"'{ref}'"), debit(points, "4")) for ref in references]
    await program.rule("event.type == 'settle'", *(action for pair in settle for action in pair))
    for ref in references:
        await program.run(type="hold", ref=ref)

    event = await program.run(type="settle")

    assert (event.status, event.error_message) == ("COMPLETED", None)
    assert await buckets(program, "alice", points) == (8, 0, 0)


async def test_a_debit_from_held_by_reference_leaves_other_holds_alone(program: EventProgram) -> None:
    points = await program.asset(**LOT)
    await program.rule("event.type == 'auth'", credit(points, "10", bucket="HELD", reference_id="event.ref"))
    await program.rule("event.type == 'take'", debit(points, "10", bucket="HELD", reference_id="event.ref"))
    await program.run(type="auth", ref="A")
    await program.run(type="auth", ref="B")

    await program.run(type="take", ref="B")

    assert await program.sql("select reference_id, status from hold order by 1") == [("A", "ACTIVE"), ("B", "SETTLED")]


async def test_a_settle_inherits_no_expiry_before_its_own_maturity(program: EventProgram) -> None:
    points = await program.asset(**LOT)
    await program.rule(
        "event.type == 'auth'", credit(points, "10", bucket="HELD", reference_id="'a'", expires_at="24h")
    )
    await program.rule("event.type == 'capture'", credit(points, "9", reference_id="'a'", matures_at="720h"))
    await program.run(type="auth")

    await program.run(type="capture")

    assert await program.sql("select status, expires_at from lot where remaining > 0") == [("DEFERRED", None)]


async def test_generic_releases_of_a_simple_asset_use_up_the_oldest_hold_first(
    program: EventProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SHELF_BEGINNING", 1)
    points = await program.asset()
    await program.rule("event.type == 'hold'", credit(points, "4", bucket="HELD"))
    await program.rule("event.type == 'release'", move("RELEASE", points, "event.amount"))
    for _ in range(4):
        await program.run(type="hold")

    await program.run(type="release", amount=9)

    assert await program.sql("select remaining, status from hold order by created_at, id") == [
        (0, "RELEASED"),
        (0, "RELEASED"),
        (3, "ACTIVE"),
        (4, "ACTIVE"),
    ]


# --- groups ---


async def test_a_group_has_a_wallet_and_state_of_its_own(program: EventProgram) -> None:
    points = await program.asset(**LOT)
    family = await group_of(program, await program.participant("alice"))
    to_family = {"target": {"type": "GROUP", "id": str(family)}}
    by_expression = {"target": {"type": "GROUP", "id": "group.id"}}
    await program.rule("event.type == 'earn'", credit(points, "10", **to_family), counter("visits", "1", **to_family))
    await program.rule("group.counters.visits >= 2", debit(points, "3", **by_expression), tag("busy", **by_expression))

    for _ in range(3):
        await program.run(type="earn")

    # The condition sees the visits before the event: true at the third one only.
    assert await buckets(program, family, points) == (27, 0, 0)
    assert await program.counters(family) == {"visits": 3}
    assert await program.tags(family) == {"busy"}


async def test_an_archived_group_takes_nothing(program: EventProgram) -> None:
    family = await group_of(program, status="ARCHIVED")
    await program.rule("true", tag("x", target={"type": "GROUP", "id": str(family)}))

    event = await program.run()

    assert (event.status, event.error_message) == ("FAILED", "action TAG failed: group is ARCHIVED")


async def test_an_unknown_group_fails_the_action(program: EventProgram) -> None:
    await program.rule("true", tag("x", target={"type": "GROUP", "id": "event.group"}))

    event = await program.run(group="01990000-0000-7000-8000-000000000000")

    assert (event.status, event.error_message) == ("FAILED", "action TAG failed: target group not found")


async def test_expressions_see_the_groups_that_the_participant_is_in(program: EventProgram) -> None:
    alice = await program.participant("alice")
    await group_of(program, alice, name="Family")
    await group_of(program, alice, name="Club")
    await group_of(program, await program.participant("bob"), name="Others")
    await group_of(program, alice, name="Gone", status="ARCHIVED")
    await program.rule("groups.map(g, g.name) == ['Family', 'Club'] && group.name == 'Family'", tag("both"))
    await program.rule("groups.exists(g, g.role == 'ADMIN' && g.tags.size() == 0)", tag("admin"))
    await program.rule("has(group.id)", tag("grouped"))

    await program.run("alice")
    await program.run("carol")

    assert await program.tags("alice") == {"both", "admin", "grouped"}
    assert await program.tags("carol") == set()


# --- other programs, other participants ---


async def test_a_rule_may_change_the_state_of_another_program(program: EventProgram) -> None:
    other = await EventProgram.open(program.database, program.organization_id, name="Other")
    await program.rule("true", counter("referrals", "1", target={"type": "PROGRAM", "id": str(other.id)}))

    await program.run()
    await program.run()

    assert await program.counters(other.id) == {"referrals": 2}
    assert await program.counters(program.id) == {}


async def test_an_archived_asset_takes_no_new_value_and_lets_go_of_what_it_holds(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule("event.type == 'hold'", credit(points, "5", bucket="HELD"))
    await program.rule("event.type == 'release'", move("RELEASE", points))
    await program.rule("event.type == 'own'", move("HOLD", points, "1"))
    await program.run(type="hold")
    await program.sql("update asset set status = 'ARCHIVED' where id = %s", points)

    assert (await program.run(type="release")).status == "COMPLETED"
    refused = await program.run(type="own")
    assert (refused.status, refused.error_message) == ("FAILED", "action HOLD failed: asset is archived")


@pytest.mark.parametrize("kind", ["HOLD", "RELEASE", "FORFEIT"])
async def test_value_of_a_suspended_participant_stays_where_it_is(program: EventProgram, kind: str) -> None:
    points = await program.asset()
    await program.participant("alice")
    await program.rule("event.type == 'earn'", credit(points, "5"), credit(points, "5", bucket="HELD"))
    await program.rule("event.type == 'take'", move(kind, points, "1"))
    await program.run(type="earn")
    await program.sql("update participant set status = 'SUSPENDED'")

    event = await program.run(type="take")

    assert (event.status, event.error_message) == ("FAILED", f"action {kind} failed: participant is SUSPENDED")
    assert event.attempts == 1


async def test_provisional_value_is_taken_back_from_a_suspended_participant_too(program: EventProgram) -> None:
    points = await program.asset(**LOT)
    await program.participant("alice")
    await program.rule("event.type == 'auth'", credit(points, "5", bucket="HELD", reference_id="'r'"))
    await program.rule("event.type == 'void'", move("VOID_HOLD", points, reference_id="'r'"))
    await program.run(type="auth")
    await program.sql("update participant set status = 'SUSPENDED'")

    assert (await program.run(type="void")).status == "COMPLETED"
    assert await buckets(program, "alice", points) == (0, 0, 0)


async def test_a_split_credit_is_atomic(program: EventProgram) -> None:
    points = await program.asset()
    await program.participant("bob", status="SUSPENDED")
    await program.rule(
        "true",
        credit(points, "7"),
        credit(points, "2", **to_participant(external_id="'carol'")),
        credit(points, "1", **to_participant(external_id="'bob'")),
    )

    assert (await program.run()).status == "FAILED"

    assert await program.entries() == []
