"""Accepting events: durable before the answer, once per key, in input order. Contract: rules-and-events.md 7.2 to 7.5.

One statement inserts a whole batch. Sequence numbers are taken in input order, rows are inserted sorted by id, so that
two clients that retry the same keys in different orders can't deadlock. Temporal is not needed.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import orjson

from db import json
from db.session import Transaction
from domain import faults, limits
from domain.errors import Refusal, bad_field, not_found
from domain.exact_json import depth
from domain.ids import event_id
from domain.money import format_plain


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event as a client sends it: exactly one of participant_id and external_id, at most one recipient field."""

    program_id: UUID
    idempotency_key: str
    event_timestamp: datetime
    event_data: dict[str, Any]
    participant_id: UUID | None = None
    external_id: str | None = None
    recipient_id: UUID | None = None
    recipient_external_id: str | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The event of one item as it is now; `replayed` when its key had been used with the same payload before."""

    id: UUID
    program_id: UUID
    participant_id: UUID | None
    external_id: str | None
    idempotency_key: str
    event_timestamp: datetime
    status: str
    replayed: bool = True


def check_payload(event: NewEvent) -> bytes:
    """The payload of `event` as JSON text.

    Raises Refusal `bad_request` for a payload above 64 KiB or nested deeper than 32.
    """
    # The depth comes first: the writer of JSON gives up on what nests very deep.
    if depth(event.event_data) > limits.EVENT_DATA_DEPTH:
        raise bad_field("event_data", f"must not nest deeper than {limits.EVENT_DATA_DEPTH}")
    text = json.dumps(event.event_data)
    if len(text) > limits.EVENT_DATA_BYTES:
        raise bad_field(
            "event_data", f"must be at most {limits.EVENT_DATA_BYTES} bytes of JSON", received=f"{len(text)} bytes"
        )
    return text


async def ingest_one(tx: Transaction, event: NewEvent) -> Accepted:
    """Accept one event. Raises Refusal for a bad payload, an unknown or inactive program, or a reused key."""
    result = (await ingest(tx, [event]))[0]
    if isinstance(result, Refusal):
        raise result
    return result


async def ingest(tx: Transaction, events: Sequence[NewEvent]) -> list[Accepted | Refusal]:
    """Accept up to 100 events, each for itself; the results are in input order."""
    assert len(events) <= limits.EVENTS_PER_BATCH, "the edge checks the size of a batch"
    results: list[Accepted | Refusal | None] = [None] * len(events)
    items: dict[UUID, _Item] = {}
    repeats: list[_Item] = []
    for index, event in enumerate(events):
        try:
            item = _Item(index, event, event_id(event.program_id, event.idempotency_key), check_payload(event))
        except Refusal as refusal:
            results[index] = refusal
            continue
        if item.id in items:
            repeats.append(item)
        else:
            items[item.id] = item
    stored = await _insert(tx, list(items.values()))
    await faults.reach("ingest.stored")
    for item in items.values():
        results[item.index] = _result(stored[item.id], item)
    # The second of two items with one key is a replay of what is stored by then, or conflicts with it.
    for item in repeats:
        result = _result(stored[item.id], item)
        results[item.index] = replace(result, replayed=True) if isinstance(result, Accepted) else result
    return [result for result in results if result is not None]


class _Item:
    """One event on its way into the table."""

    def __init__(self, index: int, event: NewEvent, item_id: UUID, data: bytes) -> None:
        self.index = index
        self.event = event
        self.id = item_id
        self.data = data
        self.payload_hash = payload_hash(event)

    def row(self) -> dict[str, Any]:
        event = self.event
        return {
            "id": self.id,
            "program_id": event.program_id,
            "participant_id": event.participant_id,
            "external_id": event.external_id,
            "recipient_id": event.recipient_id,
            "recipient_external_id": event.recipient_external_id,
            "idempotency_key": event.idempotency_key,
            "payload_hash": self.payload_hash.hex(),
            "event_data": orjson.Fragment(self.data),
            "event_timestamp": event.event_timestamp,
        }

    def accepted(self) -> Accepted:
        event = self.event
        return Accepted(
            self.id,
            event.program_id,
            event.participant_id,
            event.external_id,
            event.idempotency_key,
            event.event_timestamp,
            "RECEIVED",
            replayed=False,
        )


_INSERT = """
with items as materialized (
    select r.*, nextval('event_seq') as seq
    from json_to_recordset(%(items)s::json) as r (
        id uuid, program_id uuid, participant_id uuid, external_id text, recipient_id uuid,
        recipient_external_id text, idempotency_key text, payload_hash text, event_data json,
        event_timestamp timestamptz)
), inserted as (
    insert into event (organization_id, id, program_id, seq, participant_id, external_id, recipient_id,
                       recipient_external_id, idempotency_key, payload_hash, event_type, event_data, event_timestamp,
                       received_at, created_at, updated_at, status, depth, attempts, starts, api_key_id, request_id)
    select %(organization_id)s, i.id, i.program_id, i.seq, i.participant_id, i.external_id, i.recipient_id,
           i.recipient_external_id, i.idempotency_key, decode(i.payload_hash, 'hex'), 'EXTERNAL', i.event_data,
           i.event_timestamp, %(now)s, %(now)s, %(now)s, 'RECEIVED', 0, 0, 0, %(api_key_id)s, %(request_id)s
    from items i
    join program p on p.organization_id = %(organization_id)s and p.id = i.program_id and p.status = 'ACTIVE'
    order by i.id
    on conflict (organization_id, id) do nothing
    returning id
)
select i.id, p.status, n.id is not null
from items i
left join program p on p.organization_id = %(organization_id)s and p.id = i.program_id
left join inserted n on n.id = i.id
"""

_EXISTING = """
select id, program_id, participant_id, external_id, idempotency_key, event_timestamp, status, payload_hash
from event where organization_id = %s and id = any(%s)
"""


@dataclass(frozen=True, slots=True)
class _Stored:
    """The event that a key stands for, and the hash of the payload it was accepted with."""

    event: Accepted
    payload_hash: bytes


async def _insert(tx: Transaction, items: Sequence[_Item]) -> dict[UUID, _Stored | Refusal]:
    if not items:
        return {}
    by_id = {item.id: item for item in items}
    params = {
        "items": json.parameter([item.row() for item in items]),
        "organization_id": tx.organization_id,
        "now": tx.now,
        "api_key_id": tx.api_key_id,
        "request_id": tx.request_id,
    }
    results: dict[UUID, _Stored | Refusal] = {}
    left: dict[UUID, str] = {}
    for item_id, program_status, inserted in await (await tx.execute(_INSERT, params)).fetchall():
        if inserted:
            results[item_id] = _Stored(by_id[item_id].accepted(), by_id[item_id].payload_hash)
        elif program_status is None:
            results[item_id] = not_found("program")
        else:
            left[item_id] = program_status
    if left:
        # A statement of its own: a key taken by a transaction that has just committed is visible only now.
        for *values, payload_hash in await (await tx.execute(_EXISTING, (tx.organization_id, list(left)))).fetchall():
            original = Accepted(*values)
            del left[original.id]
            results[original.id] = _Stored(original, payload_hash)
    for item_id in left:
        results[item_id] = Refusal("program_inactive", "the program is not active")
    return results


def _result(stored: _Stored | Refusal, item: _Item) -> Accepted | Refusal:
    if isinstance(stored, Refusal):
        return stored
    if stored.payload_hash == item.payload_hash:
        return stored.event
    return Refusal("idempotency_conflict", "the idempotency_key was used with another payload")


def payload_hash(event: NewEvent) -> bytes:
    """SHA-256 of the semantic fields: key order, white space and trailing zeros make no difference."""
    fields = {
        "program_id": event.program_id,
        "participant_id": event.participant_id,
        "external_id": event.external_id,
        "recipient_id": event.recipient_id,
        "recipient_external_id": event.recipient_external_id,
        "event_timestamp": event.event_timestamp.astimezone(UTC),
        "event_data": event.event_data,
    }
    return hashlib.sha256(orjson.dumps(fields, default=_plain, option=orjson.OPT_SORT_KEYS)).digest()


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return orjson.Fragment(format_plain(value).encode())
    raise TypeError(f"cannot hash {type(value).__name__}")
