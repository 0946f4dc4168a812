"""Writing what a batch of events has done, in bulk: one statement per kind of row, whatever the number of events.

Events get their outcome, state its last values and every change of it a row of history, budgets what is used up of
them, and at the end the ledger its entries, sealed together with the commit. Contract: rules-and-events.md 4.5, 7.6.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from db import json
from db.session import Transaction
from domain.automations import write_automations
from domain.clock import format_timestamp
from domain.events.engine import Outcome
from domain.events.retries import RetryPolicy
from domain.events.state import Change, CounterState, history_operation, history_value
from domain.events.world import World
from domain.ids import new_id
from domain.ledger import journal
from domain.rules.budgets import write_budgets

_UPDATE_EVENTS = """
update event e set
    status = r.status, participant_id = coalesce(r.participant_id, e.participant_id),
    recipient_id = coalesce(r.recipient_id, e.recipient_id), error_message = r.error_message, attempts = r.attempts,
    due_at = r.due_at, processed_at = r.processed_at, updated_at = %(now)s, starts = 0,
    evaluations = r.evaluations, matched_rule_ids = r.matched
from json_to_recordset(%(rows)s::json) as r (
    id uuid, status text, participant_id uuid, recipient_id uuid, error_message text, attempts smallint,
    due_at timestamptz, processed_at timestamptz, evaluations json, matched uuid[])
where e.organization_id = %(organization_id)s and e.id = r.id
"""

_INSERT_HISTORY = """
insert into state_history (organization_id, entity_id, changed_at, id, state_type, key, operation, old_value, new_value,
                           event_id, rule_id)
select %(organization_id)s, r.entity_id, %(now)s, r.id, r.state_type, r.key, r.operation, r.old_value, r.new_value,
       r.event_id, r.rule_id
from json_to_recordset(%(rows)s::json) as r (
    entity_id uuid, id uuid, state_type text, key text, operation text, old_value text, new_value text, event_id uuid,
    rule_id uuid)
"""

_WRITE_STATE = {
    ("tag", True): """
        insert into tag (organization_id, entity_id, tag, created_at)
        select %(organization_id)s, r.entity_id, r.key, %(now)s
        from json_to_recordset(%(rows)s::json) as r (entity_id uuid, key text)
        on conflict do nothing""",
    ("tag", False): """
        delete from tag t using json_to_recordset(%(rows)s::json) as r (entity_id uuid, key text)
        where t.organization_id = %(organization_id)s and t.entity_id = r.entity_id and t.tag = r.key
          and %(now)s is not null""",
    ("attribute", True): """
        insert into attribute (organization_id, entity_id, key, value, updated_at)
        select %(organization_id)s, r.entity_id, r.key, r.value, %(now)s
        from json_to_recordset(%(rows)s::json) as r (entity_id uuid, key text, value text)
        on conflict (organization_id, entity_id, key)
            do update set value = excluded.value, updated_at = excluded.updated_at""",
    ("counter", True): """
        insert into counter (organization_id, entity_id, key, value, reset_after, last_reset_at)
        select %(organization_id)s, r.entity_id, r.key, r.value, r.reset_after, r.last_reset_at
        from json_to_recordset(%(rows)s::json) as r (
            entity_id uuid, key text, value numeric, reset_after text, last_reset_at timestamptz)
        where %(now)s is not null
        on conflict (organization_id, entity_id, key) do update set
            value = excluded.value, reset_after = excluded.reset_after, last_reset_at = excluded.last_reset_at""",
}


async def write_world(tx: Transaction, world: World, outcomes: Sequence[Outcome], retries: RetryPolicy) -> None:
    """Write everything that was done to `world`, and the outcomes. To be called last before the commit."""
    changes = world.state.changes
    if changes:
        await _write_rows(tx, _INSERT_HISTORY, [_history_row(change) for change in changes])
        for kind, rows in _final_state(changes).items():
            await _write_rows(tx, _WRITE_STATE[kind], rows)
    if world.budgets.changed:
        await write_budgets(tx, world.budgets.changed)
    if world.automations:
        await write_automations(tx, world.program.id, world.automations)
    await write_outcomes(tx, outcomes, retries)
    await journal.write(tx, world.books)


async def write_outcomes(tx: Transaction, outcomes: Sequence[Outcome], retries: RetryPolicy) -> None:
    """Write what became of the events."""
    await _write_rows(tx, _UPDATE_EVENTS, [_event_row(outcome, tx.now, retries) for outcome in outcomes])


async def _write_rows(tx: Transaction, statement: Any, rows: Sequence[dict[str, Any]]) -> None:
    await tx.execute(statement, {"organization_id": tx.organization_id, "now": tx.now, "rows": json.parameter(rows)})


def _final_state(changes: Sequence[Change]) -> dict[tuple[str, bool], list[dict[str, Any]]]:
    """What to store, by kind and presence: of each tag, counter and attribute only the last state counts."""
    last = {(change.holder.id, change.state_type, change.key): change for change in changes}
    rows: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for change in last.values():
        row: dict[str, Any] = {"entity_id": change.holder.id, "key": change.key}
        if isinstance(change.new, CounterState):
            row |= change.new._asdict()
        elif change.state_type == "attribute":
            row["value"] = change.new
        rows.setdefault((change.state_type, change.new is not None), []).append(row)
    return rows


def _history_row(change: Change) -> dict[str, Any]:
    return {
        "entity_id": change.holder.id,
        "id": new_id(),
        "state_type": change.state_type,
        "key": change.key,
        "operation": history_operation(change),
        "old_value": history_value(change.state_type, change.old),
        "new_value": history_value(change.state_type, change.new),
        "event_id": change.event_id,
        "rule_id": change.rule_id,
    }


def _event_row(outcome: Outcome, now: datetime, retries: RetryPolicy) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": outcome.event.id,
        "participant_id": outcome.participant_id,
        "recipient_id": outcome.recipient_id,
        "error_message": outcome.error,
        "attempts": outcome.event.attempts + 1,
        "evaluations": outcome.evaluations,
        "matched": outcome.matched,
    }
    if is_final_failure(outcome, retries) or outcome.verdict == "COMPLETED":
        status = "COMPLETED" if outcome.verdict == "COMPLETED" else "FAILED"
        return row | {"status": status, "due_at": None, "processed_at": format_timestamp(now)}
    wait = retries.wait_after(outcome.event.attempts + 1)
    assert wait is not None
    return row | {"status": "PENDING", "due_at": now + wait, "processed_at": None}


def is_final_failure(outcome: Outcome, retries: RetryPolicy) -> bool:
    """Whether the event ends FAILED by this attempt."""
    last = retries.wait_after(outcome.event.attempts + 1) is None
    return outcome.verdict == "FAILED" or (outcome.verdict == "RETRY" and last)
