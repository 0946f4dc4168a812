"""Real servers for every test, tenants to keep tests apart.

One Postgres (and one Temporal, for those who ask) serves the whole run, whatever the number of xdist workers; each
worker has a database of its own, made from a migrated template. Tests never clean up: each has a fresh organization.
"""

import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest
from fastapi import FastAPI
from google.protobuf.duration_pb2 import Duration
from pydantic import SecretStr
from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest
from temporalio.api.workflowservice.v1 import RegisterNamespaceRequest
from temporalio.client import Client

from api.app import create_app
from cli import migrate_schema
from db.session import Database
from domain.clock import system_clock
from domain.ids import new_id
from domain.logs import configure_logging
from embedded.temporal import SEARCH_ATTRIBUTES
from settings import Settings
from tests.servers import Postgres, shared_postgres, shared_temporal
from worker import build_worker
from workflows.converter import DATA_CONVERTER
from workflows.gateway import Gateway


class SettableClock:
    """The real time until a test sets it; then it stands still until moved."""

    def __init__(self) -> None:
        self._fixed: datetime | None = None

    def __call__(self) -> datetime:
        return self._fixed or system_clock()

    def set(self, instant: datetime | str) -> None:
        """Stand still at `instant`."""
        self._fixed = datetime.fromisoformat(instant) if isinstance(instant, str) else instant
        assert self._fixed.tzinfo is not None
        self._fixed = self._fixed.astimezone(UTC)

    def advance(self, **duration: float) -> None:
        """Move on, by the arguments of a timedelta."""
        self._fixed = self() + timedelta(**duration)

    def reset(self) -> None:
        """Show the real time again."""
        self._fixed = None


@dataclass(frozen=True)
class Tenant:
    """An organization made for one test, and a key of it."""

    id: UUID
    api_key: str
    api_key_id: UUID


@pytest.fixture(scope="session", autouse=True)
def _logging() -> None:
    """Log as the processes do. Without it structlog draws tracebacks with source and locals, for minutes if deep."""
    configure_logging("WARNING", "json")


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A directory that all workers of this run share."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture(scope="session")
def postgres(run_directory: Path, worker_id: str) -> Iterator[Postgres]:
    """This worker's database: `superuser_url`, `owner_url`, `app_url`."""
    with shared_postgres(run_directory, migrate_schema) as server:
        yield server.create_database(worker_id)


@pytest.fixture(scope="session")
def temporal_address(run_directory: Path) -> Iterator[str]:
    """The run's Temporal server."""
    with shared_temporal(run_directory) as address:
        yield address


@pytest.fixture(scope="session")
async def temporal(temporal_address: str, worker_id: str) -> Client:
    """A client of this worker's own Temporal namespace, which has Scrip's search attributes."""
    return await new_namespace(temporal_address, worker_id)


async def new_namespace(address: str, name: str) -> Client:
    """A client of a fresh namespace with Scrip's search attributes, for tests that want a Temporal of their own."""
    client = await Client.connect(address, data_converter=DATA_CONVERTER)
    namespace = f"{name}-{new_id().hex}"
    await client.workflow_service.register_namespace(
        RegisterNamespaceRequest(namespace=namespace, workflow_execution_retention_period=Duration(seconds=86_400))
    )
    await client.operator_service.add_search_attributes(
        AddSearchAttributesRequest(
            namespace=namespace,
            search_attributes=dict.fromkeys(SEARCH_ATTRIBUTES, IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD),
        )
    )
    return await Client.connect(address, namespace=namespace, data_converter=DATA_CONVERTER)


@pytest.fixture(scope="session")
def database_url(postgres: Postgres) -> str:
    """This worker's database, as the application's role."""
    return postgres.app_url


@pytest.fixture(scope="session")
def owner(postgres: Postgres) -> Iterator[psycopg.Connection[Any]]:
    """A connection as the owner of the tables: it sees every organization; autocommit."""
    with psycopg.connect(postgres.owner_url, autocommit=True) as connection:
        yield connection


