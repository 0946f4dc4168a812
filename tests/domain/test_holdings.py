"""Holds, releases, forfeits and voids, and the lots they move. Contract: holders.md 4.3, 6.3 to 6.8, 7.1, 7.2, 9."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import update
from sqlmodel import col

from db.session import Database, Transaction
from db.tables import Asset, Group, Participant, Program
from domain import balances, holds, limits
from domain.balances import AdjustResult, Holder, OperationResult
from domain.errors import Refusal
from domain.holds import HoldFilter
from domain.ids import new_id
from domain.ledger import movements
from domain.ledger.holdings import load_lots, load_oldest_holds
from domain.ledger.lots import Lot, LotBook
from domain.limits import LOTS_PER_PAGE
from domain.pagination import PageRequest
from tests.builders import d, make_group, make_participant, make_program, open_shop
from tests.conftest import SettableClock, Tenant
from tests.domain.ledger.test_moments import assert_indexed, explain
from tests.due_support import timed_hold
from tests.holdings_support import Desk
from tests.ledger_invariants import assert_ledger_invariants
from tests.redemptions_support import Till
from tests.repetitions import nothing_repeated

NOON = datetime.fromisoformat("2025-01-15T12:00:00+00:00")


@pytest.fixture(autouse=True)
async def sound_ledger(database: Database, organization: Tenant) -> AsyncIterator[None]:
    yield
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)


@pytest.fixture
async def simple(database: Database, organization: Tenant) -> Desk:
    """Alice's desk for a SIMPLE asset."""
    return Desk.of(database, organization.id, await open_shop(database, organization.id))


@pytest.fixture
async def desk(database: Database, organization: Tenant) -> Desk:
    """Alice's desk for a LOT asset."""
    return Desk.of(database, organization.id, await open_shop(database, organization.id, inventory_mode="LOT"))


@pytest.fixture
async def funded(database: Database, organization: Tenant) -> Desk:
    """Alice's desk for a PREFUNDED LOT asset, with 1000 in the wallet."""
    shop = await open_shop(database, organization.id, inventory_mode="LOT", issuance_policy="PREFUNDED")
    funded = Desk.of(database, organization.id, shop)
    await funded.fund("1000")
    return funded


async def code_of(call: Awaitable[Any]) -> str:
    with pytest.raises(Refusal) as refused:
        await call
    return refused.value.code


async def field_of(call: Awaitable[Any]) -> str:
    with pytest.raises(Refusal) as refused:
        await call
    assert refused.value.code == "bad_request"
    return refused.value.problems[0].field


async def set_status(desk: Desk, table: Any, id: UUID, status: str) -> None:
    async with desk.database.transaction(desk.organization_id) as tx:
        await tx.run(update(table).where(col(table.id) == id).values(status=status))


def moved(result: OperationResult) -> list[str]:
    """The amounts of the lots that an operation processed."""
    assert result.lots is not None
    return [str(amount) for _, amount in result.lots]


# --- SIMPLE ----------------------------------------------------------------------------------------------------------


async def test_a_hold_reserves_and_a_release_gives_back(simple: Desk) -> None:  # holders.md example 8
    await simple.credit("1000")

    held = await simple.hold("150")
    assert await simple.buckets() == ("850", "150", "0")
    assert await simple.postings(held.journal_entry_id) == [
        ("PARTICIPANT", "AVAILABLE", "-150"),
        ("PARTICIPANT", "HELD", "150"),
    ]

    released = await simple.release()
    assert await simple.buckets() == ("1000", "0", "0")
    assert await simple.postings(released.journal_entry_id) == [
        ("PARTICIPANT", "HELD", "-150"),
        ("PARTICIPANT", "AVAILABLE", "150"),
    ]

    entries = await simple.entries()
    assert await code_of(simple.hold("1000.01")) == "insufficient_balance"
    assert await simple.entries() == entries


async def test_without_an_amount_the_full_bucket_moves(simple: Desk) -> None:
    await simple.credit("10")

    assert (await simple.hold()).amount == 10
    assert (await simple.release()).amount == 10
    assert (await simple.forfeit(bucket="AVAILABLE")).amount == 10
    assert await simple.buckets() == ("0", "0", "0")


@pytest.mark.parametrize("operation", ["HOLD", "RELEASE", "FORFEIT"])
async def test_nothing_is_insufficient(simple: Desk, operation: Any) -> None:
    assert await code_of(simple.operate(operation)) == "insufficient_balance"
    assert await simple.entries() == 0


async def test_more_than_is_held_cannot_be_released(simple: Desk) -> None:
    await simple.credit("10")
    await simple.hold("4")

    assert await code_of(simple.release("4.01")) == "insufficient_balance"
    assert await code_of(simple.forfeit("4.01", bucket="HELD")) == "insufficient_balance"


async def test_an_overdraft_cannot_be_held(simple: Desk) -> None:
    await simple.debit("5", allow_negative=True)

    assert await code_of(simple.hold()) == "insufficient_balance"
    assert await code_of(simple.forfeit(bucket="AVAILABLE")) == "insufficient_balance"


async def test_a_forfeit_goes_to_breakage_from_the_bucket_it_names(simple: Desk) -> None:
    await simple.credit("10")
    await simple.hold("4")

    of_held = await simple.forfeit("1", bucket="HELD")
    of_available = await simple.forfeit("2", bucket="AVAILABLE")

    assert await simple.buckets() == ("4", "3", "0")
    assert await simple.postings(of_held.journal_entry_id) == [
        ("PARTICIPANT", "HELD", "-1"),
        ("SYSTEM_BREAKAGE", "AVAILABLE", "1"),
    ]
    assert await simple.postings(of_available.journal_entry_id) == [
        ("PARTICIPANT", "AVAILABLE", "-2"),
        ("SYSTEM_BREAKAGE", "AVAILABLE", "2"),
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [("lot_ids", [new_id()]), ("earned_from", NOON), ("earned_to", NOON), ("reference_id", "auth1")],
)
@pytest.mark.parametrize("operation", ["HOLD", "RELEASE", "FORFEIT"])
async def test_lot_fields_on_a_simple_asset_are_refused(simple: Desk, operation: Any, field: str, value: Any) -> None:
    await simple.credit("10")
    await simple.hold("5")

    assert await field_of(simple.operate(operation, "1", **{field: value})) == field


async def test_a_simple_asset_has_nothing_to_void(simple: Desk) -> None:
    await simple.credit("10", bucket="HELD")

    assert await code_of(simple.void("auth1")) == "bad_request"


async def test_without_a_name_the_oldest_hold_is_used_up_first(simple: Desk) -> None:
    await simple.credit("100")
    await simple.hold("10")
    await simple.hold("20")
    await simple.credit("30", bucket="HELD")

    await simple.release("15")
    assert await simple.holds() == [("RELEASED", "10", "0"), ("ACTIVE", "20", "15"), ("ACTIVE", "30", "30")]

    await simple.forfeit("20", bucket="HELD")
    assert await simple.holds() == [("RELEASED", "10", "0"), ("FORFEITED", "20", "0"), ("ACTIVE", "30", "25")]

    await simple.debit("25", bucket="HELD")
    assert await simple.holds() == [("RELEASED", "10", "0"), ("FORFEITED", "20", "0"), ("SETTLED", "30", "0")]


