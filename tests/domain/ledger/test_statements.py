"""Statements and histories against a fold of the same postings. Contract: webhooks-and-reports.md 16, basics.md 5.9."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any
from uuid import UUID

import psycopg
import pytest

from db.session import Database, Transaction
from db.tables import Event
from domain.errors import Refusal
from domain.ids import new_id
from domain.ledger import moments, statements
from domain.ledger.balances import holder_balances, holder_balances_at
from domain.ledger.journal import load_accounts, write
from domain.ledger.statements import (
    HistoryFilter,
    Line,
    OwnerKind,
    Statement,
    StatementFilter,
    StatementLine,
    read_history,
    read_statement,
)
from domain.locks import lock_participants
from domain.pagination import PageRequest, encode_cursor
from tests.builders import Shop, d, make_asset, make_participant, open_shop
from tests.conftest import SettableClock, Tenant
from tests.domain.ledger.test_moments import assert_indexed, explain

BUCKETS = ("AVAILABLE", "HELD", "DEFERRED")
MICROSECOND = timedelta(microseconds=1)

Movement = tuple[str, str]
"""A bucket and a signed amount."""


@dataclass
class Desk:
    """Alice's accounts: entries go in, statements and histories come out, page by page."""

    database: Database
    organization_id: UUID
    shop: Shop
    entity_id: UUID = field(init=False)
    kind: OwnerKind = "participant"

    def __post_init__(self) -> None:
        self.entity_id = self.shop.alice

    async def move(self, *entries: Sequence[Movement], asset_id: UUID | None = None, **fields: Any) -> None:
        """One transaction of these entries; what doesn't sum to zero comes from issuance."""
        asset_id = asset_id or self.shop.asset_id
        async with self.database.transaction(self.organization_id) as tx:
            await lock_participants(tx, [self.shop.alice])
            books = await load_accounts(tx, [self.shop.alice], [asset_id])
            for entry in entries:
                lines = [
                    (books.account("PARTICIPANT", self.shop.alice, asset_id, bucket), d(amount))  # type: ignore[arg-type]
                    for bucket, amount in entry
                ]
                rest = sum((amount for _, amount in lines), d("0"))
                if rest:
                    lines.append((books.system("SYSTEM_ISSUANCE", asset_id), -rest))
                books.post("CREDIT", lines, program_id=self.shop.program_id, **fields)
            await write(tx, books)

    async def statement(self, *, limit: int = 200, cursor: str | None = None, **wanted: Any) -> Statement:
        """One page."""
        async with self.database.transaction(self.organization_id) as tx:
            which = StatementFilter(**{"asset_id": self.shop.asset_id, **wanted})
            return await read_statement(tx, self.kind, self.entity_id, which, PageRequest(limit, cursor))

    async def whole_statement(self, *, limit: int = 200, **wanted: Any) -> tuple[Statement, list[StatementLine]]:
        """The first page, and the lines of all; opening and closing are asserted to be the same on every page."""
        first = await self.statement(limit=limit, **wanted)
        page, rows = first, list(first.page.items)
        while page.page.next_cursor is not None:
            assert len(page.page.items) == limit
            page = await self.statement(limit=limit, cursor=page.page.next_cursor, **wanted)
            assert (page.opening_balance, page.closing_balance) == (first.opening_balance, first.closing_balance)
            rows += page.page.items
        return first, rows

    async def history(self, *, limit: int = 200, **wanted: Any) -> list[Line]:
        """The lines of all pages."""
        found: list[Line] = []
        cursor = None
        for _ in range(1_000):
            async with self.database.transaction(self.organization_id) as tx:
                which = HistoryFilter(**wanted)
                page = await read_history(tx, self.kind, self.entity_id, which, PageRequest(limit, cursor))
            assert len(page.items) <= limit
            found += page.items
            cursor = page.next_cursor
            if cursor is None:
                return found
        raise AssertionError("the history never ends")


@pytest.fixture
async def desk(database: Database, organization: Tenant) -> Desk:
    return Desk(database, organization.id, await open_shop(database, organization.id))


def amounts(lines: Sequence[Line]) -> list[str]:
    return [str(line.amount) for line in lines]


