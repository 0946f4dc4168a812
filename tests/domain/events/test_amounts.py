"""What asset actions may move, and which failures are worth another attempt.

Contract: rules-and-events.md 5.4 to 5.6, 7.6; basics.md 5.9, 6.6 to 6.8.
"""

from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from domain import wallet
from domain.events.queries import retry
from domain.events.retries import RetryPolicy
from domain.wallet import WalletRequest
from tests.conftest import SettableClock
from tests.events_support import EventProgram, counter, credit, debit, tag

CONTRACT = RetryPolicy()
"""Five attempts, 2, 4, 8 and 16 seconds apart."""


async def fund(program: EventProgram, asset_id: UUID, amount: str) -> None:
    async with program.database.transaction(program.organization_id) as tx:
        await wallet.fund(tx, WalletRequest(program_id=program.id, asset_id=asset_id, amount=amount))


async def set_asset(program: EventProgram, asset_id: UUID, column: str, value: Any) -> None:
    await program.sql(f"update asset set {column} = %s where id = %s", value, asset_id)


# --- amounts ---


async def test_a_credit_of_an_unlimited_asset_comes_from_issuance(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule("event.type == 'purchase' && event.amount >= 100.0", credit(points, "10"))

    await program.run(type="purchase", amount=Decimal("105.00"))
    await program.run(type="purchase", amount=Decimal("99.99"))

    rows = await program.sql(
        "select a.entity_type, p.amount from posting p join account a on a.organization_id = p.organization_id"
        " and a.id = p.account_id order by p.ordinal"
    )
    assert rows == [("SYSTEM_ISSUANCE", -10), ("PARTICIPANT", 10)]


async def test_a_debit_goes_to_breakage(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule("event.type == 'earn'", credit(points, "10"))
    await program.rule("event.type == 'burn'", debit(points, "event.amount"))

    await program.run(type="earn")
    await program.run(type="burn", amount=Decimal("2.5"))

    assert await program.balance("alice", points) == Decimal("7.5")
    assert await program.sql(
        "select p.amount from posting p join account a on a.organization_id = p.organization_id"
        " and a.id = p.account_id where a.entity_type = 'SYSTEM_BREAKAGE'"
    ) == [(Decimal("2.5"),)]


@pytest.mark.parametrize(
    ("amount", "cause"),
    [
        ("1.005", "amount exceeds asset scale"),
        ("event.small", "amount exceeds asset scale"),
        ("0 - 1", "amount is negative"),
        ("-0.01", "amount is negative"),
        ("100000000000000000000", "amount is too large"),
        ("event.missing", None),
        ("event.text", "amount is not a number"),
        ("true", "amount is not a number"),
        ("event.zero / event.zero", None),
        ("1 / event.zero", None),
        ("10 / 3", "amount exceeds asset scale"),
    ],
)
async def test_an_amount_that_cannot_be_moved_fails_the_event_for_good(
    program: EventProgram, amount: str, cause: str | None
) -> None:
    points = await program.asset()
    await program.rule("true", tag("x"), credit(points, amount))

    event_id = await program.send(small=Decimal("0.001"), text="5", zero=0)
    await program.settle(retries=CONTRACT)
    event = await program.outcome(event_id)

    assert event.status == "FAILED"
    assert event.attempts == 1
    assert (event.error_message or "").startswith("action CREDIT failed: ")
    if cause is not None:
        assert event.error_message == f"action CREDIT failed: {cause}"
    assert (await program.tags(), await program.entries()) == (set(), [])


@pytest.mark.parametrize("amount", ["0", "0.000", "-0", "event.zero", "round(event.tiny * 0.01, 2)", "event.zero * -1"])
async def test_an_amount_of_zero_is_a_success_without_an_entry(program: EventProgram, amount: str) -> None:
    points = await program.asset()
    await program.rule("true", credit(points, amount), debit(points, amount), tag("x"))

    event = await program.run(zero=Decimal("0.00"), tiny=Decimal("0.20"))

    assert event.status == "COMPLETED"
    assert (await program.tags(), await program.entries()) == ({"x"}, [])
    (record,) = await program.evaluations(event.id)
    assert record["status"] == "SUCCESS"
    assert [action["amount"] for action in record["actions"][:2]] == ["0.00", "0.00"]
    assert "journal_entry_id" not in record["actions"][0]


async def test_trailing_zeros_do_not_count_as_decimals(program: EventProgram) -> None:
    points = await program.asset(scale=1)
    await program.rule("true", credit(points, "event.amount"), credit(points, "10.5000"))

    assert (await program.run(amount=Decimal("10.50"))).status == "COMPLETED"
    assert await program.balance("alice", points) == 21


async def test_cel_numbers_are_exact(program: EventProgram) -> None:
    points = await program.asset(scale=18)
    await program.rule("true", credit(points, "0.1 * 3"), credit(points, "event.amount + 0.000000000000000001"))

    await program.run(amount=Decimal("12345678901234567890"))

    assert await program.balance("alice", points) == Decimal("12345678901234567890.300000000000000001")


async def test_max_transaction_amount_may_be_met_but_not_passed(program: EventProgram) -> None:
    points = await program.asset(max_transaction_amount=Decimal("100.00"))
    await program.rule("event.type == 'credit'", credit(points, "event.amount"))
    await program.rule("event.type == 'debit'", debit(points, "event.amount", allow_negative=True))

    for kind in ("credit", "debit"):
        assert (await program.run(type=kind, amount=Decimal("100.0"))).status == "COMPLETED"
        failed = await program.run(type=kind, amount=Decimal("100.01"))
        assert failed.error_message == f"action {kind.upper()} failed: amount exceeds max_transaction_amount"


async def test_the_cap_is_on_each_action_and_not_on_the_event(program: EventProgram) -> None:
    points = await program.asset(max_transaction_amount=Decimal(10))
    await program.rule("true", credit(points, "10"), credit(points, "10"))

    await program.run()

    assert await program.balance("alice", points) == 20


async def test_link_and_archive_are_checked_again_when_a_rule_runs(program: EventProgram) -> None:
    archived, unlinked = await program.asset(), await program.asset()
    await program.rule("event.type == 'archived'", credit(archived, "1"))
    await program.rule("event.type == 'unlinked'", debit(unlinked, "1", allow_negative=True))
    await set_asset(program, archived, "status", "ARCHIVED")
    await program.sql("delete from program_asset where asset_id = %s", unlinked)

    first, second = await program.run(type="archived"), await program.run(type="unlinked")

    assert first.error_message == "action CREDIT failed: asset is archived"
    assert second.error_message == "action DEBIT failed: asset is not linked to the program"


async def test_the_record_of_an_action_tells_what_it_did(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule("true", credit(points, "event.amount * 3"), counter("n", "0.50"))

    event = await program.run(amount=Decimal("1.5"))

    (record,) = await program.evaluations(event.id)
    (entry,) = await program.sql("select id from journal_entry")
    target = {"type": "PARTICIPANT", "id": str(await program.id_of("alice"))}
    assert record["actions"] == [
        {
            "type": "CREDIT",
            "asset_id": str(points),
            "amount": "4.50",
            "target": target,
            "journal_entry_id": str(entry[0]),
        },
        {"type": "COUNTER", "key": "n", "value": "0.5", "new_value": "0.5", "target": target},
    ]


# --- curable failures ---


async def test_a_debit_that_is_not_covered_waits_and_is_cured_by_a_later_credit(
    program: EventProgram, clock: SettableClock
) -> None:
    clock.set("2026-03-01T12:00:00Z")
    points = await program.asset()
    await program.rule("event.type == 'earn'", credit(points, "10"))
    await program.rule("event.type == 'spend'", tag("spender"), debit(points, "10"))

    spent = await program.send(type="spend")
    await program.settle(retries=CONTRACT)
    waiting = await program.outcome(spent)
    assert (waiting.status, waiting.attempts, waiting.processed_at) == ("PENDING", 1, None)
    assert waiting.due_at == clock() + timedelta(seconds=2)
    assert await program.tags() == set()

    earned = await program.send(type="earn")
    await program.settle(retries=CONTRACT)
    assert (await program.status(earned))[0] == "COMPLETED", "a waiting event holds nobody up"

    clock.advance(seconds=1, microseconds=999_999)
    assert await program.settle(retries=CONTRACT) == 0
    clock.advance(microseconds=1)
    assert await program.settle(retries=CONTRACT) == 1

    cured = await program.outcome(spent)
    assert (cured.status, cured.attempts, cured.due_at, cured.error_message) == ("COMPLETED", 2, None, None)
    assert cured.processed_at == clock()
    assert await program.tags() == {"spender"}
    assert await program.balance("alice", points) == 0


async def test_a_wallet_that_is_short_is_curable_by_funding_it(program: EventProgram, clock: SettableClock) -> None:
    clock.set("2026-03-01T12:00:00Z")
    points = await program.asset(issuance_policy="PREFUNDED")
    await fund(program, points, "5")
    await program.rule("true", credit(points, "10"))

    event = await program.send()
    await program.settle(retries=CONTRACT)
    assert await program.status(event) == ("PENDING", "action CREDIT failed: insufficient program balance")

    await fund(program, points, "5")
    clock.advance(seconds=2)
    await program.settle(retries=CONTRACT)

    assert await program.status(event) == ("COMPLETED", None)
    assert await program.balances(points, "alice", program.id) == [10, 0]


async def test_the_waits_are_2_4_8_16_seconds_and_the_fifth_attempt_is_the_last(
    program: EventProgram, clock: SettableClock
) -> None:
    clock.set("2026-03-01T12:00:00Z")
    points = await program.asset()
    await program.rule("true", debit(points, "1"))
    event_id = await program.send()

    for attempt, wait_s in enumerate((2, 4, 8, 16), start=1):
        assert await program.settle(retries=CONTRACT) == 1
        event = await program.outcome(event_id)
        assert (event.status, event.attempts) == ("PENDING", attempt)
        assert event.due_at == clock() + timedelta(seconds=wait_s)
        clock.advance(seconds=wait_s)

    assert await program.settle(retries=CONTRACT) == 1
    event = await program.outcome(event_id)
    assert (event.status, event.attempts, event.due_at) == ("FAILED", 5, None)
    assert event.error_message == "action DEBIT failed: insufficient balance"
    assert await program.settle(retries=CONTRACT) == 0


async def test_a_retry_by_hand_starts_the_count_afresh(program: EventProgram, clock: SettableClock) -> None:
    clock.set("2026-03-01T12:00:00Z")
    points = await program.asset()
    await program.rule("true", debit(points, "1"))
    event = await program.run()
    assert event.status == "FAILED"

    async with program.database.transaction(program.organization_id) as tx:
        await retry(tx, event.id)
    await program.settle(retries=CONTRACT)

    event = await program.outcome(event.id)
    assert (event.status, event.attempts, event.due_at) == ("PENDING", 1, clock() + timedelta(seconds=2))


async def test_a_schedule_of_zero_retries_at_once_and_the_last_step_serves_for_more() -> None:
    assert RetryPolicy(waits_s=(0,)).wait_after(1) == timedelta(0)
    assert RetryPolicy(waits_s=()).wait_after(4) == timedelta(0)
    assert [RetryPolicy(max_attempts=8).wait_after(n) for n in (1, 4, 5, 6, 7, 8)] == [
        *(timedelta(seconds=s) for s in (2, 16, 32, 32, 32)),
        None,
    ]
    assert CONTRACT.wait_after(5) is None


async def test_without_waits_all_attempts_of_a_curable_failure_happen_in_one_go(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule("true", debit(points, "1"))

    event = await program.send()
    assert await program.settle(retries=RetryPolicy(waits_s=(0,))) == 5

    assert (await program.outcome(event)).attempts == 5


async def test_allow_negative_takes_the_balance_below_zero(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule("event.type == 'refund'", debit(points, "10", allow_negative=True))
    await program.rule("event.type == 'earn'", credit(points, "4"))

    assert (await program.run(type="refund")).status == "COMPLETED"
    assert await program.balance("alice", points) == -10
    await program.run(type="earn")
    assert await program.balance("alice", points) == -6


async def test_a_prefunded_debit_does_not_refill_the_wallet(program: EventProgram) -> None:
    points = await program.asset(issuance_policy="PREFUNDED")
    await fund(program, points, "10")
    await program.rule("event.type == 'earn'", credit(points, "10"))
    await program.rule("event.type == 'spend'", debit(points, "10"))

    await program.run(type="earn")
    await program.run(type="spend")

    assert await program.balances(points, "alice", program.id) == [0, 0]


async def test_the_wallet_is_never_overdrawn_within_a_batch(program: EventProgram) -> None:
    points = await program.asset(issuance_policy="PREFUNDED")
    await fund(program, points, "25")
    await program.rule("true", credit(points, "10"))

    events = [await program.send(f"p{i}") for i in range(4)]
    assert (await program.batch()).events == 4

    assert [(await program.status(event))[0] for event in events] == ["COMPLETED", "COMPLETED", "FAILED", "FAILED"]
    assert await program.balance(program.id, points) == 5


async def test_each_program_draws_on_its_own_wallet(program: EventProgram) -> None:
    other = await EventProgram.open(program.database, program.organization_id)
    points = await program.asset(issuance_policy="PREFUNDED")
    await program.sql(
        "insert into program_asset (organization_id, program_id, asset_id, created_at) values (%s, %s, %s, now())",
        program.organization_id,
        other.id,
        points,
    )
    await fund(program, points, "10")
    await program.rule("true", credit(points, "10"))
    await other.rule("true", credit(points, "10"))

    assert (await other.run("alice")).error_message == "action CREDIT failed: insufficient program balance"
    assert (await program.run("alice")).status == "COMPLETED"


# --- lots ---


async def test_every_credit_of_a_lot_asset_makes_a_lot_that_names_its_entry(program: EventProgram) -> None:
    nights = await program.asset(inventory_mode="LOT", scale=0)
    await program.rule("true", credit(nights, "2"), credit(nights, "3"))

    await program.send("alice")
    await program.send("alice")
    await program.settle(10)

    async with program.database.transaction(program.organization_id) as tx:
        lots = await tx.rows(
            "select l.amount, l.remaining, l.status, e.action_type from lot l"
            " join journal_entry e on e.organization_id = l.organization_id and e.id = l.entry_id"
            " where l.organization_id = %s order by l.created_at, l.id",
            (program.organization_id,),
        )
    assert [(lot["amount"], lot["remaining"], lot["status"]) for lot in lots] == [
        (Decimal(amount), Decimal(amount), "AVAILABLE") for amount in (2, 3, 2, 3)
    ]
    assert {lot["action_type"] for lot in lots} == {"CREDIT"}


async def test_an_event_that_fails_leaves_no_lot(program: EventProgram) -> None:
    nights = await program.asset(inventory_mode="LOT", scale=0)
    await program.rule("true", credit(nights, "2"), credit(nights, "0.5"))

    await program.run()

    async with program.database.transaction(program.organization_id) as tx:
        assert await tx.row("select 1 from lot where organization_id = %s", (program.organization_id,)) is None