# --- Hold records ----------------------------------------------------------------------------------------------------


def hold_of(result: OperationResult) -> UUID:
    assert result.hold_id is not None
    return result.hold_id


@pytest.fixture(params=["simple", "desk"])
def any_desk(request: pytest.FixtureRequest, simple: Desk, desk: Desk) -> Desk:
    """A SIMPLE desk, then a LOT desk: what holds for both."""
    return simple if request.param == "simple" else desk


async def test_a_hold_is_ended_by_its_id_and_by_no_other(any_desk: Desk) -> None:
    await any_desk.credit("100")
    first, second = [hold_of(await any_desk.hold(amount)) for amount in ("10", "20")]

    released = await any_desk.end(second, "RELEASE", "5")
    forfeited = await any_desk.end(second, "FORFEIT")

    assert (released.amount, released.hold_id) == (d("5"), second)
    assert (forfeited.amount, forfeited.hold_id) == (d("15"), second)
    assert await any_desk.holds() == [("ACTIVE", "10", "10"), ("FORFEITED", "20", "0")]
    assert await any_desk.buckets() == ("75", "10", "0")
    assert await code_of(any_desk.end(second, "RELEASE")) == "hold_not_active"
    assert await code_of(any_desk.end(first, "RELEASE", "10.01")) == "insufficient_balance"
    assert await code_of(any_desk.end(first, "FORFEIT", "10.01")) == "insufficient_balance"
    assert await code_of(any_desk.end(new_id(), "RELEASE")) == "not_found"


async def test_an_end_by_id_is_replayed_after_the_hold_is_gone(any_desk: Desk) -> None:
    await any_desk.credit("10")
    hold_id = hold_of(await any_desk.hold())
    first = await any_desk.end(hold_id, "RELEASE", key="k")

    replay = await any_desk.end(hold_id, "RELEASE", key="k")

    assert replay.replayed
    assert (replay.journal_entry_id, replay.amount, replay.lots) == (first.journal_entry_id, d("10"), first.lots)
    assert await code_of(any_desk.end(hold_id, "RELEASE", "10", key="k")) == "idempotency_conflict"


@pytest.mark.parametrize("status", ["SUSPENDED", "CLOSED"])
async def test_an_inactive_participants_hold_can_be_forfeited_not_released(any_desk: Desk, status: str) -> None:
    await any_desk.credit("10")
    hold_id = hold_of(await any_desk.hold())
    await set_status(any_desk, Participant, any_desk.holder.id, status)

    assert await code_of(any_desk.end(hold_id, "RELEASE")) == "participant_inactive"
    assert (await any_desk.end(hold_id, "FORFEIT")).amount == 10


async def test_the_entry_of_an_end_by_id_carries_the_reference_of_the_hold(desk: Desk) -> None:
    await desk.credit("10")
    hold_id = hold_of(await desk.hold(reference_id="auth1"))

    await desk.end(hold_id, "RELEASE")

    async with desk.database.transaction(desk.organization_id) as tx:
        rows = await tx.rows(
            "select action_type from journal_entry where organization_id = %s and reference_id = 'auth1'"
            " order by sequence",
            (desk.organization_id,),
        )
    assert [row["action_type"] for row in rows] == ["HOLD", "RELEASE"]


async def test_the_hold_of_a_pending_redemption_is_out_of_reach(any_desk: Desk) -> None:
    await any_desk.credit("30")
    reserved = (await Till(any_desk).reserve("10")).redemption
    await any_desk.hold("5")

    assert await code_of(any_desk.end(reserved.id, "RELEASE")) == "conflict"
    assert await code_of(any_desk.end(reserved.id, "FORFEIT")) == "conflict"
    assert await code_of(any_desk.debit("5.01", bucket="HELD")) == "insufficient_balance"
    assert await code_of(any_desk.forfeit("5.01", bucket="HELD")) == "insufficient_balance"
    assert (await any_desk.release()).amount == 5
    assert await code_of(any_desk.release()) == "insufficient_balance"
    for lot in await any_desk.lot_rows():
        if lot["hold_id"] == reserved.id:
            assert await code_of(any_desk.release(lot_ids=[lot["id"]])) == "conflict"


async def test_naming_the_reference_of_a_pending_redemption_conflicts(desk: Desk) -> None:
    await desk.credit("30")
    reference_id = str((await Till(desk).reserve("10")).redemption.id)

    assert await code_of(desk.release(reference_id=reference_id)) == "conflict"
    assert await code_of(desk.forfeit(bucket="HELD", reference_id=reference_id)) == "conflict"
    assert await code_of(desk.void(reference_id)) == "conflict"


async def test_a_hold_may_have_an_end(any_desk: Desk, clock: SettableClock) -> None:
    clock.set(NOON)
    await any_desk.credit("30")

    await any_desk.hold("1", expires_at=NOON + timedelta(hours=1))
    await any_desk.hold("2", expires_in=timedelta(hours=2), on_expiry="FORFEIT")
    await any_desk.hold("3")

    assert [(row["expires_at"], row["on_expiry"], row["carrier"]) for row in await any_desk.hold_rows()] == [
        (NOON + timedelta(hours=1), "RELEASE", "WORKFLOW"),
        (NOON + timedelta(hours=2), "FORFEIT", "WORKFLOW"),
        (None, None, None),
    ]


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"expires_at": NOON}, "expires_at"),
        ({"expires_at": NOON - timedelta(days=1)}, "expires_at"),
        ({"expires_in": timedelta(0)}, "expires_in"),
        ({"expires_in": timedelta(seconds=-1)}, "expires_in"),
        ({"expires_at": NOON + timedelta(days=1), "expires_in": timedelta(days=1)}, "expires_in"),
        ({"on_expiry": "FORFEIT"}, "on_expiry"),
    ],
)
async def test_an_end_must_make_sense(simple: Desk, clock: SettableClock, fields: dict[str, Any], wrong: str) -> None:
    clock.set(NOON)
    await simple.credit("10")

    assert await field_of(simple.hold("1", **fields)) == wrong


async def test_a_timed_hold_is_replayed_even_after_its_end(simple: Desk, clock: SettableClock) -> None:
    clock.set(NOON)
    await simple.credit("10")
    first = await simple.hold("1", expires_at=NOON + timedelta(hours=1), idempotency_key="at")
    second = await simple.hold("1", expires_in=timedelta(hours=1), idempotency_key="in")
    clock.advance(hours=2)

    at = await simple.hold("1", expires_at=NOON + timedelta(hours=1), on_expiry="RELEASE", idempotency_key="at")
    after = await simple.hold("1", expires_in=timedelta(hours=1), idempotency_key="in")

    assert (at.replayed, at.hold_id) == (True, first.hold_id)
    assert (after.replayed, after.hold_id) == (True, second.hold_id)


