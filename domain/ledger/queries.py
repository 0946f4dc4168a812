"""Reading the journal: the filtered list, and one entry with its postings. Contract: holders.md 8.3."""

from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import DictRow

from db.session import Transaction
from domain.errors import not_found
from domain.ledger.books import ActionType, Bucket
from domain.pagination import Page, PageRequest, cut, decode_cursor, sort_name

_SORT = sort_name(["sequence"], descending=True)

_ENTRY_COLUMNS: LiteralString = """
    e.id, e.organization_id, e.sequence, e.action_type, e.description, e.program_id, e.event_id, e.rule_id,
    e.reference_id, e.api_key_id as created_by_api_key_id, e.request_id, e.created_at, e.prev_hash, e.entry_hash,
    e.hash_version
"""

# Within an organization created_at never falls along the sequence, so a bound in time is a bound in the sequence,
# found by bisection through the unique index. A hole, which only tampering can make, ends it early with `low` and
# `high` still apart: both remain safe bounds. `middle` is a column of its own because under row-level security only
# comparisons of plain columns become index conditions.
_BISECT = """
with recursive span (low, high, middle) as (
    select 1::bigint, top, (1 + top) / 2
    from (select coalesce((select sequence from chain_head where organization_id = %(organization_id)s), 0) + 1) h (top)
    union all
    select low, high, (low + high) / 2
    from (
        select case when is_before then middle + 1 else low end, case when is_before then high else middle end
        from span
        join lateral (
            select created_at < %(instant)s or (%(after)s and created_at = %(instant)s) as is_before
            from journal_entry where organization_id = %(organization_id)s and sequence = span.middle
        ) e on true
        where low < high
    ) narrower (low, high)
)
select low, high from span order by high - low limit 1
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

    Raises Refusal naming `cursor` for a bad one.
    """
    after = decode_cursor(page.cursor, _SORT, [int])
    entry_terms = await _entry_terms(tx, wanted, before=after[0] if after else None)
    query = _from_holder(wanted, entry_terms) if _starts_from_holder(wanted) else _from_entries(wanted, entry_terms)
    rows = await tx.rows(query, _params(tx, wanted, entry_terms, page))
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
class _Terms:
    """Conditions on the entry `e`, and their parameters."""

    conditions: tuple[LiteralString, ...]
    params: dict[str, Any]

    def also(self, condition: LiteralString, **params: Any) -> "_Terms":
        return replace(self, conditions=(*self.conditions, condition), params={**self.params, **params})

    @property
    def sql(self) -> LiteralString:
        return " and ".join(self.conditions)


async def _entry_terms(tx: Transaction, wanted: EntryFilter, *, before: int | None) -> _Terms:
    terms = _Terms(("e.organization_id = %(organization_id)s",), {})
    if before is not None:
        terms = terms.also("e.sequence < %(before)s", before=before)
    if wanted.program_id is not None:
        terms = terms.also("e.program_id = %(program_id)s", program_id=wanted.program_id)
    if wanted.event_id is not None:
        terms = terms.also("e.event_id = %(event_id)s", event_id=wanted.event_id)
    if wanted.rule_id is not None:
        terms = terms.also("e.rule_id = %(rule_id)s", rule_id=wanted.rule_id)
    if wanted.reference_id is not None:
        terms = terms.also("e.reference_id = %(reference_id)s", reference_id=wanted.reference_id)
    if wanted.action_type is not None:
        terms = terms.also("e.action_type = %(action_type)s", action_type=wanted.action_type)
    return await _within_time(tx, wanted, terms)


async def _within_time(tx: Transaction, wanted: EntryFilter, terms: _Terms) -> _Terms:
    if wanted.created_from is not None:
        low, _ = await bisect(tx, wanted.created_from)
        terms = terms.also(
            "e.sequence >= %(low)s and e.created_at >= %(created_from)s", low=low, created_from=wanted.created_from
        )
    if wanted.created_to is not None:
        _, high = await bisect(tx, wanted.created_to, after=True)
        terms = terms.also(
            "e.sequence < %(high)s and e.created_at <= %(created_to)s", high=high, created_to=wanted.created_to
        )
    return terms


async def bisect(tx: Transaction, instant: datetime, *, after: bool = False) -> tuple[int, int]:
    """The sequence of the first entry at or after `instant` (strictly after it if `after`), as (low, high)."""
    row = await tx.row(_BISECT, {"organization_id": tx.organization_id, "instant": instant, "after": after})
    assert row is not None, "the span begins with one row"
    return row["low"], row["high"]


def _starts_from_holder(wanted: EntryFilter) -> bool:
    # An event or a reference has few entries: then it is the better start, even with a holder.
    has_holder = wanted.participant_id is not None or wanted.group_id is not None
    return has_holder and wanted.event_id is None and wanted.reference_id is None


def _from_entries(wanted: EntryFilter, terms: _Terms) -> LiteralString:
    """Walk the entries, newest first, and look at the postings of each where a filter asks for that."""
    conditions = _account_conditions(wanted) + _posting_conditions(wanted)
    exists: LiteralString = ""
    if conditions:
        exists = f"""
            and exists (
                select from posting p
                join account a on a.organization_id = p.organization_id and a.id = p.account_id
                where p.organization_id = e.organization_id and p.entry_id = e.id and {" and ".join(conditions)})
        """
    return f"""
        select {_ENTRY_COLUMNS}, g.name as program_name
        from journal_entry e
        join program g on g.organization_id = e.organization_id and g.id = e.program_id
        where {terms.sql} {exists}
        order by e.sequence desc
        limit %(rows)s
    """


def _from_holder(wanted: EntryFilter, terms: _Terms) -> LiteralString:
    """Walk the postings of each of the holder's accounts, newest first: along an account, version and sequence rise
    together. What a page needs is among the newest `rows` of each account."""
    account_terms: LiteralString = " and ".join(_account_conditions(wanted))
    posting_terms: LiteralString = " and ".join(("p.account_id = a.id", *_posting_conditions(wanted)))
    return f"""
        select distinct on (e.sequence) {_ENTRY_COLUMNS}, g.name as program_name
        from account a
        cross join lateral (
            select e.*
            from posting p
            join journal_entry e on e.organization_id = p.organization_id and e.id = p.entry_id
            where p.organization_id = %(organization_id)s and {posting_terms} and {terms.sql}
            order by p.version desc
            limit %(rows)s
        ) e
        join program g on g.organization_id = e.organization_id and g.id = e.program_id
        where a.organization_id = %(organization_id)s and {account_terms}
        order by e.sequence desc
        limit %(rows)s
    """


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


def _params(tx: Transaction, wanted: EntryFilter, terms: _Terms, page: PageRequest) -> dict[str, Any]:
    return {
        **terms.params,
        "organization_id": tx.organization_id,
        "participant_id": wanted.participant_id,
        "group_id": wanted.group_id,
        "asset_id": wanted.asset_id,
        "bucket": wanted.bucket,
        "min_amount": wanted.min_amount,
        "max_amount": wanted.max_amount,
        "rows": page.limit + 1,
    }