def running(rows: Sequence[StatementLine]) -> list[tuple[str, str]]:
    return [(str(row.line.amount), str(row.running_balance)) for row in rows]


# --- examples --------------------------------------------------------------------------------------------------------


async def test_opening_250_one_row_of_100_closing_350(desk: Desk, clock: SettableClock) -> None:
    clock.set("2024-01-15T10:00:00Z")
    await desk.move([("AVAILABLE", "250")])
    clock.advance(days=1)
    await desk.move([("AVAILABLE", "100")], description="Bonus")

    statement, rows = await desk.whole_statement(created_from=clock())

    assert (statement.opening_balance, statement.closing_balance) == (d("250"), d("350"))
    assert running(rows) == [("100", "350")]
    assert rows[0].line.description == "Bonus"


async def test_a_bucket_runs_on_its_own_and_all_buckets_run_together(desk: Desk) -> None:
    await desk.move([("AVAILABLE", "100")])
    await desk.move([("AVAILABLE", "-40"), ("HELD", "40")])
    await desk.move([("HELD", "-15")])

    statement, rows = await desk.whole_statement()
    assert running(rows) == [("100", "100"), ("-40", "60"), ("40", "100"), ("-15", "85")]
    assert statement.closing_balance == d("85")
    statement, rows = await desk.whole_statement(bucket="HELD")
    assert running(rows) == [("40", "40"), ("-15", "25")]
    statement, rows = await desk.whole_statement(bucket="DEFERRED")
    assert (rows, statement.opening_balance, statement.closing_balance) == ([], d("0"), d("0"))


async def test_a_page_may_end_in_the_middle_of_an_entry(desk: Desk) -> None:
    await desk.move([("AVAILABLE", "100")])
    await desk.move([("AVAILABLE", "-60"), ("HELD", "40"), ("DEFERRED", "20")])

    for limit in (1, 2, 3):
        _, rows = await desk.whole_statement(limit=limit)
        assert running(rows) == [("100", "100"), ("-60", "40"), ("40", "80"), ("20", "100")]
        assert amounts(await desk.history(limit=limit)) == ["20", "40", "-60", "100"]


async def test_an_account_may_appear_twice_in_an_entry(desk: Desk) -> None:
    await desk.move([("AVAILABLE", "5"), ("AVAILABLE", "7")], [("AVAILABLE", "1")])

    for limit in (1, 2, 3):
        _, rows = await desk.whole_statement(limit=limit)
        assert running(rows) == [("5", "5"), ("7", "12"), ("1", "13")]


async def test_an_overdraft_runs_below_zero(desk: Desk) -> None:
    await desk.move([("AVAILABLE", "10")])
    await desk.move([("AVAILABLE", "-25.50")])

    statement, rows = await desk.whole_statement()
    assert running(rows) == [("10", "10"), ("-25.50", "-15.50")]
    assert statement.closing_balance == d("-15.5")


async def test_a_transfer_shows_on_both_statements(desk: Desk, database: Database, organization: Tenant) -> None:
    """Example 4 of webhooks-and-reports.md 18."""
    await desk.move([("AVAILABLE", "50")])
    async with database.transaction(organization.id) as tx:
        bob = await make_participant(tx)
    async with database.transaction(organization.id) as tx:
        await lock_participants(tx, sorted([desk.shop.alice, bob]))
        books = await load_accounts(tx, [desk.shop.alice, bob], [desk.shop.asset_id])
        source, target = (
            books.account("PARTICIPANT", holder, desk.shop.asset_id, "AVAILABLE") for holder in (desk.shop.alice, bob)
        )
        books.post("TRANSFER", [(source, d("-20")), (target, d("20"))], program_id=desk.shop.program_id)
        await write(tx, books)

    _, rows = await desk.whole_statement()
    assert running(rows) == [("50", "50"), ("-20", "30")]
    desk.entity_id = bob
    _, rows = await desk.whole_statement()
    assert running(rows) == [("20", "20")]
    assert rows[0].line.action_type == "TRANSFER"


async def test_a_holder_that_was_never_touched_has_an_empty_statement(desk: Desk) -> None:
    statement, rows = await desk.whole_statement()

    assert (rows, statement.opening_balance, statement.closing_balance, statement.scale) == ([], d("0"), d("0"), 2)
    assert await desk.history() == []


