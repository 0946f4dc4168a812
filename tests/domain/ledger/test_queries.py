"""The filtered journal, and that it reads only what it must. Contract: holders.md 8.3."""

import asyncio
import re
from collections.abc import Callable
from typing import Any
from uuid import UUID

import psycopg
import pytest

from db.session import Database, Transaction
from domain import balances, wallet
from domain.balances import AdjustRequest, Holder
from domain.errors import Refusal
from domain.ids import new_id
from domain.ledger import moments, queries, verify
from domain.ledger.journal import load_accounts, write
from domain.ledger.queries import EntryFilter
from domain.locks import lock_participants
from domain.pagination import PageRequest, encode_cursor
from domain.wallet import WalletRequest
from tests.builders import Shop, d, make_asset, make_participant, make_program, open_shop
from tests.conftest import SettableClock, Tenant
from tests.domain.ledger.test_moments import assert_indexed, explain

Find = Callable[..., Any]


@pytest.fixture
async def shop(database: Database, organization: Tenant) -> Shop:
    return await open_shop(database, organization.id)


@pytest.fixture
def find(database: Database, organization: Tenant) -> Find:
    """The sequences that a filter finds, page by page."""

    async def run(*, limit: int = 200, **wanted: Any) -> list[int]:
        found: list[int] = []
        cursor = None
        for _ in range(1_000):
            async with database.transaction(organization.id) as tx:
                page = await queries.list_entries(tx, EntryFilter(**wanted), PageRequest(limit, cursor))
            assert len(page.items) <= limit
            found += [row["sequence"] for row in page.items]
            cursor = page.next_cursor
            if cursor is None:
                return found
        raise AssertionError("the list never ends")

    return run


async def move(
    database: Database, organization: Tenant, shop: Shop, *movements: tuple[str, str], **fields: Any
) -> UUID:
    """One entry that moves (bucket, amount) of alice, from issuance if that doesn't sum to zero."""
    async with database.transaction(organization.id) as tx:
        await lock_participants(tx, [shop.alice])
        books = await load_accounts(tx, [shop.alice], [shop.asset_id])
        lines = [
            (books.account("PARTICIPANT", shop.alice, shop.asset_id, bucket), d(amount))  # type: ignore[arg-type]
            for bucket, amount in movements
        ]
        rest = sum(amount for _, amount in lines)
        if rest:
            lines.append((books.system("SYSTEM_ISSUANCE", shop.asset_id), -rest))
        entry = books.post(fields.pop("action_type", "CREDIT"), lines, program_id=shop.program_id, **fields)
        await write(tx, books)
    return entry.id


async def test_entries_are_listed_newest_first_in_pages_without_gaps(
    database: Database, organization: Tenant, shop: Shop, find: Find
) -> None:
    for _ in range(7):
        await move(database, organization, shop, ("AVAILABLE", "1"))

    for limit in (1, 2, 3, 7, 8):
        assert await find(limit=limit) == [7, 6, 5, 4, 3, 2, 1]
        assert await find(limit=limit, participant_id=shop.alice) == [7, 6, 5, 4, 3, 2, 1]


async def test_an_entry_with_two_postings_of_a_holder_is_listed_once(
    database: Database, organization: Tenant, shop: Shop, find: Find
) -> None:
    await move(database, organization, shop, ("AVAILABLE", "10"))
    await move(database, organization, shop, ("AVAILABLE", "-4"), ("HELD", "4"), action_type="HOLD")
    await move(database, organization, shop, ("AVAILABLE", "1"))

    for limit in (1, 2, 3):
        assert await find(limit=limit, participant_id=shop.alice) == [3, 2, 1]


async def test_posting_filters_hold_on_one_and_the_same_posting(
    database: Database, organization: Tenant, shop: Shop, find: Find
) -> None:
    await move(database, organization, shop, ("AVAILABLE", "10"))
    await move(database, organization, shop, ("AVAILABLE", "-4"), ("HELD", "4"), action_type="HOLD")

    for holder in ({}, {"participant_id": shop.alice}):
        assert await find(bucket="HELD", **holder) == [2]
        assert await find(bucket="HELD", min_amount=d("4"), **holder) == [2]
        assert await find(bucket="HELD", max_amount=d("-4"), **holder) == []
        assert await find(bucket="AVAILABLE", min_amount=d("-4"), max_amount=d("-4"), **holder) == [2]
        assert await find(min_amount=d("10.00"), **holder) == [1]
        assert await find(asset_id=shop.asset_id, bucket="DEFERRED", **holder) == []
        assert await find(asset_id=new_id(), **holder) == []


