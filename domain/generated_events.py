"""Events that automations make: ordinary rows of the queue, SYSTEM, with keys that no client can use.

The key of such an event says which automation made it, for which instant and for whom, so making it again is a no-op.
Contract: tiers-and-automations.md B1 and B6 "Exactly once".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import orjson

from db import json
from db.session import Transaction
from domain.events.ingest import NewEvent, payload_hash
from domain.idempotency import OUR_KEYS
from domain.ids import event_id


@dataclass(frozen=True, slots=True)
class Fire:
    """One firing of an automation: an event of each of these participants, in this order. None is an event of nobody.

    A fan-out has participants in its keys; the single event of scope `program` has none, whoever it is about.
    """

    automation_id: UUID
    program_id: UUID
    event_name: str
    payload: dict[str, Any] | None
    scheduled_at: datetime
    participant_ids: Sequence[UUID | None]
    is_fan_out: bool


def event_key(automation_id: UUID, scheduled_at: datetime, participant_id: UUID | None = None) -> str:
    """The idempotency key of the event of this firing; `participant_id` in a fan-out. Contract: B6."""
    # Always with microseconds: the key of an instant must not depend on how instants are printed elsewhere.
    instant = scheduled_at.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
    key = f"{OUR_KEYS}{automation_id}:{instant}"
    return key if participant_id is None else f"{key}:{participant_id}"


# Payloads come once per firing: a fan-out's are all the same, and may be 64 KiB each. Sequence numbers are taken in the
# order of the items, rows are inserted in that of their ids, as ingestion does (domain/events/ingest.py).
_INSERT = """
with payloads as materialized (
    select * from json_to_recordset(%(payloads)s::json) as r (automation_id uuid, event_data json)
), items as materialized (
    select r.*, nextval('event_seq') as seq
    from json_to_recordset(%(items)s::json) as r (
        id uuid, automation_id uuid, participant_id uuid, idempotency_key text, payload_hash text)
)
insert into event (organization_id, id, program_id, seq, participant_id, idempotency_key, payload_hash, event_type,
                   event_data, event_timestamp, received_at, created_at, updated_at, status, depth, attempts, starts,
                   request_id)
select a.organization_id, i.id, a.program_id, i.seq, i.participant_id, i.idempotency_key,
       decode(i.payload_hash, 'hex'), 'SYSTEM', p.event_data, a.trigger_at, %(now)s, %(now)s, %(now)s, 'RECEIVED',
       a.depth, 0, 0, a.request_id
from items i
join payloads p on p.automation_id = i.automation_id
join automation a on a.organization_id = %(organization_id)s and a.id = i.automation_id
order by i.id
on conflict (organization_id, id) do nothing
"""


async def insert_events(tx: Transaction, fires: Sequence[Fire]) -> int:
    """Put the events of these firings into the queue, in their order, in one statement; how many are new.

    Depth, instant and request id of an event are its automation's.
    """
    data = {fire.automation_id: _event_data(fire) for fire in fires}
    payloads = [
        {"automation_id": automation_id, "event_data": orjson.Fragment(json.dumps(event_data))}
        for automation_id, event_data in data.items()
    ]
    params = {
        "organization_id": tx.organization_id,
        "now": tx.now,
        "payloads": json.parameter(payloads),
        "items": json.parameter([item for fire in fires for item in _items(fire, data[fire.automation_id])]),
    }
    return (await tx.execute(_INSERT, params)).rowcount


def _event_data(fire: Fire) -> dict[str, Any]:
    """The members of the payload, with the event's name as `type`, which wins over one of the payload's."""
    return {**(fire.payload or {}), "type": fire.event_name}


def _items(fire: Fire, event_data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for participant_id in fire.participant_ids:
        key = event_key(fire.automation_id, fire.scheduled_at, participant_id if fire.is_fan_out else None)
        event = NewEvent(fire.program_id, key, fire.scheduled_at, event_data, participant_id)
        yield {
            "id": event_id(fire.program_id, key),
            "automation_id": fire.automation_id,
            "participant_id": participant_id,
            "idempotency_key": key,
            "payload_hash": payload_hash(event).hex(),
        }
