"""Automations: what makes events by itself. Contract: tiers-and-automations.md B; those that rules make, B9.

A SCHEDULE_EVENT action makes a one_time automation, which becomes an event when it is due; until then there is no
event. A BROADCAST action makes an immediate one, which is fanned out to the participants (domain/fan_outs.py). Both are
written in the transaction of the event that made them, and exist only if it commits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from sqlmodel import select

from db import json
from db.session import Transaction
from db.tables import Automation
from domain import faults, limits
from domain.errors import Refusal, not_found
from domain.generated_events import Fire, insert_events

Kind = Literal["SCHEDULE_EVENT", "BROADCAST"]

CANCELED = "canceled"
"""The `execution_error` of a fan-out that was cancelled. Contract: B5."""


@dataclass(frozen=True, slots=True)
class NewAutomation:
    """An automation that a rule's action makes: `action_index` is the action's place in its rule.

    `event_name`, `payload`, `trigger_at`, `depth` and `request_id` are those of the events that it makes; `depth` is
    one above that of `event_id`, the event that made it. `participant_id` is whom the event of a SCHEDULE_EVENT is
    about.
    """

    id: UUID
    kind: Kind
    event_id: UUID
    rule_id: UUID
    action_index: int
    event_name: str
    payload: dict[str, Any] | None
    trigger_at: datetime
    participant_id: UUID | None
    depth: int
    request_id: str | None

    @property
    def name(self) -> str:
        """The name it goes by: its event's name, cut so that the whole has at most 255 characters. Contract: B9."""
        origin = f":{self.event_id}:{self.rule_id}:{self.action_index}"
        return self.event_name[: limits.AUTOMATION_NAME_CHARS - len(origin)] + origin


_INSERT = """
insert into automation (organization_id, id, program_id, name, event_name, scope, trigger_type, trigger_at, payload,
                        participant_id, source, status, depth, event_id, rule_id, action_index, request_id,
                        execution_status, created_at, updated_at)
select %(organization_id)s, r.id, %(program_id)s, r.name, r.event_name, r.scope, r.trigger_type, r.trigger_at,
       r.payload, r.participant_id, 'rule_action', 'active', r.depth, r.event_id, r.rule_id, r.action_index,
       r.request_id, r.execution_status, %(now)s, %(now)s
from json_to_recordset(%(rows)s::json) as r (
    id uuid, name text, event_name text, scope text, trigger_type text, trigger_at timestamptz, payload json,
    participant_id uuid, depth smallint, event_id uuid, rule_id uuid, action_index smallint, request_id text,
    execution_status text)
on conflict (organization_id, event_id, rule_id, action_index) do nothing
"""


async def write_automations(tx: Transaction, program_id: UUID, automations: Sequence[NewAutomation]) -> None:
    """Store what the rules of a program made, in one statement; one event, rule and action index makes at most one."""
    if not automations:
        return
    params = {
        "organization_id": tx.organization_id,
        "program_id": program_id,
        "now": tx.now,
        "rows": json.parameter([_row(automation) for automation in automations]),
    }
    await tx.execute(_INSERT, params)


def _row(automation: NewAutomation) -> dict[str, Any]:
    is_broadcast = automation.kind == "BROADCAST"
    return {
        "id": automation.id,
        "name": automation.name,
        "event_name": automation.event_name,
        "scope": "participants" if is_broadcast else "program",
        "trigger_type": "immediate" if is_broadcast else "one_time",
        "trigger_at": automation.trigger_at,
        "payload": automation.payload,
        "participant_id": None if is_broadcast else automation.participant_id,
        "depth": automation.depth,
        "event_id": automation.event_id,
        "rule_id": automation.rule_id,
        "action_index": automation.action_index,
        "request_id": automation.request_id,
        "execution_status": "pending" if is_broadcast else None,
    }


# --- scheduled events ------------------------------------------------------------------------------------------------