async def test_each_filter_of_the_entry_itself(
    database: Database, organization: Tenant, shop: Shop, find: Find
) -> None:
    event_id, rule_id = new_id(), new_id()
    await move(database, organization, shop, ("AVAILABLE", "10"), event_id=event_id, rule_id=rule_id)
    await move(database, organization, shop, ("AVAILABLE", "-1"), action_type="DEBIT", reference_id="auth-1")
    async with database.transaction(organization.id) as tx:
        other = await make_program(tx)
        bob = await make_participant(tx)
        await make_asset(tx, other)

    for holder in ({}, {"participant_id": shop.alice}):
        assert await find(event_id=event_id, **holder) == [1]
        assert await find(rule_id=rule_id, **holder) == [1]
        assert await find(reference_id="auth-1", **holder) == [2]
        assert await find(action_type="DEBIT", **holder) == [2]
        assert await find(program_id=shop.program_id, **holder) == [2, 1]
        assert await find(program_id=other, **holder) == []
    assert await find(event_id=event_id, participant_id=bob) == []
    assert await find(participant_id=bob) == []
    assert await find(group_id=shop.alice) == []
    assert await find(participant_id=shop.program_id) == []


async def test_bounds_in_time_are_inclusive(
    database: Database, organization: Tenant, shop: Shop, find: Find, clock: SettableClock
) -> None:
    clock.set("2024-01-01T00:00:00Z")
    start = clock()
    for _ in range(6):
        await move(database, organization, shop, ("AVAILABLE", "1"))
        clock.advance(days=1)
    async with database.transaction(organization.id) as tx:
        page = await queries.list_entries(tx, EntryFilter(), PageRequest())
    at = {row["sequence"]: row["created_at"] for row in page.items}

    for holder in ({}, {"participant_id": shop.alice}):
        assert await find(created_from=at[4], **holder) == [6, 5, 4]
        assert await find(created_to=at[4], **holder) == [4, 3, 2, 1]
        assert await find(created_from=at[2], created_to=at[2], **holder) == [2]
        assert await find(created_from=clock(), **holder) == []
        assert await find(created_to=start.replace(year=2023), **holder) == []
        assert await find(created_from=at[3], created_to=at[2], **holder) == []


async def test_entries_of_one_transaction_share_their_instant(
    database: Database, organization: Tenant, shop: Shop, find: Find
) -> None:
    async with database.transaction(organization.id) as tx:
        await lock_participants(tx, [shop.alice])
        books = await load_accounts(tx, [shop.alice], [shop.asset_id])
        alice = books.account("PARTICIPANT", shop.alice, shop.asset_id, "AVAILABLE")
        for _ in range(5):
            movements = [(books.system("SYSTEM_ISSUANCE", shop.asset_id), d("-1")), (alice, d("1"))]
            books.post("CREDIT", movements, program_id=shop.program_id)
        await write(tx, books)
    async with database.transaction(organization.id) as tx:
        entry, _ = await queries.get_entry(tx, books.entries[0].id)

    assert await find(created_from=entry["created_at"], created_to=entry["created_at"]) == [5, 4, 3, 2, 1]


async def test_a_cursor_of_another_list_is_refused(database: Database, organization: Tenant) -> None:
    with pytest.raises(Refusal) as refused:
        async with database.transaction(organization.id) as tx:
            await queries.list_entries(tx, EntryFilter(), PageRequest(50, "YWJjMTIz"))
    assert [problem.field for problem in refused.value.problems] == ["cursor"]


async def test_pages_stay_whole_while_others_write(database: Database, organization: Tenant, shop: Shop) -> None:
    for _ in range(10):
        await move(database, organization, shop, ("AVAILABLE", "1"))
    found: list[int] = []
    cursor = None
    for _ in range(4):
        async with database.transaction(organization.id) as tx:
            page = await queries.list_entries(tx, EntryFilter(participant_id=shop.alice), PageRequest(3, cursor))
        found += [row["sequence"] for row in page.items]
        cursor = page.next_cursor
        await move(database, organization, shop, ("AVAILABLE", "1"))

    assert found == list(range(10, 0, -1))


