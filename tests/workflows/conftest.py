"""Fixtures of the workflow tests."""

import contextlib
from collections.abc import AsyncIterator

import pytest
from temporalio.client import Client
from temporalio.service import RPCError

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
