"""Transfers: AVAILABLE value moves from one holder to others, all of it or nothing. Contract: redemptions.md 5.

A transfer exists only when it is done: it is one journal entry and a record that never changes. However many recipients
it has, it takes the same few statements.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, LiteralString
from uuid import UUID

from psycopg.rows import DictRow

from db import json
from db.session import Transaction
from domain import gates, idempotency, limits, metadata
from domain.errors import Problem, Refusal, not_found
from domain.gates import Terms
from domain.ids import new_id
from domain.ledger import movements
from domain.ledger.holdings import load_lots
from domain.ledger.journal import load_accounts, write
from domain.ledger.movements import Cause, HolderType, Position
from domain.locks import lock_groups, lock_participants
from domain.money import EXACT, ZERO, parse_amount
from domain.pagination import Page, PageRequest, cut, decode_cursor, sort_name

NameKind = Literal["external_id", "participant_id", "group_id"]

_SORT = sort_name(["created_at", "id"], descending=True)

_RESOLVE = """
select 'PARTICIPANT' as type, id, external_id from participant
where organization_id = %(organization_id)s and external_id = any(%(external_id)s::text[])
union all
select 'PARTICIPANT', id, external_id from participant
where organization_id = %(organization_id)s and id = any(%(participant_id)s::uuid[])
union all
select 'GROUP', id, null from holder_group
where organization_id = %(organization_id)s and id = any(%(group_id)s::uuid[])
"""

_INSERT = """
with made as (
    insert into transfer (organization_id, id, program_id, asset_id, source_type, source_id, source_external_id,
                          total_amount, recipient_count, description, metadata, journal_entry_id, api_key_id,
                          created_at)
    values (%(organization_id)s, %(id)s, %(program_id)s, %(asset_id)s, %(source_type)s, %(source_id)s,
            %(source_external_id)s, %(total_amount)s, %(recipient_count)s, %(description)s, %(metadata)s::json,
            %(journal_entry_id)s, %(api_key_id)s, %(created_at)s)
)
insert into transfer_recipient (organization_id, transfer_id, ordinal, entity_type, entity_id, external_id, amount,
                                created_at)
select %(organization_id)s, %(id)s, ordinal, entity_type, entity_id, external_id, amount, %(created_at)s
from json_to_recordset(%(shares)s::json) as r (
    ordinal smallint, entity_type text, entity_id uuid, external_id text, amount numeric)
"""

_COLUMNS: LiteralString = """
t.id, t.program_id, t.asset_id, t.source_type, t.source_id, t.source_external_id, t.total_amount, t.recipient_count,
t.description, t.metadata, t.journal_entry_id, t.created_at, a.scale
"""

_GET = f"""
select {_COLUMNS} from transfer t
join asset a on a.organization_id = t.organization_id and a.id = t.asset_id
where t.organization_id = %s and t.id = %s
"""

_SHARES = """
select entity_type, entity_id, external_id, amount from transfer_recipient
where organization_id = %s and transfer_id = %s order by ordinal
"""


@dataclass(frozen=True, slots=True)
class HolderName:
    """How a caller names a participant (by either id) or a group; `id` is a text if it is the caller's own."""

    kind: NameKind
    id: str | UUID

    def __str__(self) -> str:
        """The name as messages show it."""
        if self.kind == "external_id":
            return f'participant with external_id "{self.id}"'
        return f"{self.kind.removesuffix('_id')} {self.id}"


@dataclass(frozen=True, slots=True)
class WantedShare:
    """What one recipient shall get; `amount` is the decimal text as it was sent."""

    recipient: HolderName
    amount: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferRequest:
    """A transfer to make, to 1 to 100 recipients; one that comes twice gets both shares."""

    program_id: UUID
    asset_id: UUID
    source: HolderName
    shares: Sequence[WantedShare]
    description: str
    metadata: dict[str, Any] | None = None
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class Party:
    """Who takes part in a transfer, with the external id that a participant had then; groups have none."""

    type: HolderType
    id: UUID
    external_id: str | None


@dataclass(frozen=True, slots=True)
class Share:
    """What one recipient got."""

    recipient: Party
    amount: Decimal


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferRecord:
    """A transfer that was made, with the decimals of its asset. The rows of lists come without `shares`."""

    id: UUID
    program_id: UUID
    asset_id: UUID
    source: Party
    total_amount: Decimal
    recipient_count: int
    description: str
    metadata: dict[str, Any] | None
    journal_entry_id: UUID
    created_at: datetime
    scale: int
    shares: tuple[Share, ...] = ()


