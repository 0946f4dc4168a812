"""Fixtures of the workflow tests."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx
import pytest
from temporalio.client import Client
from temporalio.service import RPCError

from api.app import create_app
from db.session import Database
from settings import Settings
from tests.conftest import SettableClock, Tenant
from workflows.gateway import Gateway
from workflows.upkeep import DRIFT_ID, RECONCILE_ID, UPKEEP_ID


@pytest.fixture(autouse=True)
async def no_upkeep_left_behind(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """Upkeep goes through all organizations: its schedules must not outlive the test that makes them."""
    yield
    if "temporal" in request.fixturenames:
        temporal: Client = request.getfixturevalue("temporal")
        for schedule_id in (UPKEEP_ID, RECONCILE_ID, DRIFT_ID):
            with contextlib.suppress(RPCError):
                await temporal.get_schedule_handle(schedule_id).delete()


@pytest.fixture
async def client_of(
    settings: Settings, database: Database, shared_clock: SettableClock, organization: Tenant
) -> AsyncIterator[Callable[[Gateway], Awaitable[httpx.AsyncClient]]]:
    """A client of an API process that waits half a second for Temporal, behind a gateway of its own."""
    brief = settings.model_copy(update={"temporal_timeout_s": 0.5})
    opened: list[httpx.AsyncClient] = []

    async def make(gateway: Gateway) -> httpx.AsyncClient:
        app = create_app(brief, database, shared_clock, gateway)
        client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False),
            base_url="http://scrip.test/v1",
            headers={"Authorization": f"Bearer {organization.api_key}"},
        )
        opened.append(client)
        return client

    yield make
    for client in opened:
        await client.aclose()
