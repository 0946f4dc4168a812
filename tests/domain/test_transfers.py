"""Transfers between holders. Contract: redemptions.md 1, 5, 9, 10 F and G; holders.md 7.2, 9.10, 9.11."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import update
from sqlmodel import SQLModel, col

from db.session import Database, Transaction
from db.tables import Asset, Group, Participant, Program
from domain import transfers
from domain.balances import Holder
from domain.errors import Refusal
from domain.ids import new_id
from domain.pagination import PageRequest
from domain.transfers import HolderName, TransferFilter, TransferRecord, TransferRequest, WantedShare
from tests.builders import Shop, d, make_asset, make_group, make_participant, make_program, open_shop
from tests.conftest import SettableClock, Tenant
from tests.domain.ledger.test_moments import assert_indexed, explain
from tests.holdings_support import Desk, LotSeen
from tests.ledger_invariants import assert_ledger_invariants


@dataclass(frozen=True)
class Fair:
    """A shop where alice, bob, carol and a family send each other value."""

    database: Database
    organization_id: UUID
    shop: Shop
    bob: UUID
    carol: UUID
    family: UUID

    def desk(self, holder_id: UUID) -> Desk:
        holder = Holder("GROUP" if holder_id == self.family else "PARTICIPANT", holder_id)
        return Desk.of(self.database, self.organization_id, self.shop).using(holder=holder)

    async def give(self, holder_id: UUID, amount: str) -> None:
        """A credit from issuance."""
        await self.desk(holder_id).credit(amount)

    async def available(self, *holder_ids: UUID) -> list[str]:
        return [(await self.desk(holder_id).buckets())[0] for holder_id in holder_ids]

    def name(self, holder_id: UUID) -> HolderName:
        return HolderName("group_id" if holder_id == self.family else "participant_id", holder_id)

    def request(self, source: UUID, *shares: tuple[UUID, str], **fields: Any) -> TransferRequest:
        wanted = [WantedShare(self.name(recipient), amount) for recipient, amount in shares]
        whole = {
            "program_id": self.shop.program_id,
            "asset_id": self.shop.asset_id,
            "source": self.name(source),
            "shares": wanted,
            "description": "Fair share",
            **fields,
        }
        return TransferRequest(**whole)

    async def create(self, request: TransferRequest) -> transfers.Created:
        async with self.database.transaction(self.organization_id) as tx:
            return await transfers.create(tx, request)

    async def send(self, source: UUID, *shares: tuple[UUID, str], **fields: Any) -> TransferRecord:
        return (await self.create(self.request(source, *shares, **fields))).transfer

    async def refusal(self, request: TransferRequest) -> Refusal:
        with pytest.raises(Refusal) as refused:
            await self.create(request)
        return refused.value

    async def list(self, *, limit: int = 50, cursor: str | None = None, **wanted: Any) -> tuple[list[UUID], str | None]:
        """The ids of a page of transfers, and the next cursor."""
        async with self.database.transaction(self.organization_id) as tx:
            page = await transfers.find(tx, TransferFilter(**wanted), PageRequest(limit, cursor))
        return [transfer.id for transfer in page.items], page.next_cursor

    async def change(self, table: type[SQLModel], id: UUID, **columns: Any) -> None:
        async with self.database.transaction(self.organization_id) as tx:
            await tx.run(update(table).where(col(table.id) == id).values(**columns))  # type: ignore[attr-defined]


OpenFair = Callable[..., Awaitable[Fair]]


@pytest.fixture
def open_fair(database: Database, organization: Tenant) -> OpenFair:
    async def opened(**asset_fields: Any) -> Fair:
        shop = await open_shop(database, organization.id, **asset_fields)
        async with database.transaction(organization.id) as tx:
            bob, carol = await make_participant(tx), await make_participant(tx)
            family = await make_group(tx)
        return Fair(database, organization.id, shop, bob, carol, family)

    return opened


@pytest.fixture
async def fair(open_fair: OpenFair) -> Fair:
    """A fair where alice has 100 of a SIMPLE asset."""
    fair = await open_fair()
    await fair.give(fair.shop.alice, "100")
    return fair


@pytest.fixture
async def lots(open_fair: OpenFair) -> Fair:
    """A fair with a LOT asset."""
    return await open_fair(inventory_mode="LOT")


@pytest.fixture(autouse=True)
async def sound_ledger(database: Database, organization: Tenant) -> AsyncIterator[None]:
    yield
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)
        await assert_records_are_entries(tx)


async def assert_records_are_entries(tx: Transaction) -> None:
    """Every transfer is the entry that it names, posting by posting, and there are no other entries of transfers."""
    recorded: dict[UUID, list[tuple[Any, ...]]] = {}
    for row in await tx.rows("select * from transfer where organization_id = %s", (tx.organization_id,)):
        shares = await tx.rows(
            "select * from transfer_recipient where organization_id = %s and transfer_id = %s order by ordinal",
            (tx.organization_id, row["id"]),
        )
        assert [share["ordinal"] for share in shares] == list(range(row["recipient_count"]))
        assert {share["created_at"] for share in shares} == {row["created_at"]}
        postings = [(row["source_type"], row["source_id"], row["total_amount"].copy_negate())]
        postings += [(share["entity_type"], share["entity_id"], share["amount"]) for share in shares]
        recorded[row["journal_entry_id"]] = postings
    posted: dict[UUID, list[tuple[Any, ...]]] = {}
    for row in await tx.rows(
        "select e.id, e.event_id, e.rule_id, a.entity_type, a.entity_id, a.bucket, p.amount from journal_entry e"
        " join posting p on p.organization_id = e.organization_id and p.entry_id = e.id"
        " join account a on a.organization_id = p.organization_id and a.id = p.account_id"
        " where e.organization_id = %s and e.action_type = 'TRANSFER' order by e.sequence, p.ordinal",
        (tx.organization_id,),
    ):
        assert (row["bucket"], row["event_id"], row["rule_id"]) == ("AVAILABLE", None, None)
        posted.setdefault(row["id"], []).append((row["entity_type"], row["entity_id"], row["amount"]))
    assert posted == recorded


async def external_id(fair: Fair, participant_id: UUID) -> str:
    async with fair.database.transaction(fair.organization_id) as tx:
        row = await tx.row("select external_id from participant where id = %s", (participant_id,))
    assert row is not None
    return str(row["external_id"])


# --- what moves ------------------------------------------------------------------------------------------------------


async def test_value_moves_to_every_recipient_in_one_entry(fair: Fair) -> None:  # example F
    sent = await fair.send(fair.shop.alice, (fair.bob, "95"), (fair.carol, "5"))

    assert (sent.total_amount, sent.recipient_count) == (d("100"), 2)
    assert await fair.available(fair.shop.alice, fair.bob, fair.carol) == ["0", "95", "5"]
    assert await fair.desk(fair.bob).postings(sent.journal_entry_id) == [
        ("PARTICIPANT", "AVAILABLE", "-100"),
        ("PARTICIPANT", "AVAILABLE", "95"),
        ("PARTICIPANT", "AVAILABLE", "5"),
    ]
    assert await fair.desk(fair.bob).entries("TRANSFER") == 1


async def test_a_recipient_that_comes_twice_gets_two_postings_and_counts_twice(fair: Fair) -> None:
    sent = await fair.send(fair.shop.alice, (fair.bob, "1"), (fair.carol, "2"), (fair.bob, "3"))

    assert sent.recipient_count == 3
    assert await fair.available(fair.bob, fair.carol) == ["4", "2"]
    assert len(await fair.desk(fair.bob).postings(sent.journal_entry_id)) == 4


async def test_groups_give_and_take(fair: Fair) -> None:  # example F
    await fair.send(fair.shop.alice, (fair.family, "60"))
    back = await fair.send(fair.family, (fair.shop.alice, "25"), (fair.bob, "35"))

    assert await fair.available(fair.shop.alice, fair.family, fair.bob) == ["65", "0", "35"]
    assert (back.source.type, back.source.external_id) == ("GROUP", None)


async def test_a_stored_transfer_is_what_was_answered(fair: Fair, database: Database, organization: Tenant) -> None:
    details = {"card": {"id": "c-1", "limits": [Decimal("1.50"), Decimal("2")]}, "none": None}
    sent = await fair.send(fair.shop.alice, (fair.family, "60"), (fair.bob, "1.5"), metadata=details)

    async with database.transaction(organization.id) as tx:
        stored = await transfers.get(tx, sent.id)

    assert stored == sent
    assert str(stored.metadata) == str(details)


async def test_a_transfer_that_nobody_made_is_not_found(fair: Fair, database: Database, organization: Tenant) -> None:
    async with database.transaction(organization.id) as tx:
        with pytest.raises(Refusal) as refused:
            await transfers.get(tx, new_id())
    assert refused.value.code == "not_found"


async def test_every_digit_arrives(open_fair: OpenFair) -> None:
    fair = await open_fair(scale=18)
    large = "9" * 20 + "." + "9" * 18
    await fair.give(fair.shop.alice, large)
    await fair.give(fair.shop.alice, large)

    sent = await fair.send(fair.shop.alice, (fair.bob, large), (fair.carol, large))

    assert sent.total_amount == d("1" + "9" * 20 + "." + "9" * 17 + "8")
    assert await fair.available(fair.shop.alice, fair.bob, fair.carol) == ["0", large, large]


# --- what is refused -------------------------------------------------------------------------------------------------


async def test_a_short_balance_moves_nothing(fair: Fair) -> None:  # example F
    await fair.desk(fair.shop.alice).debit("0.01")

    refusal = await fair.refusal(fair.request(fair.shop.alice, (fair.bob, "95"), (fair.carol, "5")))

    assert refusal.code == "insufficient_balance"
    assert await fair.available(fair.shop.alice, fair.bob, fair.carol) == ["99.99", "0", "0"]
    assert await fair.list() == ([], None)


async def test_held_value_is_not_spent(fair: Fair) -> None:
    await fair.desk(fair.shop.alice).hold("40")

    refusal = await fair.refusal(fair.request(fair.shop.alice, (fair.bob, "60.01")))
    await fair.send(fair.shop.alice, (fair.bob, "60"))

    assert refusal.code == "insufficient_balance"
    assert await fair.desk(fair.shop.alice).buckets() == ("0", "40", "0")


async def test_a_negative_balance_sends_nothing(fair: Fair) -> None:
    await fair.desk(fair.shop.alice).debit("100.01", allow_negative=True)

    refusal = await fair.refusal(fair.request(fair.shop.alice, (fair.bob, "0.01")))

    assert refusal.code == "insufficient_balance"


@pytest.mark.parametrize("position", [0, 1])
async def test_the_source_is_no_recipient_however_named(fair: Fair, position: int) -> None:  # example F
    external = HolderName("external_id", await external_id(fair, fair.shop.alice))
    to_bob = WantedShare(fair.name(fair.bob), "1")
    to_alice = [WantedShare(external, "1"), WantedShare(fair.name(fair.shop.alice), "1")]

    for source, share in zip([fair.name(fair.shop.alice), external], to_alice, strict=True):
        shares = [share, to_bob] if position == 0 else [to_bob, share]
        refusal = await fair.refusal(replace(fair.request(fair.shop.alice), source=source, shares=shares))
        assert refusal.code == "self_transfer"
        assert refusal.problems[0].field == f"recipients[{position}]"
    to_itself = await fair.refusal(fair.request(fair.family, (fair.family, "1")))
    assert to_itself.code == "self_transfer"


async def test_whoever_is_unknown_is_not_created(fair: Fair, new_organization: Any) -> None:
    stranger = await open_shop(fair.database, new_organization().id)
    good = fair.request(fair.shop.alice, (fair.bob, "1"))

    for name in [
        HolderName("external_id", "nobody"),
        HolderName("participant_id", new_id()),
        HolderName("participant_id", fair.family),
        HolderName("participant_id", stranger.alice),
        HolderName("group_id", new_id()),
        HolderName("group_id", fair.bob),
    ]:
        assert (await fair.refusal(replace(good, source=name))).code == "not_found"
        share = WantedShare(name, "1")
        assert (await fair.refusal(replace(good, shares=[*good.shares, share]))).code == "not_found"
    async with fair.database.transaction(fair.organization_id) as tx:
        (known,) = await tx.rows(
            "select count(*) as n from participant where organization_id = %s", (fair.organization_id,)
        )
    assert known["n"] == 4  # the family's admin is one
    for of_another in (
        replace(good, program_id=stranger.program_id),
        replace(good, asset_id=stranger.asset_id),
    ):
        assert (await fair.refusal(of_another)).code == "not_found"


@pytest.mark.parametrize("status", ["SUSPENDED", "CLOSED"])
async def test_every_participant_is_active_or_nothing_moves(fair: Fair, status: str) -> None:  # example F
    request = fair.request(fair.shop.alice, (fair.bob, "1"), (fair.carol, "1"))

    for holder_id, field in ((fair.shop.alice, "source_participant_id"), (fair.carol, "recipients[1].participant_id")):
        await fair.change(Participant, holder_id, status=status)
        refusal = await fair.refusal(request)
        await fair.change(Participant, holder_id, status="ACTIVE")
        assert (refusal.code, refusal.problems[0].field) == ("participant_inactive", field)
    assert await fair.available(fair.shop.alice, fair.bob) == ["100", "0"]


async def test_an_archived_group_neither_gives_nor_takes(fair: Fair) -> None:
    await fair.send(fair.shop.alice, (fair.family, "10"))
    await fair.change(Group, fair.family, status="ARCHIVED")

    for request in (fair.request(fair.shop.alice, (fair.family, "1")), fair.request(fair.family, (fair.bob, "1"))):
        assert (await fair.refusal(request)).code == "group_archived"


async def test_the_ceiling_is_for_each_share_and_for_the_total(open_fair: OpenFair) -> None:  # example G
    fair = await open_fair(max_transaction_amount=d("500"))
    for _ in range(3):
        await fair.give(fair.shop.alice, "500")

    one = await fair.refusal(fair.request(fair.shop.alice, (fair.bob, "1"), (fair.carol, "500.01")))
    both = await fair.refusal(fair.request(fair.shop.alice, (fair.bob, "300"), (fair.carol, "300")))
    await fair.send(fair.shop.alice, (fair.bob, "300"), (fair.carol, "200"))

    assert {one.code, both.code} == {"max_transaction_amount_exceeded"}
    assert [one.problems[0].field, both.problems[0].field] == ["recipients[1].amount", "total_amount"]


async def test_of_several_reasons_the_first_check_answers(open_fair: OpenFair) -> None:
    fair = await open_fair(max_transaction_amount=d("5"))
    alice = fair.shop.alice
    async with fair.database.transaction(fair.organization_id) as tx:
        elsewhere = await make_program(tx, status="SUSPENDED")
    await fair.change(Asset, fair.shop.asset_id, status="ARCHIVED")
    await fair.change(Participant, alice, status="SUSPENDED")
    worst = fair.request(alice, (alice, "1.001"), (new_id(), "9"), program_id=elsewhere)

    async def code(request: TransferRequest) -> str:
        return (await fair.refusal(request)).code

    assert await code(replace(worst, metadata={"x": "y" * 20_000})) == "bad_request"
    assert await code(replace(worst, shares=[WantedShare(fair.name(alice), "0")])) == "bad_request"
    assert await code(worst) == "not_found"
    to_itself = fair.request(alice, (alice, "1.001"), program_id=elsewhere)
    assert await code(to_itself) == "self_transfer"
    assert await code(replace(to_itself, program_id=new_id(), asset_id=new_id())) == "self_transfer"
    assert await code(fair.request(alice, (fair.bob, "1.001"), program_id=new_id())) == "not_found"
    assert await code(fair.request(alice, (fair.bob, "1.001"), program_id=elsewhere)) == "invalid_scale"
    good = fair.request(alice, (fair.bob, "9"), program_id=elsewhere)
    assert await code(good) == "program_inactive"
    await fair.change(Program, elsewhere, status="ACTIVE")
    assert await code(good) == "asset_not_linked"
    good = replace(good, program_id=fair.shop.program_id)
    assert await code(good) == "asset_archived"
    await fair.change(Asset, fair.shop.asset_id, status="ACTIVE")
    assert await code(good) == "participant_inactive"
    await fair.change(Participant, alice, status="ACTIVE")
    assert await code(good) == "max_transaction_amount_exceeded"
    await fair.change(Asset, fair.shop.asset_id, max_transaction_amount=None)
    assert await code(good) == "insufficient_balance"


# --- keys ------------------------------------------------------------------------------------------------------------


async def test_a_replay_shows_the_transfer_whatever_has_happened_since(fair: Fair) -> None:
    alice = fair.shop.alice
    request = fair.request(alice, (fair.bob, "100"), (fair.family, "0.01"), idempotency_key="k")
    await fair.give(alice, "0.01")
    first = await fair.create(request)
    await fair.change(Program, fair.shop.program_id, status="ARCHIVED")
    await fair.change(Asset, fair.shop.asset_id, status="ARCHIVED", max_transaction_amount=d("1"))
    await fair.change(Participant, alice, status="CLOSED")

    again = await fair.create(request)

    assert (first.replayed, again.replayed) == (False, True)
    assert again.transfer == first.transfer
    assert await fair.desk(alice).entries("TRANSFER") == 1


async def test_what_means_the_same_is_a_replay(fair: Fair) -> None:
    external = HolderName("external_id", await external_id(fair, fair.bob))
    request = fair.request(fair.shop.alice, (fair.bob, "50"), idempotency_key="k", metadata={"a": Decimal(1), "b": "x"})
    await fair.create(request)

    by_external_id = replace(request, shares=[WantedShare(external, "50.00")])
    reordered = replace(request, metadata={"b": "x", "a": Decimal("1.0")})

    assert (await fair.create(by_external_id)).replayed
    assert (await fair.create(reordered)).replayed


async def test_another_payload_under_the_same_key_conflicts(fair: Fair) -> None:
    request = fair.request(fair.shop.alice, (fair.bob, "1"), (fair.carol, "2"), idempotency_key="k")
    await fair.create(request)
    async with fair.database.transaction(fair.organization_id) as tx:
        other_asset = await make_asset(tx, fair.shop.program_id)

    changes: list[dict[str, Any]] = [
        {"source": fair.name(fair.family)},
        {"shares": list(reversed(request.shares))},
        {"shares": [*request.shares, WantedShare(fair.name(fair.family), "1")]},
        {"shares": [replace(request.shares[0], amount="1.01"), request.shares[1]]},
        {"description": "Another"},
        {"metadata": {}},
        {"asset_id": other_asset},
    ]
    for change in changes:
        assert (await fair.refusal(replace(request, **change))).code == "idempotency_conflict"


async def test_a_key_belongs_to_its_program_and_to_transfers(fair: Fair) -> None:
    async with fair.database.transaction(fair.organization_id) as tx:
        program_id = await make_program(tx)
        asset_id = await make_asset(tx, fair.shop.program_id, program_id)
    both = replace(fair, shop=replace(fair.shop, asset_id=asset_id))
    await both.desk(fair.shop.alice).credit("5", idempotency_key="k")
    request = both.request(fair.shop.alice, (fair.bob, "1"), idempotency_key="k")

    here = await both.create(request)
    there = await both.create(replace(request, program_id=program_id))

    assert not here.replayed
    assert not there.replayed
    assert await both.available(fair.bob) == ["2"]


async def test_a_failed_call_leaves_its_key_free(fair: Fair) -> None:
    request = fair.request(fair.shop.alice, (fair.bob, "150"), idempotency_key="k")
    assert (await fair.refusal(request)).code == "insufficient_balance"
    await fair.give(fair.shop.alice, "50")

    assert not (await fair.create(request)).replayed


# --- lots ------------------------------------------------------------------------------------------------------------


async def test_the_oldest_lots_go_and_each_share_is_a_new_lot(lots: Fair, clock: SettableClock) -> None:
    # holders.md example 11
    alice = lots.shop.alice
    for day in (1, 2, 3):
        clock.set(f"2025-01-0{day}T10:00:00Z")
        expires_at = clock() + timedelta(days=300) if day < 3 else None
        await lots.desk(alice).grant("30", expires_at=expires_at)
    clock.set("2025-02-01T10:00:00Z")

    await lots.send(alice, (lots.bob, "20"), (lots.family, "25"), (lots.bob, "5"))

    assert [(lot["remaining"], lot["status"]) for lot in await lots.desk(alice).lot_rows()] == [
        (0, "CONSUMED"),
        (10, "AVAILABLE"),
        (30, "AVAILABLE"),
    ]
    bobs, familys = await lots.desk(lots.bob).lot_rows(), await lots.desk(lots.family).lot_rows()
    assert [lot["amount"] for lot in bobs] == [20, 5]
    assert [lot["amount"] for lot in familys] == [25]
    for lot in [*bobs, *familys]:
        assert (lot["created_at"], lot["expires_at"], lot["matures_at"]) == (clock(), None, None)
        assert (lot["status"], lot["reference_id"], lot["program_id"]) == ("AVAILABLE", None, lots.shop.program_id)


async def test_expired_and_deferred_lots_are_not_spent(lots: Fair, clock: SettableClock) -> None:
    # holders.md example 10 and 7.2
    clock.set("2025-01-01T10:00:00Z")
    desk = lots.desk(lots.shop.alice)
    await desk.grant("10", expires_at=clock() + timedelta(days=1))
    await desk.grant("20", matures_at=clock() + timedelta(days=30))
    await desk.grant("5")
    clock.advance(days=1)

    refusal = await lots.refusal(lots.request(lots.shop.alice, (lots.bob, "5.01")))
    await lots.send(lots.shop.alice, (lots.bob, "5"))

    assert refusal.code == "insufficient_balance"
    assert await desk.lots("AVAILABLE", "DEFERRED") == [
        LotSeen("AVAILABLE", "10", "10", None),
        LotSeen("DEFERRED", "20", "20", None),
    ]


async def test_an_overdraft_is_repaid_from_the_shares_in_their_order(lots: Fair) -> None:
    bob = lots.desk(lots.bob)
    await lots.give(lots.shop.alice, "20")
    await bob.debit("10", allow_negative=True)

    await lots.send(lots.shop.alice, (lots.bob, "6"), (lots.carol, "1"), (lots.bob, "6"))

    assert await lots.available(lots.shop.alice, lots.bob) == ["7", "2"]
    assert await bob.lots() == [LotSeen("CONSUMED", "6", "0", None), LotSeen("AVAILABLE", "6", "2", None)]


async def test_the_opposite_transfer_does_not_bring_back_vintages(lots: Fair, clock: SettableClock) -> None:
    clock.set("2025-01-01T10:00:00Z")
    await lots.desk(lots.shop.alice).grant("10", expires_at=clock() + timedelta(days=9))
    clock.advance(days=1)
    await lots.send(lots.shop.alice, (lots.bob, "10"))
    clock.advance(days=1)

    await lots.send(lots.bob, (lots.shop.alice, "10"))

    old, new = await lots.desk(lots.shop.alice).lot_rows()
    assert (old["status"], old["remaining"]) == ("CONSUMED", 0)
    assert (new["remaining"], new["created_at"], new["expires_at"]) == (10, clock(), None)


async def test_more_lots_than_a_page_are_spent(lots: Fair) -> None:
    for _ in range(3):
        await lots.give(lots.shop.alice, "300")
    for _ in range(2):
        await lots.send(lots.shop.alice, *[(lots.bob, "3")] * 100)

    await lots.send(lots.bob, (lots.carol, "598"))

    assert await lots.desk(lots.bob).lots("AVAILABLE") == [LotSeen("AVAILABLE", "3", "2", None)]


# --- at once ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["SIMPLE", "LOT"])
async def test_transfers_both_ways_at_once_never_deadlock(open_fair: OpenFair, mode: str) -> None:
    # Nothing is repeated here: a deadlock would surface as an error.
    fair = await open_fair(inventory_mode=mode)
    alice = fair.shop.alice
    for holder_id in (alice, fair.bob, fair.family):
        await fair.give(holder_id, "100")
    ways = [(alice, fair.bob), (fair.bob, alice), (fair.family, alice), (alice, fair.family), (fair.bob, fair.family)]

    await asyncio.gather(
        *(fair.send(source, (recipient, "1.5"), (fair.carol, "0.5")) for source, recipient in ways * 10)
    )

    assert await fair.available(alice, fair.bob, fair.family, fair.carol) == ["90", "75", "110", "25"]
    assert await fair.desk(alice).entries("TRANSFER") == 50


async def test_of_concurrent_calls_with_one_key_one_executes(fair: Fair) -> None:
    request = fair.request(fair.shop.alice, (fair.bob, "60"), idempotency_key="k")

    answers = await asyncio.gather(*(fair.create(request) for _ in range(20)))

    assert sum(not answer.replayed for answer in answers) == 1
    assert {answer.transfer.id for answer in answers} == {answers[0].transfer.id}
    assert await fair.available(fair.shop.alice, fair.bob) == ["40", "60"]
    assert await fair.desk(fair.bob).entries("TRANSFER") == 1


@pytest.mark.parametrize("mode", ["SIMPLE", "LOT"])
async def test_of_two_transfers_that_together_exceed_the_balance_one_wins(open_fair: OpenFair, mode: str) -> None:
    fair = await open_fair(inventory_mode=mode)
    await fair.give(fair.shop.alice, "100")

    answers = await asyncio.gather(
        *(fair.send(fair.shop.alice, (to, "60")) for to in (fair.bob, fair.carol)), return_exceptions=True
    )

    (refusal,) = [answer for answer in answers if isinstance(answer, Refusal)]
    assert refusal.code == "insufficient_balance"
    assert await fair.available(fair.shop.alice) == ["40"]


async def test_a_hundred_recipients_take_no_more_statements_than_one(
    lots: Fair, monkeypatch: pytest.MonkeyPatch
) -> None:
    await lots.give(lots.shop.alice, "300")
    async with lots.database.transaction(lots.organization_id) as tx:
        crowd = [await make_participant(tx) for _ in range(200)]
    statements: list[str] = []
    for name in ("execute", "rows"):
        method = getattr(Transaction, name)

        def counted(tx: Transaction, query: Any, params: Any = None, method: Any = method) -> Any:
            statements.append(query)
            return method(tx, query, params)

        monkeypatch.setattr(Transaction, name, counted)

    async def taken(*shares: tuple[UUID, str]) -> int:
        statements.clear()
        await lots.send(lots.shop.alice, *shares, idempotency_key=new_id().hex)
        return len(statements)

    assert await taken((crowd[0], "1")) == await taken(*((one, "1") for one in crowd[1:101])) <= 11


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    plan=st.lists(
        st.tuples(
            st.integers(0, 3),
            st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["0.01", "1", "7.5", "20"])), min_size=1, max_size=4),
        ),
        max_size=8,
    )
)
async def test_balances_are_what_a_dictionary_says(lots: Fair, plan: list[tuple[int, list[tuple[int, str]]]]) -> None:
    async with lots.database.transaction(lots.organization_id) as tx:
        asset_id = await make_asset(tx, lots.shop.program_id, inventory_mode="LOT")
    fair = replace(lots, shop=replace(lots.shop, asset_id=asset_id))
    holders = [fair.shop.alice, fair.bob, fair.carol, fair.family]
    expected = dict.fromkeys(holders, d("0"))
    for holder_id in holders[:2]:
        await fair.give(holder_id, "25")
        expected[holder_id] = d("25")

    for source, shares in plan:
        wanted = [(holders[recipient], amount) for recipient, amount in shares]
        total = sum(d(amount) for _, amount in wanted)
        request = fair.request(holders[source], *wanted)
        if any(recipient == holders[source] for recipient, _ in wanted):
            assert (await fair.refusal(request)).code == "self_transfer"
        elif total > expected[holders[source]]:
            assert (await fair.refusal(request)).code == "insufficient_balance"
        else:
            await fair.create(request)
            expected[holders[source]] -= total
            for recipient, amount in wanted:
                expected[recipient] += d(amount)

    assert [d(balance) for balance in await fair.available(*holders)] == list(expected.values())


# --- lists -----------------------------------------------------------------------------------------------------------


async def test_a_holder_is_found_as_source_and_as_recipient(fair: Fair) -> None:
    alice, bob, carol, family = fair.shop.alice, fair.bob, fair.carol, fair.family
    one = (await fair.send(alice, (bob, "10"), (carol, "5"), (bob, "1"))).id
    two = (await fair.send(bob, (family, "4"))).id
    three = (await fair.send(family, (carol, "1"), (bob, "1"))).id

    assert await fair.list() == ([three, two, one], None)
    assert await fair.list(participant_id=bob) == ([three, two, one], None)
    assert await fair.list(participant_id=carol) == ([three, one], None)
    assert await fair.list(participant_id=alice) == ([one], None)
    assert await fair.list(group_id=family) == ([three, two], None)
    assert await fair.list(participant_id=carol, group_id=family) == ([three], None)
    assert await fair.list(participant_id=bob, group_id=family) == ([three, two], None)
    assert await fair.list(participant_id=alice, group_id=family) == ([], None)
    # An id of the other kind matches nothing.
    assert await fair.list(participant_id=family) == await fair.list(group_id=bob) == ([], None)


async def test_filters_combine(fair: Fair, clock: SettableClock) -> None:
    alice, bob = fair.shop.alice, fair.bob
    async with fair.database.transaction(fair.organization_id) as tx:
        program_id = await make_program(tx)
        asset_id = await make_asset(tx, fair.shop.program_id, program_id)
    clock.set("2030-01-01T10:00:00Z")
    await fair.desk(alice).using(asset_id=asset_id).credit("100")
    times, ids = [], []
    for fields in ({}, {"asset_id": asset_id}, {"asset_id": asset_id, "program_id": program_id}):
        clock.advance(minutes=1)
        times.append(clock())
        ids.append((await fair.send(alice, (bob, "1"), **fields)).id)

    holders: list[dict[str, Any]] = [{}, {"participant_id": alice}, {"participant_id": bob}]
    for holder in holders:
        assert await fair.list(**holder, asset_id=asset_id) == ([ids[2], ids[1]], None)
        assert await fair.list(**holder, program_id=fair.shop.program_id) == ([ids[1], ids[0]], None)
        assert await fair.list(**holder, program_id=fair.shop.program_id, asset_id=asset_id) == ([ids[1]], None)
        assert await fair.list(**holder, created_from=times[1], created_to=times[1]) == ([ids[1]], None)
        assert await fair.list(**holder, created_from=times[2], created_to=times[0]) == ([], None)
        assert await fair.list(**holder, program_id=new_id()) == ([], None)


@pytest.mark.parametrize("holder", ["nobody", "alice", "bob", "family"])
async def test_pages_show_every_transfer_once_though_all_are_of_one_instant(
    fair: Fair, clock: SettableClock, holder: str
) -> None:
    clock.set("2030-01-01T10:00:00Z")
    alice, bob, family = fair.shop.alice, fair.bob, fair.family
    await fair.give(bob, "10")
    await fair.give(family, "10")
    ways = [(alice, bob), (bob, alice), (family, bob), (alice, family)]
    sent = []
    for source, recipient in ways * 3:
        sent.append((source, recipient, (await fair.send(source, (recipient, "1"), (recipient, "1"))).id))
    wanted: dict[str, Any] = {
        "nobody": {},
        "alice": {"participant_id": alice},
        "bob": {"participant_id": bob},
        "family": {"group_id": family},
    }[holder]
    involved = [id for source, recipient, id in sent if not wanted or {source, recipient} & {*wanted.values()}]

    shown: list[UUID] = []
    cursor = None
    while True:
        ids, cursor = await fair.list(limit=2, cursor=cursor, **wanted)
        shown += ids
        if cursor is None:
            break
        assert len(ids) == 2

    assert shown == sorted(involved, reverse=True)


_FILL = """
with made as (
    insert into transfer (organization_id, id, program_id, asset_id, source_type, source_id, total_amount,
                          recipient_count, description, journal_entry_id, created_at)
    select %(organization_id)s, gen_random_uuid(), %(program_id)s, %(asset_id)s, 'PARTICIPANT', %(alice)s, 2, 2,
           'filler', gen_random_uuid(), timestamptz '2025-01-01' + n * interval '1 second'
    from generate_series(1, %(count)s) n
    returning id, created_at
)
insert into transfer_recipient (organization_id, transfer_id, ordinal, entity_type, entity_id, amount, created_at)
select %(organization_id)s, id, ordinal, 'PARTICIPANT', %(platform)s, 1, created_at
from made cross join generate_series(0, 1) ordinal
"""


async def test_a_page_of_a_long_list_is_read_along_an_index(
    database: Database, new_organization: Any, owner: psycopg.Connection[Any]
) -> None:
    # A platform's account takes part in every transfer: a page of its list must not read them all.
    tenant = new_organization()
    shop = await open_shop(database, tenant.id)
    async with database.transaction(tenant.id) as tx:
        platform = await make_participant(tx)
        params = {"alice": shop.alice, "platform": platform, "count": 20_000, "organization_id": tenant.id}
        await tx.execute(_FILL, params | {"program_id": shop.program_id, "asset_id": shop.asset_id})
    owner.execute("analyze transfer, transfer_recipient")

    async with database.transaction(tenant.id) as tx:
        # With so few rows the planner may rather sort them all; with more there is only the index that has the order.
        await tx.execute("set local enable_bitmapscan = off")
        await tx.execute("set local enable_sort = off")
        half_way = await transfers.find(
            tx, TransferFilter(created_to=datetime.fromisoformat("2025-01-01T03:00:00Z")), PageRequest()
        )
        for wanted in (
            TransferFilter(),
            TransferFilter(program_id=shop.program_id),
            TransferFilter(asset_id=shop.asset_id),
            TransferFilter(participant_id=shop.alice),
            TransferFilter(participant_id=platform, program_id=shop.program_id),
            TransferFilter(participant_id=platform, created_to=half_way.items[0].created_at),
        ):
            for page in (PageRequest(), PageRequest(cursor=half_way.next_cursor)):
                assert len((await transfers.find(tx, wanted, page)).items) == 50
                lines = await explain(tx, *transfers._page_query(tx, wanted, page))
                assert not any("Seq Scan on transfer" in line for line in lines), "\n".join(lines)
                assert_indexed(lines, pages=600)
