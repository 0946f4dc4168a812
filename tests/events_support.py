"""Programs driven through their events: rules in, events in, the queue processed to its end, everything read back.

`EventProgram` works on the domain, without Temporal: a test decides when a batch is processed and how large it is.
`HttpProgram` works over HTTP, where the running worker processes what is sent.
"""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import httpx

from db.session import Database
from db.tables import Event, Rule
from domain.errors import Refusal
from domain.events import queries
from domain.events.batch import BatchResult, process_batch
from domain.events.ingest import Accepted, NewEvent, ingest
from domain.events.retries import RetryPolicy
from domain.rules.store import RuleDraft, create_rule
from tests.builders import make_asset, make_participant, make_program

SETTLED_WITHIN_S = 20
"""How long a test waits for the running worker; it fails afterwards."""

NO_RETRIES = RetryPolicy(max_attempts=1)
"""Every failed attempt is the last."""

A_DAY = datetime(2025, 1, 15, 10, tzinfo=UTC)
"""When events happen unless a test says otherwise."""

_numbers = itertools.count(1)


# --- actions ---------------------------------------------------------------------------------------------------------


def credit(asset_id: UUID | str, amount: str, **more: Any) -> dict[str, Any]:
    """A CREDIT action; `amount` is a literal or CEL."""
    return {"type": "CREDIT", "asset_id": str(asset_id), "amount": amount, **more}


def debit(asset_id: UUID | str, amount: str, **more: Any) -> dict[str, Any]:
    """A DEBIT action; `amount` is a literal or CEL."""
    return {"type": "DEBIT", "asset_id": str(asset_id), "amount": amount, **more}


def move(kind: str, asset_id: UUID | str, amount: str | None = None, **more: Any) -> dict[str, Any]:
    """A HOLD, RELEASE, FORFEIT or VOID_HOLD action; `amount` is a literal, CEL, or None for all."""
    action = {"type": kind, "asset_id": str(asset_id), **more}
    return action if amount is None else action | {"amount": amount}


def schedule(event_name: str, delay: str, **more: Any) -> dict[str, Any]:
    """A SCHEDULE_EVENT action."""
    return {"type": "SCHEDULE_EVENT", "event_name": event_name, "delay": delay, **more}


def counter(key: str, value: str, **more: Any) -> dict[str, Any]:
    """A COUNTER action; `value` is a literal or CEL."""
    return {"type": "COUNTER", "key": key, "value": value, **more}


def tag(name: str, **more: Any) -> dict[str, Any]:
    """A TAG action."""
    return {"type": "TAG", "tag": name, **more}


def untag(name: str, **more: Any) -> dict[str, Any]:
    """An UNTAG action."""
    return {"type": "UNTAG", "tag": name, **more}


def attribute(key: str, value: str, **more: Any) -> dict[str, Any]:
    """A SET_ATTRIBUTE action; `value` is CEL where it compiles, else a literal."""
    return {"type": "SET_ATTRIBUTE", "key": key, "value": value, **more}


def to_participant(**target: str) -> dict[str, Any]:
    """A target by `id`, or by `external_id` or `participant_id` as CEL."""
    return {"target": {"type": "PARTICIPANT", **target}}


TO_PROGRAM: dict[str, Any] = {"target": {"type": "PROGRAM"}}


# --- the domain ------------------------------------------------------------------------------------------------------


