"""Reading the journal: the filtered list, and one entry with its postings. Contract: holders.md 8.3.

Cursor and bounds in time become bounds of what is walked, of the sequence or of the versions of the holder's accounts,
so that the thousandth page costs what the first one costs.
"""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import DictRow

from db.session import Transaction
from domain.errors import not_found
from domain.ledger import moments
from domain.ledger.books import ActionType, Bucket
from domain.ledger.moments import Position, bisect
from domain.pagination import Page, PageRequest, cut, decode_cursor, encode_cursor, sort_name

SCANNED_ENTRIES = 10_000
"""How many entries one page without a holder looks at for those that match a filter which no index orders."""

_NO_END = 2**63 - 1
_SORT = sort_name(["sequence"], descending=True)

_ENTRY_COLUMNS: LiteralString = """
    e.id, e.organization_id, e.sequence, e.action_type, e.description, e.program_id, e.event_id, e.rule_id,
    e.reference_id, e.api_key_id as created_by_api_key_id, e.request_id, e.created_at, e.prev_hash, e.entry_hash,
    e.hash_version
"""

_POSTINGS = """
select p.id, a.entity_type, a.entity_id, p.asset_id, s.symbol as asset_symbol, s.scale, a.bucket, p.amount
from posting p
join account a on a.organization_id = p.organization_id and a.id = p.account_id
join asset s on s.organization_id = p.organization_id and s.id = p.asset_id
where p.organization_id = %s and p.entry_id = %s
order by p.ordinal
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryFilter:
    """Which entries to list; None means any. Everything combines with AND.

    The holder (`participant_id` or `group_id`, not both), `asset_id`, `bucket` and the amounts must hold on one and
    the same posting; the amounts compare with its signed amount. All bounds are inclusive.
    """

    program_id: UUID | None = None
    event_id: UUID | None = None
    rule_id: UUID | None = None
    participant_id: UUID | None = None
    group_id: UUID | None = None
    asset_id: UUID | None = None
    bucket: Bucket | None = None
    action_type: ActionType | None = None
    reference_id: str | None = None
    created_from: datetime | None = None
    created_to: datetime | None = None
    min_amount: Decimal | None = None
    max_amount: Decimal | None = None


async def list_entries(tx: Transaction, wanted: EntryFilter, page: PageRequest) -> Page[DictRow]:
    """The entries that match, newest first, without their postings but with `program_name`.

    Action type, asset, bucket and amounts are in no index of the journal. A page that asks for them without a holder
    looks at SCANNED_ENTRIES entries at most; it may hold fewer than its limit, even none, and still have a next page.
    Raises Refusal naming `cursor` for a bad one.
    """
    after = decode_cursor(page.cursor, _SORT, [int])
    window = await _window(tx, wanted, before=max(after[0], 1) if after else _NO_END)
    params = _params(tx, wanted, window, page)
    if _starts_from_holder(wanted):
        rows = await tx.rows(_from_holder(wanted), params | await _slices(tx, wanted, window))
        return cut(rows, page.limit, _SORT, lambda row: [row["sequence"]])
    rows = await tx.rows(_from_entries(wanted), params)
    if len(rows) <= page.limit and _needs_scan(wanted):
        last = await tx.row(_last_scanned(wanted), params)
        if last is not None:
            return Page(rows, encode_cursor(_SORT, [last["sequence"]]))
    return cut(rows, page.limit, _SORT, lambda row: [row["sequence"]])


async def get_entry(tx: Transaction, entry_id: UUID) -> tuple[DictRow, list[DictRow]]:
    """One entry with `program_name`, and its postings in insertion order, each with its asset's symbol and scale.

    Raises Refusal `not_found` for an unknown id.
    """
    query: LiteralString = f"""
        select {_ENTRY_COLUMNS}, g.name as program_name
        from journal_entry e
        join program g on g.organization_id = e.organization_id and g.id = e.program_id
        where e.organization_id = %s and e.id = %s
    """
    entry = await tx.row(query, (tx.organization_id, entry_id))
    if entry is None:
        raise not_found("journal entry")
    return entry, await tx.rows(_POSTINGS, (tx.organization_id, entry_id))


async def find_participant(tx: Transaction, external_id: str) -> UUID | None:
    """The id of the participant with this external id, for filters that accept either."""
    row = await tx.row(
        "select id from participant where organization_id = %s and external_id = %s", (tx.organization_id, external_id)
    )
    return row["id"] if row else None


@dataclass(frozen=True, slots=True)
class _Window:
    """The sequences to list: from `low` on, below `high`."""

    low: int
    high: int


async def _window(tx: Transaction, wanted: EntryFilter, *, before: int) -> _Window:
    low, high = 1, before
    if wanted.created_from is not None:
        low, _ = await bisect(tx, wanted.created_from)
    if wanted.created_to is not None:
        _, end = await bisect(tx, wanted.created_to, after=True)
        high = min(high, end)
    if high == _NO_END and not _starts_from_holder(wanted) and _needs_scan(wanted):
        # What is sealed meanwhile must not move the place where the scan ends.
        high = await _head(tx) + 1
    return _Window(low, high)


async def _head(tx: Transaction) -> int:
    row = await tx.row("select sequence from chain_head where organization_id = %s", (tx.organization_id,))
    return row["sequence"] if row else 0


async def _slices(tx: Transaction, wanted: EntryFilter, window: _Window) -> dict[str, Any]:
    """The holder's accounts, each with the versions above `after`, up to `until`, that the window covers."""
    conditions: LiteralString = " and ".join(_account_conditions(wanted))
    query: LiteralString = f"select a.id from account a where a.organization_id = %(organization_id)s and {conditions}"
    account_ids = [row["id"] for row in await tx.rows(query, _account_params(tx, wanted))]
    if window == _Window(1, _NO_END):
        return {"account_ids": account_ids, "after": [0] * len(account_ids), "until": [_NO_END] * len(account_ids)}
    marks = await moments.marks(tx, account_ids, [Position(window.low - 1), Position(window.high - 1)])
    return {
        "account_ids": list(marks),
        "after": [low.version for low, _ in marks.values()],
        "until": [high.version for _, high in marks.values()],
    }


