"""The journal as a file: JSON Lines for whoever verifies it, a plain-text journal for whoever keeps books.

Either is a stream of chunks, a page of entries per transaction, so that a ledger of any length passes through little
memory. Entries never change, so the pages belong together although each is a snapshot of its own: the export ends at
the head as it was at its start. What is stored is exported as it is, tampered with or not: finding that out is the
reader's business (tools/verify_export.py). Contract: README.md "Hash chain"; docs/ledger.md "Exports".
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from itertools import groupby
from operator import attrgetter
from typing import LiteralString, NamedTuple
from uuid import UUID

import orjson
from psycopg.rows import TupleRow

from db.session import Database
from domain import limits
from domain.clock import format_timestamp
from domain.errors import bad_field, not_found
from domain.money import fits_scale, format_amount, format_plain

_HEAD = """
select coalesce(h.sequence, 0)
from organization o
left join chain_head h on h.organization_id = o.id
where o.id = %s
"""

_ENTRIES: LiteralString = """
select e.sequence, e.id, e.program_id, e.action_type, e.description, e.event_id, e.rule_id, e.reference_id,
       e.api_key_id, e.created_at, e.prev_hash, e.entry_hash, e.hash_version,
       p.id, p.amount, p.balance, a.entity_type, a.entity_id, p.asset_id, a.bucket, s.symbol, s.scale
from (
    select * from journal_entry
    where organization_id = %(organization_id)s and sequence > %(after)s and sequence <= %(last)s
    order by sequence limit %(rows)s
) e
left join posting p on p.organization_id = e.organization_id and p.entry_id = e.id
left join account a on a.organization_id = p.organization_id and a.id = p.account_id
left join asset s on s.organization_id = p.organization_id and s.id = p.asset_id
order by e.sequence, p.ordinal
"""

_COMMODITIES = """
select id, symbol, scale from asset
where organization_id = %(organization_id)s and id > %(after)s
order by id limit %(rows)s
"""

_ACCOUNTS = """
select a.id, a.entity_type, a.entity_id, s.symbol, a.bucket
from (
    select * from account
    where organization_id = %(organization_id)s and id > %(after)s
    order by id limit %(rows)s
) a
join asset s on s.organization_id = a.organization_id and s.id = a.asset_id
order by a.id
"""


@dataclass(frozen=True, slots=True)
class Span:
    """Which entries are exported: those with a sequence from `first` to `last`; none where `last` is below `first`."""

    organization_id: UUID
    first: int
    last: int

    @property
    def entries(self) -> int:
        """How many there are, in a ledger without holes."""
        return max(0, self.last - self.first + 1)


class Chunk(NamedTuple):
    """The next piece of an export, ending with a line's end, and how many entries it holds."""

    text: str
    entries: int


async def span_of(database: Database, organization_id: UUID, first: int = 1) -> Span:
    """The entries from sequence `first` to the head as it is now.

    Raises Refusal: `not_found` for an unknown organization, `bad_request` for a `first` below 1.
    """
    if first < 1:
        raise bad_field("from_sequence", "sequences begin at 1", expected="at least 1", received=str(first))
    async with database.transaction(organization_id) as tx:
        row = await (await tx.execute(_HEAD, (organization_id,))).fetchone()
    if row is None:
        raise not_found("organization")
    return Span(organization_id, first, row[0])


async def jsonl(database: Database, span: Span) -> AsyncIterator[Chunk]:
    """One JSON object a line and entry, in the chain's order: all that its hash covers, and the hashes.

    Members have the names of the canonical form (docs/ledger.md), but `hash_version` for `version`; amounts are
    canonical already, so a hash can be computed from the line without any arithmetic.
    """
    async for page in _pages(database, span):
        yield Chunk("".join(_json_line(span.organization_id, lines) for lines in page), len(page))


async def hledger(database: Database, span: Span) -> AsyncIterator[Chunk]:
    """A journal for hledger: commodities and accounts are declared, each entry is a transaction.

    An export from the first entry on also asserts the running balances that our postings carry, so that hledger proves
    them by itself.
    """
    yield Chunk(
        f"; Organization {span.organization_id}, entries {span.first} to {span.last}. Amounts are signed as in Scrip:\n"
        "; what a holder has is positive, and what was issued to them negative.\n"
        "decimal-mark .\n\n",
        0,
    )
    async for text in _declarations(database, span.organization_id):
        yield Chunk(text, 0)
    async for page in _pages(database, span):
        yield Chunk("".join(_transaction(lines, asserts=span.first == 1) for lines in page), len(page))


FORMATS = {"jsonl": jsonl, "hledger": hledger}
"""The writers of the formats, by the name that `scrip export --format` takes."""


class _Line(NamedTuple):
    """One posting with its entry; None from `posting_id` on where an entry has lost its postings."""

    sequence: int
    id: UUID
    program_id: UUID
    action_type: str
    description: str | None
    event_id: UUID | None
    rule_id: UUID | None
    reference_id: str | None
    api_key_id: UUID | None
    created_at: datetime
    prev_hash: bytes
    entry_hash: bytes
    hash_version: int
    posting_id: UUID | None
    amount: Decimal
    balance: Decimal | None
    entity_type: str | None
    entity_id: UUID | None
    asset_id: UUID
    bucket: str | None
    symbol: str | None
    scale: int | None


