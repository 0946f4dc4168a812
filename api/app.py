"""The HTTP application: its routers, its edge, its documentation."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline

from api import (
    assets,
    balances,
    events,
    groups,
    health,
    holds,
    ledger,
    lots,
    participants,
    programs,
    redemptions,
    rewards,
    rules,
    simulations,
    state,
    statements,
    transfers,
    two_step,
    wallet,
)
from api.backlog import BacklogGauge
from api.errors import install_error_handlers
from api.middleware import EdgeMiddleware
from api.rate_limits import RateLimiter
from api.route import ApiServices
from api.waker import Waker
from db.session import Database
from domain.clock import Clock, system_clock
from settings import Settings
from workflows.gateway import Gateway

DESCRIPTION = """
Send events, run earn rules, keep points, cashback and tiers on a double-entry ledger that anyone can check.

Every request carries an API key (`Authorization: Bearer sk_...` or `X-API-Key`). Amounts are decimal strings, times
are RFC 3339 in UTC, lists are paged with `limit` and `cursor`, and errors have one form with a stable `code`.
"""

ROUTERS = (
    events.router,
    balances.router,
    holds.router,
    lots.router,
    participants.router,
    state.state_router("Participants", "participant"),
    state.history_router,
    groups.router,
    state.state_router("Groups", "group"),
    programs.router,
    state.state_router("Programs", "program"),
    assets.router,
    wallet.router,
    rewards.router,
    redemptions.router,
    two_step.router,
    transfers.router,
    rules.router,
    simulations.router,
    statements.router,
    ledger.router,
    health.router,
)


def create_app(
    settings: Settings,
    database: Database | None = None,
    clock: Clock = system_clock,
    gateway: Gateway | None = None,
) -> FastAPI:
    """The application. A `database` and a `gateway` to Temporal that it isn't given it makes from `settings`."""
    own = database is None
    if database is None:
        database = Database(
            settings.database_url.get_secret_value(),
            size=settings.database_pool_size,
            timeout_s=settings.database_pool_timeout_s,
            clock=clock,
        )
    if gateway is None:
        gateway = Gateway.from_settings(settings)
    waker = Waker(database, gateway)
    backlog = BacklogGauge(database, settings.backlog_limit)
    services = ApiServices(settings, database, RateLimiter(), gateway, waker, backlog, clock)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if own:
            await services.database.open()
        yield
        backlog.close()
        await waker.close()
        if own:
            await services.database.close()

    # The documentation's page brings its own scripts: where this runs, no CDN may be in reach.
    app = FastAPIOffline(
        title="Scrip",
        version="1",
        description=DESCRIPTION.strip(),
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
    )
    app.state.services = services
    install_error_handlers(app)
    app.add_middleware(EdgeMiddleware, settings=settings, limiter=services.limiter, clock=clock)
    for router in ROUTERS:
        app.include_router(router)
    app.openapi = _openapi(app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """The OpenAPI document with both ways to send the key, made once."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            schema.setdefault("components", {})["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer", "description": "An API key as a bearer token."},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "An API key."},
            }
            for path, operations in schema["paths"].items():
                if path.startswith("/v1/"):
                    for operation in operations.values():
                        operation["security"] = [{"bearer": []}, {"header": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    return openapi