def _starts_from_holder(wanted: EntryFilter) -> bool:
    # An event or a reference has few entries: then it is the better start, even with a holder.
    has_holder = wanted.participant_id is not None or wanted.group_id is not None
    return has_holder and wanted.event_id is None and wanted.reference_id is None


def _needs_scan(wanted: EntryFilter) -> bool:
    return bool(wanted.action_type or _account_conditions(wanted) or _posting_conditions(wanted))


def _entry_terms(wanted: EntryFilter) -> LiteralString:
    """The conditions on the entry that an index serves along the sequence, or that leave few entries."""
    conditions: list[LiteralString] = [
        "e.organization_id = %(organization_id)s and e.sequence >= %(low)s and e.sequence < %(high)s"
    ]
    if wanted.program_id is not None:
        conditions.append("e.program_id = %(program_id)s")
    if wanted.event_id is not None:
        conditions.append("e.event_id = %(event_id)s")
    if wanted.rule_id is not None:
        conditions.append("e.rule_id = %(rule_id)s")
    if wanted.reference_id is not None:
        conditions.append("e.reference_id = %(reference_id)s")
    if wanted.created_from is not None:
        conditions.append("e.created_at >= %(created_from)s")
    if wanted.created_to is not None:
        conditions.append("e.created_at <= %(created_to)s")
    return " and ".join(conditions)


def _from_entries(wanted: EntryFilter) -> LiteralString:
    """Walk the entries, newest first, and look at the postings of each where a filter asks for that.

    `limit 1` keeps the planner from joining the whole of a table, as in `moments`.
    """
    conditions = _account_conditions(wanted) + _posting_conditions(wanted)
    matching: LiteralString = ""
    if conditions:
        matching = f"""
            cross join lateral (
                select from posting p
                join account a on a.organization_id = p.organization_id and a.id = p.account_id
                where p.organization_id = %(organization_id)s and p.entry_id = e.id and {" and ".join(conditions)}
                limit 1
            ) p
        """
    return f"""
        select {_ENTRY_COLUMNS}, g.name as program_name
        from (
            select * from journal_entry e where {_entry_terms(wanted)} order by e.sequence desc limit %(scanned)s
        ) e
        {matching}
        join program g on g.organization_id = e.organization_id and g.id = e.program_id
        where {_action_term(wanted)}
        order by e.sequence desc
        limit %(rows)s
    """


