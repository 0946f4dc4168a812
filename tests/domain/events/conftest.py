"""A fresh program for every test, and a look at the ledger after it."""

from collections.abc import AsyncIterator

import pytest

from db.session import Database
from tests.conftest import Tenant
from tests.events_support import EventProgram
from tests.ledger_invariants import assert_ledger_invariants


@pytest.fixture
async def program(database: Database, organization: Tenant) -> EventProgram:
    """An ACTIVE program that creates unknown participants."""
    return await EventProgram.open(database, organization.id)


@pytest.fixture(autouse=True)
async def sound_ledger(database: Database, organization: Tenant) -> AsyncIterator[None]:
    """Whatever a test did, the ledger's invariants hold afterwards."""
    yield
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)
