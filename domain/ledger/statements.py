"""Statements and histories of holders and wallets. Contract: webhooks-and-reports.md 16, basics.md 5.9, holders.md 3.9.

A statement is a slice of the postings of one entity in one asset, between two positions of the chain; a history is a
slice across all its assets, newest first. Both translate their positions into versions of each account and read only
the postings of the page, so the thousandth page of a million postings costs what the first one costs. No balance is
added up: opening, closing and every running balance come from the balances that postings carry.
"""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Literal, LiteralString
from uuid import UUID

from db.session import Transaction
from domain import state
from domain.ledger import moments
from domain.ledger.books import Bucket, EntityType
from domain.ledger.moments import Position
from domain.pagination import Page, PageRequest, decode_cursor, sort_name

OwnerKind = Literal["participant", "group", "program"]
"""Whose accounts: a participant's, a group's, or a program's wallet."""

SCANNED_POSTINGS = 10_000
"""How many postings one page of a history looks at for those that occurred when it was asked for."""

_SCAN_STEP = 1_000
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
        select e.id as journal_entry_id, e.sequence, p.ordinal, p.id as posting_id, slice.account_id, p.asset_id,
               e.action_type, p.amount, p.balance, e.description, e.created_at, e.event_id, v.event_timestamp,
               e.api_key_id as created_by_api_key_id
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
    """One posting with what a reader wants to know of its entry. `balance` is that of its bucket after it."""

    journal_entry_id: UUID
    posting_id: UUID
    position: Position
    action_type: str
    asset_id: UUID
    scale: int
    bucket: Bucket
    amount: Decimal
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


async def read_statement(
    tx: Transaction, kind: OwnerKind, entity_id: UUID, wanted: StatementFilter, page: PageRequest
) -> Statement:
    """A page of the statement, oldest line first.

    opening + all amounts = closing = the running balance of the last line of the last page. The statement ends at
    `created_to`, or at the present of its first page, where all later pages end too, whatever is written meanwhile.
    Takes a moment (see `moments.at`), so it must come before anything is written.
    Raises Refusal: `not_found` for the owner or the asset, `bad_request` for a window that ends before it begins or a
    bad cursor.
    """
    _require_order("from", wanted.created_from, "to", wanted.created_to)
    cursor = decode_cursor(page.cursor, _STATEMENT_SORT, [int, int, int])
    if cursor is None:
        end = (await moments.at(tx, wanted.created_to)).sequence
    else:
        end = (
            cursor[2]
            if wanted.created_to is None
            else min(cursor[2], (await moments.at(tx, wanted.created_to)).sequence)
        )
    start = 0 if wanted.created_from is None else min(end, await moments.sequence_before(tx, wanted.created_from))

    await state.require(tx, kind, entity_id)
    scale = await _scale(tx, wanted.asset_id)
    accounts = await _accounts(tx, kind, entity_id, wanted.asset_id, wanted.bucket)
    opening, closing = Position(start), Position(end)
    begin = opening if cursor is None else Position(*cursor[:2])
    found = await moments.marks(tx, list(accounts), [opening, closing, begin])

    slices = [_Slice(accounts[id], begun.version, closed.version) for id, (_, closed, begun) in found.items()]
    lines = await _read_lines(tx, _OLDEST_FIRST, slices, page.limit + 1)
    held = {accounts[id].bucket: begun.balance for id, (_, _, begun) in found.items()}
    return Statement(
        scale=scale,
        opening_balance=_total(opened for opened, _, _ in found.values()),
        closing_balance=_total(closed for _, closed, _ in found.values()),
        page=_cut(_run(lines, held), page.limit, _STATEMENT_SORT, lambda row: [*row.line.position, end]),
    )