@dataclass
class EventProgram:
    """A program of an organization, driven through the domain."""

    database: Database
    organization_id: UUID
    id: UUID

    @classmethod
    async def open(cls, database: Database, organization_id: UUID, **fields: Any) -> "EventProgram":
        """A new ACTIVE program; `fields` overrides its columns."""
        async with database.transaction(organization_id) as tx:
            return cls(database, organization_id, await make_program(tx, **fields))

    async def asset(self, **fields: Any) -> UUID:
        """A new asset of this program: SIMPLE, UNLIMITED, scale 2 unless `fields` say otherwise."""
        async with self.database.transaction(self.organization_id) as tx:
            return await make_asset(tx, self.id, **fields)

    async def participant(self, external_id: str, **fields: Any) -> UUID:
        """A new participant, not enrolled anywhere."""
        async with self.database.transaction(self.organization_id) as tx:
            return await make_participant(tx, external_id=external_id, **fields)

    async def rule(self, condition: str, *actions: dict[str, Any], **fields: Any) -> Rule:
        """A new rule, behind the ones before it unless `order` says otherwise."""
        draft = {"program_id": self.id, "name": f"rule {next(_numbers)}", **fields}
        async with self.database.transaction(self.organization_id) as tx:
            return await create_rule(tx, RuleDraft(condition=condition, actions=list(actions), **draft))

    async def send(self, who: str | UUID = "alice", /, *, key: str | None = None, **data: Any) -> UUID:
        """Accept one event of `who` (an external id or a participant's id) with this payload; its id."""
        (accepted,) = await self.ingest([self.event(who, key=key, **data)])
        assert isinstance(accepted, Accepted), accepted
        return accepted.id

    def event(
        self,
        who: str | UUID = "alice",
        /,
        *,
        key: str | None = None,
        at: datetime = A_DAY,
        recipient: str | UUID | None = None,
        **data: Any,
    ) -> NewEvent:
        """An event that nobody has accepted yet; `data` is its payload."""
        return NewEvent(
            program_id=self.id,
            idempotency_key=key or f"key-{next(_numbers)}",
            event_timestamp=at,
            event_data=data,
            external_id=who if isinstance(who, str) else None,
            participant_id=None if isinstance(who, str) else who,
            recipient_external_id=recipient if isinstance(recipient, str) else None,
            recipient_id=recipient if isinstance(recipient, UUID) else None,
        )

    async def ingest(self, events: Sequence[NewEvent]) -> list[Accepted | Refusal]:
        """Accept a batch of events."""
        async with self.database.transaction(self.organization_id) as tx:
            return await ingest(tx, events)

    async def batch(self, limit: int = 200, retries: RetryPolicy = NO_RETRIES) -> BatchResult:
        """Process one batch."""
        return await process_batch(self.database, self.organization_id, self.id, limit, retries)

    async def settle(self, *limits: int, retries: RetryPolicy = NO_RETRIES) -> int:
        """Process batches until nothing is due, of these sizes in turn; how many attempts that were."""
        sizes = itertools.cycle(limits or (200,))
        attempts = 0
        while True:
            events = (await self.batch(next(sizes), retries)).events
            if events == 0:
                return attempts
            attempts += events

    async def outcome(self, event_id: UUID) -> Event:
        """The event as it is now."""
        async with self.database.transaction(self.organization_id) as tx:
            return await queries.get(tx, event_id)

    async def status(self, event_id: UUID) -> tuple[str, str | None]:
        """The event's status and error message."""
        event = await self.outcome(event_id)
        return event.status, event.error_message

    async def evaluations(self, event_id: UUID, *, include_skipped: bool = False) -> list[dict[str, Any]]:
        """What the rules did with the event, as it is shown."""
        async with self.database.transaction(self.organization_id) as tx:
            event = await queries.get(tx, event_id)
            return await queries.evaluations(tx, event, include_skipped=include_skipped)

    async def run(self, who: str | UUID = "alice", /, **data: Any) -> Event:
        """Send one event and process the queue; the event afterwards."""
        event_id = await self.send(who, **data)
        await self.settle()
        return await self.outcome(event_id)

    # --- reading back ------------------------------------------------------------------------------------------------

    async def id_of(self, external_id: str) -> UUID | None:
        """The participant's id, None if there is none."""
        rows = await self.sql("select id from participant where external_id = %s", external_id)
        return rows[0][0] if rows else None

    async def balance(self, who: str | UUID, asset_id: UUID) -> Decimal:
        """What a holder has available: of an external id, or of the program itself by its id."""
        entity_id = await self.id_of(who) if isinstance(who, str) else who
        (row,) = await self.sql(
            "select coalesce(sum(p.amount), 0) from posting p join account a"
            " on a.organization_id = p.organization_id and a.id = p.account_id"
            " where a.entity_id = %s and a.asset_id = %s and a.bucket = 'AVAILABLE'",
            entity_id,
            asset_id,
        )
        return Decimal(row[0])

    async def balances(self, asset_id: UUID, *who: str | UUID) -> list[Decimal]:
        """What several holders have available."""
        return [await self.balance(holder, asset_id) for holder in who]

    async def counters(self, who: str | UUID = "alice") -> dict[str, Decimal]:
        """The stored counters of an external id, or of the holder with this id."""
        return dict(await self._state("select key, value from counter where entity_id = %s", who))

    async def attributes(self, who: str | UUID = "alice") -> dict[str, str]:
        """The attributes of an external id, or of the holder with this id."""
        return dict(await self._state("select key, value from attribute where entity_id = %s", who))

    async def tags(self, who: str | UUID = "alice") -> set[str]:
        """The tags of an external id, or of the holder with this id."""
        return {row[0] for row in await self._state("select tag from tag where entity_id = %s", who)}

    async def history(self, who: str | UUID = "alice") -> list[tuple[str, str, str, str | None, str | None]]:
        """(state_type, key, operation, old_value, new_value) of every change, oldest first."""
        return await self._state(
            "select state_type, key, operation, old_value, new_value from state_history where entity_id = %s"
            " order by changed_at, id",
            who,
        )

    async def entries(self) -> list[tuple[str, UUID | None, UUID | None]]:
        """(action_type, event_id, rule_id) of every journal entry of the organization, in order."""
        return await self.sql("select action_type, event_id, rule_id from journal_entry order by sequence")

    async def enrollment(self, external_id: str) -> str | None:
        """The status of the participant's enrollment in this program, None without one."""
        rows = await self.sql(
            "select e.status from enrollment e join participant p"
            " on p.organization_id = e.organization_id and p.id = e.participant_id"
            " where p.external_id = %s and e.program_id = %s",
            external_id,
            self.id,
        )
        return rows[0][0] if rows else None

    async def sql(self, query: Any, *params: Any) -> list[Any]:
        """Rows of a query; it sees this organization only."""
        async with self.database.transaction(self.organization_id) as tx:
            cursor = await tx.execute(query, params)
            return await cursor.fetchall() if cursor.description is not None else []

    async def _state(self, query: str, who: str | UUID) -> list[Any]:
        return await self.sql(query, await self.id_of(who) if isinstance(who, str) else who)


