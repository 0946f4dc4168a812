"""Probes for supervisors and load balancers; no key needed."""

import asyncio
import logging
import time
from contextlib import suppress
from typing import Literal

import psycopg
from fastapi import APIRouter, FastAPI
from pydantic import BaseModel, Field
from starlette.requests import Request

from api.responses import JsonResponse, respond
from api.route import ApiServices
from db.session import Database, DatabaseUnavailable
from domain.ledger.verifications import count_invalid

logger = logging.getLogger("scrip.health")

router = APIRouter(tags=["Health"])

_PROBE_S = 1.0
_DATABASE_PROBE_S = 2.0
_LEDGERS_INTERVAL_S = 60.0


class Health(BaseModel):
    """The process is alive."""

    status: Literal["ok"] = Field(description="Always `ok`.")


class Ledgers(BaseModel):
    """What the newest verifications found."""

    status: Literal["ok", "invalid", "unknown"] = Field(description="`unknown` until it has been looked up.")
    invalid_organizations: int | None = Field(description="How many organizations' ledgers were found invalid.")


class Readiness(BaseModel):
    """What this process can reach, and what it knows."""

    status: Literal["ready", "unavailable"] = Field(description="Whether requests can be served.")
    database: Literal["ok", "busy", "unreachable"] = Field(
        description="Without it nothing works. `busy`: it is reachable, but no connection was free for two seconds."
    )
    temporal: Literal["ok", "unreachable"] = Field(description="Without it events wait, and two-step calls answer 503.")
    ledger: Ledgers = Field(description="Looked up once a minute at most.")


class LedgerGauge:
    """How many ledgers are known to be invalid, counted at most once a minute. Used from one event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._invalid: int | None = None
        self._count: asyncio.Task[None] | None = None
        self._due_at = 0.0

    async def look(self) -> Ledgers:
        """What the last count found; a new one is waited for, for a second at most."""
        if self._count is None and time.monotonic() >= self._due_at:
            self._count = asyncio.create_task(self._look())
        if self._count is not None:
            await asyncio.wait([self._count], timeout=_PROBE_S)
        if self._invalid is None:
            return Ledgers(status="unknown", invalid_organizations=None)
        return Ledgers(status="invalid" if self._invalid else "ok", invalid_organizations=self._invalid)

    async def _look(self) -> None:
        try:
            self._invalid = await count_invalid(self._database)
            self._due_at = time.monotonic() + _LEDGERS_INTERVAL_S
        except (DatabaseUnavailable, psycopg.Error) as error:
            logger.warning("invalid ledgers were not counted: %s", error)
        finally:
            self._count = None


@router.get("/healthz", response_model=Health)
async def get_health() -> JsonResponse:
    """Answer 200 while the process serves requests."""
    return respond(Health(status="ok"))


@router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
async def get_readiness(request: Request) -> JsonResponse:
    """Answer 200 when the database is reachable, however busy, else 503; Temporal and ledgers are shown only.

    A ledger found invalid is a matter for people: taking every process out of service would help nobody.
    """
    services: ApiServices = request.app.state.services
    database, temporal, ledger = await asyncio.gather(
        _database_state(services.database),
        _port_answers(services.settings.temporal_address),
        _gauge(request.app).look(),
    )
    readiness = Readiness(
        status="unavailable" if database == "unreachable" else "ready",
        database=database,
        temporal="ok" if temporal else "unreachable",
        ledger=ledger,
    )
    return respond(readiness, 200 if readiness.status == "ready" else 503)


def _gauge(app: FastAPI) -> LedgerGauge:
    if not hasattr(app.state, "ledger_gauge"):
        app.state.ledger_gauge = LedgerGauge(app.state.services.database)
    gauge: LedgerGauge = app.state.ledger_gauge
    return gauge


async def _database_state(database: Database) -> Literal["ok", "busy", "unreachable"]:
    # A statement that is cancelled still waits for Postgres to say so, hence nobody waits for the cancelled probe.
    probe = asyncio.create_task(_answers(database))
    await asyncio.wait([probe], timeout=_DATABASE_PROBE_S)
    if probe.done() and probe.result():
        return "ok"
    probe.cancel()
    return "busy" if database.is_busy() else "unreachable"


async def _answers(database: Database) -> bool:
    try:
        await database.system_rows("select 1")
    except (DatabaseUnavailable, psycopg.Error, OSError):
        return False
    return True


async def _port_answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_PROBE_S):
            _, writer = await asyncio.open_connection(host, int(port))
    except (OSError, ValueError, TimeoutError):
        return False
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return True