def _last_scanned(wanted: EntryFilter) -> LiteralString:
    """Where the scan of `_from_entries` ended at its bound; no row where the entries ended first."""
    return f"""
        select e.sequence from journal_entry e where {_entry_terms(wanted)}
        order by e.sequence desc offset %(scanned)s - 1 limit 1
    """


def _from_holder(wanted: EntryFilter) -> LiteralString:
    """Walk slices of the postings of each of the holder's accounts, newest first: along an account, version and
    sequence rise together. What a page needs is among the newest `rows` of each account."""
    posting_terms: LiteralString = " and ".join(("p.account_id = slice.account_id", *_posting_conditions(wanted)))
    return f"""
        select distinct on (e.sequence) {_ENTRY_COLUMNS}, g.name as program_name
        from unnest(%(account_ids)s::uuid[], %(after)s::bigint[], %(until)s::bigint[])
            slice (account_id, after, until)
        cross join lateral (
            select e.*
            from posting p
            cross join lateral (
                select * from journal_entry where organization_id = %(organization_id)s and id = p.entry_id limit 1
            ) e
            where p.organization_id = %(organization_id)s and {posting_terms}
                and p.version > slice.after and p.version <= slice.until
                and {_entry_terms(wanted)} and {_action_term(wanted)}
            order by p.version desc
            limit %(rows)s
        ) e
        join program g on g.organization_id = e.organization_id and g.id = e.program_id
        order by e.sequence desc
        limit %(rows)s
    """


def _action_term(wanted: EntryFilter) -> LiteralString:
    return "true" if wanted.action_type is None else "e.action_type = %(action_type)s"


def _account_conditions(wanted: EntryFilter) -> tuple[LiteralString, ...]:
    conditions: list[LiteralString] = []
    if wanted.participant_id is not None:
        conditions.append("a.entity_id = %(participant_id)s and a.entity_type = 'PARTICIPANT'")
    if wanted.group_id is not None:
        conditions.append("a.entity_id = %(group_id)s and a.entity_type = 'GROUP'")
    if wanted.asset_id is not None:
        conditions.append("a.asset_id = %(asset_id)s")
    if wanted.bucket is not None:
        conditions.append("a.bucket = %(bucket)s")
    return tuple(conditions)


def _posting_conditions(wanted: EntryFilter) -> tuple[LiteralString, ...]:
    conditions: list[LiteralString] = []
    if wanted.min_amount is not None:
        conditions.append("p.amount >= %(min_amount)s")
    if wanted.max_amount is not None:
        conditions.append("p.amount <= %(max_amount)s")
    return tuple(conditions)


def _account_params(tx: Transaction, wanted: EntryFilter) -> dict[str, Any]:
    return {
        "organization_id": tx.organization_id,
        "participant_id": wanted.participant_id,
        "group_id": wanted.group_id,
        "asset_id": wanted.asset_id,
        "bucket": wanted.bucket,
    }


def _params(tx: Transaction, wanted: EntryFilter, window: _Window, page: PageRequest) -> dict[str, Any]:
    return _account_params(tx, wanted) | {
        "program_id": wanted.program_id,
        "event_id": wanted.event_id,
        "rule_id": wanted.rule_id,
        "reference_id": wanted.reference_id,
        "action_type": wanted.action_type,
        "created_from": wanted.created_from,
        "created_to": wanted.created_to,
        "min_amount": wanted.min_amount,
        "max_amount": wanted.max_amount,
        "low": window.low,
        "high": window.high,
        "scanned": SCANNED_ENTRIES,
        "rows": page.limit + 1,
    }