async def test_holds_are_listed_newest_first_and_filtered(any_desk: Desk, database: Database) -> None:
    async with database.transaction(any_desk.organization_id) as tx:
        group = any_desk.using(holder=Holder("GROUP", await make_group(tx)))
    await any_desk.credit("30")
    await group.credit("30")
    mine, other = hold_of(await any_desk.hold("1")), hold_of(await any_desk.hold("2"))
    theirs = hold_of(await group.hold("3"))
    await any_desk.end(mine, "RELEASE")

    async def find(**wanted: Any) -> list[UUID]:
        async with database.transaction(any_desk.organization_id) as tx:
            return [record.hold.id for record in (await holds.find(tx, HoldFilter(**wanted), PageRequest())).items]

    assert await find() == [theirs, other, mine]
    assert await find(participant_id=any_desk.holder.id) == [other, mine]
    assert await find(group_id=group.holder.id) == [theirs]
    assert await find(group_id=any_desk.holder.id) == []
    assert await find(status="RELEASED") == [mine]
    assert await find(asset_id=any_desk.asset_id, program_id=any_desk.program_id, status="ACTIVE") == [theirs, other]
    assert await find(program_id=new_id()) == []
    assert await find(reference_id="none") == []
    assert await field_of(find(participant_id=any_desk.holder.id, group_id=group.holder.id)) == "group_id"