async def test_long_ledgers_are_read_through_indexes(
    database: Database, organization: Tenant, owner: psycopg.Connection[Any], shop: Shop
) -> None:
    """As the application's role: row-level security turns index conditions into filters where one isn't careful."""
    async with database.transaction(organization.id) as tx:
        await lock_participants(tx, [shop.alice])
        books = await load_accounts(tx, [shop.alice], [shop.asset_id])
        source = books.system("SYSTEM_ISSUANCE", shop.asset_id)
        alice = books.account("PARTICIPANT", shop.alice, shop.asset_id, "AVAILABLE")
        for _ in range(10_000):
            books.post("CREDIT", [(source, d("-1")), (alice, d("1"))], program_id=shop.program_id)
        await write(tx, books)
    owner.execute("analyze posting, journal_entry, account")
    wanted = EntryFilter(participant_id=shop.alice)

    async with database.transaction(organization.id) as tx:
        window = await queries._window(tx, wanted, before=9_990)
        params = queries._params(tx, wanted, window, PageRequest()) | await queries._slices(tx, wanted, window)
        listing = await plan(tx, queries._from_holder(wanted), params)
        bisection = await plan(
            tx, moments._BISECT, {"organization_id": tx.organization_id, "instant": tx.now, "after": False}
        )
        page = await plan(
            tx, verify._PAGE, {"organization_id": tx.organization_id, "after": 9_000, "head": 10_000, "rows": 50}
        )

    assert any("posting_version_key" in line for line in listing), listing
    for lines in (listing, bisection):
        assert not any("Seq Scan on posting" in line or "Seq Scan on journal_entry" in line for line in lines), lines
    assert any(re.search(r"Index Cond: .*sequence = span", line) for line in bisection), bisection
    assert any(re.search(r"Index Cond: .*version < p.version", line) for line in page), page


async def test_a_deep_page_of_a_holder_reads_as_little_as_the_first(
    database: Database, organization: Tenant, owner: psycopg.Connection[Any], shop: Shop, find: Find
) -> None:
    async with database.transaction(organization.id) as tx:
        await lock_participants(tx, [shop.alice])
        books = await load_accounts(tx, [shop.alice], [shop.asset_id])
        source = books.system("SYSTEM_ISSUANCE", shop.asset_id)
        alice = books.account("PARTICIPANT", shop.alice, shop.asset_id, "AVAILABLE")
        for _ in range(20_000):
            books.post("CREDIT", [(source, d("-1")), (alice, d("1"))], program_id=shop.program_id)
        await write(tx, books)
    owner.execute("analyze posting, journal_entry, account")
    wanted, size = EntryFilter(participant_id=shop.alice), PageRequest(50)

    for before in (20_001, 20_001 - 299 * 50):
        cursor = encode_cursor(queries._SORT, [before])
        async with database.transaction(organization.id) as tx:
            window = await queries._window(tx, wanted, before=before)
            slices = await queries._slices(tx, wanted, window)
            page = await queries.list_entries(tx, wanted, PageRequest(50, cursor))
            query: Any = queries._from_holder(wanted)
            lines = await explain(tx, query, queries._params(tx, wanted, window, size) | slices)
        assert [row["sequence"] for row in page.items] == list(range(before - 1, before - 51, -1))
        assert_indexed(lines, pages=500)


async def test_a_page_for_rare_entries_looks_at_a_bounded_number_and_says_where_to_go_on(
    database: Database, organization: Tenant, shop: Shop, find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "SCANNED_ENTRIES", 3)
    await move(database, organization, shop, ("AVAILABLE", "10"))
    await move(database, organization, shop, ("AVAILABLE", "-4"), ("HELD", "4"), action_type="HOLD")
    for _ in range(7):
        await move(database, organization, shop, ("AVAILABLE", "1"))

    rare = {"action_type": "HOLD", "program_id": shop.program_id}
    for wanted in (rare, {"bucket": "HELD"}, {"min_amount": d("4"), "max_amount": d("5")}):
        async with database.transaction(organization.id) as tx:
            page = await queries.list_entries(tx, EntryFilter(**wanted), PageRequest(1))
        assert (page.items, page.has_more) == ([], True)
        assert await find(limit=1, **wanted) == [2]
    assert await find(limit=1, asset_id=shop.asset_id) == list(range(9, 0, -1))
    assert await find(limit=2, asset_id=shop.asset_id) == list(range(9, 0, -1))
    assert await find(limit=2, action_type="DEBIT") == []


async def plan(tx: Transaction, query: Any, params: Any) -> list[str]:
    explained: Any = f"explain (costs off) {query}"
    return [line for (line,) in await (await tx.execute(explained, params)).fetchall()]


async def test_a_hundred_entries_at_once_leave_no_hole(
    database: Database, organization: Tenant, shop: Shop, find: Find
) -> None:
    async with database.transaction(organization.id) as tx:
        holders = [await make_participant(tx) for _ in range(20)]
        prefunded = await make_asset(tx, shop.program_id, issuance_policy="PREFUNDED")

    async def credit(i: int) -> None:
        request = AdjustRequest(
            program_id=shop.program_id, asset_id=shop.asset_id, type="CREDIT", amount="1", description="x"
        )
        async with database.transaction(organization.id) as tx:
            await balances.adjust(tx, Holder("PARTICIPANT", holders[i % 20]), request)

    async def fund() -> None:
        async with database.transaction(organization.id) as tx:
            await wallet.fund(tx, WalletRequest(program_id=shop.program_id, asset_id=prefunded, amount="1"))

    await asyncio.gather(*(credit(i) for i in range(80)), *(fund() for _ in range(20)))

    assert await find() == list(range(100, 0, -1))