async def _pages(database: Database, span: Span) -> AsyncIterator[list[list[_Line]]]:
    """The entries, each with its postings in the order in which they were written."""
    after = span.first - 1
    while after < span.last:
        params = {
            "organization_id": span.organization_id,
            "after": after,
            "last": span.last,
            "rows": limits.VERIFY_PAGE,
        }
        async with database.transaction(span.organization_id) as tx:
            rows = await (await tx.execute(_ENTRIES, params)).fetchall()
        if not rows:
            return
        lines = [_Line(*row) for row in rows]
        after = lines[-1].sequence
        yield [list(entry) for _, entry in groupby(lines, key=attrgetter("sequence"))]


def _json_line(organization_id: UUID, lines: Sequence[_Line]) -> str:
    entry = lines[0]
    document = {
        "sequence": entry.sequence,
        "entry_hash": bytes(entry.entry_hash).hex(),
        "prev_hash": bytes(entry.prev_hash).hex(),
        "hash_version": entry.hash_version,
        "id": entry.id,
        "organization_id": organization_id,
        "program_id": entry.program_id,
        "action_type": entry.action_type,
        "description": entry.description,
        "event_id": entry.event_id,
        "rule_id": entry.rule_id,
        "reference_id": entry.reference_id,
        "created_by_api_key_id": entry.api_key_id,
        "created_at": format_timestamp(entry.created_at),
        "postings": [
            {
                "id": line.posting_id,
                "entity_type": line.entity_type,
                "entity_id": line.entity_id,
                "asset_id": line.asset_id,
                "bucket": line.bucket,
                "amount": format_plain(line.amount),
            }
            for line in lines
            if line.posting_id is not None
        ],
    }
    return orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE).decode()


async def _declarations(database: Database, organization_id: UUID) -> AsyncIterator[str]:
    """The commodities and accounts of the organization; those made after the export began do no harm."""
    async for rows in _keyset(database, organization_id, _COMMODITIES):
        yield "".join(_commodity_directive(symbol, scale) for _, symbol, scale in rows)
    yield "\n"
    async for rows in _keyset(database, organization_id, _ACCOUNTS):
        yield "".join(f"account {_account(*columns)}\n" for _, *columns in rows)
    yield "\n"


async def _keyset(database: Database, organization_id: UUID, query: LiteralString) -> AsyncIterator[list[TupleRow]]:
    """The rows of `query`, page by page in the order of their first column, an id."""
    after = UUID(int=0)
    while True:
        params = {"organization_id": organization_id, "after": after, "rows": limits.VERIFY_PAGE}
        async with database.transaction(organization_id) as tx:
            rows = await (await tx.execute(query, params)).fetchall()
        if rows:
            yield rows
        if len(rows) < limits.VERIFY_PAGE:
            return
        after = rows[-1][0]


def _commodity_directive(symbol: str, scale: int) -> str:
    # hledger wants a decimal mark in the sample, with or without decimals behind it.
    return f"commodity 1000.{'0' * scale} {_commodity(symbol)}\n"


def _commodity(symbol: str | None) -> str:
    # Quoted always: hledger takes digits in a bare symbol for part of the amount.
    return f'"{symbol}"'


def _account(entity_type: str | None, entity_id: UUID | None, symbol: str | None, bucket: str | None) -> str:
    """The account's name: `participant:<id>:<asset>:available`, `system:issuance:<asset>:available`."""
    parent, _, kind = str(entity_type).lower().partition("_")
    return f"{parent}:{entity_id or kind}:{symbol}:{str(bucket).lower()}"


def _transaction(lines: Sequence[_Line], *, asserts: bool) -> str:
    entry = lines[0]
    title = f"{entry.action_type} | {_plain_text(entry.description)}" if entry.description else entry.action_type
    written = [
        f"{entry.created_at:%Y-%m-%d} ({entry.id}) {title}",
        f"    ; sequence: {entry.sequence}",
        f"    ; time: {format_timestamp(entry.created_at)}",
        f"    ; program: {entry.program_id}",
        f"    ; hash: {bytes(entry.entry_hash).hex()}",
    ]
    if entry.reference_id is not None:
        written.append(f"    ; reference: {_plain_text(entry.reference_id)}")
    written += [f"    {_posting(line, asserts=asserts)}" for line in lines if line.posting_id is not None]
    return "\n".join(written) + "\n\n"


def _posting(line: _Line, *, asserts: bool) -> str:
    account = _account(line.entity_type, line.entity_id, line.symbol, line.bucket)
    posting = f"{account}  {_quantity(line.amount, line.scale)} {_commodity(line.symbol)}"
    if not asserts or line.balance is None:
        return posting
    return f"{posting} = {_quantity(line.balance, line.scale)} {_commodity(line.symbol)}"


def _quantity(amount: Decimal, scale: int | None) -> str:
    """`amount` with its asset's decimals; digits that only a tamperer can have added are kept for the reader to see."""
    if scale is None or not (amount.is_finite() and fits_scale(amount, scale)):
        return format_plain(amount)
    return format_amount(amount, scale)


def _plain_text(text: str) -> str:
    """`text` on one line and without what ends a description in a journal."""
    return "".join(" " if char == ";" or not char.isprintable() else char for char in text)