async def test_a_window_in_the_future_is_empty_and_holds_the_balance(desk: Desk, clock: SettableClock) -> None:
    await desk.move([("AVAILABLE", "10")])
    tomorrow = clock() + timedelta(days=1)

    for end in (None, tomorrow):
        statement, rows = await desk.whole_statement(created_from=tomorrow, created_to=end)
        assert (rows, statement.opening_balance, statement.closing_balance) == ([], d("10"), d("10"))


async def test_owners_have_only_their_own(desk: Desk, database: Database, organization: Tenant) -> None:
    await desk.move([("AVAILABLE", "10")])
    async with database.transaction(organization.id) as tx:
        desk.entity_id = await make_participant(tx)
    assert await desk.history() == []
    desk.kind, desk.entity_id = "program", desk.shop.program_id
    assert await desk.history() == []
    desk.entity_id = desk.shop.alice
    with pytest.raises(Refusal, match="program not found"):
        await desk.history()


async def test_what_is_unknown_is_not_found(desk: Desk) -> None:
    with pytest.raises(Refusal, match="asset not found"):
        await desk.statement(asset_id=new_id())
    with pytest.raises(Refusal, match="asset not found"):
        await desk.history(asset_id=new_id())
    desk.entity_id = new_id()
    for kind in ("participant", "group", "program"):
        desk.kind = kind
        with pytest.raises(Refusal, match=f"{kind} not found"):
            await desk.statement()
        with pytest.raises(Refusal, match=f"{kind} not found"):
            await desk.history()


# --- the fold --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folded:
    """A posting of alice as it is stored."""

    sequence: int
    ordinal: int
    posting_id: UUID
    bucket: str
    amount: Decimal
    created_at: datetime


def stored(owner: psycopg.Connection[Any], desk: Desk) -> list[Folded]:
    """Alice's postings in the order of the ledger, straight from the tables."""
    rows = owner.execute(
        """
        select e.sequence, p.ordinal, p.id, a.bucket, p.amount, e.created_at
        from posting p
        join account a on a.organization_id = p.organization_id and a.id = p.account_id
        join journal_entry e on e.organization_id = p.organization_id and e.id = p.entry_id
        where p.organization_id = %s and a.entity_id = %s and a.asset_id = %s
        order by e.sequence, p.ordinal
        """,
        (desk.organization_id, desk.shop.alice, desk.shop.asset_id),
    ).fetchall()
    return [Folded(*row) for row in rows]


def fold(postings: Sequence[Folded], bucket: str | None = None, until: datetime | None = None) -> Decimal:
    """The sum of what is in the bucket (all, if None) and was created at or before `until`."""
    return sum(
        (
            posting.amount
            for posting in postings
            if bucket in (None, posting.bucket) and (until is None or posting.created_at <= until)
        ),
        d("0"),
    )


async def random_history(desk: Desk, clock: SettableClock, chance: random.Random) -> None:
    """Thirty transactions of one to four entries; some at the same time, some with a clock that runs back."""
    clock.set("2024-03-01T00:00:00Z")
    for _ in range(30):
        entries = []
        for _ in range(chance.randint(1, 4)):
            buckets = chance.sample(BUCKETS, chance.randint(1, 3))
            entries.append(
                [(bucket, str(chance.choice([-1, 1]) * chance.randint(1, 500) / d("100"))) for bucket in buckets]
            )
        await desk.move(*entries)
        clock.advance(seconds=chance.choice([-30, 0, 0, 1, 3600]))
    clock.advance(days=1)