@dataclass(frozen=True, slots=True)
class Created:
    """A transfer, and whether it had been made by an earlier use of the same key."""

    transfer: TransferRecord
    replayed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferFilter:
    """Which transfers to list; None means any. Everything combines with AND.

    `participant_id` and `group_id` find transfers whose source or one of whose recipients it is. Instants are
    inclusive.
    """

    program_id: UUID | None = None
    asset_id: UUID | None = None
    participant_id: UUID | None = None
    group_id: UUID | None = None
    created_from: datetime | None = None
    created_to: datetime | None = None


async def create(tx: Transaction, request: TransferRequest) -> Created:
    """Move value from the source to every recipient, or to none. Contract: redemptions.md 5.1.

    Ends by sealing its entry with the commit, so the caller commits at once. Raises Refusal, in this order:
    `bad_request`, `not_found` for a holder, `self_transfer`, `not_found` for program and asset, `invalid_scale`,
    `idempotency_conflict`, `program_inactive`, `asset_not_linked`, `asset_archived`,
    `participant_inactive` or `group_archived`, `max_transaction_amount_exceeded`, `insufficient_balance`.
    """
    metadata.require_small(request.metadata)
    _amounts(request, limits.SCALE_MAX)
    source, recipients = await _resolve(tx, request)
    _require_other_recipients(source, recipients)
    terms = await gates.read_terms(tx, request.program_id, request.asset_id)
    amounts = _amounts(request, terms.scale)
    transfer = _transfer(tx, request, terms, source, tuple(map(Share, recipients, amounts)))
    claim = await idempotency.claim(
        tx,
        request.program_id,
        "transfer",
        request.idempotency_key,
        payload=_payload(request, transfer),
        result={"transfer_id": str(transfer.id), "journal_entry_id": str(transfer.journal_entry_id)},
    )
    if claim.replayed:
        return Created(await get(tx, UUID(claim.result["transfer_id"])), replayed=True)

    gates.require_program(terms)
    gates.require_usable_asset(terms)
    await _lock_usable(tx, request, [source, *recipients])
    _require_within_caps(terms, transfer)
    await _move(tx, terms, transfer)
    return Created(transfer, replayed=False)


async def get(tx: Transaction, transfer_id: UUID) -> TransferRecord:
    """One transfer with its shares, in the order in which they were asked for. Raises Refusal `not_found`."""
    row = await tx.row(_GET, (tx.organization_id, transfer_id))
    if row is None:
        raise not_found("transfer")
    found = await tx.execute(_SHARES, (tx.organization_id, transfer_id))
    return _record(row, tuple(Share(Party(*party), amount) for *party, amount in await found.fetchall()))


async def find(tx: Transaction, wanted: TransferFilter, page: PageRequest) -> Page[TransferRecord]:
    """A page of transfers without their shares, newest first. Raises Refusal naming `cursor` for a bad one."""
    query, params = _page_query(tx, wanted, page)
    found = [_record(row) for row in await tx.rows(query, params)]
    return cut(found, page.limit, _SORT, lambda transfer: (transfer.created_at, transfer.id))


# --- making one ------------------------------------------------------------------------------------------------------


def _amounts(request: TransferRequest, scale: int) -> list[Decimal]:
    """What each recipient shall get. Raises Refusal `bad_request` or `invalid_scale`."""
    return [parse_amount(share.amount, scale, f"recipients[{i}].amount") for i, share in enumerate(request.shares)]


async def _resolve(tx: Transaction, request: TransferRequest) -> tuple[Party, list[Party]]:
    """The source and the recipients, in the order of the request. Raises Refusal `not_found` for the first unknown."""
    names = [request.source, *(share.recipient for share in request.shares)]
    ids: dict[NameKind, list[str | UUID]] = {"external_id": [], "participant_id": [], "group_id": []}
    for name in names:
        ids[name.kind].append(name.id)
    known: dict[HolderName, Party] = {}
    for row in await tx.rows(_RESOLVE, {"organization_id": tx.organization_id, **ids}):
        party = Party(**row)
        if party.external_id is None:
            known[HolderName("group_id", party.id)] = party
        else:
            known[HolderName("participant_id", party.id)] = party
            known[HolderName("external_id", party.external_id)] = party
    for name in names:
        if name not in known:
            raise not_found(str(name))
    source, *recipients = (known[name] for name in names)
    return source, recipients


def _require_other_recipients(source: Party, recipients: Sequence[Party]) -> None:
    for index, recipient in enumerate(recipients):
        if recipient.id == source.id:
            message = "the source cannot be one of the recipients"
            problem = Problem(f"recipients[{index}]", message, expected="another holder")
            raise Refusal("self_transfer", message, [problem])


