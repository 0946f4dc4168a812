"""Programs with automations, for tests: what rules would make, and the events that came of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from db.session import Database
from db.tables import Automation
from domain import automations
from domain.automations import NewAutomation
from domain.fan_outs import Batch, fan_out_batch
from domain.ids import new_id
from tests.builders import make_program

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def new_automation(**fields: Any) -> NewAutomation:
    """What a BROADCAST of `digest` makes; `fields` say otherwise."""
    made: dict[str, Any] = {
        "id": new_id(),
        "kind": "BROADCAST",
        "event_id": new_id(),
        "rule_id": new_id(),
        "action_index": 0,
        "event_name": "digest",
        "payload": {"bonus": 50},
        "trigger_at": NOON,
        "participant_id": None,
        "depth": 1,
        "request_id": "req_1",
        **fields,
    }
    return NewAutomation(**made)


@dataclass
class AutomatedProgram:
    """A program of an organization, its automations and the events that they make."""

    database: Database
    organization_id: UUID
    id: UUID

    @classmethod
    async def open(cls, database: Database, organization_id: UUID, **fields: Any) -> "AutomatedProgram":
        """A new ACTIVE program; `fields` overrides its columns."""
        async with database.transaction(organization_id) as tx:
            return cls(database, organization_id, await make_program(tx, **fields))

    async def members(self, count: int, status: str = "ACTIVE", enrollment: str = "ACTIVE") -> list[UUID]:
        """So many new participants of this status, enrolled now; their ids in order."""
        async with self.database.transaction(self.organization_id) as tx:
            await tx.execute(
                """
                with made as (
                    insert into participant (organization_id, id, external_id, status, created_at, updated_at)
                    select %(organization_id)s, uuidv7(), gen_random_uuid()::text, %(status)s, %(now)s, %(now)s
                    from generate_series(1, %(count)s) returning organization_id, id)
                insert into enrollment (organization_id, program_id, participant_id, status, created_at, updated_at)
                select organization_id, %(program_id)s, id, %(enrollment)s, %(now)s, %(now)s from made
                """,
                {
                    "organization_id": self.organization_id,
                    "program_id": self.id,
                    "count": count,
                    "status": status,
                    "enrollment": enrollment,
                    "now": tx.now,
                },
            )
        rows = await self.sql(
            "select participant_id from enrollment where program_id = %s order by participant_id desc limit %s",
            self.id,
            count,
        )
        return [row[0] for row in reversed(rows)]

    async def add(self, **fields: Any) -> NewAutomation:
        """An automation of `new_automation`, stored."""
        made = new_automation(**fields)
        await self.write([made])
        return made

    async def schedule(self, trigger_at: datetime, **fields: Any) -> NewAutomation:
        """A stored SCHEDULE_EVENT for this instant."""
        return await self.add(kind="SCHEDULE_EVENT", trigger_at=trigger_at, **fields)

    async def write(self, made: Sequence[NewAutomation]) -> None:
        """Store these."""
        async with self.database.transaction(self.organization_id) as tx:
            await automations.write_automations(tx, self.id, made)

    async def release(self, limit: int = 200) -> int:
        """Make events of what is due."""
        async with self.database.transaction(self.organization_id) as tx:
            return await automations.release_due(tx, self.id, limit)

    async def next_trigger(self) -> datetime | None:
        """When the next scheduled event falls due."""
        async with self.database.transaction(self.organization_id) as tx:
            return await automations.next_trigger(tx, self.id)

    async def cancel(self, automation_id: UUID) -> Automation:
        """Cancel one."""
        async with self.database.transaction(self.organization_id) as tx:
            return await automations.cancel(tx, self.id, automation_id)

    async def stored(self, automation_id: UUID) -> Automation:
        """The automation as it is now."""
        async with self.database.transaction(self.organization_id) as tx:
            return await automations.get(tx, self.id, automation_id)

    async def batch(self, limit: int = 500) -> Batch:
        """One batch of the program's fan-outs."""
        return await self.database.repeat(self.organization_id, lambda tx: fan_out_batch(tx, self.id, limit))

    async def fan_out(self, limit: int = 500) -> int:
        """Batches until there is nothing to do; how many events they made. Events are processed meanwhile."""
        events = 0
        while (batch := await self.batch(limit)).fan_out is not None:
            events += batch.events
            if batch.is_held_back:
                await self.process_events()
        return events

    async def process_events(self) -> None:
        """Let all events that wait be done."""
        await self.sql("update event set status = 'COMPLETED' where program_id = %s", self.id)

    async def change(self, table: str, **fields: Any) -> None:
        """Set columns of this program's row, or of all participants or enrollments of the organization."""
        assert table in ("program", "participant", "enrollment")
        columns = ", ".join(f"{name} = %s" for name in fields)
        where = "id = %s" if table == "program" else "%s is not null"
        await self.sql(f"update {table} set {columns} where {where}", *fields.values(), self.id)

    async def events(self) -> list[dict[str, Any]]:
        """All events of the program, in the order of their acceptance."""
        async with self.database.transaction(self.organization_id) as tx:
            return await tx.rows(
                "select * from event where organization_id = %s and program_id = %s order by seq",
                (self.organization_id, self.id),
            )

    async def reached(self) -> list[UUID]:
        """The participants of the program's events, in the order of acceptance."""
        return [event["participant_id"] for event in await self.events()]

    async def sql(self, query: Any, *params: Any) -> list[Any]:
        """Rows of a query; it sees this organization only."""
        async with self.database.transaction(self.organization_id) as tx:
            cursor = await tx.execute(query, params)
            return await cursor.fetchall() if cursor.description is not None else []
