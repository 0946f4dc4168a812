"""What a client sees of a program whose events have been processed: balances, lots, holds, entries, evaluations."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import httpx

from domain import limits
from tests.events_support import SETTLED_WITHIN_S, HttpProgram, settled


class Buckets(NamedTuple):
    """A holder's share of an asset, as the API prints it."""

    available: str
    held: str
    deferred: str


class Posting(NamedTuple):
    """What a test compares of a posting."""

    entity_type: str
    bucket: str
    amount: str


async def get(client: httpx.AsyncClient, path: str, **params: Any) -> Any:
    """The body of a GET that succeeds."""
    answer = await client.get(path, params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> Any:
    """The body of a POST that succeeds."""
    answer = await client.post(path, json=body)
    assert answer.is_success, answer.text
    return answer.json()


async def buckets(program: HttpProgram, asset_id: str, who: str = "alice") -> Buckets:
    """What `who` has of the asset; `-` where the asset was never touched."""
    found = (await program.participant(who))["balances"]
    balance = next((b for b in found if b["asset_id"] == asset_id), dict.fromkeys(Buckets._fields, "-"))
    return Buckets(balance["available"], balance["held"], balance["deferred"])


async def lots_of(program: HttpProgram, asset_id: str, who: str = "alice", **filters: Any) -> list[dict[str, Any]]:
    """The lots of `who`, the first to be spent first."""
    path = f"/participants/{(await program.participant(who))['id']}/balances/lots"
    lots: list[dict[str, Any]] = (await get(program.client, path, asset_id=asset_id, **filters))["data"]
    return lots


async def holds_of(program: HttpProgram, **filters: Any) -> list[dict[str, Any]]:
    """The holds that were made in the program."""
    found: list[dict[str, Any]] = (await get(program.client, "/holds", program_id=program.id, **filters))["data"]
    return found


async def entries_of(client: httpx.AsyncClient, **filters: Any) -> list[dict[str, Any]]:
    """The journal entries that these filters select, with their postings, oldest first."""
    found = (await get(client, "/journal-entries", limit=limits.PAGE_MAX, **filters))["data"]
    return [await get(client, f"/journal-entries/{entry['id']}") for entry in reversed(found)]


def postings(entry: dict[str, Any]) -> set[Posting]:
    """The postings of an entry, in no order."""
    return {Posting(p["entity_type"], p["bucket"], p["amount"]) for p in entry["postings"]}


def verdicts(event: dict[str, Any]) -> dict[str, str]:
    """What became of each rule that left a record, by its name: the reason where one is given, else the status."""
    return {record["rule_name"]: record["reason"] or record["status"] for record in event["rule_evaluations"]}


def amounts(event: dict[str, Any]) -> dict[str, str]:
    """The amount that each rule's balance actions moved, by the rule's name; several are joined by a plus."""
    moved = {
        record["rule_name"]: "+".join(action["amount"] for action in record["actions"] if "amount" in action)
        for record in event["rule_evaluations"]
    }
    return {name: text for name, text in moved.items() if text}


async def run_all(program: HttpProgram, events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Send these events in batches, wait for each to be COMPLETED or FAILED; the events in the same order."""
    sent: list[str] = []
    for start in range(0, len(events), limits.EVENTS_PER_BATCH):
        batch = events[start : start + limits.EVENTS_PER_BATCH]
        results = (await post(program.client, "/events/batch", events=batch))["results"]
        assert all(result["status"] == "accepted" for result in results), results
        sent += [result["event"]["id"] for result in results]
    return [await settled(program.client, event_id) for event_id in sent]


async def system_events(program: HttpProgram, **filters: Any) -> list[dict[str, Any]]:
    """The events that the program made by itself, in the order of their own times."""
    order = {"sort_by": "event_timestamp", "sort_dir": "asc"}
    params = {"program_id": program.id, "event_type": "SYSTEM", "limit": limits.PAGE_MAX, **order}
    found: list[dict[str, Any]] = (await get(program.client, "/events", **params, **filters))["data"]
    return found


async def eventually(seen: Callable[[], Awaitable[Any]]) -> Any:
    """What `seen` gives once that is true; fails after twenty seconds."""
    deadline = time.monotonic() + SETTLED_WITHIN_S
    while not (found := await seen()):
        assert time.monotonic() < deadline, f"not within {SETTLED_WITHIN_S} s"
        await asyncio.sleep(0.02)
    return found


async def made(program: HttpProgram, count: int) -> list[dict[str, Any]]:
    """The events that the program made by itself, once there are so many and all of them have been processed."""

    async def all_processed() -> list[dict[str, Any]]:
        events = await system_events(program)
        return events if len(events) == count and all(event["processed_at"] for event in events) else []

    return [await settled(program.client, event["id"]) for event in await eventually(all_processed)]
