"""Statements and histories of holders and wallets. Contract: webhooks-and-reports.md 16, basics.md 5.9, holders.md 3.9.

A statement is a slice of the postings of one entity in one asset, between two positions of the chain; a history is a
slice across all its assets, newest first. Both translate their positions into versions of each account and read only
the postings of the page, so the thousandth page of a million postings costs what the first one costs. No balance is
added up: opening, closing and every running balance come from the balances that postings carry.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from functools import reduce
from typing import Literal, LiteralString
from uuid import UUID

from psycopg.rows import DictRow

from db.session import Transaction
from domain import state
from domain.clock import format_timestamp
from domain.errors import bad_field, not_found
from domain.ledger import moments
from domain.ledger.books import Bucket, EntityType
from domain.ledger.moments import Position
from domain.money import ZERO, add
from domain.pagination import Page, PageRequest, cut, decode_cursor, encode_cursor, sort_name

OwnerKind = Literal["participant", "group", "program"]
"""Whose accounts: a participant's, a group's, or a program's wallet."""

SCANNED_POSTINGS = 10_000
"""How many postings one page of a history looks at for those that occurred when it was asked for."""

_SCAN_STEP = 1_000
_NO_END = 2**63 - 1
_STATEMENT_SORT = sort_name(["sequence", "ordinal"], descending=False)
_HISTORY_SORT = sort_name(["sequence", "ordinal"], descending=True)

_ENTITY_TYPES: dict[OwnerKind, EntityType] = {"participant": "PARTICIPANT", "group": "GROUP", "program": "PROGRAM"}

_ACCOUNTS = """
select a.id, a.asset_id, a.bucket, s.scale
from account a
join asset s on s.organization_id = a.organization_id and s.id = a.asset_id
where a.organization_id = %(organization_id)s and a.entity_id = %(entity_id)s and a.entity_type = %(entity_type)s
    and (%(asset_id)s::uuid is null or a.asset_id = %(asset_id)s)
    and (%(bucket)s::text is null or a.bucket = %(bucket)s)
"""


def _lines_query(direction: Literal["asc", "desc"]) -> LiteralString:
    """The first `rows` postings in slices of accounts: versions above `after`, up to `until`.

    Entry and event are looked up one by one whatever the statistics say (`limit 1` keeps the planner from a join): a
    page is short and the journal is long.
    """
    return f"""
        select e.id as journal_entry_id, e.sequence, p.ordinal, p.id as posting_id, slice.account_id,
               e.action_type, p.amount, p.version, p.balance, e.description, e.created_at, e.event_id,
               v.event_timestamp, e.api_key_id as created_by_api_key_id
        from unnest(%(account_ids)s::uuid[], %(after)s::bigint[], %(until)s::bigint[])
            slice (account_id, after, until)
        cross join lateral (
            select * from posting
            where organization_id = %(organization_id)s and account_id = slice.account_id
                and version > slice.after and version <= slice.until
            order by version {direction} limit %(rows)s
        ) p
        cross join lateral (
            select * from journal_entry where organization_id = %(organization_id)s and id = p.entry_id limit 1
        ) e
        left join lateral (
            select event_timestamp from event where organization_id = %(organization_id)s and id = e.event_id limit 1
        ) v on true
        order by e.sequence {direction}, p.ordinal {direction}
        limit %(rows)s
    """


_OLDEST_FIRST = _lines_query("asc")
_NEWEST_FIRST = _lines_query("desc")