# One that waits while its program is not ACTIVE fires when it is again (B7), so it is looked for in ACTIVE ones only.
_SCHEDULED = """
from automation a
join program p on p.organization_id = a.organization_id and p.id = a.program_id and p.status = 'ACTIVE'
where a.organization_id = %(organization_id)s and a.program_id = %(program_id)s
  and a.status = 'active' and a.trigger_type = 'one_time'
"""

_DUE = f"""
select a.id, a.event_name, a.payload, a.trigger_at, a.participant_id
{_SCHEDULED} and a.trigger_at <= %(now)s
order by a.trigger_at, a.id limit %(limit)s
for no key update of a
"""

_NEXT = f"select a.trigger_at {_SCHEDULED} order by a.trigger_at limit 1"

_COMPLETE = """
update automation set status = 'completed', processed_at = %(now)s, updated_at = %(now)s
where organization_id = %(organization_id)s and id = any(%(ids)s)
"""


async def release_due(tx: Transaction, program_id: UUID, limit: int) -> int:
    """Make events of up to `limit` scheduled ones that are due, the longest due first; how many.

    The caller holds the program's lane, so that they enter the queue in the order of their instants. It takes row locks
    of automations only, before everything in domain/locks.py: cancelling one is the only other thing that locks them.
    Nothing is released while the program isn't ACTIVE. Contract: rules-and-events.md 5.14.
    """
    params = {"organization_id": tx.organization_id, "program_id": program_id, "now": tx.now, "limit": limit}
    due = await tx.rows(_DUE, params)
    if not due:
        return 0
    await insert_events(tx, [_fire(program_id, row) for row in due])
    await tx.execute(_COMPLETE, {**params, "ids": [row["id"] for row in due]})
    await faults.reach("automations.released")
    return len(due)


async def next_trigger(tx: Transaction, program_id: UUID) -> datetime | None:
    """When the next scheduled event of this program falls due, which may have passed; None where none is to be awaited.

    None also while the program isn't ACTIVE: when it is again, the look for lost wakes finds what is due by then.
    """
    params = {"organization_id": tx.organization_id, "program_id": program_id}
    row = await (await tx.execute(_NEXT, params)).fetchone()
    return None if row is None else row[0]


def _fire(program_id: UUID, row: dict[str, Any]) -> Fire:
    return Fire(
        row["id"],
        program_id,
        row["event_name"],
        row["payload"],
        row["trigger_at"],
        [row["participant_id"]],
        is_fan_out=False,
    )


# --- cancelling ------------------------------------------------------------------------------------------------------

_CANCEL = """
update automation set
    status = 'archived', deleted_at = %(now)s, updated_at = %(now)s,
    execution_status = case when execution_status in ('pending', 'executing') then 'failed' else execution_status end,
    execution_error = case when execution_status in ('pending', 'executing') then %(error)s else execution_error end,
    execution_completed_at =
        case when execution_status in ('pending', 'executing') then %(now)s else execution_completed_at end
where organization_id = %(organization_id)s and id = %(id)s and program_id = %(program_id)s
  and status in ('active', 'paused')
"""


async def get(tx: Transaction, program_id: UUID, automation_id: UUID) -> Automation:
    """The automation, archived or not. Raises Refusal `not_found`, also for one of another program."""
    automation = await tx.first(
        select(Automation).where(
            Automation.organization_id == tx.organization_id,
            Automation.program_id == program_id,
            Automation.id == automation_id,
        )
    )
    if automation is None:
        raise not_found("automation")
    return automation


async def cancel(tx: Transaction, program_id: UUID, automation_id: UUID) -> Automation:
    """Cancel what is scheduled, pending or under way; the automation is archived. Contract: B4, B5.

    A fan-out under way ends failed, with the error `canceled`, after the batch that may be in work; what it made stays.
    Raises Refusal: `not_found`, `bad_request` where it is neither active nor paused.
    """
    params = {
        "organization_id": tx.organization_id,
        "program_id": program_id,
        "id": automation_id,
        "now": tx.now,
        "error": CANCELED,
    }
    cancelled = (await tx.execute(_CANCEL, params)).rowcount
    automation = await get(tx, program_id, automation_id)
    if not cancelled:
        raise Refusal("bad_request", f"the automation is {automation.status}")
    return automation
