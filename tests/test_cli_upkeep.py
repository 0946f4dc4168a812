"""Upkeep from the command line. Contract: holders.md 7.3; docs/upkeep.md."""

import asyncio
import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import cli
from db.session import Database
from settings import get_settings
from tests.builders import open_shop
from tests.conftest import SettableClock, Tenant
from tests.due_support import timed_hold
from tests.holdings_support import Desk
from tests.servers import Postgres

Run = Callable[..., Any]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, postgres: Postgres, clock: SettableClock) -> Iterator[Run]:
    """Run a command line against the tests' Postgres, without Temporal and by the tests' clock."""
    monkeypatch.setenv("SCRIP_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("SCRIP_DATABASE_URL", postgres.app_url)
    monkeypatch.setenv("SCRIP_TEMPORAL_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(cli, "system_clock", clock)
    get_settings.cache_clear()

    async def execute(*arguments: object) -> Result:
        return await asyncio.to_thread(lambda: CliRunner().invoke(cli.app, [str(argument) for argument in arguments]))

    yield execute
    get_settings.cache_clear()


@pytest.fixture
async def desk(database: Database, organization: Tenant, clock: SettableClock) -> Desk:
    """A desk with a lot to mature, one to expire and one in a hold, all in an hour."""
    clock.set("2025-01-15T12:00:00Z")
    desk = Desk.of(database, organization.id, await open_shop(database, organization.id, inventory_mode="LOT"))
    due = clock() + timedelta(hours=1)
    await desk.credit("5")
    await timed_hold(desk, "5", due, carrier="WORKFLOW", on_expiry="FORFEIT")
    await desk.grant("10", matures_at=due)
    await desk.grant("20", expires_at=due)
    return desk


async def test_what_is_due_is_booked_by_the_clock_and_only_once(run: Run, desk: Desk, clock: SettableClock) -> None:
    clock.advance(minutes=59)
    assert json.loads((await run("upkeep", "--org", desk.organization_id, "--json")).stdout) == []
    clock.advance(minutes=1)

    result = await run("upkeep", "--org", desk.organization_id, "--json")

    assert json.loads(result.stdout) == [
        {
            "organization_id": str(desk.organization_id),
            "matured": 1,
            "expired": 1,
            "holds_ended": 1,
            "redemptions_expired": 0,
            "failed": 0,
        }
    ]
    assert await desk.buckets() == ("10", "0", "0")
    before = await desk.entries()
    assert json.loads((await run("upkeep", "--org", desk.organization_id, "--json")).stdout) == []
    assert await desk.entries() == before


async def test_all_organizations_are_kept_up(run: Run, desk: Desk, clock: SettableClock) -> None:
    clock.advance(hours=1)

    result = await run("upkeep", "--json")

    assert result.exit_code == 0, result.stderr
    assert str(desk.organization_id) in {row["organization_id"] for row in json.loads(result.stdout)}
    assert await desk.buckets() == ("10", "0", "0")
