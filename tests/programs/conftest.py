"""Whole programs, as their authors would write them, over HTTP with a real worker."""

from collections.abc import AsyncIterator

import httpx
import pytest

from db.session import Database
from tests.conftest import Tenant
from tests.events_support import HttpProgram
from tests.ledger_invariants import assert_ledger_invariants


@pytest.fixture
async def program(client: httpx.AsyncClient, running_worker: None) -> HttpProgram:
    """A new program whose events are processed."""
    return await HttpProgram.open(client)


@pytest.fixture(autouse=True)
async def sound_ledger(database: Database, organization: Tenant) -> AsyncIterator[None]:
    """What every test here leaves behind is a sound ledger."""
    yield
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)
