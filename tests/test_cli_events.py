"""Operators retry, pause and resume a program's events from the command line. Contract: README.md "Bulk retry"."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from temporalio.client import Client
from typer.testing import CliRunner, Result

import cli
from db.session import Database
from domain.events.ingest import NewEvent, ingest_one
from settings import get_settings
from tests.conftest import Tenant
from tests.servers import Postgres
from workflows.event_processing import workflow_id

Run = Callable[..., Any]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, postgres: Postgres, temporal: Client, temporal_address: str
) -> Iterator[Run]:
    """Run a command line against the tests' Postgres and Temporal, in a thread, as it has an event loop of its own."""
    monkeypatch.setenv("SCRIP_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("SCRIP_DATABASE_URL", postgres.app_url)
    monkeypatch.setenv("SCRIP_OWNER_DATABASE_URL", postgres.owner_url)
    monkeypatch.setenv("SCRIP_TEMPORAL_ADDRESS", temporal_address)
    monkeypatch.setenv("SCRIP_TEMPORAL_NAMESPACE", temporal.namespace)
    get_settings.cache_clear()

    async def execute(*arguments: object) -> Result:
        return await asyncio.to_thread(lambda: CliRunner().invoke(cli.app, [str(argument) for argument in arguments]))

    yield execute
    get_settings.cache_clear()


async def program_with_a_failed_event(client: httpx.AsyncClient, owner: psycopg.Connection[Any]) -> tuple[UUID, str]:
    program = (await client.post("/programs", json={"name": "P"})).json()["id"]
    event = await client.post(
        "/events",
        json={
            "program_id": program,
            "external_id": "u",
            "idempotency_key": "k",
            "event_timestamp": "2026-01-01T00:00:00Z",
            "event_data": {},
        },
    )
    owner.execute(
        "update event set status = 'FAILED', error_message = 'action CREDIT failed: x' where id = %s",
        (event.json()["id"],),
    )
    return UUID(program), event.json()["id"]


async def test_failed_events_that_match_are_queued_again(
    run: Run, client: httpx.AsyncClient, owner: psycopg.Connection[Any]
) -> None:
    program, event = await program_with_a_failed_event(client, owner)
    assert "Queued 0 events" in (await run("events", "retry", program, "--error-contains", "DEBIT")).stdout
    assert "Queued 0 events" in (await run("events", "retry", program, "--to", "2020-01-01")).stdout
    assert "Queued 1 events" in (await run("events", "retry", program, "--error-contains", "CREDIT failed")).stdout
    assert owner.execute("select status, attempts from event where id = %s", (event,)).fetchone() == ("PENDING", 0)


async def test_a_paused_program_is_marked_and_resumed(
    run: Run, client: httpx.AsyncClient, owner: psycopg.Connection[Any]
) -> None:
    program = (await client.post("/programs", json={"name": "P"})).json()["id"]
    paused = "select processing_paused from program where id = %s"
    await run("events", "pause", program)
    assert owner.execute(paused, (program,)).fetchone() == (True,)
    await run("events", "resume", program)
    assert owner.execute(paused, (program,)).fetchone() == (False,)


async def test_an_unknown_program_is_named(run: Run) -> None:
    program = uuid4()
    result = await run("events", "retry", program)
    assert result.exit_code == 1
    assert str(program) in result.stderr


async def test_reconcile_starts_what_should_be_running(
    run: Run, client: httpx.AsyncClient, organization: Tenant, database: Database, temporal: Client
) -> None:
    program = UUID((await client.post("/programs", json={"name": "P"})).json()["id"])
    async with database.transaction(organization.id) as tx:  # accepted, and its wake lost
        await ingest_one(tx, NewEvent(program, "k", tx.now, {}, external_id="u"))
    result = await run("reconcile")
    assert result.exit_code == 0, result.stderr
    status = (await temporal.get_workflow_handle(workflow_id(program)).describe()).status
    assert status is not None
    assert status.name == "RUNNING"