# --- HTTP ------------------------------------------------------------------------------------------------------------


@dataclass
class HttpProgram:
    """A program driven over HTTP; a worker must be running for events to be processed."""

    client: httpx.AsyncClient
    id: str
    sent: list[str] = field(default_factory=list)

    @classmethod
    async def open(cls, client: httpx.AsyncClient, **fields: Any) -> "HttpProgram":
        """A new program; `fields` are members of the request."""
        return cls(client, (await _created(client, "/programs", {"name": "Customer Loyalty", **fields}))["id"])

    async def asset(self, **fields: Any) -> str:
        """A new asset: SIMPLE, UNLIMITED, scale 2 unless `fields` say otherwise; its id."""
        body = {
            "program_id": self.id,
            "name": "Points",
            "symbol": f"PTS{next(_numbers)}",
            "inventory_mode": "SIMPLE",
            "issuance_policy": "UNLIMITED",
            "scale": 2,
            **fields,
        }
        return str((await _created(self.client, "/assets", body))["id"])

    async def rule(self, condition: str, *actions: dict[str, Any], **fields: Any) -> dict[str, Any]:
        """A new rule."""
        body = {"program_id": self.id, "name": "rule", "condition": condition, "actions": actions, **fields}
        return await _created(self.client, "/rules", body)

    def event(self, who: str = "alice", /, *, key: str | None = None, **data: Any) -> dict[str, Any]:
        """The body of an event; `data` is its payload, `event_timestamp` aside."""
        happened = data.pop("event_timestamp", "2025-01-15T10:00:00Z")
        return {
            "program_id": self.id,
            "external_id": who,
            "idempotency_key": key or f"key-{next(_numbers)}",
            "event_timestamp": happened,
            "event_data": data,
        }

    async def send(self, who: str = "alice", /, *, key: str | None = None, **data: Any) -> str:
        """Send one event; its id."""
        answer = await self.client.post("/events", json=self.event(who, key=key, **data))
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    async def run(self, who: str = "alice", /, **data: Any) -> dict[str, Any]:
        """Send one event and wait until it is COMPLETED or FAILED; the event with its evaluations."""
        return await settled(self.client, await self.send(who, **data))

    async def participant(self, external_id: str = "alice") -> dict[str, Any]:
        """The participant's detail."""
        found = (await self.client.get("/participants", params={"external_id": external_id})).json()["data"]
        assert len(found) == 1, found
        detail: dict[str, Any] = (await self.client.get(f"/participants/{found[0]['id']}")).json()
        return detail

    async def available(self, external_id: str, asset_id: str) -> str:
        """What the participant has available of the asset, as the API prints it; `-` if it never touched it."""
        balances = (await self.participant(external_id))["balances"]
        return next((str(b["available"]) for b in balances if b["asset_id"] == asset_id), "-")


async def settled(client: httpx.AsyncClient, event_id: str, **params: Any) -> dict[str, Any]:
    """The event once it is COMPLETED or FAILED; fails after twenty seconds."""
    deadline = time.monotonic() + SETTLED_WITHIN_S
    while True:
        answer = await client.get(f"/events/{event_id}", params=params)
        assert answer.status_code == 200, answer.text
        event: dict[str, Any] = answer.json()
        if event["status"] in ("COMPLETED", "FAILED"):
            return event
        assert time.monotonic() < deadline, f"still {event['status']} after {SETTLED_WITHIN_S} s: {event}"
        await asyncio.sleep(0.02)


async def _created(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = await client.post(path, json=body)
    assert answer.status_code == 201, answer.text
    created: dict[str, Any] = answer.json()
    return created
