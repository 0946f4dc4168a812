"""Reading events, and queueing failed ones again. Contract: rules-and-events.md 4.1, 7.1, 7.6, 8."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from psycopg.rows import DictRow
from sqlalchemy import Uuid, func, type_coerce, update
from sqlalchemy.dialects.postgresql import ARRAY
from sqlmodel import col, select

from db.session import Transaction
from db.tables import Event
from domain.errors import Refusal, bad_field, not_found
from domain.ids import stopped_evaluation_id
from domain.pagination import Page, PageRequest, paginate
from domain.rules.cel import ExpressionError, compile_expression

SORT_KEYS = {"created_at": Event.created_at, "event_timestamp": Event.event_timestamp, "status": Event.status}

ALWAYS_LISTED = frozenset({"SUCCESS", "FAILED", "SKIPPED"})


@dataclass(frozen=True, slots=True)
class EventFilter:
    """What a list of events is narrowed to; `created_*` is ingestion time, `event_*` the time of occurrence."""

    program_id: UUID | None = None
    status: str | None = None
    event_type: str | None = None
    participant_id: UUID | None = None
    external_id: str | None = None
    rule_id: UUID | None = None
    created_from: datetime | None = None
    created_to: datetime | None = None
    event_from: datetime | None = None
    event_to: datetime | None = None


async def find(
    tx: Transaction, wanted: EventFilter, page: PageRequest, sort_by: str = "created_at", descending: bool = True
) -> Page[Event]:
    """Events of the organization, without their evaluations being looked at."""
    conditions: list[Any] = [Event.organization_id == tx.organization_id]
    equal = {
        Event.program_id: wanted.program_id,
        Event.status: wanted.status,
        Event.event_type: wanted.event_type,
        Event.participant_id: wanted.participant_id,
        Event.external_id: wanted.external_id,
    }
    conditions += [column == value for column, value in equal.items() if value is not None]
    if wanted.rule_id is not None:
        # No index can serve this under row-level security; rules that match are found soon among the newest events.
        conditions.append(type_coerce(col(Event.matched_rule_ids), ARRAY(Uuid)).contains([wanted.rule_id]))
    for column, low, high in (
        (col(Event.created_at), wanted.created_from, wanted.created_to),
        (col(Event.event_timestamp), wanted.event_from, wanted.event_to),
    ):
        if low is not None:
            conditions.append(column >= low)
        if high is not None:
            conditions.append(column <= high)
    statement = select(Event).where(*conditions)
    keys = (col(SORT_KEYS[sort_by]), col(Event.id))
    return await paginate(tx, statement, keys=keys, page=page, descending=descending)


async def get(tx: Transaction, event_id: UUID) -> Event:
    """One event. Raises Refusal `not_found`."""
    statement = select(Event).where(Event.organization_id == tx.organization_id, Event.id == event_id)
    event = await tx.first(statement)
    if event is None:
        raise not_found("event")
    return event


async def evaluations(tx: Transaction, event: Event, *, include_skipped: bool) -> list[dict[str, Any]]:
    """The evaluation records of an event as they are shown. Contract: rules-and-events.md 4.1.

    Rules that a `stop_after_match` kept from running are not stored; they are worked out here from the versions that
    were in force when the event was processed.
    """
    records = list(event.evaluations or [])
    if event.status == "COMPLETED":
        records += await _stopped(tx, event, records)
    return [record for record in records if include_skipped or record["status"] in ALWAYS_LISTED]


async def retry(tx: Transaction, event_id: UUID) -> Event:
    """Queue a FAILED event again with a fresh count of attempts; the event as it was before.

    Raises Refusal: `not_found`, or `conflict` when the event is not FAILED.
    """
    row = await tx.row(
        "select status from event where organization_id = %s and id = %s for no key update",
        (tx.organization_id, event_id),
    )
    if row is None:
        raise not_found("event")
    if row["status"] != "FAILED":
        raise Refusal("conflict", f"the event is {row['status']}; only a FAILED event can be retried")
    before = await get(tx, event_id)
    await tx.execute(
        _REQUEUE + " and id = %(id)s", {"organization_id": tx.organization_id, "now": tx.now, "id": event_id}
    )
    return before


async def retry_all(
    tx: Transaction,
    program_id: UUID,
    created_from: datetime | None,
    created_to: datetime | None,
    error_contains: str | None,
) -> int:
    """Queue every FAILED event of a program again that matches; how many. Contract: README.md "Bulk retry"."""
    if created_from is not None and created_to is not None and created_from > created_to:
        raise bad_field("to", "must not be before from", expected="timestamp")
    statement = (
        update(Event)
        .where(
            col(Event.organization_id) == tx.organization_id,
            col(Event.program_id) == program_id,
            col(Event.status) == "FAILED",
        )
        .values(status="PENDING", attempts=0, starts=0, due_at=None, processed_at=None, updated_at=tx.now)
    )
    if created_from is not None:
        statement = statement.where(col(Event.created_at) >= created_from)
    if created_to is not None:
        statement = statement.where(col(Event.created_at) <= created_to)
    if error_contains is not None:
        statement = statement.where(func.strpos(col(Event.error_message), error_contains) > 0)
    return await tx.run(statement)


_REQUEUE = """
update event set status = 'PENDING', attempts = 0, starts = 0, due_at = null, processed_at = null, updated_at = %(now)s
where organization_id = %(organization_id)s and status = 'FAILED'
"""

_VERSION = "select rule_id, snapshot from rule_history where organization_id = %s and id = %s"

# One look into the index per rule: reading the whole history would take longer with every change of a rule.
_VERSIONS = """
select version.id, version.rule_id, version.snapshot
from rule r
cross join lateral (
    select id, rule_id, snapshot from rule_history h
    where h.organization_id = r.organization_id and h.rule_id = r.id and h.changed_at <= %(processed_at)s
    order by h.changed_at desc, h.id desc limit 1
) version
where r.organization_id = %(organization_id)s and r.program_id = %(program_id)s
"""


async def _stopped(tx: Transaction, event: Event, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of the rules that did not run because a rule before them stopped the walk."""
    stopping = await _stopping_version(tx, records)
    if stopping is None or event.processed_at is None:
        return []
    scope = {
        "organization_id": tx.organization_id,
        "program_id": event.program_id,
        "processed_at": event.processed_at,
    }
    versions = await tx.rows(_VERSIONS, scope)
    behind = [row for row in versions if _was_behind(row["snapshot"], stopping["snapshot"], event)]
    behind.sort(key=lambda row: int(row["snapshot"]["order"]))
    return [
        {
            "id": stopped_evaluation_id(event.id, row["rule_id"]),
            "rule_id": row["rule_id"],
            "rule_name": row["snapshot"]["name"],
            "rule_history_id": row["id"],
            "status": "SKIPPED",
            "reason": "STOPPED_BY_PRIOR_RULE",
            "stopped_by_rule_id": stopping["rule_id"],
            "created_at": records[-1]["created_at"],
        }
        for row in behind
    ]


async def _stopping_version(tx: Transaction, records: list[dict[str, Any]]) -> DictRow | None:
    """The version of the last rule that matched, if it stops the walk."""
    matched = [record for record in records if _has_matched(record)]
    if not matched:
        return None
    last = await tx.row(_VERSION, (tx.organization_id, matched[-1]["rule_history_id"]))
    return last if last is not None and last["snapshot"]["stop_after_match"] else None


def _has_matched(record: dict[str, Any]) -> bool:
    """Whether the rule's condition was true; one whose budget is spent counts as matched. Contract: 3."""
    return record["status"] == "SUCCESS" or record.get("reason") == "BUDGET_EXCEEDED"


def _was_behind(rule: dict[str, Any], stopping: dict[str, Any], event: Event) -> bool:
    if rule["status"] != "ACTIVE" or int(rule["order"]) <= int(stopping["order"]):
        return False
    event_type = event.event_data.get("type")
    if not isinstance(event_type, str):
        return True
    try:
        types = compile_expression(rule["condition"]).event_types
    except ExpressionError:
        return False
    return types is None or event_type in types