@pytest.fixture(scope="session")
def settings(postgres: Postgres) -> Settings:
    return Settings(
        database_url=SecretStr(postgres.app_url),
        owner_database_url=SecretStr(postgres.owner_url),
        temporal_address="127.0.0.1:1",
        log_level="WARNING",
        retry_schedule_s=(0,),
    )


@pytest.fixture(scope="session")
def shared_clock() -> SettableClock:
    return SettableClock()


@pytest.fixture
def clock(shared_clock: SettableClock) -> Iterator[SettableClock]:
    """The clock of the application under test."""
    yield shared_clock
    shared_clock.reset()


@pytest.fixture(scope="session")
async def database(database_url: str, shared_clock: SettableClock) -> AsyncIterator[Database]:
    """The application's pool, for domain tests: `async with database.transaction(organization.id) as tx`."""
    database = Database(database_url, size=8, timeout_s=5, clock=shared_clock)
    await database.open()
    yield database
    await database.close()


@pytest.fixture(scope="session")
async def gateway(temporal: Client) -> Gateway:
    """The way to this worker's Temporal namespace."""

    async def connected() -> Client:
        return temporal

    return Gateway(connected, timeout_s=5)


@pytest.fixture(scope="session")
async def app(
    settings: Settings, database: Database, shared_clock: SettableClock, gateway: Gateway
) -> AsyncIterator[FastAPI]:
    app = create_app(settings, database, shared_clock, gateway)
    async with app.router.lifespan_context(app):
        yield app


@pytest.fixture(scope="session")
async def running_worker(settings: Settings, temporal: Client, shared_clock: SettableClock) -> AsyncIterator[None]:
    """A worker of this test process: events that the API accepts are processed."""
    with ThreadPoolExecutor(settings.worker_drains) as executor:
        async with build_worker(temporal, settings, shared_clock, executor):
            yield


@pytest.fixture
def new_organization(owner: psycopg.Connection[Any]) -> Callable[..., Tenant]:
    """Make an organization with `rate` requests per second and `burst`, and one key."""

    def make(rate: int = 10_000, burst: int = 20_000) -> Tenant:
        tenant = Tenant(new_id(), f"sk_{secrets.token_urlsafe(32)}", new_id())
        with owner.transaction():
            owner.execute(
                "insert into organization (id, name, rate_per_second, rate_burst, created_at)"
                " values (%s, 'test', %s, %s, now())",
                (tenant.id, rate, burst),
            )
            owner.execute(
                "insert into chain_head (organization_id, sequence, hash, created_at)"
                " values (%s, 0, %s, '1970-01-01T00:00:00Z')",
                (tenant.id, bytes(32)),
            )
            owner.execute(
                "insert into api_key (organization_id, id, name, key_hash, hint, created_at)"
                " values (%s, %s, 'test', %s, %s, now())",
                (tenant.id, tenant.api_key_id, hashlib.sha256(tenant.api_key.encode()).digest(), tenant.api_key[-4:]),
            )
        return tenant

    return make


@pytest.fixture
def organization(new_organization: Callable[..., Tenant]) -> Tenant:
    """A fresh organization: what a test sees is what it made."""
    return new_organization()


@pytest.fixture
def client_for(app: FastAPI) -> Callable[[Tenant], httpx.AsyncClient]:
    """A client that sends the key of a tenant."""

    def make(tenant: Tenant) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False),
            base_url="http://scrip.test/v1",
            headers={"Authorization": f"Bearer {tenant.api_key}"},
        )

    return make


@pytest.fixture
async def client(
    organization: Tenant, client_for: Callable[[Tenant], httpx.AsyncClient]
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the test's organization. Paths are relative to /v1."""
    async with client_for(organization) as client:
        yield client


@pytest.fixture
async def other_client(
    new_organization: Callable[..., Tenant], client_for: Callable[[Tenant], httpx.AsyncClient]
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of another organization."""
    async with client_for(new_organization()) as client:
        yield client
