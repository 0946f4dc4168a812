"""Fan-outs: an automation of scope participants makes one event per participant of its program, batch by batch.

Exactly once, whatever crashes: how far a fan-out has come is committed with the events of each batch, and its row is
locked while a batch is in work. No transaction takes more than 500 participants, and none begins while 2,000 events of
the program wait: whatever else happens in the program must not queue up behind a million events of a broadcast.

Whom it reaches is decided when it starts: the participants who are ACTIVE and actively enrolled at that instant. Those
that have ceased to be when their turn comes are left out. Contract: tiers-and-automations.md B5, B7;
rules-and-events.md 5.15.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from db.session import Database, Transaction
from db.tables import Automation
from domain import automations, faults, limits
from domain.generated_events import Fire, insert_events

_FIRST_ID, _LAST_ID = UUID(int=0), UUID(int=2**128 - 1)


@dataclass(frozen=True, slots=True)
class FanOut:
    """A fan-out as a batch left it: so many participants of `total` are done. `total` is None where it is too many."""

    automation_id: UUID
    name: str
    status: Literal["executing", "completed", "failed"]
    processed: int
    total: int | None


@dataclass(frozen=True, slots=True)
class Batch:
    """What one batch did. `fan_out` is None where the program has none to work on.

    With `is_held_back` no events were made, as too many of the program's wait to be processed.
    """

    fan_out: FanOut | None
    events: int = 0
    is_held_back: bool = False


# A fan-out that has begun goes on, whatever becomes of its automation or program (B5: pausing doesn't touch it); one
# that hasn't waits while either isn't active (B7). Pausing a program's processing stops both.
_UNFINISHED = """
select a.id from automation a
join program p on p.organization_id = a.organization_id and p.id = a.program_id
where a.organization_id = %(organization_id)s and a.program_id = %(program_id)s
  and a.execution_status in ('pending', 'executing') and not p.processing_paused
  and (a.execution_status = 'executing' or (a.status = 'active' and p.status = 'ACTIVE'))
order by a.created_at, a.id limit 1
"""

_HAS_ROOM = """
select not exists (
    select from event where organization_id = %(organization_id)s and program_id = %(program_id)s
    and status in ('RECEIVED', 'PENDING') and due_at is null offset %(most)s limit 1)
"""

_LOCK = """
select id, program_id, name, event_name, payload, trigger_at, execution_status, execution_started_at,
       participants_total, participants_processed, last_participant_id
from automation where organization_id = %(organization_id)s and id = %(id)s for no key update
"""

_COUNT = """
select count(*) from (
    select from enrollment e
    join participant p on p.organization_id = e.organization_id and p.id = e.participant_id and p.status = 'ACTIVE'
    where e.organization_id = %(organization_id)s and e.program_id = %(program_id)s and e.status = 'ACTIVE'
      and e.created_at <= %(started_at)s
    limit %(most)s) members
"""

# The planner takes every program for a small one, and would read all its enrollments and all participants for each
# batch. So whole rows are compared, which only the primary key serves in order, nothing may be sorted instead, and
# participants are looked up one by one. tests/domain/test_fan_outs.py looks at the plan.
_NO_SORTING = "set local enable_sort = off; set local enable_incremental_sort = off"

_NEXT_MEMBERS = """
with page as materialized (
    select e.participant_id from enrollment e
    where (e.organization_id, e.program_id, e.participant_id) > (%(organization_id)s, %(program_id)s, %(after)s)
      and (e.organization_id, e.program_id, e.participant_id) <= (%(organization_id)s, %(program_id)s, %(last)s)
      and e.status = 'ACTIVE' and e.created_at <= %(started_at)s
    order by e.organization_id, e.program_id, e.participant_id limit %(limit)s
)
select page.participant_id, coalesce(p.is_active, false) from page
left join lateral (
    select p.status = 'ACTIVE' as is_active from participant p
    where p.organization_id = %(organization_id)s and p.id = page.participant_id limit 1) p on true
order by page.participant_id
"""

_SAVE = """
update automation set
    execution_status = %(status)s, execution_started_at = %(started_at)s, execution_completed_at = %(completed_at)s,
    execution_error = %(error)s, participants_total = %(total)s, participants_processed = %(processed)s,
    last_participant_id = %(last_participant_id)s, updated_at = %(now)s