@pytest.mark.parametrize("seed", range(4))
async def test_statements_agree_with_the_fold(
    desk: Desk, owner: psycopg.Connection[Any], clock: SettableClock, seed: int
) -> None:
    chance = random.Random(seed)
    await random_history(desk, clock, chance)
    postings = stored(owner, desk)
    instants = sorted({posting.created_at + chance.choice([-1, 0, 1]) * MICROSECOND for posting in postings})

    for _ in range(12):
        bucket = chance.choice([None, *BUCKETS])
        begin, end = sorted(chance.sample(instants, 2))
        window = {"created_from": chance.choice([None, begin]), "created_to": chance.choice([None, end])}
        statement, rows = await desk.whole_statement(bucket=bucket, limit=chance.choice([1, 2, 7, 200]), **window)

        expected = [
            posting
            for posting in postings
            if bucket in (None, posting.bucket)
            and (window["created_from"] is None or posting.created_at >= begin)
            and (window["created_to"] is None or posting.created_at <= end)
        ]
        assert [row.line.posting_id for row in rows] == [posting.posting_id for posting in expected]
        before = fold(postings, bucket, begin - MICROSECOND) if window["created_from"] else d("0")
        assert statement.opening_balance == before
        assert statement.closing_balance == fold(postings, bucket, window["created_to"])
        for row, posting in zip(rows, expected, strict=True):
            before += posting.amount
            assert row.running_balance == before
        assert before == statement.closing_balance


@pytest.mark.parametrize("seed", range(3))
async def test_balances_at_every_instant_agree_with_the_fold(
    desk: Desk, owner: psycopg.Connection[Any], clock: SettableClock, seed: int
) -> None:
    await random_history(desk, clock, random.Random(seed))
    postings = stored(owner, desk)

    for instant in sorted({posting.created_at for posting in postings}):
        for moment in (instant - MICROSECOND, instant):
            async with desk.database.transaction(desk.organization_id) as tx:
                found = await holder_balances_at(tx, desk.shop.alice, await moments.at(tx, moment))
            held = {bucket: fold(postings, bucket, moment) for bucket in BUCKETS}
            if moment < postings[0].created_at:
                assert found == []
                continue
            (balance,) = found
            assert [balance.available, balance.held, balance.deferred] == list(held.values())
    async with desk.database.transaction(desk.organization_id) as tx:
        assert await holder_balances_at(tx, desk.shop.alice, await moments.at(tx)) == await holder_balances(
            tx, [desk.shop.alice]
        )


# --- histories -------------------------------------------------------------------------------------------------------


async def test_a_history_goes_over_all_assets_newest_first(
    desk: Desk, database: Database, organization: Tenant
) -> None:
    async with database.transaction(organization.id) as tx:
        other = await make_asset(tx, desk.shop.program_id, scale=0)
    await desk.move([("AVAILABLE", "1")])
    await desk.move([("AVAILABLE", "2")], asset_id=other)
    await desk.move([("AVAILABLE", "-1"), ("HELD", "1")])

    for limit in (1, 2, 3, 4, 200):
        found = await desk.history(limit=limit)
        assert [(str(line.amount), line.bucket) for line in found] == [
            ("1", "HELD"),
            ("-1", "AVAILABLE"),
            ("2", "AVAILABLE"),
            ("1", "AVAILABLE"),
        ]
    assert [line.scale for line in found] == [2, 2, 0, 2]
    assert amounts(await desk.history(asset_id=other)) == ["2"]
    assert amounts(await desk.history(bucket="HELD")) == ["1"]
    assert amounts(await desk.history(bucket="AVAILABLE", asset_id=desk.shop.asset_id)) == ["-1", "1"]


async def test_bounds_of_storage_are_inclusive(
    desk: Desk, owner: psycopg.Connection[Any], clock: SettableClock
) -> None:
    clock.set("2024-01-01T00:00:00Z")
    for n in range(1, 7):
        await desk.move([("AVAILABLE", str(n))])
        clock.advance(days=1)
    at = {str(posting.amount): posting.created_at for posting in stored(owner, desk)}

    assert amounts(await desk.history(created_from=at["4"])) == ["6", "5", "4"]
    assert amounts(await desk.history(created_to=at["4"], limit=3)) == ["4", "3", "2", "1"]
    assert amounts(await desk.history(created_from=at["2"], created_to=at["2"])) == ["2"]
    assert amounts(await desk.history(created_from=clock())) == []
    assert amounts(await desk.history(created_to=at["1"] - MICROSECOND)) == []