def _transfer(
    tx: Transaction, request: TransferRequest, terms: Terms, source: Party, shares: tuple[Share, ...]
) -> TransferRecord:
    """The transfer as it is going to be recorded."""
    total_amount = ZERO
    for share in shares:
        total_amount = EXACT.add(total_amount, share.amount)
    return TransferRecord(
        id=new_id(),
        program_id=request.program_id,
        asset_id=request.asset_id,
        source=source,
        total_amount=total_amount,
        recipient_count=len(shares),
        description=request.description,
        metadata=request.metadata,
        journal_entry_id=new_id(),
        created_at=tx.now,
        scale=terms.scale,
        shares=shares,
    )


def _payload(request: TransferRequest, transfer: TransferRecord) -> dict[str, object]:
    """What a key stands for. Contract: redemptions.md 1.2."""
    payload: dict[str, object] = {
        "asset_id": transfer.asset_id,
        "source_id": transfer.source.id,
        "recipients": [[share.recipient.id, share.amount] for share in transfer.shares],
        "description": transfer.description,
    }
    if request.metadata is not None:
        payload["metadata"] = request.metadata
    return payload


async def _lock_usable(tx: Transaction, request: TransferRequest, parties: Sequence[Party]) -> None:
    """Lock the source and the recipients. Raises Refusal naming the first that isn't ACTIVE."""
    group_rows = await lock_groups(tx, {party.id for party in parties if party.type == "GROUP"})
    participant_rows = await lock_participants(tx, {party.id for party in parties if party.type == "PARTICIPANT"})
    rows = group_rows | participant_rows
    names = [request.source, *(share.recipient for share in request.shares)]
    for index, (party, name) in enumerate(zip(parties, names, strict=True)):
        status = rows[party.id]["status"]
        if status == "ACTIVE":
            continue
        field = f"recipients[{index - 1}].{name.kind}" if index else f"source_{name.kind}"
        problem = Problem(field, f"is {status}", expected="an ACTIVE holder", received=str(name.id))
        code = "group_archived" if party.type == "GROUP" else "participant_inactive"
        raise Refusal(code, f"{name} is {status}", [problem])


def _require_within_caps(terms: Terms, transfer: TransferRecord) -> None:
    for index, share in enumerate(transfer.shares):
        gates.require_within_cap(terms, share.amount, f"recipients[{index}].amount")
    gates.require_within_cap(terms, transfer.total_amount, "total_amount")


async def _move(tx: Transaction, terms: Terms, transfer: TransferRecord) -> None:
    """Post the transfer between its locked parties, and record it."""
    parties = {transfer.source.id, *(share.recipient.id for share in transfer.shares)}
    books = await load_accounts(tx, parties, [transfer.asset_id])
    source = _position(transfer.source, terms)
    if terms.has_lots:
        await load_lots(tx, books.lots, source.select("AVAILABLE", tx.now), transfer.total_amount)
    cause = Cause(transfer.journal_entry_id, transfer.program_id, tx.now, transfer.description)
    shares = [(_position(share.recipient, terms), share.amount) for share in transfer.shares]
    movements.transfer(books, source, cause, shares)
    await _insert(tx, transfer)
    await write(tx, books)


def _position(party: Party, terms: Terms) -> Position:
    return Position(party.type, party.id, terms.asset_id, terms.has_lots)


async def _insert(tx: Transaction, transfer: TransferRecord) -> None:
    shares = [
        {
            "ordinal": ordinal,
            "entity_type": share.recipient.type,
            "entity_id": share.recipient.id,
            "external_id": share.recipient.external_id,
            "amount": share.amount,
        }
        for ordinal, share in enumerate(transfer.shares)
    ]
    params = {
        "organization_id": tx.organization_id,
        "id": transfer.id,
        "program_id": transfer.program_id,
        "asset_id": transfer.asset_id,
        "source_type": transfer.source.type,
        "source_id": transfer.source.id,
        "source_external_id": transfer.source.external_id,
        "total_amount": transfer.total_amount,
        "recipient_count": transfer.recipient_count,
        "description": transfer.description,
        "metadata": None if transfer.metadata is None else json.parameter(transfer.metadata),
        "journal_entry_id": transfer.journal_entry_id,
        "api_key_id": tx.api_key_id,
        "created_at": transfer.created_at,
        "shares": json.parameter(shares),
    }
    await tx.execute(_INSERT, params)


# --- reading ---------------------------------------------------------------------------------------------------------