async def test_a_page_of_a_programs_holds_reads_no_holds_of_others(
    simple: Desk, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten thousand newer ones of another program lie before the few of this one."""
    other = simple.using(program_id=await linked_program(simple))
    queries: list[tuple[Any, Any]] = []
    rows = Transaction.rows

    async def seen(tx: Transaction, query: Any, params: Any = None) -> Any:
        queries.append((query, params))
        return await rows(tx, query, params)

    with contextlib.suppress(_Undone):
        async with database.transaction(simple.organization_id) as tx:
            for desk, count, age in ((simple, 100, "1 day"), (other, 10_000, "0")):
                params = {**vars(desk), "holder": desk.holder.id, "now": tx.now, "count": count, "age": age}
                await tx.execute(_MANY_HOLDS, params)
            monkeypatch.setattr(Transaction, "rows", seen)
            page = await holds.find(tx, HoldFilter(program_id=simple.program_id), PageRequest(50))
            query, params = queries[0]
            lines = await explain(tx, query, params)
            raise _Undone

    assert {record.hold.program_id for record in page.items} == {simple.program_id}
    assert not any("Seq Scan" in line or "Sort" in line for line in lines), "\n".join(lines)
    assert any("hold_organization_id_program_id_created_at_id_idx" in line for line in lines), "\n".join(lines)
    assert_indexed(lines, pages=100)


class _Undone(Exception):
    """Rolls a transaction back."""


_MANY_HOLDS = """
insert into hold (organization_id, id, entity_type, entity_id, program_id, asset_id, kind, amount, remaining, status,
                  entry_id, created_at, updated_at)
select %(organization_id)s, gen_random_uuid(), 'PARTICIPANT', %(holder)s, %(program_id)s, %(asset_id)s, 'OWN', 1, 1,
       'ACTIVE', gen_random_uuid(), %(now)s - %(age)s::interval + n * interval '1 microsecond', %(now)s
from generate_series(1, %(count)s) n
"""


# --- LOT: credits and debits -----------------------------------------------------------------------------------------


async def test_a_lot_keeps_when_it_was_earned_and_when_it_expires(desk: Desk, clock: SettableClock) -> None:
    # holders.md example 7
    clock.set("2025-01-15T10:00:00Z")

    await desk.grant("100", expires_at=clock() + timedelta(hours=8760))

    (lot,) = await desk.lot_rows()
    assert lot["created_at"] == datetime.fromisoformat("2025-01-15T10:00:00Z")
    assert lot["expires_at"] == datetime.fromisoformat("2026-01-15T10:00:00Z")
    assert (lot["amount"], lot["remaining"], lot["status"], lot["matures_at"]) == (100, 100, "AVAILABLE", None)


async def test_debits_take_the_oldest_lots_first_whatever_their_expiry(desk: Desk, clock: SettableClock) -> None:
    clock.set(NOON)
    await desk.grant("10", expires_at=NOON + timedelta(days=300))
    clock.advance(hours=1)
    await desk.grant("10", expires_at=NOON + timedelta(days=1))

    await desk.debit("12")

    assert await desk.lots() == [("CONSUMED", "10", "0", None), ("AVAILABLE", "10", "8", None)]
    assert await code_of(desk.debit("8.01")) == "insufficient_balance"


async def test_an_expired_lot_cannot_be_spent_before_its_expiry_is_booked(desk: Desk, clock: SettableClock) -> None:
    clock.set(NOON)
    await desk.grant("10", expires_at=NOON + timedelta(hours=1))
    await desk.credit("5")
    clock.advance(hours=1)

    assert await desk.buckets() == ("15", "0", "0")
    assert await code_of(desk.debit("5.01")) == "insufficient_balance"
    assert await code_of(desk.hold("5.01")) == "insufficient_balance"
    assert await code_of(desk.forfeit("5.01", bucket="AVAILABLE")) == "insufficient_balance"
    assert (await desk.hold()).amount == 5
    assert await desk.expire_due() == 1
    assert await desk.expire_due() == 0
    assert await desk.buckets() == ("0", "5", "0")
    assert await desk.lots("EXPIRED") == [("EXPIRED", "10", "0", None)]


async def test_an_overdraft_consumes_every_lot_and_later_credits_repay_it(desk: Desk) -> None:
    await desk.credit("10")
    await desk.debit("25", allow_negative=True)
    assert await desk.buckets() == ("-15", "0", "0")
    assert await desk.lots() == [("CONSUMED", "10", "0", None)]

    await desk.credit("5")
    assert await desk.lots() == [("CONSUMED", "10", "0", None), ("CONSUMED", "5", "0", None)]

    await desk.credit("12")
    assert await desk.buckets() == ("2", "0", "0")
    assert await desk.lots("AVAILABLE") == [("AVAILABLE", "12", "2", None)]


async def test_going_below_zero_books_the_expiry_of_expired_lots_first(desk: Desk, clock: SettableClock) -> None:
    clock.set(NOON)
    await desk.grant("10", expires_at=NOON + timedelta(hours=1))
    await desk.credit("5")
    clock.advance(hours=1)

    await desk.debit("5", allow_negative=True)
    assert await desk.buckets() == ("10", "0", "0")  # enough without it: the expired lot waits for its own run

    await desk.debit("1", allow_negative=True)
    assert await desk.buckets() == ("-1", "0", "0")
    assert [lot.status for lot in await desk.lots()] == ["EXPIRED", "CONSUMED"]
    assert await desk.entries("EXPIRY") == 1


async def test_a_release_repays_an_overdraft_first(desk: Desk) -> None:
    await desk.credit("10")
    await desk.hold("6")
    await desk.debit("9", allow_negative=True)
    assert await desk.buckets() == ("-5", "6", "0")

    released = await desk.release()

    assert moved(released) == ["6"]
    assert await desk.buckets() == ("1", "0", "0")
    assert await desk.lots("AVAILABLE") == [("AVAILABLE", "6", "1", None)]


async def test_value_matures_when_due_and_not_before(desk: Desk, clock: SettableClock) -> None:
    # holders.md example 10
    clock.set(NOON)
    await desk.grant("500", matures_at=NOON + timedelta(days=30))
    assert await desk.buckets() == ("0", "0", "500")
    assert await code_of(desk.hold("1")) == "insufficient_balance"
    assert await code_of(desk.debit("1")) == "insufficient_balance"
    assert await code_of(desk.forfeit("1", bucket="AVAILABLE")) == "insufficient_balance"
    clock.advance(days=29)
    assert await desk.mature_due() == 0

    clock.advance(days=1)
    assert await desk.mature_due() == 1

    assert await desk.buckets() == ("500", "0", "0")
    assert await desk.entries("MATURITY") == 1
    assert await desk.mature_due() == 0
    (lot,) = await desk.lot_rows()
    assert (lot["status"], lot["created_at"]) == ("AVAILABLE", NOON)


async def test_maturity_repays_an_overdraft_first(desk: Desk, clock: SettableClock) -> None:
    clock.set(NOON)
    await desk.grant("10", matures_at=NOON + timedelta(days=1))
    await desk.debit("4", allow_negative=True)
    clock.advance(days=1)

    await desk.mature_due()

    assert await desk.buckets() == ("6", "0", "0")
    assert await desk.lots() == [("AVAILABLE", "10", "6", None)]


async def test_a_matured_lot_keeps_its_place_in_the_order(desk: Desk, clock: SettableClock) -> None:
    clock.set(NOON)
    await desk.grant("10", matures_at=NOON + timedelta(days=1))
    clock.advance(hours=1)
    await desk.credit("10")
    clock.advance(days=1)
    await desk.mature_due()

    await desk.debit("10")

    assert [lot.status for lot in await desk.lots()] == ["CONSUMED", "AVAILABLE"]


# --- LOT: hold and release -------------------------------------------------------------------------------------------


async def test_a_full_hold_keeps_the_lot_and_a_partial_one_splits_it(desk: Desk, clock: SettableClock) -> None:
    clock.set(NOON)
    await desk.grant("10", expires_at=NOON + timedelta(days=30))
    clock.advance(hours=1)
    await desk.grant("10", expires_at=NOON + timedelta(days=20))
    first, second = await desk.lot_rows()

    held = await desk.hold("14", reference_id="auth1")

    assert held.lots is not None
    assert held.lots[0] == (first["id"], d("10"))
    split_id, split_amount = held.lots[1]
    assert split_id not in (first["id"], second["id"])
    assert split_amount == 4
    rows = {row["id"]: row for row in await desk.lot_rows()}
    assert (rows[first["id"]]["status"], rows[first["id"]]["reference_id"]) == ("HELD", "auth1")
    assert (rows[second["id"]]["status"], rows[second["id"]]["remaining"]) == ("AVAILABLE", 6)
    split = rows[split_id]
    assert (split["status"], split["amount"], split["reference_id"]) == ("HELD", 4, "auth1")
    assert (split["created_at"], split["expires_at"]) == (second["created_at"], second["expires_at"])
    assert rows[first["id"]]["expires_at"] == first["expires_at"]


async def test_a_partial_release_splits_back_and_clears_the_reference(desk: Desk) -> None:
    await desk.credit("10")
    (lot,) = await desk.lot_rows()
    await desk.hold(reference_id="auth1")

    released = await desk.release("4", reference_id="auth1")

    assert moved(released) == ["4"]
    assert released.lots is not None
    assert released.lots[0][0] != lot["id"]
    assert await desk.lots() == [("HELD", "10", "6", "auth1"), ("AVAILABLE", "4", "4", None)]
    assert {row["created_at"] for row in await desk.lot_rows()} == {lot["created_at"]}

    rest = await desk.release()
    assert rest.lots == [(lot["id"], d("6"))]
    assert await desk.lots("AVAILABLE") == [("AVAILABLE", "10", "6", None), ("AVAILABLE", "4", "4", None)]


async def test_split_parts_are_spent_in_the_place_of_their_lot(desk: Desk) -> None:
    await desk.credit("10")
    await desk.hold("4")
    await desk.credit("10")
    await desk.release()

    await desk.debit("10")

    assert [(lot.status, lot.amount) for lot in await desk.lots()] == [
        ("CONSUMED", "10"),
        ("CONSUMED", "4"),
        ("AVAILABLE", "10"),
    ]


@pytest.mark.parametrize(
    ("amount", "reference_id", "processed", "left"),
    [
        (None, "auth1", "7", "5"),
        ("6", "auth1", "6", "6"),
        ("100", "auth1", "7", "5"),
        ("6", None, "6", "6"),
        ("100", None, "12", "0"),
        (None, None, "12", "0"),
    ],
)
async def test_a_release_takes_what_amount_and_reference_say(
    desk: Desk, amount: str | None, reference_id: str | None, processed: str, left: str
) -> None:  # the table of holders.md 6.4
    await desk.credit("20")
    await desk.hold("5", reference_id="auth2")
    await desk.hold("3", reference_id="auth1")
    await desk.hold("4", reference_id="auth1")

    result = await desk.release(amount, reference_id=reference_id)

    assert result.amount == d(processed)
    assert (await desk.buckets())[1] == left


async def test_nothing_that_matches_is_insufficient(desk: Desk) -> None:
    await desk.credit("20")
    held = await desk.hold("5", reference_id="auth1")
    entries = await desk.entries()
    assert held.lots is not None

    for nothing in (
        desk.release(reference_id="auth2"),
        desk.release("1", reference_id="auth2"),
        desk.release(lot_ids=[new_id()]),
        desk.release(reference_id="auth2", lot_ids=[held.lots[0][0]]),
        desk.hold(lot_ids=[new_id()]),
        desk.hold("1", lot_ids=[held.lots[0][0]]),
        desk.forfeit(bucket="HELD", reference_id="auth2"),
        desk.hold(earned_to=NOON - timedelta(days=9_000)),
        desk.release(earned_from=NOON + timedelta(days=36_500)),
    ):
        assert await code_of(nothing) == "insufficient_balance"
    assert await desk.entries() == entries


async def test_lots_are_chosen_by_id_and_by_when_they_were_earned(desk: Desk, clock: SettableClock) -> None:
    clock.set(NOON)
    for _ in range(4):
        await desk.credit("10")
        clock.advance(hours=1)
    ids = [row["id"] for row in await desk.lot_rows()]

    both = await desk.hold(earned_from=NOON + timedelta(hours=1), earned_to=NOON + timedelta(hours=2))
    assert both.lots == [(ids[1], d("10")), (ids[2], d("10"))]
    assert await code_of(desk.hold("10.01", lot_ids=[ids[3]])) == "insufficient_balance"

    last = await desk.hold("10", lot_ids=[ids[3], ids[1]])
    assert last.lots == [(ids[3], d("10"))]

    narrow = await desk.release(lot_ids=[ids[1], ids[2], ids[3]], earned_from=NOON + timedelta(hours=3))
    assert narrow.lots == [(ids[3], d("10"))]
    await field_of(desk.release(earned_from=NOON, earned_to=NOON - timedelta(seconds=1)))


async def test_holding_more_than_the_selected_lots_have_is_insufficient(desk: Desk) -> None:
    await desk.credit("10")
    await desk.credit("10")
    first = (await desk.lot_rows())[0]["id"]

    assert await code_of(desk.hold("10.01", lot_ids=[first])) == "insufficient_balance"
    assert await code_of(desk.forfeit("10.01", lot_ids=[first], bucket="AVAILABLE")) == "insufficient_balance"


async def test_settling_ones_own_hold_is_release_then_debit(desk: Desk) -> None:
    await desk.credit("100")
    await desk.hold("50", reference_id="auth1")

    await desk.release(reference_id="auth1")
    await desk.debit("62.50")

    assert await desk.buckets() == ("37.5", "0", "0")
    assert await desk.holds() == [("RELEASED", "50", "0")]


async def test_held_lots_do_not_expire_until_they_come_back(desk: Desk, clock: SettableClock) -> None:
    clock.set(NOON)
    await desk.grant("10", expires_at=NOON + timedelta(hours=1))
    await desk.hold()
    clock.advance(hours=2)
    assert await desk.expire_due() == 0

    assert (await desk.release()).amount == 10

    assert await code_of(desk.debit("1")) == "insufficient_balance"
    assert await desk.expire_due() == 1
    assert await desk.buckets() == ("0", "0", "0")


async def test_a_forfeit_consumes_lots_in_order_within_the_selection(desk: Desk) -> None:
    for _ in range(3):
        await desk.credit("10")
    ids = [row["id"] for row in await desk.lot_rows()]

    result = await desk.forfeit("12", bucket="AVAILABLE", lot_ids=ids[1:])

    assert result.lots == [(ids[1], d("10")), (ids[2], d("2"))]
    assert [(lot.status, lot.remaining) for lot in await desk.lots()] == [
        ("AVAILABLE", "10"),
        ("CONSUMED", "0"),
        ("AVAILABLE", "8"),
    ]


async def test_a_debit_of_held_takes_lots_in_order_and_settles_their_holds(desk: Desk) -> None:
    await desk.credit("10")
    await desk.hold("4", reference_id="auth1")
    await desk.credit("5", bucket="HELD")

    await desk.debit("6", bucket="HELD")

    assert await desk.holds() == [("SETTLED", "4", "0"), ("ACTIVE", "5", "3")]
    assert await code_of(desk.debit("3.01", bucket="HELD")) == "insufficient_balance"


# --- Provisional value: void and settle ------------------------------------------------------------------------------


async def test_a_void_takes_provisional_value_back_to_issuance(desk: Desk) -> None:  # holders.md example 9
    await desk.provision("10", "auth1")
    assert await desk.buckets() == ("0", "10", "0")

    voided = await desk.void("auth1")

    assert await desk.postings(voided.journal_entry_id) == [
        ("PARTICIPANT", "HELD", "-10"),
        ("SYSTEM_ISSUANCE", "AVAILABLE", "10"),
    ]
    assert await desk.buckets() == ("0", "0", "0")
    assert await desk.lots() == [("CONSUMED", "10", "0", "auth1")]
    assert await desk.holds() == [("VOIDED", "10", "0")]
    assert await code_of(desk.void("auth1")) == "insufficient_balance"


async def test_a_void_leaves_the_holders_own_value_alone(desk: Desk) -> None:
    await desk.credit("20")
    await desk.hold("20", reference_id="auth1")
    assert await code_of(desk.void("auth1")) == "insufficient_balance"
    await desk.provision("5", "auth1")
    await desk.provision("7", "auth1")
    await desk.provision("9", "auth2")

    voided = await desk.void("auth1")

    assert moved(voided) == ["5", "7"]
    assert await desk.buckets() == ("0", "29", "0")
    assert await desk.lots("HELD") == [("HELD", "20", "20", "auth1"), ("HELD", "9", "9", "auth2")]


async def test_provisional_value_that_was_released_is_ordinary(desk: Desk) -> None:
    await desk.provision("10", "auth1")
    await desk.release("4", reference_id="auth1")
    await desk.hold("4", reference_id="auth1")

    voided = await desk.void("auth1")

    assert moved(voided) == ["6"]
    assert await desk.buckets() == ("0", "4", "0")


async def test_a_fully_released_accrual_cannot_be_voided_when_held_again(desk: Desk) -> None:
    await desk.provision("10", "auth1")
    await desk.release(reference_id="auth1")
    await desk.hold(reference_id="auth1")

    assert await code_of(desk.void("auth1")) == "insufficient_balance"


async def test_an_adjust_into_held_is_provisional_and_has_a_hold_without_an_end(desk: Desk) -> None:
    await desk.credit("10", bucket="HELD")

    (lot,) = await desk.lot_rows()
    (hold,) = await desk.hold_rows()
    assert (lot["status"], lot["is_provisional"], lot["expires_at"], lot["matures_at"]) == ("HELD", True, None, None)
    assert (hold["kind"], hold["remaining"], hold["expires_at"]) == ("PROVISIONAL", 10, None)
    assert (await desk.release()).amount == 10


@pytest.mark.parametrize(
    ("field", "value"), [("amount", "1"), ("lot_ids", [new_id()]), ("earned_from", NOON), ("earned_to", NOON)]
)
async def test_a_void_is_always_the_whole_accrual(desk: Desk, field: str, value: Any) -> None:
    await desk.provision("10", "auth1")

    assert await field_of(desk.void("auth1", **{field: value})) == field


async def test_a_prefunded_void_pays_back_each_program(funded: Desk, database: Database) -> None:
    other = funded.using(program_id=await linked_program(funded))
    await other.fund("100")
    await funded.provision("10", "auth1")
    await other.provision("7", "auth1")

    voided = await funded.void("auth1")

    assert sorted(await funded.postings(voided.journal_entry_id)) == [
        ("PARTICIPANT", "HELD", "-17"),
        ("PROGRAM", "AVAILABLE", "10"),
        ("PROGRAM", "AVAILABLE", "7"),
    ]
    assert (await funded.wallet(), await other.wallet()) == ("1000", "100")


async def linked_program(desk: Desk) -> UUID:
    """Another program with the same asset."""
    async with desk.database.transaction(desk.organization_id) as tx:
        program_id = await make_program(tx)
        await tx.execute(
            "insert into program_asset (organization_id, program_id, asset_id, created_at) values (%s, %s, %s, %s)",
            (desk.organization_id, program_id, desk.asset_id, tx.now),
        )
        return program_id


async def test_a_settle_of_more_draws_the_difference_from_the_settling_program(funded: Desk) -> None:
    other = funded.using(program_id=await linked_program(funded))
    await other.fund("100")
    await funded.provision("10", "auth1")

    settled = await other.settle("12.50", "auth1")

    assert (settled.held_amount, settled.delta) == (d("10"), d("2.5"))
    assert await funded.postings(settled.entry.id) == [
        ("PARTICIPANT", "HELD", "-10"),
        ("PARTICIPANT", "AVAILABLE", "12.5"),
        ("PROGRAM", "AVAILABLE", "-2.5"),
    ]
    assert (await funded.wallet(), await other.wallet()) == ("990", "97.5")
    assert await funded.lots() == [("CONSUMED", "10", "0", "auth1"), ("AVAILABLE", "12.5", "12.5", None)]
    assert await funded.holds() == [("SETTLED", "10", "0")]


async def test_a_settle_of_less_pays_back_the_newest_lots_program_first(funded: Desk) -> None:
    other = funded.using(program_id=await linked_program(funded))
    await other.fund("100")
    await funded.provision("10", "auth1")
    await other.provision("7", "auth1")

    settled = await funded.settle("8", "auth1")

    assert (settled.held_amount, settled.delta) == (d("17"), d("-9"))
    assert (await funded.wallet(), await other.wallet()) == ("992", "100")
    assert await funded.buckets() == ("8", "0", "0")


async def test_a_settle_of_just_what_was_held_touches_no_source(desk: Desk) -> None:
    await desk.provision("10", "auth1")

    settled = await desk.settle("10", "auth1")

    assert settled.delta == 0
    assert await desk.postings(settled.entry.id) == [("PARTICIPANT", "HELD", "-10"), ("PARTICIPANT", "AVAILABLE", "10")]


async def test_a_settle_of_nothing_is_a_plain_credit_and_repeats(desk: Desk) -> None:
    await desk.provision("10", "auth1")
    await desk.settle("10", "auth1")

    again = await desk.settle("10", "auth1")

    assert (again.held_amount, again.delta) == (d("0"), d("10"))
    assert await desk.buckets() == ("20", "0", "0")


async def test_a_settle_passes_over_the_holders_own_hold(desk: Desk) -> None:
    await desk.credit("20")
    await desk.hold("20", reference_id="auth1")
    await desk.provision("10", "auth1")

    await desk.settle("3", "auth1")

    assert await desk.buckets() == ("3", "20", "0")
    assert await desk.holds() == [("ACTIVE", "20", "20"), ("SETTLED", "10", "0")]


async def test_a_settled_lot_takes_the_earliest_expiry_unless_it_brings_its_own(
    desk: Desk, clock: SettableClock
) -> None:
    clock.set(NOON)
    for days, reference in ((9, "a"), (5, "a"), (9, "b"), (5, "b")):
        await desk.provision("1", reference, NOON + timedelta(days=days))
    await desk.provision("1", "a")
    clock.advance(hours=1)

    await desk.settle("3", "a")
    await desk.settle("2", "b", expires_at=NOON + timedelta(days=30))

    lots = [lot for lot in await desk.lot_rows() if lot["status"] == "AVAILABLE"]
    assert [lot["expires_at"] for lot in lots] == [NOON + timedelta(days=5), NOON + timedelta(days=30)]
    assert {lot["created_at"] for lot in lots} == {clock()}


async def test_a_settle_may_mature_later(desk: Desk, clock: SettableClock) -> None:
    clock.set(NOON)
    await desk.provision("10", "auth1")

    await desk.settle("12", "auth1", matures_at=NOON + timedelta(days=1))

    assert await desk.buckets() == ("0", "0", "12")


async def test_a_settle_repays_an_overdraft_first(desk: Desk) -> None:
    await desk.debit("4", allow_negative=True)
    await desk.provision("10", "auth1")

    await desk.settle("9", "auth1")

    assert await desk.buckets() == ("5", "0", "0")
    assert await desk.lots("AVAILABLE") == [("AVAILABLE", "9", "5", None)]


async def test_only_the_difference_of_a_settle_must_be_in_the_wallet(funded: Desk) -> None:
    await funded.provision("10", "auth1")
    await funded.burn("985")

    assert await code_of(funded.settle("15.01", "auth1")) == "insufficient_program_balance"

    await funded.settle("15", "auth1")
    assert await funded.wallet() == "0"


# --- Gates and keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["SUSPENDED", "CLOSED"])
async def test_what_an_inactive_participant_may_still_do(desk: Desk, status: str) -> None:  # holders.md example 12
    await desk.credit("10")
    await desk.hold("3")
    await desk.provision("2", "auth1")
    await set_status(desk, Participant, desk.holder.id, status)

    for blocked in (desk.credit("1"), desk.debit("1"), desk.hold("1"), desk.release("1")):
        assert await code_of(blocked) == "participant_inactive"
    assert (await desk.forfeit("1", bucket="AVAILABLE")).amount == 1
    assert (await desk.forfeit("1", bucket="HELD")).amount == 1
    assert (await desk.void("auth1")).amount == 2


async def test_an_archived_asset_takes_nothing_new_but_nothing_gets_stuck(desk: Desk) -> None:
    await desk.credit("10")
    hold_id = hold_of(await desk.hold("6"))
    await desk.provision("2", "auth1")
    await set_status(desk, Asset, desk.asset_id, "ARCHIVED")

    for blocked in (desk.credit("1"), desk.debit("1"), desk.hold("1")):
        assert await code_of(blocked) == "asset_archived"
    assert (await desk.void("auth1")).amount == 2
    assert (await desk.release("1")).amount == 1
    assert (await desk.end(hold_id, "RELEASE", "1")).amount == 1
    assert (await desk.forfeit("2", bucket="HELD")).amount == 2
    assert (await desk.forfeit(bucket="AVAILABLE")).amount == 6


@pytest.mark.parametrize("status", ["SUSPENDED", "ARCHIVED"])
async def test_a_program_that_is_not_active_takes_no_hold_but_winds_up(desk: Desk, status: str) -> None:
    await desk.credit("10")
    await desk.hold("6")
    await desk.provision("2", "auth1")
    await set_status(desk, Program, desk.program_id, status)

    assert await code_of(desk.hold("1")) == "program_inactive"
    assert (await desk.release("3")).amount == 3
    assert (await desk.forfeit("1", bucket="HELD")).amount == 1
    assert (await desk.void("auth1")).amount == 2


async def test_an_archived_group_stays_as_it_is(desk: Desk, database: Database) -> None:
    async with database.transaction(desk.organization_id) as tx:
        group = desk.using(holder=Holder("GROUP", await make_group(tx)))
    await group.credit("10")
    hold_id = hold_of(await group.hold("4"))
    await group.provision("2", "auth1")
    await set_status(group, Group, group.holder.id, "ARCHIVED")

    for blocked in (
        group.credit("1"),
        group.hold("1"),
        group.release("1"),
        group.forfeit("1", bucket="AVAILABLE"),
        group.void("auth1"),
        group.end(hold_id, "RELEASE"),
        group.end(hold_id, "FORFEIT"),
    ):
        assert await code_of(blocked) == "group_archived"


async def test_a_groups_held_balance_is_forfeited_only_by_naming_it(desk: Desk, database: Database) -> None:
    async with database.transaction(desk.organization_id) as tx:
        group = desk.using(holder=Holder("GROUP", await make_group(tx)))
    await group.credit("10")
    await group.hold("10")

    assert await code_of(group.debit("1")) == "insufficient_balance"
    assert await code_of(group.forfeit(bucket="AVAILABLE")) == "insufficient_balance"
    assert (await group.forfeit(bucket="HELD")).amount == 10


async def test_of_several_reasons_the_first_gate_answers(desk: Desk) -> None:
    async with desk.database.transaction(desk.organization_id) as tx:
        elsewhere = desk.using(program_id=await make_program(tx))
    await set_status(desk, Participant, desk.holder.id, "SUSPENDED")
    await set_status(desk, Program, elsewhere.program_id, "SUSPENDED")
    await set_status(desk, Asset, desk.asset_id, "ARCHIVED")

    assert await code_of(elsewhere.hold("0.001")) == "invalid_scale"
    assert await code_of(elsewhere.hold("1")) == "participant_inactive"
    await set_status(desk, Participant, desk.holder.id, "ACTIVE")
    assert await code_of(elsewhere.hold("1")) == "program_inactive"
    await set_status(desk, Program, elsewhere.program_id, "ACTIVE")
    assert await code_of(elsewhere.hold("1")) == "asset_not_linked"
    assert await code_of(elsewhere.release("1")) == "asset_not_linked"
    assert await code_of(desk.hold("1")) == "asset_archived"
    assert await code_of(desk.release("1")) == "insufficient_balance"


async def test_another_organizations_ids_are_unknown(desk: Desk, new_organization: Any) -> None:
    stranger = desk.using(organization_id=new_organization().id)
    await desk.credit("10")
    hold_id = hold_of(await desk.hold())

    assert await code_of(stranger.release()) == "not_found"
    assert await code_of(stranger.end(hold_id, "RELEASE")) == "not_found"
    assert await code_of(desk.using(holder=Holder("PARTICIPANT", new_id())).release()) == "not_found"
    assert await code_of(desk.using(holder=Holder("GROUP", desk.holder.id)).release()) == "not_found"


async def test_a_replay_names_entry_amount_and_lots_and_shows_the_balance_of_now(desk: Desk) -> None:
    await desk.credit("10")
    await desk.credit("10")
    first = await desk.hold("15", reference_id="auth1", idempotency_key="k")
    await desk.release()

    replay = await desk.hold("15.00", reference_id="auth1", idempotency_key="k")

    assert (first.replayed, replay.replayed) == (False, True)
    assert (replay.journal_entry_id, replay.hold_id) == (first.journal_entry_id, first.hold_id)
    assert (replay.amount, replay.lots) == (first.amount, first.lots)
    assert (replay.balance.available, replay.balance.held) == (d("20"), d("0"))


@pytest.mark.parametrize(
    "change",
    [
        {"amount": "2"},
        {"amount": None},
        {"description": "another"},
        {"reference_id": "auth2"},
        {"lot_ids": [new_id()]},
        {"earned_from": NOON},
        {"earned_to": NOON + timedelta(days=36_500)},
        {"expires_in": timedelta(days=1)},
        {"expires_at": NOON + timedelta(days=36_500)},
        {"expires_in": timedelta(days=1), "on_expiry": "FORFEIT"},
    ],
    ids=lambda change: "-".join(change),
)
async def test_every_field_belongs_to_the_payload_of_a_key(desk: Desk, change: dict[str, Any]) -> None:
    await desk.credit("10")
    fields = {"amount": "1", "reference_id": "auth1", "idempotency_key": "k"}
    await desk.hold(**fields)

    assert await code_of(desk.hold(**{**fields, **change})) == "idempotency_conflict"


async def test_the_holder_and_the_bucket_belong_to_the_payload_of_a_key(desk: Desk) -> None:
    async with desk.database.transaction(desk.organization_id) as tx:
        bob = desk.using(holder=Holder("PARTICIPANT", await make_participant(tx)))
    await desk.credit("10")
    await desk.hold("5")
    await desk.forfeit("1", bucket="HELD", idempotency_key="k")

    assert await code_of(desk.forfeit("1", bucket="AVAILABLE", idempotency_key="k")) == "idempotency_conflict"
    assert await code_of(bob.forfeit("1", bucket="HELD", idempotency_key="k")) == "idempotency_conflict"


async def test_one_key_serves_each_operation_once(desk: Desk) -> None:
    await desk.credit("10", idempotency_key="k")
    await desk.provision("2", "auth1")

    results = [
        await desk.hold("3", idempotency_key="k"),
        await desk.release("1", idempotency_key="k"),
        await desk.forfeit("1", bucket="AVAILABLE", idempotency_key="k"),
        await desk.void("auth1", idempotency_key="k"),
    ]

    assert not any(result.replayed for result in results)


async def test_a_refused_operation_does_not_consume_its_key(desk: Desk) -> None:
    assert await code_of(desk.hold("1", idempotency_key="k")) == "insufficient_balance"
    await desk.credit("10")

    assert not (await desk.hold("1", idempotency_key="k")).replayed


# --- Many lots and many callers --------------------------------------------------------------------------------------


async def test_more_lots_than_one_page_are_moved_exactly(desk: Desk, owner: Any) -> None:
    await fill_with_lots(desk, owner, 450)

    spent = await desk.hold("430", reference_id="all")

    assert spent.lots is not None
    assert len(spent.lots) == 430
    assert await desk.buckets() == ("20", "430", "0")
    assert (await desk.release(reference_id="all")).amount == 430


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many lots each page brought."""
    pages: list[int] = []
    add = LotBook.add

    def counted(book: LotBook, lots: Iterable[Lot]) -> list[Lot]:
        here = add(book, lots)
        pages.append(len(here))
        return here

    monkeypatch.setattr(LotBook, "add", counted)
    return pages


async def test_a_debit_that_may_overdraw_loads_no_more_lots_than_it_takes(
    desk: Desk, owner: Any, loaded: list[int]
) -> None:
    await fill_with_lots(desk, owner, 3 * LOTS_PER_PAGE)
    loaded.clear()

    await desk.debit("5", allow_negative=True)
    assert loaded == [LOTS_PER_PAGE]

    await desk.debit("1000", allow_negative=True)
    assert (await desk.buckets())[0] == "-405"
    assert {lot["status"] for lot in await desk.lot_rows()} == {"CONSUMED"}


async def test_what_the_transaction_has_spent_does_not_count_as_loaded(desk: Desk, owner: Any) -> None:
    await fill_with_lots(desk, owner, 2 * LOTS_PER_PAGE)
    first, second = d(str(LOTS_PER_PAGE)), d("150")

    async with desk._posting() as (tx, terms, books):
        position = desk._position(terms)
        for amount in (first, second):
            await load_lots(tx, books.lots, position.select("AVAILABLE", tx.now), amount)
            movements.debit(books, position, desk._cause(tx), amount, allow_negative=False)

    assert (await desk.buckets())[0] == "50"


async def test_a_lot_made_in_the_transaction_waits_its_turn_behind_those_in_the_table(desk: Desk) -> None:
    await desk.credit("10")

    async with desk._posting() as (tx, terms, books):
        position, ten = desk._position(terms), d("10")
        movements.credit(books, position, desk._cause(tx), ten, balances.credit_source(books, terms, ten))
        await load_lots(tx, books.lots, position.select("AVAILABLE", tx.now), ten)
        movements.debit(books, position, desk._cause(tx), ten, allow_negative=False)

    older, newer = sorted(await desk.lot_rows(), key=lambda lot: (lot["created_at"], lot["id"]))
    assert (older["status"], newer["status"]) == ("CONSUMED", "AVAILABLE")


async def test_what_the_transaction_has_taken_of_holds_does_not_count_as_loaded(
    simple: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LOTS_PER_PAGE", 1)
    await simple.credit("10")
    for _ in range(2):
        await simple.hold("5")

    async with simple._posting() as (tx, terms, books):
        position, five = simple._position(terms), d("5")
        for _ in range(2):
            await load_oldest_holds(tx, books.holds, simple.holder.id, simple.asset_id, five)
            movements.debit_held(books, position, simple._cause(tx), five)

    assert await simple.buckets() == ("0", "0", "0")


@pytest.mark.parametrize(("amount", "ends"), [("10", True), ("9", False)])
async def test_a_debit_of_held_names_the_holds_whose_workflows_have_nothing_left_to_do(
    any_desk: Desk, amount: str, ends: bool
) -> None:
    await any_desk.credit("10")
    hold_id = await timed_hold(any_desk, "10", NOON + timedelta(days=36500), carrier="WORKFLOW")

    result = await any_desk.debit(amount, bucket="HELD")

    assert result.ended_holds == ((hold_id,) if ends else ())


async def fill_with_lots(desk: Desk, owner: Any, count: int) -> None:
    """`count` lots of 1, made like a credit of `count` that was split."""
    await desk.credit(str(count))
    owner.execute(
        "insert into lot (organization_id, id, entity_type, entity_id, asset_id, program_id, status, amount, remaining,"
        " created_at, is_provisional, entry_id)"
        " select organization_id, gen_random_uuid(), entity_type, entity_id, asset_id, program_id, status, 1, 1,"
        " created_at + n * interval '1 microsecond', false, entry_id"
        " from lot cross join generate_series(1, %s) n where entity_id = %s and asset_id = %s",
        (count, desk.holder.id, desk.asset_id),
    )
    owner.execute("delete from lot where entity_id = %s and amount = %s", (desk.holder.id, count))


async def race(database: Database, *calls: Awaitable[Any]) -> tuple[list[Any], list[str]]:
    """Who won, and the codes with which the others were refused; anything else, a repetition too, fails the test."""
    with nothing_repeated(database):
        outcomes: Sequence[Any] = await asyncio.gather(*calls, return_exceptions=True)
    losers = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert all(isinstance(loser, Refusal) for loser in losers), losers
    winners = [outcome for outcome in outcomes if isinstance(outcome, AdjustResult | OperationResult)]
    return winners, [loser.code for loser in losers if isinstance(loser, Refusal)]


async def test_fifty_debits_at_once_spend_each_lot_once(desk: Desk) -> None:
    for amount in ("30", "30", "40"):
        await desk.credit(amount)

    winners, codes = await race(desk.database, *(desk.debit("7") for _ in range(50)))

    assert len(winners) == 14
    assert set(codes) == {"insufficient_balance"}
    assert await desk.lots("AVAILABLE") == [("AVAILABLE", "40", "2", None)]


async def test_of_two_holds_of_the_last_lot_one_wins(desk: Desk) -> None:
    await desk.credit("10")

    winners, codes = await race(desk.database, desk.hold("10"), desk.hold("10"))

    assert (len(winners), codes) == (1, ["insufficient_balance"])


async def test_holds_and_releases_at_once_lose_nothing(any_desk: Desk) -> None:
    await any_desk.credit("100")
    await any_desk.hold("50")

    winners, codes = await race(
        any_desk.database, *(any_desk.hold("1") if n % 2 else any_desk.release("1") for n in range(40))
    )

    assert (len(winners), codes) == (40, [])
    assert await any_desk.buckets() == ("50", "50", "0")


async def test_of_many_ends_of_one_hold_one_wins(any_desk: Desk) -> None:
    await any_desk.credit("10")
    hold_id = hold_of(await any_desk.hold())

    winners, codes = await race(
        any_desk.database,
        *(any_desk.end(hold_id, "RELEASE") for _ in range(10)),
        *(any_desk.end(hold_id, "FORFEIT") for _ in range(10)),
    )

    assert len(winners) == 1
    assert codes == ["hold_not_active"] * 19


async def test_a_void_and_a_release_share_nothing(desk: Desk) -> None:
    await desk.provision("10", "auth1")

    winners, codes = await race(desk.database, desk.void("auth1"), desk.release(reference_id="auth1"))

    assert (len(winners), codes) == (1, ["insufficient_balance"])


async def test_fifty_prefunded_credits_at_once_never_overdraw_the_wallet(funded: Desk, database: Database) -> None:
    await funded.burn("900")
    async with database.transaction(funded.organization_id) as tx:
        people = [Holder("PARTICIPANT", await make_participant(tx)) for _ in range(8)]
        people += [Holder("GROUP", await make_group(tx)) for _ in range(2)]

    winners, codes = await race(funded.database, *(funded.using(holder=people[n % 10]).credit("7") for n in range(50)))

    assert len(winners) == 14
    assert set(codes) == {"insufficient_program_balance"}
    assert await funded.wallet() == "2"


async def test_voids_and_credits_over_several_wallets_do_not_deadlock(funded: Desk) -> None:
    other = funded.using(program_id=await linked_program(funded))
    await other.fund("1000")
    for n in range(10):
        await (funded, other)[n % 2].provision("1", f"auth{n // 2}")

    winners, codes = await race(
        funded.database,
        *(funded.void(f"auth{n}") for n in range(5)),
        *((funded, other)[n % 2].credit("1") for n in range(20)),
    )

    assert (len(winners), codes) == (25, [])
    assert (await funded.wallet(), await other.wallet()) == ("990", "990")


async def test_concurrent_uses_of_one_key_hold_once(any_desk: Desk) -> None:
    await any_desk.credit("100")

    winners, _ = await race(any_desk.database, *(any_desk.hold("10", idempotency_key="k") for _ in range(20)))

    assert sum(not winner.replayed for winner in winners) == 1
    assert len({(winner.journal_entry_id, winner.hold_id) for winner in winners}) == 1
    assert await any_desk.buckets() == ("90", "10", "0")