async def an_event(tx: Transaction, program_id: UUID, happened_at: datetime) -> UUID:
    event_id = new_id()
    event = Event(
        organization_id=tx.organization_id,
        id=event_id,
        program_id=program_id,
        seq=1,
        idempotency_key=str(event_id),
        payload_hash=b"",
        event_type="EXTERNAL",
        event_data={},
        event_timestamp=happened_at,
        received_at=tx.now,
        created_at=tx.now,
        updated_at=tx.now,
        status="COMPLETED",
    )
    await tx.insert(event)
    return event_id


async def test_entries_occurred_with_their_event_or_else_when_they_were_created(
    desk: Desk, database: Database, organization: Tenant, clock: SettableClock
) -> None:
    clock.set("2024-02-01T00:00:00Z")
    january, march = datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 3, 1, tzinfo=UTC)
    async with database.transaction(organization.id) as tx:
        late = await an_event(tx, desk.shop.program_id, january)
        early = await an_event(tx, desk.shop.program_id, march)
    await desk.move([("AVAILABLE", "1")], event_id=late)
    await desk.move([("AVAILABLE", "2")])
    await desk.move([("AVAILABLE", "3")], event_id=early)

    found = await desk.history()
    assert [(str(line.amount), line.event_timestamp) for line in found] == [("3", march), ("2", None), ("1", january)]
    assert amounts(await desk.history(event_to=january)) == ["1"]
    assert amounts(await desk.history(event_from=march)) == ["3"]
    assert amounts(await desk.history(event_from=clock(), event_to=clock() + timedelta(days=1))) == ["2"]
    # Both pairs of bounds combine with AND.
    assert amounts(await desk.history(event_from=january, created_to=clock())) == ["1"]
    assert amounts(await desk.history(event_to=january, created_from=clock() + MICROSECOND)) == []


async def test_a_page_looks_at_a_limited_number_of_postings(
    desk: Desk,
    database: Database,
    organization: Tenant,
    clock: SettableClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statements, "SCANNED_POSTINGS", 6)
    monkeypatch.setattr(statements, "_SCAN_STEP", 2)
    clock.set("2024-02-01T00:00:00Z")
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    async with database.transaction(organization.id) as tx:
        event_id = await an_event(tx, desk.shop.program_id, long_ago)
    await desk.move([("AVAILABLE", "1")], [("HELD", "2")], event_id=event_id)
    await desk.move(*([("AVAILABLE", "5"), ("HELD", "5")] for _ in range(10)))
    await desk.move([("AVAILABLE", "3")], event_id=event_id)

    async with database.transaction(organization.id) as tx:
        page = await read_history(tx, "participant", desk.shop.alice, HistoryFilter(event_to=long_ago), PageRequest())
    assert amounts(page.items) == ["3"]
    assert page.has_more
    for limit in (1, 2, 3, 200):
        assert amounts(await desk.history(event_to=long_ago, limit=limit)) == ["3", "2", "1"]
        assert len(await desk.history(event_from=long_ago + MICROSECOND, limit=limit)) == 20


async def test_a_window_that_ends_before_it_begins_is_refused(desk: Desk, clock: SettableClock) -> None:
    now = clock()
    for reading in (
        desk.statement(created_from=now, created_to=now - MICROSECOND),
        desk.history(created_from=now, created_to=now - MICROSECOND),
        desk.history(event_from=now, event_to=now - MICROSECOND),
    ):
        with pytest.raises(Refusal) as refused:
            await reading
        assert refused.value.problems[0].field in ("from", "event_from")


async def test_a_cursor_of_another_list_is_refused(desk: Desk) -> None:
    await desk.move(*([("AVAILABLE", "1")] for _ in range(3)))
    cursor = (await desk.statement(limit=1)).page.next_cursor

    async with desk.database.transaction(desk.organization_id) as tx:
        with pytest.raises(Refusal) as refused:
            await read_history(tx, "participant", desk.shop.alice, HistoryFilter(), PageRequest(1, cursor))
    assert refused.value.problems[0].field == "cursor"
    with pytest.raises(Refusal):
        await desk.statement(cursor="YWJjMTIz")