@dataclass(frozen=True, slots=True, kw_only=True)
class StatementFilter:
    """Which statement: one asset, one bucket or all together, and a window of `created_at`, inclusive at both ends."""

    asset_id: UUID
    bucket: Bucket | None = None
    created_from: datetime | None = None
    created_to: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryFilter:
    """Which postings; None means any, everything combines with AND, all bounds are inclusive.

    Entries without an event occurred when they were created.
    """

    asset_id: UUID | None = None
    bucket: Bucket | None = None
    created_from: datetime | None = None
    created_to: datetime | None = None
    event_from: datetime | None = None
    event_to: datetime | None = None

    def has_occurrence(self) -> bool:
        """Whether it asks for a time of occurrence, which no index orders."""
        return self.event_from is not None or self.event_to is not None

    def took_place(self, line: "Line") -> bool:
        """Whether the line occurred within `event_from` and `event_to`."""
        occurred_at = line.event_timestamp or line.created_at
        return (self.event_from is None or occurred_at >= self.event_from) and (
            self.event_to is None or occurred_at <= self.event_to
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One posting with what a reader wants to know of its entry. `version` and `balance` are its account's after it."""

    journal_entry_id: UUID
    posting_id: UUID
    position: Position
    account_id: UUID
    action_type: str
    asset_id: UUID
    scale: int
    bucket: Bucket
    amount: Decimal
    version: int
    balance: Decimal
    description: str | None
    created_at: datetime
    event_id: UUID | None
    event_timestamp: datetime | None
    created_by_api_key_id: UUID | None


@dataclass(frozen=True, slots=True)
class StatementLine:
    """A line of a statement and the balance of the statement's scope after it."""

    line: Line
    running_balance: Decimal


@dataclass(frozen=True, slots=True)
class Statement:
    """One page of a statement. Opening and closing are those of the whole window, on every page."""

    scale: int
    opening_balance: Decimal
    closing_balance: Decimal
    page: Page[StatementLine]


@dataclass(frozen=True, slots=True)
class _Account:
    id: UUID
    asset_id: UUID
    bucket: Bucket
    scale: int


@dataclass(frozen=True, slots=True)
class _Slice:
    """The postings of an account with versions above `after`, up to `until`."""

    account: _Account
    after: int
    until: int


async def read_statement(
    tx: Transaction, kind: OwnerKind, entity_id: UUID, wanted: StatementFilter, page: PageRequest
) -> Statement:
    """A page of the statement, oldest line first.

    opening + all amounts = closing = the running balance of the last line of the last page. The statement ends at
    `created_to`, or at the present of its first page: there all its pages end, whatever is written meanwhile.
    It takes a moment (`moments.at`), so the transaction must not have written anything.
    Raises Refusal: `not_found` for the owner or the asset, `bad_request` for a window that ends before it begins or a
    bad cursor.
    """
    _require_order("from", wanted.created_from, "to", wanted.created_to)
    after = decode_cursor(page.cursor, _STATEMENT_SORT, [int, int, int])
    await state.require(tx, kind, entity_id)
    scale = await _scale(tx, wanted.asset_id)
    opening, closing = await _window(tx, wanted, None if after is None else after[2])
    begin = opening if after is None else max(opening, Position(*after[:2]))

    accounts = await _accounts(tx, kind, entity_id, wanted.asset_id, wanted.bucket)
    marks = await moments.marks(tx, list(accounts), [opening, closing, begin])
    slices = [_Slice(accounts[id], begun.version, closed.version) for id, (_, closed, begun) in marks.items()]
    lines = await _read_lines(tx, _OLDEST_FIRST, slices, page.limit + 1)
    rows = _run(lines, {id: begun.balance for id, (_, _, begun) in marks.items()})
    return Statement(
        scale,
        opening_balance=_total(opened.balance for opened, _, _ in marks.values()),
        closing_balance=_total(closed.balance for _, closed, _ in marks.values()),
        page=cut(rows, page.limit, _STATEMENT_SORT, lambda row: [*row.line.position, closing.sequence]),
    )


async def read_history(
    tx: Transaction, kind: OwnerKind, entity_id: UUID, wanted: HistoryFilter, page: PageRequest
) -> Page[Line]:
    """A page of postings, newest first.

    Times of occurrence are in no order along the ledger. A page that asks for them looks at SCANNED_POSTINGS postings
    at most; it may hold fewer lines than its limit, even none, and still have a next page.
    With `created_to` it takes a moment, like `read_statement`. Raises the same refusals.
    """
    _require_order("from", wanted.created_from, "to", wanted.created_to)
    _require_order("event_from", wanted.event_from, "event_to", wanted.event_to)
    after = decode_cursor(page.cursor, _HISTORY_SORT, [int, int])
    await state.require(tx, kind, entity_id)
    if wanted.asset_id is not None:
        await _scale(tx, wanted.asset_id)
    oldest, newest = Position(0), Position(_NO_END)
    if wanted.created_to is not None:
        newest = Position((await moments.at(tx, wanted.created_to)).sequence)
    if wanted.created_from is not None:
        oldest = Position(await moments.sequence_before(tx, wanted.created_from))
    if after is not None:
        newest = min(newest, Position(after[0], max(after[1], 0) - 1))

    accounts = await _accounts(tx, kind, entity_id, wanted.asset_id, wanted.bucket)
    marks = await moments.marks(tx, list(accounts), [oldest, newest])
    slices = [_Slice(accounts[id], low.version, high.version) for id, (low, high) in marks.items()]
    return await _search(tx, slices, wanted, page.limit)


async def _window(tx: Transaction, wanted: StatementFilter, pinned: int | None) -> tuple[Position, Position]:
    """Where a statement opens and closes; `pinned` is where its first page closed."""
    if pinned is not None and wanted.created_to is None:
        end = pinned
    else:
        end = (await moments.at(tx, wanted.created_to)).sequence
        # An end that lay in the future of the first page may have come since.
        end = end if pinned is None else min(end, pinned)
    start = 0
    if wanted.created_from is not None:
        start = min(end, await moments.sequence_before(tx, wanted.created_from))
    return Position(start), Position(end)


async def _search(tx: Transaction, slices: Sequence[_Slice], wanted: HistoryFilter, limit: int) -> Page[Line]:
    """The newest lines in `slices` that took place when `wanted` says."""
    step = _SCAN_STEP if wanted.has_occurrence() else limit + 1
    found: list[Line] = []
    for _ in range(0, SCANNED_POSTINGS, step):
        lines = await _read_lines(tx, _NEWEST_FIRST, slices, step)
        found += filter(wanted.took_place, lines)
        if len(found) > limit or len(lines) < step:
            return cut(found, limit, _HISTORY_SORT, lambda line: line.position)
        slices = _below(slices, lines)
    return Page(found, encode_cursor(_HISTORY_SORT, lines[-1].position))


def _below(slices: Sequence[_Slice], lines: Sequence[Line]) -> list[_Slice]:
    """What is left of the slices once `lines`, their newest, have been read."""
    reached = {line.account_id: line.version for line in lines}
    return [replace(slice, until=reached.get(slice.account.id, slice.until + 1) - 1) for slice in slices]


def _run(lines: Sequence[Line], balances: dict[UUID, Decimal]) -> list[StatementLine]:
    """Each line with the total of all accounts after it; `balances` are those of the accounts before the first."""
    rows = []
    for line in lines:
        balances[line.account_id] = line.balance
        rows.append(StatementLine(line, _total(balances.values())))
    return rows


def _total(balances: Iterable[Decimal]) -> Decimal:
    return reduce(add, balances, ZERO)


async def _read_lines(tx: Transaction, query: LiteralString, slices: Sequence[_Slice], limit: int) -> list[Line]:
    accounts = {slice.account.id: slice.account for slice in slices}
    params = {
        "organization_id": tx.organization_id,
        "account_ids": list(accounts),
        "after": [slice.after for slice in slices],
        "until": [slice.until for slice in slices],
        "rows": limit,
    }
    return [_line(row, accounts[row["account_id"]]) for row in await tx.rows(query, params)]


def _line(row: DictRow, account: _Account) -> Line:
    position = Position(row.pop("sequence"), row.pop("ordinal"))
    return Line(**row, position=position, asset_id=account.asset_id, bucket=account.bucket, scale=account.scale)


async def _accounts(
    tx: Transaction, kind: OwnerKind, entity_id: UUID, asset_id: UUID | None, bucket: Bucket | None
) -> dict[UUID, _Account]:
    params = {
        "organization_id": tx.organization_id,
        "entity_id": entity_id,
        "entity_type": _ENTITY_TYPES[kind],
        "asset_id": asset_id,
        "bucket": bucket,
    }
    return {row["id"]: _Account(**row) for row in await tx.rows(_ACCOUNTS, params)}


async def _scale(tx: Transaction, asset_id: UUID) -> int:
    row = await tx.row("select scale from asset where organization_id = %s and id = %s", (tx.organization_id, asset_id))
    if row is None:
        raise not_found("asset")
    scale: int = row["scale"]
    return scale


def _require_order(first: str, begin: datetime | None, last: str, end: datetime | None) -> None:
    if begin is not None and end is not None and begin > end:
        raise bad_field(
            first, f"is later than {last}", expected=f"at or before {last}", received=format_timestamp(begin)
        )