where organization_id = %(organization_id)s and id = %(id)s
"""

_EXECUTING = """
select id from automation
where organization_id = %s and program_id = %s and execution_status = 'executing' order by created_at, id limit 1
"""


async def fan_out_batch(tx: Transaction, program_id: UUID, limit: int = limits.FAN_OUT_BATCH) -> Batch:
    """Do one batch of the program's oldest unfinished fan-out: start it, if it hasn't, and make up to `limit` events.

    It takes the row lock of the automation, before everything in domain/locks.py.
    """
    scope = {"organization_id": tx.organization_id, "program_id": program_id}
    while (found := await (await tx.execute(_UNFINISHED, scope)).fetchone()) is not None:
        row = await tx.row(_LOCK, {**scope, "id": found[0]})
        assert row is not None, "automations are never deleted"
        # Locked by a statement of its own: who held the lock before may have finished or cancelled it.
        if row["execution_status"] in ("pending", "executing"):
            return await _Execution(tx, row).do_batch(limit)
    return Batch(None)


async def cancel_executing(tx: Transaction, program_id: UUID) -> Automation | None:
    """Cancel the program's fan-out that is under way; it, or None where none is."""
    found = await (await tx.execute(_EXECUTING, (tx.organization_id, program_id))).fetchone()
    return None if found is None else await automations.cancel(tx, program_id, found[0])


async def programs_with_fan_outs(database: Database, idle_since: datetime) -> list[tuple[UUID, UUID, str]]:
    """(organization, program, name) of programs with a fan-out to work on, none of which has moved since then."""
    rows = await database.system_rows(
        "select * from programs_with_fan_outs(%s, %s)", (idle_since, limits.PROGRAMS_PER_LOOK)
    )
    return [(organization_id, program_id, name) for organization_id, program_id, name in rows]


class _Execution:
    """The run of one fan-out, whose row is locked, as this transaction leaves it."""

    def __init__(self, tx: Transaction, row: dict[str, Any]) -> None:
        self._tx = tx
        self._row = row
        self._started_at: datetime = row["execution_started_at"] or tx.now
        self._processed: int = row["participants_processed"] or 0
        self._last: UUID | None = row["last_participant_id"]
        self._scope = {
            "organization_id": tx.organization_id,
            "program_id": row["program_id"],
            "started_at": self._started_at,
        }

    async def do_batch(self, limit: int) -> Batch:
        total = await self._total()
        if total > limits.FAN_OUT_PARTICIPANTS:
            error = f"more than {limits.FAN_OUT_PARTICIPANTS} participants"
            return Batch(await self._save("failed", None, error))
        if not await self._has_room():
            return Batch(await self._save("executing", total), is_held_back=True)
        page = await self._next_page(limit)
        members = [participant_id for participant_id, is_active in page if is_active]
        events = await self._make_events(members)
        if page:
            self._last = page[-1][0]
        self._processed += len(members)
        # Who was suspended at the start and isn't now makes more of them than were counted.
        total = max(total, self._processed)
        fan_out = await self._save("executing" if len(page) == limit else "completed", total)
        await faults.reach("fan_out.written")
        return Batch(fan_out, events)

    async def _total(self) -> int:
        """How many it reaches, counted once, when it starts; one above the limit stands for any number above."""
        if self._row["execution_status"] == "executing":
            return int(self._row["participants_total"])
        params = {**self._scope, "most": limits.FAN_OUT_PARTICIPANTS + 1}
        row = await (await self._tx.execute(_COUNT, params)).fetchone()
        assert row is not None
        return int(row[0])

    async def _has_room(self) -> bool:
        params = {**self._scope, "most": limits.FAN_OUT_BACKLOG - 1}
        row = await (await self._tx.execute(_HAS_ROOM, params)).fetchone()
        assert row is not None
        return bool(row[0])

    async def _next_page(self, limit: int) -> list[tuple[UUID, bool]]:
        """The next enrolled participants, and whether they are ACTIVE."""
        await self._tx.execute(_NO_SORTING)
        params = {**self._scope, "after": self._last or _FIRST_ID, "last": _LAST_ID, "limit": limit}
        return await (await self._tx.execute(_NEXT_MEMBERS, params)).fetchall()

    async def _make_events(self, participant_ids: list[UUID]) -> int:
        if not participant_ids:
            return 0
        row = self._row
        fire = Fire(
            row["id"],
            row["program_id"],
            row["event_name"],
            row["payload"],
            row["trigger_at"],
            participant_ids,
            is_fan_out=True,
        )
        return await insert_events(self._tx, [fire])

    async def _save(
        self, status: Literal["executing", "completed", "failed"], total: int | None, error: str | None = None
    ) -> FanOut:
        row = self._row
        params = {
            **self._scope,
            "id": row["id"],
            "now": self._tx.now,
            "status": status,
            "completed_at": None if status == "executing" else self._tx.now,
            "error": error,
            "total": total,
            "processed": self._processed,
            "last_participant_id": self._last,
        }
        await self._tx.execute(_SAVE, params)
        return FanOut(row["id"], row["name"], status, self._processed, total)