async def test_a_forged_cursor_does_no_harm(desk: Desk) -> None:
    await desk.move(*([("AVAILABLE", "1")] for _ in range(3)))
    extremes = (-(2**63), -1, 0, 2**63 - 1)

    for a in extremes:
        for b in extremes:
            cursor = encode_cursor(statements._HISTORY_SORT, [a, b])
            async with desk.database.transaction(desk.organization_id) as tx:
                await read_history(tx, "participant", desk.shop.alice, HistoryFilter(), PageRequest(1, cursor))
            cursor = encode_cursor(statements._STATEMENT_SORT, [a, b, a])
            await desk.statement(limit=1, cursor=cursor)


# --- while others write ----------------------------------------------------------------------------------------------


async def test_a_statement_in_pages_ends_where_its_first_page_did(desk: Desk, clock: SettableClock) -> None:
    tomorrow = clock() + timedelta(days=1)
    for end in (None, tomorrow):
        before = await desk.statement(created_to=end)
        await desk.move(*([("AVAILABLE", "1")] for _ in range(10)))
        pages = [await desk.statement(limit=4, created_to=end)]
        while pages[-1].page.next_cursor is not None:
            await desk.move([("AVAILABLE", "-1"), ("HELD", "1")])
            pages.append(await desk.statement(limit=4, cursor=pages[-1].page.next_cursor, created_to=end))

        rows = [row for page in pages for row in page.page.items]
        assert {page.closing_balance for page in pages} == {before.closing_balance + 10}
        assert rows[-1].running_balance == pages[0].closing_balance
        assert len({row.line.posting_id for row in rows}) == len(rows)
        assert len(rows) == len(before.page.items) + 10


async def test_a_history_in_pages_neither_skips_nor_repeats(desk: Desk) -> None:
    await desk.move(*([("AVAILABLE", "1"), ("HELD", "2")] for _ in range(10)))
    expected = [line.posting_id for line in await desk.history()]
    found: list[UUID] = []
    cursor = None
    while True:
        async with desk.database.transaction(desk.organization_id) as tx:
            page = await read_history(tx, "participant", desk.shop.alice, HistoryFilter(), PageRequest(3, cursor))
        found += [line.posting_id for line in page.items]
        cursor = page.next_cursor
        if cursor is None:
            break
        await desk.move([("AVAILABLE", "1"), ("HELD", "2")])

    assert found == expected


async def test_statements_stay_sound_under_concurrent_writers(desk: Desk) -> None:
    await desk.move([("AVAILABLE", "1000")])

    async def hold_some() -> None:
        for _ in range(15):
            await desk.move([("AVAILABLE", "-1"), ("HELD", "1")], [("HELD", "-1"), ("AVAILABLE", "1")])

    async def read_some() -> list[tuple[Statement, list[StatementLine]]]:
        return [await desk.whole_statement(limit=5) for _ in range(4)]

    results = await asyncio.gather(hold_some(), hold_some(), read_some(), read_some())

    for statement, rows in [*results[2], *results[3]]:
        assert statement.opening_balance + sum(row.line.amount for row in rows) == statement.closing_balance
        assert rows[-1].running_balance == statement.closing_balance == d("1000")
        assert all(a.line.position < b.line.position for a, b in pairwise(rows))


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("analyzed", [False, True])
async def test_pages_of_long_accounts_read_only_themselves(
    desk: Desk, owner: psycopg.Connection[Any], database: Database, organization: Tenant, analyzed: bool
) -> None:
    """As the application's role: row-level security turns index conditions into filters where one isn't careful."""
    await desk.move(*([("AVAILABLE", "2"), ("HELD", "-1")] for _ in range(10_000)))
    if analyzed:
        owner.execute("analyze posting, journal_entry, account")

    async with database.transaction(organization.id) as tx:
        accounts = await statements._accounts(tx, "participant", desk.shop.alice, desk.shop.asset_id, None)
        params = {
            "organization_id": tx.organization_id,
            "account_ids": list(accounts),
            "after": [9_000] * len(accounts),
            "until": [9_999] * len(accounts),
            "rows": 201,
        }
        for query in (statements._OLDEST_FIRST, statements._NEWEST_FIRST):
            lines = await explain(tx, query, params)
            assert any("posting_version_key" in line for line in lines), "\n".join(lines)
            assert_indexed(lines, pages=4_000)
