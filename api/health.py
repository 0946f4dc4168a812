"""Probes for supervisors and load balancers; no key needed."""

import asyncio
from contextlib import suppress
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request

from api.responses import JsonResponse, respond
from api.route import ApiServices
from db.session import DatabaseUnavailable

router = APIRouter(tags=["Health"])

_PROBE_S = 1.0


class Health(BaseModel):
    """The process is alive."""

    status: Literal["ok"] = Field(description="Always `ok`.")


class Readiness(BaseModel):
    """What this process can reach."""

    status: Literal["ready", "unavailable"] = Field(description="Whether requests can be served.")
    database: Literal["ok", "unreachable"] = Field(description="Without it nothing works.")
    temporal: Literal["ok", "unreachable"] = Field(description="Without it events wait, and two-step calls answer 503.")


@router.get("/healthz", response_model=Health)
async def get_health() -> JsonResponse:
    """Answer 200 while the process serves requests."""
    return respond(Health(status="ok"))


@router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
async def get_readiness(request: Request) -> JsonResponse:
    """Answer 200 when the database is reachable, else 503; Temporal is shown, but does not decide."""
    services: ApiServices = request.app.state.services
    database, temporal = await asyncio.gather(
        _database_answers(services), _port_answers(services.settings.temporal_address)
    )
    readiness = Readiness(
        status="ready" if database else "unavailable",
        database="ok" if database else "unreachable",
        temporal="ok" if temporal else "unreachable",
    )
    return respond(readiness, 200 if database else 503)


async def _database_answers(services: ApiServices) -> bool:
    try:
        await services.database.system_rows("select 1")
    except (DatabaseUnavailable, OSError):
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