def _page_query(tx: Transaction, wanted: TransferFilter, page: PageRequest) -> tuple[LiteralString, dict[str, Any]]:
    """The query for one row more than the page has, and its parameters."""
    after = decode_cursor(page.cursor, _SORT, [datetime, UUID])
    after_at, after_id = after or (None, None)
    query: LiteralString = f"""
        select {_COLUMNS} from ({_walk(wanted, has_after=after is not None)}) t
        join asset a on a.organization_id = %(organization_id)s and a.id = t.asset_id
        order by t.created_at desc, t.id desc limit %(rows)s
    """
    return query, {
        "organization_id": tx.organization_id,
        "program_id": wanted.program_id,
        "asset_id": wanted.asset_id,
        "participant_id": wanted.participant_id,
        "group_id": wanted.group_id,
        "created_from": wanted.created_from,
        "created_to": wanted.created_to,
        "after_at": after_at,
        "after_id": after_id,
        "rows": page.limit + 1,
    }


def _record(row: DictRow, shares: tuple[Share, ...] = ()) -> TransferRecord:
    columns = dict(row)
    source = Party(columns.pop("source_type"), columns.pop("source_id"), columns.pop("source_external_id"))
    return TransferRecord(source=source, shares=shares, **columns)


def _walk(wanted: TransferFilter, *, has_after: bool) -> LiteralString:
    """The newest `rows` transfers that match. Those of a holder are found along its own indexes: as a source there is
    one, as a recipient another, and nobody is both in one transfer."""
    holders = _holders(wanted)
    asked: LiteralString = _transfer_terms(wanted)
    along_transfers: LiteralString = _bounds(wanted, "t.created_at", "t.id", has_after=has_after)
    if not holders:
        return f"""
            select t.* from transfer t where t.organization_id = %(organization_id)s {asked} {along_transfers}
            order by t.created_at desc, t.id desc limit %(rows)s
        """
    (kind, id), *others = holders
    for other_kind, other_id in others:
        asked = f"{asked} and {_involves(other_kind, other_id)}"
    along_shares: LiteralString = _bounds(wanted, "s.created_at", "s.transfer_id", has_after=has_after)
    # `limit 1` keeps the planner from joining the whole of the table; a recipient may come twice in one transfer.
    return f"""
        (select t.* from transfer t
         where t.organization_id = %(organization_id)s and t.source_id = {id} and t.source_type = {kind}
            {asked} {along_transfers}
         order by t.created_at desc, t.id desc limit %(rows)s)
        union all
        (select distinct on (s.created_at, s.transfer_id) t.*
         from transfer_recipient s
         cross join lateral (
            select * from transfer where organization_id = %(organization_id)s and id = s.transfer_id limit 1
         ) t
         where s.organization_id = %(organization_id)s and s.entity_id = {id} and s.entity_type = {kind}
            {asked} {along_shares}
         order by s.created_at desc, s.transfer_id desc limit %(rows)s)
    """


def _holders(wanted: TransferFilter) -> list[tuple[LiteralString, LiteralString]]:
    """The holders that are asked for: type and parameter of each."""
    holders: list[tuple[LiteralString, LiteralString]] = []
    if wanted.participant_id is not None:
        holders.append(("'PARTICIPANT'", "%(participant_id)s"))
    if wanted.group_id is not None:
        holders.append(("'GROUP'", "%(group_id)s"))
    return holders


def _involves(kind: LiteralString, id: LiteralString) -> LiteralString:
    return f"""
        ((t.source_id = {id} and t.source_type = {kind}) or exists (
            select from transfer_recipient o
            where o.organization_id = %(organization_id)s and o.transfer_id = t.id
                and o.entity_id = {id} and o.entity_type = {kind}))
    """


def _transfer_terms(wanted: TransferFilter) -> LiteralString:
    terms: LiteralString = ""
    if wanted.program_id is not None:
        terms += " and t.program_id = %(program_id)s"
    if wanted.asset_id is not None:
        terms += " and t.asset_id = %(asset_id)s"
    return terms


def _bounds(wanted: TransferFilter, at: LiteralString, id: LiteralString, *, has_after: bool) -> LiteralString:
    """What bounds the walk along an index that ends with these columns."""
    bounds: LiteralString = ""
    if wanted.created_from is not None:
        bounds += f" and {at} >= %(created_from)s"
    if wanted.created_to is not None:
        bounds += f" and {at} <= %(created_to)s"
    if has_after:
        bounds += f" and ({at}, {id}) < (%(after_at)s, %(after_id)s)"
    return bounds
